"""Prompts from masks: boxes, first clicks and corrections.

Boxes are (left, top, right, bottom) in pixels of the masks, right and bottom exclusive: pixel (0, 0) alone has the box
(0, 0, 1, 1). Points are (x, y) indices of a pixel, as floats; the model adds the half that leads to its centre.
Chance is an argument: uniform random numbers in [0, 1), so that nothing depends on the batch, process or device.
"""

import torch


def jitter_boxes(
    boxes: torch.Tensor,
    size: int,
    uniform: torch.Tensor,
    noise: float = 0.1,
    max_pixels: float = 20,
) -> torch.Tensor:
    """SAM's imprecise boxes: every coordinate moves by Gaussian noise.

    Args:
        boxes: [...,4].
        size: side of the image in pixels; the result stays inside.
        uniform: random numbers [...,4], made normal ones by the inverse of the normal distribution.
        noise: standard deviation as a ratio of the box's side.
        max_pixels: the noise is cut off at so many pixels.

    Returns:
        float32 [...,4]; a box that would become thinner than one pixel keeps its coordinates along that axis.
    """
    boxes = boxes.float()
    sides = boxes[..., 2:] - boxes[..., :2]
    normal = torch.special.ndtri(uniform.to(boxes).clamp(1e-7, 1 - 1e-7))
    shift = normal * noise * torch.cat([sides, sides], -1)
    moved = (boxes + shift.clamp(-max_pixels, max_pixels)).clamp(0, size)
    thin = moved[..., 2:] - moved[..., :2] < 1
    return torch.where(torch.cat([thin, thin], -1), boxes, moved)


def sample_points(masks: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """A uniformly random pixel inside each mask [...,H,W], chosen by uniform [...]: float32 [...,2].

    An empty mask, such as padding, gives the point (0, 0), which means nothing: leave such masks out of the loss with
    `Batch.valid`.
    """
    masks = masks.bool()
    rows = masks.sum(-1, dtype=torch.int32).cumsum(-1)
    area = rows[..., -1:]
    # The n-th of the mask's pixels: first its row, then its place in that row.
    n = torch.minimum((uniform[..., None].to(masks.device) * area).long(), area - 1)
    y = (rows <= n).sum(-1, keepdim=True).clamp(max=masks.shape[-2] - 1)
    row = masks.gather(-2, y[..., None].expand(*y.shape[:-1], 1, masks.shape[-1])).squeeze(-2).long()
    before = rows.gather(-1, y) - row.sum(-1, keepdim=True)
    x = (row.cumsum(-1) <= n - before).sum(-1, keepdim=True)
    return torch.where(area > 0, torch.cat([x, y], -1), 0).float()


def sample_error_points(
    predicted: torch.Tensor, target: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next click: a random pixel where prediction and target [...,H,W] differ, chosen by uniform [...].

    Returns:
        points float32 [...,2] and labels int64 [...]: 1 where the object was missed, 0 where the prediction is too
        large. Where nothing is wrong the click is a random pixel of the target.
    """
    target = target.bool()
    error = predicted.bool() ^ target
    region = error | (target & ~error.amax((-2, -1), keepdim=True))
    points = sample_points(region, uniform)
    x, y = points.long().unbind(-1)
    labels = target.flatten(-2).gather(-1, (y * target.shape[-1] + x)[..., None])[..., 0].long()
    return points, labels
