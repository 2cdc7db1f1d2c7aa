"""The mask decoder for many prompts of one image: the numbers of `FastMaskDecoder`, up to rounding, with less work.

A two-way layer adds to each cell of a prompt's image the values of the prompt's tokens, weighted by attention, and
normalises the cell: LayerNorm subtracts the mean of its channels, divides by their deviation, and scales and shifts by
channel. All of this is linear but for one number a cell. So in every layer the image of a prompt is

    image[n] = scale[n] * base[n] + sum over r of weights[r, n] * vectors[r]

where `base` is the same for all prompts. A prompt's own are the scale, and R rows: one for each head and token of each
layer so far, one for each shift. Its projections are those of `base`, which are computed once, and those of the R
vectors; the variance that LayerNorm needs follows from products of the same; and the first doubling of the upscaling
is one more projection. A prompt's image `[N, C]` is never written down.

Shape letters: P prompts, T tokens, N cells, C channels, H heads, D channels of a head, R rows, M masks.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .mask_decoder_fast_efficientsam import (
    can_decode_fast,
    doubling_weight,
    upscale_doubled,
    weight_by_head,
)

LEAST_PROMPTS = 8  # with fewer, computing what they share costs more than it saves
PROMPTS_AT_ONCE = 8  # whose tokens go through a layer together; their images follow one by one, to stay in the cache


def can_share_image(decoder: nn.Module, image: torch.Tensor) -> bool:
    """
    Whether `SharedImageDecoder` may decode `image` `[B, 1 or Q, N, C]`, and is the faster one for many prompts: on a
    CPU, without gradients, and without masks as prompts. Compiled code would unroll the loop over the prompts.
    """
    return (
        can_decode_fast(decoder, image)
        and image.device.type == "cpu"
        and image.shape[1] == 1
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


class Projection(NamedTuple):
    """
    A projection of prompts' images to heads.

    Attributes:
        weight: `[H * D, C]`.
        base: projected `base`, `[H, D, N]`.
        offset: what is added for all prompts, the projected positions and the bias, `[H, D, N]`; of a projection
            without positions the bias, `[H, 1, D]`.
    """

    weight: torch.Tensor
    base: torch.Tensor
    offset: torch.Tensor


class SharedLayer(NamedTuple):
    """
    What of a two-way layer is the same for all prompts.

    Attributes:
        key, value, query: projections of the image that the layer is given.
        output: makes vectors `[H, T, C]` of the tokens' values `[H, T, D + 1]`, whose last channel is one: the output
            projection with its bias.
        products: for each block of rows of the image that the layer makes, what makes `vectors @ base.T` `[H, T, N]`
            of its values: `[H, D, N]`. The mean over the channels is subtracted from `base`.
        energy: `[N]`, squares of that `base`, summed over channels.
    """

    key: Projection
    value: Projection
    query: Projection
    output: torch.Tensor
    products: list[torch.Tensor]
    energy: torch.Tensor


class PromptImage(NamedTuple):
    """
    The image as one prompt sees it.

    Attributes:
        scale, weights, vectors: `[N]`, `[R, N]`, `[R, C]`, as above.
        values: the rows by blocks, one of each layer's attention and one of its shift, `[H, T, D]` each: the vectors
            were made of them by maps that are the same for all prompts.
    """

    scale: torch.Tensor
    weights: torch.Tensor
    vectors: torch.Tensor
    values: list[torch.Tensor]


def by_head(attention: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """`[..., L, H * D] -> [..., H, L, D]`"""
    return states.unflatten(-1, (-1, attention.head_dim)).transpose(-3, -2)


def project(
    attention: nn.Module, linear: nn.Linear, base: torch.Tensor, positions: torch.Tensor | None = None
) -> Projection:
    """`base` and `positions` are `[N, C]`."""
    if positions is None:
        offset = by_head(attention, linear.bias[None])
    else:
        offset = by_head(attention, linear(positions)).mT.contiguous()
    return Projection(linear.weight, weight_by_head(attention, linear) @ base.T, offset)


def centred(vectors: torch.Tensor) -> torch.Tensor:
    """Without the mean over the channels, the last axis."""
    return vectors - vectors.mean(dim=-1, keepdim=True)


def attention_logits(projection: Projection, queries: torch.Tensor, image: PromptImage) -> torch.Tensor:
    """Products of `queries` `[H, T, D]` with the projected cells of a prompt's image, `[H, T, N]`."""
    keys = torch.addcmul(projection.offset, projection.base, image.scale)
    vectors = (image.vectors @ projection.weight.T).unflatten(-1, keys.shape[:2]).permute(1, 2, 0)  # H, D, R
    logits = (queries @ keys).flatten(0, 1).addmm_((queries @ vectors).flatten(0, 1), image.weights)
    return logits.unflatten(0, queries.shape[:2])


