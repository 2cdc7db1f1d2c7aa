"""Objects that need no image: where a new decoder learns what a box, a click and a mask prompt mean."""

import torch


def random_ellipses(uniform: torch.Tensor, size: int, smallest: float = 0.04) -> torch.Tensor:
    """
    Ellipses of random place, size and proportions, partly outside the image at times, never empty.

    Args:
        uniform: random numbers in [0, 1), `[..., 4]`: the centre's x and y, then what the sides are drawn by.
        size: side of the image in pixels.
        smallest: least side of an ellipse, as a ratio of the image's.

    Returns:
        uint8 `[..., size, size]` of 0 and 1. Sides are log-uniform from `smallest` to 100 % of the image's.
    """
    uniform = uniform.float()[..., None, None]
    x0, y0 = (uniform[..., :2, :, :] * size).unbind(-3)
    rx, ry = (size / 2 * smallest ** uniform[..., 2:, :, :]).unbind(-3)
    pixel = torch.arange(size, device=uniform.device) + 0.5
    x, y = (pixel - x0) / rx, (pixel[:, None] - y0) / ry
    nearest = (pixel - x0).abs() + (pixel[:, None] - y0).abs()
    is_nearest = nearest == nearest.amin((-2, -1), keepdim=True)
    return ((x**2 + y**2 <= 1) | is_nearest).byte()
