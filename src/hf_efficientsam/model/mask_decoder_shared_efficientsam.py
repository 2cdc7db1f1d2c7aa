"""The mask decoder for many prompts of one image: the numbers of `FastMaskDecoder`, up to rounding, with less work.

A two-way layer adds to each cell of a prompt's image the values of the prompt's tokens, weighted by attention, and
normalises the cell: LayerNorm subtracts the mean of its channels, divides by their deviation, and scales and shifts by
channel. All of this is linear but for one number a cell. So after every layer the image of a prompt is

    image[n] = scale[n] * base[n] + shift + sum over r of weights[r, n] * vectors[r]

where `base` and `shift` are the same for all prompts. A prompt's own are the scale, and R rows: one for each head and
token of each layer so far, and in every layer but the first one for what it adds to all cells alike: the bias of its
output, and the shift of the layer before.

Projections of the image are those of `base`, which are computed once, and those of the vectors; the variance that
LayerNorm needs follows from products of the same; and the first doubling of the upscaling is one more projection. A
prompt's image `[N, C]` is never written down. The vectors are made of the tokens' values by maps that are the same for
all prompts, so their projections are too.

Shape letters: P prompts, T tokens, N cells, C channels, H heads, D channels of a head, R rows, M masks.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .mask_decoder_fast_efficientsam import (
    attend_to_shared_image,
    doubling_layer,
    project_shared_image,
    upscale_doubled,
)
from .onednn_efficientsam import linear

LEAST_PROMPTS = 8  # with fewer, computing what they share costs more than it saves
PROMPTS_AT_ONCE = 16  # whose tokens go through a layer together; their images follow one by one, to stay in the cache


def can_share_image(image: torch.Tensor) -> bool:
    """
    Whether `SharedImageDecoder` may take the place of a `FastMaskDecoder` for `image` `[B, 1 or Q, N, C]`, and is the
    faster one for many prompts: on a CPU, without gradients, and without masks as prompts. Compiled code would unroll
    the loop over the prompts.
    """
    return (
        image.device.type == "cpu"
        and image.shape[1] == 1
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


class SharedImage(NamedTuple):
    """
    What all prompts' images have in common after a layer.

    Attributes:
        base, shift: `[N, C]` and `[C]`.
        maps: what makes vectors `[T, C]` of values `[T, D]`, for each head of each block of rows: `[H, D, C]`. A layer
            adds the block of its attention and, but for the first layer, one row whose value is one.
    """

    base: torch.Tensor
    shift: torch.Tensor
    maps: list[torch.Tensor]


class Projection(NamedTuple):
    """
    A projection of prompts' images to heads.

    Attributes:
        base: projected `base`, `[H, D, N]`.
        offset: the projected shift and positions, and the bias, `[H, D, N or 1]`.
        maps: what makes projected vectors of values, `[H, D, H * D]` each.
    """

    base: torch.Tensor
    offset: torch.Tensor
    maps: list[torch.Tensor]


class SharedLayer(NamedTuple):
    """
    What of a two-way layer is the same for all prompts.

    Attributes:
        key, value, query: projections of the image that the layer is given; none of the first layer's.
        maps: of all blocks of rows, the layer's own included, without the mean over the channels.
        products: what makes `vectors @ base.T / C` `[T, N]` of values, for each head of each block: `[H, D, N]`. The
            mean over the channels is subtracted from `base`.
        energy: `[N]`, the mean over the channels of that `base` squared.
    """

    key: Projection | None
    value: Projection | None
    query: Projection | None
    maps: list[torch.Tensor]
    products: list[torch.Tensor]
    energy: torch.Tensor


class PromptImage(NamedTuple):
    """
    A prompt's own in its image.

    Attributes:
        scale, weights: `[N]` and `[R, N]`, as above.
        by_cell: the weights in the other order, `[N, R]`.
    """

    scale: torch.Tensor
    weights: torch.Tensor
    by_cell: torch.Tensor


def by_head(attention: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """`[..., L, H * D] -> [..., H, L, D]`"""
    return states.unflatten(-1, (-1, attention.head_dim)).transpose(-3, -2)


def project(
    attention: nn.Module, layer: nn.Linear, image: SharedImage, positions: torch.Tensor | int = 0
) -> Projection:
    """`layer` is one of `attention`, `positions` is `[N, C]`, or 0 for none."""

    def heads(states: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(states, layer.weight, bias).T.contiguous().unflatten(0, (-1, attention.head_dim))

    offset = heads(image.shift[None] + positions, layer.bias)
    return Projection(heads(image.base), offset, [one @ layer.weight.T for one in image.maps])


def centred(vectors: torch.Tensor) -> torch.Tensor:
    """Without the mean over the channels, the last axis."""
    return vectors - vectors.mean(dim=-1, keepdim=True)


def make_rows(maps: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    """All blocks' vectors, or projected vectors `[P, R, .]`, of their values `[P, H, T, D]`."""
    rows = [torch.einsum("phtd,hdc->phtc", block, one).flatten(1, 2) for block, one in zip(values, maps, strict=True)]
    return torch.cat(rows, dim=1)


