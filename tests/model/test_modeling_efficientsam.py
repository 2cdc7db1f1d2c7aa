import copy
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import pipeline
from transformers.utils import logging as transformers_logging

from hf_efficientsam import (
    EfficientSamConfig,
    EfficientSamImageProcessor,
    EfficientSamModel,
    EfficientSamProcessor,
    EfficientSamVisionModel,
)

HEIGHT, WIDTH = 64, 80  # 4 x 5 patches
B, Q = 2, 3  # images, prompts an image


@pytest.fixture
def model() -> EfficientSamModel:
    return tiny.model()


@pytest.fixture
def official_model() -> EfficientSamModel:
    """A model of the official kind: neither background points nor mask prompts."""
    return tiny.official_model()


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return tiny.pixel_values(B, HEIGHT, WIDTH)


@pytest.fixture
def points() -> torch.Tensor:
    return tiny.random(B, Q, 2, 2, scale=60)


@pytest.fixture
def boxes() -> torch.Tensor:
    corner = tiny.random(B, Q, 2, scale=30)
    return torch.cat([corner, corner + 5 + tiny.random(B, Q, 2, scale=25)], dim=-1)


@pytest.fixture
def masks() -> torch.Tensor:
    return 8 * tiny.random(B, Q, HEIGHT // 4, WIDTH // 4) - 4


def assert_same(output, expected, tolerance=1e-5):
    torch.testing.assert_close(output.pred_masks, expected.pred_masks, atol=tolerance, rtol=0)
    torch.testing.assert_close(output.iou_scores, expected.iou_scores, atol=tolerance, rtol=0)


def differs(output, expected) -> bool:
    return (output.pred_masks - expected.pred_masks).abs().max().item() > 1e-3


# ----------------------------------------------------------------------------------------- inputs and outputs


@torch.no_grad()
def test_output_shapes(model, pixel_values, points, boxes, masks):
    output = model(pixel_values, input_points=points, input_boxes=boxes, input_masks=masks)
    assert output.pred_masks.shape == (B, Q, 3, HEIGHT // 4, WIDTH // 4)
    assert output.iou_scores.shape == (B, Q, 3)
    output = model(pixel_values, input_points=points, multimask_output=False)
    assert output.pred_masks.shape == (B, Q, 1, HEIGHT // 4, WIDTH // 4)
    assert output.iou_scores.shape == (B, Q, 1)


@torch.no_grad()
def test_no_prompt_counts_as_one(model, pixel_values):
    assert model(pixel_values).pred_masks.shape == (B, 1, 3, HEIGHT // 4, WIDTH // 4)


@torch.no_grad()
def test_image_embeddings_in_place_of_pixels(model, pixel_values, points):
    embeddings = model.get_image_embeddings(pixel_values)
    assert embeddings.shape == (B, 32, HEIGHT // 16, WIDTH // 16)
    assert_same(model(image_embeddings=embeddings, input_points=points), model(pixel_values, input_points=points), 0)


def test_exactly_one_of_pixels_and_embeddings(model, pixel_values):
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="exactly one"):
        model(pixel_values, image_embeddings=torch.zeros(B, 32, 4, 5))


@torch.no_grad()
def test_return_dict_false(model, pixel_values, points):
    scores, masks = model(pixel_values, input_points=points, return_dict=False)
    expected = model(pixel_values, input_points=points)
    torch.testing.assert_close(masks, expected.pred_masks, atol=0, rtol=0)
    torch.testing.assert_close(scores, expected.iou_scores, atol=0, rtol=0)


@torch.no_grad()
def test_labels_default_to_the_object(model, pixel_values, points):
    ones = torch.ones(B, Q, 2, dtype=torch.long)
    expected = model(pixel_values, input_points=points, input_labels=ones)
    assert_same(model(pixel_values, input_points=points), expected, 0)
    assert differs(model(pixel_values, input_points=points, input_labels=0 * ones), expected)


@pytest.mark.parametrize("by_config", [False, True])
@torch.no_grad()
def test_hidden_states_and_attentions(model, pixel_values, points, by_config):
    model.set_attn_implementation("eager")
    model.config.mask_decoder_config.prompts_per_chunk = 1  # must not cut the attentions into pieces
    wanted = {"output_hidden_states": True, "output_attentions": True}
    if by_config:
        for name in wanted:
            setattr(model.config, name, True)
        wanted = {}
    output = model(pixel_values, input_points=points, **wanted)
    n = 4 * 5
    assert [tuple(x.shape) for x in output.vision_hidden_states] == 3 * [(B, n, 24)]
    assert [tuple(x.shape) for x in output.vision_attentions] == 2 * [(B, 3, n, n)]
    tokens = 5 + points.shape[2] + 1  # outputs, points, and what stands for the empty slots
    assert [tuple(x.shape) for x in output.mask_decoder_attentions] == 2 * [(B, Q, 4, tokens, n)]
    for weights in output.vision_attentions + output.mask_decoder_attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    first, second = output.mask_decoder_attentions[0][0, :2]
    assert (first - second).abs().max() > 1e-4  # each prompt looks in its own way


@torch.no_grad()
def test_nothing_is_recorded_unless_asked(model, pixel_values, points):
    assert list(model(pixel_values, input_points=points)) == ["iou_scores", "pred_masks"]


@torch.no_grad()
def test_vision_model(model, pixel_values):
    vision = EfficientSamVisionModel(model.config.vision_config).eval()
    state = {name: value for name, value in model.state_dict().items() if name.startswith("vision_encoder.")}
    vision.load_state_dict(state, strict=True)
    output = vision(pixel_values, output_hidden_states=True)
    torch.testing.assert_close(output.last_hidden_state, model.get_image_embeddings(pixel_values), atol=0, rtol=0)
    assert len(output.hidden_states) == 3


@torch.no_grad()
def test_any_multiple_of_the_patch(model, points):
    for height, width in ((16, 48), (64, 32), (80, 112)):
        output = model(tiny.random(1, 3, height, width), input_points=points[:1])
        assert output.pred_masks.shape == (1, Q, 3, height // 4, width // 4)


@pytest.mark.parametrize("shape", [(1, 3, 60, 64), (1, 3, 64, 72), (1, 4, 64, 64), (1, 1, 64, 64)])
def test_sizes_that_do_not_fit(model, shape):
    with pytest.raises(ValueError, match="multiples of 16"):
        model(torch.zeros(shape))


def test_position_table_is_read_as_it_is_on_the_pretraining_grid(model):
    embeddings = model.vision_encoder.embeddings
    table = embeddings.position_embeddings
    assert table.shape == (1, 1 + 4 * 4, 24)
    torch.testing.assert_close(embeddings.interpolate_positions(4, 4), table[:, 1:], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"input_points": torch.zeros(B, Q, 2)}, "input_points has shape"),
        ({"input_points": torch.zeros(B, Q, 1, 3)}, "input_points has shape"),
        ({"input_boxes": torch.zeros(B, 4)}, "input_boxes has shape"),
        ({"input_boxes": torch.zeros(B, Q, 5)}, "input_boxes has shape"),
        ({"input_labels": torch.ones(B, Q, 1)}, "one label for each"),
        ({"input_points": torch.zeros(B, Q, 2, 2), "input_labels": torch.ones(B, Q, 1)}, "one label for each"),
        ({"input_points": torch.zeros(B + 1, Q, 2, 2)}, "same number of prompts"),
        ({"input_points": torch.zeros(B, Q, 2, 2), "input_boxes": torch.zeros(B, Q + 1, 4)}, "same number of prompts"),
        ({"input_boxes": torch.zeros(B, Q, 4), "input_masks": torch.zeros(B, 2, 16, 20)}, "same number of prompts"),
        ({"input_points": torch.zeros(B, Q, 1, 2), "input_labels": torch.full((B, Q, 1), 2)}, "input_boxes"),
    ],
)
def test_prompts_that_do_not_fit(model, pixel_values, prompts, message):
    with pytest.raises(ValueError, match=message):
        model(pixel_values, **prompts)


# -------------------------------------------------------------------------------------------------- prompts


@torch.no_grad()
def test_every_kind_of_prompt_counts(model, pixel_values, points, boxes, masks):
    by_points = model(pixel_values, input_points=points)
    assert differs(model(pixel_values, input_boxes=boxes), by_points)
    assert differs(model(pixel_values, input_points=points, input_boxes=boxes), by_points)
    assert differs(model(pixel_values, input_points=points, input_masks=masks), by_points)
    assert differs(model(pixel_values, input_points=points + 8), by_points)


@pytest.mark.parametrize("label", [-1, -10])
@pytest.mark.parametrize("num_padding", [1, 3, 9])
@torch.no_grad()
def test_padding_points_equal_leaving_them_out(model, pixel_values, points, boxes, label, num_padding):
    padded = torch.cat([points, torch.full((B, Q, num_padding, 2), 33.0)], dim=2)
    labels = torch.ones(B, Q, 2 + num_padding, dtype=torch.long)
    labels[:, :, 2:] = label
    for extra in ({}, {"input_boxes": boxes}):
        expected = model(pixel_values, input_points=points, **extra)
        assert_same(model(pixel_values, input_points=padded, input_labels=labels, **extra), expected)


@torch.no_grad()
def test_padding_boxes_equal_leaving_them_out(model, pixel_values, points, boxes):
    boxes[:, 1] = -10
    output = model(pixel_values, input_points=points, input_boxes=boxes)
    without = model(pixel_values, input_points=points)
    beside = model(pixel_values, input_points=points[:, :1], input_boxes=boxes[:, :1])
    torch.testing.assert_close(output.pred_masks[:, 1], without.pred_masks[:, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.pred_masks[:, :1], beside.pred_masks, atol=1e-5, rtol=0)
    assert (output.pred_masks[:, 0] - without.pred_masks[:, 0]).abs().max() > 1e-3


@torch.no_grad()
def test_padding_takes_part_as_in_the_official_model(model, pixel_values, points):
    expected = model(pixel_values, input_points=points)
    model.prompt_encoder.padding_embed.weight += 1
    assert differs(model(pixel_values, input_points=points), expected)
    seven = tiny.random(B, Q, 7, 2, scale=60)  # no slot is left over, so padding is not there
    expected = model(pixel_values, input_points=seven)
    model.prompt_encoder.padding_embed.weight += 1
    assert_same(model(pixel_values, input_points=seven), expected, 0)


@torch.no_grad()
def test_every_point_beyond_six_is_used(model, pixel_values):
    points = tiny.random(B, Q, 9, 2, scale=60)
    expected = model(pixel_values, input_points=points)
    for i in range(9):
        moved = points.clone()
        moved[:, :, i] = 60 - moved[:, :, i]
        assert differs(model(pixel_values, input_points=moved), expected), f"point {i} is not used"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_ragged_prompts_beyond_six_equal_one_at_a_time(model, pixel_values, boxes, attention):
    model.set_attn_implementation(attention)
    counts = [[1, 9, 4], [6, 0, 7]]
    points, labels = tiny.random(B, Q, 9, 2, scale=60), torch.full((B, Q, 9), -10)
    boxes[0, 2] = -10
    alone = []
    for b in range(B):
        for q, count in enumerate(counts[b]):
            labels[b, q, :count] = torch.arange(count) % 2
            prompts = {"input_boxes": boxes[b, q][None, None]} if (b, q) != (0, 2) else {}
            if count:
                prompts["input_points"] = points[b, q, :count][None, None]
                prompts["input_labels"] = labels[b, q, :count][None, None]
            alone.append(model(pixel_values[b : b + 1], **prompts).pred_masks[0, 0])
    output = model(pixel_values, input_points=points, input_labels=labels, input_boxes=boxes)
    torch.testing.assert_close(output.pred_masks.flatten(0, 1), torch.stack(alone), atol=1e-5, rtol=0)


def test_background_points_only_where_enabled(official_model, pixel_values, points):
    labels = torch.tensor([1, 0]).expand(B, Q, 2)
    with pytest.raises(ValueError, match="background_points=False"):
        official_model(pixel_values, input_points=points, input_labels=labels)


def test_mask_prompts_only_where_enabled(official_model, pixel_values, points, masks):
    with pytest.raises(ValueError, match="mask_prompts=False"):
        official_model(pixel_values, input_points=points, input_masks=masks)


@torch.no_grad()
def test_mask_prompts_of_other_sizes_and_one_for_all(model, pixel_values, points, masks):
    flat = masks.mean(dim=(2, 3), keepdim=True)  # the same at every size, so resampling must not show
    expected = model(pixel_values, input_points=points, input_masks=flat.expand(-1, -1, 16, 20))
    for size in ((4, 5), (64, 80), (33, 7)):
        assert_same(model(pixel_values, input_points=points, input_masks=flat.expand(-1, -1, *size)), expected)

    expected = model(pixel_values, input_points=points, input_masks=masks[:, :1].expand(-1, Q, -1, -1))
    assert_same(model(pixel_values, input_points=points, input_masks=masks[:, :1]), expected)
    assert_same(model(pixel_values, input_points=points, input_masks=masks[:, 0]), expected)
    assert differs(model(pixel_values, input_points=points, input_masks=masks[:, 1]), expected)


@torch.no_grad()
def test_each_prompt_has_its_own_mask(model, pixel_values, points, masks):
    output = model(pixel_values, input_points=points, input_masks=masks)
    for q in range(Q):
        alone = model(pixel_values, input_points=points[:, q : q + 1], input_masks=masks[:, q : q + 1])
        torch.testing.assert_close(output.pred_masks[:, q], alone.pred_masks[:, 0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_mask_alone_is_a_prompt(model, pixel_values, masks):
    assert model(pixel_values, input_masks=masks).pred_masks.shape[:2] == (B, Q)


@torch.no_grad()
def test_ragged_batch_through_the_processor_equals_one_at_a_time(model):
    processor = EfficientSamProcessor(EfficientSamImageProcessor(size={"height": 64, "width": 80}))
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (h, w, 3), dtype=np.uint8) for h, w in ((50, 70), (120, 33), (64, 80))]
    points = [[[[10, 20]], [[5, 5], [40, 30], [60, 45]]], [[[20, 100]]], [[[i, i] for i in range(8)], [[1, 2]]]]
    labels = [[[1], [1, 0, 1]], [[1]], [[1, 0, 1, 1, 1, 0, 1, 1], [1]]]
    boxes = [[[1, 2, 30, 40], None], [None], [None, [5, 6, 70, 60]]]
    inputs = processor(images, input_points=points, input_labels=labels, input_boxes=boxes)
    output = model(**inputs)
    sizes = (inputs["original_sizes"], inputs["reshaped_input_sizes"])
    masks = processor.post_process_masks(
        output.pred_masks, *sizes, binarize=False, num_prompts=processor.count_prompts(inputs)
    )
    assert [len(m) for m in masks] == [2, 1, 2]
    for i, image in enumerate(images):
        alone = processor(image, input_points=[points[i]], input_labels=[labels[i]], input_boxes=[boxes[i]])
        expected = model(**alone)
        count = len(points[i])
        torch.testing.assert_close(output.iou_scores[i, :count], expected.iou_scores[0], atol=1e-5, rtol=0)
        sizes = (alone["original_sizes"], alone["reshaped_input_sizes"])
        alone = processor.post_process_masks(expected.pred_masks, *sizes, binarize=False)
        assert masks[i].shape[-2:] == image.shape[:2]
        torch.testing.assert_close(masks[i], alone[0], atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------- chunks of prompts


@pytest.mark.parametrize("num_points", [2, 9])
@torch.no_grad()
def test_chunks_of_prompts_do_not_change_the_numbers(model, pixel_values, masks, num_points):
    masks = masks[:, :1].repeat(1, 10, 1, 1) * torch.linspace(-1, 1, 10).view(1, 10, 1, 1)
    labels = torch.where(tiny.random(B, 10, num_points) < 0.4, -10, 1)
    prompts = {"input_points": tiny.random(B, 10, num_points, 2, scale=60), "input_labels": labels}
    for extra in ({}, {"input_masks": masks}):
        outputs = []
        for prompts_per_chunk in (10, 1, 8):
            model.config.mask_decoder_config.prompts_per_chunk = prompts_per_chunk
            outputs.append(model(pixel_values, **prompts, **extra))
        assert_same(outputs[1], outputs[0])
        assert_same(outputs[2], outputs[0])


def test_only_a_chunk_is_decoded_at_a_time(model, pixel_values, points):
    seen = []
    model.mask_decoder.iou_head.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:2]))
    model.config.mask_decoder_config.prompts_per_chunk = 2
    with torch.no_grad():
        model(pixel_values, input_points=points)
    model(pixel_values, input_points=points)
    assert seen == 2 * [(B, 2), (B, 1)]
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):  # for the reference decoder
        with torch.no_grad():
            model(pixel_values, input_points=points)
        assert seen == [(B, 2), (B, 1)]
        model(pixel_values, input_points=points)
    assert seen[2:] == [(B, Q)]


