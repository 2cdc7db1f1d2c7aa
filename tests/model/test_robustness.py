"""The processor: whatever comes in, there are tensors of the right form or a clear error."""

import torch
from fuzz import IMAGES, examples, prompts
from hypothesis import given
from hypothesis import strategies as st

from hf_efficientsam import EfficientSamImageProcessor, EfficientSamProcessor

PROCESSORS = {
    "square": EfficientSamProcessor(EfficientSamImageProcessor(size=32, max_image_pixels=5000)),
    "aspect kept": EfficientSamProcessor(EfficientSamImageProcessor(size=32, keep_aspect_ratio=True)),
}


@examples(250)
@given(st.sampled_from(list(PROCESSORS)), IMAGES)
def test_any_image(kind, images):
    try:
        inputs = PROCESSORS[kind](images)
    except (ValueError, TypeError) as error:
        assert str(error)
        return
    pixels, sizes, inside = (inputs[name] for name in ("pixel_values", "original_sizes", "reshaped_input_sizes"))
    assert pixels.dtype == torch.float32 and pixels.isfinite().all() and len(pixels) == len(sizes) == len(inside)
    assert pixels.shape[1] == 3 and all(side in (16, 32) for side in pixels.shape[2:])
    assert (sizes > 0).all() and (inside > 0).all() and (inside <= torch.tensor(pixels.shape[2:])).all()


@examples(400)
@given(st.lists(prompts(), min_size=1, max_size=2))
def test_any_prompts(images):
    names = {name for image in images for name in image}
    asked = {f"input_{name}": [image.get(name) for image in images] for name in names}
    try:
        inputs = PROCESSORS["square"](original_sizes=[(9, 7), (30, 40)][: len(images)], **asked)
    except (ValueError, TypeError) as error:
        assert str(error)
        return
    assert len({array.shape[:2] for array in inputs.values()}) <= 1
    assert all(len(array) == len(images) and array.isfinite().all() for array in inputs.values())
    assert ("input_points" in inputs) == ("input_labels" in inputs)
