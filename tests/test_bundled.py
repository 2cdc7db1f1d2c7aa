"""`bundled` is the checkpoint in the package wherever a command, a script or a benchmark takes a checkpoint's name."""

import importlib
from unittest.mock import Mock, patch

import pytest
import tiny
import torch
from commands import BOX, noise, run
from script_runs import ROOT, load_script

from hf_efficientsam import EfficientSamPredictor
from hf_efficientsam.demo.service import Demo
from hf_efficientsam.export import onnx_export, publish
from hf_efficientsam.inference import loading
from hf_efficientsam.inference.loading import load_model
from hf_efficientsam.inference.prompters import saliency_sources
from hf_efficientsam.training.masks.model_building import MaskModelConfig, build_model
from hf_efficientsam.training.masks.predictors import load_mask_predictor
from hf_efficientsam.training.sami.teachers import load_teacher


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """In the place of the one in the package, which is large."""
    width = {"hidden_size": 256}  # as wide as a new decoder
    model = tiny.model({"output_channels": 256}, width, width)
    folder = tiny.save(tmp_path_factory.mktemp("tiny"), model, tiny.processor())
    tiny.saliency_head(input_channels=256).save_pretrained(folder / "saliency")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (loading, saliency_sources):
            monkeypatch.setattr(module, "bundled_checkpoint", lambda: str(folder))
        yield folder


def weights_of(model: torch.nn.Module, part: str = "vision_encoder.") -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.state_dict().items() if name.startswith(part + "embeddings.")}


def command(*arguments):
    def call(folder):
        photo = folder / "photo.png"
        noise().save(photo)
        place = {"PHOTO": photo, "OUT": folder / "out"}
        result = run(*(place.get(argument, argument) for argument in arguments))
        assert result.exit_code == 0, result.output

    return call


def encoder_of(script: str, **options):
    """The encoder of what a script builds by `build_model`, with its configuration's other values as they are."""

    def call(folder):
        module = load_script(script)
        name = next(
            name for name in vars(module) if name.endswith("Config") and vars(module)[name].__module__ == script
        )
        config = vars(module)[name](encoder="bundled", **options)
        return (
            module.build_backbone(config) if script == "finetune_semantic" else module.build_model(config, ["a", "b"])
        )

    return call


def benchmark(folder):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("everything").load("bundled", 64)[0]


def publish_command(folder):
    with patch.object(publish, "verify_standalone"):
        return command("publish", "bundled", "org/name")(folder)


def first_loaded(module, call):
    """What `load_model` of a module loads first while `call` runs, which it ends."""

    class Loaded(Exception):
        pass

    def load(name):
        raise Loaded(name)

    def catch(folder):
        with patch.object(module(), "load_model", load), pytest.raises(Loaded) as loaded:
            call(folder)
        return load_model(str(loaded.value))[0]

    return catch


def evaluate_saliency(folder):
    script, config = load_script("evaluate_saliency"), Mock(model="bundled", limit=1)
    with patch.multiple(script, check=Mock(), open_annotations=Mock(return_value=[[None]])):
        script.evaluate(config)


def salient_predictor(folder):
    predictor = EfficientSamPredictor.from_pretrained("bundled")
    assert saliency_sources.load_saliency("bundled", predictor).head is not None
    return predictor.model


def bundle(folder):
    module = load_script("bundle_checkpoint")
    module.save_half_precision(module.BundleConfig(model="bundled"), folder)
    return load_model(str(folder))[0].half().float()


PLACES = {
    "segment": command("segment", "PHOTO", "--box", BOX, "--model", "bundled"),
    "salient": command("salient", "PHOTO", "--model", "bundled", "--saliency", "bundled", "--threshold", 0),
    "everything": command("everything", "PHOTO", "--output", "OUT", "--points-per-side", 1, "--model", "bundled"),
    "info": command("info", "bundled"),
    "publish": publish_command,
    "export-onnx": first_loaded(lambda: onnx_export, lambda folder: onnx_export.export_onnx("bundled", folder)),
    "demo": lambda folder: Demo("bundled").model,
    "load_saliency": salient_predictor,
    "finetune_masks --model": lambda folder: build_model(MaskModelConfig(model="bundled"), None, 0),
    "finetune_masks --encoder": lambda folder: build_model(MaskModelConfig(encoder="bundled"), None, 0),
    "finetune_classification": encoder_of("finetune_classification"),
    "finetune_semantic": encoder_of("finetune_semantic", size=64),
    "probe_encoder": lambda folder: load_script("probe_encoder").MeanPatch("bundled").model,
    "cache_features, sami": lambda folder: load_teacher("bundled"),
    "train_saliency": first_loaded(
        lambda: load_script("train_saliency"),
        lambda folder: load_script("train_saliency").get_data(load_script("train_saliency").SaliencyConfig(), "cpu"),
    ),
    "evaluate_saliency": first_loaded(lambda: load_script("evaluate_saliency"), evaluate_saliency),
    "evaluate_masks": lambda folder: load_mask_predictor("bundled", "cpu"),
    "evaluate_everything": lambda folder: load_script("evaluate_everything").load(Mock(model="bundled", device="cpu")),
    "benchmarks/everything": benchmark,
}


@pytest.mark.parametrize("place", PLACES)
def test_bundled_is_taken_and_is_the_checkpoint_in_the_package(place, checkpoint, tmp_path):
    found = PLACES[place](tmp_path)
    found = found[0] if isinstance(found, tuple) else getattr(found, "model", found)
    if isinstance(found, torch.nn.Module) and hasattr(found, "vision_encoder"):
        expected = weights_of(load_model(str(checkpoint))[0])
        assert expected and all(torch.equal(weights_of(found)[name], weight) for name, weight in expected.items())
