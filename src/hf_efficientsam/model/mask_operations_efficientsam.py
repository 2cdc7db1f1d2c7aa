"""Functions on masks, their boxes and run-length encodings, and on the crops and points of "segment everything"."""

import math
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

# The mask decoder enlarges the patch grid (1/16 of the input) four times: a pixel of its masks is 4 x 4 of the input.
INPUT_PIXELS_PER_MASK_PIXEL = 4


def resize_masks(masks: torch.Tensor, size: tuple[int, int], input_size: tuple[int, int] | None) -> torch.Tensor:
    """
    [Q, M, h, w] logits of the padded model input -> [Q, M, *size], float32.

    A pixel centre (x + 0.5) of the image lies at (x + 0.5) * input width / image width in the model input, and a
    quarter of that in the logits. The operator behind F.interpolate takes this scale and the output size apart from
    each other, so padding is left out in the same single interpolation that undoes the resize.
    """
    masks = masks.float()
    padded_size = [INPUT_PIXELS_PER_MASK_PIXEL * n for n in masks.shape[-2:]]
    if input_size is None or list(input_size) == padded_size:
        return F.interpolate(masks, size=tuple(size), mode="bicubic", align_corners=False)
    if any(n > padded for n, padded in zip(input_size, padded_size, strict=True)):
        raise ValueError(
            f"reshaped_input_sizes gives {tuple(input_size)}, but masks of {tuple(masks.shape[-2:])} cover an input "
            f"of only {tuple(padded_size)} pixels."
        )
    scales = [INPUT_PIXELS_PER_MASK_PIXEL * n / n_input for n, n_input in zip(size, input_size, strict=True)]
    return torch.ops.aten.upsample_bicubic2d(masks, list(size), False, *scales)


def stability_score(masks: torch.Tensor, threshold: float, offset: float) -> torch.Tensor:
    """[N, h, w] logits -> [N]: IoU of the masks at a higher and a lower threshold; the one lies within the other."""
    inner = torch.count_nonzero(masks > threshold + offset, dim=(-2, -1))
    outer = torch.count_nonzero(masks > threshold - offset, dim=(-2, -1))
    return inner / outer.clamp(min=1)


def mask_to_box(masks: torch.Tensor) -> torch.Tensor:
    """[N, h, w] bool, none of them empty -> [N, 4] int64: first and last column and row that hold a pixel."""
    rows, columns = masks.any(dim=2).byte(), masks.any(dim=1).byte()
    x1, y1 = columns.argmax(dim=1), rows.argmax(dim=1)
    x2 = columns.shape[1] - 1 - columns.flip(1).argmax(dim=1)
    y2 = rows.shape[1] - 1 - rows.flip(1).argmax(dim=1)
    return torch.stack([x1, y1, x2, y2], dim=1)


def touches_crop_border(boxes: torch.Tensor, crop_box: list[int], image_size: tuple[int, int], reach: int = 20):
    """[N, 4] boxes in the image -> [N]: do they come near the crop's border where it is not the image's own?"""
    crop_border = torch.tensor(crop_box, device=boxes.device)
    image_border = torch.tensor([0, 0, image_size[1], image_size[0]], device=boxes.device)
    near_crop, near_image = (boxes - crop_border).abs() <= reach, (boxes - image_border).abs() <= reach
    return (near_crop & ~near_image).any(dim=1)


def masks_to_rles(masks: torch.Tensor) -> list[dict]:
    """[N, h, w] bool -> N uncompressed COCO RLEs: lengths of runs down the columns, the first of them background."""
    height, width = masks.shape[-2:]
    rles = []
    for mask in masks.cpu().numpy():
        starts = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
        counts = np.diff(starts, prepend=0, append=height * width)
        rles.append({"size": [height, width], "counts": counts.tolist()})
    return rles


def rle_to_mask(rle: dict) -> np.ndarray:
    height, width = rle["size"]
    inside = np.arange(len(rle["counts"])) % 2 == 1
    return np.repeat(inside, rle["counts"]).reshape(width, height).T


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
    sorted_boxes = boxes[order].double()
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
    return order[keep]


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
        crop_boxes: [N, 4], the crop that each mask is from, likewise.
    """
    crops, crop_of_mask = crop_boxes.unique(dim=0, return_inverse=True)
    kept = []
    for crop in range(len(crops)):
        own = (crop_of_mask == crop).nonzero()[:, 0]
        kept.append(own[non_maximum_suppression(boxes[own], scores[own], box_nms_thresh)])
    if len(kept) == 1:
        return kept[0]
    kept = torch.cat(kept) if kept else crop_of_mask
    smallness = -(crop_boxes[kept, 2:] - crop_boxes[kept, :2]).double().prod(dim=1)
    return kept[non_maximum_suppression(boxes[kept], smallness, crop_nms_thresh)]


def lay_crops(height: int, width: int, n_layers: int, overlap_ratio: float) -> tuple[list[list[int]], list[int]]:
    """Boxes (x1, y1, x2, y2) of the whole image (layer 0) and of the 4**i crops of each layer i; their layers."""
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


def point_grid(n: int) -> np.ndarray:
    """[n * n, 2]: centres (x, y) of the cells of an n x n grid over the unit square, row by row."""
    centres = (np.arange(n) + 0.5) / n
    x, y = np.meshgrid(centres, centres)
    return np.stack([x, y], axis=-1).reshape(-1, 2)
