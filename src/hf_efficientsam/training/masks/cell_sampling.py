"""Training the mask decoder on a part of the image's cells.

A decoder step costs as much as it has prompts times cells. After the first token-to-image attention, which reads all
cells and whose image side the prompts of an image share, each prompt goes on with K cells of its own: those around
its object first, others at random. Where the full decoder sums over cells, in the later attentions, the normalisation
and the loss, a chosen cell counts as many times as one over its chance to be chosen. Each such sum is thereby an
unbiased estimate of the full one (Horvitz and Thompson, 1952); with all cells chosen everything equals the full
decoder.

B images, Q prompts an image, N = h * w cells, K chosen ones, M masks, R pixels of the mask in a cell (16), in the
order in which the upscaling makes them: y and x of the first doubling, y and x of the second.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hf_efficientsam.model.mask_decoder_fast_efficientsam import double_cells, doubling_layer
from hf_efficientsam.model.modeling_efficientsam import (
    EfficientSamMaskDecoder,
    EfficientSamMaskUpscaling,
    EfficientSamTwoWayLayer,
)

from .losses import MaskLossConfig, threshold_shift

SINGLE_WEIGHT = 0.5  # of the single mask beside the candidates
BCE_LIMIT = 20.0  # a cross-entropy above this is cut off: a small object would drown all others
NEAR_RATIO = 0.6  # of the K cells, at most this part is around the object if there are enough others


@dataclass
class Cells:
    """The cells that are chosen for each prompt.

    index int64 `[B, Q, K]`, row by row in the grid; weight float32 `[B, Q, K]`, one over the chance of being chosen.
    """

    index: torch.Tensor
    weight: torch.Tensor

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """`[B, Q or 1, N, C]` -> `[B, Q, K, C]`."""
        values = values.expand(*self.index.shape[:2], *values.shape[2:])
        return values.take_along_dim(self.index.unsqueeze(-1), dim=2)


def choose_cells(occupied: torch.Tensor, count: int, noise: torch.Tensor) -> Cells:
    """
    Args:
        occupied: bool `[B, Q, h, w]`, the cells that an object touches.
        count: K; at most N are chosen.
        noise: uniform random numbers `[B, Q, N]`, which decide.

    Returns:
        K cells a prompt: of the object's box with a border of one cell as many as there are, up to `NEAR_RATIO` of K,
        and the others from the rest, both without replacement. A box with few cells outside gives more of its own.
    """
    batch_size, num_prompts, height, width = occupied.shape
    count = min(count, height * width)
    grown = F.max_pool2d(occupied.flatten(0, 1).float().unsqueeze(1), 3, stride=1, padding=1)[:, 0] > 0
    rows, columns = (_between_first_and_last(grown.any(dim)) for dim in (2, 1))
    near = (rows[:, :, None] & columns[:, None, :]).flatten(1).unflatten(0, (batch_size, num_prompts))
    num_near = near.sum(-1, keepdim=True)
    num_far = near.shape[-1] - num_near
    near_chosen = torch.minimum(num_near, torch.clamp(count - num_far, min=int(NEAR_RATIO * count)))
    far_chosen = count - near_chosen
    order = (noise + ~near).argsort(dim=-1)  # the near ones in a random order, then the others in one
    place = torch.arange(count, device=occupied.device).expand(batch_size, num_prompts, -1)
    is_near = place < near_chosen
    index = order.gather(-1, torch.where(is_near, place, place - near_chosen + num_near))
    weight = torch.where(is_near, num_near / near_chosen.clamp(min=1), num_far / far_chosen.clamp(min=1))
    return Cells(index, weight)


def noise_of_cells(noise: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Uniform random numbers `[B, Q, N]` for `choose_cells`, from those of each prompt `[B, Q, K]` alone: they are the
    same however the masks are gathered in batches."""
    # Bits of float32 uniform numbers; sums of multiples of different odd numbers modulo 2^31 are a seed.
    integers = (noise.double().cpu() * 2**24).long()
    factors = 2 * torch.arange(noise.shape[-1]) ** 2 + 40503
    seeds = (integers * factors).sum(-1) % 2**31
    rows = [
        torch.rand(grid_size[0] * grid_size[1], generator=torch.Generator().manual_seed(seed))
        for seed in seeds.flatten().tolist()
    ]
    return torch.stack(rows).unflatten(0, noise.shape[:2]).to(noise.device)


