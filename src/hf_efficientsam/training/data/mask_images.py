"""Masks that are stored as images: which pixels are an object, and how many objects there are."""

import numpy as np
from PIL import Image

from hf_efficientsam.model.image_reading_efficientsam import ImageError, upright_image

MAP_MODES = ("P", "I", "I;16", "I;16B", "I;16L")  # of label images alone: their values are no shades
COLORS = np.uint32  # of numbers that stand for colours, and are no shades
FLAT_RATIO = 0.75  # of a label image's pixels at least so many look like their neighbours


def mask_values(image: Image.Image) -> np.ndarray:
    """
    The values [H,W] of a mask's image, upright: shades, labels, or a number of type `COLORS` for each colour, 0 for
    black. Transparent pixels of a cut-out are 0.

    Raises:
        ImageError: for floats, for a JPEG of more than black and white, and where both colour and transparency could
            be the mask.
    """
    is_jpeg, image = image.format in ("JPEG", "MPO"), upright_image(image)
    if is_jpeg and not _is_black_and_white(np.asarray(image.convert("L"))):
        raise ImageError("a mask is a JPEG, whose values are not exact; save masks as PNG")
    if image.mode == "P" and (shades := _shades_of(image)) is not None:
        return shades
    if image.mode in ("1", "L", *MAP_MODES):
        return np.asarray(image)
    if image.mode not in ("LA", "RGB", "RGBA"):
        raise ImageError(f"a mask is an image of mode {image.mode}, but 8, 16 or 32 bits or colours are needed")
    channels = np.moveaxis(np.asarray(image), 2, 0).astype(np.int32)
    if image.mode in ("LA", "RGBA"):
        *colors, alpha = channels
        if (alpha != alpha[0, 0]).any():
            if any((color != color[0, 0]).any() for color in colors):
                raise ImageError("a mask has both colours and transparency; save it with one channel")
            return alpha.astype(np.uint8)
        channels = np.stack(colors)
    if (channels == channels[:1]).all():
        return channels[0].astype(np.uint8)
    return (channels[0] << 16 | channels[1] << 8 | channels[2]).astype(COLORS)


def is_soft(values: np.ndarray) -> bool:
    """
    Whether a mask's shades [H,W] between black and its brightest are the soft edge of one object, and no labels:
    labels lie side by side in areas, shades of an edge differ from pixel to pixel.
    """
    between = (values > 0) & (values < values.max(initial=0))
    if values.dtype == bool or not between.any():
        return False
    flat = _like_a_neighbour(values) & _like_a_neighbour(values.T).T
    if flat[between].mean() >= FLAT_RATIO:
        return False
    if values.dtype == COLORS:
        raise ImageError("a mask's colours run into each other at soft edges; save it as labels, without antialiasing")
    return True


def one_object(values: np.ndarray) -> np.ndarray:
    """The pixels [H,W] of a mask's object: of a soft edge what is at least half as bright as the brightest."""
    return values >= values.max() / 2 if is_soft(values) else values != 0


def all_objects(values: np.ndarray) -> list[np.ndarray]:
    """The pixels [H,W] of each object: one of a soft edge, else one for each value but 0."""
    if is_soft(values):
        return [one_object(values)]
    return [values == value for value in np.unique(values) if value != 0]


def _is_black_and_white(shades: np.ndarray) -> bool:
    """Whether few pixels [H,W] are grey, as in a JPEG that was made of a mask of two values."""
    high = int(shades.max())
    grey = (shades > high / 4) & (shades < high * 3 / 4)
    return 4 * grey.sum() <= (shades >= high * 3 / 4).sum()


def _shades_of(image: Image.Image) -> np.ndarray | None:
    """Of an image with a palette of greys, each of them once, these; None of others, whose indices are labels."""
    palette = np.reshape(image.getpalette("RGB"), (-1, 3))
    used = palette[np.unique(np.asarray(image)).clip(max=len(palette) - 1)]
    if (used != used[:, :1]).any() or len(np.unique(used[:, 0])) < len(used):
        return None
    return palette.astype(np.uint8)[np.asarray(image), 0]


def _like_a_neighbour(values: np.ndarray) -> np.ndarray:
    """Whether each pixel has the value of the one left or right of it."""
    same = values[:, 1:] == values[:, :-1]
    edge = np.zeros((len(values), 1), bool)
    return np.hstack([edge, same]) | np.hstack([same, edge])
