"""`training/average_models.py`, on tiny models."""

import pytest
import tiny
import torch
from script_runs import refuse, run

from hf_efficientsam import EfficientSamModel, EfficientSamProcessor


@pytest.fixture
def models(tiny_model, tmp_path):
    """Two directories of models that differ in their mask decoders alone."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        model = EfficientSamModel.from_pretrained(tiny_model)
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.mask_decoder.parameters():
                weight.normal_()
        model.save_pretrained(folder)
        EfficientSamProcessor.from_pretrained(tiny_model).save_pretrained(folder)
    return folders


def test_each_weight_is_the_mean_and_what_is_shared_keeps_its_bits(models, tmp_path):
    run("average_models", "--models", *models, "--output_dir", tmp_path / "average")
    first, second, average = (EfficientSamModel.from_pretrained(name) for name in [*models, tmp_path / "average"])
    for name, weight in average.state_dict().items():
        one, other = first.state_dict()[name], second.state_dict()[name]
        if name.startswith("mask_decoder."):
            assert not torch.equal(one, other)
        torch.testing.assert_close(weight, (one + other) / 2)
        assert name.startswith("mask_decoder.") or torch.equal(weight, one)
    own, first_own = (EfficientSamProcessor.from_pretrained(name) for name in (tmp_path / "average", models[0]))
    assert own.image_processor.to_dict() == first_own.image_processor.to_dict()


def test_bad_input_is_refused_in_one_sentence(models, tmp_path):
    deeper = tiny.save(tmp_path / "deeper", tiny.model(), tiny.processor())
    given = ["--models", models[0], deeper, "--output_dir", tmp_path / "average"]
    assert "is not of the same architecture as" in refuse("average_models", *given)
    assert "two or more" in refuse("average_models", "--models", models[0], "--output_dir", tmp_path / "average")
    assert "two or more" in refuse("average_models")
    assert "no such directory" in refuse("average_models", "--models", models[0], "./nothing", *given[-2:])
    assert not (tmp_path / "average").exists()
