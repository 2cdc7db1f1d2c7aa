import pytest
import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from hf_efficientsam import EfficientSamBackboneConfig


@pytest.fixture(scope="module")
def mask_former():
    torch.manual_seed(0)
    encoder = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "pretrain_image_size": 32}
    backbone = EfficientSamBackboneConfig(pyramid_strides=[4, 8, 16, 32], pyramid_channels=16, **encoder)
    widths = dict.fromkeys(("hidden_dim", "feature_size", "mask_feature_size"), 32)
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_feedforward_dim": 16, "dim_feedforward": 16}
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=backbone,
            num_attention_heads=2,
            num_queries=4,
            train_num_points=64,
            num_labels=3,
            **widths,
            **layers,
        )
    ).eval()
