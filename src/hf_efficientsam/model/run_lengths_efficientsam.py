"""COCO's run-length encoding (RLE) of masks that come whole or in bands of columns. Needs numpy only."""

from collections.abc import Sequence

import numpy as np


def run_borders(mask: np.ndarray, height: int, left: int = 0, top: int = 0) -> np.ndarray:
    """
    Where the runs of a part of a mask begin and end, going down the columns, each column for itself.

    Args:
        mask: bool `[h, w]`.
        height: of the whole mask.
        left, top: column and row of the whole mask where the part begins.

    Returns:
        Sorted numbers of pixels, counted down the columns of the whole mask: first and one past the last of each run.
    """
    borders = np.zeros((len(mask) + 1, mask.shape[1]), dtype=bool)
    borders[:-1] = mask
    borders[1:] ^= mask
    rows, columns = np.divmod(np.flatnonzero(borders), mask.shape[1])
    return np.sort((columns + left) * height + rows + top)


def rle_from_borders(parts: Sequence[np.ndarray], size: tuple[int, int]) -> dict:
    """
    The uncompressed RLE `{"size": [height, width], "counts": list}` of a mask: lengths of runs down the columns, the
    first of them background.

    Args:
        parts: `run_borders` of each of its parts, bands of columns from the left to the right.
        size: height and width.
    """
    height, width = size
    borders = np.concatenate(parts)
    # A run that ends at the foot of a column where another begins at the top of the next goes on.
    joints = np.flatnonzero(borders[1:] == borders[:-1])
    borders = np.delete(borders, np.concatenate([joints, joints + 1]))
    borders = borders[borders < height * width]
    return {"size": [height, width], "counts": np.diff(borders, prepend=0, append=height * width).tolist()}


def mask_to_rle(mask: np.ndarray) -> dict:
    """The uncompressed RLE of a mask `[height, width]`, bool."""
    return rle_from_borders([run_borders(mask, len(mask))], mask.shape)


def rle_to_mask(rle: dict) -> np.ndarray:
    """An uncompressed COCO RLE -> bool `[height, width]`."""
    height, width = rle["size"]
    inside = np.arange(len(rle["counts"])) % 2 == 1
    return np.repeat(inside, rle["counts"]).reshape(width, height).T
