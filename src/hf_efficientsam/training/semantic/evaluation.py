"""How good a semantic segmentation is: scores of whole images or sliding windows, and the IoU of classes."""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from hf_efficientsam.training.data.semantic import NO_CLASS


def class_scores(model: PreTrainedModel, pixel_values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    Of each class at each pixel: `[B, 3, h, w]` -> `[B, K, *size]`. UperNet's are probabilities; Mask2Former's (arXiv
    2112.01527) sum over the queries the class's probability times the mask's, and do not sum to 1.
    """
    output = model(pixel_values)
    is_mask_former = "masks_queries_logits" in output
    maps = output.masks_queries_logits if is_mask_former else output.logits
    maps = F.interpolate(maps.float(), size, mode="bilinear", align_corners=False)
    if not is_mask_former:
        return maps.softmax(1)
    classes = output.class_queries_logits.float().softmax(2)[..., :-1]  # the last one is no object
    return torch.einsum("bqk,bqhw->bkhw", classes, maps.sigmoid())


def sliding_scores(
    model: PreTrainedModel, pixel_values: torch.Tensor, size: tuple[int, int], window: int
) -> torch.Tensor:
    """`class_scores` as the mean over square windows of the input, `window` pixels wide; neighbours overlap by a third
    or more."""
    (height, width), sums, counts = pixel_values.shape[-2:], 0, 0
    for top in _starts(height, window):
        for left in _starts(width, window):
            part = pixel_values[..., top : top + window, left : left + window]
            scores = class_scores(model, part, part.shape[-2:])
            place = (left, width - left - part.shape[-1], top, height - top - part.shape[-2])
            sums = sums + F.pad(scores, place)
            counts = counts + F.pad(torch.ones_like(scores[:1, :1]), place)
    return F.interpolate(sums / counts, size, mode="bilinear", align_corners=False)


def _starts(length: int, window: int) -> list[int]:
    """Where windows begin, so that the last one ends where the image does."""
    last = max(length - window, 0)
    return [*range(0, last, max(1, window * 2 // 3)), last]


def confusion_matrix(predicted: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """
    Counts of pixels, int64 `[K, K]`: row by true class, column by predicted class.

    Args:
        predicted: classes of any shape.
        labels: true classes of the same shape; `NO_CLASS` is not counted.
        num_classes: K.
    """
    known = labels != NO_CLASS
    pairs = labels[known].long() * num_classes + predicted[known]
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def confusion_scores(confusion: np.ndarray | list) -> dict:
    """
    `mean_iou`, `pixel_accuracy` and `class_iou`, a list with None for a class that is neither there nor predicted,
    which the mean leaves out.

    Args:
        confusion: `[K, K]` counts of pixels of `confusion_matrix`, summed over images and processes.
    """
    counts = np.asarray(confusion, dtype=np.int64)
    correct, unions = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    found = unions > 0
    ious = np.divide(correct, unions, where=found, out=np.zeros(len(counts)))
    return {
        "mean_iou": float(ious[found].mean()),
        "pixel_accuracy": float(correct.sum() / counts.sum()),
        "class_iou": [float(iou) if there else None for iou, there in zip(ious, found, strict=True)],
    }