def attention_logits(
    projection: Projection, queries: torch.Tensor, images: list[PromptImage], values: list[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Products of `queries` `[P, H, T, D]` with the projected cells of each prompt's image, `[H, T, N]` each."""
    rows = make_rows(projection.maps, values).unflatten(-1, (queries.shape[1], -1))
    coefficients = torch.einsum("phtd,prhd->phtr", queries, rows).flatten(1, 2)
    for query, own, image in zip(queries, coefficients, images, strict=True):
        keys = torch.addcmul(projection.offset, projection.base, image.scale)
        yield (query @ keys).add_(linear(own, image.by_cell).unflatten(0, query.shape[:2]))


def attend_to_images(
    attention: nn.Module,
    key: Projection,
    value: Projection,
    tokens: torch.Tensor,
    images: list[PromptImage],
    values: list[torch.Tensor],
) -> torch.Tensor:
    """Tokens `[P, T, C]` attend each to its prompt's image -> `[P, T, C]`."""
    queries = by_head(attention, attention.scaling * attention.q_proj(tokens))
    of_base, of_rows = [], []
    for image, logits in zip(images, attention_logits(key, queries, images, values), strict=True):
        weights = logits.softmax(dim=-1)
        of_rows.append(linear(weights.flatten(0, 1), image.weights))
        of_base.append(weights.mul_(image.scale) @ value.base.mT)
    rows = make_rows(value.maps, values).unflatten(-1, (queries.shape[1], -1))
    sums = torch.einsum("phtr,prhd->phtd", torch.stack(of_rows).unflatten(1, queries.shape[1:3]), rows)
    return attention.o_proj((sums + torch.stack(of_base) + value.offset.mT).transpose(1, 2).flatten(2))


def update_image(
    shared: SharedLayer,
    image: PromptImage | None,
    attention: torch.Tensor,
    values: list[torch.Tensor],
    gram: torch.Tensor,
    eps: float,
) -> PromptImage:
    """
    A prompt's image plus its attention to the tokens, normalised.

    Args:
        attention: weights `[H, T, N]`, which add up to one over the tokens.
        values: of all blocks of rows, `[H, T, D]` each.
        gram: `vectors @ vectors.T / C` without the vectors' means, `[R, R]`.
    """
    weights, scale = attention.flatten(0, 1), torch.ones_like(shared.energy)
    if image is not None:
        weights, scale = torch.cat([image.weights, scale[None], weights]), image.scale
    by_cell = weights.T.contiguous()
    # Mean over the channels of the squares of scale * base + weights.T @ vectors, multiplied out.
    with_base = torch.cat([(block @ one).flatten(0, 1) for block, one in zip(values, shared.products, strict=True)])
    products = linear(gram, by_cell).addcmul_(with_base, scale, value=2).mul_(weights)
    variance = torch.addcmul(products.sum(dim=0), scale.square(), shared.energy)
    scaling = (variance.clamp_(min=0) + eps).rsqrt_()
    return PromptImage(scale * scaling, weights * scaling, by_cell.mul_(scaling[:, None]))


class SharedImageDecoder:
    """
    Decodes prompts of one image with the parameters of an `EfficientSamMaskDecoder`.

    Args:
        decoder: the reference; `can_decode_fast` and `can_share_image` must allow it.
        image: `[N, C]`, what all prompts see before the first layer.
        positions: `[N, C]`.
    """

    def __init__(self, decoder: nn.Module, image: torch.Tensor, positions: torch.Tensor):
        self.decoder = decoder
        self.layers: list[SharedLayer] = []
        image = image.contiguous()
        self.first = project_shared_image(decoder.layers[0], image[None, None], positions)
        image = SharedImage(image, torch.zeros_like(image[0]), [])
        for layer in decoder.layers:
            to_tokens, to_image = layer.token_to_image_attention, layer.image_to_token_attention
            key = value = query = None
            if not layer.first:
                key = project(to_tokens, to_tokens.k_proj, image, positions)
                value = project(to_tokens, to_tokens.v_proj, image)
                query = project(to_image, to_image.q_proj, image, positions)
            output = to_image.o_proj.weight.T.unflatten(0, (-1, to_image.head_dim))
            added = to_image.o_proj.bias + image.shift
            if layer.first:
                base, maps = centred(image.base + added), [output]
            else:
                base, maps = centred(image.base), [*image.maps, added[None, None], output]
            maps = [centred(one) for one in maps]
            products = [linear(one.flatten(0, 1), base).unflatten(0, one.shape[:2]) / base.shape[1] for one in maps]
            self.layers.append(SharedLayer(key, value, query, maps, products, base.square().mean(dim=1)))
            norm = layer.layernorm4
            image = SharedImage(base * norm.weight, norm.bias, [one * norm.weight for one in maps])
        last, conv = decoder.final_token_to_image_attention, decoder.upscaling.convs[0]
        self.final_key = project(last, last.k_proj, image, positions)
        self.final_value = project(last, last.v_proj, image)
        weight, bias = doubling_layer(conv)
        self.doubled = linear(image.base, weight)
        self.doubled_offset = F.linear(image.shift, weight, bias)
        self.doubled_maps = [one @ weight.T for one in image.maps]

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
            outputs, images, values = self.attend(one, log_n)
            outputs = outputs[:, wanted]
            first = outputs if pred_iou_thresh is None else outputs[:, :1]
            output_tokens = self.attend_last(first, images, values)
            all_scores = self.decoder.predict_iou(output_tokens[None], multimask_output)[0]
            keep = torch.ones_like(all_scores, dtype=torch.bool)
            if pred_iou_thresh is not None:
                keep = all_scores > pred_iou_thresh
            kept.append(keep)
            scores.append(all_scores[keep])
            prompts = keep.any(dim=1).nonzero()[:, 0].tolist()
            if not prompts:
                continue
            images, values = [images[i] for i in prompts], [block[prompts] for block in values]
            output_tokens = output_tokens[prompts]
            if pred_iou_thresh is not None:
                others = self.attend_last(outputs[prompts, 1:], images, values)
                output_tokens = torch.cat([output_tokens, others], dim=1)
            filters = self.decoder.predict_filters(output_tokens[None], multimask_output)[0]
            filters = filters[keep[prompts]].split(keep[prompts].sum(dim=1).tolist())
            rows = make_rows(self.doubled_maps, values)
            masks += [
                upscale_doubled(self.decoder.upscaling, self.double(image, own_rows), own[None], grid_size)[0]
                for image, own_rows, own in zip(images, rows, filters, strict=True)
            ]
        height, width = (side * 2 ** len(self.decoder.upscaling.convs) for side in grid_size)
        masks = torch.cat(masks) if masks else tokens.new_empty(0, height, width)
        return torch.cat(kept), torch.cat(scores), masks

    def attend(
        self, tokens: torch.Tensor, log_multiplicity: torch.Tensor
    ) -> tuple[torch.Tensor, list[PromptImage], list[torch.Tensor]]:
        """
        The two-way layers.

        Returns:
            tokens with what the last attention adds as their positions `[P, T, 2, C]`; the prompts' images; and the
            values `[P, H, T, D]` that the maps of the last projections are for.
        """
        positions, values = tokens, []
        images = len(tokens) * [None]
        for layer, shared in zip(self.decoder.layers, self.layers, strict=True):
            tokens = tokens if layer.first else tokens + positions
            update, _ = layer.self_attention(*3 * [tokens.unsqueeze(1)], log_multiplicity[:, None, None])
            tokens = layer.layernorm1(tokens + update.squeeze(1))
            query, attention = tokens + positions, layer.token_to_image_attention
            if layer.first:
                update = attend_to_shared_image(attention, query, self.first)
            else:
                update = attend_to_images(attention, shared.key, shared.value, query, images, values)
            tokens = layer.layernorm2(tokens + update)
            tokens = layer.layernorm3(tokens + layer.mlp(tokens))

            attention = layer.image_to_token_attention
            keys = by_head(attention, attention.scaling * attention.k_proj(tokens + positions))
            if layer.first:
                logits = (key @ self.first.query[0].mT for key in keys)
            else:
                logits = attention_logits(shared.query, keys, images, values)
            if not layer.first:
                values = [*values, tokens.new_ones(len(tokens), 1, 1, 1)]
            values = [*values, by_head(attention, attention.v_proj(tokens))]
            vectors = make_rows(shared.maps, values)
            grams = vectors @ vectors.mT / vectors.shape[-1]
            images = [
                update_image(shared, image, one.add_(log_n[:, None]).softmax(dim=1), own, gram, layer.layernorm4.eps)
                for image, one, log_n, gram, *own in zip(images, logits, log_multiplicity, grams, *values, strict=True)
            ]
        return torch.stack([tokens, positions], dim=2), images, values

    def attend_last(self, tokens: torch.Tensor, images: list[PromptImage], values: list[torch.Tensor]) -> torch.Tensor:
        """Tokens `[P, T, 2, C]`, as `attend` returns them, look at their images once more -> `[P, T, C]`."""
        tokens, positions = tokens.unbind(dim=2)
        attention = self.decoder.final_token_to_image_attention
        update = attend_to_images(attention, self.final_key, self.final_value, tokens + positions, images, values)
        return self.decoder.final_layernorm(tokens + update)

    def double(self, image: PromptImage, rows: torch.Tensor) -> torch.Tensor:
        """
        A prompt's image after the first doubling of the upscaling, `[1, 4 N, C_next]`, where its vectors have become
        `rows` `[R, 4 C_next]`.
        """
        doubled = linear(image.by_cell, rows.T)
        doubled += torch.addcmul(self.doubled_offset, self.doubled, image.scale[:, None])
        return doubled.unflatten(-1, (4, -1)).flatten(0, 1)[None]


__all__ = ["LEAST_PROMPTS", "SharedImageDecoder", "can_share_image"]
