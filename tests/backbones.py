"""Tiny backbones of transformers, for encoders other than the plain ViT: milliseconds a forward."""

import tiny
import torch
from transformers import (
    ConvNextConfig,
    ConvNextV2Config,
    Dinov2Config,
    HieraConfig,
    PreTrainedConfig,
    PvtV2Config,
    ResNetConfig,
    SwinConfig,
)

from hf_efficientsam import EfficientSamConfig, EfficientSamModel

LAST_THREE = {"out_features": ["stage2", "stage3", "stage4"]}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [4, 6, 8, 10]} | LAST_THREE
ATTENTION = {"depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "embed_dim": 8, "image_size": [64, 64]} | LAST_THREE
PLAIN = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64}


def configs() -> dict[str, PreTrainedConfig]:
    """Pyramids of convolutions and of attention, and plain ViTs with patches of 16 and of 14 pixels."""
    heads = {"num_attention_heads": [1, 1, 2, 2]}
    return {
        "convnext": ConvNextConfig(**STAGES),
        "convnextv2": ConvNextV2Config(**STAGES),
        "resnet": ResNetConfig(embedding_size=4, layer_type="basic", **STAGES),
        "pvt_v2": PvtV2Config(**STAGES | {"hidden_sizes": [4, 6, 8, 16]}, **heads),
        "swin": SwinConfig(window_size=4, drop_path_rate=0.0, **ATTENTION | {"depths": [1, 1, 1, 2]}),  # one shifted
        "hiera": HieraConfig(**ATTENTION),
        "dinov2": Dinov2Config(patch_size=16, **PLAIN),
        "dinov2_14": Dinov2Config(patch_size=14, **PLAIN),
        "one stage": ConvNextConfig(**STAGES | {"out_features": ["stage3"]}),
    }


NAMES = list(configs())


def around(vision_config: dict) -> EfficientSamModel:
    """A model around an encoder, that takes every kind of prompt."""
    config = EfficientSamConfig(
        vision_config=vision_config,
        prompt_encoder_config=tiny.PROMPT_ENCODER | tiny.EVERY_PROMPT,
        mask_decoder_config=tiny.ONE_LAYER_MASK_DECODER,
    )
    return EfficientSamModel(config).eval()


def model(name: str = "convnext") -> EfficientSamModel:
    """Around the backbone of a name; for 64 pixels, or 112 of `dinov2_14`."""
    torch.manual_seed(0)
    vision_config = {
        "model_type": "efficientsam_auto_vision_model",
        "backbone_config": configs()[name].to_dict(),
        "image_size": 112 if name == "dinov2_14" else tiny.SIZE,
        "output_channels": tiny.CHANNELS,
    }
    return around(vision_config)
