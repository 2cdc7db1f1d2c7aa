import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_efficientsam import (
    EfficientSamForImageClassification,
    EfficientSamImageProcessor,
    EfficientSamVisionModel,
)

CLASSES = 5
NAMES = {"id2label": dict(enumerate("abcde")), "label2id": dict(zip("abcde", range(5), strict=True))}
HEAD = {"layernorm.weight", "layernorm.bias", "classifier.weight", "classifier.bias"}


def make(**options) -> EfficientSamForImageClassification:
    model = tiny.classifier(**options)
    tiny.enlarge_weights(model)
    return model


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(3, 3, 48, 80, generator=torch.Generator().manual_seed(0))


def photo(height=50, width=70) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_close(output, expected, tolerance=1e-5):
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=0)


# -------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@torch.no_grad()
def test_written_out(pooling, pixel_values):
    model = make(classifier_pooling=pooling)
    encoder = model.vision_encoder
    patches = encoder.embeddings(pixel_values)
    tokens = torch.stack([encoder.cls_token[0, 0] + encoder.embeddings.position_embeddings[0, 0]])
    tokens = torch.cat([tokens.expand(3, 1, 24), patches], dim=1)
    for layer in encoder.layers:
        tokens = layer(tokens)
    pooled = tokens[:, 1:].sum(dim=1) / 15 if pooling == "mean" else tokens[:, 0]
    output = model(pixel_values, output_hidden_states=True)
    assert_close(output.logits, model.classifier(model.layernorm(pooled)), 1e-4)
    assert output.logits.shape == (3, CLASSES) and output.loss is None
    assert [tuple(state.shape) for state in output.hidden_states] == 3 * [(3, 16, 24)]
    assert_close(output.hidden_states[-1], tokens)
    assert torch.equal(model(pixel_values, return_dict=False)[0], output.logits)


@torch.no_grad()
def test_the_class_token_takes_part_in_the_mean_too(pixel_values):
    model = make()
    before = model(pixel_values).logits
    model.vision_encoder.cls_token.neg_()
    assert (model(pixel_values).logits - before).abs().max() > 0.01


@torch.no_grad()
def test_what_is_for_masks_goes_no_further():
    model, seen = make(), []
    model.vision_encoder.register_forward_pre_hook(lambda *call: seen.append(call[2].keys()), with_kwargs=True)
    model(**EfficientSamImageProcessor(size=64)(photo()))
    assert not seen[0] & {"original_sizes", "reshaped_input_sizes"}


def test_drop_path(pixel_values):
    model = make(drop_path_rate=0.9)
    plain = make()
    with torch.no_grad():
        assert torch.equal(model(pixel_values).logits, plain(pixel_values).logits)
        assert not torch.equal(model.train()(pixel_values).logits, plain.train()(pixel_values).logits)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="multiples of 16"):
        make()(torch.zeros(1, 3, 40, 48))
    with pytest.raises(Exception, match="classifier_pooling"):
        make(classifier_pooling="max")


# ----------------------------------------------------------------------------------------------------- loss


def test_class_indices_and_probabilities(pixel_values):
    """In any order: transformers decides by the first labels it sees what all later ones are."""
    indices = torch.tensor([3, 0, 2])
    one_hot = F.one_hot(indices, CLASSES).float()
    mixed = 0.3 * one_hot + 0.7 * one_hot.flip(0)
    for order in ((indices, one_hot, mixed), (mixed, indices, one_hot)):
        model = make()
        logits = model(pixel_values).logits.log_softmax(dim=-1)
        for labels in order:
            expected = -logits[range(3), labels] if labels.ndim == 1 else -(labels * logits).sum(dim=-1)
            assert_close(model(pixel_values, labels=labels).loss, expected.mean())
            # the Trainer accumulates: the sum over this batch by the size of the whole one, as it counts labels
            counted = torch.tensor(12 if labels.ndim == 1 else 12 * CLASSES)
            loss = model(pixel_values, labels=labels, num_items_in_batch=counted).loss
            assert_close(loss, expected.sum() / 12)


def test_other_problems_as_in_transformers(pixel_values):
    several = torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    model = make(problem_type="multi_label_classification")
    output = model(pixel_values, labels=several)
    assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, several))
    model = make(num_labels=1)
    values = torch.tensor([0.5, -1, 2])
    output = model(pixel_values, labels=values)
    assert_close(output.loss, F.mse_loss(output.logits[:, 0], values))


