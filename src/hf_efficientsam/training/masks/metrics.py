"""Overlap of masks, what trivial answers to a box would score, and how far predicted scores can be trusted."""

import torch
import torch.nn.functional as F

COCO_AREAS = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, float("inf"))}


def mask_iou(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Intersection over union float32 [...] of masks [...,H,W]; two empty masks agree, so theirs is 1."""
    predicted, target = predicted.bool(), target.bool()
    intersection = (predicted & target).sum((-2, -1), dtype=torch.int32)
    union = (predicted | target).sum((-2, -1), dtype=torch.int32)
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0)


def boundary_iou(predicted: torch.Tensor, target: torch.Tensor, dilation_ratio: float = 0.02) -> torch.Tensor:
    """
    IoU float32 [...] of the inner boundaries of masks [...,H,W]: of their pixels within a distance of
    `dilation_ratio` of the image's diagonal from a pixel outside, or from the image's edge. At least one pixel; both
    axes count alike (the distance is the larger of the two). It weighs what IoU of large objects hardly sees.

    Source: Boundary IoU, Cheng et al. 2021 (arXiv 2103.16562), equation 2; distance as in the authors' code.
    """
    height, width = target.shape[-2:]
    distance = max(1, round(dilation_ratio * (height**2 + width**2) ** 0.5))
    return mask_iou(_inner_boundary(predicted.bool(), distance), _inner_boundary(target.bool(), distance))


def _inner_boundary(masks: torch.Tensor, distance: int) -> torch.Tensor:
    inner = _erode_lines(_erode_lines(masks, distance).mT, distance).mT
    return masks & ~inner


def _erode_lines(masks: torch.Tensor, distance: int) -> torch.Tensor:
    """Keeps the pixels of masks [...,H,W] with so many of the mask on their left and on their right."""
    sums = F.pad(masks.cumsum(-1, dtype=torch.int32), (1, 0))
    kept, side = torch.zeros_like(masks), 2 * distance + 1
    if masks.shape[-1] >= side:  # what lies outside of the image is not of the mask
        kept[..., distance : masks.shape[-1] - distance] = sums[..., side:] - sums[..., :-side] == side
    return kept


def most_confident(output, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each prompt's candidates the one with the highest predicted IoU: logits float32 `[B, Q, h, w]`, and the mask
    bool `[B, Q, *size]`."""
    best = output.iou_scores.argmax(-1)[..., None, None, None]
    logits = output.pred_masks.take_along_dim(best, dim=2)[:, :, 0].float()
    return logits, F.interpolate(logits, size=size, mode="bilinear", align_corners=False) > 0


def filled_box(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Boxes [...,4] (left, top, right, bottom in pixels, right and bottom exclusive) -> bool masks [...,H,W].

    A pixel belongs to the box if its centre does.
    """
    x, y = _pixel_centres(height, width, boxes.device)
    left, top, right, bottom = boxes[..., None, None].unbind(-3)
    return (x >= left) & (x < right) & (y >= top) & (y < bottom)


def inscribed_ellipse(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The largest ellipse in each box [...,4], as bool masks [...,H,W]; conventions as in `filled_box`."""
    x, y = _pixel_centres(height, width, boxes.device)
    left, top, right, bottom = boxes[..., None, None].unbind(-3)
    # Multiplied out, so that a box without area is an empty ellipse and not a division by zero.
    box_width, box_height = right - left, bottom - top
    dx, dy = (2 * x - left - right) * box_height, (2 * y - top - bottom) * box_width
    return (dx**2 + dy**2 <= (box_width * box_height) ** 2) & (box_width > 0) & (box_height > 0)


class MeanIoU:
    """Mean IoU over masks, in all and by the object's size as in COCO: below 32^2 pixels, below 96^2, the rest."""

    def __init__(self):
        self.sums = dict.fromkeys(("all", *COCO_AREAS), 0.0)
        self.counts = dict.fromkeys(self.sums, 0)

    def update(self, ious: torch.Tensor, areas: torch.Tensor) -> None:
        """Add masks: ious [N] and the areas [N] of the true masks in pixels of the original image."""
        ious, areas = ious.detach().double().cpu(), areas.cpu()
        if ious.shape != areas.shape:
            raise ValueError(f"Give one area for each IoU: got {tuple(areas.shape)} for {tuple(ious.shape)}.")
        self._add("all", ious)
        for group, (lowest, highest) in COCO_AREAS.items():
            self._add(group, ious[(areas >= lowest) & (areas < highest)])

    def compute(self) -> dict[str, dict[str, float | int]]:
        """{"all": {"miou": ..., "count": ...}, "small": ..., ...}; groups without masks are left out."""
        return {g: {"miou": self.sums[g] / n, "count": n} for g, n in self.counts.items() if n}

    def _add(self, group: str, ious: torch.Tensor) -> None:
        self.sums[group] += ious.sum().item()
        self.counts[group] += ious.numel()


def mean_by_size(values: torch.Tensor, areas: torch.Tensor) -> dict[str, dict[str, float | int]]:
    """{"all": {"mean": ..., "count": ...}, "small": ..., ...} of values [N] by the masks' areas [N], see `MeanIoU`."""
    mean = MeanIoU()
    mean.update(values, areas)
    return {group: {"mean": one["miou"], "count": one["count"]} for group, one in mean.compute().items()}


def calibration_error(predicted: torch.Tensor, true: torch.Tensor) -> float:
    """Mean absolute error of predicted IoUs [N] as estimates of the true ones [N]: 0 where each score is the IoU."""
    if predicted.shape != true.shape or not len(true):
        raise ValueError(
            f"Give one true IoU for each predicted one, and at least one: got {tuple(true.shape)} for "
            f"{tuple(predicted.shape)}."
        )
    return (predicted.double() - true.double()).abs().mean().item()


def _pixel_centres(height: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """x [1,W] and y [H,1]."""
    x = torch.arange(width, device=device) + 0.5
    y = torch.arange(height, device=device) + 0.5
    return x[None, :], y[:, None]
