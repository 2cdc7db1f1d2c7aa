"""Mixup and cutmix of the images of a batch and their targets."""

import torch


def mix_neighbors(
    pixel_values: torch.Tensor, targets: torch.Tensor, ratio: torch.Tensor, box: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mixes the first image of a batch with the second and the second with the first, the third with the fourth, and so
    on. Neighbours are in the same batch however a step's images are split into batches of an even size, so one
    process and two, or one batch and several accumulated ones, see the same mixtures.

    Args:
        pixel_values: `[B, 3, H, W]`, B even.
        targets: float32 `[B, K]`, 1 for the class of an image.
        ratio, box: of `draw_mixing`, `[B]` and `[B, 4]`. Inside its box an image is its neighbour; outside, each
            pixel is `ratio` its own and the rest its neighbour's.

    Returns:
        The mixed images `[B, 3, H, W]`, and targets `[B, K]`, of each class as much as there is of its image.
    """
    height, width = pixel_values.shape[-2:]
    left, top, right, bottom = box[:, :, None, None, None].unbind(1)  # [B, 1, 1, 1]
    x = torch.arange(width, device=box.device)
    y = torch.arange(height, device=box.device)[:, None]
    inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)  # [B, 1, H, W]
    mixed = torch.lerp(_swapped(pixel_values), pixel_values, ratio[:, None, None, None])
    kept = ratio * (1 - inside.float().mean((1, 2, 3)))
    return (
        torch.where(inside, _swapped(pixel_values), mixed),
        torch.lerp(_swapped(targets), targets, kept[:, None]),
    )


def _swapped(batch: torch.Tensor) -> torch.Tensor:
    """`[B, ...]`, the first and the second change places, and so on."""
    return batch.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
