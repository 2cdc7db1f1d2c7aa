"""The mask decoder with less work: the numbers of `EfficientSamMaskDecoder`, up to rounding, on its parameters.

A prompt has few tokens and its image has thousands of cells, so whatever is computed once a cell costs most. Here

- the first layer's projections of the image are computed once for all prompts of an image (`SharedProjections`);
- in the later layers, where each prompt has an image of its own, the cells are not projected at all: for a cell x, a
  projection K x + b and a token q, (K x + b) . q = x . (K' q) + b . q, so the few tokens are projected by K' instead
  (`fold_projection`), and the weighted sum of the values V x is V times the weighted sum of the x;
- transposed convolutions are matrix products of single cells, and only the masks are laid out on the grid, at the end;
- prompts are decoded a few at a time, so that memory stays bounded and, on a CPU, a chunk stays in the cache.

`can_decode_fast` is the rule that says when this decoder takes the place of the reference.

Shape letters: B images, Q prompts an image, P = B * Q prompts, T tokens, N cells, C channels, D channels of a head,
M masks.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .onednn_efficientsam import EfficientSamLinear, linear, products, stack

CHUNK_ON_CPU = 2  # prompts; measured: more at once fall out of the cache
UPSCALED_NUMBERS = 2**17  # of the cells that are upscaled last at a time; measured: they become 1 MB


def can_decode_fast(decoder: nn.Module, image_embeddings: torch.Tensor, output_attentions: bool = False) -> bool:
    """
    Whether `FastMaskDecoder` may take the place of an `EfficientSamMaskDecoder`. All of this must hold:

    - The numbers are float32 or float64, without autocast: half precision stays with the attention functions, which
      sum in float32.
    - No activations are needed but those of backward: attentions are not recorded, gradient checkpointing is off.
    - The image is on a CPU or gradients are off. On a CPU this halves the time of a training step; on a GPU that is
      not measured.
    - Every layer whose weights are read is a plain one, see `is_plain`.
    """
    return (
        image_embeddings.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(image_embeddings.device.type)
        and not output_attentions
        and not any(layer.gradient_checkpointing and layer.training for layer in decoder.layers)
        and (image_embeddings.device.type == "cpu" or not torch.is_grad_enabled())
        and all(map(is_plain, layers_read(decoder)))
    )


def is_plain(module: nn.Module) -> bool:
    """
    Whether the weights of a layer are all there is to it: not replaced by an adapter or a quantised layer, and not
    offloaded by accelerate ("meta"), which puts them in place only while the forward of their module runs.
    """
    return type(module) in (EfficientSamLinear, nn.ConvTranspose2d, nn.GroupNorm) and not module.weight.is_meta


def layers_read(decoder: nn.Module) -> Iterator[nn.Module]:
    """The layers whose weights are read here in place of a call of their forward."""
    for layer in decoder.layers:
        yield from projections(layer.self_attention)
        yield from projections(layer.token_to_image_attention)
        yield from projections(layer.image_to_token_attention)
    yield from projections(decoder.final_token_to_image_attention)
    yield from decoder.upscaling.convs
    yield from decoder.upscaling.norms


def projections(attention: nn.Module) -> tuple[nn.Module, ...]:
    return attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj


# ------------------------------------------------------------------------------------------------------ attention


class SharedProjections(NamedTuple):
    """The first layer's projections of the image that all prompts share, `[B, heads, N, D]` each."""

    key: torch.Tensor
    value: torch.Tensor
    query: torch.Tensor


def project_shared_image(
    layer: nn.Module, image: torch.Tensor, image_positional_embeddings: torch.Tensor
) -> SharedProjections:
    """The image side of a two-way layer, once for all prompts of each `image` `[B, 1, N, C]`."""
    to_tokens, to_image = layer.token_to_image_attention, layer.image_to_token_attention
    positioned = image + image_positional_embeddings
    key, value, query = to_tokens.k_proj(positioned), to_tokens.v_proj(image), to_image.q_proj(positioned)
    return SharedProjections(*map(to_tokens.split_heads, (key, value, query)))


def weight_by_head(attention: nn.Module, linear: nn.Linear) -> torch.Tensor:
    """Weights of a projection to the heads, `[heads, D, C]`."""
    return linear.weight.unflatten(0, (-1, attention.head_dim))


