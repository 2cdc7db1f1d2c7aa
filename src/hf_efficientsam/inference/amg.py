"""Helpers of the mask generator under the names of segment-anything's `utils/amg.py`.

Those that the image processor needs too are functions of model/mask_operations_efficientsam.py:

| segment-anything | there |
|---|---|
| `build_point_grid` | `point_grid` |
| `generate_crop_boxes` | `lay_crops` |
| `calculate_stability_score` | `stability_score` |
| `batched_mask_to_box` | `mask_to_box` |
| `is_box_near_crop_edge` | `touches_crop_border` |
| `mask_to_rle_pytorch`, `rle_to_mask` | `masks_to_rles`, `rle_to_mask` |
| torchvision's `batched_nms` | `non_maximum_suppression`, `suppress_duplicates` |
"""

import numpy as np
from scipy import ndimage

from hf_efficientsam.model.mask_operations_efficientsam import (
    point_grid,
)


def build_all_layer_point_grids(n_per_side: int, n_layers: int, scale_per_layer: int) -> list[np.ndarray]:
    """
    The grids of points `[n, 2]` over the image (layer 0) and over each crop of layers 1 to `n_layers`, x and y from 0
    to 1: layer i has `scale_per_layer` to the power i fewer points a side, but at least one.
    """
    return [point_grid(max(1, int(n_per_side / scale_per_layer**i))) for i in range(n_layers + 1)]


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
    areas = np.bincount(regions.ravel(), minlength=count + 1)
    small = areas < area_thresh
    small[0] = False
    if not small.any():
        return mask, False
    if holes:
        return mask | small[regions], True
    if small[1:].all():
        small[1 + areas[1:].argmax()] = False
    return mask & ~small[regions], True


__all__ = ["build_all_layer_point_grids", "remove_small_regions"]