def weighted_sums(projection: Projection, weights: torch.Tensor, image: PromptImage) -> torch.Tensor:
    """Projected cells of a prompt's image, weighted by `weights` `[H, T, N]` that add up to one: `[H, T, D]`."""
    sums = (weights.flatten(0, 1) @ image.weights.T @ image.vectors).unflatten(0, weights.shape[:2])
    sums = sums @ projection.weight.unflatten(0, projection.base.shape[:2]).mT
    return sums + (weights * image.scale) @ projection.base.mT + projection.offset


def attend_to_images(
    attention: nn.Module, key: Projection, value: Projection, tokens: torch.Tensor, images: list[PromptImage]
) -> torch.Tensor:
    """Tokens `[P, T, C]` attend each to its prompt's image -> `[P, T, C]`."""
    queries = by_head(attention, attention.scaling * attention.q_proj(tokens))
    sums = [
        weighted_sums(value, attention_logits(key, query, image).softmax(-1), image)
        for query, image in zip(queries, images, strict=True)
    ]
    return attention.o_proj(torch.stack(sums).transpose(1, 2).flatten(2))


def update_image(
    norm: nn.LayerNorm, shared: SharedLayer, image: PromptImage, attention: torch.Tensor, values: torch.Tensor
) -> PromptImage:
    """
    A prompt's image plus its attention to the tokens, normalised.

    Args:
        attention: weights `[H, T, N]`, which add up to one over the tokens.
        values: of the tokens, `[H, T, D]`.
    """
    values = F.pad(values, (0, 1), value=1.0)
    vectors = centred(torch.cat([image.vectors, (values @ shared.output).flatten(0, 1)]))
    weights = torch.cat([image.weights, attention.flatten(0, 1)])
    blocks = [*image.values, values]
    # Sum over channels of the squares of scale * base + weights.T @ vectors, multiplied out.
    with_base = torch.cat([(block @ map).flatten(0, 1) for block, map in zip(blocks, shared.products, strict=True)])
    products = with_base.mul_(image.scale).addmm_(vectors @ vectors.T, weights, beta=2)
    squares = torch.addcmul((products * weights).sum(dim=0), image.scale.square(), shared.energy)
    scale = (squares.clamp_(min=0) / vectors.shape[1] + norm.eps).rsqrt_()
    return PromptImage(
        image.scale * scale,
        torch.cat([weights * scale, torch.ones_like(scale)[None]]),
        torch.cat([vectors * norm.weight, norm.bias[None]]),
        [*blocks, values.new_ones(1, 1, 1)],
    )


