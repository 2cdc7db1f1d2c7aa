import pytest
import torch

from hf_efficientsam import EfficientSamConfig, EfficientSamModel


@pytest.fixture
def make_model():
    """A tiny model with random weights; `make_model(**prompt_encoder_config)`."""

    def make(**prompt_encoder):
        torch.manual_seed(0)
        vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_channels": 32}
        decoder = {"hidden_size": 32, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
        config = EfficientSamConfig(
            vision_config={**vision, "image_size": 64, "pretrain_image_size": 64},
            prompt_encoder_config={"hidden_size": 32, **prompt_encoder},
            mask_decoder_config={**decoder, "upscaling_channels": [8, 4]},
        )
        return EfficientSamModel(config)

    return make
