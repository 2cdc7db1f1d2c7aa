"""Masks as polygons along the edges of their pixels, so that filling the polygons gives the mask back.

The contours of OpenCV and scikit-image pass through the centres of pixels, which loses half a pixel on every side, and
most file formats have no holes. Here a hole is joined to the polygon around it by a bridge: a segment that is passed
once in each direction. It encloses no area, so it changes no pixel.
"""

import numpy as np
from pycocotools import mask as coco_mask

# The four directions of an edge between pixels as (x, y); the mask lies on the right-hand side of each.
STEPS = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])
# Of polygons that people edit, in pixels: few corners are worth more to them than the stairs of pixels.
EDITABLE_TOLERANCE = 1.0


def polygons_of_mask(mask: np.ndarray, tolerance: float = 0.0) -> list[np.ndarray]:
    """
    The polygons of a mask, one for each 4-connected part, with bridges to its holes.

    Args:
        mask: bool `[height, width]`.
        tolerance: largest distance in pixels of a corner that is left out (Douglas and Peucker, 1973); 0 is exact.

    Returns:
        float32 `[n, 2]` each, corners (x, y) in pixels, where pixel (0, 0) covers 0 to 1. The first corner is not
        repeated at the end. Parts and holes that have no area within the tolerance are left out.
    """
    contours = trace_contours(mask)
    parts = [[contour] for contour in contours if signed_area(contour) > 0]
    for hole in (contour for contour in contours if signed_area(contour) < 0):
        # Of parts within each other's holes the smallest around a hole is the one that has it.
        around = (part for part in parts if is_inside(hole, part[0]))
        min(around, key=lambda part: signed_area(part[0])).append(hole)
    polygons = []
    for part in parts:
        kept = [contour for contour in (simplified(contour, tolerance) for contour in part) if len(contour) >= 3]
        if kept and signed_area(kept[0]) > 0:
            polygons.append(joined(kept).astype(np.float32))
    return polygons


def mask_of_polygons(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Bool `[height, width]`, the union of filled polygons `[n, 2]`, as pycocotools fills them."""
    if not polygons:
        return np.zeros((height, width), dtype=bool)
    rles = coco_mask.frPyObjects([np.asarray(one, float).ravel().tolist() for one in polygons], height, width)
    return coco_mask.decode(coco_mask.merge(rles)).astype(bool)


def trace_contours(mask: np.ndarray) -> list[np.ndarray]:
    """
    The closed contours of a bool mask `[height, width]`, int64 `[n, 2]` each: the corners (x, y) where the contour
    turns, around parts clockwise (y points down), around holes counterclockwise. Pixels that touch only at a corner
    belong to different parts.
    """
    padded = np.pad(np.asarray(mask, dtype=bool), 1)
    # Of each corner of the pixel grid the pixels above left, above right, below left and below right.
    above_left, above_right = padded[:-1, :-1], padded[:-1, 1:]
    below_left, below_right = padded[1:, :-1], padded[1:, 1:]
    there = np.stack(
        [
            below_right & ~above_right,
            below_left & ~below_right,
            above_left & ~below_left,
            above_right & ~above_left,
        ],
        axis=-1,
    ).ravel()  # whether an edge starts at a corner in a direction
    edges = np.flatnonzero(there)
    corners, directions = np.divmod(edges, 4)
    row = padded.shape[1] - 1
    ends = corners + (STEPS @ [1, row])[directions]
    turns = [ends * 4 + (directions + turn) % 4 for turn in (1, 0, 3)]  # right, straight on, left
    right, straight, left = turns
    following = np.where(there[right], right, np.where(there[straight], straight, left))
    successors = np.searchsorted(edges, following).tolist()

    contours, is_done = [], [False] * len(edges)
    for first in range(len(edges)):
        contour, edge = [], first
        while not is_done[edge]:
            is_done[edge] = True
            contour.append(edge)
            edge = successors[edge]
        if contour:
            contour = np.array(contour)
            is_corner = directions[contour] != directions[np.roll(contour, 1)]
            y, x = np.divmod(corners[contour[is_corner]], row)
            contours.append(np.stack([x, y], axis=1))
    return contours


def simplified(contour: np.ndarray, tolerance: float) -> np.ndarray:
    """A closed contour `[n, 2]` without corners that are less than `tolerance` from what is left."""
    if tolerance <= 0:
        return contour
    opposite = int(np.square(contour - contour[0]).sum(1).argmax())
    closed = np.concatenate([contour, contour[:1]])
    is_kept = np.zeros(len(closed), dtype=bool)
    is_kept[[0, opposite]] = True
    sections = [(0, opposite), (opposite, len(closed) - 1)]
    while sections:
        start, end = sections.pop()
        between = closed[start + 1 : end] - closed[start]
        chord = closed[end] - closed[start]
        along = np.clip(between @ chord / max(chord @ chord, 1), 0, 1)
        distances = np.linalg.norm(between - along[:, None] * chord, axis=1)
        if len(distances) and distances.max() > tolerance:
            middle = start + 1 + int(distances.argmax())
            is_kept[middle] = True
            sections += [(start, middle), (middle, end)]
    return contour[is_kept[:-1]]


def signed_area(contour: np.ndarray) -> float:
    """In pixels; positive if the corners go clockwise (y points down), negative otherwise."""
    x, y = contour.T.astype(float)
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def is_inside(inner: np.ndarray, outer: np.ndarray) -> bool:
    """Whether a contour that does not cross another lies inside it: by a ray from the middle of one of its edges."""
    (x, y), ahead = (inner[0] + inner[1]) / 2, np.roll(outer, -1, axis=0)
    crosses = (outer[:, 1] > y) != (ahead[:, 1] > y)
    (x1, y1), (x2, y2) = outer[crosses].T, ahead[crosses].T
    return bool(((x1 + (y - y1) * (x2 - x1) / (y2 - y1)) > x).sum() % 2)


def joined(contours: list[np.ndarray]) -> np.ndarray:
    """
    One closed contour through all corners of several, with a bridge between the nearest corners of two of them at a
    time. Bridges to holes lie within the mask; bridges between parts cross the background.
    """
    whole, rest = contours[0], list(contours[1:])
    while rest:
        pairs = [nearest_corners(whole, other) for other in rest]
        which = min(range(len(rest)), key=lambda i: pairs[i][0])
        _, here, there = pairs[which]
        other = np.roll(rest.pop(which), -there, axis=0)
        whole = np.concatenate([whole[: here + 1], other, other[:1], whole[here:]])
    return whole


def nearest_corners(one: np.ndarray, other: np.ndarray) -> tuple[float, int, int]:
    """Squared distance and indices of the two corners of contours `[n, 2]` and `[m, 2]` that are nearest."""
    best = (np.inf, 0, 0)
    for start in range(0, len(one), 1024):  # bounds the memory of long contours
        distances = np.square(one[start : start + 1024, None] - other).sum(-1)
        here, there = np.unravel_index(distances.argmin(), distances.shape)
        best = min(best, (float(distances[here, there]), start + int(here), int(there)))
    return best
