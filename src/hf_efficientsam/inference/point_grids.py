"""The points that "segment everything" asks about: which, in which order, and which need not be asked."""

import numpy as np
import torch

from hf_efficientsam.model.mask_operations_efficientsam import INPUT_PIXELS_PER_MASK_PIXEL


def check_point_grids(point_grids: list[np.ndarray], crop_n_layers: int) -> list[np.ndarray]:
    """Grids of points `[n, 2]` as float64. ValueError: not one for each layer, or points out of [0, 1]."""
    if len(point_grids) != crop_n_layers + 1:
        raise ValueError(f"point_grids must hold {crop_n_layers + 1} grids, for the image and each layer of crops.")
    for grid in point_grids:
        if np.ndim(grid) != 2 or np.shape(grid)[1] != 2 or not len(grid) or np.min(grid) < 0 or np.max(grid) > 1:
            raise ValueError("Each of point_grids must be points [n, 2] with x and y from 0 to 1.")
    return [np.asarray(grid, dtype=np.float64) for grid in point_grids]


def coarse_to_fine(grid: np.ndarray) -> np.ndarray:
    """
    The numbers of the points of a grid `[n, 2]` in an order whose beginnings all cover the picture: of a regular grid,
    say, first every 16th point of every 16th row, then those in the middle of four of them, and so on. That is van der
    Corput's order in two dimensions, of the places that the points have among the different x and y.
    """
    column, row = (np.unique(places, return_inverse=True)[1].ravel() for places in grid.T)
    key = np.zeros(len(grid), dtype=np.int64)
    for bit in range(len(grid).bit_length()):  # the lowest bits, in which neighbours differ, weigh most
        right, low = column >> bit & 1, row >> bit & 1
        key = 4 * key + np.array([0, 3, 2, 1])[2 * right + low]  # after a point the one across from it
    return key.argsort(kind="stable")


def covered_points(masks: list[torch.Tensor], points: torch.Tensor, mask_threshold: float) -> torch.Tensor:
    """
    Which of the points `[n, 2]`, in pixels of the model input, lie in one of the masks: bool `[n]`. `masks` are logits
    `[h, w]`.
    """
    covered = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for logits in masks:
        last = points.new_tensor([logits.shape[1] - 1, logits.shape[0] - 1])
        x, y = (points / INPUT_PIXELS_PER_MASK_PIXEL).floor().minimum(last).long().unbind(dim=1)
        covered |= logits[y, x] > mask_threshold
    return covered


__all__ = ["check_point_grids", "coarse_to_fine", "covered_points"]
