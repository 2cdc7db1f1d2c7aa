"""What the predictors with and without torch have in common: the image, prompts as segment-anything's, results.

Needs numpy, PIL and pycocotools only.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from ..model.image_reading_efficientsam import to_pil_image
from ..model.prompts_efficientsam import nesting, read_mask
from .results import SegmentationResult, boxes_from_masks_np


def has(prompts: Any, i: int) -> bool:
    """Whether there are prompts of a kind for the i-th object."""
    return prompts is not None and i < len(prompts) and prompts[i] is not None and len(prompts[i]) > 0


def count_objects(points: Any, boxes: Any, masks: Any) -> int:
    """The number of objects in prompts. ValueError: prompts of another nesting, or an object without prompts."""
    for name, given, form in (("points", points, "[[x, y], ...]"), ("boxes", boxes, "[x1, y1, x2, y2]")):
        if given is not None and not nesting(given, name) <= {form.count("[") + 1}:
            raise ValueError(f"{name} must be a list with {form} for each object, not {given}.")
    num_objects = max((len(given) for given in (points, boxes, masks) if given is not None), default=0)
    for i in range(num_objects):
        if not any(has(given, i) for given in (points, boxes, masks)):
            raise ValueError(f"There is no prompt for object {i}; give points, a box or a mask.")
    return num_objects


class PredictorBase(ABC):
    """An image is encoded once, then prompted any number of times. Subclasses say how, in the last four methods."""

    # ---------------------------------------------------------------------------------------------- the image

    def reset_image(self) -> None:
        """Forgets the image."""
        self.image: Image.Image | None = None  # as the model sees it: upright, RGB
        self.original_size: tuple[int, int] | None = None  # height and width
        self.input_size: tuple[int, int] | None = None  # in the model's input, before padding
        self.features: Any = None

    @property
    def is_image_set(self) -> bool:
        return self.features is not None

    def set_image(self, image: Any, image_format: str = "RGB") -> None:
        """
        Encodes an image; all later prompts are about it.

        Args:
            image: whatever [`EfficientSamImageProcessor`] takes: a path, a PIL image of any mode, an array, ...
            image_format: "RGB", or "BGR" for an array as OpenCV reads it.

        Raises:
            ValueError: something that is no image, or one that is too large (see [`EfficientSamImageProcessor`]).
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f'image_format must be "RGB" or "BGR", not {image_format!r}.')
        if image_format == "BGR":
            image = np.asarray(image)
            if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] not in (1, 3, 4)):
                raise ValueError(f"A BGR image is an array [height, width, 1, 3 or 4], not {list(image.shape)}.")
            if image.ndim == 3 and image.shape[-1] > 1:  # alpha stays behind
                image = image[..., [2, 1, 0, *range(3, image.shape[-1])]]
        self.reset_image()
        pixels = self._read_image(image)
        features, input_size = self._encode(pixels)
        self.image = to_pil_image(pixels)
        self.original_size, self.input_size = pixels.shape[-2:], input_size
        self.features = features

    def get_image_embedding(self) -> Any:
        """The encoded image, `[1, C, h, w]`: a tensor, or an array without torch."""
        self._check_image()
        return self.features

    def _check_image(self) -> None:
        if not self.is_image_set:
            raise RuntimeError("There is no image yet; call set_image first.")

    # ---------------------------------------------------------------------------------------------- prompts

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        mask_size: tuple[int, int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        The masks of one object, with the arguments of `SamPredictor.predict` and one more, `mask_size`.

        Args:
            point_coords: `[P, 2]`, (x, y) in pixels of the image.
            point_labels: `[P]`, 1 on the object, 0 on the background; by default 1.
            box: `[4]`, (x1, y1, x2, y2) in pixels of the image; clipped to it, with a warning.
            mask_input: `[1, h, w]`, low-resolution logits of an earlier call.
            multimask_output: three candidates, or one mask.
            return_logits: masks as logits instead of bool.
            mask_size: height and width of the masks, by default the image's. For a screen, smaller masks of a large
                image take a fraction of the time.

        Returns:
            masks `[M, height, width]`; their `iou_scores` `[M]`; low-resolution logits `[M, h, w]`. M is 3 or 1, in
            the model's order: the best mask is that of the highest score.

        Raises:
            RuntimeError: if no image is set.
            ValueError: no prompt, prompts outside the image, or prompts of a kind that the model does not take.
        """
        self._check_image()
        points = None if point_coords is None else [np.asarray(point_coords).tolist()]
        labels = None if point_labels is None else [np.asarray(point_labels).tolist()]
        boxes = None if box is None else [np.asarray(box).reshape(-1).tolist()]
        masks = None if mask_input is None else read_mask(mask_input)
        masks = None if masks is None else masks.reshape(1, *masks.shape[-2:])
        if not count_objects(points, boxes, masks):
            raise ValueError("There is no prompt; give points, a box or a mask.")
        logits, scores = self._decode(points, labels, boxes, masks, multimask_output)
        masks = self._enlarge(logits, not return_logits, mask_size)
        return masks[0], scores[0], logits[0]

    def segment(
        self,
        points: Any = None,
        labels: Any = None,
        boxes: Any = None,
        masks: Any = None,
        names: list[str] | None = None,
        multimask_output: bool = True,
    ) -> SegmentationResult:
        """
        The most confident mask of each of N objects.

        Args:
            points: for each object its points `[[x, y], ...]`, or `None`; any number each.
            labels: for each object the labels of its points, 1 on it and 0 on the background; by default 1.
            boxes: for each object its box `[x1, y1, x2, y2]`, clipped to the image with a warning, or `None`.
            masks: for each object low-resolution logits `[h, w]`.
            names: their labels in the result; by default "object".
            multimask_output: choose among three candidates, or take the single mask.

        Returns:
            [`SegmentationResult`] of the image.

        Raises:
            RuntimeError, ValueError: as `predict`.
        """
        masks, scores = self.segment_candidates(points, labels, boxes, masks, multimask_output, best_only=True)
        found, iou_scores = masks[:, 0], scores[:, 0].clip(0, 1)
        tight = boxes_from_masks_np(found)
        limits = self.original_size[::-1] * 2
        given = [np.float32(boxes[i]).clip(0, limits) if has(boxes, i) else tight[i] for i in range(len(found))]
        result_boxes = np.stack(given) if given else tight
        return SegmentationResult(found, iou_scores, iou_scores, result_boxes, list(names or ["object"] * len(found)))

    def segment_candidates(
        self,
        points: Any = None,
        labels: Any = None,
        boxes: Any = None,
        masks: Any = None,
        multimask_output: bool = True,
        best_only: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        All candidate masks of each of N objects, the most confident first.

        Args:
            points, labels, boxes, masks, multimask_output: as of `segment`.
            best_only: only the first one of each; the others are not enlarged, which takes the time and memory.

        Returns:
            masks `[N, M, height, width]`, bool; their `iou_scores` `[N, M]`, float32. M is 3, or 1.

        Raises:
            RuntimeError, ValueError: as `predict`.
        """
        self._check_image()
        if not count_objects(points, boxes, masks):
            return np.zeros((0, 1, *self.original_size), bool), np.zeros((0, 1), np.float32)
        logits, scores = self._rank(points, labels, boxes, masks, multimask_output, best_only)
        return self._enlarge(logits, binarize=True), scores

    def iter_candidates(
        self,
        points: Any = None,
        labels: Any = None,
        boxes: Any = None,
        masks: Any = None,
        multimask_output: bool = True,
        best_only: bool = False,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """
        What `segment_candidates` returns, one object after the other: masks `[M, height, width]` and scores `[M]`. The
        masks of many objects of a large image together may not fit into memory.
        """
        self._check_image()
        if count_objects(points, boxes, masks):
            logits, scores = self._rank(points, labels, boxes, masks, multimask_output, best_only)
            for i in range(len(logits)):
                yield self._enlarge(logits[i : i + 1], binarize=True)[0], scores[i]

    def _rank(self, points, labels, boxes, masks, multimask_output: bool, best_only: bool):
        """What `_decode` returns, the most confident candidate of each object first, or that alone."""
        logits, scores = self._decode(points, labels, boxes, masks, multimask_output)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : 1 if best_only else None]
        return np.take_along_axis(logits, order[..., None, None], axis=1), np.take_along_axis(scores, order, axis=1)

    # ---------------------------------------------------------------------------------------------- for subclasses

    @abstractmethod
    def _read_image(self, image: Any) -> np.ndarray:
        """The image as `image_to_array` reads it with the options of the processor."""

    @abstractmethod
    def _encode(self, pixels: np.ndarray) -> tuple[Any, tuple[int, int]]:
        """The features of such an image, and its height and width in the model's input before padding."""

    @abstractmethod
    def _decode(self, points, labels, boxes, masks, multimask_output: bool) -> tuple[np.ndarray, np.ndarray]:
        """Logits `[Q, M, h, w]` and scores `[Q, M]`, float32, of the image's Q objects."""

    @abstractmethod
    def _enlarge(self, logits: np.ndarray, binarize: bool, size: tuple[int, int] | None = None) -> np.ndarray:
        """
        Low-resolution logits `[Q, M, h, w]` -> `[Q, M, height, width]`, float32 or bool; `size`: height and width, by
        default the image's.
        """


__all__ = ["PredictorBase"]
