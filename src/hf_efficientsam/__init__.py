"""EfficientSAM as a transformers model family. Importing this registers it with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForMaskGeneration,
    AutoProcessor,
)

from .configuration_efficientsam import (
    EfficientSamConfig,
    EfficientSamMaskDecoderConfig,
    EfficientSamPromptEncoderConfig,
    EfficientSamVisionConfig,
)
from .hub import bundled_checkpoint
from .image_processing_efficientsam import EfficientSamImageProcessor
from .modeling_efficientsam import EfficientSamModel, EfficientSamPreTrainedModel, EfficientSamVisionModel
from .processing_efficientsam import EfficientSamProcessor

__version__ = "0.1.0.dev0"

__all__ = [
    "EfficientSamConfig",
    "EfficientSamImageProcessor",
    "EfficientSamMaskDecoderConfig",
    "EfficientSamModel",
    "EfficientSamPreTrainedModel",
    "EfficientSamProcessor",
    "EfficientSamPromptEncoderConfig",
    "EfficientSamVisionConfig",
    "EfficientSamVisionModel",
    "bundled_checkpoint",
]

# What these save is a self-contained Hub repository: transformers copies the code of classes registered like this.
for _class in (
    EfficientSamConfig,
    EfficientSamVisionConfig,
    EfficientSamModel,
    EfficientSamVisionModel,
    EfficientSamImageProcessor,
    EfficientSamProcessor,
):
    _class.register_for_auto_class()

AutoConfig.register("efficientsam", EfficientSamConfig)
AutoConfig.register("efficientsam_vision_model", EfficientSamVisionConfig)
AutoModel.register(EfficientSamConfig, EfficientSamModel)
AutoModel.register(EfficientSamVisionConfig, EfficientSamVisionModel)
AutoModelForMaskGeneration.register(EfficientSamConfig, EfficientSamModel)
AutoImageProcessor.register(EfficientSamConfig, image_processor_classes={"pil": EfficientSamImageProcessor})
AutoProcessor.register(EfficientSamConfig, EfficientSamProcessor)
