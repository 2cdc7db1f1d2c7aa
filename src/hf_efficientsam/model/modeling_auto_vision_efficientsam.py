"""Any backbone of transformers or timm as the vision encoder: pixels -> backbone -> neck -> image embedding.

Shape letters: B images, C channels, N = h * w cells of the image embedding's grid.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.backbone_utils import load_backbone
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .configuration_vision_efficientsam import EfficientSamAutoVisionConfig, EfficientSamVisionConfig
from .modeling_vision_efficientsam import (
    EfficientSamPreTrainedModel,
    EfficientSamVisionEncoder,
    EfficientSamVisionNeck,
    EfficientSamVisionOutput,
    at_least_float32,
    check_kwargs,
)


class EfficientSamAutoVisionEncoder(EfficientSamPreTrainedModel):
    """
    A backbone and the plain encoder's neck: `[B, 3, H, W]` -> `[B, output_channels, H / 16, W / 16]`.

    The neck fuses the backbone's maps as a feature pyramid network does (arXiv 1612.03144): a 1 x 1 convolution of
    each, resized to the grid, and their sum; the plain encoder's normalisations and 3 x 3 convolution follow.
    EfficientViT-SAM (arXiv 2402.05008) fuses the last three stages so. Resizing and 1 x 1 convolutions commute, and a
    sum of these is one of all channels, so the maps are resized and concatenated, and the neck is the plain encoder's:

        sum_i W_i resize(map_i) = [W_1 ... W_n] [resize(map_1); ...; resize(map_n)]

    Attention in the backbone is of the kind that it knows best, or eager where the model's is. Another one has to be
    named: `attn_implementation={"vision_config": {"backbone_config": "flash_attention_2"}}`.

    Args:
        config ([`EfficientSamAutoVisionConfig`]): Of the encoder.

    Raises:
        ImportError: for a timm model, if timm cannot be imported.
        ValueError: for a timm model that takes images of one size alone.
    """

    config_class = EfficientSamAutoVisionConfig
    config: EfficientSamAutoVisionConfig

    def __init__(self, config: EfficientSamAutoVisionConfig):
        super().__init__(config)
        if config.backbone_config._attn_implementation == config._attn_implementation != "eager":
            config.backbone_config._attn_implementation = None  # not every backbone knows the model's
        try:
            self.backbone = load_backbone(config)
        except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises the latter
            if config.backbone_config.model_type != "timm_backbone":
                raise
            raise ImportError(
                f"The vision encoder is timm's {config.backbone_config.backbone}, and timm cannot be imported; "
                f"install timm and a torchvision that works with torch {torch.__version__}."
            ) from error
        timm_model = getattr(self.backbone, "_backbone", None)
        if timm_model is not None and timm_model.pretrained_cfg["fixed_input_size"]:
            raise ValueError(
                f"timm's {config.backbone_config.backbone} takes images of one size alone; choose a convolutional "
                "one, such as repvit_m1, or the configuration of a backbone of transformers, such as Dinov2Config."
            )
        self.neck = EfficientSamVisionNeck(sum(self.backbone.channels), config.output_channels, config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()

    def train(self, mode: bool = True):
        """
        As torch's, but frozen parts of the backbone stay in evaluation mode: their batch normalisations keep the
        statistics of pretraining, and nothing in them is random.
        """
        super().train(mode)
        for module in self.backbone.modules():
            weights = list(module.parameters())
            if weights and not any(weight.requires_grad for weight in weights):
                module.eval()
        return self

    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> EfficientSamVisionOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): Normalised pixels, H and W multiples of the
                config's `size_divisor`.

        Returns:
            [`EfficientSamVisionOutput`]; hidden states and attentions are of the backbone's own kind.

        Raises:
            ValueError: if the channels or the sides of `pixel_values` do not fit.
        """
        check_kwargs(kwargs)
        output = self.run_backbone(pixel_values, **kwargs)
        height, width = (side // self.config.patch_size for side in pixel_values.shape[-2:])
        return EfficientSamVisionOutput(
            last_hidden_state=self.neck(self.fuse(output.feature_maps, height, width), height, width),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def encode_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the neck reads, `[B, N, C]`, C being the channels of all maps."""
        height, width = (side // self.config.patch_size for side in pixel_values.shape[-2:])
        return self.fuse(self.run_backbone(pixel_values).feature_maps, height, width)

    def run_backbone(self, pixel_values: torch.Tensor, **kwargs) -> BackboneOutput:
        _, channels, height, width = pixel_values.shape
        divisor, fixed = self.config.size_divisor, self.config.fixed_size
        if channels != self.config.num_channels or height % divisor or width % divisor:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; it needs {self.config.num_channels} channels "
                f"and a height and width that are multiples of {divisor}. A processor with size_divisor={divisor} "
                "makes it so."
            )
        if fixed is not None and (height, width) != (fixed, fixed):
            raise ValueError(f"The backbone takes images of {fixed} x {fixed} pixels, and not of {height} x {width}.")
        return self.backbone.forward_with_filtered_kwargs(pixel_values.to(self.dtype), **kwargs)

    def fuse(self, feature_maps: tuple[torch.Tensor, ...], height: int, width: int) -> torch.Tensor:
        """Maps `[B, C_i, h_i, w_i]` -> tokens of the grid `[B, N, sum of C_i]`."""
        resized = [
            F.interpolate(at_least_float32(one), size=(height, width), mode="bilinear", antialias=True)
            for one in feature_maps
        ]
        return torch.cat(resized, dim=1).flatten(2).transpose(1, 2).to(self.dtype)


def make_vision_encoder(
    config: EfficientSamVisionConfig | EfficientSamAutoVisionConfig,
) -> EfficientSamVisionEncoder | EfficientSamAutoVisionEncoder:
    """The encoder of a configuration: the plain ViT, or one around another backbone."""
    # By name: in a Hub repository's copy, a configuration's class can be another copy's.
    if config.model_type == EfficientSamAutoVisionConfig.model_type:
        return EfficientSamAutoVisionEncoder(config)
    return EfficientSamVisionEncoder(config)


def install_hooks_outside_backbone(model: PreTrainedModel) -> None:
    """
    Prepares a model to record its outputs. transformers puts the hooks for that on a backbone when it is made, and a
    second time on all parts of a model around it, whose backbone would then return wrong maps.
    """
    if not isinstance(model.vision_encoder, EfficientSamAutoVisionEncoder):
        return
    encoder, model.vision_encoder = model.vision_encoder, nn.Identity()
    maybe_install_capturing_hooks(model)
    model.vision_encoder = encoder


__all__ = ["EfficientSamAutoVisionEncoder"]
