"""What an image processor does to pixels, read from its file: some, such as SAM 2's, cannot be imported without
torchvision."""

from dataclasses import dataclass

from PIL import Image
from transformers import ImageProcessingMixin


@dataclass(frozen=True)
class ProcessorValues:
    """
    Attributes:
        side: of the model's input in pixels.
        mean, std: of R, G and B in [0, 255]; three numbers each.
        keeps_aspect_ratio: the longer side is resized to `side` and the rest is padding; else both are.
        resample: PIL's number of the filter.
    """

    side: int
    mean: list[float]
    std: list[float]
    keeps_aspect_ratio: bool
    resample: int


def read_processor_values(name: str, path: str | None = None) -> ProcessorValues:
    """
    Args:
        name: directory, or Hub name in reach, of a model that was saved together with its image processor.
        path: where it is, if that is not its name.

    Raises:
        ValueError: if there is no such file, or it has no single size or no mean and variance.
    """
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(path or name)
    except (OSError, ValueError):
        values = {}
    try:
        size = values["crop_size" if values.get("do_center_crop", "crop_size" in values) else "size"]
        sides = set(size.values()) if isinstance(size, dict) else {size}  # in old files a number
        (side,) = sides
        scale = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0
        normalize = values.get("do_normalize", True)
        return ProcessorValues(
            side=int(side),
            mean=[value / scale for value in (values["image_mean"] if normalize else [0.0] * 3)],
            std=[value / scale for value in (values["image_std"] if normalize else [1.0] * 3)],
            keeps_aspect_ratio=isinstance(size, dict) and "longest_edge" in size,
            resample=values.get("resample", Image.Resampling.BILINEAR),
        )
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{name} has no preprocessor_config.json that gives one `size`, `image_mean` and `image_std`; choose a "
            "model that is saved together with its image processor."
        ) from None