class SharedImageDecoder:
    """
    Decodes prompts of one image with the parameters of an `EfficientSamMaskDecoder`.

    Args:
        decoder: the reference; `can_share_image` must allow it.
        image: `[N, C]`, what all prompts see before the first layer.
        positions: `[N, C]`.
    """

    def __init__(self, decoder: nn.Module, image: torch.Tensor, positions: torch.Tensor):
        self.decoder = decoder
        self.layers: list[SharedLayer] = []
        base, maps = image, []  # and the maps from the blocks' values to their vectors, [H, D, C]
        for layer in decoder.layers:
            to_tokens, to_image = layer.token_to_image_attention, layer.image_to_token_attention
            key = project(to_tokens, to_tokens.k_proj, base, positions)
            value = project(to_tokens, to_tokens.v_proj, base)
            query = project(to_image, to_image.q_proj, base, positions)
            output = to_image.o_proj.weight.T.unflatten(0, (-1, to_image.head_dim))
            bias = to_image.o_proj.bias.expand(len(output), 1, -1) / len(output)  # weights of each head add up to one
            output = torch.cat([output, bias], dim=1)
            base, maps = centred(base), [centred(one) for one in (*maps, output)]
            energy = base.square().sum(dim=1)
            self.layers.append(SharedLayer(key, value, query, output, [one @ base.T for one in maps], energy))
            norm = layer.layernorm4
            base, maps = base * norm.weight, [*(one * norm.weight for one in maps), norm.bias[None, None]]
        last = decoder.final_token_to_image_attention
        self.final_key, self.final_value = (
            project(last, last.k_proj, base, positions),
            project(last, last.v_proj, base),
        )
        self.doubled = F.linear(base, doubling_weight(decoder.upscaling.convs[0]))

    def predict(
        self,
        tokens: torch.Tensor,
        log_multiplicity: torch.Tensor,
        grid_size: tuple[int, int],
        multimask_output: bool | None,
        pred_iou_thresh: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The masks whose predicted IoU is above a threshold, or all. Of the others nothing is upscaled, and the tokens
        of a prompt without one do not look at its image for the last time.

        Args:
            tokens, log_multiplicity: `[Q, T, C]` and `[Q, T]`, output tokens included.
            grid_size: `(h, w)` with h * w = N.
            multimask_output: as in the reference.

        Returns:
            which are kept `[Q, M]`, the K scores in order, and the K masks `[K, 4h, 4w]`.
        """
        wanted = self.decoder.output_token_indices(multimask_output)
        kept, scores, masks = [], [], []
        for one, log_n in zip(tokens.split(PROMPTS_AT_ONCE), log_multiplicity.split(PROMPTS_AT_ONCE), strict=True):
            outputs, images = self.attend(one, log_n)
            outputs = outputs[:, wanted]
            iou_tokens = self.attend_last(outputs[:, :1], images)
            all_scores = self.decoder.predict_iou(iou_tokens[None], multimask_output)[0]
            keep = torch.ones_like(all_scores, dtype=torch.bool)
            if pred_iou_thresh is not None:
                keep = all_scores > pred_iou_thresh
            kept.append(keep)
            scores.append(all_scores[keep])
            prompts = keep.any(dim=1).nonzero()[:, 0].tolist()
            if not prompts:
                continue
            images = [images[i] for i in prompts]
            mask_tokens = torch.cat([iou_tokens[prompts], self.attend_last(outputs[prompts, 1:], images)], dim=1)
            filters = self.decoder.predict_filters(mask_tokens[None], multimask_output)[0]
            masks += [
                upscale_doubled(self.decoder.upscaling, self.double(image), own[None, which], grid_size)[0]
                for image, own, which in zip(images, filters, keep[prompts], strict=True)
            ]
        height, width = (side * 2 ** len(self.decoder.upscaling.convs) for side in grid_size)
        masks = torch.cat(masks) if masks else tokens.new_empty(0, height, width)
        return torch.cat(kept), torch.cat(scores), masks

    def attend(self, tokens: torch.Tensor, log_multiplicity: torch.Tensor) -> tuple[torch.Tensor, list[PromptImage]]:
        """The two-way layers: tokens `[P, T, C]`, with what the last attention adds as their positions, and images."""
        num_cells, channels = len(self.doubled), tokens.shape[-1]
        empty = (tokens.new_ones(num_cells), tokens.new_empty(0, num_cells), tokens.new_empty(0, channels), [])
        positions, images = tokens, [PromptImage(*empty)] * len(tokens)
        for layer, shared in zip(self.decoder.layers, self.layers, strict=True):
            tokens = tokens if layer.first else tokens + positions
            update, _ = layer.self_attention(*3 * [tokens.unsqueeze(1)], log_multiplicity[:, None, None])
            tokens = layer.layernorm1(tokens + update.squeeze(1))
            attention = layer.token_to_image_attention
            update = attend_to_images(attention, shared.key, shared.value, tokens + positions, images)
            tokens = layer.layernorm2(tokens + update)
            tokens = layer.layernorm3(tokens + layer.mlp(tokens))

            attention = layer.image_to_token_attention
            keys = by_head(attention, attention.scaling * attention.k_proj(tokens + positions))
            values = by_head(attention, attention.v_proj(tokens))
            images = [
                update_image(
                    layer.layernorm4,
                    shared,
                    image,
                    attention_logits(shared.query, key, image).add_(log_n[:, None]).softmax(dim=1),
                    value,
                )
                for image, key, value, log_n in zip(images, keys, values, log_multiplicity, strict=True)
            ]
        return torch.stack([tokens, positions], dim=2), images

    def attend_last(self, tokens: torch.Tensor, images: list[PromptImage]) -> torch.Tensor:
        """Tokens `[P, T, 2, C]`, as `attend` returns them, look at their images once more -> `[P, T, C]`."""
        tokens, positions = tokens.unbind(dim=2)
        attention = self.decoder.final_token_to_image_attention
        update = attend_to_images(attention, self.final_key, self.final_value, tokens + positions, images)
        return self.decoder.final_layernorm(tokens + update)

    def double(self, image: PromptImage) -> torch.Tensor:
        """A prompt's image after the first doubling of the upscaling, `[1, 4 N, C_next]`."""
        conv = self.decoder.upscaling.convs[0]
        doubled = torch.addcmul(conv.bias.repeat(4), self.doubled, image.scale[:, None])
        doubled.addmm_(image.weights.T, image.vectors @ doubling_weight(conv).T)
        return doubled.unflatten(-1, (4, -1)).flatten(0, 1)[None]


__all__ = ["LEAST_PROMPTS", "SharedImageDecoder", "can_share_image"]
