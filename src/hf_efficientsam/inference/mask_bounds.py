"""Exact facts about masks from their low-resolution logits, without resizing them: are they stable, and which box.

`resize_masks` interpolates bicubically, so each pixel is a weighted sum of the 4 x 4 logits around it. Between four
logits (a cell) all pixels therefore lie within bounds that the 16 logits give. Only cells whose bounds leave open on
which side of a threshold their pixels lie are computed pixel by pixel, and only masks that rounding or many open
cells leave undecided are resized. The answer is that of resizing all.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from hf_efficientsam.model.mask_operations_efficientsam import (
    INPUT_PIXELS_PER_MASK_PIXEL,
    measure_resized_masks,
    stability_score,
)

from .resampling import cubic_weights

PIXELS_AT_ONCE = 2**20  # that are computed of open cells: bounds the memory, which does not grow with the image
NOWHERE = 2**40  # first column or row of an empty mask
# The absolute weights of a pixel add up to at most 1.375 in one axis, so the negative ones in both to (1.375 ** 2 - 1)
# / 2: a pixel lies no further than this fraction of their range beyond the 16 logits around it.
OVERSHOOT = (1.375**2 - 1) / 2


@dataclass(frozen=True)
class CubicAxis:
    """
    How `resize_masks` makes one axis of a mask from that of the logits: pixel p is the sum of the four logits around
    it, by weights of its own. Pixels between the same two logits form a cell; cell c lies between logits c - 1 and c,
    so n logits have n + 1 cells. K is the largest number of pixels in a cell.

    Attributes:
        first, last: `[cells]`, first and last pixel of each cell; a cell without pixels has last < first.
        weights: `[cells, K, 4]` of the logits c - 2 to c + 1, where those beyond the border repeat the last.
    """

    first: torch.Tensor
    last: torch.Tensor
    weights: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """`[cells]`: number of pixels in each cell."""
        return self.last - self.first + 1

    @classmethod
    def make(cls, num_pixels: int, num_logits: int, scale: float, device: torch.device) -> "CubicAxis":
        """`scale` is the distance of two pixels, in logits."""
        places = np.float32(scale) * (np.arange(num_pixels, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
        neighbours, neighbour_weights = cubic_weights(places)
        cells = neighbours + 2
        counts = np.bincount(cells, minlength=num_logits + 1)
        first = counts.cumsum() - counts
        weights = np.zeros((num_logits + 1, max(1, counts.max()), 4), dtype=np.float32)
        weights[cells, np.arange(num_pixels) - first[cells]] = np.stack(neighbour_weights, axis=1)
        return cls(*(torch.from_numpy(x).to(device) for x in (first, first + counts - 1, weights)))


def mask_axes(
    logits_size: tuple[int, int], size: tuple[int, int], input_size: tuple[int, int], device
) -> tuple[CubicAxis, CubicAxis]:
    """Rows and columns of `resize_masks(logits, size, input_size)`."""
    padded = [INPUT_PIXELS_PER_MASK_PIXEL * n for n in logits_size]
    if list(input_size) == padded:
        scales = [n / n_out for n, n_out in zip(logits_size, size, strict=True)]
    else:
        scales = [n / (INPUT_PIXELS_PER_MASK_PIXEL * n_out) for n, n_out in zip(input_size, size, strict=True)]
    return tuple(CubicAxis.make(*one, device) for one in zip(size, logits_size, scales, strict=True))


def measure_masks(
    logits: torch.Tensor,
    size: tuple[int, int],
    input_size: tuple[int, int],
    mask_threshold: float,
    stability_score_offset: float,
    stability_score_thresh: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Which masks `resize_masks(logits, size, input_size)` are stable and not empty, and their boxes.

    Args:
        logits: `[N, h, w]`, float32.
        size, input_size: height and width of the masks, and of the model input that shows them before padding.
        mask_threshold, stability_score_offset, stability_score_thresh: see [`EfficientSamMaskGenerator`].

    Returns:
        `[N]` bool, and `[N, 4]` int64: first column, first row, last column, last row of each such mask.
    """
    stable = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    boxes = torch.zeros(len(logits), 4, dtype=torch.long, device=logits.device)
    axes = mask_axes(logits.shape[1:], size, input_size, logits.device)
    thresholds = [mask_threshold]
    if stability_score_thresh > 0:
        thresholds = [mask_threshold + stability_score_offset, mask_threshold - stability_score_offset, mask_threshold]
    at_once = max(1, 2**22 // logits.shape[1:].numel())
    for start in range(0, len(logits), at_once):
        part = torch.arange(len(logits), device=logits.device)[start : start + at_once]
        counts, part_boxes, dense = bound_masks(logits[part], axes, thresholds)
        surely, never = counts[0, -1] > 0, counts[1, -1] == 0
        if stability_score_thresh > 0:
            # In float32, whose rounding is far below the margin of 1e-6: not every device has float64.
            (inner_low, outer_low, _), (inner_high, outer_high, _) = counts.float()
            surely &= inner_low > (stability_score_thresh + 1e-6) * outer_high.clamp(min=1)
            never |= inner_high <= (stability_score_thresh - 1e-6) * outer_low.clamp(min=1)
        never &= ~dense
        undecided = ~never & (dense | ~surely | (part_boxes[0] != part_boxes[1]).any(dim=1))
        stable[part], boxes[part] = surely & ~never & ~undecided, part_boxes[0]
        few = part[undecided]
        counts, boxes[few] = measure_resized_masks(logits[few], size, input_size, thresholds)
        stable[few] = counts[-1] > 0
        if stability_score_thresh > 0:
            stable[few] &= stability_score(counts[0], counts[1]) > stability_score_thresh
    return stable, boxes


def bound_masks(
    logits: torch.Tensor, axes: tuple[CubicAxis, CubicAxis], thresholds: list[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Args:
        logits: `[N, h, w]`, float32.
        axes: rows and columns of the resized masks, from `mask_axes`.
        thresholds: T of them; boxes are for the last.

    Returns:
        `[2, T, N]` int64: at least and at most this number of pixels are above each of the thresholds;
        `[2, N, 4]` int64: boxes of the pixels surely, and of those possibly, above the last threshold;
        `[N]` bool: masks with too many open cells, whose numbers here mean nothing.
    """
    rows, columns = axes
    padded = F.pad(logits[:, None], (2, 2, 2, 2), mode="replicate")[:, 0]
    low, high, slack = cell_bounds(padded)
    pixels = rows.counts[:, None] * columns.counts  # of each cell
    is_open = torch.zeros_like(low, dtype=torch.bool)
    for threshold in thresholds:
        is_open |= (low <= threshold) & (high > threshold)
    is_open &= pixels > 0
    dense = is_open.float().mean(dim=(1, 2)) > 0.5
    is_open &= ~dense[:, None, None]

    settled = low.masked_fill(is_open | (pixels == 0), -math.inf)  # so not above any threshold
    counts, boxes = measure_settled(settled, axes, thresholds)
    pixels_of_a_cell = rows.weights.shape[1] * columns.weights.shape[1]
    for cells in is_open.nonzero().split(max(1, PIXELS_AT_ONCE // pixels_of_a_cell)):
        add_open_cells(counts, boxes, padded, cells, slack, axes, thresholds)
    return counts, boxes, dense


def cell_bounds(padded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Logits padded by two on each side, `[N, h + 4, w + 4]` -> the least and largest value that a pixel can have in each
    cell, and how far rounding can move it, `[N, h + 1, w + 1]` each.
    """
    num_logits = max(padded.shape[1:]) - 4
    highest, lowest = window_extremes(padded, torch.maximum), window_extremes(padded, torch.minimum)
    spread = highest - lowest
    # Rounding: of the sums, and of the pixels' places (up to num_logits, so that is their error in units of 2 ** -23),
    # by which values change no faster than 6 times the spread from logit to logit.
    slack = 1e-6 * torch.maximum(highest.abs(), lowest.abs()) + 6 * num_logits * 2.0**-23 * spread
    return lowest - OVERSHOOT * spread - slack, highest + OVERSHOOT * spread + slack, slack


def window_extremes(padded: torch.Tensor, larger) -> torch.Tensor:
    """`[N, h + 4, w + 4]` -> `[N, h + 1, w + 1]`: the largest (or least) of each 4 x 4."""
    for axis in (1, 2):
        for step in (1, 2):
            n = padded.shape[axis] - step
            padded = larger(padded.narrow(axis, 0, n), padded.narrow(axis, step, n))
    return padded


def measure_settled(
    settled: torch.Tensor, axes: tuple[CubicAxis, CubicAxis], thresholds: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of pixels and boxes, as `bound_masks` returns them, from the cells `[N, h + 1, w + 1]` not open."""
    rows, columns = axes
    widths = columns.counts.float()  # exact up to 2 ** 24 columns
    counts = [(((settled > one).float() @ widths).long() * rows.counts).sum(dim=1) for one in thresholds]
    counts = torch.stack(counts)
    inside = settled > thresholds[-1]
    across = pixel_range(inside.any(dim=1), columns)
    down = pixel_range(inside.any(dim=2), rows)
    boxes = torch.cat([across, down], dim=1)[:, [0, 2, 1, 3]]
    return counts.repeat(2, 1, 1), boxes.repeat(2, 1, 1)


def pixel_range(hit: torch.Tensor, axis: CubicAxis) -> torch.Tensor:
    """`[N, cells]` bool -> `[N, 2]`: first and last pixel of the cells that are hit."""
    first = torch.where(hit, axis.first, NOWHERE).amin(dim=1)
    return torch.stack([first, torch.where(hit, axis.last, -1).amax(dim=1)], dim=1)


def add_open_cells(
    counts: torch.Tensor,
    boxes: torch.Tensor,
    padded: torch.Tensor,
    cells: torch.Tensor,
    slack: torch.Tensor,
    axes: tuple[CubicAxis, CubicAxis],
    thresholds: list[float],
) -> None:
    """
    Adds the pixels of open cells `[n, 3]` (mask, row, column) to `counts` and `boxes`, in place: they are computed,
    K x K for each cell.
    """
    rows, columns = axes
    mask, row, column = cells.unbind(dim=1)
    corner = (mask * padded.shape[1] + row) * padded.shape[2] + column
    window = torch.arange(4, device=padded.device)
    window = (window[:, None] * padded.shape[2] + window).flatten()
    around = padded.flatten()[corner[:, None] + window].unflatten(1, (4, 4))
    values = rows.weights[row] @ around @ columns.weights[column].transpose(1, 2)  # [open cells, K, K]
    y = rows.first[row, None] + torch.arange(values.shape[1], device=padded.device)
    x = columns.first[column, None] + torch.arange(values.shape[2], device=padded.device)
    real = (y <= rows.last[row, None])[:, :, None] & (x <= columns.last[column, None])[:, None]
    slack = slack[mask, row, column][:, None, None]
    for i, doubt in enumerate((slack, -slack)):  # surely, possibly
        for k, threshold in enumerate(thresholds):
            above = real & (values > threshold + doubt)
            counts[i, k].index_add_(0, mask, above.flatten(1).sum(dim=1))
        for axis, places, ends in ((2, y, (1, 3)), (1, x, (0, 2))):
            hit = above.any(dim=axis)
            first = torch.where(hit, places, NOWHERE).amin(dim=1)
            last = torch.where(hit, places, -1).amax(dim=1)
            boxes[i, :, ends[0]].scatter_reduce_(0, mask, first, "amin")
            boxes[i, :, ends[1]].scatter_reduce_(0, mask, last, "amax")


__all__ = ["CubicAxis", "bound_masks", "mask_axes", "measure_masks"]