def decode_by_reference(model: EfficientSamModel) -> EfficientSamModel:
    """The model with the reference decoder, as where attentions are recorded."""
    original = model.mask_decoder.forward
    model.mask_decoder.forward = lambda *args, **kwargs: original(*args, **kwargs | {"output_attentions": True})
    return model


def test_gradients_of_the_fast_decoder_equal_the_references(model, pixel_values, points, boxes, masks):
    prompts = {"input_points": points, "input_boxes": boxes, "input_masks": masks}
    gradients = []
    for one in (model, decode_by_reference(copy.deepcopy(model))):
        output = one.train()(pixel_values, **prompts)
        (output.pred_masks.square().mean() + output.iou_scores.sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in one.named_parameters()})
    for name, fast in gradients[0].items():
        plain = gradients[1][name]
        if plain is None:  # the single mask's network was not asked
            assert fast is None
            continue
        # A bias of the keys moves no softmax over the image's cells: nothing, or what rounding leaves of it.
        fast = torch.zeros_like(plain) if fast is None else fast
        assert (fast - plain).abs().max() < 1e-3 * max(1e-2, plain.abs().max()), name


@pytest.mark.parametrize("with_gradients", [True, False])
def test_adapters_of_the_decoder_take_part(model, pixel_values, points, with_gradients):
    peft = pytest.importorskip("peft")
    before = model(pixel_values, input_points=points).pred_masks
    layers = r"mask_decoder.*token_attention\.(q|k|v)_proj"
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=layers), model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.1)
    with torch.set_grad_enabled(with_gradients):
        output = model(pixel_values, input_points=points)
    assert (output.pred_masks - before).abs().max() > 1e-3
    assert_same(output, decode_by_reference(model)(pixel_values, input_points=points))


