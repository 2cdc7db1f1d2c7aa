"""EfficientSAM in the order in which an image flows through it.

pixels -> vision encoder (modeling_vision_efficientsam.py) -> image embedding
points, boxes, masks -> prompt encoder -> prompt tokens
image embedding + prompt tokens -> two-way transformer -> upscaling, hypernetworks, IoU head -> masks and scores

Shape letters: B images, Q prompts an image, P points a prompt, T tokens, M candidate masks, N = h * w grid cells,
C channels. Grids are kept channel-last and flat, `[..., N, C]`, but for the public image embedding `[B, C, h, w]` and
the upscaling, `[P, C, h, w]` with P = B * Q.
Paper: EfficientSAM, arXiv 2312.00863; the decoder is that of Segment Anything, arXiv 2304.02643.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput
from transformers.utils.generic import TransformersKwargs, maybe_autocast
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_efficientsam import (
    EfficientSamConfig,
    EfficientSamMaskDecoderConfig,
    EfficientSamPromptEncoderConfig,
)
from .mask_decoder_fast_efficientsam import FastMaskDecoder, can_decode_fast
from .mask_decoder_shared_efficientsam import LEAST_PROMPTS, SharedImageDecoder, can_share_image
from .modeling_auto_vision_efficientsam import install_hooks_outside_backbone, make_vision_encoder
from .modeling_vision_efficientsam import (
    EfficientSamMLP,
    EfficientSamPreTrainedModel,
    EfficientSamVisionOutput,
    at_least_float32,
    check_kwargs,
    eager_attention_forward,
)
from .onednn_efficientsam import EfficientSamLinear

# Kinds of input tokens. Kind + 1 is the row of `EfficientSamPromptEncoder.kind_table`. Every negative label means "no
# point here": -1 in the official model, -10 in transformers' processors.
PADDING, BACKGROUND, FOREGROUND, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = -1, 0, 1, 2, 3
MISSING_BOX = -10.0  # a box whose four coordinates are this is padding, as transformers' processors write it


@dataclass
class EfficientSamImageSegmentationOutput(ModelOutput):
    """
    Output of [`EfficientSamModel`], field for field that of transformers' `SamModel`.

    Args:
        iou_scores (`torch.FloatTensor` of shape `(B, Q, M)`): Predicted IoU of each mask with the true one.
        pred_masks (`torch.FloatTensor` of shape `(B, Q, M, H / 4, W / 4)`):
            Mask logits over the model input, above 0 inside; `processor.post_process_masks` brings them to the image.
        vision_hidden_states (`tuple`, *optional*): Hidden states of the vision encoder.
        vision_attentions (`tuple`, *optional*): Attentions of the vision encoder.
        mask_decoder_attentions (`tuple` of `torch.FloatTensor` of shape `(B, Q, heads, T, N)`, *optional*):
            Token-to-image attention weights of each two-way layer, with eager attention.
    """

    iou_scores: torch.FloatTensor | None = None
    pred_masks: torch.FloatTensor | None = None
    vision_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    vision_attentions: tuple[torch.FloatTensor, ...] | None = None
    mask_decoder_attentions: tuple[torch.FloatTensor, ...] | None = None


# ---------------------------------------------------------------------------------------------- prompt encoder


class EfficientSamPositionEmbedding(nn.Module):
    """Random Fourier features of a position: x, y in [0, 1] -> sines and cosines, `[..., 2] -> [..., C]`."""

    def __init__(self, config: EfficientSamPromptEncoderConfig):
        super().__init__()
        self.start = config.position_init
        # float32 even where the model is loaded in half: bfloat16 would shift the highest phases by 0.2 radians
        self.register_buffer("frequencies", torch.zeros(2, config.hidden_size // 2, dtype=torch.float32))
        self.last_grid = (None, None, None)  # frequencies, size and type of the last result of `grid`, and the result

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        # Never in half precision, result included: a phase of many cycles has no digits left there. Autocast would
        # take the product to half precision all the same.
        frequencies = at_least_float32(self.frequencies)
        with maybe_autocast(device_type=positions.device.type, enabled=False):
            phases = 2 * math.pi * ((2 * positions.to(frequencies.dtype) - 1) @ frequencies)
        return torch.cat([phases.sin(), phases.cos()], dim=-1)

    def grid(self, height: int, width: int) -> torch.Tensor:
        """
        Features of the cell centres of a grid, row by row: `[height * width, C]`; not to be changed in place. On a CPU
        the last result is kept, for it takes 4 % of the time of decoding one prompt.
        """
        frequencies = self.frequencies
        if (
            type(frequencies) is not torch.Tensor
            or frequencies.device.type != "cpu"
            or frequencies.requires_grad
            or torch.compiler.is_compiling()
            or torch.is_inference_mode_enabled()  # whose results cannot be trained with
        ):
            return self.compute_grid(height, width)
        kind = (height, width, frequencies.dtype)
        known, known_kind, features = self.last_grid
        if kind != known_kind or not torch.equal(frequencies, known):
            features = self.compute_grid(height, width)
            self.last_grid = (frequencies.clone(), kind, features)
        return features

    def compute_grid(self, height: int, width: int) -> torch.Tensor:
        frequencies = at_least_float32(self.frequencies)
        y = (torch.arange(height, device=frequencies.device, dtype=frequencies.dtype) + 0.5) / height
        x = (torch.arange(width, device=frequencies.device, dtype=frequencies.dtype) + 0.5) / width
        cells = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
        return self(cells.flatten(0, 1))


def read_rows(embedding: nn.Embedding, device: torch.device) -> torch.Tensor:
    """The table of an embedding, read through its forward: only there are weights present that accelerate offloads."""
    return embedding(torch.arange(embedding.num_embeddings, device=device))


def axis_frequencies(count: int) -> torch.Tensor:
    """`[2, count]`: log-spaced from 1/4 to 16, the first half along x and the second along y."""
    frequencies = torch.zeros(2, count)
    for axis, part in enumerate(frequencies.tensor_split(2, dim=1)):
        part[axis] = torch.logspace(-2, 4, part.shape[1], base=2)
    return frequencies


class EfficientSamMaskEmbedding(nn.Module):
    """Mask logits `[B, 4h, 4w]` -> dense prompt `[B, h * w, C]`."""

    def __init__(self, config: EfficientSamPromptEncoderConfig):
        super().__init__()
        narrow, wide = config.mask_input_channels // 4, config.mask_input_channels
        self.conv1 = nn.Conv2d(1, narrow, kernel_size=2, stride=2)
        self.layernorm1 = nn.LayerNorm(narrow, eps=config.layer_norm_eps)
        self.conv2 = nn.Conv2d(narrow, wide, kernel_size=2, stride=2)
        self.layernorm2 = nn.LayerNorm(wide, eps=config.layer_norm_eps)
        self.projection = nn.Linear(wide, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, masks: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv1(masks.unsqueeze(1).to(self.conv1.weight.dtype)).permute(0, 2, 3, 1)
        hidden_states = self.activation(self.layernorm1(hidden_states)).permute(0, 3, 1, 2)
        hidden_states = self.conv2(hidden_states).permute(0, 2, 3, 1)
        hidden_states = self.activation(self.layernorm2(hidden_states))
        return self.projection(hidden_states.flatten(1, 2))


class EfficientSamPromptEncoder(nn.Module):
    """Points, boxes and masks in the model frame -> prompt tokens `[B, Q, T, C]` and a dense prompt `[B, Q, N, C]`."""

    def __init__(self, config: EfficientSamPromptEncoderConfig):
        super().__init__()
        self.config = config
        self.position_embedding = EfficientSamPositionEmbedding(config)
        self.padding_embed = nn.Embedding(1, config.hidden_size)
        self.background_embed = nn.Embedding(1, config.hidden_size) if config.background_points else None
        self.foreground_embed = nn.Embedding(1, config.hidden_size)
        self.box_top_left_embed = nn.Embedding(1, config.hidden_size)
        self.box_bottom_right_embed = nn.Embedding(1, config.hidden_size)
        self.mask_embed = EfficientSamMaskEmbedding(config) if config.mask_prompts else None
        self.no_mask_embed = nn.Embedding(1, config.hidden_size) if config.mask_prompts else None

    def forward(
        self,
        points: torch.Tensor | None,
        labels: torch.Tensor | None,
        boxes: torch.Tensor | None,
        masks: torch.Tensor | None,
        batch_size: int,
        grid_size: tuple[int, int],
        input_size: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Args:
            points, labels, boxes, masks: as in [`EfficientSamModel.forward`], each may be `None`.
            batch_size, grid_size, input_size: B, `(h, w)` of the image embedding and `(H, W)` of the model input.

        Returns:
            tokens `[B, Q, T, C]`; token multiplicity, integers `[B, Q, T]`: how many equal tokens each stands for, 0
            for none;
            the dense prompt `[B, Q or 1, N, C]`, or `None` for nothing to add.
        """
        positions, kinds = self.tokens_of(points, labels, boxes, masks, batch_size)
        positions, kinds, token_multiplicity = self.fill_slots(positions, kinds)
        height, width = input_size
        # The official model moves every coordinate to the pixel's centre, padding included.
        x, y = (positions + 0.5).unbind(dim=-1)
        places = torch.stack([x / width, y / height], dim=-1)
        tokens = F.embedding(kinds + 1, self.kind_table(kinds.device))
        tokens = tokens + self.position_embedding(places).to(tokens.dtype)
        return tokens, token_multiplicity, self.dense_prompt(masks, grid_size, kinds.device)

    def tokens_of(self, points, labels, boxes, masks, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All point and box-corner tokens: positions `[B, Q, T, 2]` in pixels and kinds `[B, Q, T]`."""
        num_prompts = next((x.shape[1] for x in (points, boxes, masks) if x is not None), 1)
        frequencies = at_least_float32(self.position_embedding.frequencies)
        positions = frequencies.new_empty(batch_size, num_prompts, 0, 2)
        kinds = positions.new_empty(batch_size, num_prompts, 0, dtype=torch.long)
        if points is not None:
            self.check_labels(labels)
            positions = torch.cat([positions, points.to(positions)], dim=2)
            kinds = torch.cat([kinds, labels.to(kinds)], dim=2)
        if boxes is not None:
            missing = (boxes == MISSING_BOX).all(dim=-1, keepdim=True)
            corners = torch.tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], device=kinds.device)
            positions = torch.cat([positions, boxes.to(positions).unflatten(-1, (2, 2))], dim=2)
            kinds = torch.cat([kinds, torch.where(missing, PADDING, corners)], dim=2)
        kinds = kinds.clamp(min=PADDING)
        positions = torch.where(kinds.unsqueeze(-1) == PADDING, -1.0, positions)
        return positions, kinds

    def check_labels(self, labels: torch.Tensor) -> None:
        if torch.compiler.is_compiling():  # reading values would break the graph; see kind_table
            return
        if (labels > FOREGROUND).any():
            raise ValueError(
                "input_labels may be 1 (object), 0 (background) or negative (padding); pass boxes as input_boxes."
            )
        if self.background_embed is None and (labels == BACKGROUND).any():
            raise ValueError(
                "This model has no background points (label 0): its config says "
                "prompt_encoder_config.background_points=False. Use a checkpoint trained with them, or leave them out."
            )

    def fill_slots(self, positions: torch.Tensor, kinds: torch.Tensor):
        """
        Pads each prompt to `num_prompt_slots` tokens, as the official model does. Padding tokens are equal and stay
        equal from layer to layer, so one token stands for all of a prompt's, with their number as its multiplicity.
        """
        is_real = kinds != PADDING
        fillers = self.config.num_prompt_slots - is_real.sum(dim=-1, keepdim=True)
        token_multiplicity = torch.cat([is_real.to(kinds), fillers.clamp(min=0)], dim=-1)
        return F.pad(positions, (0, 0, 0, 1), value=-1.0), F.pad(kinds, (0, 1), value=PADDING), token_multiplicity

    def kind_table(self, device: torch.device) -> torch.Tensor:
        """One row for each kind of token, `[5, C]`."""
        foreground = read_rows(self.foreground_embed, device)
        # Without background points label 0 is an error. Compiled code cannot raise it, so there it poisons the output.
        background = torch.full_like(foreground, math.nan)
        if self.background_embed is not None:
            background = read_rows(self.background_embed, device)
        corners = (read_rows(self.box_top_left_embed, device), read_rows(self.box_bottom_right_embed, device))
        return torch.cat([read_rows(self.padding_embed, device), background, foreground, *corners])

    def dense_prompt(
        self, masks: torch.Tensor | None, grid_size: tuple[int, int], device: torch.device
    ) -> torch.Tensor | None:
        if masks is None:
            return None if self.no_mask_embed is None else read_rows(self.no_mask_embed, device)[None, None]
        if self.mask_embed is None:
            raise ValueError(
                "This model takes no mask prompts: its config says prompt_encoder_config.mask_prompts=False. "
                "Use a checkpoint trained with them, or leave input_masks out."
            )
        size = (4 * grid_size[0], 4 * grid_size[1])
        if masks.shape[-2:] != size:
            masks = at_least_float32(masks.to(self.mask_embed.conv1.weight.dtype))
            masks = F.interpolate(masks, size=size, mode="bilinear", align_corners=False, antialias=True)
        return self.mask_embed(masks.flatten(0, 1)).unflatten(0, masks.shape[:2])


# ------------------------------------------------------------------------------------------------ mask decoder


class EfficientSamAttention(nn.Module):
    """
    Multi-head attention between sets of vectors of each prompt, `[B, Q, length, C]`. A set that all prompts share has
    Q = 1 and is projected once, without copies.
    """

    def __init__(self, config: EfficientSamMaskDecoderConfig, downsample_rate: int = 1):
        super().__init__()
        self.config = config
        inner_size = config.hidden_size // downsample_rate
        self.head_dim = inner_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = EfficientSamLinear(config.hidden_size, inner_size)
        self.k_proj = EfficientSamLinear(config.hidden_size, inner_size)
        self.v_proj = EfficientSamLinear(config.hidden_size, inner_size)
        self.o_proj = EfficientSamLinear(inner_size, config.hidden_size)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            query (`[B, Qq, Lq, C]`), key and value (`[B, Qk, Lk, C]`): Qq and Qk are equal, or one of them is 1.
            attention_mask (`[B, Qk, 1, Lk]`, *optional*): added to the attention logits.

        Returns:
            `[B, Q, Lq, C]` and, with eager attention, the weights `[B, Q, heads, Lq, Lk]`.
        """
        query, key, value = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        batch_size, num_prompts, length = query.shape[:3]
        shared_keys = key.shape[1] == 1
        if shared_keys:  # every prompt looks at the same image: the prompts' queries are more queries of one set
            query = query.flatten(1, 2).unsqueeze(1)
        elif num_prompts == 1:
            num_prompts = key.shape[1]
            query = query.expand(-1, num_prompts, -1, -1)
        query, key, value = (self.split_heads(x) for x in (query, key, value))
        output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        output = output.reshape(batch_size, num_prompts, length, -1)
        if weights is not None:
            if shared_keys:
                weights = weights.unflatten(2, (num_prompts, length)).transpose(1, 2)
            else:
                weights = weights.unflatten(0, (batch_size, num_prompts))
        return self.o_proj(output), weights

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, Q, L, C] -> [B * Q, heads, L, C / heads]`"""
        return states.flatten(0, 1).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(self, query, key, value, attention_mask, **kwargs):
        implementation = self.config._attn_implementation
        if attention_mask is not None:
            attention_mask = attention_mask.flatten(0, 1).unsqueeze(1)  # [B * Q, 1, 1, Lk]
            if "flash" in implementation or "flex" in implementation:
                implementation = "sdpa"  # these take no mask of single keys as it is; the token side is small
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        return attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)


class EfficientSamTwoWayLayer(GradientCheckpointingLayer):
    """Tokens attend to each other and to the image, then the image to the tokens."""

    def __init__(self, config: EfficientSamMaskDecoderConfig, first: bool):
        super().__init__()
        self.first = first
        self.self_attention = EfficientSamAttention(config)
        self.layernorm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.token_to_image_attention = EfficientSamAttention(config, config.attention_downsample_rate)
        self.layernorm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = EfficientSamMLP(config.hidden_size, config.mlp_dim, config.hidden_act)
        self.layernorm3 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.image_to_token_attention = EfficientSamAttention(config, config.attention_downsample_rate)
        self.layernorm4 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        query_point_embedding: torch.Tensor,
        key_point_embedding: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Args:
            queries, query_point_embedding: the tokens and what is added as their positions, `[B, Q, T, C]`.
            keys: the image, `[B, 1 or Q, N, C]`; `key_point_embedding` its positions, `[N, C]`.
            attention_mask (`[B, Q, 1, T]`, *optional*): added to the logits of attention to the tokens.

        Returns:
            tokens `[B, Q, T, C]`, image `[B, Q, N, C]`, and the weights of the attention to the image, if eager.
        """
        # In the first layer the tokens are still nothing but their positions, which are therefore not added again.
        # Unlike in SAM, positions are in the values and the residual too, and the first layer keeps its residual.
        queries = queries if self.first else queries + query_point_embedding
        update, _ = self.self_attention(queries, queries, queries, attention_mask, **kwargs)
        queries = self.layernorm1(queries + update)

        query, key = queries + query_point_embedding, keys + key_point_embedding
        update, weights = self.token_to_image_attention(query, key, keys, **kwargs)
        queries = self.layernorm2(queries + update)

        queries = self.layernorm3(queries + self.mlp(queries))

        query, key = keys + key_point_embedding, queries + query_point_embedding
        update, _ = self.image_to_token_attention(query, key, queries, attention_mask, **kwargs)
        keys = self.layernorm4(keys + update)  # from the first layer on each prompt has an image of its own
        return queries, keys, weights


class EfficientSamFeedForward(nn.Module):
    """`depth` linear layers with an activation between: the hypernetworks and the IoU head."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, depth: int, hidden_act: str):
        super().__init__()
        sizes = [input_dim] + [hidden_dim] * (depth - 1) + [output_dim]
        self.layers = nn.ModuleList([nn.Linear(*pair) for pair in pairwise(sizes)])
        self.activation = ACT2FN[hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        *hidden_layers, last = self.layers
        for layer in hidden_layers:
            hidden_states = self.activation(layer(hidden_states))
        return last(hidden_states)


class EfficientSamMaskUpscaling(nn.Module):
    """Doubles the grid once for each of `upscaling_channels`: `[P, C, h, w] -> [P, C_last, 4h, 4w]`."""

    def __init__(self, config: EfficientSamMaskDecoderConfig):
        super().__init__()
        channels = [config.hidden_size, *config.upscaling_channels]
        self.convs = nn.ModuleList([nn.ConvTranspose2d(*pair, kernel_size=2, stride=2) for pair in pairwise(channels)])
        # One group: mean and variance over channels and cells together. None after the last convolution.
        self.norms = nn.ModuleList([nn.GroupNorm(1, c, eps=config.layer_norm_eps) for c in channels[1:-1]])
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for conv, norm in zip(self.convs[:-1], self.norms, strict=True):
            hidden_states = self.activation(norm(conv(hidden_states)))
        return self.activation(self.convs[-1](hidden_states))


class EfficientSamMaskDecoder(nn.Module):
    """Image embeddings and prompt tokens -> mask logits and predicted IoU, as in Segment Anything."""

    def __init__(self, config: EfficientSamMaskDecoderConfig):
        super().__init__()
        self.config = config
        num_mask_tokens = 1 + config.num_multimask_outputs  # token 0 is the single mask's
        self.iou_token = nn.Embedding(1, config.hidden_size)
        self.mask_tokens = nn.Embedding(num_mask_tokens, config.hidden_size)
        self.layers = nn.ModuleList(
            [EfficientSamTwoWayLayer(config, first=i == 0) for i in range(config.num_hidden_layers)]
        )
        self.final_token_to_image_attention = EfficientSamAttention(config, config.attention_downsample_rate)
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.upscaling = EfficientSamMaskUpscaling(config)
        width, act = config.hidden_size, config.hidden_act
        self.hypernetworks = nn.ModuleList(
            [
                EfficientSamFeedForward(width, width, config.upscaling_channels[-1], 3, act)
                for _ in range(num_mask_tokens)
            ]
        )
        self.iou_head = EfficientSamFeedForward(
            width, config.iou_head_hidden_dim, num_mask_tokens, config.iou_head_depth, act
        )

    def forward(
        self,
        image_embeddings: torch.Tensor,
        image_positional_embeddings: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        token_multiplicity: torch.Tensor | None = None,
        dense_prompt_embeddings: torch.Tensor | None = None,
        multimask_output: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Where `can_decode_fast` says so, [`FastMaskDecoder`] gives the same numbers with less work, and of many prompts
        [`SharedImageDecoder`].

        Args:
            image_embeddings: `[B, C, h, w]`.
            image_positional_embeddings: `[N, C]`, or `[1 or B, C, h, w]` as `SamMaskDecoder` takes them.
            sparse_prompt_embeddings: tokens of points and boxes, `[B, Q, T, C]`.
            token_multiplicity: `[B, Q, T]`, how many equal tokens each of them stands for, 0 for none; by default 1.
            dense_prompt_embeddings: what is added to the image for the prompts' masks, `[B, 1 or Q, N, C]`; together
                with such `image_positional_embeddings`, `[1 or B, C, h, w]`.
            multimask_output: the candidates, or the single mask.

        Returns:
            mask logits `[B, Q, M, 4h, 4w]` and IoU scores `[B, Q, M]`.
        """
        grid_size = tuple(image_embeddings.shape[-2:])
        if image_positional_embeddings.ndim == 4:  # in SAM's layout; all images have the same positions
            image_positional_embeddings = image_positional_embeddings[0].flatten(1).T
            if dense_prompt_embeddings is not None:
                dense_prompt_embeddings = dense_prompt_embeddings.flatten(2).mT.unsqueeze(1)
        if token_multiplicity is None:
            token_multiplicity = torch.ones_like(sparse_prompt_embeddings[..., 0], dtype=torch.long)
        image = self.embed_image(image_embeddings, dense_prompt_embeddings)
        tokens, log_multiplicity = self.embed_tokens(sparse_prompt_embeddings, token_multiplicity)
        inputs = (image, image_positional_embeddings, tokens, log_multiplicity)
        if 0 in tokens.shape[:2]:  # no image, or no prompt
            iou_scores = image.new_empty(*tokens.shape[:2], len(self.mask_indices(multimask_output)))
            scale = 2 ** len(self.upscaling.convs)
            return iou_scores.new_empty(*iou_scores.shape, *(scale * side for side in grid_size)), iou_scores
        if can_decode_fast(self, image, kwargs.get("output_attentions")):
            # The number of prompts is asked last: in compiled code each question about it makes a graph of its own.
            if can_share_image(image) and tokens.shape[1] >= LEAST_PROMPTS:
                return self.predict_shared(*inputs, grid_size, multimask_output)
            return FastMaskDecoder(self).predict(*inputs, grid_size, multimask_output)

        masks, iou_scores = [], []
        for output_tokens, image in self.attend_in_chunks(*inputs, multimask_output, **kwargs):
            iou_scores.append(self.predict_iou(output_tokens, multimask_output))
            masks.append(self.predict_masks(output_tokens, image, grid_size, multimask_output))
        if len(masks) == 1:
            return masks[0], iou_scores[0]
        return torch.cat(masks, dim=1), torch.cat(iou_scores, dim=1)

    @torch.no_grad()
    def predict_confident(
        self,
        image_embeddings: torch.Tensor,
        image_positional_embeddings: torch.Tensor,
        sparse_prompt_embeddings: torch.Tensor,
        token_multiplicity: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor | None,
        multimask_output: bool,
        pred_iou_thresh: float,
        shared: SharedImageDecoder | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        `forward` for the masks whose predicted IoU is above `pred_iou_thresh`; `shared` is of one image, as
        `share_image` returns it.

        Returns:
            which masks are kept, bool `[B, Q, M]`; the K scores in order; their logits `[K, 4h, 4w]`.
        """
        grid_size = tuple(image_embeddings.shape[-2:])
        image = self.embed_image(image_embeddings, dense_prompt_embeddings)
        tokens, log_multiplicity = self.embed_tokens(sparse_prompt_embeddings, token_multiplicity)
        if shared is not None:
            kept, *rest = shared.predict(tokens[0], log_multiplicity[0], grid_size, multimask_output, pred_iou_thresh)
            return kept[None], *rest
        inputs = (image, image_positional_embeddings, tokens, log_multiplicity)
        if can_decode_fast(self, image):
            return FastMaskDecoder(self).predict_confident(*inputs, grid_size, multimask_output, pred_iou_thresh)

        kept, scores, masks = [], [], []
        for output_tokens, image in self.attend_in_chunks(*inputs, multimask_output):
            iou_scores = self.predict_iou(output_tokens, multimask_output)
            kept.append(iou_scores > pred_iou_thresh)
            scores.append(iou_scores[kept[-1]])
            prompts = kept[-1].any(dim=-1)  # only these are upscaled
            candidates = self.predict_masks(
                output_tokens[prompts][None], image[prompts][None], grid_size, multimask_output
            )
            masks.append(candidates[0][kept[-1][prompts]])
        return torch.cat(kept, dim=1), torch.cat(scores), torch.cat(masks)

    def predict_shared(
        self, image, image_positional_embeddings, tokens, log_multiplicity, grid_size, multimask_output: bool | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` by [`SharedImageDecoder`], image by image."""
        masks, iou_scores = [], []
        for (of_one,), *prompts in zip(image, tokens, log_multiplicity, strict=True):
            shared = SharedImageDecoder(self, of_one, image_positional_embeddings)
            kept, scores, logits = shared.predict(*prompts, grid_size, multimask_output)
            masks.append(logits.unflatten(0, kept.shape))
            iou_scores.append(scores.unflatten(0, kept.shape))
        return torch.stack(masks), torch.stack(iou_scores)

    @torch.no_grad()
    def share_image(
        self,
        image_embeddings: torch.Tensor,
        image_positional_embeddings: torch.Tensor,
        dense_prompt_embeddings: torch.Tensor | None,
    ) -> SharedImageDecoder | None:
        """What many prompts of one image, `[1, C, h, w]`, have in common; None where no decoder may use it."""
        image = self.embed_image(image_embeddings, dense_prompt_embeddings)
        if can_decode_fast(self, image) and can_share_image(image):
            return SharedImageDecoder(self, image[0, 0], image_positional_embeddings)
        return None

    def embed_image(
        self, image_embeddings: torch.Tensor, dense_prompt_embeddings: torch.Tensor | None
    ) -> torch.Tensor:
        """`[B, C, h, w] -> [B, 1 or Q, N, C]` in the weights' dtype, with the prompts' masks if there are some."""
        image = image_embeddings.to(self.iou_token.weight.dtype).flatten(2).transpose(1, 2).unsqueeze(1)
        return image if dense_prompt_embeddings is None else image + dense_prompt_embeddings.to(image.device)

    def embed_tokens(
        self, sparse_prompt_embeddings: torch.Tensor, token_multiplicity: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        All tokens `[B, Q, 1 + masks + T, C]`, those of IoU and masks first, and the logarithm of their multiplicity:
        n equal keys weigh as much in a softmax as one whose logit is larger by log n.
        """
        device = sparse_prompt_embeddings.device
        output_tokens = torch.cat([read_rows(self.iou_token, device), read_rows(self.mask_tokens, device)])
        output_tokens = output_tokens.expand(*sparse_prompt_embeddings.shape[:2], -1, -1)
        tokens = torch.cat([output_tokens, sparse_prompt_embeddings], dim=2)
        token_multiplicity = F.pad(token_multiplicity, (output_tokens.shape[2], 0), value=1)
        return tokens, token_multiplicity.to(tokens.dtype).log()

    def attend_in_chunks(
        self, image, image_positional_embeddings, tokens, log_multiplicity, multimask_output: bool | None, **kwargs
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """
        Yields what `attend` returns, of the next `prompts_per_chunk` prompts of each image: memory then does not grow
        with the number of prompts. Of all prompts at once where activations are needed (gradients, attentions), and in
        compiled code, where a loop would be unrolled anew for each number of prompts.
        """
        inputs = (image, image_positional_embeddings, tokens, log_multiplicity)
        if torch.is_grad_enabled() or kwargs.get("output_attentions") or torch.compiler.is_compiling():
            yield self.attend(*inputs, multimask_output, **kwargs)
            return
        num_prompts, step = tokens.shape[1], self.config.prompts_per_chunk
        for start in range(0, num_prompts, step):
            part = slice(start, start + step)
            image_of_part = image if image.shape[1] == 1 else image[:, part]
            inputs = (image_of_part, image_positional_embeddings, tokens[:, part], log_multiplicity[:, part])
            yield self.attend(*inputs, multimask_output, **kwargs)

    def attend(
        self, image, image_positional_embeddings, tokens, log_multiplicity, multimask_output: bool | None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The two-way transformer on what `embed_image` and `embed_tokens` return.

        Returns:
            the tokens of the IoU and of the wanted masks `[B, Q, 1 + M, C]`, and the image as each prompt sees it
            `[B, Q, N, C]`.
        """
        queries, keys, attention_mask = tokens, image, log_multiplicity.unsqueeze(2)
        for layer in self.layers:
            queries, keys, _ = layer(queries, keys, tokens, image_positional_embeddings, attention_mask, **kwargs)

        wanted = self.output_token_indices(multimask_output)
        query, key = (queries + tokens)[:, :, wanted], keys + image_positional_embeddings
        update, _ = self.final_token_to_image_attention(query, key, keys, **kwargs)
        return self.final_layernorm(queries[:, :, wanted] + update), keys

    def predict_iou(self, tokens: torch.Tensor, multimask_output: bool | None) -> torch.Tensor:
        """`[B, Q, 1 + M, C] -> [B, Q, M]`"""
        return self.iou_head(tokens[:, :, 0])[:, :, self.mask_indices(multimask_output)]

    def predict_filters(self, tokens: torch.Tensor, multimask_output: bool | None) -> torch.Tensor:
        """The hypernetworks: tokens `[B, Q, 1 + M, C]` -> filters of the wanted masks `[B, Q, M, C_last]`."""
        nets = [self.hypernetworks[i] for i in self.mask_indices(multimask_output)]
        return torch.stack([net(tokens[:, :, 1 + i]) for i, net in enumerate(nets)], dim=2)

    def predict_masks(
        self, tokens: torch.Tensor, image: torch.Tensor, grid_size: tuple[int, int], multimask_output: bool | None
    ) -> torch.Tensor:
        """What `attend` returns -> mask logits `[B, Q, M, 4h, 4w]`."""
        filters = self.predict_filters(tokens, multimask_output)
        upscaled = self.upscaling(image.flatten(0, 1).transpose(1, 2).unflatten(2, grid_size))  # [P, C_last, 4h, 4w]
        masks = filters.flatten(0, 1) @ upscaled.flatten(2)
        return masks.unflatten(2, upscaled.shape[2:]).unflatten(0, image.shape[:2])

    def mask_indices(self, multimask_output: bool | None) -> range:
        """Which masks are wanted: the candidates, the single one, or (`None`) the single one and the candidates."""
        if multimask_output is None:
            return range(len(self.hypernetworks))
        return range(1, len(self.hypernetworks)) if multimask_output else range(1)

    def output_token_indices(self, multimask_output: bool | None) -> list[int]:
        """The IoU's token and those of the wanted masks."""
        return [0, *(1 + i for i in self.mask_indices(multimask_output))]


# --------------------------------------------------------------------------------------------------- the whole


class EfficientSamModel(EfficientSamPreTrainedModel):
    """EfficientSAM: image and prompts -> candidate masks with predicted IoU, with the interface of `SamModel`."""

    input_modalities = ("image", "text")
    _auto_classes = ("AutoModel", "AutoModelForMaskGeneration")
    _can_record_outputs = {"mask_decoder_attentions": OutputRecorder(EfficientSamTwoWayLayer, index=2)}

    def __init__(self, config: EfficientSamConfig):
        super().__init__(config)
        self.vision_encoder = make_vision_encoder(config.vision_config)
        self.prompt_encoder = EfficientSamPromptEncoder(config.prompt_encoder_config)
        # The decoder is no PreTrainedModel, so nothing else hands the choice of attention down to it.
        config.mask_decoder_config._attn_implementation = config._attn_implementation
        self.mask_decoder = EfficientSamMaskDecoder(config.mask_decoder_config)
        self.post_init()
        install_hooks_outside_backbone(self)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """
        Prompt encoder and mask decoder start as Segment Anything's. With transformers' small default the mask tokens
        and the two box corners are hardly told apart, and a new decoder stays at its first masks for long.
        """
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight)
            if module is self.prompt_encoder.no_mask_embed:
                # Nothing added where no mask is given: enabling mask prompts leaves trained numbers as they are.
                init.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, EfficientSamPositionEmbedding):
            if module.start == "axes":
                init.copy_(module.frequencies, axis_frequencies(module.frequencies.shape[1]))
            else:
                init.normal_(module.frequencies)

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_encoder.get_input_embeddings()

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs):
        """As transformers'; one name for the whole model reaches the mask decoder too."""
        if isinstance(attn_implementation, dict):
            return super().set_attn_implementation(attn_implementation, **kwargs)
        # Prompt encoder and mask decoder are no PreTrainedModels: transformers would warn that it sets their configs
        # unchecked. What the whole model supports they support, and that is checked here. What a backbone other than
        # the plain ViT supports is not known; None is its own choice.
        backbone = "eager" if attn_implementation == "eager" else None
        vision = {"": attn_implementation, "backbone_config": backbone}
        super().set_attn_implementation({"": attn_implementation, "vision_config": vision}, **kwargs)
        for config in (self.config.prompt_encoder_config, self.config.mask_decoder_config):
            config._attn_implementation = self.config._attn_implementation

    def get_image_embeddings(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.FloatTensor:
        """
        Encodes images once, for many prompts. Carries gradients unless called under `torch.no_grad()`.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): Normalised pixels, H and W multiples of 16.

        Returns:
            `torch.FloatTensor` of shape `(B, 256, H / 16, W / 16)`, to be passed on as `image_embeddings`.

        Raises:
            ValueError: if the channels or the sides of `pixel_values` do not fit.
        """
        return self.vision_encoder(pixel_values, **kwargs).last_hidden_state

    def get_image_wide_positional_embeddings(self) -> torch.Tensor:
        """
        The positions of the image's cells, as `SamModel` gives them: `(1, 256, H / 16, W / 16)` for images of the
        configuration's `image_size`.
        """
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        positions = self.prompt_encoder.position_embedding.compute_grid(side, side).to(self.dtype)
        return positions.T.unflatten(1, (side, side)).unsqueeze(0)

    @torch.no_grad()
    def get_prompt_embeddings(
        self,
        input_points: torch.Tensor | None = None,
        input_labels: torch.Tensor | None = None,
        input_boxes: torch.Tensor | None = None,
        input_masks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The prompts for images of the configuration's `image_size`, as `SamModel` gives them. With
        `get_image_wide_positional_embeddings` they are what `mask_decoder` needs beside the image embeddings:

            model.mask_decoder(
                image_embeddings=image_embeddings,
                image_positional_embeddings=model.get_image_wide_positional_embeddings(),
                sparse_prompt_embeddings=sparse_prompt_embeddings,
                dense_prompt_embeddings=dense_prompt_embeddings,
                multimask_output=True,
            )

        Args:
            input_points, input_labels, input_boxes, input_masks: as in `forward`, but one mask an image at most.

        Returns:
            tokens `(B, Q, T, 256)`, in which the padding up to the configuration's `num_prompt_slots` is written out;
            what is added to the image embeddings for masks, `(1 or B, 256, H / 16, W / 16)`.

        Raises:
            ValueError: if the prompts' shapes disagree, if the model lacks a kind of prompt, or if prompts have
                different numbers of tokens beyond `num_prompt_slots`.
        """
        prompts = [one for one in (input_points, input_boxes, input_masks) if one is not None]
        batch_size = prompts[0].shape[0] if prompts else 1
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        cells = torch.empty(batch_size, 0, side, side, device=self.device)  # stands for image embeddings
        _, tokens, multiplicity, dense = self.encode_prompts(
            cells, input_points, input_labels, input_boxes, input_masks
        )
        counts = multiplicity.sum(dim=-1)
        if (counts != counts[0, 0]).any():
            raise ValueError(
                f"The prompts have {sorted(set(counts.flatten().tolist()))} tokens; beyond num_prompt_slots, "
                f"{self.config.prompt_encoder_config.num_prompt_slots}, they must have equal numbers of points."
            )
        sparse = tokens.flatten(0, 2).repeat_interleave(multiplicity.flatten(), dim=0)
        if dense is None:
            dense = tokens.new_zeros(1, 1, 1, tokens.shape[-1])
        if dense.shape[1] > 1:
            raise ValueError(f"input_masks has {dense.shape[1]} masks an image; here each image may have one.")
        dense = dense[:, 0].mT.expand(-1, -1, side * side).unflatten(2, (side, side))
        return sparse.unflatten(0, (*counts.shape, -1)), dense

    @capture_outputs
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_points: torch.Tensor | None = None,
        input_labels: torch.Tensor | None = None,
        input_boxes: torch.Tensor | None = None,
        input_masks: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
        multimask_output: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EfficientSamImageSegmentationOutput:
        """
        Coordinates are pixels of the model input (x to the right, y down; 0 is the first pixel); the processor
        converts from the image's own. B images, Q prompts an image, P points a prompt.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`, *optional*):
                Normalised pixels; H and W are multiples of 16 and need not be equal.
            input_points (`torch.FloatTensor` of shape `(B, Q, P, 2)`, *optional*): Points (x, y).
            input_labels (`torch.LongTensor` of shape `(B, Q, P)`, *optional*):
                1 on the object, 0 on the background (only if the config has `background_points`), negative for
                padding. All points are on the object if it is not given.
            input_boxes (`torch.FloatTensor` of shape `(B, Q, 4)`, *optional*):
                Boxes (x1, y1, x2, y2), one a prompt, beside that prompt's points; a box of four times -10 is padding.
            input_masks (`torch.FloatTensor` of shape `(B, Q, H / 4, W / 4)`, *optional*):
                Mask logits of an earlier prediction, one a prompt (only if the config has `mask_prompts`). Other
                sizes are resampled; `(B, H / 4, W / 4)` serves all of an image's prompts.
            image_embeddings (`torch.FloatTensor` of shape `(B, 256, H / 16, W / 16)`, *optional*):
                Result of `get_image_embeddings`, in place of `pixel_values`, in any precision.
            multimask_output (`bool`, defaults to `True`):
                Three candidates (whole, part and subpart of what an ambiguous prompt can mean), or one mask.

        Returns:
            [`EfficientSamImageSegmentationOutput`] with `pred_masks` `(B, Q, M, H / 4, W / 4)` and `iou_scores`
            `(B, Q, M)`.

        Raises:
            ValueError: if not exactly one of `pixel_values` and `image_embeddings` is given, if shapes disagree, or
                if the prompt is of a kind the model lacks.
            TypeError: for other arguments, those of PerSAM (`attention_similarity`, `target_embedding`) among them.
        """
        if (pixel_values is None) == (image_embeddings is None):
            raise ValueError("Give exactly one of pixel_values and image_embeddings.")
        # Of the processor, for its post-processing and for losses. As SamModel, this computes no loss.
        for name in ("original_sizes", "reshaped_input_sizes", "labels"):
            kwargs.pop(name, None)
        check_kwargs(kwargs)
        for name in ("output_attentions", "output_hidden_states"):  # the parts do not see this config
            kwargs.setdefault(name, getattr(self.config, name))
        vision_output = EfficientSamVisionOutput(last_hidden_state=image_embeddings)
        if pixel_values is not None:
            vision_output = self.vision_encoder(pixel_values, **kwargs)
        image_embeddings = vision_output.last_hidden_state
        prompts = self.encode_prompts(image_embeddings, input_points, input_labels, input_boxes, input_masks)
        pred_masks, iou_scores = self.mask_decoder(
            image_embeddings, *prompts, multimask_output=multimask_output, **kwargs
        )
        return EfficientSamImageSegmentationOutput(
            iou_scores=iou_scores,
            pred_masks=pred_masks,
            vision_hidden_states=vision_output.hidden_states,
            vision_attentions=vision_output.attentions,
        )

    @torch.no_grad()
    def predict_confident(
        self,
        image_embeddings: torch.Tensor,
        input_points: torch.Tensor,
        pred_iou_thresh: float,
        input_labels: torch.Tensor | None = None,
        multimask_output: bool = True,
        shared: SharedImageDecoder | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The masks of `forward` whose predicted IoU is above a threshold. Scores are computed first, and the other masks
        are not upscaled.

        Args:
            image_embeddings (`torch.FloatTensor` of shape `(1, 256, H / 16, W / 16)`): Of one image.
            input_points (`torch.FloatTensor` of shape `(1, Q, P, 2)`): As in `forward`.
            pred_iou_thresh (`float`): Exclusive.
            input_labels (`torch.LongTensor` of shape `(1, Q, P)`, *optional*): As in `forward`.
            multimask_output (`bool`, defaults to `True`): As in `forward`.
            shared (`SharedImageDecoder`, *optional*): What `share_image` made of `image_embeddings`, which makes many
                prompts cheaper.

        Returns:
            which mask of which prompt is kept, bool `(Q, M)`; the K scores; the K masks' logits `(K, H / 4, W / 4)`.
        """
        prompts = self.encode_prompts(image_embeddings, input_points, input_labels)
        kept, scores, masks = self.mask_decoder.predict_confident(
            image_embeddings, *prompts, multimask_output, pred_iou_thresh, shared
        )
        return kept[0], scores, masks

    def share_image(self, image_embeddings: torch.Tensor) -> SharedImageDecoder | None:
        """
        What all prompts of one image `(1, 256, H / 16, W / 16)` have in common, computed once for many calls of
        `predict_confident` with it; None where that decoder does not apply, as on a GPU.
        """
        positions, _, _, dense_prompt_embeddings = self.encode_prompts(image_embeddings)
        return self.mask_decoder.share_image(image_embeddings, positions, dense_prompt_embeddings)

    def encode_prompts(
        self,
        image_embeddings: torch.Tensor,
        input_points: torch.Tensor | None = None,
        input_labels: torch.Tensor | None = None,
        input_boxes: torch.Tensor | None = None,
        input_masks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Arguments of `forward` -> what the mask decoder needs beside `image_embeddings`.

        Returns:
            `image_positional_embeddings` `[N, C]`, `sparse_prompt_embeddings` `[B, Q, T, C]`, `token_multiplicity`
            `[B, Q, T]` and `dense_prompt_embeddings` `[B or 1, Q or 1, N or 1, C]` or `None`.

        Raises:
            ValueError: if the prompts' shapes disagree, or if the model lacks a kind of prompt.
        """
        batch_size, grid_size = image_embeddings.shape[0], tuple(image_embeddings.shape[-2:])
        if input_points is not None and input_labels is None:
            input_labels = torch.ones_like(input_points[..., 0], dtype=torch.long)
        if input_masks is not None and input_masks.ndim == 3:
            input_masks = input_masks.unsqueeze(1)
        check_prompts(batch_size, input_points, input_labels, input_boxes, input_masks)

        patch_size = self.config.vision_config.patch_size
        sparse_prompt_embeddings, token_multiplicity, dense_prompt_embeddings = self.prompt_encoder(
            input_points,
            input_labels,
            input_boxes,
            input_masks,
            batch_size,
            grid_size,
            input_size=(patch_size * grid_size[0], patch_size * grid_size[1]),
        )
        dtype = self.mask_decoder.iou_token.weight.dtype
        positions = self.prompt_encoder.position_embedding.grid(*grid_size).to(image_embeddings.device, dtype)
        return positions, sparse_prompt_embeddings, token_multiplicity, dense_prompt_embeddings


def check_prompts(batch_size: int, points, labels, boxes, masks) -> None:
    """Raises a ValueError if the prompts' shapes do not fit each other or the batch."""
    wanted = {"input_points": (points, "(B, Q, P, 2)"), "input_boxes": (boxes, "(B, Q, 4)")}
    for name, (tensor, shape) in wanted.items():
        last = int(shape[-2])
        if tensor is not None and (tensor.ndim != shape.count(",") + 1 or tensor.shape[-1] != last):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {shape}. The processor makes it so.")
    if labels is not None and (points is None or labels.shape != points.shape[:-1]):
        raise ValueError(
            f"input_labels has shape {tuple(labels.shape)}; it must hold one label for each of input_points, "
            f"{None if points is None else tuple(points.shape[:-1])}."
        )
    given = {"input_points": points, "input_boxes": boxes, "input_masks": masks}
    given = {name: tuple(tensor.shape[:2]) for name, tensor in given.items() if tensor is not None}
    if masks is not None and masks.shape[1] == 1 and len(given) > 1:
        given["input_masks"] = (masks.shape[0], next(iter(given.values()))[1])  # one mask serves all prompts
    shapes = list(given.values())
    if any(shape[0] != batch_size or shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"The prompts must be for {batch_size} image(s) and the same number of prompts, but come as "
            f"(images, prompts) {given}. Pad with label -10, or boxes of -10; the processor does."
        )


__all__ = ["EfficientSamModel"]
