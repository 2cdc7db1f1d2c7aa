"""
transformers' own test mixins on all models and both processors.

They are in no installed package but in transformers' source distribution; pytest does not collect this file by itself:

    pip download --no-binary :all: --no-deps transformers==5.23.0 && tar xf transformers-5.23.0.tar.gz
    pip install parameterized
    TRANSFORMERS_SOURCE=transformers-5.23.0 pytest tests/transformers_mixins.py

On two CPU cores that takes four minutes: 639 tests and 4721 subtests pass, and 452 are skipped by the mixins
themselves (accelerators, packages that are not installed, text, what a model does not have).

`BY_DESIGN` names the tests that do not apply, with the reason. In every run of the suite `test_modeling_common.py`
and `test_processing_common.py` check the same in a form that needs no source distribution.
"""

import copy
import os
import sys
import unittest
from pathlib import Path
from types import ModuleType

import tiny
import torch

from hf_efficientsam import (
    EfficientSamBackbone,
    EfficientSamBackboneConfig,
    EfficientSamForImageClassification,
    EfficientSamForPreTraining,
    EfficientSamImageProcessor,
    EfficientSamModel,
    EfficientSamProcessor,
    EfficientSamSaliencyHead,
    EfficientSamVisionModel,
)

B, N = 2, 16  # images, patches of each
PACKAGE = "transformers_tests"  # not `tests`, which is this folder


def add_module(name: str, **content) -> None:
    module = sys.modules[name] = ModuleType(name)
    module.__dict__.update({"__path__": []} | content)


# The distribution lacks some helpers of its own tests. What they would add needs exporters, text or the Hub.
add_module(PACKAGE, __path__=[str(Path(os.environ["TRANSFORMERS_SOURCE"]) / "tests")])
for part, name in (("exporters.test_export", "ExportTesterMixin"), ("generation.test_utils", "GenerationTesterMixin")):
    add_module(f"{PACKAGE}.{part.split('.')[0]}")
    add_module(f"{PACKAGE}.{part}", **{name: type(name, (), {})})
add_module("fetch_hub_objects_for_ci", url_to_local_path=lambda url: url)

from transformers_tests.test_backbone_common import BackboneTesterMixin  # noqa: E402
from transformers_tests.test_image_processing_common import (  # noqa: E402
    ImageProcessingTester,
    ImageProcessingTestMixin,
    prepare_image_inputs,
)
from transformers_tests.test_modeling_common import ModelTesterMixin  # noqa: E402
from transformers_tests.test_processing_common import ProcessorTesterMixin  # noqa: E402

PIXELS = {"pixel_values": tiny.pixel_values(B, tiny.SIZE, tiny.SIZE)}


class Mixin(ModelTesterMixin):
    """A subclass says its model's configuration and inputs. It answers itself what the mixin asks a `model_tester`."""

    config, inputs = None, PIXELS
    labels = {}  # with which there is a loss
    seq_length = N
    batch_size, num_hidden_layers, num_attention_heads, hidden_size = B, 2, 3, tiny.VISION["hidden_size"]
    image_size, patch_size, num_channels = tiny.SIZE, 16, 3
    is_training = False  # whether the model computes a loss
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = self

    def get_config(self):
        return type(self.config).from_dict(self.config.to_dict())

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), copy.deepcopy(self.inputs)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        return copy.deepcopy(inputs_dict | (self.labels if return_labels else {}))

    def test_model_get_set_embeddings(self):
        """The mixin wants an `nn.Embedding` and sets another. transformers' own vision models replace it too."""
        model = self.all_model_classes[0](self.get_config())
        assert model.get_input_embeddings() in set(model.modules())
        assert model.get_output_embeddings() is None


class ModelTest(Mixin, unittest.TestCase):
    all_model_classes = (EfficientSamModel,)
    config = tiny.config()
    inputs = PIXELS | {
        "input_points": tiny.random(B, 3, 2, 2, scale=60),
        "input_labels": torch.tensor([1, 0]).expand(B, 3, 2),
    }


class VisionModelTest(Mixin, unittest.TestCase):
    all_model_classes = (EfficientSamVisionModel,)
    config = tiny.vision_config()


class ImageClassificationTest(Mixin, unittest.TestCase):
    all_model_classes = (EfficientSamForImageClassification,)
    config = tiny.vision_config(num_labels=5)
    labels, is_training = {"labels": torch.arange(B)}, True
    seq_length = 1 + N


class BackboneTest(Mixin, BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (EfficientSamBackbone,)
    config_class = EfficientSamBackboneConfig
    config = tiny.backbone().config


class PreTrainingTest(Mixin, unittest.TestCase):
    all_model_classes = (EfficientSamForPreTraining,)
    config = tiny.sami_model().config
    inputs = PIXELS | {"target_features": tiny.random(B, N, 8), "noise": tiny.random(B, N)}
    is_training = True
    seq_length = 1 + N // 4  # a quarter of the patches is seen


class SaliencyHeadTest(Mixin, unittest.TestCase):
    all_model_classes = (EfficientSamSaliencyHead,)
    config = tiny.saliency_head().config
    inputs = {"image_embeddings": tiny.random(B, tiny.CHANNELS, 4, 4)}
    labels, is_training = {"labels": tiny.random(B, tiny.SIZE, tiny.SIZE)}, True
    seq_length = N // 4  # the layers see half the resolution


class ImageTester(ImageProcessingTester):
    size = {"height": 20, "width": 20}

    def _get_image_processing_classes(self):
        return {"pil": EfficientSamImageProcessor}

    def prepare_image_processor_dict(self):
        return {"size": self.size, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5] * 3}

    def expected_output_image_shape(self, images):
        return 3, 32, 32  # padded to a multiple of the patch size

    def prepare_image_inputs(self, equal_resolution=False, numpify=False, torchify=False):
        sizes = {"min_resolution": self.min_resolution, "max_resolution": self.max_resolution}
        kinds = {"equal_resolution": equal_resolution, "numpify": numpify, "torchify": torchify}
        return prepare_image_inputs(self.batch_size, num_channels=self.num_channels, **sizes, **kinds)


class ImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageTester
    test_cast_dtype = True


class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = EfficientSamProcessor

    @classmethod
    def _setup_image_processor(cls):
        return tiny.image_processor()


SAM_FIELDS = "hidden states and attentions are in SamModel's fields, `vision_...`; its tests replace this one too"
BY_DESIGN = {
    (ModelTest, "test_attention_outputs"): SAM_FIELDS,
    (ModelTest, "test_hidden_states_output"): SAM_FIELDS,
    (ModelTest, "test_retain_grad_hidden_states_attentions"): SAM_FIELDS,
    (ModelTest, "test_init_weights_can_init_buffers"): "the buffer of the position embedding is drawn at random",
    (BackboneTest, "test_retain_grad_hidden_states_attentions"): "the first output is a tuple of maps, not a tensor",
    (ImageProcessingTest, "test_call_numpy_4_channels"): "the models take three channels; others are refused",
    (ImageProcessingTest, "test_new_models_require_torchvision_backend"): "the package works without torchvision",
}
for test_class, test in BY_DESIGN:
    setattr(test_class, test, None)
# A saved folder of ours names the code that it carries (`auto_map`). Transformers' own classes carry none.
for carried in (EfficientSamImageProcessor, EfficientSamProcessor):
    carried._auto_class = None
