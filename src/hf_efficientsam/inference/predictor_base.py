"""What the predictors with and without torch have in common: the picture, questions as segment-anything's, results.

Needs numpy, PIL and pycocotools only.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from PIL import Image

from hf_efficientsam.model.inputs_efficientsam import nesting, read_mask

from .results import SegmentationResult, tight_boxes


def has(prompts: Any, i: int) -> bool:
    """Whether there is something for the i-th object."""
    return prompts is not None and i < len(prompts) and prompts[i] is not None and len(prompts[i]) > 0


def count_objects(points: Any, boxes: Any, masks: Any) -> int:
    """How many objects are asked for. ValueError: prompts nested otherwise, or an object without any."""
    for name, given, form in (("points", points, "[[x, y], ...]"), ("boxes", boxes, "[x1, y1, x2, y2]")):
        if given is not None and not nesting(given, name) <= {form.count("[") + 1}:
            raise ValueError(f"{name} must be a list with {form} for each object, not {given}.")
    num_objects = max((len(given) for given in (points, boxes, masks) if given is not None), default=0)
    for i in range(num_objects):
        if not any(has(given, i) for given in (points, boxes, masks)):
            raise ValueError(f"Nothing is asked for object {i}; give points, a box or a mask.")
    return num_objects


def to_picture(pixels: np.ndarray) -> Image.Image:
    """`[3, height, width]`, bytes or floats in [0, 1], as the image processor reads a picture -> that in RGB."""
    pixels = pixels if pixels.dtype == np.uint8 else (255 * pixels + 0.5).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


class PredictorBase(ABC):
    """A picture is encoded once and then asked as often as one likes. How that is done the last four methods say."""

    # ---------------------------------------------------------------------------------------------- the picture

    def reset_image(self) -> None:
        """Forgets the picture."""
        self.image: Image.Image | None = None  # as the model sees it: upright, RGB
        self.original_size: tuple[int, int] | None = None  # height and width
        self.input_size: tuple[int, int] | None = None  # in the model's input, before padding
        self.features: Any = None

    @property
    def is_image_set(self) -> bool:
        return self.features is not None

    def set_image(self, image: Any, image_format: str = "RGB") -> None:
        """
        Encodes a picture; all later questions are about it.

        Args:
            image: whatever the image processor takes: a PIL image of any mode, an array or tensor, a path.
            image_format: "RGB", or "BGR" for an array as OpenCV reads it.

        Raises:
            ValueError: no picture, or one that is too large (see [`EfficientSamImageProcessor`]).
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f'image_format must be "RGB" or "BGR", not {image_format!r}.')
        if image_format == "BGR":
            image = np.asarray(image)
            if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] not in (1, 3, 4)):
                raise ValueError(f"A BGR picture is an array [height, width, 1, 3 or 4], not {list(image.shape)}.")
            if image.ndim == 3 and image.shape[-1] > 1:  # alpha stays behind
                image = image[..., [2, 1, 0, *range(3, image.shape[-1])]]
        self.reset_image()
        pixels = self._read_image(image)
        features, input_size = self._encode(pixels)
        self.image = to_picture(pixels)
        self.original_size, self.input_size = pixels.shape[-2:], input_size
        self.features = features

    def get_image_embedding(self) -> Any:
        """`[1, C, h, w]`: the picture, encoded; a tensor, or an array without torch."""
        self._check_image()
        return self.features

    def _check_image(self) -> None:
        if not self.is_image_set:
            raise RuntimeError("There is no picture yet; call set_image first.")

    # ---------------------------------------------------------------------------------------------- questions

    def predict(
        self,
        point_coords: np.ndarray | None = None,
        point_labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask_input: np.ndarray | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        The masks of one object, asked for as of `SamPredictor.predict`.

        Args:
            point_coords: `[P, 2]`, (x, y) in pixels of the picture.
            point_labels: `[P]`, 1 on the object, 0 on the background; by default 1.
            box: `[4]`, (x1, y1, x2, y2) in pixels of the picture.
            mask_input: `[1, h, w]`, low-resolution logits of an earlier answer.
            multimask_output: three candidates, or one mask.
            return_logits: masks as logits instead of bool.

        Returns:
            masks `[M, height, width]`; their `iou_scores` `[M]`; low-resolution logits `[M, h, w]`. M is 3 or 1, in
            the model's order: the best is that of the highest score.

        Raises:
            RuntimeError: if no picture is set.
            ValueError: nothing was asked, prompts lie outside the picture, or the model lacks their kind.
        """
        self._check_image()
        points = None if point_coords is None else [np.asarray(point_coords).tolist()]
        labels = None if point_labels is None else [np.asarray(point_labels).tolist()]
        boxes = None if box is None else [np.asarray(box).reshape(-1).tolist()]
        masks = None if mask_input is None else read_mask(mask_input)
        masks = None if masks is None else masks.reshape(1, *masks.shape[-2:])
        if not count_objects(points, boxes, masks):
            raise ValueError("Nothing is asked for; give points, a box or a mask.")
        logits, scores = self._decode(points, labels, boxes, masks, multimask_output)
        masks = self._enlarge(logits, binarize=not return_logits)
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
            boxes: for each object its box `[x1, y1, x2, y2]`, or `None`.
            masks: for each object low-resolution logits `[h, w]`.
            names: their labels in the result; by default "object".
            multimask_output: choose among three candidates, or take the single mask.

        Returns:
            [`SegmentationResult`] of the picture.

        Raises:
            RuntimeError, ValueError: as `predict`.
        """
        self._check_image()
        num_objects = count_objects(points, boxes, masks)
        if not num_objects:
            empty = np.zeros(0, dtype=np.float32)
            return SegmentationResult(np.zeros((0, *self.original_size), bool), empty, empty, empty.reshape(0, 4), [])
        logits, scores = self._decode(points, labels, boxes, masks, multimask_output)
        best = scores.argmax(axis=1)[:, None]
        found = np.take_along_axis(logits, best[..., None, None], axis=1)
        found = self._enlarge(found, binarize=True)[:, 0]
        tight = tight_boxes(found)
        result_boxes = np.stack([np.float32(boxes[i]) if has(boxes, i) else tight[i] for i in range(num_objects)])
        iou_scores = scores.max(axis=1).clip(0, 1)
        return SegmentationResult(found, iou_scores, iou_scores, result_boxes, list(names or ["object"] * num_objects))

    # ---------------------------------------------------------------------------------------------- how it is done

    @abstractmethod
    def _read_image(self, image: Any) -> np.ndarray:
        """The picture as the model sees it: upright, `[3, height, width]`, bytes or floats in [0, 1]."""

    @abstractmethod
    def _encode(self, pixels: np.ndarray) -> tuple[Any, tuple[int, int]]:
        """The features of such a picture, and its height and width in the model's input before padding."""

    @abstractmethod
    def _decode(self, points, labels, boxes, masks, multimask_output: bool) -> tuple[np.ndarray, np.ndarray]:
        """Logits `[Q, M, h, w]` and scores `[Q, M]`, float32, of the picture's Q objects."""

    @abstractmethod
    def _enlarge(self, logits: np.ndarray, binarize: bool) -> np.ndarray:
        """Low-resolution logits `[Q, M, h, w]` -> `[Q, M, height, width]`, float32 or bool."""


__all__ = ["PredictorBase", "to_picture"]