@pytest.mark.parametrize("multimask_output", [True, False])
@torch.no_grad()
def test_many_prompts_of_an_image_equal_the_reference(model, pixel_values, multimask_output):
    """Also where no weight or bias is 0 or 1, as they are in a new model."""
    torch.manual_seed(1)
    for parameter in model.mask_decoder.parameters():
        parameter.add_(0.3 * parameter.std(correction=0).clamp(min=0.3) * torch.randn_like(parameter))
    labels = torch.where(tiny.random(B, 19, 3) < 0.4, -10, 1)
    prompts = {"input_points": tiny.random(B, 19, 3, 2, scale=60), "input_labels": labels}
    expected = decode_by_reference(copy.deepcopy(model))(pixel_values, **prompts, multimask_output=multimask_output)
    assert_same(model(pixel_values, **prompts, multimask_output=multimask_output), expected)

    embeddings = model.get_image_embeddings(pixel_values)[1:]
    points, threshold = prompts["input_points"][1:, :3], expected.iou_scores[1, :3].mean().item()
    kept, scores, masks = model.predict_confident(
        embeddings, points, threshold, labels[1:, :3], multimask_output, model.share_image(embeddings)
    )
    assert torch.equal(kept, expected.iou_scores[1, :3] > threshold) and 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(scores, expected.iou_scores[1, :3][kept], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masks, expected.pred_masks[1, :3][kept], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------- attention


@torch.no_grad()
def test_sdpa_equals_eager(model, pixel_values, points, boxes, masks):
    nine = tiny.random(B, Q, 9, 2, scale=60)
    labels = torch.where(tiny.random(B, Q, 9) < 0.4, -1, 1)
    for prompts in (
        {"input_points": points, "input_boxes": boxes, "input_masks": masks},
        {"input_points": nine, "input_labels": labels},
    ):
        model.set_attn_implementation("eager")
        expected = model(pixel_values, **prompts)
        model.set_attn_implementation("sdpa")
        assert_same(model(pixel_values, **prompts), expected)


@pytest.mark.slow
@torch.no_grad()
def test_flex_equals_eager(model, pixel_values, points):
    nine = tiny.random(B, Q, 9, 2, scale=60)
    labels = torch.where(tiny.random(B, Q, 9) < 0.4, -1, 1)
    # the processor's other outputs come along, as in model(**processor(...))
    extra = {"original_sizes": torch.ones(B, 2), "reshaped_input_sizes": torch.ones(B, 2)}
    for prompts in ({"input_points": points}, {"input_points": nine, "input_labels": labels}):
        model.set_attn_implementation("eager")
        expected = model(pixel_values, **prompts)
        model.set_attn_implementation("flex_attention")
        assert_same(model(pixel_values, **prompts, **extra), expected)


def test_switching_attention_reaches_every_part_without_a_warning(model, caplog):
    transformers_logging.enable_propagation()  # transformers keeps its log to itself unless told otherwise
    parts = (model, model.vision_encoder, model.mask_decoder)
    try:
        with caplog.at_level(logging.WARNING):
            for name in ("eager", "flex_attention", "sdpa"):
                model.set_attn_implementation(name)
                assert [part.config._attn_implementation for part in parts] == 3 * [name]
        assert not caplog.records
    finally:
        transformers_logging.disable_propagation()
    model.set_attn_implementation({"vision_config": "eager"})
    assert [part.config._attn_implementation for part in parts] == ["sdpa", "eager", "sdpa"]
    with pytest.raises(ValueError, match="no_such_attention"):
        model.set_attn_implementation("no_such_attention")
    assert model.mask_decoder.config._attn_implementation == "sdpa"


def test_attention_can_be_chosen_when_loading(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = EfficientSamModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.vision_encoder.config._attn_implementation == "eager"
    assert loaded.mask_decoder.config._attn_implementation == "eager"


class RecordedAttention:
    """An attention function that notes how it was called and answers as eager attention does."""

    def __init__(self):
        self.calls = []

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        from hf_efficientsam.model.modeling_vision_efficientsam import eager_attention_forward

        self.calls.append((attention_mask, kwargs))
        return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)


def test_flash_kernels_get_what_they_take(model, pixel_values, points, monkeypatch):
    # No flash kernel runs on a CPU, so this looks at what one would be given, under its name: never a mask (attention
    # to prompt tokens, whose padding counts several times, goes through sdpa), no dropout, not causal, nothing that
    # only the processor needs. As half precision decodes: float32 on a CPU takes the decoder's own way.
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert model._supports_flash_attn
    expected = decode_by_reference(model)(pixel_values, input_points=points)
    flash = RecordedAttention()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash)
    model.config._attn_implementation = "flash_attention_2"
    output = model(pixel_values, input_points=points, original_sizes=torch.ones(B, 2), reshaped_input_sizes=0)
    assert_same(output, expected)
    assert len(flash.calls) == 2 + 2 + 1  # vision layers, the tokens' looks at the image, their last one
    for mask, kwargs in flash.calls:
        assert mask is None
        assert kwargs["dropout"] == 0.0
        assert not {"original_sizes", "reshaped_input_sizes"} & kwargs.keys()
    assert not any(module.is_causal for module in model.modules() if hasattr(module, "is_causal"))

    flash.calls.clear()
    labels = torch.where(tiny.random(B, Q, 9) < 0.4, -1, 1)
    model(pixel_values, input_points=tiny.random(B, Q, 9, 2, scale=60), input_labels=labels)
    assert flash.calls and all(mask is None for mask, _ in flash.calls)


