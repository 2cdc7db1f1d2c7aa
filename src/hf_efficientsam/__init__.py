"""
EfficientSAM as a transformers model family. Importing this registers it with transformers' Auto classes.

The import itself is quick: a public name is loaded when it is first used, and the family is registered when somebody
imports the Auto classes. Where torch or transformers is not installed there is [`EfficientSamOnnxPredictor`] all the
same, for exported models.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .model.auto_registration import register_when_imported

if TYPE_CHECKING:  # for editors and type checkers; `MODULES` below says the same
    from .inference.loading import bundled_checkpoint
    from .inference.mask_generation import EfficientSamMaskGenerator
    from .inference.onnx_predictor import EfficientSamOnnxPredictor
    from .inference.predictor import EfficientSamPredictor
    from .inference.prompters.rough import RoughPrompter
    from .inference.prompters.saliency import SalientPrompter
    from .inference.prompters.text import TextPrompter
    from .inference.results import SegmentationResult
    from .model.configuration_backbone_efficientsam import EfficientSamBackboneConfig
    from .model.configuration_efficientsam import (
        EfficientSamConfig,
        EfficientSamMaskDecoderConfig,
        EfficientSamPromptEncoderConfig,
    )
    from .model.configuration_saliency import EfficientSamSaliencyConfig
    from .model.configuration_sami import EfficientSamSamiConfig
    from .model.configuration_vision_efficientsam import EfficientSamAutoVisionConfig, EfficientSamVisionConfig
    from .model.image_processing_efficientsam import EfficientSamImageProcessor
    from .model.modeling_backbone_efficientsam import EfficientSamBackbone
    from .model.modeling_classification_efficientsam import EfficientSamForImageClassification
    from .model.modeling_efficientsam import EfficientSamModel
    from .model.modeling_saliency import EfficientSamSaliencyHead
    from .model.modeling_sami import EfficientSamForPreTraining
    from .model.modeling_vision_efficientsam import EfficientSamPreTrainedModel, EfficientSamVisionModel
    from .model.processing_efficientsam import EfficientSamProcessor

__version__ = "0.1.0"

__all__ = [
    "EfficientSamAutoVisionConfig",
    "EfficientSamBackbone",
    "EfficientSamBackboneConfig",
    "EfficientSamConfig",
    "EfficientSamForImageClassification",
    "EfficientSamForPreTraining",
    "EfficientSamImageProcessor",
    "EfficientSamMaskDecoderConfig",
    "EfficientSamMaskGenerator",
    "EfficientSamModel",
    "EfficientSamOnnxPredictor",
    "EfficientSamPreTrainedModel",
    "EfficientSamPredictor",
    "EfficientSamProcessor",
    "EfficientSamPromptEncoderConfig",
    "EfficientSamSaliencyConfig",
    "EfficientSamSaliencyHead",
    "EfficientSamSamiConfig",
    "EfficientSamVisionConfig",
    "EfficientSamVisionModel",
    "RoughPrompter",
    "SalientPrompter",
    "SegmentationResult",
    "TextPrompter",
    "bundled_checkpoint",
]

MODULES = {
    "EfficientSamAutoVisionConfig": "model.configuration_vision_efficientsam",
    "EfficientSamBackbone": "model.modeling_backbone_efficientsam",
    "EfficientSamBackboneConfig": "model.configuration_backbone_efficientsam",
    "EfficientSamConfig": "model.configuration_efficientsam",
    "EfficientSamForImageClassification": "model.modeling_classification_efficientsam",
    "EfficientSamForPreTraining": "model.modeling_sami",
    "EfficientSamImageProcessor": "model.image_processing_efficientsam",
    "EfficientSamMaskDecoderConfig": "model.configuration_efficientsam",
    "EfficientSamMaskGenerator": "inference.mask_generation",
    "EfficientSamModel": "model.modeling_efficientsam",
    "EfficientSamOnnxPredictor": "inference.onnx_predictor",
    "EfficientSamPreTrainedModel": "model.modeling_vision_efficientsam",
    "EfficientSamPredictor": "inference.predictor",
    "EfficientSamProcessor": "model.processing_efficientsam",
    "EfficientSamPromptEncoderConfig": "model.configuration_efficientsam",
    "EfficientSamSaliencyConfig": "model.configuration_saliency",
    "EfficientSamSaliencyHead": "model.modeling_saliency",
    "EfficientSamSamiConfig": "model.configuration_sami",
    "EfficientSamVisionConfig": "model.configuration_vision_efficientsam",
    "EfficientSamVisionModel": "model.modeling_vision_efficientsam",
    "RoughPrompter": "inference.prompters.rough",
    "SalientPrompter": "inference.prompters.saliency",
    "SegmentationResult": "inference.results",
    "TextPrompter": "inference.prompters.text",
    "bundled_checkpoint": "inference.loading",
}


def __getattr__(name: str):
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f".{MODULES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise ImportError(
            f"{name} needs torch and transformers; install them with pip install torch transformers."
        ) from None
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if find_spec("torch") and find_spec("transformers"):
    register_when_imported()
