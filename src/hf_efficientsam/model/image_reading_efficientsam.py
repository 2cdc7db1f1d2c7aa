"""Images of every kind as arrays.

Needs numpy and PIL only, so that the ONNX predictor reads images as the image processor does, without torch.
"""

import os

import numpy as np
from PIL import Image, ImageOps


def image_to_array(
    image: Image.Image | np.ndarray | str | os.PathLike,
    do_convert_rgb: bool = True,
    do_rescale: bool = True,
    max_image_pixels: int | None = None,
    input_data_format: str | None = None,
) -> np.ndarray:
    """
    One image as an array `[3, H, W]`: bytes where the image has bytes, else float32 in [0, 1] (as given, if
    `do_rescale` is off). `max_image_pixels=None` means no limit. Errors: see [`EfficientSamImageProcessor`].
    """
    if isinstance(image, (str, os.PathLike)):
        image = Image.open(image)
    if isinstance(image, Image.Image):
        _check_image_size(image.height, image.width, max_image_pixels)
        pixels, input_data_format = _pil_to_array(image, do_convert_rgb), "channels_last"
    elif isinstance(image, np.ndarray):
        pixels = image
        input_data_format = input_data_format or infer_data_format(pixels.shape, "channels_last")
    else:
        raise TypeError(
            f"An image must be a PIL image, a path, an array or a tensor, not {type(image).__name__}; pass several as "
            "a list."
        )
    pixels = _to_channels_first(pixels, input_data_format)
    _check_image_size(*pixels.shape[-2:], max_image_pixels)
    if do_convert_rgb:
        pixels = np.repeat(pixels, 3, axis=0) if len(pixels) == 1 else pixels[:3]
    if len(pixels) != 3:
        raise ValueError(f"The model needs 3 channels, got {len(pixels)}; set do_convert_rgb=True.")
    return _to_bytes_or_unit_floats(pixels, do_rescale)


def segmentation_map_to_array(segmentation_map) -> np.ndarray:
    """
    A PIL image, path, array or tensor of whole numbers or booleans -> array [H, W]. Its values are kept: a palette's
    indices are classes, not colours.
    """
    if isinstance(segmentation_map, (str, os.PathLike)):
        segmentation_map = Image.open(segmentation_map)
    if isinstance(segmentation_map, Image.Image):
        segmentation_map = ImageOps.exif_transpose(segmentation_map)
    values = np.asarray(segmentation_map)
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise ValueError(
            "A segmentation map must be [height, width] of whole numbers or booleans, got "
            f"{values.dtype} of shape {values.shape}."
        )
    return values


def _check_image_size(height: int, width: int, max_image_pixels: int | None):
    if height == 0 or width == 0:
        raise ValueError(f"An image has no pixels: its height is {height} and its width {width}.")
    if max_image_pixels is not None and height * width > max_image_pixels:
        raise ValueError(
            f"An image of {width} x {height} pixels is over the limit of {max_image_pixels} pixels; make it smaller, "
            "or raise max_image_pixels of the image processor (None lifts the limit)."
        )


def _pil_to_array(image: Image.Image, do_convert_rgb: bool) -> np.ndarray:
    """The upright image as H x W or H x W x C."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16-bit gray ("I;16..."), or "I", which is how PIL has long opened 16-bit files: convert("RGB") would clip it.
        pixels = np.array(image)
        return pixels.astype(np.uint16) if pixels.min() >= 0 and pixels.max() <= 65535 else pixels
    if image.mode == "F" or not do_convert_rgb:
        return np.array(image)
    if "transparency" in image.info:
        image = image.convert("RGBA")  # PIL asks for this detour for palettes with transparency
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def infer_data_format(shape: tuple[int, ...], preferred: str) -> str:
    """Whichever of "channels_first" and "channels_last" has 1, 3 or 4 channels; `preferred` if both do."""
    if len(shape) == 2:
        return "channels_last"
    if len(shape) != 3:
        raise ValueError(
            f"An image must be H x W, H x W x C or C x H x W, got an array of shape {tuple(shape)}; pass several as a "
            "list."
        )
    found = [
        data_format
        for data_format, channels in (("channels_first", shape[0]), ("channels_last", shape[-1]))
        if channels in (1, 3, 4)
    ]
    if not found:
        raise ValueError(
            f"An image must have 1, 3 or 4 channels, first or last, got an array of shape {tuple(shape)}; pass "
            "several gray images as a list."
        )
    return preferred if preferred in found else found[0]


def _to_channels_first(pixels: np.ndarray, data_format: str) -> np.ndarray:
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.ndim != 3:
        raise ValueError(f"An image must have 2 or 3 dimensions, got an array of shape {tuple(pixels.shape)}.")
    return np.moveaxis(pixels, -1, 0) if str(getattr(data_format, "value", data_format)) == "channels_last" else pixels


def _to_bytes_or_unit_floats(pixels: np.ndarray, do_rescale: bool) -> np.ndarray:
    """Bytes stay, everything else becomes float32 in [0, 1] by the rules in the class's docstring."""
    kind = pixels.dtype.kind
    if pixels.dtype == np.uint8:
        return pixels
    if kind not in "buif":
        raise TypeError(f"Pixels must be numbers, got an array of {pixels.dtype}.")
    if kind == "f" and not np.isfinite(pixels).all():
        raise ValueError("An image holds NaN or infinite pixels.")
    if not do_rescale or kind == "b":
        return pixels.astype(np.float32)
    low, high = float(pixels.min()), float(pixels.max())
    if kind == "f":
        return _floats_to_unit(pixels.astype(np.float32), low, high)
    if low < 0 or high > 65535:
        raise ValueError(f"Integer pixels must lie in 0 to 65535, got {low:g} to {high:g}.")
    return pixels.astype(np.float32) / (65535 if pixels.dtype.type is np.uint16 or high > 255 else 255)


def _floats_to_unit(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    slack = 1e-3  # rounding of an earlier resize
    if low >= -slack and high <= 1 + slack:
        return pixels
    if low < -slack * 255 or high > 255 * (1 + slack) or high < 2:
        raise ValueError(
            f"Float pixels must lie in [0, 1] or in [0, 255], got {low:g} to {high:g}; clip or scale them, or, if the "
            "image is normalised already, set do_rescale=False and do_normalize=False."
        )
    return pixels / 255


def resized_size(original_size: tuple[int, int], size: tuple[int, int], keep_aspect_ratio: bool) -> tuple[int, int]:
    """Height and width of an image squashed to `size`, or scaled until its longest side is the longest of `size`."""
    if not keep_aspect_ratio:
        return size
    height, width = original_size
    scale = max(size) / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
