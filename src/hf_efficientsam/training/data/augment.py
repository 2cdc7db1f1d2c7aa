"""Augmentation of an image, together with its masks if it has any: crop, flip, colour."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as rle_codec

from .coco import decode_rles
from .rle_resizing import resize_rles

MIN_KEPT_FRACTION = 0.2  # a crop that shows less of an object than this does not ask for it
MIN_OUTPUT_PIXELS = 8  # smaller masks are hardly there at a quarter of the resolution, where masks are predicted
MAX_IMAGE_FRACTION = 0.9  # as SAM: a mask of nearly everything teaches little


def random_crop_flip(
    image: Image.Image,
    rles: list[dict],
    size: int,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.3, 1.0),
    max_masks: int = 16,
    color_jitter: float = 0.0,
    flip: bool = True,
    keeps_aspect_ratio: bool = False,
    antialias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A random crop, flipped half of the time and squashed to a square, with a random choice of its masks.

    Args:
        image: RGB.
        rles: compressed COCO RLEs at the image's size, at least one of them.
        size: side S of the output in pixels.
        generator: source of all randomness, on the CPU.
        scale: least and greatest ratio of the image's area in the crop; (1, 1) keeps the whole image. The crop's
            aspect ratio is the image's own times 3/4 to 4/3.
        max_masks: at most so many masks are chosen, at random, before any is decoded.
        color_jitter: brightness, contrast and saturation are each multiplied by 1 - color_jitter to 1 + color_jitter.
        flip: false for never.
        keeps_aspect_ratio: the longer side of the crop becomes S, and the other one less.
        antialias: whether reducing the image averages all pixels.

    Returns:
        image float32 [3,S,S] in [0, 1], resized as at our models' inference (bilinear, no rounding), and masks
        uint8 [N,S,S] of 0 and 1, 1 <= N <= max_masks, none empty. Masks of which the crop shows too little and
        those that fill it are left out; where none is left the whole image is taken, if need be with any of its masks.
    """
    if not rles:
        raise ValueError("An image without masks cannot be trained on; leave it out.")
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale is a range of ratios of the image's area, 0 < least <= greatest <= 1: got {scale}.")
    if max_masks < 1:
        raise ValueError(f"max_masks must be at least 1: got {max_masks}.")
    whole = (0, 0, image.width, image.height)
    for box in (_random_crop(image.width, image.height, scale, generator), whole):
        output_size = fitted_size(box[3] - box[1], box[2] - box[0], size) if keeps_aspect_ratio else (size, size)
        masks = crop_masks(rles, box, output_size, max_masks, generator)
        if len(masks):
            break
    else:
        masks = any_masks(rles, output_size, max_masks, generator)
    pixels = crop_image(image, box, output_size, antialias)
    if flip and torch.rand((), generator=generator) < 0.5:
        pixels, masks = pixels.flip(-1), masks.flip(-1)
    if color_jitter:
        pixels = jitter_color(pixels, color_jitter, generator)
    return pixels, masks


