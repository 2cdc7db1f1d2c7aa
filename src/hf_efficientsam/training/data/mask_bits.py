"""Masks as bits, eight pixels of a row in a byte: an eighth of what travels between processes and to a GPU."""

import torch


def pack_masks(masks: torch.Tensor) -> torch.Tensor:
    """Masks uint8 [...,H,W] of 0 and 1, W a multiple of 8 -> uint8 [...,H,W/8], as numpy's `packbits` does
    in less time on a CPU."""
    packed = torch.zeros(*masks.shape[:-1], masks.shape[-1] // 8, dtype=torch.uint8, device=masks.device)
    for place in range(8):
        packed |= masks[..., place::8] << (7 - place)
    return packed


def unpack_masks(bits: torch.Tensor) -> torch.Tensor:
    """What `pack_masks` was given."""
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> places) & 1).flatten(-2)
