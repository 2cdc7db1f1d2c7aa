"""Interpolation as torch's `interpolate` does it, in numpy: for images and masks where there is no torch."""

from collections.abc import Callable, Sequence

import numpy as np


def resample(values: np.ndarray, size: tuple[int, int], steps: Sequence[float], weights: Callable) -> np.ndarray:
    """
    `[..., h, w]` -> `[..., *size]`, float32, as torch's `interpolate` without antialiasing.

    Args:
        steps: distance of two pixels of the result in `values`, down and across.
        weights: of the neighbours, `linear_weights` or `cubic_weights`.
    """
    for axis, length, step in zip((-2, -1), size, steps, strict=True):
        # Rounded as torch does, which matters in large images: the step, and then the place, to float32.
        places = (np.float64(np.float32(step)) * (np.arange(length) + 0.5) - 0.5).astype(np.float32)
        first, neighbours = weights(places)
        last = values.shape[axis] - 1
        values = sum(
            np.take(values, np.clip(first + i, 0, last), axis) * (weight if axis == -1 else weight[:, None])
            for i, weight in enumerate(neighbours)
        )
    return values


def linear_weights(places: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """For each place the index of its first neighbour, and the weights of that one and the next."""
    places = places.clip(min=0)
    first = np.floor(places)
    second = places - first
    return first.astype(np.int64), [1 - second, second]


def cubic_weights(places: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """
    For each place, float32, the index of the first of its four neighbours, and the weights of the four: cubic
    convolution (Keys 1981) with the constant of torch's bicubic, a = -0.75.
    """
    a = np.float32(-0.75)
    whole = np.floor(places)
    t = places - whole

    def near(x):
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x):
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return whole.astype(np.int64) - 1, [far(t + 1), near(t), near(1 - t), far(2 - t)]


__all__ = ["cubic_weights", "linear_weights", "resample"]