# ---------------------------------------------------------------------------------------- training behaviour


def loss_of(model, pixel_values, points, boxes, masks):
    """Uses every parameter: both kinds of output, every kind of prompt."""
    labels = torch.tensor([1, 0]).expand(B, Q, 2)
    loss = 0
    for multimask_output in (True, False):
        for prompts in (
            {"input_points": points, "input_labels": labels},
            {"input_boxes": boxes, "input_masks": masks},
        ):
            output = model(pixel_values, **prompts, multimask_output=multimask_output)
            loss = loss + output.pred_masks.pow(2).mean() + output.iou_scores.pow(2).mean()
    return loss


def test_every_parameter_gets_a_gradient(model, pixel_values, points, boxes, masks):
    model.train()
    loss_of(model, pixel_values, points, boxes, masks).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        if not name.endswith("k_proj.bias"):  # softmax cancels it, so its gradient is noise around zero
            assert parameter.grad.abs().max() > 0, f"the gradient of {name} is zero"
    table = model.vision_encoder.embeddings.position_embeddings.grad
    assert table[:, 0].abs().max() == 0  # the class token's row is carried along, not used
    assert (table[:, 1:].abs().amax(-1) > 0).all()


def test_gradient_checkpointing_gives_the_same_gradients(model, pixel_values, points, boxes, masks):
    model.train()
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable()
    layers = [*checkpointed.vision_encoder.layers, *checkpointed.mask_decoder.layers]
    assert all(layer.gradient_checkpointing for layer in layers)
    runs = []
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: runs.append(module))
    loss_of(checkpointed, pixel_values, points, boxes, masks).backward()
    assert len(runs) == 2 * 4 * len(layers)  # each once more in the backward pass
    # Layers that are run again are the reference's.
    loss_of(decode_by_reference(model), pixel_values, points, boxes, masks).backward()
    for (name, parameter), other in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, atol=1e-6, rtol=1e-5, msg=name)


