"""
Registers the family with transformers' Auto classes, without importing them before somebody else does.

The Auto classes import torch, and registering a model imports its code: seconds that `import hf_efficientsam` and
`efficientsam --help` need not take. So the family is registered with each of transformers' `models/auto` modules when
that module is imported, or at once if it was imported before.
"""

import sys
import threading
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def register_configurations(auto: ModuleType) -> None:
    from .configuration_backbone_efficientsam import EfficientSamBackboneConfig
    from .configuration_efficientsam import EfficientSamConfig
    from .configuration_saliency import EfficientSamSaliencyConfig
    from .configuration_sami import EfficientSamSamiConfig
    from .configuration_vision_efficientsam import EfficientSamVisionConfig

    for config in (
        EfficientSamConfig,
        EfficientSamVisionConfig,
        EfficientSamBackboneConfig,
        EfficientSamSamiConfig,
        EfficientSamSaliencyConfig,
    ):
        auto.AutoConfig.register(config.model_type, config)


def register_models(auto: ModuleType) -> None:
    from .modeling_backbone_efficientsam import EfficientSamBackbone
    from .modeling_classification_efficientsam import EfficientSamForImageClassification
    from .modeling_efficientsam import EfficientSamModel
    from .modeling_saliency import EfficientSamSaliencyHead
    from .modeling_sami import EfficientSamForPreTraining
    from .modeling_vision_efficientsam import EfficientSamVisionModel

    for model in (
        EfficientSamModel,
        EfficientSamVisionModel,
        EfficientSamSaliencyHead,
        EfficientSamForImageClassification,
        EfficientSamForPreTraining,
        EfficientSamBackbone,
    ):
        for name in model._auto_classes:
            getattr(auto, name).register(model.config_class, model)


def register_image_processor(auto: ModuleType) -> None:
    from .configuration_backbone_efficientsam import EfficientSamBackboneConfig
    from .configuration_efficientsam import EfficientSamConfig
    from .configuration_vision_efficientsam import EfficientSamVisionConfig
    from .image_processing_efficientsam import EfficientSamImageProcessor

    for config in (EfficientSamConfig, EfficientSamVisionConfig, EfficientSamBackboneConfig):
        auto.AutoImageProcessor.register(config, image_processor_classes={"pil": EfficientSamImageProcessor})


def register_processor(auto: ModuleType) -> None:
    from .configuration_efficientsam import EfficientSamConfig
    from .processing_efficientsam import EfficientSamProcessor

    auto.AutoProcessor.register(EfficientSamConfig, EfficientSamProcessor)


REGISTER = {
    "transformers.models.auto.configuration_auto": register_configurations,
    "transformers.models.auto.modeling_auto": register_models,
    "transformers.models.auto.image_processing_auto": register_image_processor,
    "transformers.models.auto.processing_auto": register_processor,
}


class RegisterAfterImport(MetaPathFinder):
    """
    Finds modules of transformers and of this package as Python does, and calls the functions of `REGISTER` for those
    that have been imported once no such import is under way: transformers' modeling code imports the Auto classes in
    its midst, where a model's code could not be imported yet.
    """

    def __init__(self):
        self.waiting = [sys.modules[name] for name in REGISTER if name in sys.modules]
        self.imports = threading.local()  # .depth: how many are under way

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        watched = name.partition(".")[0] in ("transformers", __name__.partition(".")[0])
        spec = PathFinder.find_spec(name, path) if watched else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            self.imports.depth = getattr(self.imports, "depth", 0) + 1
            try:
                execute(module)
            finally:
                self.imports.depth -= 1
            if name in REGISTER:
                self.waiting.append(module)
            if not self.imports.depth:
                self.register()

        spec.loader.exec_module = execute_and_register  # each module has a loader of its own
        return spec

    def register(self) -> None:
        while self.waiting:
            module = self.waiting.pop()
            REGISTER[module.__name__](module)


def register_when_imported() -> None:
    """Registers the family with what is imported of the Auto classes, and with the rest when it is."""
    finder = RegisterAfterImport()
    finder.register()
    sys.meta_path.insert(0, finder)
