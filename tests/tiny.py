"""
Tiny models, configurations, processors and inputs for tests, with random but seeded weights: milliseconds a forward.

`import tiny`, then `tiny.model()`. Every factory sets torch's seed, so two calls give the same weights, and takes
options of the configuration. Two sizes: the standard one has two layers in encoder and decoder; `ONE_LAYER_...` is
for tests that train or export.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from hf_efficientsam import (
    EfficientSamBackbone,
    EfficientSamBackboneConfig,
    EfficientSamConfig,
    EfficientSamForImageClassification,
    EfficientSamForPreTraining,
    EfficientSamImageProcessor,
    EfficientSamModel,
    EfficientSamProcessor,
    EfficientSamSaliencyConfig,
    EfficientSamSaliencyHead,
    EfficientSamSamiConfig,
    EfficientSamVisionConfig,
    EfficientSamVisionModel,
)

SIZE = 64  # pixels of a side of the models' input
CHANNELS = 32  # of the image embedding
VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": SIZE,
    "pretrain_image_size": SIZE,
    "output_channels": CHANNELS,
}
PROMPT_ENCODER = {"hidden_size": CHANNELS, "mask_input_channels": 8}
MASK_DECODER = {
    "hidden_size": CHANNELS,
    "num_attention_heads": 4,
    "mlp_dim": 48,
    "upscaling_channels": [16, 8],
    "iou_head_hidden_dim": 24,
}
EVERY_PROMPT = {"background_points": True, "mask_prompts": True}

ONE_LAYER_VISION = VISION | {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
ONE_LAYER_MASK_DECODER = {
    "hidden_size": CHANNELS,
    "num_attention_heads": 2,
    "mlp_dim": 16,
    "upscaling_channels": [8, 4],
    "iou_head_hidden_dim": 16,
}

SAMI_DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 20,
}


# --------------------------------------------------------------------------------------------------- segmentation


def config(vision=None, prompt_encoder=None, mask_decoder=None) -> EfficientSamConfig:
    """A model that takes every kind of prompt; each argument is a dict of changes to that part."""
    return EfficientSamConfig(
        vision_config=VISION | (vision or {}),
        prompt_encoder_config=PROMPT_ENCODER | EVERY_PROMPT | (prompt_encoder or {}),
        mask_decoder_config=MASK_DECODER | (mask_decoder or {}),
    )


def model(vision=None, prompt_encoder=None, mask_decoder=None) -> EfficientSamModel:
    """A model that takes every kind of prompt, ready to predict."""
    torch.manual_seed(0)
    return EfficientSamModel(config(vision, prompt_encoder, mask_decoder)).eval()


def official_model(**parts) -> EfficientSamModel:
    """A model of the official kind: foreground points and boxes, neither background points nor mask prompts."""
    return model(prompt_encoder={"background_points": False, "mask_prompts": False}, **parts)


def one_layer_model(**prompt_encoder) -> EfficientSamModel:
    """The smallest model, ready to train; it takes no more kinds of prompt than the options say."""
    torch.manual_seed(0)
    return EfficientSamModel(
        EfficientSamConfig(
            vision_config=ONE_LAYER_VISION,
            prompt_encoder_config={"hidden_size": CHANNELS, **prompt_encoder},
            mask_decoder_config=ONE_LAYER_MASK_DECODER,
        )
    )


def model_for_mask_generation(seed: int = 0) -> EfficientSamModel:
    """A model whose masks are large and small and whose scores differ, as "segment everything" needs them."""
    torch.manual_seed(seed)
    options = {"mlp_dim": 64, "iou_head_hidden_dim": 32}
    model = EfficientSamModel(
        EfficientSamConfig(
            vision_config={name: value for name, value in VISION.items() if name != "pretrain_image_size"},
            prompt_encoder_config={"hidden_size": CHANNELS, "position_init": "axes"},
            mask_decoder_config=MASK_DECODER | options,
        )
    ).eval()
    with torch.no_grad():
        for net in model.mask_decoder.hypernetworks:
            net.layers[-1].weight.mul_(20)
    return model


def image_processor(size=SIZE, **options) -> EfficientSamImageProcessor:
    """For inputs of the models here; `keep_aspect_ratio=True` and the like are options."""
    return EfficientSamImageProcessor(size=size, **options)


def processor(size=SIZE, **options) -> EfficientSamProcessor:
    """`image_processor(size, **options)` with prompts."""
    return EfficientSamProcessor(image_processor(size, **options))


def save(folder: Path, model: EfficientSamModel, processor: EfficientSamProcessor) -> Path:
    """A checkpoint of both in `folder`, which is returned."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_images(folder: Path, count: int, width: int, height: int) -> Path:
    """So many images of soft colours, each a pixel wider than the one before, in `folder`, which is returned."""
    for i in range(count):
        coarse = np.random.default_rng(i).integers(0, 256, (4, 5, 3), np.uint8)
        Image.fromarray(coarse).resize((width + i, height), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    return folder


# ----------------------------------------------------------------------------------------------------- other tasks


def vision_config(**options) -> EfficientSamVisionConfig:
    return EfficientSamVisionConfig(**VISION | options)


def vision_model(**options) -> EfficientSamVisionModel:
    torch.manual_seed(0)
    return EfficientSamVisionModel(vision_config(**options)).eval()


def backbone(**options) -> EfficientSamBackbone:
    torch.manual_seed(0)
    return EfficientSamBackbone(EfficientSamBackboneConfig(**VISION | {"pyramid_channels": 8} | options)).eval()


def classifier(**options) -> EfficientSamForImageClassification:
    """Five classes unless told otherwise."""
    torch.manual_seed(0)
    return EfficientSamForImageClassification(vision_config(**{"num_labels": 5} | options)).eval()


def sami_model(vision=None, **options) -> EfficientSamForPreTraining:
    """The target has 8 channels unless told otherwise; `vision` holds changes to the encoder."""
    torch.manual_seed(0)
    vision = VISION | {"output_channels": 256} | (vision or {})
    options = {"target_size": 8} | SAMI_DECODER | options
    return EfficientSamForPreTraining(EfficientSamSamiConfig(vision_config=vision, **options)).eval()


def saliency_head(**options) -> EfficientSamSaliencyHead:
    """For embeddings of the models here."""
    torch.manual_seed(0)
    options = {"input_channels": CHANNELS, "hidden_size": 24, "num_attention_heads": 3} | options
    return EfficientSamSaliencyHead(EfficientSamSaliencyConfig(**options)).eval()


def save_teacher(folder: Path, seed: int = 0, **options) -> Path:
    """A tiny random `Dinov2Model` for images of 56 pixels and its preprocessing; `options` of its config."""
    torch.manual_seed(seed)
    Dinov2Model(Dinov2Config(image_size=56, patch_size=14, **options)).save_pretrained(folder)
    values = {"size": 56, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder


def enlarge_weights(module: nn.Module, std: float = 0.3) -> None:
    """Draws all parameters anew from a wider distribution: attention is uneven and every layer shows in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=std, generator=generator)


# ---------------------------------------------------------------------------------------------------------- inputs


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    """Uniform in [0, scale), the same for the same shape."""
    return scale * torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def pixel_values(batch_size: int = 2, height: int = SIZE, width: int = 80) -> torch.Tensor:
    """`[B, 3, H, W]` as a processor makes them: 4 x 5 patches by default, so that height and width cannot be mixed."""
    return 4 * random(batch_size, 3, height, width) - 2
