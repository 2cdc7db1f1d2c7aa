"""EfficientSAM's vision encoder: pixels -> patches -> vision layers -> neck -> image embedding.

Shape letters: B images, N = h * w grid cells, C channels. Grids are kept channel-last and flat, `[B, N, C]`, but for
the image embedding `[B, C, h, w]`.
Paper: EfficientSAM, arXiv 2312.00863.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput
from transformers.utils.generic import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .configuration_efficientsam import EfficientSamConfig
from .configuration_vision_efficientsam import EfficientSamVisionConfig
from .onednn_efficientsam import EfficientSamLinear, attention_forward, can_attend


@dataclass
class EfficientSamVisionOutput(ModelOutput):
    """
    Output of the vision encoder.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, output_channels, H / 16, W / 16)`): The image embedding.
        hidden_states (`tuple` of `torch.FloatTensor` of shape `(B, N, hidden_size)`, *optional*):
            The input of the first layer and the output of each, with `output_hidden_states=True`.
        attentions (`tuple` of `torch.FloatTensor` of shape `(B, heads, N, N)`, *optional*):
            Attention weights of each layer, with `output_attentions=True` and eager attention.
    """

    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32 if it is in half precision, else as it is: what loses digits or is slow in half."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T * scaling + mask) v on `[batch, heads, length, dim]`; returns `[batch, length, heads, dim]`."""
    weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = at_least_float32(weights).softmax(dim=-1).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def check_kwargs(kwargs: dict) -> None:
    """Raises a TypeError for arguments of a `forward` that would have no effect; `None` is no argument."""
    known = ("output_attentions", "output_hidden_states")
    if unknown := [name for name, value in kwargs.items() if name not in known and value is not None]:
        raise TypeError(f"forward() takes no {', '.join(unknown)}; leave it out, or correct its name.")


class EfficientSamPatchEmbeddings(nn.Module):
    """Pixels `[B, 3, H, W]` -> patch tokens with positions `[B, N, C]`, for any H and W that are multiples of 16."""

    def __init__(self, config: EfficientSamVisionConfig):
        super().__init__()
        self.num_channels, self.patch_size = config.num_channels, config.patch_size
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        # Row 0 belongs to the class token. A model without one keeps it, so that checkpoints are exchangeable.
        self.pretrain_grid = config.pretrain_image_size // config.patch_size
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + self.pretrain_grid**2, config.hidden_size))

    def interpolate_positions(self, height: int, width: int) -> torch.Tensor:
        """The position table `[1, height * width, C]` for a grid of `height` x `width` patches (bicubic)."""
        table = at_least_float32(self.position_embeddings[:, 1:])  # bicubic in half is slow or missing on CPU
        if (height, width) != (self.pretrain_grid, self.pretrain_grid):
            table = table.reshape(1, self.pretrain_grid, self.pretrain_grid, -1).permute(0, 3, 1, 2)
            table = F.interpolate(table, size=(height, width), mode="bicubic", align_corners=False)
            table = table.flatten(2).transpose(1, 2)
        return table.to(self.position_embeddings.dtype)

    def forward(self, pixel_values: torch.Tensor, cls_token: torch.Tensor | None = None) -> torch.Tensor:
        """With a class token `[1, 1, C]`, which comes first: `[B, 1 + N, C]`."""
        _, channels, height, width = pixel_values.shape
        if channels != self.num_channels or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; it needs {self.num_channels} channels and a "
                f"height and width that are multiples of {self.patch_size}. The processor makes it so."
            )
        patches = self.projection(pixel_values.to(self.projection.weight.dtype))  # [B, C, h, w]
        positions = self.interpolate_positions(*patches.shape[-2:])
        tokens = patches.flatten(2).transpose(1, 2) + positions
        if cls_token is None:
            return tokens
        cls_token = cls_token + self.position_embeddings[:, :1]
        return torch.cat([cls_token.expand(len(tokens), -1, -1), tokens], dim=1)


class EfficientSamVisionAttention(nn.Module):
    """Multi-head self-attention over `[B, N, C]`."""

    def __init__(self, config: EfficientSamVisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.q_proj = EfficientSamLinear(config.hidden_size, config.hidden_size)
        self.k_proj = EfficientSamLinear(config.hidden_size, config.hidden_size)
        self.v_proj = EfficientSamLinear(config.hidden_size, config.hidden_size)
        self.o_proj = EfficientSamLinear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        if self.config._attn_implementation == "sdpa" and not dropout and can_attend(query, key, value):
            attend = attention_forward
        output, weights = attend(self, query, key, value, None, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.o_proj(output.reshape(hidden_states.shape)), weights


class EfficientSamMLP(nn.Module):
    """Linear, activation, linear: `[..., hidden_size] -> [..., hidden_size]`."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str):
        super().__init__()
        self.fc1 = EfficientSamLinear(hidden_size, intermediate_size)
        self.activation = ACT2FN[hidden_act]
        self.fc2 = EfficientSamLinear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


def split_windows(tokens: torch.Tensor, grid_size: tuple[int, int], window_size: int) -> torch.Tensor:
    """
    Tokens of a grid `[B, N, C]` -> tokens of its windows `[B * windows, cells of a window, C]`. The grid is padded
    with zeros at the bottom and right to a whole number of windows; a side shorter than a window is one window.
    """
    height, width = grid_size
    tall, wide = min(window_size, height), min(window_size, width)
    grid = F.pad(tokens.unflatten(1, grid_size), (0, 0, 0, -width % wide, 0, -height % tall))
    windows = grid.unflatten(2, (-1, wide)).unflatten(1, (-1, tall)).transpose(2, 3)  # [B, rows, columns, ...]
    return windows.flatten(3, 4).flatten(0, 2)


def join_windows(windows: torch.Tensor, grid_size: tuple[int, int], window_size: int) -> torch.Tensor:
    """The inverse of `split_windows`: `[B * windows, cells of a window, C] -> [B, N, C]`, without the padding."""
    height, width = grid_size
    tall, wide = min(window_size, height), min(window_size, width)
    rows, columns = -(-height // tall), -(-width // wide)
    windows = windows.unflatten(1, (tall, wide)).unflatten(0, (-1, rows, columns)).transpose(2, 3)
    grid = windows.flatten(3, 4).flatten(1, 2)
    return grid[:, :height, :width].flatten(1, 2)


def drop_path(branch: torch.Tensor, rate: float) -> torch.Tensor:
    """
    Stochastic depth (arXiv 1603.09382) for a residual branch `[B, N, C]`: zero for a fraction `rate` of the images,
    which torch's generator draws, and larger by 1 / (1 - rate) for the others, so that the mean stays.
    """
    kept = torch.rand(len(branch), 1, 1, device=branch.device) >= rate
    return branch * (kept.to(branch.dtype) / (1 - rate))


class EfficientSamVisionLayer(GradientCheckpointingLayer):
    """
    A pre-norm transformer layer over `[B, N, C]`.

    Args:
        config ([`EfficientSamVisionConfig`]): Of the encoder.
        index (`int`): The layer's number, from 0. The rate of drop path grows linearly with it to the config's.
        window_size (`int`): Side in patches of the windows that attend each to itself, or 0 to attend everywhere.
            `forward` then needs the grid's size. The padding of the last windows is attended to, as in ViTDet (arXiv
            2203.16527): without a mask every attention backend works. There is none if the size divides the grid (16
            at 1024 pixels).
    """

    def __init__(self, config: EfficientSamVisionConfig, index: int = 0, window_size: int = 0):
        super().__init__()
        self.window_size = window_size
        self.drop_path_rate = config.drop_path_rate * index / max(config.num_hidden_layers - 1, 1)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = EfficientSamVisionAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = EfficientSamMLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(
        self,
        hidden_states: torch.Tensor,
        grid_size: tuple[int, int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        branch = self.layernorm_before(hidden_states)
        if self.window_size:
            branch = self.attention(split_windows(branch, grid_size, self.window_size), **kwargs)[0]
            branch = join_windows(branch, grid_size, self.window_size)
        else:
            branch = self.attention(branch, **kwargs)[0]
        hidden_states = hidden_states + self.drop_path(branch)
        return hidden_states + self.drop_path(self.mlp(self.layernorm_after(hidden_states)))

    def drop_path(self, branch: torch.Tensor) -> torch.Tensor:
        return drop_path(branch, self.drop_path_rate) if self.training and self.drop_path_rate else branch


class EfficientSamVisionNeck(nn.Module):
    """Patch tokens `[B, N, C]` -> map `[B, out_channels, h, w]`. No normalisation comes before it."""

    def __init__(self, in_channels: int, out_channels: int, layer_norm_eps: float):
        super().__init__()
        self.projection = EfficientSamLinear(in_channels, out_channels, bias=False)  # the 1 x 1 convolution
        self.layernorm1 = nn.LayerNorm(out_channels, eps=layer_norm_eps)
        self.conv = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.layernorm2 = nn.LayerNorm(out_channels, eps=layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        hidden_states = self.layernorm1(self.projection(hidden_states))
        grid = hidden_states.transpose(1, 2).unflatten(2, (height, width))  # [B, C, h, w]
        grid = self.conv(grid).permute(0, 2, 3, 1)
        return self.layernorm2(grid).permute(0, 3, 1, 2)


class EfficientSamPreTrainedModel(PreTrainedModel):
    """Weight initialisation, and what transformers needs to know about the family."""

    config_class = EfficientSamConfig
    config: EfficientSamConfig
    base_model_prefix = "efficientsam"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # transformers' Trainer passes a number of items to a model that uses it
    _no_split_modules = [
        "EfficientSamPatchEmbeddings",
        "EfficientSamVisionLayer",
        "EfficientSamPromptEncoder",
        "EfficientSamMaskDecoder",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _auto_class = "AutoModel"  # so that a saved folder holds the code, as after `register_for_auto_class`
    _auto_classes = ("AutoModel",)  # that load this class from a saved folder

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, dtype=None, **kwargs):
        """
        As transformers', but in float32 unless a `dtype` is given: checkpoints of the family are often stored in half
        precision, which is ten times slower on a CPU. `dtype="auto"` is what the checkpoint's config says. A pipeline
        that is given no `dtype` asks for "auto"; give it `dtype=None` or a dtype.
        """
        dtype = dtype or kwargs.pop("torch_dtype", None) or torch.float32  # torch_dtype: the name in transformers 4
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, dtype=dtype, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As transformers'. The folder also holds the code, for `trust_remote_code=True` without this package."""
        # transformers writes down one Auto class. Named anew each time, for a model that was itself loaded as remote
        # code would otherwise keep pointing at the repository it came from.
        module = type(self).__module__.split(".")[-1]
        self.config.auto_map = {name: f"{module}.{type(self).__name__}" for name in self._auto_classes}
        super().save_pretrained(save_directory, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, EfficientSamPatchEmbeddings):
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
        elif isinstance(module, EfficientSamTokenEncoder) and module.cls_token is not None:
            init.normal_(module.cls_token, std=self.config.initializer_range)


class EfficientSamVisionTransformer(EfficientSamPreTrainedModel):
    """
    Base of the encoders below: patch embeddings and layers, one for each of `window_sizes` (0 for global attention),
    or as many as the config says, all global.
    """

    config_class = EfficientSamVisionConfig
    config: EfficientSamVisionConfig
    _can_record_outputs = {"hidden_states": EfficientSamVisionLayer, "attentions": EfficientSamVisionAttention}

    def __init__(self, config: EfficientSamVisionConfig, window_sizes: list[int] | None = None):
        super().__init__(config)
        if window_sizes is None:
            window_sizes = config.num_hidden_layers * [0]
        self.embeddings = EfficientSamPatchEmbeddings(config)
        self.layers = nn.ModuleList(
            [EfficientSamVisionLayer(config, index, size) for index, size in enumerate(window_sizes)]
        )
        self.gradient_checkpointing = False

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings


class EfficientSamVisionEncoder(EfficientSamVisionTransformer):
    """Patch embeddings, transformer layers and neck: `[B, 3, H, W]` -> `[B, output_channels, H / 16, W / 16]`."""

    def __init__(self, config: EfficientSamVisionConfig):
        super().__init__(config)
        self.neck = EfficientSamVisionNeck(config.hidden_size, config.output_channels, config.layer_norm_eps)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> EfficientSamVisionOutput:
        check_kwargs(kwargs)
        hidden_states = self.embeddings(pixel_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        patch_size = self.config.patch_size
        height, width = pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size
        return EfficientSamVisionOutput(last_hidden_state=self.neck(hidden_states, height, width))


class EfficientSamTokenEncoder(EfficientSamVisionTransformer):
    """
    Patch embeddings and layers without the neck: `[B, 3, H, W]` -> tokens `[B, N, C]`, with a class token before them
    `[B, 1 + N, C]`. Only one without a class token can have windows.
    """

    def __init__(self, config: EfficientSamVisionConfig, with_cls_token: bool, window_sizes: list[int] | None = None):
        super().__init__(config, window_sizes)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if with_cls_token else None
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutput:
        check_kwargs(kwargs)
        patch_size = self.config.patch_size
        grid_size = (pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size)
        hidden_states = self.embeddings(pixel_values, self.cls_token)
        for layer in self.layers:
            hidden_states = layer(hidden_states, grid_size=grid_size, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class EfficientSamVisionModel(EfficientSamPreTrainedModel):
    """The vision encoder alone, with the parameter names it has inside [`EfficientSamModel`]."""

    config_class = EfficientSamVisionConfig
    config: EfficientSamVisionConfig

    def __init__(self, config: EfficientSamVisionConfig):
        super().__init__(config)
        self.vision_encoder = EfficientSamVisionEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_encoder.get_input_embeddings()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> EfficientSamVisionOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): Normalised pixels, H and W multiples of 16.

        Returns:
            [`EfficientSamVisionOutput`]

        Raises:
            ValueError: if the channels or the sides of `pixel_values` do not fit.
        """
        return self.vision_encoder(pixel_values, **kwargs)


__all__ = ["EfficientSamPreTrainedModel", "EfficientSamVisionEncoder", "EfficientSamVisionModel"]