def _between_first_and_last(occupied: torch.Tensor) -> torch.Tensor:
    """bool `[..., L]`: from the first true one to the last."""
    return (occupied.cumsum(-1) > 0) & (occupied.flip(-1).cumsum(-1).flip(-1) > 0)


def split_into_cells(masks: torch.Tensor, grid_size: tuple[int, int], doublings: int = 2) -> torch.Tensor:
    """Masks `[..., 2^doublings h, 2^doublings w]` -> their pixels by cell `[..., N, R]`."""
    lead = masks.shape[:-2]
    parts = masks.reshape(-1, grid_size[0], *doublings * [2], grid_size[1], *doublings * [2])
    rows, columns = range(2, 2 + doublings), range(3 + doublings, 3 + 2 * doublings)
    inner = [dim for pair in zip(rows, columns, strict=True) for dim in pair]
    return parts.permute(0, 1, 2 + doublings, *inner).reshape(*lead, grid_size[0] * grid_size[1], 4**doublings)


def decode_cells(
    decoder: EfficientSamMaskDecoder,
    image: torch.Tensor,
    image_positions: torch.Tensor,
    prompt_tokens: torch.Tensor,
    counts: torch.Tensor,
    cells: Cells,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The decoder's forward on the chosen cells, with its own modules.

    Args:
        image: what the decoder's `embed_image` returns, `[B, 1 or Q, N, C]`.
        image_positions, prompt_tokens, counts: what the decoder itself takes, `[N, C]`, `[B, Q, T, C]` and
            `[B, Q, T]`.
        cells: of each prompt.

    Returns:
        mask logits `[B, Q, M, K, R]` of all masks, the single one first, and IoU scores `[B, Q, M]`.
    """
    tokens, log_counts = decoder.embed_tokens(prompt_tokens, counts)
    token_positions, token_mask = tokens, log_counts.unsqueeze(2)
    cell_mask = cells.weight.to(image).log().unsqueeze(2)  # in a softmax, a cell's weight is a summand of its logit
    positions = image_positions[None, None]
    for number, layer in enumerate(decoder.layers):
        if number == 0:
            chosen, chosen_positions = cells.gather(image), cells.gather(positions.expand(len(image), -1, -1, -1))
            read, read_positions, read_mask = image, positions, None
        else:
            read, read_positions, read_mask = chosen, chosen_positions, cell_mask
        tokens = _update_tokens(layer, tokens, token_positions, token_mask, read, read_positions, read_mask)
        query, key = chosen + chosen_positions, tokens + token_positions
        update, _ = layer.image_to_token_attention(query, key, tokens, token_mask)
        chosen = layer.layernorm4(chosen + update)
    wanted = 1 + decoder.mask_tokens.num_embeddings
    query = (tokens + token_positions)[:, :, :wanted]
    attention = decoder.final_token_to_image_attention
    update, _ = attention(query, chosen + chosen_positions, chosen, cell_mask)
    tokens = decoder.final_layernorm(tokens[:, :, :wanted] + update)
    filters = torch.stack([net(tokens[:, :, 1 + i]) for i, net in enumerate(decoder.hypernetworks)], dim=2)
    return upscale_cells(decoder.upscaling, chosen, filters, cells.weight), decoder.iou_head(tokens[:, :, 0])


def _update_tokens(
    layer: EfficientSamTwoWayLayer, tokens, token_positions, token_mask, image, image_positions, image_mask
) -> torch.Tensor:
    """The token side of a two-way layer, `[B, Q, T, C]`, with a weight for each cell."""
    tokens = tokens if layer.first else tokens + token_positions
    update, _ = layer.self_attention(tokens, tokens, tokens, token_mask)
    tokens = layer.layernorm1(tokens + update)
    query, key = tokens + token_positions, image + image_positions
    update, _ = layer.token_to_image_attention(query, key, image, image_mask)
    tokens = layer.layernorm2(tokens + update)
    return layer.layernorm3(tokens + layer.mlp(tokens))


def upscale_cells(
    upscaling: EfficientSamMaskUpscaling, image: torch.Tensor, filters: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Cells `[B, Q, K, C]`, filters `[B, Q, M, C_last]` and weights `[B, Q, K]` -> mask logits `[B, Q, M, K, R]`."""
    prompts, count = image.shape[:2], image.shape[2]
    image, weight = image.flatten(0, 1), weight.flatten(0, 1).to(image)
    for conv, norm in zip(upscaling.convs[:-1], upscaling.norms, strict=True):
        image, weight = double_cells(image, *doubling_layer(conv)), weight.repeat_interleave(4, dim=1)
        image = upscaling.activation(_normalize(norm, image, weight.unsqueeze(-1)))
    image = upscaling.activation(double_cells(image, *doubling_layer(upscaling.convs[-1])))
    return (filters.flatten(0, 1) @ image.transpose(1, 2)).unflatten(2, (count, -1)).unflatten(0, prompts)


def _normalize(norm: nn.GroupNorm, image: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The upscaling's normalisation of `[P, L, C]` with weighted `[P, L, 1]` mean and variance."""
    total = weight.sum((1, 2), keepdim=True) * image.shape[-1]
    mean = (image * weight).sum((1, 2), keepdim=True) / total
    variance = ((image - mean).square() * weight).sum((1, 2), keepdim=True) / total
    return (image - mean) * torch.rsqrt(variance + norm.eps) * norm.weight + norm.bias


def cell_losses(
    logits: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, areas: torch.Tensor, bce_threshold: float = 0.5
) -> dict[str, torch.Tensor]:
    """
    The losses of masks that are known on some cells.

    Args:
        logits: `[..., M, K, R]`.
        targets: `[..., K, R]`, the part of each pixel that is the object, in [0, 1].
        weight: `[..., K]`.
        areas: `[...]`, the sum of the whole target: known, so it need not be estimated.
        bce_threshold: see `MaskLossConfig`.

    Returns:
        each `[..., M]`: `bce`, the cross-entropy summed over pixels, by twice the object's area: as much for the
        object as for as large a part of its surroundings, or more where these are wrong; `dice`; and without
        gradient `iou`, with the target thresholded at a half.
    """
    weight, targets = weight[..., None, :, None], targets.unsqueeze(-3).expand_as(logits)
    areas = areas.unsqueeze(-1).clamp(min=1)
    entropy = F.binary_cross_entropy_with_logits(logits + threshold_shift(bce_threshold), targets, reduction="none")
    probability = logits.sigmoid()

    def total(values: torch.Tensor) -> torch.Tensor:
        return (values * weight).sum((-2, -1))

    dice = 1 - (2 * total(probability * targets) + 1) / (total(probability) + areas + 1)
    with torch.no_grad():
        inside, target = logits > 0, targets > 0.5
        iou = total(inside & target) / total(inside | target).clamp(min=1e-6)
    return {"bce": total(entropy) / (2 * areas), "dice": dice, "iou": iou}


def total_cell_loss(
    parts: dict[str, torch.Tensor],
    scores: torch.Tensor,
    is_box: torch.Tensor,
    valid: torch.Tensor,
    num_prompts: torch.Tensor | float | None = None,
    weights: MaskLossConfig = MaskLossConfig(),  # noqa: B008 (it is frozen)
) -> dict[str, torch.Tensor]:
    """
    The loss of a round from the losses of its masks.

    For clicks, which can mean several things, the least of the candidates' losses counts, for boxes their mean; beside
    it the single mask's, and the squared error of all predicted IoUs.

    Args:
        parts: of `cell_losses`, `[B, Q, 1 + candidates]` each, the single mask first.
        scores: predicted IoUs, of the same shape.
        is_box, valid: `[B, Q]` bool; prompts that are not valid are padding.
        num_prompts: what the sum is divided by, as in `MaskLoss`.
        weights: of dice and of the predicted IoUs' error as they are; a quarter of the cross-entropy's, because here
            it is divided by twice the object's area.

    Returns:
        `loss`, and without gradient its parts under the names of `MaskLoss`, of which `focal` is 0.
    """
    divisor = valid.sum().clamp(min=1) if num_prompts is None else num_prompts

    def mean(values: torch.Tensor) -> torch.Tensor:
        return torch.where(valid, values, 0).sum() / divisor

    bce_weight = weights.balanced_bce_weight / 4
    each = bce_weight * parts["bce"].clamp(max=BCE_LIMIT) + weights.dice_weight * parts["dice"]
    single, candidates = each[..., 0], each[..., 1:]
    masks = torch.where(is_box, candidates.mean(-1), candidates.amin(-1)) + SINGLE_WEIGHT * single
    iou = mean((scores - parts["iou"]).square().mean(-1))
    means = {name: mean(parts[name].mean(-1)).detach() for name in ("dice", "bce")}
    return {
        "loss": mean(masks) + weights.iou_weight * iou,
        "focal": torch.zeros_like(iou),
        **means,
        "iou": iou.detach(),
    }
