"""SAMI: pretraining EfficientSAM's encoder by reconstructing a foundation model's features from a few patches.

pixels -> patches -> drop most of them -> encoder -> decoder fills in the dropped ones -> all in image order -> head
-> loss against the teacher's features (or, for the baseline MAE, against the pixels)

Shape letters: B images, N patches, K kept ones, C channels.
Paper: EfficientSAM, arXiv 2312.00863, section 3.2; what it takes over comes from MAE, arXiv 2111.06377.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput
from transformers.utils.generic import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_sami import EfficientSamSamiConfig
from .configuration_vision_efficientsam import EfficientSamVisionConfig
from .modeling_vision_efficientsam import (
    EfficientSamMLP,
    EfficientSamPatchEmbeddings,
    EfficientSamPreTrainedModel,
    EfficientSamVisionAttention,
    EfficientSamVisionLayer,
    at_least_float32,
    check_kwargs,
    eager_attention_forward,
)


@dataclass
class EfficientSamMaskedVisionOutput(ModelOutput):
    """
    Output of the masked encoder.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, 1 + K, hidden_size)`): Class token and kept patches, in
            the order of the noise.
        mask (`torch.FloatTensor` of shape `(B, N)`): 1 for the patches that were removed, in image order.
        ids_restore (`torch.LongTensor` of shape `(B, N)`): For each patch in image order its place in the order of
            the noise: kept ones first, then removed ones.
        hidden_states (`tuple`, *optional*): Input of the first layer and output of each, `(B, 1 + K, hidden_size)`.
        attentions (`tuple`, *optional*): Attention weights of each layer, with eager attention.
    """

    last_hidden_state: torch.FloatTensor | None = None
    mask: torch.FloatTensor | None = None
    ids_restore: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class EfficientSamForPreTrainingOutput(ModelOutput):
    """
    Output of [`EfficientSamForPreTraining`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): Over all patches for features, over the removed ones for
            pixels; `None` where no target was given.
        reconstruction (`torch.FloatTensor` of shape `(B, N, target_size)`): In image order, row by row; of the
            normalised target if the config normalises it.
        mask (`torch.FloatTensor` of shape `(B, N)`): 1 for the patches that the encoder did not see.
        ids_restore (`torch.LongTensor` of shape `(B, N)`): See [`EfficientSamMaskedVisionOutput`].
        hidden_states (`tuple`, *optional*): The encoder's, with `output_hidden_states=True`.
        attentions (`tuple`, *optional*): The encoder's, with `output_attentions=True` and eager attention.
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    mask: torch.FloatTensor | None = None
    ids_restore: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def sincos_positions(
    height: int, width: int, channels: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """
    Fixed sines and cosines for the cells of a grid, `[height * width, channels]`: a quarter of the channels each for
    sin x, cos x, sin y and cos y, with wavelengths from 2 pi to 20000 pi cells (MAE, after arXiv 1706.03762).
    """
    rates = 10_000 ** (-torch.arange(channels // 4, device=device, dtype=dtype) / (channels // 4))
    x = torch.arange(width, device=device).repeat(height)[:, None] * rates
    y = torch.arange(height, device=device).repeat_interleave(width)[:, None] * rates
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)


class EfficientSamSamiPreTrainedModel(EfficientSamPreTrainedModel):
    """Weight initialisation as MAE's: xavier for all projections, sines and cosines for the encoder's positions."""

    config_class = EfficientSamSamiConfig
    base_model_prefix = ""
    # Not the patch embeddings: the class token's position is read outside their forward, where FSDP2, which shards
    # each of these by itself, would have it sharded.
    _no_split_modules = ["EfficientSamVisionLayer", "EfficientSamSamiDecoderLayer"]
    _auto_class = "AutoModelForPreTraining"
    _auto_classes = ("AutoModelForPreTraining",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, EfficientSamPatchEmbeddings):
            fan_in, fan_out = module.projection.weight[0].numel(), module.projection.out_channels
            bound = (6 / (fan_in + fan_out)) ** 0.5  # as the linear map of patches that it is
            init.uniform_(module.projection.weight, -bound, bound)
            table = sincos_positions(module.pretrain_grid, module.pretrain_grid, fan_out)
            init.copy_(module.position_embeddings, F.pad(table, (0, 0, 1, 0))[None])  # class token: zeros
        elif isinstance(module, EfficientSamMaskedVisionEncoder):
            init.normal_(module.cls_token, std=self.config.initializer_range)
        elif isinstance(module, EfficientSamSamiDecoder):
            init.normal_(module.mask_token, std=self.config.initializer_range)


class EfficientSamMaskedVisionEncoder(EfficientSamSamiPreTrainedModel):
    """
    The vision encoder without its neck, with a class token, over the patches that the noise keeps:
    `[B, 3, H, W]` -> `[B, 1 + K, hidden_size]`. Parameters have the names they have in [`EfficientSamModel`].
    """

    config_class = EfficientSamVisionConfig
    config: EfficientSamVisionConfig
    _can_record_outputs = {"hidden_states": EfficientSamVisionLayer, "attentions": EfficientSamVisionAttention}

    def __init__(self, config: EfficientSamVisionConfig):
        super().__init__(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.embeddings = EfficientSamPatchEmbeddings(config)
        self.layers = nn.ModuleList([EfficientSamVisionLayer(config, i) for i in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.projection  # FSDP2 shards what this returns by itself; see `_no_split_modules`

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor,
        num_kept: int,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EfficientSamMaskedVisionOutput:
        check_kwargs(kwargs)
        patches = self.embeddings(pixel_values)  # [B, N, C]
        ids_shuffle = noise.argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        kept = patches.take_along_dim(ids_shuffle[:, :num_kept, None], dim=1)  # [B, K, C]
        cls_token = self.cls_token + self.embeddings.position_embeddings[:, :1]
        hidden_states = torch.cat([cls_token.expand(len(kept), -1, -1), kept], dim=1)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        mask = (ids_restore >= num_kept).float()  # whatever the model's precision: its sum counts patches
        return EfficientSamMaskedVisionOutput(last_hidden_state=hidden_states, mask=mask, ids_restore=ids_restore)


class EfficientSamSamiAttention(nn.Module):
    """Multi-head attention of queries `[B, Q, C]` over a context `[B, T, C]`."""

    def __init__(self, config: EfficientSamSamiConfig):
        super().__init__()
        self.config = config
        width = config.decoder_hidden_size
        self.head_dim = width // config.decoder_num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(
        self, queries: torch.Tensor, context: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        query, key, value = (
            projection(tokens).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for projection, tokens in ((self.q_proj, queries), (self.k_proj, context), (self.v_proj, context))
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attend(self, query, key, value, None, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o_proj(output.reshape(queries.shape))


class EfficientSamSamiDecoderLayer(GradientCheckpointingLayer):
    """A pre-norm layer whose tokens `[B, Q, C]` attend to themselves and, where given, to memory `[B, T, C]`."""

    def __init__(self, config: EfficientSamSamiConfig):
        super().__init__()
        eps = config.vision_config.layer_norm_eps
        self.layernorm_before = nn.LayerNorm(config.decoder_hidden_size, eps=eps)
        self.attention = EfficientSamSamiAttention(config)
        self.layernorm_after = nn.LayerNorm(config.decoder_hidden_size, eps=eps)
        self.mlp = EfficientSamMLP(
            config.decoder_hidden_size, config.decoder_intermediate_size, config.vision_config.hidden_act
        )

    def forward(
        self, hidden_states: torch.Tensor, memory: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        queries = self.layernorm_before(hidden_states)
        context = queries if memory is None else torch.cat([self.layernorm_before(memory), queries], dim=1)
        hidden_states = hidden_states + self.attention(queries, context, **kwargs)
        return hidden_states + self.mlp(self.layernorm_after(hidden_states))


class EfficientSamSamiDecoder(nn.Module):
    """
    The decoder that only pretraining uses: encoder tokens `[B, 1 + K, hidden_size]` -> reconstruction
    `[B, N, target_size]`.

    With cross-attention (the paper's) the encoder's tokens do not change: mask tokens attend to them and to each
    other, and both are joined at the end. With `all_token` every token passes through every layer.
    """

    def __init__(self, config: EfficientSamSamiConfig):
        super().__init__()
        self.config = config
        vision, width = config.vision_config, config.decoder_hidden_size
        self.layernorm_before = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.projection = nn.Linear(vision.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        # Where nothing is removed, cross-attention has nothing to decode.
        idle = config.decoder_type == "cross_attention" and config.mask_ratio == 0
        num_layers = 0 if idle else config.decoder_num_hidden_layers
        self.layers = nn.ModuleList([EfficientSamSamiDecoderLayer(config) for _ in range(num_layers)])
        self.layernorm_after = nn.LayerNorm(width, eps=vision.layer_norm_eps)
        self.head = nn.Linear(width, config.target_size)

    def forward(
        self, encoded: torch.Tensor, ids_restore: torch.Tensor, height: int, width: int, **kwargs
    ) -> torch.Tensor:
        encoded = self.projection(self.layernorm_before(encoded))
        cls_token, kept = encoded.split([1, encoded.shape[1] - 1], dim=1)  # [B, 1, C], [B, K, C]
        num_removed = ids_restore.shape[1] - kept.shape[1]
        # Made on the device: a copy from the CPU would wait for the encoder.
        dtype = torch.promote_types(encoded.dtype, torch.float32)
        positions = sincos_positions(height, width, encoded.shape[2], encoded.device, dtype).to(encoded.dtype)
        positions = positions[ids_restore.argsort(dim=1)]  # [B, N, C] in the order of the noise
        positions_kept, positions_removed = positions.split([kept.shape[1], num_removed], dim=1)
        removed = self.mask_token + positions_removed
        if self.config.decoder_type == "cross_attention":
            memory = torch.cat([cls_token, kept + positions_kept], dim=1)
            for layer in self.layers:
                removed = layer(removed, memory, **kwargs)
            hidden_states = torch.cat([kept, removed], dim=1)
        else:
            hidden_states = torch.cat([cls_token, kept + positions_kept, removed], dim=1)
            for layer in self.layers:
                hidden_states = layer(hidden_states, **kwargs)
            hidden_states = hidden_states[:, 1:]
        hidden_states = hidden_states.take_along_dim(ids_restore[..., None], dim=1)  # image order
        return self.head(self.layernorm_after(hidden_states))


class EfficientSamForPreTraining(EfficientSamSamiPreTrainedModel):
    """
    Masked image pretraining of EfficientSAM's encoder: SAMI, its ablations, and MAE (see [`EfficientSamSamiConfig`]).

    A directory that it saved gives its encoder to [`EfficientSamModel`] and [`EfficientSamVisionModel`] through
    `from_pretrained`; class token and decoder are not used.
    """

    config: EfficientSamSamiConfig

    def __init__(self, config: EfficientSamSamiConfig):
        super().__init__(config)
        self.vision_encoder = EfficientSamMaskedVisionEncoder(config.vision_config)
        self.decoder = EfficientSamSamiDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_encoder.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        target_features: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EfficientSamForPreTrainingOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): Normalised pixels, H and W multiples of the
                patch size; N patches, row by row.
            target_features (`torch.FloatTensor` of shape `(B, N, target_size)`, *optional*): The teacher's features
                on the grid of the patches. Not for `target="pixels"`.
            noise (`torch.FloatTensor` of shape `(B, N)`, *optional*): The patches with the least noise are kept;
                drawn uniformly if not given.

        Returns:
            [`EfficientSamForPreTrainingOutput`]

        Raises:
            ValueError: if a shape does not fit, or no patch would be kept.
        """
        patch_size = self.config.vision_config.patch_size
        height, width = pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size
        num_patches = height * width
        num_kept = int(num_patches * (1 - self.config.mask_ratio) + 1e-6)  # 10 * (1 - 0.9) is 0.99...
        if num_kept == 0:
            raise ValueError(
                f"mask_ratio {self.config.mask_ratio} keeps none of {num_patches} patches; lower it, or enlarge the "
                "image."
            )
        check_kwargs(kwargs)
        if noise is None:
            noise = torch.rand(len(pixel_values), num_patches, device=pixel_values.device)
        elif noise.shape != (len(pixel_values), num_patches):
            raise ValueError(f"noise has shape {tuple(noise.shape)}; it must be {(len(pixel_values), num_patches)}.")
        for name in ("output_attentions", "output_hidden_states"):  # the encoder does not see this config
            kwargs.setdefault(name, getattr(self.config, name))
        encoded = self.vision_encoder(pixel_values, noise=noise, num_kept=num_kept, **kwargs)
        reconstruction = self.decoder(encoded.last_hidden_state, encoded.ids_restore, height, width, **kwargs)
        return EfficientSamForPreTrainingOutput(
            loss=self.loss(reconstruction, encoded.mask, self.target(pixel_values, target_features)),
            reconstruction=reconstruction,
            mask=encoded.mask,
            ids_restore=encoded.ids_restore,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def target(self, pixel_values: torch.Tensor, target_features: torch.Tensor | None = None) -> torch.Tensor | None:
        """
        What is to be reconstructed, at least in float32, `[B, N, target_size]`, normalised if the config says so, or
        `None`. A patch's pixels are ordered by channel, row, column.
        """
        patch_size = self.config.vision_config.patch_size
        if self.config.target == "pixels":
            if target_features is not None:
                raise ValueError("This model reconstructs pixels (config.target); call it without target_features.")
            target = F.unfold(pixel_values, kernel_size=patch_size, stride=patch_size).transpose(1, 2)
        elif target_features is None:
            return None
        else:
            num_patches = (pixel_values.shape[-2] // patch_size) * (pixel_values.shape[-1] // patch_size)
            expected = (len(pixel_values), num_patches, self.config.target_size)
            if target_features.shape != expected:
                raise ValueError(
                    f"target_features has shape {tuple(target_features.shape)}; it must be {expected}: images, "
                    "patches, target_size."
                )
            target = target_features
        target = at_least_float32(target)
        if self.config.target_normalization == "layer_norm":
            target = F.layer_norm(target, target.shape[-1:], eps=1e-6)
        return target

    def loss(
        self, reconstruction: torch.Tensor, mask: torch.Tensor, target: torch.Tensor | None
    ) -> torch.Tensor | None:
        if target is None:
            return None
        reconstruction = at_least_float32(reconstruction)
        if self.config.loss == "mse":
            losses = F.mse_loss(reconstruction, target, reduction="none").mean(-1)  # [B, N]
        else:
            losses = 1 - F.cosine_similarity(reconstruction, target, dim=-1)
        if self.config.target == "pixels":
            return (losses * mask).sum() / mask.sum()
        return losses.mean()


__all__ = [
    "EfficientSamForPreTraining",
    "EfficientSamForPreTrainingOutput",
    "EfficientSamMaskedVisionEncoder",
    "EfficientSamSamiPreTrainedModel",
]
