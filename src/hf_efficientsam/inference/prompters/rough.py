"""Rough prompts: boxes that are too large or reach out of the image, and scribbles."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from ..predictor import EfficientSamPredictor
from ..results import SegmentationResult, boxes_from_masks_np
from .base import Prompter


class RoughPrompter(Prompter):
    """
    Objects from imprecise prompts, for annotation tools with a brush: a loose box, or a scribble over the object.

    Args:
        predictor: an [`EfficientSamPredictor`] that has an image.
    """

    margin = 0.1  # of its box on each side: how far an object may reach beyond what was painted
    num_points = 3  # taken from a painted region where the model takes no mask

    def boxes(self, boxes: Any) -> SegmentationResult:
        """
        Args:
            boxes: `[N, 4]`, two opposite corners each in any order; they may reach beyond the image.

        Returns:
            the N objects; their `boxes` are put in order and clipped to the image, with a warning.

        Raises:
            RuntimeError: if there is no image.
            ValueError: a box without area, or entirely outside the image.
        """
        self.look_at()
        corners = np.asarray(boxes, dtype=np.float32).reshape(-1, 2, 2)
        corners = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        return self.predictor.segment(boxes=corners.tolist())

    def scribble(self, painted: np.ndarray, background: np.ndarray | None = None) -> SegmentationResult:
        """
        One object that was painted over, wholly or in part.

        Args:
            painted: `[height, width]`, bool: pixels on the object.
            background: `[height, width]`, bool: pixels on the background, for a model that takes background points.

        Raises:
            RuntimeError: if there is no image.
            ValueError: paint of another size than the image's, or none.
        """
        self.look_at()
        painted = self._check_paint(painted)
        config = self.predictor.model.config.prompt_encoder_config
        points = [] if config.mask_prompts else spread_points(painted, self.num_points)
        labels = [1] * len(points)
        if background is not None and (off := self._check_paint(background)).any():
            if not config.background_points:
                raise ValueError("this model takes no background points; paint on the object only.")
            background_points = spread_points(off, self.num_points)
            points, labels = points + background_points, labels + [0] * len(background_points)
        if not painted.any():
            raise ValueError("nothing is painted; paint on the object.")
        box = boxes_from_masks_np(painted[None])[0]
        grown = np.tile(self.margin * (box[2:] - box[:2]), 2) * [-1, -1, 1, 1]
        return self.predictor.segment(
            points=[points] if points else None,
            labels=[labels] if points else None,
            boxes=[(box + grown).clip(0, [*painted.shape[::-1]] * 2).tolist()],
            masks=[mask_prompt(painted, self.predictor)] if config.mask_prompts else None,
        )

    def _check_paint(self, painted: np.ndarray) -> np.ndarray:
        painted = np.asarray(painted) > 0
        if painted.shape != self.predictor.original_size:
            raise ValueError(
                f"The paint has the shape {list(painted.shape)}, but the image is [height, width] = "
                f"{list(self.predictor.original_size)}."
            )
        return painted


def mask_prompt(mask: np.ndarray, predictor: EfficientSamPredictor, confidence: float = 8.0) -> np.ndarray:
    """
    A mask of the predictor's image, `[height, width]` bool, as the low-resolution logits `[h, w]` that the model
    takes: `confidence` inside, minus that outside, and values in between where the edge cuts a cell.
    """
    height, width = predictor.input_size
    rows, columns = (predictor.model.config.vision_config.patch_size * n for n in predictor.features.shape[-2:])
    ratio = F.interpolate(torch.from_numpy(mask).float()[None, None], (height, width), mode="bilinear", antialias=True)
    ratio = F.avg_pool2d(F.pad(ratio, (0, columns - width, 0, rows - height)), kernel_size=4)
    return (confidence * (2 * ratio - 1))[0, 0].numpy()


def spread_points(region: np.ndarray, count: int) -> list[list[float]]:
    """
    Up to `count` points (x, y) in a region `[height, width]` bool: the one farthest from its edge, then again the
    farthest among pixels not near an earlier point. Near is half the side of a square of the region's area.
    """
    rows, columns = np.indices(region.shape)
    left, near, points = region.copy(), region.sum() / 4, []
    while left.any() and len(points) < count:
        # What is outside the image counts as background.
        depth = ndimage.distance_transform_edt(np.pad(left, 1))[1:-1, 1:-1]
        row, column = np.unravel_index(depth.argmax(), depth.shape)
        points.append([column + 0.5, row + 0.5])
        left &= (rows - row) ** 2 + (columns - column) ** 2 > near
    return points


__all__ = ["RoughPrompter", "mask_prompt", "spread_points"]
