"""The loss of promptable masks: SAM's, with a balanced cross-entropy for the first steps."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from hf_efficientsam.model.mask_operations_efficientsam import boxes_from_masks
from hf_efficientsam.training.engine.config import InnerRatio, NotNegativeFloat

from .metrics import filled_box, mask_iou


@dataclass(frozen=True)
class MaskLossConfig:
    """The weights of the loss's parts."""

    # SAM's are 20 : 1 : 1 without cross-entropy, with which a new decoder predicts empty masks for very long.
    focal_weight: NotNegativeFloat = field(default=0.0, metadata={"help": "weight of the focal loss"})
    dice_weight: NotNegativeFloat = field(default=1.0, metadata={"help": "weight of the dice loss"})
    iou_weight: NotNegativeFloat = field(default=1.0, metadata={"help": "weight of the IoU head's squared error"})
    balanced_bce_weight: NotNegativeFloat = field(
        default=2.0, metadata={"help": "weight of the balanced cross-entropy"}
    )
    bce_weight: NotNegativeFloat = field(
        default=0.0, metadata={"help": "weight of the plain cross-entropy; EdgeSAM has 5, and 5 for dice"}
    )
    bce_threshold: InnerRatio = field(
        default=0.5,
        metadata={
            "help": "either cross-entropy makes a mask of the pixels that are the object's with at least this chance; "
            "a mean IoU is greatest somewhat below 0.5"
        },
    )


# Segment Anything's (arXiv 2304.02643); the defaults above are for a new decoder.
SAM_LOSS = MaskLossConfig(focal_weight=20.0, balanced_bce_weight=0.0)
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # of the focal loss, as in arXiv 1708.02002


