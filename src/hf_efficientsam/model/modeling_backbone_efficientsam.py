"""EfficientSAM's encoder as a backbone for detection and segmentation: pixels -> layers -> feature maps.

Shape letters: B images, N cells of a grid, C channels.
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from .configuration_backbone_efficientsam import EfficientSamBackboneConfig
from .modeling_vision_efficientsam import EfficientSamPreTrainedModel, EfficientSamTokenEncoder, EfficientSamVisionNeck


class EfficientSamMapLayerNorm(nn.LayerNorm):
    """Layer normalisation over the channels of a map `[B, C, h, w]`."""

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        return super().forward(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class EfficientSamPyramidLevel(nn.Module):
    """The map `[B, hidden_size, h, w]` of stride 16 -> `[B, pyramid_channels, ...]` of stride 4, 8, 16 or 32."""

    def __init__(self, config: EfficientSamBackboneConfig, stride: int):
        super().__init__()
        channels, eps = config.hidden_size, config.layer_norm_eps
        half, quarter = channels // 2, channels // 4
        if stride == 4:
            double = nn.ConvTranspose2d(channels, half, kernel_size=2, stride=2)
            double_again = nn.ConvTranspose2d(half, quarter, kernel_size=2, stride=2)
            self.resize = nn.Sequential(double, EfficientSamMapLayerNorm(half, eps=eps), nn.GELU(), double_again)
        elif stride == 8:
            self.resize = nn.ConvTranspose2d(channels, half, kernel_size=2, stride=2)
        else:
            self.resize = nn.MaxPool2d(kernel_size=2, ceil_mode=True) if stride == 32 else nn.Identity()
        self.neck = EfficientSamVisionNeck({4: quarter, 8: half}.get(stride, channels), config.pyramid_channels, eps)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        grid = self.resize(grid)
        return self.neck(grid.flatten(2).transpose(1, 2), *grid.shape[-2:])


class EfficientSamFeaturePyramid(nn.Module):
    """
    ViTDet's simple feature pyramid (arXiv 2203.16527, section 3): the last map `[B, hidden_size, H / 16, W / 16]` ->
    one `[B, pyramid_channels, H / stride, W / stride]` for each stride, rounded up. Stride 64 is every second cell of
    32.
    """

    def __init__(self, config: EfficientSamBackboneConfig, strides: list[int]):
        super().__init__()
        self.strides = strides
        built = sorted({min(stride, 32) for stride in strides})
        self.levels = nn.ModuleDict({str(stride): EfficientSamPyramidLevel(config, stride) for stride in built})

    def forward(self, grid: torch.Tensor) -> list[torch.Tensor]:
        maps = {int(stride): level(grid) for stride, level in self.levels.items()}
        if 64 in self.strides:
            maps[64] = maps[32][..., ::2, ::2]
        return [maps[stride] for stride in self.strides]


class EfficientSamBackbone(BackboneMixin, EfficientSamPreTrainedModel):
    """
    The vision encoder as a backbone, for images of any size: the maps of chosen layers, or ViTDet's simple feature
    pyramid on the last one; with windowed attention if wanted. [`EfficientSamBackboneConfig`] has the choices.

    `from_pretrained` takes the encoder from its own directories and from those of [`EfficientSamForPreTraining`],
    [`EfficientSamModel`] and [`EfficientSamForImageClassification`]; neck, class token and heads are not used, pyramid
    and normalisations are new. Layers after the last one that is asked for are not built.

    Example:

    ```python
    >>> backbone = EfficientSamBackbone.from_pretrained("path/to/sami", pyramid_strides=[4, 8, 16, 32])
    >>> [tuple(feature_map.shape) for feature_map in backbone(pixel_values).feature_maps]  # of 512 x 512 pixels
    [(1, 256, 128, 128), (1, 256, 64, 64), (1, 256, 32, 32), (1, 256, 16, 16)]
    ```
    """

    config_class = EfficientSamBackboneConfig
    config: EfficientSamBackboneConfig
    _auto_class = "AutoBackbone"
    _auto_classes = ("AutoBackbone",)

    def __init__(self, config: EfficientSamBackboneConfig):
        super().__init__(config)
        stages = [config.stage_names.index(name) for name in config.out_features]
        # Which hidden states the maps are made of: 0 is the first layer's input.
        self.states = stages if config.pyramid_strides is None else [config.num_hidden_layers]
        depth = max(self.states) or 1
        self.vision_encoder = EfficientSamTokenEncoder(config, False, config.window_sizes[:depth])
        norms = self.states if config.apply_layernorm else []
        self.layernorms = nn.ModuleList([nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in norms])
        self.pyramid = None
        if config.pyramid_strides is not None:
            self.pyramid = EfficientSamFeaturePyramid(config, [config.pyramid_strides[stage] for stage in stages])
        channels = config.hidden_size if self.pyramid is None else config.pyramid_channels
        self.num_features = len(config.stage_names) * [channels]
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):  # of the pyramid: the encoder starts by itself
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_encoder.get_input_embeddings()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): Normalised pixels, H and W multiples of 16.

        Returns:
            `BackboneOutput` with `feature_maps`, one `(B, C, h, w)` for each of `out_features`, where C is in
            `channels`; `hidden_states` are tokens `(B, N, hidden_size)`, the attentions of a windowed layer those of
            its windows `(B * windows, heads, cells, cells)`.

        Raises:
            ValueError: if the channels or the sides of `pixel_values` do not fit.
        """
        output = self.vision_encoder(pixel_values, **kwargs)
        tokens = [output.hidden_states[state] for state in self.states]
        if self.config.apply_layernorm:
            tokens = [norm(state) for norm, state in zip(self.layernorms, tokens, strict=True)]
        height = pixel_values.shape[-2] // self.config.patch_size
        maps = [state.transpose(1, 2).unflatten(2, (height, -1)) for state in tokens]
        if self.pyramid is not None:
            maps = self.pyramid(*maps)
        return BackboneOutput(
            feature_maps=tuple(maps), hidden_states=output.hidden_states, attentions=output.attentions
        )


__all__ = ["EfficientSamBackbone"]