def fold_projection(
    attention: nn.Module, tokens: torch.Tensor, linear: nn.Linear
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Projected tokens `[P, T, heads * D]`, folded through the projection of the cells that they meet: the vectors
    `[P, heads, T, C]` whose products with the cells themselves, plus the bias `[P, heads, T]`, are the attention
    logits.
    """
    tokens = tokens.unflatten(-1, (-1, attention.head_dim))
    bias = torch.einsum("pthd,hd->pht", tokens, linear.bias.unflatten(0, (-1, attention.head_dim)))
    return torch.einsum("pthd,hdc->phtc", tokens, weight_by_head(attention, linear)), bias


def attend_to_image(attention: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Tokens `[P, T, C]` attend to their image's keys and values `[P, N, C]` -> `[P, T, C]`."""
    query, bias = fold_projection(attention, attention.scaling * attention.q_proj(query), attention.k_proj)
    logits = products(query.flatten(1, 2), key).add_(bias.flatten(1, 2).unsqueeze(-1))
    sums = torch.bmm(logits.softmax(-1), value).unflatten(1, query.shape[1:3])
    sums = torch.einsum("phtc,hdc->pthd", sums, weight_by_head(attention, attention.v_proj)).flatten(2)
    return attention.o_proj(sums + attention.v_proj.bias)


def attend_to_shared_image(attention: nn.Module, query: torch.Tensor, shared: SharedProjections) -> torch.Tensor:
    """Tokens `[P, T, C]` attend to the one image of all prompts, whose projections are there -> `[P, T, C]`."""
    num_images = shared.key.shape[0]
    query_of_image = attention.q_proj(query).unflatten(0, (num_images, -1)).flatten(1, 2).unsqueeze(1)
    output, _ = attention.attend(attention.split_heads(query_of_image), shared.key, shared.value, None)
    return attention.o_proj(output.reshape(*query.shape[:2], -1))


def update_image(
    attention: nn.Module,
    image: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_multiplicity: torch.Tensor,
) -> torch.Tensor:
    """
    The image `[P, N, C]` plus its attention to the tokens.

    Args:
        query: of the image, `[P, N, C]`, or projected already and by head, `[P, heads, D, N]`.
        key, value: of the tokens, `[P, T, C]`.
        log_multiplicity: `[P, T]`, logarithm of how many equal tokens each stands for.
    """
    key = attention.scaling * attention.k_proj(key)
    if query.ndim == 4:
        key = key.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        logits = key @ query + log_multiplicity[:, None, :, None]  # [P, heads, T, N]
    else:
        key, bias = fold_projection(attention, key, attention.q_proj)
        bias = (bias + log_multiplicity[:, None]).flatten(1, 2).unsqueeze(-1)
        logits = products(key.flatten(1, 2), query).add_(bias).unflatten(1, key.shape[1:3])
    weights = logits.softmax(dim=2).flatten(1, 2)
    value = attention.v_proj(value).unflatten(-1, (-1, attention.head_dim))
    output_weight = attention.o_proj.weight.unflatten(1, (-1, attention.head_dim))
    value = torch.einsum("pthd,chd->phtc", value, output_weight)
    value = value + attention.o_proj.bias / value.shape[1]  # the weights of each head add up to one
    return products(weights.mT, value.flatten(1, 2).mT).add_(image)


def two_way_layer(
    layer: nn.Module,
    queries: torch.Tensor,
    keys: torch.Tensor,
    query_point_embedding: torch.Tensor,
    key_point_embedding: torch.Tensor,
    log_multiplicity: torch.Tensor,
    shared: SharedProjections | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `EfficientSamTwoWayLayer.forward` with less work.

    Args:
        queries, query_point_embedding: the tokens and what is added as their positions, `[P, T, C]`.
        keys: the image, `[P, N, C]`; `key_point_embedding` its positions, `[N, C]`.
        log_multiplicity: `[P, T]`.
        shared: the image's projections, if its prompts still share it.
    """
    queries = queries if layer.first else queries + query_point_embedding
    update, _ = layer.self_attention(*3 * [queries.unsqueeze(1)], log_multiplicity[:, None, None])
    queries = layer.layernorm1(queries + update.squeeze(1))

    positioned = None if shared else keys + key_point_embedding
    positioned_tokens = queries + query_point_embedding
    if shared:
        update = attend_to_shared_image(layer.token_to_image_attention, positioned_tokens, shared)
    else:
        update = attend_to_image(layer.token_to_image_attention, positioned_tokens, positioned, keys)
    queries = layer.layernorm2(queries + update)
    queries = layer.layernorm3(queries + layer.mlp(queries))

    image_query = positioned
    if shared:
        image_query = shared.query.transpose(2, 3).unsqueeze(1)
        num_prompts = queries.shape[0] // image_query.shape[0]
        image_query = image_query.expand(-1, num_prompts, -1, -1, -1).flatten(0, 1)
    positioned_tokens = queries + query_point_embedding
    keys = update_image(
        layer.image_to_token_attention, keys, image_query, positioned_tokens, queries, log_multiplicity
    )
    return queries, layer.layernorm4(keys)


# ------------------------------------------------------------------------------------------------------ upscaling


def upscale_masks(
    upscaling: nn.Module, image: torch.Tensor, filters: torch.Tensor, grid_size: tuple[int, int]
) -> torch.Tensor:
    """
    Image `[P, N, C]` and filters `[P, M, C_last]` -> mask logits `[P, M, 4h, 4w]`.

    Doublings, normalisation over all cells, activation and products ignore the order of cells, so the cells stay flat
    until the end. The four cells that a cell becomes follow each other.
    """
    return upscale_doubled(upscaling, double_cells(image, *doubling_layer(upscaling.convs[0])), filters, grid_size)


def upscale_doubled(
    upscaling: nn.Module, doubled: torch.Tensor, filters: torch.Tensor, grid_size: tuple[int, int]
) -> torch.Tensor:
    """`upscale_masks` from what the first doubling makes of the image, `[P, 4 N, C_next]`."""
    image = doubled
    (_, *convs, last), (*norms, last_norm) = upscaling.convs, upscaling.norms
    for norm, conv in zip(norms, convs, strict=True):
        image = double_cells(upscaling.activation(group_normalize(norm, image)), *doubling_layer(conv))
    image = upscaling.activation(group_normalize(last_norm, image))
    # The last doubling is the largest by far and nothing is normalised after it: in parts that stay in the cache of a
    # CPU, unless gradients need all of it anyway; not in compiled code, where the number of parts would be fixed.
    parts = [image]
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        parts = image.split(max(1, UPSCALED_NUMBERS // image[:, 0].numel()), dim=1)
    weight, bias = doubling_layer(last)
    masks = [products(filters, upscaling.activation(double_cells(part, weight, bias))) for part in parts]
    return lay_out(torch.cat(masks, dim=2), grid_size, doublings=len(upscaling.convs))


def group_normalize(norm: nn.GroupNorm, image: torch.Tensor) -> torch.Tensor:
    """`[P, N, C]`, mean 0 and variance 1 over both N and C, then scaled and shifted by channel."""
    return torch.addcmul(norm.bias, F.layer_norm(image, image.shape[1:], eps=norm.eps), norm.weight)


def doubling_layer(conv: nn.ConvTranspose2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight `[4 * C_next, C]` and bias of the linear layer that makes the four cells of one."""
    return conv.weight.permute(2, 3, 1, 0).flatten(0, 2), conv.bias.expand(4, -1).flatten()


def double_cells(image: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`[P, N, C] -> [P, 4 N, C_next]`, the transposed convolution with kernel and stride 2, as `doubling_layer`."""
    return linear(image, weight, bias).unflatten(-1, (4, -1)).flatten(1, 2)


def lay_out(masks: torch.Tensor, grid_size: tuple[int, int], doublings: int) -> torch.Tensor:
    """`[P, M, N * 4 ** doublings] -> [P, M, h * 2 ** doublings, w * 2 ** doublings]`"""
    masks = masks.unflatten(2, (-1, *doublings * [2, 2]))  # P, M, N, then y and x of each doubling
    rows, columns = range(3, 3 + 2 * doublings, 2), range(4, 4 + 2 * doublings, 2)
    masks = masks.permute(0, 1, *rows, *columns, 2).flatten(2, -2).unflatten(-1, grid_size)
    return F.pixel_shuffle(masks, 2**doublings).squeeze(2)


# ---------------------------------------------------------------------------------------------------- the decoder


class FastMaskDecoder:
    """
    Decodes with the parameters of an `EfficientSamMaskDecoder`.

    Args:
        decoder: the reference; `can_decode_fast` must allow it.
    """

    def __init__(self, decoder: nn.Module):
        self.decoder = decoder

    def predict(
        self,
        image: torch.Tensor,
        image_positional_embeddings: torch.Tensor,
        tokens: torch.Tensor,
        log_multiplicity: torch.Tensor,
        grid_size: tuple[int, int],
        multimask_output: bool | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            image: `[B, 1 or Q, N, C]`, one grid for all prompts of an image or one for each.
            image_positional_embeddings: `[N, C]`.
            tokens, log_multiplicity: `[B, Q, T, C]` and `[B, Q, T]`, output tokens included.
            grid_size: `(h, w)` with h * w = N.
            multimask_output: as in the reference.

        Returns:
            mask logits `[B, Q, M, 4h, 4w]` and IoU scores `[B, Q, M]`.
        """
        masks, scores = [], []
        inputs = (image, image_positional_embeddings, tokens, log_multiplicity, multimask_output)
        for output_tokens, images in self.attend_in_chunks(*inputs):
            scores.append(self.decoder.predict_iou(output_tokens, multimask_output))
            masks.append(self.predict_masks(output_tokens, images, grid_size, multimask_output))
        if len(masks) == 1:
            return masks[0], scores[0]
        return torch.cat(masks, dim=1), torch.cat(scores, dim=1)

    def predict_confident(
        self,
        image,
        image_positional_embeddings,
        tokens,
        log_multiplicity,
        grid_size,
        multimask_output,
        pred_iou_thresh,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        `predict` for the masks whose predicted IoU is above a threshold: nothing of the others is upscaled.

        Returns:
            which are kept `[B, Q, M]`, the K scores in order, and the K masks `[K, 4h, 4w]`.
        """
        kept, scores, masks = [], [], []
        inputs = (image, image_positional_embeddings, tokens, log_multiplicity, multimask_output)
        for output_tokens, images in self.attend_in_chunks(*inputs):
            iou_scores = self.decoder.predict_iou(output_tokens, multimask_output)
            kept.append(iou_scores > pred_iou_thresh)
            scores.append(iou_scores[kept[-1]])
            masks += self.predict_kept_masks(output_tokens, images, grid_size, multimask_output, kept[-1])
        height, width = (side * 2 ** len(self.decoder.upscaling.convs) for side in grid_size)
        masks = torch.cat(masks) if masks else image.new_empty(0, height, width)
        return torch.cat(kept, dim=1), torch.cat(scores), masks

    def attend_in_chunks(
        self, image, image_positional_embeddings, tokens, log_multiplicity, multimask_output
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """
        Yields what `attend` returns, of the next prompts of each image; in compiled code of all, for a loop would be
        unrolled anew for each number of prompts.
        """
        num_prompts, step = tokens.shape[1], self.decoder.config.prompts_per_chunk
        if image.device.type == "cpu":
            step = min(step, CHUNK_ON_CPU)
        if not (image.is_contiguous() or torch.compiler.is_compiling()):  # the embedding is [C, N] in memory
            image = stack([one.contiguous() for one in image.flatten(0, 1)]).unflatten(0, image.shape[:2])
        shared = None
        if image.shape[1] < num_prompts:
            shared = project_shared_image(self.decoder.layers[0], image, image_positional_embeddings)
        if torch.compiler.is_compiling():
            yield self.attend(image, image_positional_embeddings, tokens, log_multiplicity, multimask_output, shared)
            return
        for start in range(0, num_prompts, step):
            part = slice(start, start + step)
            yield self.attend(
                image if image.shape[1] == 1 else image[:, part],
                image_positional_embeddings,
                tokens[:, part],
                log_multiplicity[:, part],
                multimask_output,
                shared,
            )

    def attend(
        self,
        image: torch.Tensor,
        image_positional_embeddings: torch.Tensor,
        tokens: torch.Tensor,
        log_multiplicity: torch.Tensor,
        multimask_output: bool | None,
        shared: SharedProjections | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The two-way transformer.

        Returns:
            the tokens of the IoU and of the wanted masks `[B, q, 1 + M, C]`, and the image as each prompt sees it
            `[B, q, N, C]`.
        """
        decoder, prompts = self.decoder, tokens.shape[:2]
        wanted = decoder.output_token_indices(multimask_output)
        image = image.expand(-1, prompts[1], -1, -1).flatten(0, 1)
        log_multiplicity = log_multiplicity.flatten(0, 1)
        token_positions = tokens = tokens.flatten(0, 1)
        for layer in decoder.layers:
            tokens, image = two_way_layer(
                layer, tokens, image, token_positions, image_positional_embeddings, log_multiplicity, shared
            )
            shared = None  # from the first layer on each prompt has an image of its own
        query = (tokens + token_positions)[:, wanted]
        positioned = image + image_positional_embeddings
        update = attend_to_image(decoder.final_token_to_image_attention, query, positioned, image)
        tokens = decoder.final_layernorm(tokens[:, wanted] + update)
        return tokens.unflatten(0, prompts), image.unflatten(0, prompts)

    def predict_masks(self, tokens, image, grid_size: tuple[int, int], multimask_output: bool | None) -> torch.Tensor:
        """What `attend` returns -> mask logits `[B, q, M, 4h, 4w]`."""
        filters = self.decoder.predict_filters(tokens, multimask_output)
        masks = upscale_masks(self.decoder.upscaling, image.flatten(0, 1), filters.flatten(0, 1), grid_size)
        return masks.unflatten(0, image.shape[:2])

    def predict_kept_masks(self, tokens, image, grid_size, multimask_output, kept: torch.Tensor) -> list[torch.Tensor]:
        """The masks that `kept` `[B, q, M]` says, `[., 4h, 4w]` for each prompt with one; nothing else is computed."""
        filters = self.decoder.predict_filters(tokens, multimask_output).flatten(0, 1)
        image = image.flatten(0, 1)
        return [
            upscale_masks(self.decoder.upscaling, image[i : i + 1], filters[i : i + 1, wanted], grid_size)[0]
            for i, wanted in enumerate(kept.flatten(0, 1))
            if wanted.any()
        ]