class MaskLoss(nn.Module):
    """Focal + dice + cross-entropy on the best of M candidates, squared error of the IoU head on all of them.

    Focal and dice follow SAM (20 : 1, IoU 1). With them alone a new decoder predicts empty masks for very long; with a
    `balanced_bce_weight` it does not, see `balance_weights`. Dice with a `bce_weight`, 5 each, is EdgeSAM's loss
    against a teacher's masks (arXiv 2312.06660).

    Args:
        weights: of the parts, and `bce_threshold`, see `threshold_shift`; by default SAM's.
    """

    def __init__(self, weights: MaskLossConfig = SAM_LOSS):
        super().__init__()
        self.weights = weights

    def forward(
        self,
        pred_masks: torch.Tensor,
        iou_scores: torch.Tensor,
        targets: torch.Tensor,
        valid: torch.Tensor,
        num_prompts: int | float | torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            pred_masks: logits [B,Q,M,h,w], resized to the targets' size (bilinear) if it differs.
            iou_scores: [B,Q,M].
            targets: [B,Q,H,W] of 0 and 1, not empty where valid.
            valid: bool [B,Q]; the other prompts are padding.
            num_prompts: what the sum over prompts is divided by; by default the valid ones here. For the gradient of
                one global batch give the number over all processes and accumulation steps (and undo any averaging
                over processes, e.g. DistributedDataParallel's, by multiplying the loss with their number).

        Returns:
            `loss`, to be differentiated; its unweighted parts, detached: `focal`, `dice`, `bce` (the balanced one, or
            the plain one where only that has a weight; 0 where neither has) and `iou`; `best` int64 [B,Q], the
            candidate that the mask losses were taken of (0 for padding).
        """
        # In float32 whatever the model computes in: sums over a mask overflow or lose digits in half precision.
        prompts = pred_masks[valid].float(), iou_scores[valid].float(), targets[valid].float()
        # Prompts are independent. A few at a time stay in the CPU's cache, which makes this four times as fast.
        logits_at_once = 2**20 if pred_masks.device.type == "cpu" else 2**28
        count = max(1, logits_at_once // (pred_masks.shape[2] * targets.shape[-2] * targets.shape[-1]))
        chunks = [self._prompt_losses(*chunk) for chunk in zip(*(p.split(count) for p in prompts), strict=True)]
        losses = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}

        best = torch.zeros(valid.shape, dtype=torch.int64, device=valid.device)
        best[valid] = losses.pop("best")
        divisor = max(len(prompts[0]), 1) if num_prompts is None else num_prompts
        means = {name: loss.sum() / divisor for name, loss in losses.items()}
        return {"loss": means.pop("loss"), **{name: part.detach() for name, part in means.items()}, "best": best}

    def _prompt_losses(self, logits: torch.Tensor, scores: torch.Tensor, target: torch.Tensor) -> dict:
        """logits [N,M,h,w], scores [N,M], target [N,H,W] -> `loss`, its parts and `best`, each [N]."""
        pixel_weights = balance_weights(target) if self.weights.balanced_bce_weight else None
        with torch.no_grad():
            candidates = _resize_logits(logits, target.shape[-2:])
            ious = mask_iou(candidates > 0, target[:, None] > 0.5)
            best = self._mask_losses(candidates, target, pixel_weights)["loss"].argmin(1)
        # Only the chosen candidate is computed again with gradients: a third of the memory and of the backward pass.
        chosen = _resize_logits(logits[torch.arange(len(best), device=best.device), best][:, None], target.shape[-2:])
        losses = {name: part[:, 0] for name, part in self._mask_losses(chosen, target, pixel_weights).items()}
        losses["iou"] = (scores - ious).square().mean(1)
        losses["loss"] = losses["loss"] + self.weights.iou_weight * losses["iou"]
        return {**losses, "best": best}

    def _mask_losses(
        self, logits: torch.Tensor, target: torch.Tensor, pixel_weights: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """logits [N,M,H,W], target, pixel_weights [N,H,W] -> [N,M] each: the parts, and `loss`, their weighted sum."""
        target = target[:, None]
        probability = logits.sigmoid()
        cross_entropy = F.softplus(logits) - logits * target
        focal = focal_loss(probability, cross_entropy, target, FOCAL_ALPHA, FOCAL_GAMMA)
        dice = dice_loss(probability, target)
        bce = torch.zeros_like(dice)
        weights = self.weights
        if weights.bce_threshold != 0.5:
            shifted = logits + threshold_shift(weights.bce_threshold)
            cross_entropy = F.softplus(shifted) - shifted * target
        if pixel_weights is not None:
            bce = (cross_entropy * pixel_weights[:, None]).sum((-2, -1))
        loss = weights.focal_weight * focal + weights.dice_weight * dice + weights.balanced_bce_weight * bce
        if weights.bce_weight:
            plain = cross_entropy.mean((-2, -1))
            loss = loss + weights.bce_weight * plain
            bce = plain if pixel_weights is None else bce
        return {"focal": focal, "dice": dice, "bce": bce, "loss": loss}


def threshold_shift(threshold: float) -> float:
    """
    What is added to a mask's logits before a cross-entropy, so that a logit of 0, where masks end, comes to mean that
    the pixel is the object's with the chance `threshold`: its own logit. Where a model is unsure, the mask of greatest
    expected dice has all pixels of more than half of that dice's chance (arXiv 1402.1892), so 0.38 at a dice of 0.76.
    """
    return math.log(threshold / (1 - threshold))


def focal_loss(
    probability: torch.Tensor, cross_entropy: torch.Tensor, target: torch.Tensor, alpha: float, gamma: float
) -> torch.Tensor:
    """
    The mean over pixels of alpha_t |p - t|^gamma CE, where alpha_t is `alpha` on the object and 1 - `alpha` beside it
    (arXiv 1708.02002). All arguments `[..., H, W]` -> `[...]`.
    """
    balance = 1 - alpha + (2 * alpha - 1) * target
    return (balance * (probability - target).abs() ** gamma * cross_entropy).mean((-2, -1))


def dice_loss(probability: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1), for `[..., H, W]` -> `[...]` (arXiv 1606.04797; the ones as in
    MaskFormer's, which Segment Anything and EdgeSAM use)."""
    overlap = (probability * target).sum((-2, -1))
    return 1 - (2 * overlap + 1) / (probability.sum((-2, -1)) + target.sum((-2, -1)) + 1)


def balance_weights(target: torch.Tensor) -> torch.Tensor:
    """Weights float32 [N,H,W] of the balanced cross-entropy, for masks [N,H,W].

    The object's pixels share 1/2, the background inside the object's box enlarged twice about its centre 1/4, the
    background outside 1/4; together 1. If one of the two backgrounds has no pixel the other has all of their 1/2. A
    mean over all pixels would let the empty mask win for small objects.
    """
    inside = target > 0.5
    left_top, right_bottom = boxes_from_masks(inside).split(2, -1)
    centre, side = (left_top + right_bottom) / 2, right_bottom - left_top
    enlarged = filled_box(torch.cat([centre - side, centre + side], -1), *target.shape[-2:])
    near, far = enlarged & ~inside, ~enlarged & ~inside
    object_mean, near_mean, far_mean = (
        region / region.sum((-2, -1), keepdim=True).clamp(min=1) for region in (inside, near, far)
    )
    background = near_mean + far_mean
    background = background / background.sum((-2, -1), keepdim=True).clamp(min=1)
    return 0.5 * object_mean + 0.5 * background


def _resize_logits(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if logits.shape[-2:] == size:
        return logits
    if not logits.numel():  # no prompt is valid; torch does not resize nothing
        return logits.new_zeros(*logits.shape[:2], *size)
    # All masks as channels of one image: twice as fast on the CPU as a batch of three-channel images.
    resized = F.interpolate(logits.flatten(0, 1)[None], size, mode="bilinear", align_corners=False)
    return resized.view(*logits.shape[:2], *size)
