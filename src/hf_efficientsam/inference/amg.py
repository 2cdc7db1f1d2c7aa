"""Segment-anything's `utils/amg.py`: the helpers of the mask generator under its names and with its arguments.

Those that the image processor needs too are defined in model/mask_operations_efficientsam.py, because a Hub repository
carries model/ alone. In place of torchvision's `batched_nms` stand `non_maximum_suppression` and
`suppress_duplicates` there. `MaskData` is the `Candidate` of mask_generation.py.
"""

import numpy as np
from scipy import ndimage

from hf_efficientsam.model.mask_operations_efficientsam import (
    batched_mask_to_box,
    build_point_grid,
    calculate_stability_score,
    generate_crop_boxes,
    is_box_near_crop_edge,
    mask_to_rle_pytorch,
    uncrop_boxes_xyxy,
    uncrop_masks,
)
from hf_efficientsam.model.run_lengths_efficientsam import rle_to_mask

from .results import coco_encode_rle

PIXELS_AT_ONCE = 2**20  # numpy makes indices of 8 bytes of labels: not of all pixels of a large image together


def box_xyxy_to_xywh(box_xyxy: list[int]) -> list[int]:
    """(x1, y1, x2, y2) -> (x1, y1, x2 - x1, y2 - y1)."""
    x1, y1, x2, y2 = box_xyxy
    return [x1, y1, x2 - x1, y2 - y1]


def build_all_layer_point_grids(n_per_side: int, n_layers: int, scale_per_layer: int) -> list[np.ndarray]:
    """
    The grids of points `[n, 2]` over the image (layer 0) and over each crop of layers 1 to `n_layers`, x and y from 0
    to 1: layer i has `scale_per_layer` to the power i fewer points a side, but at least one.
    """
    return [build_point_grid(max(1, int(n_per_side / scale_per_layer**i))) for i in range(n_layers + 1)]


def remove_small_regions(mask: np.ndarray, area_thresh: int, mode: str) -> tuple[np.ndarray, bool]:
    """
    Fills holes, or removes islands, of fewer pixels than `area_thresh`.

    Args:
        mask: `[height, width]`, bool.
        area_thresh: in pixels.
        mode: "holes" or "islands"; corners connect. The largest island stays in any case.

    Returns:
        the mask, and whether anything changed.
    """
    holes = mode == "holes"
    regions, count = ndimage.label(mask != holes, structure=np.ones((3, 3)))
    rows = max(1, PIXELS_AT_ONCE // mask.shape[1])
    bands = [slice(start, start + rows) for start in range(0, len(mask), rows)]
    areas = sum(np.bincount(regions[band].ravel(), minlength=count + 1) for band in bands)
    small = areas < area_thresh
    small[0] = False
    if not small.any():
        return mask, False
    if not holes and small[1:].all():
        small[1 + areas[1:].argmax()] = False
    mask = mask.copy()
    for band in bands:
        mask[band][small[regions[band]]] = holes
    return mask, True


__all__ = [
    "batched_mask_to_box",
    "box_xyxy_to_xywh",
    "build_all_layer_point_grids",
    "build_point_grid",
    "calculate_stability_score",
    "coco_encode_rle",
    "generate_crop_boxes",
    "is_box_near_crop_edge",
    "mask_to_rle_pytorch",
    "remove_small_regions",
    "rle_to_mask",
    "uncrop_boxes_xyxy",
    "uncrop_masks",
]
