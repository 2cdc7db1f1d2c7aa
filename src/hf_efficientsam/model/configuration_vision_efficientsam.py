"""Configurations of the vision encoder: EfficientSAM's plain ViT, or any backbone of transformers or timm."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig


@strict
class EfficientSamVisionConfig(PreTrainedConfig):
    r"""
    The plain ViT that turns an image into an embedding grid, or with `num_labels` classes into scores:
    [`EfficientSamVisionModel`], [`EfficientSamForImageClassification`].

    Args:
        hidden_size (`int`, defaults to 192): Width of the transformer; 384 in EfficientSAM-S.
        intermediate_size (`int`, *optional*): Width inside the MLPs; four times `hidden_size` if not given.
        num_hidden_layers (`int`, defaults to 12): Number of transformer layers.
        num_attention_heads (`int`, defaults to 3): Attention heads a layer; 6 in EfficientSAM-S.
        num_channels (`int`, defaults to 3): Colour channels of the image.
        image_size (`int`, defaults to 1024):
            Native input side in pixels: what converted processors resize to. The model itself takes any height and
            width that are multiples of `patch_size`.
        patch_size (`int`, defaults to 16): Side of a patch in pixels.
        pretrain_image_size (`int`, defaults to 224):
            Side in pixels of the pretraining images, which fixes the position table to
            `1 + (pretrain_image_size / patch_size)**2` rows, the first of them the pretraining class token's.
        output_channels (`int`, defaults to 256): Channels of the image embedding.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLPs.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of every layer normalisation.
        attention_dropout (`float`, defaults to 0.0): Dropout of the attention weights in training.
        drop_path_rate (`float`, defaults to 0.0):
            Stochastic depth in training: the probability that a residual branch of the last layer is left out. It
            grows linearly over the layers, from 0 in the first.
        classifier_pooling (`str`, defaults to `"mean"`):
            What [`EfficientSamForImageClassification`] classifies: the `"mean"` of the patch tokens, or the class
            token (`"cls"`).
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.
    """

    base_config_key = "vision_config"
    model_type = "efficientsam_vision_model"
    _auto_class = "AutoConfig"

    hidden_size: int = 192
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 3
    num_channels: int = 3
    image_size: int = 1024
    patch_size: int = 16
    pretrain_image_size: int = 224
    output_channels: int = 256
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.0
    classifier_pooling: Literal["mean", "cls"] = "mean"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} cannot be split over {self.num_attention_heads} attention heads; "
                "choose num_attention_heads so that it divides hidden_size."
            )
        for name in ("image_size", "pretrain_image_size"):
            if getattr(self, name) % self.patch_size:
                raise ValueError(f"{name} {getattr(self, name)} must be a multiple of patch_size {self.patch_size}.")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate is {self.drop_path_rate}; it must be at least 0 and less than 1.")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if config_dict.get("model_type") == EfficientSamAutoVisionConfig.model_type:
            backbone = config_dict["backbone_config"]["model_type"]
            raise ValueError(
                f"Its vision encoder is not EfficientSAM's plain ViT but a {backbone} backbone; load the whole model "
                "with EfficientSamModel, or the backbone where it came from."
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def size_divisor(self) -> int:
        """What height and width of images must be multiples of."""
        return self.patch_size

    fixed_size = None  # as of [`EfficientSamAutoVisionConfig`]: the plain ViT takes all sizes


@strict
class EfficientSamAutoVisionConfig(PreTrainedConfig):
    r"""
    Any backbone of transformers or timm as the vision encoder of [`EfficientSamModel`], in place of the plain ViT.
    [`EfficientSamConfig`] makes it of a backbone's configuration.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of a model that `AutoBackbone` knows; its `out_features` are the maps that the neck fuses.
            The last three stages of ConvNeXt-T if not given.
        image_size (`int`, *optional*):
            Native input side in pixels, a multiple of `size_divisor`; the largest up to 1024 if not given. Hiera takes
            images of its own size alone, which then is this one.
        patch_size (`int`, defaults to 16): Side in pixels of a cell of the image embedding.
        size_divisor (`int`, *optional*):
            Height and width of images must be multiples of this, so that the maps cover the whole image: of
            `patch_size` and of the backbone's largest stride. If not given, that is 32, or a plain ViT's patch size.
        output_channels (`int`, defaults to 256): Channels of the image embedding.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of the neck's layer normalisations.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the neck's initial weights.
    """

    base_config_key = "vision_config"
    model_type = "efficientsam_auto_vision_model"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="convnext",
            init_kwargs={"out_features": ["stage2", "stage3", "stage4"]},
        )
    }

    backbone_config: dict | PreTrainedConfig | None = None
    image_size: int | None = None
    patch_size: int = 16
    size_divisor: int | None = None
    output_channels: int = 256
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if isinstance(self.backbone_config, dict) and self.backbone_config.get("model_type") not in CONFIG_MAPPING:
            raise ValueError(
                f"The backbone has the model type {self.backbone_config.get('model_type')!r}, which transformers does "
                "not know; give the configuration of one of its backbones, such as ConvNextConfig, or a timm name."
            )
        super().__post_init__(**kwargs)
        if not isinstance(self.backbone_config, BackboneConfigMixin):
            raise ValueError(
                f"{type(self.backbone_config).__name__} is not the configuration of a backbone; give one whose model "
                "AutoBackbone knows, such as ConvNextConfig or Dinov2Config, or a timm name."
            )
        if self.size_divisor is None:
            self.size_divisor = math.lcm(self.patch_size, 32 if self.is_pyramid else self.backbone_config.patch_size)
        if self.image_size is None:
            self.image_size = self.fixed_size or 1024 // self.size_divisor * self.size_divisor
        if self.fixed_size not in (None, self.image_size):
            raise ValueError(
                f"The backbone takes images of {self.fixed_size} x {self.fixed_size} pixels alone, and image_size is "
                f"{self.image_size}; set image_size and that of the backbone to one value."
            )
        if self.size_divisor % self.patch_size or self.image_size % self.size_divisor:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of size_divisor {self.size_divisor}, and that one "
                f"of patch_size {self.patch_size}."
            )

    @property
    def is_pyramid(self) -> bool:
        """Whether the stages of the backbone have different strides; those of a plain ViT have one."""
        config = self.backbone_config
        return hasattr(config, "depths") or not isinstance(getattr(config, "patch_size", None), int)

    @property
    def fixed_size(self) -> int | None:
        """The only side in pixels that the backbone takes; None where it takes any multiple of `size_divisor`."""
        if self.backbone_config.model_type != "hiera":
            return None
        height, width = self.backbone_config.image_size
        if height != width:
            raise ValueError(f"The backbone takes images of {height} x {width} pixels; give one for square images.")
        return height

    @property
    def num_channels(self) -> int:
        """Colour channels of the image."""
        return self.backbone_config.num_channels


__all__ = ["EfficientSamAutoVisionConfig", "EfficientSamVisionConfig"]
