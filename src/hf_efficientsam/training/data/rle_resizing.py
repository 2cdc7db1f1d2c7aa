"""Masks from run-length code straight to the size of the model's input, without their pixels at the image's size.

A column of a mask is a sum of steps, one up and one down for each of its runs, so it is resized by adding resized
steps, which are rows of a table. The result is resized along the other axis. Both touch the mask's own box alone.
SA-1B's photographs have 100 masks of 2250 x 1500 pixels, nearly all of them 0: to decode and resize these planes takes
nearly all of the time of loading one.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.sparse import csr_array

from .coco import run_lengths

HALF = 0.5 - 1e-5  # what is half covered belongs to the mask, however its sum was rounded


@dataclass(frozen=True)
class Axis:
    """
    How `length` pixels become `size`: pixel o of the result is the sum of `weights[o]` times the pixels `taps[o]`.

    Bilinear with antialiasing as torch and PIL have it, a triangle as wide as two pixels of the result, or of the
    source where that is enlarged. taps int64 [size, K], weights float32 [size, K].
    """

    taps: np.ndarray
    weights: np.ndarray
    length: int

    @property
    def steps(self) -> np.ndarray:
        """float32 [length + 1, size]: in row i a source that is 0 before pixel i and 1 from there on."""
        dense = np.zeros((self.length + 1, len(self.taps)))
        np.add.at(dense, (self.taps, np.arange(len(self.taps))[:, None]), self.weights)
        return dense[::-1].cumsum(0)[::-1].astype(np.float32)

    def reached(self, start: int, stop: int) -> slice:
        """The pixels of the result that depend on source pixels from `start` to `stop`."""
        return slice(np.searchsorted(self.taps[:, -1], start), np.searchsorted(self.taps[:, 0], stop))

    def part(self, results: slice, sources: slice) -> csr_array:
        """The weights of some pixels of the result on some of the source, as a sparse matrix."""
        taps = self.taps[results] - sources.start
        count = sources.stop - sources.start
        weights = np.where((taps >= 0) & (taps < count), self.weights[results], 0)
        ends = np.arange(len(taps) + 1) * taps.shape[1]
        return csr_array((weights.ravel(), taps.clip(0, count - 1).ravel(), ends), shape=(len(taps), count))


@lru_cache(maxsize=8)
def axis_of(length: int, size: int) -> tuple[Axis, np.ndarray]:
    """The axis and its `steps`."""
    scale = length / size
    support = max(scale, 1.0)
    centers = scale * (np.arange(size) + 0.5)
    first = np.maximum((centers - support + 0.5).astype(int), 0)
    taps = first[:, None] + np.arange(2 * math.ceil(support) + 1)
    weights = np.maximum(1 - np.abs(taps + 0.5 - centers[:, None]) / support, 0) * (taps < length)
    weights /= weights.sum(1, keepdims=True)
    axis = Axis(taps.clip(max=length - 1), weights.astype(np.float32), length)
    return axis, axis.steps


def resize_rles(rles: list[dict], box: tuple[int, int, int, int], size: int | tuple[int, int]) -> torch.Tensor:
    """
    Part of masks, resized with antialiasing and then cut at one half.

    Args:
        rles: compressed COCO RLEs of masks [H,W].
        box: the part (left, top, right, bottom) in pixels, right and bottom exclusive.
        size: (h, w) of the result, or the side of a square.

    Returns:
        uint8 [N,h,w] of 0 and 1; exactly the part itself if it has h x w pixels.
    """
    left, top, right, bottom = box
    height, width = (size, size) if isinstance(size, int) else size
    (across, _), (down, steps) = axis_of(right - left, width), axis_of(bottom - top, height)
    masks = np.zeros((len(rles), height, width), np.uint8)
    for mask, rle in zip(masks, rles, strict=True):
        columns, starts, stops = _runs_of_columns(rle, box)
        if not len(columns):
            continue
        xs, ys = slice(columns[0], columns[-1] + 1), slice(starts.min(), stops.max())
        rows, out_columns = down.reached(ys.start, ys.stop), across.reached(xs.start, xs.stop)
        ends = 2 * np.searchsorted(columns, np.arange(xs.start, xs.stop + 1))
        signs = np.tile(np.array([1, -1], np.float32), len(columns))
        places = np.stack([starts, stops], 1).ravel() - ys.start
        runs = csr_array((signs, places, ends), shape=(xs.stop - xs.start, ys.stop - ys.start + 1))
        resized = runs @ steps[ys.start : ys.stop + 1, rows]
        mask[rows, out_columns] = (across.part(out_columns, xs) @ resized >= HALF).T
    return torch.from_numpy(masks)


def _runs_of_columns(rle: dict, box: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column, first row and last row plus one of each run of ones within a box, in pixels of the box, column by
    column."""
    left, top, right, bottom = box
    height = rle["size"][0]
    ends = run_lengths(rle["counts"]).cumsum()
    starts, stops = ends[:-1:2], ends[1::2]
    kept = (stops > starts) & (stops > left * height) & (starts < right * height)
    starts, stops = starts[kept], stops[kept]
    first, last = starts // height, (stops - 1) // height
    # A run that reaches the image's lower edge may go on at the top of the next column.
    counts = last - first + 1
    run = np.repeat(np.arange(len(counts)), counts)
    columns = np.arange(len(run)) - np.repeat(counts.cumsum() - counts, counts) + first[run]
    starts = np.maximum(starts[run] - columns * height, top)
    stops = np.minimum(stops[run] - columns * height, bottom)
    kept = (columns >= left) & (columns < right) & (stops > starts)
    return columns[kept] - left, starts[kept] - top, stops[kept] - top
