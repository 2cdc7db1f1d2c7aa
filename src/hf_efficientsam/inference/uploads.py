"""What a server takes from people whom it does not know: limits and reading that web page and HTTP API share."""

from pathlib import Path

from PIL import Image

from hf_efficientsam.model.image_reading_efficientsam import ImageError, open_image, upright_image, upright_size
from hf_efficientsam.model.prompts_efficientsam import BOX_IS_CLIPPED, clip_box

from .prompt_files import group_prompts, read_prompts

MAX_FILE_BYTES = 20 * 2**20
MAX_PIXELS = 24_000_000  # larger images are refused by default
MAX_OBJECTS = 64  # of one request: each has a mask of the image's size
MAX_POINTS = 1024  # of one request: attention in the decoder grows with their square
MAX_POINTS_PER_SIDE = 32  # of segment everything
# PIL reads more, but some (EPS) through other programs, which is not safe for uploads.
FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP")


def read_upload(source: Path | bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """
    The upright image in a file.

    Args:
        source: the file or its content.
        name: its sender's name for it, for error messages.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        ImageError: one sentence about what is wrong with the file.
    """
    try:
        with open_image(source, name) as image:
            if image.format not in FORMATS:
                raise ImageError(f"{image.format} is not taken here; {', '.join(FORMATS)} are.")
            width, height = upright_size(image)
            if width * height > max_pixels:
                raise ImageError(
                    f"{width} x {height} pixels are too many; up to {max_pixels / 1e6:g} million are taken here."
                )
            return upright_image(image)
    except MemoryError:
        raise ImageError(f"{name}: the image does not fit into memory; make it smaller.") from None


def read_objects(prompts: dict, separate_points: bool = False) -> list[dict]:
    """
    The objects that points and boxes of a request show, as of `group_prompts`.

    Args:
        prompts: with some of `points`, `labels` and `boxes`, as of `read_prompts`.
        separate_points: each point on an object is an object of its own.

    Raises:
        ValueError: prompts that are none, or too many.
    """
    points, labels, boxes = read_prompts(prompts)
    if len(points) > MAX_POINTS:
        raise ValueError(f"up to {MAX_POINTS} points at a time are taken here, not {len(points)}.")
    count = len(boxes)
    if count <= MAX_OBJECTS:
        objects = group_prompts(points, labels, boxes, separate_points)
        count = len(objects)
    if count > MAX_OBJECTS:
        raise ValueError(f"up to {MAX_OBJECTS} objects at a time are segmented here, not {count}.")
    return objects


def warnings_of(objects: list[dict], width: int, height: int) -> list[str]:
    """What is said about objects of an image beside their masks: Python's warnings do not reach who sent them."""
    boxes = [one["box"] for one in objects if one["box"] is not None]
    return [BOX_IS_CLIPPED] if any(clip_box(box, width, height) != box for box in boxes) else []


__all__ = [
    "FORMATS",
    "MAX_FILE_BYTES",
    "MAX_OBJECTS",
    "MAX_PIXELS",
    "MAX_POINTS",
    "MAX_POINTS_PER_SIDE",
    "read_objects",
    "read_upload",
    "warnings_of",
]
