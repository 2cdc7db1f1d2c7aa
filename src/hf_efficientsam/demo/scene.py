"""What a visitor has marked in an image, as values that never change: each step of a session makes new ones."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


@dataclass(frozen=True)
class Finding:
    """
    A search that found objects without clicks.

    Attributes:
        method: one of `outputs.FOUND_BY`.
        options: arguments of its class, as they are written in Python.
        question: the text that was searched for.
    """

    method: str
    options: dict[str, Any]
    question: str = ""


@dataclass(frozen=True)
class SceneObject:
    """
    An object: its prompts, or its place in a finding, and its candidate masks.

    Attributes:
        name: the visitor's name for it.
        points, labels: (x, y) in pixels of the image, and 1 on the object or 0 on the background.
        box: (x1, y1, x2, y2) in pixels of the image, or `None`.
        candidates: compressed RLE of each candidate mask at the size of the image on the page, in the model's order;
            none before the model has answered.
        scores: their scores.
        chosen: index of the candidate that the visitor has chosen.
        iou: the model's estimate of its mask's IoU, if that is not its score.
        finding, place: what found it, and its number there from 0, if it has no prompts.
        found: compressed RLE of the mask at the size of the image, if it has no prompts.
    """

    name: str = "object"
    points: tuple[tuple[int, int], ...] = ()
    labels: tuple[int, ...] = ()
    box: tuple[int, int, int, int] | None = None
    candidates: tuple[dict, ...] = ()
    scores: tuple[float, ...] = ()
    chosen: int = 0
    iou: float | None = None
    finding: Finding | None = None
    place: int = 0
    found: dict | None = None

    @property
    def score(self) -> float:
        return self.scores[self.chosen]

    def mask(self, candidate: int | None = None) -> np.ndarray:
        """`[height, width]` of the image on the page, bool: the chosen candidate, or another."""
        return coco_mask.decode(self.candidates[self.chosen if candidate is None else candidate]).astype(bool)

    def prompts(self) -> dict:
        """The prompts as `EfficientSamPredictor.predict` takes them."""
        arguments = {}
        if self.points:
            arguments |= {"point_coords": [list(point) for point in self.points], "point_labels": list(self.labels)}
        if self.box is not None:
            arguments["box"] = list(self.box)
        return arguments


@dataclass(frozen=True)
class Scene:
    """
    Attributes:
        objects: all objects.
        current: index of the object that points go to; `len(objects)`: the next one begins a new object.
        corner: first corner (x, y) of a box whose second is still missing, as ratios of the image's width and height.
    """

    objects: tuple[SceneObject, ...] = ()
    current: int = 0
    corner: tuple[float, float] | None = None
