"""What the models compute in, on which device, and that neither depends on torch's defaults."""

import copy
import pickle

import numpy as np
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_efficientsam import EfficientSamMaskGenerator, EfficientSamPredictor
from hf_efficientsam.model import modeling_efficientsam


class FloatingTypes(TorchDispatchMode):
    """Collects the floating point types of all tensors that operators return."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        self.seen |= {tensor.dtype for tensor in tensors}
        return output


def every_prompt(dtype: torch.dtype, batch_size: int = 2) -> dict[str, torch.Tensor]:
    """Points, boxes (some missing) and masks of another size than the model's, three prompts an image."""
    boxes = tiny.random(batch_size, 3, 2, 2, scale=60).sort(dim=2).values.flatten(2)
    boxes[:, 1] = -10
    return {
        "input_points": tiny.random(batch_size, 3, 2, 2, scale=60).to(dtype),
        "input_labels": torch.tensor([[1, 0], [1, -10], [0, 1]]).expand(batch_size, 3, 2),
        "input_boxes": boxes.to(dtype),
        "input_masks": tiny.random(batch_size, 3, 30, 42).to(dtype) - 0.5,
    }


MODELS = {
    "masks": (tiny.model, lambda dtype: {"pixel_values": tiny.pixel_values().to(dtype), **every_prompt(dtype)}),
    "encoder": (tiny.vision_model, lambda dtype: {"pixel_values": tiny.pixel_values().to(dtype)}),
    "backbone": (
        lambda: tiny.backbone(pyramid_strides=[4, 8, 16, 32], window_size=2),
        lambda dtype: {"pixel_values": tiny.pixel_values().to(dtype)},
    ),
    "classifier": (
        tiny.classifier,
        lambda dtype: {"pixel_values": tiny.pixel_values().to(dtype), "labels": torch.tensor([1, 3])},
    ),
    "sami": (
        tiny.sami_model,
        lambda dtype: {
            "pixel_values": tiny.pixel_values().to(dtype),
            "target_features": tiny.random(2, 20, 8).to(dtype),
            "noise": tiny.random(2, 20).to(dtype),
        },
    ),
    "saliency": (
        tiny.saliency_head,
        lambda dtype: {
            "image_embeddings": tiny.random(2, tiny.CHANNELS, 4, 5).to(dtype),
            "labels": tiny.random(2, 64, 80).to(dtype),
        },
    ),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_everything_is_computed_in_the_models_precision(name, dtype, default, attention):
    """So `model.double()` is float64 throughout, and float32 needs no float64, which Apple's MPS lacks."""
    make, inputs = MODELS[name]
    model = make().to(dtype)
    model.set_attn_implementation(attention)
    inputs = inputs(dtype)
    torch.set_default_dtype(default)
    try:
        with FloatingTypes() as types:
            model(**inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    of_integers = {torch.float32} if name == "sami" else set()  # the mask of removed patches, zeros and ones
    assert types.seen - of_integers == {dtype} - of_integers
    assert dtype in types.seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_no_float64_where_weights_and_inputs_have_none(dtype):
    """On the meta device, where shapes and types are those of any device."""
    model, inputs = tiny.model().to("meta", dtype), every_prompt(torch.float32)
    inputs = {name: tensor.to("meta") for name, tensor in inputs.items()}
    with FloatingTypes() as types:
        kinds = (None, None, inputs["input_boxes"], inputs["input_masks"])
        prompts = model.prompt_encoder(*kinds, 2, (4, 5), (64, 80))
        model.get_image_embeddings(tiny.pixel_values().to("meta"))
    assert torch.float64 not in types.seen
    assert all(prompt.is_meta for prompt in prompts)


@pytest.mark.parametrize("default", ["meta", torch.float64])
def test_torchs_defaults_change_nothing(default):
    """A default device other than the model's, as users of a GPU set it, and another default type."""
    model, processor = tiny.model_for_mask_generation(), tiny.processor()
    image = np.uint8(tiny.random(50, 70, 3, scale=255).numpy())

    def answers() -> list:
        predictor = EfficientSamPredictor(model, processor)
        predictor.set_image(image)
        generator = EfficientSamMaskGenerator(
            model, processor, 4, pred_iou_thresh=-1, stability_score_thresh=0.1, crop_n_layers=1
        )
        records = generator.generate(image)
        assert records
        masks = [record.pop("segmentation") for record in records]
        points, boxes = [[[[9, 9]], [[5, 5], [60, 40]]]], [[None, [9, 9, 40, 40]]]
        inputs = processor([image], input_points=points, input_boxes=boxes)
        counts = processor.count_prompts(inputs)
        return [*predictor.predict(box=np.array([10, 10, 40, 40])), *masks, records, *inputs.values(), counts]

    expected = answers()
    if default == "meta":
        torch.set_default_device(default)
    else:
        torch.set_default_dtype(default)
    try:
        found = answers()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert type(ours) is type(theirs)
        if isinstance(ours, list):
            assert ours == theirs
        else:
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_embeddings_in_another_precision_than_the_weights(kind):
    """As a cache holds them, or as an encoder in half precision on a GPU made them."""
    model, prompts = tiny.model(), every_prompt(torch.float32)
    embeddings = model.get_image_embeddings(tiny.pixel_values()).to(kind)
    found = model(image_embeddings=embeddings, **prompts)
    expected = model(image_embeddings=embeddings.float(), **prompts)
    torch.testing.assert_close(found.pred_masks, expected.pred_masks, atol=0, rtol=0)
    _, scores, masks = model.predict_confident(embeddings[:1], prompts["input_points"][:1], -10)
    assert masks.dtype == scores.dtype == torch.float32


def test_an_embedding_of_the_predictor_can_train_a_decoder():
    predictor = EfficientSamPredictor(tiny.model(), tiny.processor())
    predictor.set_image(np.zeros((40, 60, 3), np.uint8))
    model = predictor.model.train()
    boxes = torch.tensor([[[5.0, 5, 30, 30]]])
    model(image_embeddings=predictor.get_image_embedding(), input_boxes=boxes).pred_masks.mean().backward()
    assert model.mask_decoder.mask_tokens.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("batch_size", "num_prompts"), [(0, 2), (2, 0), (1, 1)])
@pytest.mark.parametrize("multimask_output", [True, False])
def test_no_image_no_prompt_and_one_of_each(batch_size, num_prompts, multimask_output):
    model, boxes = tiny.model(), torch.ones(batch_size, num_prompts, 4)
    embeddings = tiny.random(2, tiny.CHANNELS, 4, 5)[:batch_size]
    output = model(image_embeddings=embeddings, input_boxes=boxes, multimask_output=multimask_output)
    shape = (batch_size, num_prompts, 3 if multimask_output else 1)
    assert output.iou_scores.shape == shape
    assert output.pred_masks.shape == (*shape, 64 // 4, 80 // 4)


@pytest.mark.parametrize("layout", ["channels_last", "not contiguous", "expanded"])
@torch.no_grad()
def test_memory_layout_of_the_input_does_not_matter(layout):
    model, pixel_values, prompts = tiny.model(), tiny.pixel_values(), every_prompt(torch.float32)
    laid_out = {
        "channels_last": lambda x: x.to(memory_format=torch.channels_last),
        "not contiguous": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda x: torch.cat([x, x], dim=1)[:, :3],
    }[layout](pixel_values)
    prompts = {name: tensor.repeat_interleave(2, dim=1)[:, ::2] for name, tensor in prompts.items()}
    expected, found = model(pixel_values, **prompts), model(laid_out, **prompts)
    torch.testing.assert_close(found.pred_masks, expected.pred_masks, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.iou_scores, expected.iou_scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_of_model_processor_and_predictor(duplicate):
    predictor = EfficientSamPredictor(tiny.model(), tiny.processor())
    predictor.set_image(np.uint8(tiny.random(50, 70, 3, scale=255).numpy()))
    box = np.array([10, 10, 40, 40])
    for ours, theirs in zip(duplicate(predictor).predict(box=box), predictor.predict(box=box), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("decoder", "attention"), [("fast", "sdpa"), ("reference", "eager")])
@torch.no_grad()
def test_one_compiled_graph_serves_any_number_of_prompts(attention, decoder, monkeypatch):
    if decoder == "reference":
        monkeypatch.setattr(modeling_efficientsam, "can_decode_fast", lambda *args: False)
    model, graphs = tiny.model(), []
    model.set_attn_implementation(attention)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=lambda module, inputs: graphs.append(1) or module.forward)
    embeddings = tiny.random(1, tiny.CHANNELS, 4, 4)
    for count in (1, 2, 3, 5, 8, 13):
        boxes = tiny.random(1, count, 2, 2, scale=60).sort(dim=2).values.flatten(2)
        found, expected = (f(image_embeddings=embeddings, input_boxes=boxes) for f in (compiled, model))
        torch.testing.assert_close(found.pred_masks, expected.pred_masks, atol=1e-5, rtol=0)
    assert len(graphs) <= 2  # for one prompt, and for more
    torch.compiler.reset()
