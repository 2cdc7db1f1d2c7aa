"""Tiny promptable models of transformers, the peers of ours: random but seeded weights, images of 64 pixels."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    EdgeTamConfig,
    EdgeTamModel,
    EdgeTamVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2Model,
    Sam2VisionConfig,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    Sam3VisionConfig,
    Sam3ViTConfig,
    SamConfig,
    SamHQConfig,
    SamHQModel,
    SamModel,
)

SIZE = 64
CHANNELS = 32  # of the image embedding
LEVELS = [[16, 16], [8, 8], [4, 4]]  # of a feature pyramid
PARTS = {
    "prompt_encoder_config": {"hidden_size": CHANNELS, "image_size": SIZE, "mask_input_channels": 4},
    "mask_decoder_config": {
        "hidden_size": CHANNELS,
        "mlp_dim": 16,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    },
}
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE}
SAM_VISION = VIT | {"mlp_dim": 32, "output_channels": CHANNELS, "num_pos_feats": 16, "window_size": 2}


def sam() -> SamModel:
    return _seeded(SamModel, SamConfig(vision_config=SAM_VISION | {"global_attn_indexes": [1]}, **PARTS))


def sam_hq() -> SamHQModel:
    parts = PARTS | {"mask_decoder_config": PARTS["mask_decoder_config"] | {"vit_dim": 16}}
    return _seeded(SamHQModel, SamHQConfig(vision_config=SAM_VISION | {"global_attn_indexes": [1]}, **parts))


def sam2() -> Sam2Model:
    backbone = Sam2HieraDetConfig(
        hidden_size=8, image_size=[SIZE, SIZE], blocks_per_stage=[1, 1, 2, 1], embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2], window_size_per_stage=[4, 4, 4, 4], global_attention_blocks=[3],
        window_positional_embedding_background_size=[2, 2],
    )  # fmt: skip
    pyramid = {"backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": CHANNELS, "backbone_feature_sizes": LEVELS}
    return _seeded(Sam2Model, Sam2Config(vision_config=Sam2VisionConfig(backbone_config=backbone, **pyramid), **PARTS))


def sam3_tracker() -> Sam3TrackerModel:
    backbone = Sam3ViTConfig(
        **VIT, intermediate_size=32, patch_size=16, window_size=2, global_attn_indexes=[1], pretrain_image_size=SIZE
    )
    vision = Sam3VisionConfig(
        backbone_config=backbone,
        fpn_hidden_size=CHANNELS,
        backbone_feature_sizes=LEVELS,
        scale_factors=[4.0, 2.0, 1.0],
    )
    parts = PARTS | {"prompt_encoder_config": PARTS["prompt_encoder_config"] | {"patch_size": 16}}
    return _seeded(Sam3TrackerModel, Sam3TrackerConfig(vision_config=vision, **parts))


class PyramidConfig(PreTrainedConfig):
    model_type = "tiny_pyramid"


class Pyramid(PreTrainedModel):
    """Stands in for EdgeTAM's RepViT, which is timm's: convolutions with batch normalisation, four feature maps."""

    config_class = PyramidConfig

    def __init__(self, config: PyramidConfig):
        super().__init__(config)
        channels = [3, 8, 16, 32, 64]
        self.stages = nn.ModuleList()
        for i in range(4):
            stride = 2 if i else 4
            conv = nn.Conv2d(channels[i], channels[i + 1], stride, stride)
            self.stages.append(nn.Sequential(conv, nn.BatchNorm2d(channels[i + 1]), nn.GELU()))
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> SimpleNamespace:
        maps = [pixel_values]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return SimpleNamespace(last_hidden_state=maps[1:], hidden_states=None)


AutoConfig.register(PyramidConfig.model_type, PyramidConfig, exist_ok=True)
AutoModel.register(PyramidConfig, Pyramid, exist_ok=True)


def edgetam() -> EdgeTamModel:
    pyramid = {"backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": CHANNELS, "backbone_feature_sizes": LEVELS}
    vision = EdgeTamVisionConfig(backbone_config=PyramidConfig(), **pyramid)
    return _seeded(EdgeTamModel, EdgeTamConfig(vision_config=vision, **PARTS))


PEERS = {"sam": sam, "sam_hq": sam_hq, "sam2": sam2, "sam3_tracker": sam3_tracker, "edgetam": edgetam}

SQUASHED = {"size": {"height": SIZE, "width": SIZE}}
PADDED = {"size": {"longest_edge": SIZE}, "pad_size": {"height": SIZE, "width": SIZE}, "do_pad": True}
PROCESSORS = {
    "sam": PADDED | {"image_processor_type": "SamImageProcessor", "processor_class": "SamProcessor"},
    "sam_hq": PADDED | {"image_processor_type": "SamImageProcessor", "processor_class": "SamHQProcessor"},
    "sam2": SQUASHED | {"image_processor_type": "Sam2ImageProcessor", "processor_class": "Sam2Processor"},
    "sam3_tracker": SQUASHED
    | {"image_processor_type": "Sam3ImageProcessor", "processor_class": "Sam3TrackerProcessor"},
    "edgetam": SQUASHED | {"image_processor_type": "Sam2ImageProcessor", "processor_class": "Sam2Processor"},
}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def save(folder: Path, name: str) -> Path:
    """A checkpoint of a peer, with its processor's file as the Hub has it."""
    PEERS[name]().save_pretrained(folder)
    values = PROCESSORS[name] | (HALF if name == "sam3_tracker" else IMAGENET)
    values |= {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def _seeded(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind(config).eval()
