"""segment-anything's `SamPredictor` for EfficientSAM: an image is encoded once, then prompted any number of times.

from hf_efficientsam import EfficientSamPredictor as SamPredictor
"""

import numpy as np
import torch
from transformers.image_utils import ImageInput

from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel
from hf_efficientsam.model.processing_efficientsam import EfficientSamProcessor

from .loading import find_checkpoint, load_model
from .predictor_base import PredictorBase


class EfficientSamPredictor(PredictorBase):
    """
    Predicts masks of one image from points, boxes and masks.

    Args:
        model: an [`EfficientSamModel`]; it is put into evaluation mode.
        processor: its [`EfficientSamProcessor`]; by default from the repository or directory that the model was loaded
            from.
    """

    def __init__(self, model: EfficientSamModel, processor: EfficientSamProcessor | None = None):
        self.model = model.eval()
        self.processor = processor or EfficientSamProcessor.from_pretrained(model.name_or_path)
        self.reset_image()

    @classmethod
    def from_pretrained(cls, name: str | None = None) -> "EfficientSamPredictor":
        """From a directory, a Hub name or "bundled", the default; on a GPU if there is one."""
        return cls(*load_model(find_checkpoint(name)))

    @property
    def device(self) -> torch.device:
        return self.model.device

    def _read_image(self, image: ImageInput) -> np.ndarray:
        image_processor = self.processor.image_processor
        return image_processor.process_image(image, max_image_pixels=image_processor.max_image_pixels)

    @torch.inference_mode()
    def _encode(self, pixels: np.ndarray) -> tuple[torch.Tensor, tuple[int, int]]:
        inputs = self.processor.image_processor(pixels, input_data_format="channels_first", return_tensors="pt")
        pixel_values = inputs["pixel_values"].to(self.device, self.model.dtype)
        return self.model.get_image_embeddings(pixel_values), tuple(inputs["reshaped_input_sizes"][0].tolist())

    @torch.inference_mode()
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

    def _enlarge(self, logits: np.ndarray, binarize: bool) -> np.ndarray:
        sizes = [self.original_size], [self.input_size]
        return self.processor.post_process_masks([logits], *sizes, binarize=binarize)[0].numpy()


__all__ = ["EfficientSamPredictor"]
