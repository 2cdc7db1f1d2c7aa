"""Functions on masks, their boxes and run-length encodings, and on the crops and points of "segment everything"."""

import math
from collections.abc import Iterator
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from .run_lengths_efficientsam import mask_to_rle

# The mask decoder enlarges the patch grid (1/16 of the input) four times: a pixel of its masks is 4 x 4 of the input.
INPUT_PIXELS_PER_MASK_PIXEL = 4
PIXELS_AT_ONCE = 2**22  # of resized masks that are computed, or counted, together


def resize_masks(masks: torch.Tensor, size: tuple[int, int], input_size: tuple[int, int] | None) -> torch.Tensor:
    """
    [Q, M, h, w] logits of the padded model input -> [Q, M, *size], float32 (or float64, if they are).

    A pixel centre (x + 0.5) of the image lies at (x + 0.5) * input width / image width in the model input, and a
    quarter of that in the logits. The operator behind F.interpolate takes this scale and the output size apart from
    each other, so padding is left out in the same single interpolation that undoes the resize.
    """
    masks = masks.to(torch.promote_types(masks.dtype, torch.float32))
    return torch.ops.aten.upsample_bicubic2d(masks, list(size), False, *_resize_scales(masks, size, input_size))


def _resize_scales(
    masks: torch.Tensor, size: tuple[int, int], input_size: tuple[int, int] | None
) -> tuple[float | None, float | None]:
    """By how much `resize_masks` enlarges rows and columns; `None`: as the sizes say, as nothing is padded."""
    padded_size = [INPUT_PIXELS_PER_MASK_PIXEL * n for n in masks.shape[-2:]]
    if input_size is None or list(input_size) == padded_size:
        return None, None
    if any(n > padded for n, padded in zip(input_size, padded_size, strict=True)):
        raise ValueError(
            f"reshaped_input_sizes gives {tuple(input_size)}, but masks of {tuple(masks.shape[-2:])} cover an input "
            f"of only {tuple(padded_size)} pixels."
        )
    return tuple(INPUT_PIXELS_PER_MASK_PIXEL * n / n_input for n, n_input in zip(size, input_size, strict=True))


