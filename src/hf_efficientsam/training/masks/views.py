"""Fixed views of a training image: whole, mirrored, zoomed. They depend on its name, size and masks alone."""

from typing import NamedTuple

import numpy as np
from pycocotools import mask as rle_codec

from hf_efficientsam.training.data.images import hash_key

SMALL = 1 / 3  # an object is small if its box takes less than this of the image's width and height
ZOOM = (0.25, 0.7)  # a zoomed view's side is three times the object's, within these fractions of the image's


class View(NamedTuple):
    """A part of an image: (left, top, right, bottom) in pixels, right and bottom exclusive, mirrored or not."""

    box: tuple[int, int, int, int]
    is_mirrored: bool


def view_of(name: str, number: int, rles: list[dict]) -> View:
    """
    A view of an image.

    Args:
        name: of the image.
        number: 0 whole, 1 whole and mirrored, from 2 on zoomed on a small object, or on any where none is small.
        rles: compressed COCO RLEs of the image's masks, at least one of them.
    """
    height, width = rles[0]["size"]
    if number < 2:
        return View((0, 0, width, height), number == 1)
    chance = np.random.default_rng([hash_key(name), number])
    boxes = rle_codec.toBbox(rles).reshape(-1, 4) / [width, height, width, height]
    sides = boxes[:, 2:].max(axis=1)
    candidates = np.flatnonzero(sides < SMALL) if (sides < SMALL).any() else np.arange(len(sides))
    chosen = chance.choice(candidates)
    ratio = np.clip(3 * sides[chosen], *ZOOM)
    center = boxes[chosen, :2] + boxes[chosen, 2:] / 2 + ratio * chance.uniform(-0.25, 0.25, 2)
    start = np.clip(center - ratio / 2, 0, 1 - ratio)
    left, top = int(start[0] * width), int(start[1] * height)
    right, bottom = left + max(1, round(ratio * width)), top + max(1, round(ratio * height))
    return View((left, top, min(right, width), min(bottom, height)), bool(chance.integers(2)))
