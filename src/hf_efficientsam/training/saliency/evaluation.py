"""How good a saliency map is."""

from collections.abc import Sequence

import numpy as np
import torch

from hf_efficientsam.model.modeling_saliency import EfficientSamSaliencyHead
from hf_efficientsam.model.processing_efficientsam import EfficientSamProcessor

LEVELS = 256  # at which a map is cut into salient and not
F_BETA = 0.3  # the square of beta, by which saliency benchmarks weigh precision (Achanta et al., CVPR 2009)


@torch.no_grad()
def predict_map(head: EfficientSamSaliencyHead, processor: EfficientSamProcessor, image: dict) -> np.ndarray:
    """The saliency float32 `[height, width]`, 0 to 1, of an item of [`EmbeddedImages`]."""
    logits = head(image["image_embeddings"][None].to(head.device)).logits.float().cpu()
    return processor.post_process_masks([logits], **image["sizes"], binarize=False)[0][0, 0].sigmoid().numpy()


def score_map(saliency: np.ndarray, truth: np.ndarray) -> dict:
    """
    How good a map is.

    Args:
        saliency: float `[height, width]`, 0 to 1.
        truth: bool `[height, width]`, not empty.

    Returns:
        `iou` of what is above 0.5; `mae`, the mean absolute difference; and `found` and `false`, the numbers of
        pixels, right and wrong, above each of `LEVELS` thresholds from 0 to 1, and `size` of the truth.
    """
    salient = saliency > 0.5
    counts = [np.histogram(saliency[where], LEVELS, (0, 1))[0][::-1].cumsum()[::-1] for where in (truth, ~truth)]
    return {
        "iou": float((salient & truth).sum() / (salient | truth).sum()),
        "mae": float(np.abs(saliency - truth).mean(dtype=np.float64)),
        "found": counts[0].tolist(),
        "false": counts[1].tolist(),
        "size": int(truth.sum()),
    }


def mean_scores(scores: Sequence[dict]) -> dict[str, float]:
    """
    Of the images' scores the mean `iou` and `mae`; `best_iou`, the mean IoU at the `best_threshold`, the one that
    suits all images together best; and `max_f`, the F-measure (beta squared 0.3) of the mean precision and recall at
    the threshold where it is greatest.
    """
    found, false, size = (np.array([one[name] for one in scores]) for name in ("found", "false", "size"))
    size = size[:, None]
    iou = (found / (size + false)).mean(0)
    precision = (found / (found + false).clip(min=1)).mean(0)
    recall = (found / size).mean(0)
    f_measure = (1 + F_BETA) * precision * recall / (F_BETA * precision + recall).clip(min=1e-9)
    means = {name: float(np.mean([one[name] for one in scores])) for name in ("iou", "mae")}
    return {
        **means,
        "best_iou": float(iou.max()),
        "best_threshold": float(iou.argmax() / LEVELS),
        "max_f": float(f_measure.max()),
    }
