"""What holds for the image processor and the processor alike, as transformers' mixins check it."""

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 30, 41, 3), dtype=np.uint8)


class ProcessorTesterMixin:
    """A subclass says how to build its processor and which Auto class finds it."""

    auto_class = None

    def processor(self, **options):
        raise NotImplementedError

    def options(self, processor) -> dict:
        """The options of the image processor."""
        return getattr(processor, "image_processor", processor).to_dict()

    def test_saved_and_loaded_it_is_the_same(self, tmp_path):
        options = {"keep_aspect_ratio": True, "image_mean": (0.1, 0.2, 0.3)}
        processor = self.processor(**options)
        processor.save_pretrained(tmp_path)
        for loaded in (type(processor).from_pretrained(tmp_path), self.auto_class.from_pretrained(tmp_path)):
            assert type(loaded) is type(processor)
            assert self.options(loaded) == self.options(processor) == self.options(processor) | options
        assert self.options(type(processor).from_pretrained(tmp_path, do_normalize=False))["do_normalize"] is False
        assert json.loads(processor.to_json_string())

    def test_every_kind_of_image_gives_the_same(self):
        processor = self.processor()
        expected = processor([Image.fromarray(one) for one in PIXELS])
        tensors = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
        for images in (PIXELS, list(PIXELS), tensors, list(tensors)):
            inputs = processor(images)
            assert inputs.keys() == expected.keys() >= set(processor.model_input_names)
            assert all(torch.equal(inputs[name], expected[name]) for name in expected)
        alone = processor(Image.fromarray(PIXELS[0]))
        assert all(torch.equal(alone[name], expected[name][:1]) for name in expected)

    def test_options_of_a_call_are_for_that_call(self):
        processor = self.processor()
        before = self.options(processor)
        plain, other = processor(PIXELS), processor(PIXELS, do_normalize=False)
        assert other["pixel_values"].min() >= 0 > plain["pixel_values"].min()
        assert torch.equal(processor(PIXELS)["pixel_values"], plain["pixel_values"])
        assert self.options(processor) == before == self.options(self.processor())

    @pytest.mark.parametrize(
        ("return_tensors", "kind"), [(None, torch.Tensor), ("pt", torch.Tensor), ("np", np.ndarray)]
    )
    def test_tensors_or_arrays(self, return_tensors, kind):
        assert all(isinstance(one, kind) for one in self.processor()(PIXELS, return_tensors=return_tensors).values())


class TestImageProcessor(ProcessorTesterMixin):
    auto_class = AutoImageProcessor

    def processor(self, **options):
        return tiny.image_processor(**options)


class TestProcessor(ProcessorTesterMixin):
    auto_class = AutoProcessor

    def processor(self, **options):
        return tiny.processor(**options)
