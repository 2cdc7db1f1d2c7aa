"""The points that "segment everything" asks about."""

import math

import numpy as np
import torch

INPUT_PIXELS_PER_CELL = 16  # of the image embedding
PLACE_WEIGHT = 3.0  # of the picture's side, against the mean distance of what the encoder sees from its mean
POINTS_AT_ONCE = 4096  # of which some are chosen: time grows with its square


def check_point_grids(point_grids: list[np.ndarray], crop_n_layers: int) -> list[np.ndarray]:
    """Grids of points `[n, 2]` as float64. ValueError: not one for each layer, or points out of [0, 1]."""
    if len(point_grids) != crop_n_layers + 1:
        raise ValueError(f"point_grids must hold {crop_n_layers + 1} grids, for the image and each layer of crops.")
    for grid in point_grids:
        if np.ndim(grid) != 2 or np.shape(grid)[1] != 2 or not len(grid) or np.min(grid) < 0 or np.max(grid) > 1:
            raise ValueError("Each of point_grids must be points [n, 2] with x and y from 0 to 1.")
    return [np.asarray(grid, dtype=np.float64) for grid in point_grids]


def distinct_points(embedding: torch.Tensor, points: torch.Tensor, share: float) -> torch.Tensor:
    """
    The points that differ most in what the encoder sees there and in place. So a small object gets points of its own,
    and a large one only as many as its parts differ.

    Args:
        embedding: of the image, `[1, C, h, w]`.
        points: `[n, 2]`, x and y in pixels of the model input.
        share: of the points that are taken, from 0 to 1; at least one is.

    Returns:
        their numbers, int64, in rising order.
    """
    last = points.new_tensor([embedding.shape[3] - 1, embedding.shape[2] - 1])
    x, y = (points / INPUT_PIXELS_PER_CELL).floor().minimum(last).long().unbind(dim=1)
    seen = embedding[0, :, y, x].T.float()
    seen = seen - seen.mean(dim=0)
    seen = seen / seen.square().sum(dim=1).mean().sqrt().clamp(min=1e-12)
    places = PLACE_WEIGHT / INPUT_PIXELS_PER_CELL * points / (last + 1)
    parts = torch.cat([seen, places], dim=1).split(POINTS_AT_ONCE)
    taken = [farthest_points(part, math.ceil(share * len(part))) + i * POINTS_AT_ONCE for i, part in enumerate(parts)]
    return torch.cat(taken).sort().values


def farthest_points(features: torch.Tensor, count: int) -> torch.Tensor:
    """
    Farthest point sampling (Gonzalez, Clustering to minimize the maximum intercluster distance, 1985) of `[n, C]`: the
    first, then again and again the one that is farthest from all that were taken. Their numbers, `[count]`.
    """
    taken = torch.zeros(count, dtype=torch.long, device=features.device)
    distances = features.new_full((len(features),), math.inf)
    for i in range(1, count):
        distances = distances.minimum((features - features[taken[i - 1]]).square().sum(dim=1))
        taken[i] = distances.argmax()
    return taken


__all__ = ["check_point_grids", "distinct_points", "farthest_points"]