def test_gradients_flow_through_get_image_embeddings(model, pixel_values, points):
    embeddings = model.get_image_embeddings(pixel_values)
    model(image_embeddings=embeddings, input_points=points).pred_masks.sum().backward()
    assert model.vision_encoder.embeddings.projection.weight.grad.abs().max() > 0
    with torch.no_grad():
        assert not model.get_image_embeddings(pixel_values).requires_grad


# ------------------------------------------------------------------------------------------- initial weights


def test_every_tensor_is_initialised_when_missing(model, tmp_path):
    model.save_pretrained(tmp_path)
    name = "mask_decoder.iou_token.weight"
    save_file({name: model.state_dict()[name]}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(1)
    expected = EfficientSamModel(model.config)
    torch.manual_seed(1)
    loaded, info = EfficientSamModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(model.state_dict()) - {name}
    for key, value in loaded.state_dict().items():
        assert value.isfinite().all(), key
        wanted = model.state_dict()[key] if key == name else expected.state_dict()[key]
        if key == name or "bias" in key or "norm" in key or "no_mask_embed" in key:
            torch.testing.assert_close(value, wanted, atol=0, rtol=0, msg=key)
        else:  # the order of random draws may differ, their spread may not
            assert value.std() > 0, key
            assert 0.5 < value.std() / wanted.std() < 2, key


def test_initialisation_leaves_nothing_out(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for tensor in tensors.values():
        tensor.data.fill_(math.nan)
        tensor._is_hf_initialized = False
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    assert [name for name, tensor in tensors.items() if not tensor.isfinite().all()] == []


@pytest.mark.parametrize("start", ["gaussian", "axes"])
def test_positions_keep_their_digits_under_autocast(start):
    positions = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    embedding = tiny.model(prompt_encoder={"position_init": start}).prompt_encoder.position_embedding
    expected = embedding(positions)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(embedding(positions), expected, atol=1e-6)
        assert torch.allclose(embedding.grid(7, 5), embedding.grid(7, 5).float())


def test_positions_of_cells_follow_frequencies_size_and_type():
    embedding = tiny.model().prompt_encoder.position_embedding
    expected = {size: embedding.compute_grid(*size) for size in [(4, 5), (5, 4)]}
    with torch.inference_mode():
        assert embedding.grid(4, 5).equal(expected[4, 5])
    for size in [(4, 5), (5, 4), (4, 5)]:
        assert embedding.grid(*size).equal(expected[size]) and not embedding.grid(*size).is_inference()
    embedding.frequencies.data.mul_(2)
    assert embedding.grid(4, 5).equal(embedding.compute_grid(4, 5)) and not embedding.grid(4, 5).equal(expected[4, 5])
    assert embedding.double().grid(4, 5).dtype == torch.float64


def test_position_frequencies_start_as_the_config_says():
    gaussian = tiny.model().prompt_encoder.position_embedding.frequencies
    assert 0.5 < gaussian.std() < 1.5 and (gaussian != 0).all()
    axes = tiny.model(prompt_encoder={"position_init": "axes"}).prompt_encoder.position_embedding.frequencies
    assert (axes != 0).sum(dim=0).tolist() == [1] * 16  # each along one axis
    for axis, part in enumerate((axes[0, :8], axes[1, 8:])):
        assert (part[0], part[-1]) == (0.25, 16), axis
        torch.testing.assert_close(part.log2().diff(), torch.full((7,), 6 / 7))


@torch.no_grad()
def test_enabling_mask_prompts_keeps_trained_numbers(official_model, pixel_values, points, masks, tmp_path):
    official_model.save_pretrained(tmp_path)
    config = EfficientSamConfig.from_pretrained(tmp_path)
    config.prompt_encoder_config.mask_prompts = True
    config.prompt_encoder_config.background_points = True
    loaded, info = EfficientSamModel.from_pretrained(tmp_path, config=config, output_loading_info=True)
    new = {"background_embed", "mask_embed", "no_mask_embed"}
    assert {key.split(".")[1] for key in info["missing_keys"]} == new
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    state = loaded.state_dict()
    for name, value in official_model.state_dict().items():
        torch.testing.assert_close(state[name], value, atol=0, rtol=0, msg=name)
    expected = official_model(pixel_values, input_points=points)
    assert_same(loaded(pixel_values, input_points=points), expected, 1e-6)
    with_mask = loaded(pixel_values, input_points=points, input_masks=masks)
    assert with_mask.pred_masks.isfinite().all() and differs(with_mask, expected)


# --------------------------------------------------------------------------------------- saving and loading


@torch.no_grad()
def test_round_trip_is_exact_and_safetensors_only(model, pixel_values, points, tmp_path):
    model.save_pretrained(tmp_path)
    weights = {path.name for path in tmp_path.iterdir()} - {path.name for path in tmp_path.glob("*.py")}
    assert weights == {"config.json", "model.safetensors"}
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    loaded, info = EfficientSamModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert not loaded.training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, atol=0, rtol=0, msg=name)
    assert_same(loaded(pixel_values, input_points=points), model(pixel_values, input_points=points), 1e-6)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["EfficientSamModel"]


@torch.no_grad()
def test_vision_model_loads_from_the_whole(model, pixel_values, tmp_path):
    model.save_pretrained(tmp_path)
    vision, info = EfficientSamVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    torch.testing.assert_close(
        vision(pixel_values).last_hidden_state, model.get_image_embeddings(pixel_values), atol=0, rtol=0
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
@torch.no_grad()
def test_half_precision(model, pixel_values, points, boxes, masks, tmp_path, dtype, tolerance):
    model.save_pretrained(tmp_path)
    half = EfficientSamModel.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    nine = tiny.random(B, Q, 9, 2, scale=60)
    labels = torch.where(tiny.random(B, Q, 9) < 0.4, -1, 1)
    for prompts in (
        {"input_points": points},
        {"input_boxes": boxes},
        {"input_points": points, "input_boxes": boxes, "input_masks": masks},
        {"input_points": nine, "input_labels": labels},
    ):
        for attention in ("sdpa", "eager"):
            half.set_attn_implementation(attention)
            output = half(pixel_values, **prompts)  # float32 input, as the processor gives it
            assert output.pred_masks.dtype == dtype
            assert output.pred_masks.isfinite().all() and output.iou_scores.isfinite().all()
            expected = model(pixel_values, **prompts)
            torch.testing.assert_close(output.pred_masks.float(), expected.pred_masks, atol=tolerance, rtol=0)
            torch.testing.assert_close(output.iou_scores.float(), expected.iou_scores, atol=tolerance, rtol=0)
        half_input = {name: value.to(dtype) if value.is_floating_point() else value for name, value in prompts.items()}
        assert half(pixel_values.to(dtype), **half_input).pred_masks.isfinite().all()


@torch.no_grad()
def test_half_precision_does_not_overflow_on_large_activations(model, pixel_values, points):
    for layer in model.vision_encoder.layers:
        layer.attention.q_proj.weight *= 200
        layer.attention.k_proj.weight *= 200
    expected = model(pixel_values, input_points=points)
    output = model.to(torch.float16)(pixel_values, input_points=points)
    assert output.pred_masks.isfinite().all()
    assert (output.pred_masks.float() - expected.pred_masks).abs().median() < 0.1


@torch.no_grad()
def test_device_map(model, pixel_values, points, tmp_path):
    model.save_pretrained(tmp_path)
    expected = model(pixel_values, input_points=points)
    for device_map in ("auto", {"": "cpu"}, {"vision_encoder": "cpu", "prompt_encoder": "cpu", "mask_decoder": "cpu"}):
        loaded = EfficientSamModel.from_pretrained(tmp_path, device_map=device_map)
        assert_same(loaded(pixel_values, input_points=points), expected, 1e-6)


@torch.no_grad()
def test_weights_offloaded_to_disk(model, pixel_values, points, boxes, masks, tmp_path):
    model.save_pretrained(tmp_path / "model")
    prompts = {"input_points": points, "input_boxes": boxes, "input_masks": masks}
    expected = model(pixel_values, **prompts)
    device_map = {
        "vision_encoder.embeddings": "cpu",
        "vision_encoder.layers": "disk",
        "vision_encoder.neck": "disk",
        "prompt_encoder": "disk",
        "mask_decoder": "disk",
    }
    loaded = EfficientSamModel.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert loaded.mask_decoder.iou_token.weight.is_meta
    assert_same(loaded(pixel_values, **prompts), expected)  # not bit for bit: the decoder goes another way


# -------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("num_points", [2, 9])
@torch.no_grad()
def test_whole_forward_is_one_graph(model, pixel_values, boxes, masks, attention, num_points, fresh_compiler):
    """Traces without a break; the compiler's own back end is left to the slow test."""
    model.set_attn_implementation(attention)
    labels = torch.where(tiny.random(B, Q, num_points) < 0.4, 0, 1)
    labels[0, 1, 1:] = -10
    inputs = {
        "pixel_values": pixel_values,
        "input_points": tiny.random(B, Q, num_points, 2, scale=60),
        "input_labels": labels,
        "input_boxes": boxes,
        "input_masks": masks,
        "original_sizes": torch.ones(B, 2),  # what a processor returns besides
        "reshaped_input_sizes": torch.ones(B, 2),
    }
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_same(compiled(**inputs), model(**inputs))


@torch.no_grad()
def test_compiled_code_does_not_take_missing_background_points_silently(
    official_model, pixel_values, points, fresh_compiler
):
    # Values cannot be read inside a graph, so the ValueError of uncompiled code shows as NaN, for that prompt alone.
    compiled = torch.compile(official_model, fullgraph=True, backend="eager")
    labels = torch.ones(B, Q, 2, dtype=torch.long)
    labels[0, 1, 0] = 0
    output = compiled(pixel_values, input_points=points, input_labels=labels)
    assert output.pred_masks.isnan().flatten(2).all(-1).nonzero().tolist() == [[0, 1]]
    assert output.pred_masks.isnan().flatten(2).any(-1).nonzero().tolist() == [[0, 1]]


@pytest.mark.slow
@pytest.mark.parametrize("num_points", [2, 9])
@torch.no_grad()
def test_compiled_whole(model, pixel_values, boxes, num_points, fresh_compiler):
    labels = torch.ones(B, Q, num_points, dtype=torch.long)
    labels[0, 1, 1:] = -10
    inputs = {
        "input_points": tiny.random(B, Q, num_points, 2, scale=60),
        "input_labels": labels,
        "input_boxes": boxes,
    }
    compiled = torch.compile(model, fullgraph=True)
    assert_same(compiled(pixel_values, **inputs), model(pixel_values, **inputs))


# ------------------------------------------------------------------------------------------------- pipeline


def test_mask_generation_pipeline(model):
    image_processor = EfficientSamImageProcessor(size={"height": 64, "width": 64})
    generator = pipeline("mask-generation", model=model, image_processor=image_processor, device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 72, 3), dtype=np.uint8))
    output = generator(image, points_per_crop=3, pred_iou_thresh=-10, stability_score_thresh=0, points_per_batch=4)
    assert len(output["masks"]) > 0
    assert len(output["masks"]) == len(output["scores"])
    for mask in output["masks"]:
        assert mask.shape == (48, 72) and mask.dtype == bool and mask.any()


# --------------------------------------------------------------------------------------------------- memory


@pytest.mark.slow
def test_memory_of_many_prompts():
    """The image is not copied once a prompt: benchmarks/decoder_memory.py at a smaller size."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        from decoder_memory import compare
    finally:
        sys.path.pop(0)
    result = compare(image_size=512, num_prompts=64)
    assert result["largest_difference"] < 1e-4
    assert result["ratio"] < 0.25, result


# --------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.float16, 0.05), (torch.bfloat16, 0.3)])
def test_cuda_equals_cpu(model, pixel_values, points, boxes, masks, dtype, tolerance):
    expected = model(pixel_values, input_points=points, input_boxes=boxes, input_masks=masks)
    model.to("cuda", dtype)
    prompts = {"input_points": points.cuda(), "input_boxes": boxes.cuda(), "input_masks": masks.cuda()}
    output = model(pixel_values.to("cuda", dtype), **prompts)
    assert (output.pred_masks.float().cpu() - expected.pred_masks).abs().max() < tolerance
