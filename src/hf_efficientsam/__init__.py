"""
EfficientSAM as a transformers model family. Importing this registers it with transformers' Auto classes.

Where torch or transformers is not installed there is [`EfficientSamOnnxPredictor`] all the same, for exported models.
"""

from importlib.util import find_spec

from .inference.onnx_predictor import EfficientSamOnnxPredictor
from .inference.results import SegmentationResult

__version__ = "0.1.0"

__all__ = [
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

if not (find_spec("torch") and find_spec("transformers")):

    def __getattr__(name: str):
        if name in __all__:
            raise ImportError(
                f"{name} needs torch and transformers; install them with pip install torch transformers."
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

else:
    from transformers import (
        AutoBackbone,
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
        AutoModelForMaskGeneration,
        AutoModelForPreTraining,
        AutoProcessor,
    )

    from .inference.loading import bundled_checkpoint
    from .inference.mask_generation import EfficientSamMaskGenerator
    from .inference.predictor import EfficientSamPredictor
    from .inference.prompters import RoughPrompter, SalientPrompter, TextPrompter
    from .model.configuration_efficientsam import (
        EfficientSamBackboneConfig,
        EfficientSamConfig,
        EfficientSamMaskDecoderConfig,
        EfficientSamPromptEncoderConfig,
        EfficientSamSaliencyConfig,
        EfficientSamSamiConfig,
        EfficientSamVisionConfig,
    )
    from .model.image_processing_efficientsam import EfficientSamImageProcessor
    from .model.modeling_backbone_efficientsam import EfficientSamBackbone
    from .model.modeling_classification_efficientsam import EfficientSamForImageClassification
    from .model.modeling_efficientsam import EfficientSamModel, EfficientSamPreTrainedModel, EfficientSamVisionModel
    from .model.modeling_saliency import EfficientSamSaliencyHead
    from .model.modeling_sami import EfficientSamForPreTraining
    from .model.processing_efficientsam import EfficientSamProcessor

    # What these save is a self-contained Hub repository: transformers copies the code of classes registered like this.
    for _class in (
        EfficientSamConfig,
        EfficientSamVisionConfig,
        EfficientSamBackboneConfig,
        EfficientSamSamiConfig,
        EfficientSamSaliencyConfig,
        EfficientSamModel,
        EfficientSamVisionModel,
        EfficientSamSaliencyHead,
        EfficientSamImageProcessor,
        EfficientSamProcessor,
    ):
        _class.register_for_auto_class()
    EfficientSamBackbone.register_for_auto_class("AutoBackbone")
    EfficientSamForImageClassification.register_for_auto_class("AutoModelForImageClassification")
    EfficientSamForPreTraining.register_for_auto_class("AutoModelForPreTraining")

    AutoConfig.register("efficientsam", EfficientSamConfig)
    AutoConfig.register("efficientsam_vision_model", EfficientSamVisionConfig)
    AutoConfig.register("efficientsam_backbone", EfficientSamBackboneConfig)
    AutoConfig.register("efficientsam_sami", EfficientSamSamiConfig)
    AutoConfig.register("efficientsam_saliency", EfficientSamSaliencyConfig)
    AutoModel.register(EfficientSamConfig, EfficientSamModel)
    AutoModel.register(EfficientSamVisionConfig, EfficientSamVisionModel)
    AutoModel.register(EfficientSamSaliencyConfig, EfficientSamSaliencyHead)
    AutoModelForImageClassification.register(EfficientSamVisionConfig, EfficientSamForImageClassification)
    AutoModelForMaskGeneration.register(EfficientSamConfig, EfficientSamModel)
    AutoModelForPreTraining.register(EfficientSamSamiConfig, EfficientSamForPreTraining)
    AutoBackbone.register(EfficientSamBackboneConfig, EfficientSamBackbone)
    for _class in (EfficientSamConfig, EfficientSamVisionConfig, EfficientSamBackboneConfig):
        AutoImageProcessor.register(_class, image_processor_classes={"pil": EfficientSamImageProcessor})
    AutoProcessor.register(EfficientSamConfig, EfficientSamProcessor)
