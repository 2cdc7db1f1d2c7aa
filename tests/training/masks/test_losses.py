import math
from dataclasses import replace

import pytest
import torch

from hf_efficientsam.training.masks.losses import SAM_LOSS, MaskLoss, balance_weights


def example(batch=2, prompts=3, candidates=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, prompts, candidates, size, size, generator=generator)
    scores = torch.rand(batch, prompts, candidates, generator=generator)
    targets = (torch.rand(batch, prompts, size, size, generator=generator) < 0.4).byte()
    return logits, scores, targets, torch.ones(batch, prompts, dtype=torch.bool)


def focal_by_hand(logit, target, alpha=0.25, gamma=2):
    p = 1 / (1 + math.exp(-logit)) if target else 1 / (1 + math.exp(logit))  # of the true class
    return (alpha if target else 1 - alpha) * (1 - p) ** gamma * -math.log(p)


def test_worked_by_hand():
    logits = torch.tensor([[2.0, -1.0], [0.5, -3.0]])
    target = torch.tensor([[1, 1], [0, 0]])
    pairs = list(zip(logits.flatten().tolist(), target.flatten().tolist(), strict=True))
    p = [1 / (1 + math.exp(-x)) for x, _ in pairs]
    focal = sum(focal_by_hand(x, t) for x, t in pairs) / 4
    dice = 1 - (2 * (p[0] + p[1]) + 1) / (sum(p) + 2 + 1)
    cross_entropy = [-math.log(q if t else 1 - q) for q, (_, t) in zip(p, pairs, strict=True)]
    # The object is the upper row; its enlarged box is the image, so all the background is near and shares one half.
    bce = (cross_entropy[0] + cross_entropy[1]) / 4 + (cross_entropy[2] + cross_entropy[3]) / 4
    iou = (0.9 - 1 / 3) ** 2  # predicted: pixels 0 and 2, true: 0 and 1
    result = MaskLoss(replace(SAM_LOSS, balanced_bce_weight=3, iou_weight=2))(
        logits[None, None, None], torch.tensor([[[0.9]]]), target[None, None], torch.ones(1, 1, dtype=torch.bool)
    )
    for name, expected in {"focal": focal, "dice": dice, "bce": bce, "iou": iou}.items():
        assert result[name].item() == pytest.approx(expected, rel=1e-5), name
    assert result["loss"].item() == pytest.approx(20 * focal + dice + 3 * bce + 2 * iou, rel=1e-5)
    assert set(result) == {"loss", "focal", "dice", "bce", "iou", "best"}


def test_a_perfect_prediction_costs_nothing():
    _, _, targets, valid = example()
    logits = (targets.float() * 200 - 100)[:, :, None]
    result = MaskLoss(replace(SAM_LOSS, balanced_bce_weight=1))(logits, torch.ones(2, 3, 1), targets, valid)
    assert result["loss"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["balanced_bce_weight", "bce_weight"])
def test_a_mask_ends_where_the_chance_of_a_pixel_is_the_threshold(kind):
    """All pixels have one logit: where their chance is the threshold, its gradient at 0 is nothing."""
    target = torch.zeros(1, 1, 4, 5, dtype=torch.uint8)
    target[..., :2] = 1
    chance = 0.5 if kind == "balanced_bce_weight" else 0.4  # balanced, the object has half of the weight
    others = {"focal_weight": 0, "dice_weight": 0, "iou_weight": 0, "balanced_bce_weight": 0}
    for threshold in (0.3, chance):
        logit = torch.zeros((), requires_grad=True)
        given = logit.expand(1, 1, 1, 4, 5), torch.zeros(1, 1, 1), target, torch.ones(1, 1, dtype=torch.bool)
        MaskLoss(replace(SAM_LOSS, **others | {kind: 1}, bce_threshold=threshold))(*given)["loss"].backward()
        assert logit.grad.item() == pytest.approx(threshold - chance, abs=1e-6)


@pytest.mark.parametrize("weights", [(20, 1, 0), (0, 1, 0), (1, 0, 5)])
def test_the_best_candidate_is_trained_and_every_score(weights):
    logits, scores, targets, valid = example(batch=5)
    logits *= torch.tensor([0.1, 1.0, 4.0])[:, None, None]  # timid to bold, so that the parts disagree on the best
    logits.requires_grad_(), scores.requires_grad_()
    focal, dice, bce = weights
    loss = MaskLoss(replace(SAM_LOSS, focal_weight=focal, dice_weight=dice, balanced_bce_weight=bce))
    result = loss(logits, scores, targets, valid)
    result["loss"].backward()

    # Each candidate alone, one prompt at a time.
    alone = [
        [[loss_of(loss, m, t) for m in q] for q, t in zip(*b, strict=True)] for b in zip(logits, targets, strict=True)
    ]
    alone = torch.tensor(alone)
    assert torch.equal(result["best"], alone.argmin(-1))
    touched = logits.grad.abs().sum((-2, -1)) > 0
    assert torch.equal(touched, torch.nn.functional.one_hot(result["best"], 3).bool())
    assert (scores.grad != 0).all()
    assert result["loss"].item() == pytest.approx(alone.amin(-1).mean().item() + result["iou"].item(), rel=1e-4)
    assert not result["focal"].requires_grad and not result["iou"].requires_grad


