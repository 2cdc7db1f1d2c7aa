"""On which device, and in which precision, a model runs: in Python and in the command."""

import logging

import numpy as np
import pytest
import tiny
import torch
from commands import assert_refused, noise, run

from hf_efficientsam import EfficientSamMaskGenerator, EfficientSamPredictor, RoughPrompter, SalientPrompter
from hf_efficientsam.inference.loading import find_device, load_model


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A checkpoint in half precision."""
    return tiny.save(tmp_path_factory.mktemp("half"), tiny.model().bfloat16(), tiny.processor())


def test_auto_takes_a_gpu_before_apples_and_that_before_the_cpu(monkeypatch):
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert find_device().type == expected
        if expected == "cpu":
            for absent in ("cuda", "cuda:1", "mps"):
                with pytest.raises(ValueError, match=r"finds no (cuda|mps) device here"):
                    find_device(absent)
    with pytest.raises(ValueError, match="not 'gpu'"):
        find_device("gpu")


def test_half_precision_is_computed_in_float32_on_a_cpu_and_one_line_says_so(half, caplog):
    with caplog.at_level(logging.INFO):
        assert load_model(str(half), device="cpu")[0].dtype == torch.float32
        assert not caplog.records  # float32 is what was asked for
        assert load_model(str(half), "auto", "cpu")[0].dtype == torch.float32
    (line,) = [record.getMessage() for record in caplog.records]
    assert "is in bfloat16" in line and "\n" not in line


def test_whoever_asks_for_half_precision_gets_it(half):
    predictor = EfficientSamPredictor.from_pretrained(str(half), device="cpu", dtype=torch.bfloat16)
    assert predictor.model.dtype == torch.bfloat16
    predictor.set_image(noise())
    masks, scores, _ = predictor.predict(box=np.array([10, 5, 50, 35]))
    assert masks.shape == (3, 40, 60) and np.isfinite(scores).all()
    assert predictor.to(torch.float32) is predictor
    assert predictor.model.dtype == predictor.features.dtype == torch.float32
    assert predictor.predict(box=np.array([10, 5, 50, 35]))[0].shape == (3, 40, 60)


def test_generator_and_prompters_load_a_checkpoint_by_its_name(half):
    options = {"device": "cpu", "dtype": torch.bfloat16}
    generator = EfficientSamMaskGenerator.from_pretrained(str(half), points_per_side=2, **options)
    assert generator.model.dtype == torch.bfloat16 and len(generator.point_grids[0]) == 4
    assert generator.to(torch.float32).model.dtype == torch.float32
    prompter = SalientPrompter.from_pretrained(str(half), saliency=lambda image: np.ones((4, 4)), **options)
    assert len(prompter(noise())) == 1
    prompter = RoughPrompter.from_pretrained(str(half), **options).to(torch.float32)
    assert prompter.predictor.model.dtype == torch.float32


@pytest.mark.parametrize("command", ["segment", "salient", "everything"])
def test_the_command_takes_device_and_precision(command, tiny_model, tmp_path):
    noise().save(tmp_path / "photo.png")
    options = {
        "segment": ["--point", "20,20"],
        "salient": ["--saliency", "none"],
        "everything": ["--output", tmp_path / "out", "--points-per-side", "2"],
    }[command]
    options = [tmp_path / "photo.png", *options, "--model", tiny_model]
    if not torch.backends.mps.is_available():
        assert_refused(run(command, *options, "--device", "mps"), "no mps device")
    if command != "salient":
        assert run(command, *options, "--device", "cpu", "--dtype", "bfloat16").exit_code == 0
    assert run(command, *options, "--device", "gpu").exit_code == 2
