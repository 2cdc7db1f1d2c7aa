"""Clicks as an evaluation makes them: at random inside a mask, or one after the other where an answer is wrong."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from hf_efficientsam.training.data.images import hash_key

from .metrics import mask_iou
from .predictors import ImagePredictor
from .prompts import sample_points

MAX_CLICKS = 20  # of the literature's number of clicks


def random_clicks(mask: torch.Tensor, count: int, seed: int, annotation_id: int | str) -> torch.Tensor:
    """`count` pixels (x, y) of mask [H,W], float32 [count,2]; they depend on nothing but the arguments, and the first
    ones not on `count`."""
    if not isinstance(annotation_id, int) or annotation_id < 0:
        annotation_id = hash_key(str(annotation_id))
    state = np.random.SeedSequence([seed, annotation_id]).generate_state(1)
    generator = torch.Generator().manual_seed(int(state[0]))
    uniform = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for _ in range(count)])
    return sample_points(mask.expand(count, -1, -1), uniform)


def next_click(
    predicted: np.ndarray, target: np.ndarray, clicked: Sequence[tuple[int, int]], background_points: bool
) -> tuple[int, int, int]:
    """The click of `PROTOCOLS["error"]` of an evaluation for masks [H,W]: x, y and the label, 1 on the object and 0
    beside it.

    Of equally deep pixels it is the first, row by row, and on what is missed rather than on what is too much.
    """
    errors = [(target & ~predicted, 1)] + ([(predicted & ~target, 0)] if background_points else [])
    found = [(*_deepest(region, clicked), label) for region, label in errors]
    depth, x, y, label = max(found, key=lambda one: one[0])
    if depth == 0:
        depth, x, y = _deepest(target, clicked)
        label = 1
    if depth == 0:  # every pixel of the object was clicked
        _, x, y = _deepest(target, [])
    return x, y, label


def _deepest(region: np.ndarray, clicked: Sequence[tuple[int, int]]) -> tuple[float, int, int]:
    """Distance to the boundary, x and y of the pixel farthest from it; distance 0 if there is none."""
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    if not len(rows):
        return 0.0, 0, 0
    top, left = rows[0], columns[0]
    inside = region[top : rows[-1] + 1, left : columns[-1] + 1]
    depth = distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]  # the border makes the image's edge a boundary
    for x, y in clicked:
        if 0 <= y - top < depth.shape[0] and 0 <= x - left < depth.shape[1]:
            depth[y - top, x - left] = 0
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return float(depth[y, x]), int(x + left), int(y + top)


def error_rounds(predict: ImagePredictor, masks: torch.Tensor, counts: Sequence[int]) -> Iterator[tuple]:
    """Clicks on the errors of `predict` on masks [N,H,W]; for each number of clicks in `counts` the number, the
    prompt and what `predict` answered."""
    targets = masks.bool().cpu().numpy()
    predicted, previous = np.zeros_like(targets), {}
    points = torch.zeros(len(masks), max(counts), 2)
    labels = torch.zeros(len(masks), max(counts), dtype=torch.int64)
    everyone = torch.arange(len(masks))
    for number in range(max(counts)):
        for i, target in enumerate(targets):
            clicked = [tuple(point) for point in points[i, :number].int().tolist()]
            *point, labels[i, number] = next_click(predicted[i], target, clicked, predict.background_points)
            points[i, number] = torch.tensor(point)
        given = {"input_points": points[:, : number + 1], "input_labels": labels[:, : number + 1], **previous}
        answer = candidates, scores, logits = predict(**given)
        if number + 1 in counts:
            yield number + 1, given, answer
        confident = scores.argmax(1)
        predicted = candidates[everyone, confident].cpu().numpy()
        if predict.mask_prompts:
            previous = {"input_masks": logits[everyone, confident]}


def clicks_to_reach(
    predict: ImagePredictor, masks: torch.Tensor, thresholds: Sequence[float], max_clicks: int = MAX_CLICKS
) -> torch.Tensor:
    """
    How many clicks of `error_rounds` each of masks [N,H,W] needs until the IoU of the most confident candidate is
    at least a threshold: float32 [N,T], infinite where `max_clicks` are not enough.

    The mean over masks, with `max_clicks` for those that are not reached, is the number of clicks NoC@85 or NoC@90 of
    interactive segmentation: Xu et al. 2016 (arXiv 1603.04042), section 4; RITM (arXiv 2102.06583), section 5.
    """
    clicks = torch.full((len(masks), len(thresholds)), float("inf"))
    limits = torch.tensor(thresholds)
    for count, _, (candidates, scores, _) in error_rounds(predict, masks, range(1, max_clicks + 1)):
        confident = candidates[torch.arange(len(masks)), scores.argmax(1)]
        ious = mask_iou(confident, masks.to(confident.device)).cpu()
        clicks[(ious[:, None] >= limits) & clicks.isinf()] = count
        if not clicks.isinf().any():
            break
    return clicks