def fitted_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) of an image whose longer side becomes `size`, rounded as Segment Anything does; at least 1."""
    scale = size / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def crop_image(
    image: Image.Image, box: tuple[int, int, int, int], size: int | tuple[int, int], antialias: bool = False
) -> torch.Tensor:
    """A crop (left, top, right, bottom) float32 [3,h,w] in [0, 1], resized to (h, w) or a square of that side:
    bilinear, no rounding."""
    pixels = torch.from_numpy(np.array(image.crop(box))).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=antialias)[0]


def random_resized_crop(
    width: int, height: int, scale: tuple[float, float], generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random box to be resized to a square, for training without masks.

    As in MAE's pretraining (arXiv 2111.06377): its ratio of the image's area is uniform in `scale`, its aspect ratio
    log-uniform from 3/4 to 4/3, its place uniform. Where ten draws do not fit into a very long image, it is the
    largest centred box whose ratio is in range.

    Args:
        width, height: of the image in pixels.
        scale: least and greatest ratio of the image's area.
        generator: source of all randomness.

    Returns:
        (left, top, right, bottom) in pixels, right and bottom exclusive.
    """
    for uniform, log_aspect, x, y in generator.random((10, 4)):
        area = width * height * (scale[0] + uniform * (scale[1] - scale[0]))
        aspect = (4 / 3) ** (2 * log_aspect - 1)
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = int(x * (width - crop_width + 1)), int(y * (height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width, crop_height = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def _random_crop(width: int, height: int, scale: tuple[float, float], generator: torch.Generator) -> tuple:
    """A box (left, top, right, bottom) in pixels, right and bottom exclusive."""
    area, log_ratio, x, y = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    area = scale[0] + area * (scale[1] - scale[0])
    # Ratios that would not fit into the image are not drawn, so a ratio of 1 is the whole image.
    lowest, highest = math.log(max(3 / 4, area)), math.log(min(4 / 3, 1 / area))
    ratio = math.exp(lowest + log_ratio * (highest - lowest))
    crop_width = min(width, max(1, round(width * math.sqrt(area * ratio))))
    crop_height = min(height, max(1, round(height * math.sqrt(area / ratio))))
    left, top = round(x * (width - crop_width)), round(y * (height - crop_height))
    return left, top, left + crop_width, top + crop_height


def crop_masks(
    rles: list[dict], box: tuple[int, int, int, int], size: tuple[int, int], max_masks: int, generator: torch.Generator
) -> torch.Tensor:
    """uint8 [N,h,w], N from 0 to max_masks, of those masks that the crop still shows."""
    area = math.prod(size)
    left, top, right, bottom = box
    crop = rle_codec.frPyObjects(np.array([[left, top, right - left, bottom - top]], float), *rles[0]["size"])
    # "Crowd" IoU is the intersection over the mask's own area: the ratio inside the crop, without decoding.
    shown = rle_codec.iou(rles, crop, [True])[:, 0]
    output_pixels = shown * rle_codec.area(rles) * area / ((right - left) * (bottom - top))
    large_enough = (shown >= MIN_KEPT_FRACTION) & (output_pixels >= MIN_OUTPUT_PIXELS)
    candidates = np.flatnonzero(large_enough & (output_pixels <= MAX_IMAGE_FRACTION * area))
    if not len(candidates):
        return torch.zeros(0, *size, dtype=torch.uint8)
    order = torch.randperm(len(candidates), generator=generator)[:max_masks].tolist()
    masks = resize_rles([rles[candidates[i]] for i in order], box, size)
    kept = large_enough_masks(masks)
    return masks if kept.all() else masks[kept]


def large_enough_masks(masks: torch.Tensor) -> torch.Tensor:
    """Of which masks [N,H,W] more than hardly anything is left: bool [N]."""
    return masks.sum((1, 2), dtype=torch.int32) >= MIN_OUTPUT_PIXELS


def any_masks(rles: list[dict], size: tuple[int, int], max_masks: int, generator: torch.Generator) -> torch.Tensor:
    """uint8 [N,h,w], N from 1 to max_masks, of the whole image: the last resort, whatever the size of the masks."""
    order = torch.randperm(len(rles), generator=generator)[:max_masks].tolist()
    masks = torch.from_numpy(decode_rles([rles[i] for i in order]))
    # Any coverage counts, so that even a single pixel of a large image is still there.
    return (F.interpolate(masks[:, None].float(), size, mode="area")[:, 0] > 0).byte()


def jitter_color(pixels: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Pixels `[3, H, W]` in [0, 1]; brightness, contrast and saturation each change by a factor of 1 ± strength."""
    factors = 1 + strength * (2 * torch.rand(3, generator=generator) - 1)
    return change_color(pixels[None], factors[None])[0]


def change_color(pixels: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Pixels `[B, 3, H, W]` in [0, 1] with brightness, contrast and saturation multiplied by factors `[B, 3]`."""
    brightness, contrast, saturation = factors[..., None, None, None].unbind(1)
    pixels = (pixels * brightness).clamp(0, 1)
    luma = pixels.new_tensor([0.299, 0.587, 0.114])
    grey = torch.einsum("bchw,c->bhw", pixels, luma)[:, None]
    pixels = torch.lerp(grey.mean((1, 2, 3), keepdim=True), pixels, contrast).clamp(0, 1)
    grey = torch.einsum("bchw,c->bhw", pixels, luma)[:, None]
    return torch.lerp(grey, pixels, saturation).clamp(0, 1)
