"""segment-anything's `SamPredictor` for EfficientSAM: a picture is encoded once and then asked as often as one likes.

from hf_efficientsam import EfficientSamPredictor as SamPredictor
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import ImageInput

from .hub import find_checkpoint, load_model
from .modeling_efficientsam import EfficientSamModel
from .processing_efficientsam import EfficientSamProcessor
from .results import SegmentationResult, tight_boxes


class EfficientSamPredictor:
    """
    Args:
        model: an [`EfficientSamModel`]; it is put into evaluation mode.
        processor: its [`EfficientSamProcessor`]; by default that of the repository or directory which the model was
            loaded from.
    """

    def __init__(self, model: EfficientSamModel, processor: EfficientSamProcessor | None = None):
        self.model = model.eval()
        self.processor = processor or EfficientSamProcessor.from_pretrained(model.name_or_path)
        self.reset_image()

    @classmethod
    def from_pretrained(cls, name: str | None = None) -> "EfficientSamPredictor":
        """From a directory or Hub name, by default the bundled checkpoint; on a GPU if there is one."""
        return cls(*load_model(find_checkpoint(name)))

    @property
    def device(self) -> torch.device:
        return self.model.device

    # ---------------------------------------------------------------------------------------------- the picture

    def reset_image(self) -> None:
        """Forgets the picture."""
        self.image: Image.Image | None = None  # as the model sees it: upright, RGB
        self.original_size: tuple[int, int] | None = None  # height and width
        self.input_size: tuple[int, int] | None = None  # in the model's input, before padding
        self.features: torch.Tensor | None = None

    @property
    def is_image_set(self) -> bool:
        return self.features is not None

    @torch.inference_mode()
    def set_image(self, image: ImageInput, image_format: str = "RGB") -> None:
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
            image = np.asarray(image)[..., ::-1]
        self.reset_image()
        image_processor = self.processor.image_processor
        pixels = image_processor.process_image(image, max_image_pixels=image_processor.max_image_pixels)
        inputs = image_processor(pixels, input_data_format="channels_first", return_tensors="pt")
        pixel_values = inputs["pixel_values"].to(self.device, self.model.dtype)
        features = self.model.get_image_embeddings(pixel_values)
        pixels = pixels if pixels.dtype == np.uint8 else (255 * pixels + 0.5).astype(np.uint8)
        self.image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        self.original_size = tuple(inputs["original_sizes"][0].tolist())
        self.input_size = tuple(inputs["reshaped_input_sizes"][0].tolist())
        self.features = features

    def get_image_embedding(self) -> torch.Tensor:
        """`[1, C, h, w]`: the picture, encoded."""
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
        points = None if point_coords is None else [np.asarray(point_coords).tolist()]
        labels = None if point_labels is None else [np.asarray(point_labels).tolist()]
        boxes = None if box is None else [np.asarray(box).reshape(-1).tolist()]
        masks = (
            None if mask_input is None else np.asarray(mask_input, dtype=np.float32).reshape(1, *mask_input.shape[-2:])
        )
        logits, scores = self._decode(points, labels, boxes, masks, multimask_output)
        masks = self._enlarge(logits, binarize=not return_logits)
        return masks[0].numpy(), scores[0].numpy(), logits[0].numpy()

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
        num_objects = max((len(one) for one in (points, boxes, masks) if one is not None), default=0)
        if not num_objects:
            empty = np.zeros(0, dtype=np.float32)
            return SegmentationResult(np.zeros((0, *self.original_size), bool), empty, empty, empty.reshape(0, 4), [])
        logits, scores = self._decode(points, labels, boxes, masks, multimask_output)
        scores, best = scores.max(dim=1, keepdim=True)
        found = self._enlarge(logits.take_along_dim(best[..., None, None], dim=1), binarize=True)[:, 0].numpy()
        tight = tight_boxes(found)
        asked = boxes if boxes is not None else [None] * num_objects
        result_boxes = np.stack([tight[i] if box is None else np.float32(box) for i, box in enumerate(asked)])
        iou_scores = scores[:, 0].clamp(0, 1).numpy()
        return SegmentationResult(found, iou_scores, iou_scores, result_boxes, list(names or ["object"] * num_objects))

    @torch.inference_mode()
    def _decode(self, points, labels, boxes, masks, multimask_output: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[Q, M, h, w]` and scores `[Q, M]`, float32 on the CPU, of the picture's Q objects."""
        self._check_image()
        if points is None and boxes is None and masks is None:
            raise ValueError("Nothing is asked for; give points, a box or a mask.")
        inputs = self.processor(
            original_sizes=[self.original_size],
            input_points=None if points is None else [points],
            input_labels=None if labels is None else [labels],
            input_boxes=None if boxes is None else [boxes],
            input_masks=None if masks is None else [masks],
        ).to(self.device)
        outputs = self.model(image_embeddings=self.features, multimask_output=multimask_output, **inputs)
        return outputs.pred_masks[0].float().cpu(), outputs.iou_scores[0].float().cpu()

    def _enlarge(self, logits: torch.Tensor, binarize: bool) -> torch.Tensor:
        """Low-resolution logits `[Q, M, h, w]` -> `[Q, M, height, width]`."""
        sizes = [self.original_size], [self.input_size]
        return self.processor.post_process_masks([logits], *sizes, binarize=binarize)[0]


__all__ = ["EfficientSamPredictor"]
