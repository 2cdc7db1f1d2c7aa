"""segment-anything's `SamPredictor` for EfficientSAM: an image is encoded once, then prompted any number of times.

from hf_efficientsam import EfficientSamPredictor as SamPredictor
"""

import warnings

import numpy as np
import torch
from transformers.image_utils import ImageInput

from hf_efficientsam.model.image_processing_efficientsam import EfficientSamImageProcessor
from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel
from hf_efficientsam.model.processing_efficientsam import EfficientSamProcessor
from hf_efficientsam.model.prompts_efficientsam import BOX_IS_CLIPPED, PAD_VALUE

from .loading import load_model, load_processor
from .predictor_base import PredictorBase


class PromptTransform:
    """
    Coordinates of an image -> coordinates of the model input, with the names of segment-anything's
    `ResizeLongestSide`. `original_size` is the image's height and width.
    """

    def __init__(self, image_processor: EfficientSamImageProcessor):
        self.image_processor = image_processor

    def scale(self, original_size: tuple[int, int]) -> tuple[float, float]:
        """By how much x and y grow."""
        height, width = self.image_processor.get_reshaped_input_size(original_size)
        return width / original_size[1], height / original_size[0]

    def apply_coords(self, coords: np.ndarray, original_size: tuple[int, int]) -> np.ndarray:
        """Points `[..., 2]`, (x, y)."""
        return np.asarray(coords, dtype=float) * self.scale(original_size)

    def apply_boxes(self, boxes: np.ndarray, original_size: tuple[int, int]) -> np.ndarray:
        """Boxes `[..., 4]`, (x1, y1, x2, y2) -> `[B, 4]`."""
        return self.apply_coords(np.reshape(boxes, (-1, 2, 2)), original_size).reshape(-1, 4)

    def apply_coords_torch(self, coords: torch.Tensor, original_size: tuple[int, int]) -> torch.Tensor:
        """Points `[..., 2]`, (x, y), in float32."""
        return coords.float() * coords.new_tensor(self.scale(original_size), dtype=torch.float32)

    def apply_boxes_torch(self, boxes: torch.Tensor, original_size: tuple[int, int]) -> torch.Tensor:
        """Boxes `[..., 4]`, (x1, y1, x2, y2) -> `[B, 4]`, in float32."""
        return self.apply_coords_torch(boxes.reshape(-1, 2, 2), original_size).reshape(-1, 4)


class EfficientSamPredictor(PredictorBase):
    """
    Predicts masks of one image from points, boxes and masks, with the interface of segment-anything's `SamPredictor`.

    Args:
        model: an [`EfficientSamModel`]; it is put into evaluation mode.
        processor: its [`EfficientSamProcessor`]; by default from the repository or directory that the model was loaded
            from.
    """

    def __init__(self, model: EfficientSamModel, processor: EfficientSamProcessor | None = None):
        self.model = model.eval()
        self.processor = processor or load_processor(model)
        self.transform = PromptTransform(self.processor.image_processor)
        self.reset_image()

    @classmethod
    def from_pretrained(
        cls,
        name: str | None = None,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str = torch.float32,
    ) -> "EfficientSamPredictor":
        """From a directory, a Hub name or "bundled", the default; `device` and `dtype` as of `load_model`."""
        return cls(*load_model(name, dtype, device))

    def to(self, *args, **kwargs) -> "EfficientSamPredictor":
        """Moves the model and the encoded image as `torch.Tensor.to` does."""
        self.model.to(*args, **kwargs)
        if self.is_image_set:
            self.features = self.features.to(self.model.device, self.model.dtype)
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()
    def predict_torch(
        self,
        point_coords: torch.Tensor | None,
        point_labels: torch.Tensor | None,
        boxes: torch.Tensor | None = None,
        mask_input: torch.Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The masks of B objects, with the arguments of `SamPredictor.predict_torch`. Coordinates are those of the model
        input, which `transform` computes.

        Args:
            point_coords: `[B, P, 2]`, (x, y).
            point_labels: `[B, P]`, 1 on the object, 0 on the background, -1 for no point.
            boxes: `[B, 4]`, (x1, y1, x2, y2); clipped to the image, with a warning. One of `PAD_VALUE` is no box.
            mask_input: `[B, 1, h, w]`, low-resolution logits of an earlier call.
            multimask_output: three candidates, or one mask.
            return_logits: masks as logits instead of bool.

        Returns:
            masks `[B, M, height, width]`; their `iou_scores` `[B, M]`; low-resolution logits `[B, M, h, w]`, all on
            the model's device. M is 3 or 1.

        Raises:
            RuntimeError: if no image is set.
            ValueError: prompts whose numbers disagree, or of a kind that the model does not take.
        """
        self._check_image()
        boxes = None if boxes is None else self._clip_to_input(boxes)
        prompts = {"input_points": point_coords, "input_labels": point_labels, "input_boxes": boxes}
        prompts["input_masks"] = None if mask_input is None else mask_input.squeeze(1)
        prompts = {name: one[None].to(self.device) for name, one in prompts.items() if one is not None}
        outputs = self.model(image_embeddings=self.features, multimask_output=multimask_output, **prompts)
        logits, scores = outputs.pred_masks[0], outputs.iou_scores[0]
        sizes = [self.original_size], [self.input_size]
        masks = self.processor.post_process_masks(logits[None], *sizes, binarize=not return_logits)[0]
        return masks, scores, logits

    def _clip_to_input(self, boxes: torch.Tensor) -> torch.Tensor:
        """As `clip_box` does it, in the frame of the model input."""
        height, width = self.input_size
        clipped = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height] * 2))
        clipped = torch.where((boxes == PAD_VALUE).all(dim=-1, keepdim=True), boxes, clipped)
        if not torch.allclose(clipped, boxes, atol=1e-2):  # scaling alone can move a border by a rounding error
            warnings.warn(BOX_IS_CLIPPED, stacklevel=3)
        return clipped

    def _read_image(self, image: ImageInput) -> np.ndarray:
        return self.processor.image_processor.process_image(image)

    @torch.no_grad()  # not inference mode: a decoder may be trained on the embedding
    def _encode(self, pixels: np.ndarray) -> tuple[torch.Tensor, tuple[int, int]]:
        inputs = self.processor.image_processor(pixels, input_data_format="channels_first", return_tensors="pt")
        pixel_values = inputs["pixel_values"].to(self.device, self.model.dtype)
        return self.model.get_image_embeddings(pixel_values), tuple(inputs["reshaped_input_sizes"][0].tolist())

    @torch.no_grad()
    def _decode(self, points, labels, boxes, masks, multimask_output: bool) -> tuple[np.ndarray, np.ndarray]:
        inputs = self.processor(
            original_sizes=[self.original_size],
            input_points=None if points is None else [points],
            input_labels=None if labels is None else [labels],
            input_boxes=None if boxes is None else [boxes],
            input_masks=None if masks is None else [masks],
        ).to(self.device)
        outputs = self.model(image_embeddings=self.features, multimask_output=multimask_output, **inputs)
        return outputs.pred_masks[0].float().cpu().numpy(), outputs.iou_scores[0].float().cpu().numpy()

    def _enlarge(self, logits: np.ndarray, binarize: bool, size: tuple[int, int] | None = None) -> np.ndarray:
        sizes = [size or self.original_size], [self.input_size]
        return self.processor.post_process_masks([logits], *sizes, binarize=binarize)[0].numpy()


__all__ = ["EfficientSamPredictor"]