def loss_of(loss, logits, target):
    """The mask part of the loss for one candidate [h,w]."""
    valid = torch.ones(1, 1, dtype=torch.bool)
    result = loss(logits.detach()[None, None, None], torch.zeros(1, 1, 1), target[None, None], valid)
    return result["loss"] - result["iou"]


def test_padding_counts_for_nothing():
    logits, scores, targets, valid = example(seed=1)
    valid[0, 2] = valid[1, 1] = False
    logits.requires_grad_()
    result = MaskLoss()(logits, scores, targets, valid)
    result["loss"].backward()
    assert not logits.grad[0, 2].any() and not logits.grad[1, 1].any()
    assert result["best"][0, 2] == 0

    changed = logits.detach().clone()
    changed[0, 2] = changed[1, 1] = 50
    assert MaskLoss()(changed, scores, targets, valid)["loss"] == result["loss"]


def test_nothing_but_padding_has_a_zero_gradient():
    logits, scores, targets, valid = example()
    logits.requires_grad_()
    result = MaskLoss(replace(SAM_LOSS, balanced_bce_weight=1))(logits, scores, targets, ~valid)
    result["loss"].backward()
    assert result["loss"] == 0 and not logits.grad.any()


def test_parts_of_a_global_batch_add_up_to_it():
    logits, scores, targets, valid = example(batch=4, seed=2)
    valid[0, 1:] = False
    whole = MaskLoss()(logits, scores, targets, valid)
    parts = [
        MaskLoss()(logits[s], scores[s], targets[s], valid[s], num_prompts=valid.sum())
        for s in (slice(0, 1), slice(1, 4))
    ]
    for name in ("loss", "focal", "dice", "iou"):
        assert sum(part[name] for part in parts).item() == pytest.approx(whole[name].item(), rel=1e-5)


def test_small_masks_are_resized_to_the_target():
    logits, scores, _, valid = example(size=8)
    targets = (torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)) < 0.5).byte()
    large = torch.nn.functional.interpolate(logits.flatten(0, 1), (32, 32), mode="bilinear").view(2, 3, 3, 32, 32)
    small, direct = MaskLoss()(logits, scores, targets, valid), MaskLoss()(large, scores, targets, valid)
    assert small["loss"].item() == pytest.approx(direct["loss"].item(), rel=1e-5)


def test_many_prompts_are_computed_in_chunks():
    logits, scores, targets, valid = example(batch=1, prompts=9, size=256)  # five prompts at once on the CPU
    whole = MaskLoss()(logits, scores, targets, valid)
    single = [MaskLoss()(logits[:, [q]], scores[:, [q]], targets[:, [q]], valid[:, [q]]) for q in range(9)]
    assert whole["best"][0].tolist() == [s["best"].item() for s in single]
    assert whole["loss"].item() == pytest.approx(sum(s["loss"].item() for s in single) / 9, rel=1e-5)


def test_float32_under_autocast():
    logits, scores, targets, valid = example()
    expected = MaskLoss()(logits.bfloat16().float(), scores.bfloat16().float(), targets, valid)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        result = MaskLoss()(logits.bfloat16(), scores.bfloat16(), targets, valid)["loss"]
    assert result.dtype == torch.float32 and result == expected


def test_balance_weights():
    target = torch.zeros(3, 16, 16)
    target[0, 6:8, 6:8] = 1  # four pixels, enlarged box 4 x 4: 12 near, 240 far
    target[1, :8] = 1  # the enlarged box reaches from row -4 to 12: four rows near, four far
    target[2] = 1
    target[2, 0, 0] = 0  # one pixel of background, near
    weights = balance_weights(target)
    assert weights[0, 6, 6].item() == pytest.approx(1 / 8)
    assert weights[0, 5, 5].item() == pytest.approx(1 / 48)
    assert weights[0, 0, 0].item() == pytest.approx(1 / 960)
    assert weights[1, 8, 0].item() == pytest.approx(1 / 256) and weights[1, 12, 0].item() == pytest.approx(1 / 256)
    assert weights[2, 0, 0].item() == pytest.approx(1 / 2)
    assert torch.allclose(weights.sum((1, 2)), torch.ones(3))


def test_balanced_loss_prefers_the_object_to_the_empty_mask():
    target = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    target[..., 30:34, 30:34] = 1
    empty, loose = torch.full((1, 1, 1, 64, 64), -4.0), torch.full((1, 1, 1, 64, 64), -4.0)
    loose[..., 29:35, 29:35] = 4.0
    valid, scores = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, 1)

    def bce(logits):
        return MaskLoss(replace(SAM_LOSS, balanced_bce_weight=1))(logits, scores, target, valid)["bce"].item()

    assert bce(loose) < 0.5 * bce(empty)
