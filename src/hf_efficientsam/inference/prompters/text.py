"""Objects by their names: words -> detector -> boxes -> masks."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from transformers import (
    MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING,
    AutoConfig,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
)
from transformers.image_utils import ImageInput

from hf_efficientsam.model.mask_operations_efficientsam import (
    non_maximum_suppression,
)

from ..loading import loading, read_config
from ..predictor import EfficientSamPredictor
from ..results import SegmentationResult
from .base import Prompter, check_unit


class TextPrompter(Prompter):
    """
    Objects by their names: a detector finds boxes, and the predictor the masks in them.

    Args:
        predictor: an [`EfficientSamPredictor`].
        detector: the directory or Hub name of a transformers model for zero-shot object detection: OWL-ViT, OWLv2,
            Grounding DINO, OmDet-Turbo; or a [`Detector`] that is loaded already.
        threshold: boxes of lower scores are left out, 0 to 1; by default the detector's own.
        nms_threshold: of two boxes of one name that overlap by a larger IoU only the better one is kept.

    Raises:
        ValueError: a detector that cannot be loaded, or a number that is out of its range.
    """

    def __init__(
        self,
        predictor: EfficientSamPredictor,
        detector: "str | Path | Detector",
        threshold: float | None = None,
        nms_threshold: float = 0.7,
    ):
        super().__init__(predictor)
        check_unit("threshold", threshold)
        check_unit("nms_threshold", nms_threshold)
        self.threshold, self.nms_threshold = threshold, nms_threshold
        self.detector = detector if isinstance(detector, Detector) else Detector(str(detector), predictor.device)

    def to(self, *args, **kwargs) -> Self:
        super().to(*args, **kwargs)
        self.detector.to(self.predictor.device)
        return self

    def __call__(self, text: str | Sequence[str], image: ImageInput | None = None) -> SegmentationResult:
        """
        The objects, best first; their `scores` and `boxes` are the detector's, their `labels` names from `text`.

        Args:
            text: the names, "a dog, a cat" or a list.
            image: by default the predictor's.

        Raises:
            RuntimeError: if there is no image.
            ValueError: if there are no names.
        """
        names = split_names(text)
        self.look_at(image)
        boxes, scores, labels = self.detector(self.predictor.image, names, self.threshold)
        order = [i for i in self._best_of_each(boxes, scores, labels) if (boxes[i, 2:] > boxes[i, :2]).all()]
        labels = [labels[i] for i in order]
        found = self.predictor.segment(boxes=boxes[order].tolist(), names=labels)
        return replace(found, scores=scores[order].numpy())

    def _best_of_each(self, boxes: torch.Tensor, scores: torch.Tensor, labels: list[str]) -> list[int]:
        """Indices of the boxes that non-maximum suppression among those of one name keeps, best first."""
        kept = []
        for label in set(labels):
            own = torch.tensor([i for i, other in enumerate(labels) if other == label])
            kept += own[non_maximum_suppression(boxes[own], scores[own], self.nms_threshold)].tolist()
        return sorted(kept, key=lambda i: (-scores[i], i))


def split_names(text: str | Sequence[str]) -> list[str]:
    """Different names, from "a dog, a cat" or a list."""
    names = [name.strip(" .\t\n") for name in (text.split(",") if isinstance(text, str) else text)]
    names = list(dict.fromkeys(name for name in names if name))
    if not names:
        raise ValueError('nothing is asked for; give names of objects, such as "a dog, a cat".')
    return names


class Detector:
    """
    A transformers model for zero-shot object detection with its processor.

    Args:
        name: directory or Hub name.
        device: where it runs.

    Raises:
        ValueError: if it cannot be loaded or is of another kind.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        read_config(name)
        with loading(name):
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if type(config) not in MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING:
            raise ValueError(
                f"{name} holds a model of type {config.model_type!r}, which finds no objects by their names; use one "
                "for zero-shot object detection, such as OWLv2 or Grounding DINO."
            )
        with loading(name):
            self.processor = AutoProcessor.from_pretrained(name)
            model = AutoModelForZeroShotObjectDetection.from_pretrained(name, dtype=torch.float32)
        self.model, self.device = model.to(device).eval(), device

    def to(self, device: torch.device | str) -> None:
        """Moves the detector to a device."""
        self.model, self.device = self.model.to(device), device

    @torch.inference_mode()
    def __call__(
        self, image: Image.Image, names: list[str], threshold: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """
        Boxes `[N, 4]`, (x1, y1, x2, y2) in pixels of the image and clipped to it, their scores `[N]`, and their names.
        """
        inputs = self.processor(images=image, text=[names], return_tensors="pt").to(self.device)
        outputs = self.model(**inputs)
        finish = self.processor.post_process_grounded_object_detection
        options = {} if threshold is None else {"threshold": threshold}
        if threshold is not None and "text_threshold" in inspect.signature(finish).parameters:
            options["text_threshold"] = threshold  # or a box that is sure enough could have no name
        found = finish(outputs, target_sizes=[(image.height, image.width)], text_labels=[names], **options)[0]
        boxes = found["boxes"].float().cpu().reshape(-1, 4)
        boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([image.width, image.height] * 2))
        labels = [match_name(label, names) for label in found["text_labels"]]
        return boxes, found["scores"].float().cpu(), labels


def match_name(phrase: str, names: list[str]) -> str:
    """The name that a detector means by a part of it, such as "dog" for "a dog"."""
    alike = [name for name in names if phrase and (phrase.lower() in name.lower() or name.lower() in phrase.lower())]
    return phrase if not alike or phrase in names else alike[0]


__all__ = ["Detector", "TextPrompter", "split_names"]
