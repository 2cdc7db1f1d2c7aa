"""Objects that need no image: where a new decoder learns what a box, a click and a mask prompt mean."""

import torch


def random_ellipses(shape: tuple[int, ...], size: int, generator: torch.Generator) -> torch.Tensor:
    """
    Ellipses of random place, size and proportions, partly outside the image at times, never empty.

    Args:
        shape: how many, e.g. `(B, Q)`.
        size: side of the image in pixels.
        generator: CPU source of the random numbers.

    Returns:
        uint8 `[*shape, size, size]` of 0 and 1. Sides are log-uniform from 4 % to 100 % of the image's.
    """
    centre = torch.rand(*shape, 2, 1, 1, generator=generator) * size
    radius = size / 2 * 25 ** -torch.rand(*shape, 2, 1, 1, generator=generator)
    pixel = torch.arange(size) + 0.5
    x, y = (
        (pixel - centre[..., 0, :, :]) / radius[..., 0, :, :],
        (pixel[:, None] - centre[..., 1, :, :]) / radius[..., 1, :, :],
    )
    nearest = (pixel - centre[..., 0, :, :]).abs() + (pixel[:, None] - centre[..., 1, :, :]).abs()
    is_nearest = nearest == nearest.amin((-2, -1), keepdim=True)
    return ((x**2 + y**2 <= 1) | is_nearest).byte()