def resize_masks_in_parts(
    masks: torch.Tensor, size: tuple[int, int], input_size: tuple[int, int] | None
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """
    `resize_masks` some pixels at a time, so that memory does not grow with the size or the number of the masks.

    Args:
        masks: [N, h, w] logits.
        size, input_size: as of `resize_masks`.

    Yields:
        Which masks, which columns, and their resized logits [n, height, columns], to the bit those of `resize_masks`:
        some whole masks, or of a large one bands of columns from the left to the right.
    """
    upsample = torch.ops.aten.upsample_bicubic2d
    height, width = size
    masks_at_once, columns_at_once = max(1, PIXELS_AT_ONCE // (height * width)), max(1, PIXELS_AT_ONCE // height)
    for start in range(0, len(masks), masks_at_once):
        some = slice(start, min(start + masks_at_once, len(masks)))
        if columns_at_once >= width:
            yield some, slice(0, width), resize_masks(masks[some, None], size, input_size)[:, 0]
            continue
        # The operator goes along the rows first and then down the columns. Where an axis stays as it is, each pixel
        # lies on a logit, whose weight is exactly 1 and that of its neighbours 0: so the two steps may be apart.
        one = masks[some, None].to(torch.promote_types(masks.dtype, torch.float32))
        down, across = _resize_scales(one, size, input_size)
        rows = upsample(one, [one.shape[2], width], False, None, across)
        for left in range(0, width, columns_at_once):
            band = rows[..., left : left + columns_at_once]
            resized = upsample(band, [height, band.shape[3]], False, down, None)[:, 0]
            yield some, slice(left, left + band.shape[3]), resized


def measure_resized_masks(
    masks: torch.Tensor, size: tuple[int, int], input_size: tuple[int, int] | None, thresholds: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    [N, h, w] logits -> the numbers of pixels of `resize_masks` above each of T thresholds, int64 [T, N], and the
    boxes of those above the last, [N, 4], as of `batched_mask_to_box`.
    """
    counts = torch.zeros(len(thresholds), len(masks), dtype=torch.long, device=masks.device)
    rows, columns = (torch.zeros(len(masks), n, dtype=torch.bool, device=masks.device) for n in size)
    for some, band, resized in resize_masks_in_parts(masks, size, input_size):
        for count, threshold in zip(counts, thresholds, strict=True):
            count[some] += count_above(resized, threshold)
        inside = resized > thresholds[-1]
        rows[some] |= inside.amax(dim=2)
        columns[some, band] = inside.amax(dim=1)
    return counts, _inclusive(_boxes_of(columns, rows))


def calculate_stability_score(masks: torch.Tensor, mask_threshold: float, threshold_offset: float) -> torch.Tensor:
    """
    [N, h, w] logits -> [N]: IoU of the masks at `mask_threshold` plus and minus `threshold_offset`; the one lies
    within the other.
    """
    inner = count_above(masks, mask_threshold + threshold_offset)
    outer = count_above(masks, mask_threshold - threshold_offset)
    return stability_score(inner, outer)


def stability_score(inner: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    """`calculate_stability_score` from the numbers of pixels of the two masks."""
    return inner.float() / outer.clamp(min=1)


def count_above(masks: torch.Tensor, threshold: float) -> torch.Tensor:
    """
    [..., h, w] -> [...]: the number of values above a threshold. Some rows at a time, as torch makes 8 bytes of each
    value to count it.
    """
    rows = max(1, PIXELS_AT_ONCE * masks.shape[-2] // max(1, masks.numel()))
    return sum(torch.count_nonzero(band > threshold, dim=(-2, -1)) for band in masks.split(rows, dim=-2))


def boxes_from_masks(masks: torch.Tensor) -> torch.Tensor:
    """
    Tight boxes [..., 4] of masks [..., h, w], float32, (x1, y1, x2, y2) in pixels, right and bottom exclusive as
    prompts and COCO have them: pixel (0, 0) alone has the box (0, 0, 1, 1), an empty mask (0, 0, 0, 0).
    """
    return _boxes_of(masks.amax(-2) > 0, masks.amax(-1) > 0)  # several times as fast as any()


def _boxes_of(columns: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Boxes from which columns [..., w] and rows [..., h] hold a pixel."""
    (x1, x2), (y1, y2) = _extent(columns), _extent(rows)
    return torch.stack([x1, y1, x2, y2], dim=-1).float()


def _extent(occupied: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and one past the last True of [..., L]; (0, 0) if there is none."""
    length = occupied.shape[-1]
    index = torch.arange(length, device=occupied.device)
    last = torch.where(occupied, index + 1, 0).amax(-1)
    first = torch.where(occupied, index, length).amin(-1)
    return torch.where(last > 0, first, 0), last


def batched_mask_to_box(masks: torch.Tensor) -> torch.Tensor:
    """
    `boxes_from_masks` with the first and last column and row that hold a pixel, int64: the boxes of the records of
    "segment everything", as segment-anything and the pipeline have them. An empty mask has the box (0, 0, 0, 0).
    """
    return _inclusive(boxes_from_masks(masks))


def _inclusive(boxes: torch.Tensor) -> torch.Tensor:
    boxes = boxes.long()
    return (boxes - boxes.new_tensor([0, 0, 1, 1])).clamp(min=0)


def uncrop_boxes_xyxy(boxes: torch.Tensor, crop_box: list[int]) -> torch.Tensor:
    """[N, 4] boxes in pixels of a crop -> in pixels of the image."""
    x1, y1, _, _ = crop_box
    return boxes + torch.tensor([x1, y1, x1, y1], device=boxes.device)


def uncrop_masks(masks: torch.Tensor, crop_box: list[int], orig_h: int, orig_w: int) -> torch.Tensor:
    """[N, h, w] masks of a crop -> [N, orig_h, orig_w] of the image, with zeros outside the crop."""
    x1, y1, x2, y2 = crop_box
    return F.pad(masks, (x1, orig_w - x2, y1, orig_h - y2))


def is_box_near_crop_edge(
    boxes: torch.Tensor, crop_box: list[int], orig_box: list[int], atol: float = 20.0
) -> torch.Tensor:
    """
    [N, 4] boxes in pixels of a crop -> [N]: do they come within `atol` pixels of the crop's border where it is not
    the image's own? `crop_box` and `orig_box`, the image's (0, 0, width, height), are in pixels of the image.
    """
    boxes = uncrop_boxes_xyxy(boxes, crop_box)
    near_crop, near_image = (
        (boxes - torch.tensor(border, device=boxes.device)).abs() <= atol for border in (crop_box, orig_box)
    )
    return (near_crop & ~near_image).any(dim=1)


def mask_to_rle_pytorch(masks: torch.Tensor) -> list[dict]:
    """[N, h, w] bool -> N uncompressed COCO RLEs: lengths of runs down the columns, the first of them background."""
    return [mask_to_rle(mask) for mask in masks.cpu().numpy()]


def non_maximum_suppression(
    boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, at_once: int = 1024
) -> torch.Tensor:
    """
    Indices of the boxes that overlap no better box which is kept by an IoU of more than `iou_threshold`, best first.

    Args:
        boxes: [N, 4], (x1, y1, x2, y2).
        scores: [N]; of equal ones the first is the better.
        at_once: boxes that are compared with all those kept before them; memory grows with `at_once` * N.
    """
    order = scores.argsort(descending=True, stable=True).to(boxes.device)
    # In float64, for products of sides; on the CPU, for not every device has that, and boxes are few.
    sorted_boxes = torch.tensor(boxes[order].tolist(), dtype=torch.float64, device="cpu").reshape(-1, 4)
    keep = sorted_boxes.new_zeros(len(boxes), dtype=torch.bool)
    for start in range(0, len(boxes), at_once):
        part = sorted_boxes[start : start + at_once]
        free = ~_overlap(part, sorted_boxes[:start][keep[:start]], iou_threshold).any(dim=1)
        beats = _overlap(part, part, iou_threshold).triu(diagonal=1)  # [better, worse]
        # What is not overlapped by anything stays, what that overlaps falls, and so on: once nothing changes, the
        # answer is that of taking the boxes one by one. Each round settles at least the best that is still open.
        stays = free
        while True:
            fallen = (beats & stays[:, None]).any(dim=0)
            settled = free & ~fallen
            if torch.equal(settled, stays):
                break
            stays = settled
        keep[start : start + at_once] = stays
    return order[keep.to(order.device)]


def _overlap(boxes: torch.Tensor, others: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """[N, 4] and [K, 4] -> [N, K]: is the IoU above the threshold?"""
    areas, other_areas = ((b[:, 2:] - b[:, :2]).prod(dim=1) for b in (boxes, others))
    overlap = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    overlap -= torch.maximum(boxes[:, None, :2], others[None, :, :2])
    intersection = overlap.clamp_(min=0).prod(dim=2)
    return intersection > iou_threshold * (areas[:, None] + other_areas - intersection)


def suppress_duplicates(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    crop_boxes: torch.Tensor,
    box_nms_thresh: float,
    crop_nms_thresh: float,
) -> torch.Tensor:
    """
    Indices of the masks that are left after non-maximum suppression among those of each crop, by score, and then
    among all, where those of smaller crops, which see more detail, win. In that order: smaller crops, better scores.

    Args:
        boxes: [N, 4] of the masks, (x1, y1, x2, y2) in the image.
        scores: [N].
        crop_boxes: [N, 4], integers, the crop that each mask is from, likewise.
    """
    crops, crop_of_mask = crop_boxes.unique(dim=0, return_inverse=True)
    kept = []
    for crop in range(len(crops)):
        own = (crop_of_mask == crop).nonzero()[:, 0]
        kept.append(own[non_maximum_suppression(boxes[own], scores[own], box_nms_thresh)])
    if len(kept) == 1:
        return kept[0]
    kept = torch.cat(kept) if kept else crop_of_mask
    smallness = -(crop_boxes[kept, 2:] - crop_boxes[kept, :2]).prod(dim=1)
    return kept[non_maximum_suppression(boxes[kept], smallness, crop_nms_thresh)]


def generate_crop_boxes(
    im_size: tuple[int, int], n_layers: int, overlap_ratio: float
) -> tuple[list[list[int]], list[int]]:
    """
    Boxes (x1, y1, x2, y2) of the whole image of `im_size` (height, width), which is layer 0, and of the 4**i crops of
    each layer i; and the layer of each. `overlap_ratio` of the short side is the overlap in layer 1; it halves with
    each layer.
    """
    height, width = im_size
    crop_boxes, layers = [[0, 0, width, height]], [0]
    for layer in range(1, n_layers + 1):
        per_side = 2**layer
        overlap = int(overlap_ratio * min(height, width) * 2 / per_side)
        crop_width, crop_height = (math.ceil((n + overlap * (per_side - 1)) / per_side) for n in (width, height))
        for i, j in product(range(per_side), repeat=2):
            left, top = i * (crop_width - overlap), j * (crop_height - overlap)
            if left < width and top < height:  # rounding can push the last crops of a tiny image out of it
                crop_boxes.append([left, top, min(left + crop_width, width), min(top + crop_height, height)])
                layers.append(layer)
    return crop_boxes, layers


def build_point_grid(n_per_side: int) -> np.ndarray:
    """[n * n, 2]: centres (x, y) of the cells of a grid of n cells a side over the unit square, row by row."""
    centres = (np.arange(n_per_side) + 0.5) / n_per_side
    x, y = np.meshgrid(centres, centres)
    return np.stack([x, y], axis=-1).reshape(-1, 2)
