"""Salient objects: a saliency map -> separate objects -> boxes -> masks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from transformers.image_utils import ImageInput

from ..predictor import EfficientSamPredictor
from ..results import SegmentationResult, boxes_from_masks_np
from .base import Prompter, check_unit
from .saliency_sources import SaliencySource, load_saliency


class SalientPrompter(Prompter):
    """
    What stands out in an image, object by object, without a click. Objects that touch in the saliency map are one.

    Args:
        predictor: an [`EfficientSamPredictor`].
        saliency: where the map comes from: a function from an upright RGB image to a map (see `segment_map` for its
            form), or a name that `load_saliency` takes; `None` is the head that comes with the predictor's checkpoint.
        threshold: a pixel is salient above it; at least 0, below 1.
        min_area: objects whose area is below this ratio of the largest one's are left out; at least 0, below 1.
        trust_remote_code: run the code that a transformers model brings along.

    Attributes:
        source: the function from an image to a map.

    Raises:
        ValueError: a model that cannot be loaded, or a number that is out of its range.
        TypeError: a `saliency` of another kind.
    """

    def __init__(
        self,
        predictor: EfficientSamPredictor,
        saliency: SaliencySource | str | Path | None = None,
        threshold: float = 0.5,
        min_area: float = 0.05,
        trust_remote_code: bool = False,
    ):
        super().__init__(predictor)
        check_unit("threshold", threshold, below_one=True)
        check_unit("min_area", min_area, below_one=True)
        self.threshold, self.min_area = threshold, min_area
        if saliency is None or isinstance(saliency, str | Path):
            saliency = load_saliency(saliency, predictor, trust_remote_code)
        if not callable(saliency):
            raise TypeError(
                f"saliency must be a function from an image to a map, or a name, not {type(saliency).__name__}; for a "
                "map that is there already, call segment_map."
            )
        self.source = saliency

    def map(self, image: ImageInput | None = None) -> np.ndarray:
        """
        The saliency of each pixel, `[height, width]`, float32, 0 to 1.

        Args:
            image: by default the predictor's.

        Raises:
            RuntimeError: if there is no image.
            ValueError: if the source gives no map.
        """
        self.look_at(image)
        return fit_map(self.source(self.predictor.image), self.predictor.original_size)

    def __call__(self, image: ImageInput | None = None) -> SegmentationResult:
        """
        The salient objects, largest first; their `scores` are the mean saliency of their pixels.

        Args, raises: as `map`.
        """
        return self.segment_map(self.map(image))

    def segment_map(self, saliency: Any) -> SegmentationResult:
        """
        The salient objects of the predictor's image by a map that is there already.

        Args:
            saliency: an array, tensor or image of any size that covers the whole image; from 0 to 1, or integers up to
                255 (8 bits) or 65535 (16 bits).

        Raises:
            RuntimeError: if there is no image.
            ValueError: something that is no map.
        """
        self.look_at()
        saliency = fit_map(saliency, self.predictor.original_size)
        objects = separate_objects(saliency > self.threshold, self.min_area)
        found = self.predictor.segment(boxes=boxes_from_masks_np(objects).tolist())
        scores = [saliency[mask].mean() if mask.any() else 0 for mask in found.masks]
        return replace(found, scores=np.float32(scores), labels=["salient object"] * len(found))


def fit_map(values: Any, size: tuple[int, int]) -> np.ndarray:
    """A map, see `SalientPrompter.segment_map`, as float32 `[height, width]` of `size`."""
    if isinstance(values, Image.Image):
        is_map = values.mode in ("1", "L", "F", "I") or values.mode.startswith("I;16")
        values = np.asarray(values if is_map else values.convert("L"))
    if isinstance(values, torch.Tensor):
        values = values.detach().float().cpu() if values.is_floating_point() else values.cpu()
    values = np.asarray(values)
    if values.ndim < 2 or values.size != values.shape[-2] * values.shape[-1] or not values.size:
        raise ValueError(f"A saliency map is [height, width], but it has the shape {list(values.shape)}.")
    values = values.reshape(values.shape[-2:])
    values = values.astype(values.dtype.newbyteorder("="), copy=False)  # "I;16B" is big-endian
    if values.dtype in (np.uint8, np.uint16) and values.max() > 1:
        values = values / np.float32(np.iinfo(values.dtype).max)
    values = torch.from_numpy(values.astype(np.float32))
    if not 0 <= values.min() <= values.max() <= 1:  # NaN is no such number either
        raise ValueError(
            "A saliency map must lie in 0 to 1, or be of 8 or 16 bits; put logits through a sigmoid first."
        )
    if values.shape != tuple(size):
        values = F.interpolate(values[None, None], size, mode="bilinear", antialias=True)[0, 0]
    return values.clamp(0, 1).numpy()


def separate_objects(salient: np.ndarray, min_area: float) -> np.ndarray:
    """
    `[height, width]` bool -> `[N, height, width]` bool: the connected regions, where corners connect, largest first,
    without those whose area is below `min_area` times the largest.
    """
    regions, count = ndimage.label(salient, structure=np.ones((3, 3)))
    areas = np.bincount(regions.ravel(), minlength=count + 1)[1:]
    order = [i for i in np.argsort(-areas, kind="stable") if areas[i] >= min_area * areas.max()]
    return np.stack([regions == i + 1 for i in order]) if order else np.zeros((0, *salient.shape), dtype=bool)


__all__ = ["SalientPrompter", "fit_map", "separate_objects"]