def test_probabilities_must_be_of_all_classes(pixel_values):
    with pytest.raises(ValueError, match=r"labels has shape \(3,\); .* \(3, 5\)"):
        make()(pixel_values, labels=torch.ones(3))


# ------------------------------------------------------------------------------------- loading and Auto classes


@torch.no_grad()
def test_the_encoder_and_class_token_of_pretraining(tmp_path):
    sami = tiny.sami_model()
    sami.save_pretrained(tmp_path)
    model, info = EfficientSamForImageClassification.from_pretrained(
        tmp_path, num_labels=7, classifier_pooling="cls", drop_path_rate=0.1, output_loading_info=True
    )
    assert (model.config.num_labels, model.config.classifier_pooling) == (7, "cls")
    assert [layer.drop_path_rate for layer in model.vision_encoder.layers] == [0, 0.1]
    assert info["missing_keys"] == HEAD
    assert info["unexpected_keys"] == {name for name in sami.state_dict() if name.startswith("decoder.")}
    # What pretraining saw, with no patch removed: the class token and the patches in order.
    pixel_values = torch.randn(1, 3, 64, 64)
    seen = sami.vision_encoder(pixel_values, noise=torch.arange(16.0)[None], num_kept=16).last_hidden_state
    assert_close(model.vision_encoder(pixel_values).last_hidden_state, seen)


def test_the_encoder_of_a_whole_model(tmp_path):
    whole = tiny.model()
    whole.save_pretrained(tmp_path)
    model, info = EfficientSamForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == HEAD | {"vision_encoder.cls_token"}
    left = ("vision_encoder.neck.", "prompt_encoder.", "mask_decoder.")
    assert info["unexpected_keys"] == {name for name in whole.state_dict() if name.startswith(left)}
    assert model.vision_encoder.cls_token.std() > 0.005  # new, not zero
    for name, value in whole.vision_encoder.layers.state_dict().items():
        assert torch.equal(model.vision_encoder.layers.state_dict()[name], value)


def test_its_own_encoder_for_another_model(tmp_path, pixel_values):
    model = make()
    model.save_pretrained(tmp_path)
    _, info = EfficientSamVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == HEAD | {"vision_encoder.cls_token"}
    assert all(name.startswith("vision_encoder.neck.") for name in info["missing_keys"])


@torch.no_grad()
def test_round_trip_by_auto_class(tmp_path, pixel_values):
    model = make(classifier_pooling="cls", **NAMES)
    model.save_pretrained(tmp_path)
    assert model.config.auto_map == {
        "AutoConfig": "configuration_vision_efficientsam.EfficientSamVisionConfig",
        "AutoModelForImageClassification": "modeling_classification_efficientsam.EfficientSamForImageClassification",
    }
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is EfficientSamForImageClassification and not any(info.values())
    assert loaded.config.id2label == NAMES["id2label"]
    assert_close(loaded.eval()(pixel_values).logits, model(pixel_values).logits)
    # An image processor's options without its name: by the type of the model.
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 64, "width": 64}}')
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is EfficientSamImageProcessor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pipeline(tmp_path, dtype):
    model = make(**NAMES).to(dtype)
    model.save_pretrained(tmp_path)
    processor = EfficientSamImageProcessor(size=64)
    processor.save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is EfficientSamImageProcessor
    photos, expected = [photo(), photo(90, 60)], []
    for image in photos:
        inputs = processor(image)
        assert inputs.keys() > {"pixel_values"}  # the rest is for masks
        with torch.no_grad():
            scores = model(**inputs).logits.float().softmax(dim=-1)[0]
        expected.append(dict(zip("abcde", scores.tolist(), strict=True)))
    for classify in (
        pipeline("image-classification", model=model, image_processor=processor),
        # Without the last argument transformers asks a terminal whether to run a video processor that is not there.
        pipeline("image-classification", model=str(tmp_path), trust_remote_code=False),
    ):
        for answers, scores in zip(classify(photos), expected, strict=True):
            assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(scores, abs=2e-3)
            assert answers[0]["label"] == max(scores, key=scores.get)
