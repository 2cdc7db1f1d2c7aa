"""What the models compute in, on which device, and that neither depends on torch's defaults."""

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
