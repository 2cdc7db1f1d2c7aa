"""`training/finetune_classification.py`, run as a user does, with tiny models and a handful of images."""

import dataclasses
import json
import signal
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from script_runs import (
    TRAINING,
    assert_close,
    assert_equal,
    card_of,
    curve,
    fork,
    kill_after_step_5,
    load_script,
    refuse,
    run,
    steps_saved,
    stopped_after,
    weights,
)
from transformers import pipeline

from hf_efficientsam import (
    EfficientSamForImageClassification,
    EfficientSamForPreTraining,
    EfficientSamSamiConfig,
)
from hf_efficientsam.training import engine
from hf_efficientsam.training.data import classification as classification_data
from hf_efficientsam.training.engine.config import parse_config

SIZE = 32
# Epochs have 2 steps of 8 images, the run has 7 steps: checkpoints lie within epochs and between them.
RECIPE = f"""
size: {SIZE}
hidden_size: 24
num_attention_heads: 2
num_hidden_layers: 2
global_batch_size: 8
epochs: 3.5
warmup_epochs: 0.5
learning_rate: 3e-3
layer_decay: 0.9
ema_decay: 0.5
eval_batch_size: 3
eval_steps: 4
log_steps: 1
save_steps: 3
image_steps: 5
num_workers: 0
"""
COLORS = {"blue": (0, 0, 150), "green": (0, 150, 0), "red": (150, 0, 0)}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Classes that their colour tells apart: 18 images to train on, 8 to test."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, counts in {"train": (6, 6, 6), "test": (3, 3, 2)}.items():
        for (name, color), count in zip(COLORS.items(), counts, strict=True):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 100, (30 + i, 40, 3)) + np.array(color)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def shards(data, tmp_path_factory) -> Path:
    """The images to train on in three shards, and the names of their classes."""
    folder = tmp_path_factory.mktemp("shards")
    files = sorted((data / "train").rglob("*.png"))
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(shard, len(files), 3):
                number = folder / f"{i}.cls"
                number.write_text(str(list(COLORS).index(files[i].parent.name)))
                tar.add(files[i], f"{i}.png")
                tar.add(number, number.name)
    (folder / "names.txt").write_text("\n".join(COLORS))
    return folder


@pytest.fixture(scope="module")
def arguments(recipe, data) -> list:
    return ["--config", recipe, "--train", data / "train", "--test", data / "test"]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> Path:
    """The output folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run("finetune_classification", *arguments, "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A directory as `sami.py` leaves it."""
    torch.manual_seed(1)
    vision = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "pretrain_image_size": 64}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("pretrained")
    EfficientSamForPreTraining(EfficientSamSamiConfig(vision_config=vision, **decoder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("finetune_classification")


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


# -------------------------------------------------------------------------------------------- what it leaves


def test_a_run_leaves_a_model_metrics_curves_and_pictures(whole, data):
    assert card_of(whole).data.pipeline_tag == "image-classification"
    assert (whole / "model" / "metrics.json").read_text() == (whole / "metrics.json").read_text()
    model, info = EfficientSamForImageClassification.from_pretrained(whole / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.id2label == dict(enumerate(COLORS)) and model.config.image_size == SIZE
    averaged, last = (weights(whole)[f"{start}classifier.weight"] for start in ("", "checkpoint."))
    assert 0 < (averaged - last).abs().max() < 0.02
    rows = curve(whole)
    assert [row["step"] for row in rows] == list(range(1, 8)) and all(row["loss"] > 0 for row in rows)
    # A step of warm-up, then a cosine over six, whose zero comes after the last.
    cosine = [3e-3 * (1 + np.cos(np.pi * i / 6)) / 2 for i in range(6)]
    assert [row["lr"] for row in rows] == pytest.approx([1.5e-3, *cosine], rel=1e-5)
    evaluations = [json.loads(line) for line in (whole / "evaluation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in evaluations] == [4, 7]
    report = metrics(whole)
    assert {name: report[name] for name in evaluations[-1]} == evaluations[-1] and report["images"] == 8
    assert report["config"]["layer_decay"] == 0.9 and report["versions"].keys() >= {"torch", "kornia"}
    for name in ("curve.png", "evaluation.png"):
        assert (whole / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (whole / "images").iterdir()) == [f"classes_{n:08}.png" for n in (5, 7)]
    assert len(np.unique(np.array(Image.open(whole / "images" / "classes_00000007.png")))) > 50
    assert steps_saved(whole) == ["step_00000006", "step_00000007"]


def test_the_saved_model_says_what_was_measured(whole, data):
    files = sorted((data / "test").rglob("*.png"))
    said = pipeline("image-classification", model=str(whole / "model"), top_k=1)([str(path) for path in files])
    right = [answer[0]["label"] == path.parent.name for path, answer in zip(files, said, strict=True)]
    printed = run("finetune_classification", "--evaluate", whole / "model", "--test", data / "test").splitlines()[-3:]
    assert printed == [f"top1: {sum(right) / 8:.6g}", "top5: 1", "images: 8"]
    assert metrics(whole)["top1"] == sum(right) / 8 and metrics(whole)["top5"] == 1


def test_the_miniature_learns(tmp_path):
    recipe = TRAINING / "recipes" / "miniature" / "classification.yaml"
    run("finetune_classification", "--config", recipe, "--output_dir", tmp_path)
    assert metrics(tmp_path)["top1"] > 0.6  # one of four by chance


# ------------------------------------------------------------------------------------------------- exactness


@pytest.fixture(scope="module")
def skipping(arguments, tmp_path_factory) -> tuple[list, Path]:
    """A run whose layers skip images."""
    folder = tmp_path_factory.mktemp("skipping")
    arguments = [*arguments, "--drop_path", 0.4]
    run("finetune_classification", *arguments, "--output_dir", folder)
    return arguments, folder


def test_a_killed_and_resumed_run_ends_as_one_that_was_not(skipping, tmp_path):
    arguments, whole = skipping
    output = tmp_path / "run"
    killed = fork("finetune_classification", *arguments, "--output_dir", output, before=kill_after_step_5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert steps_saved(output) == ["step_00000003"] and [row["step"] for row in curve(output)] == [1, 2, 3, 4, 5]
    run("finetune_classification", *arguments, "--output_dir", output, "--num_workers", 1)
    assert_equal(output, whole)
    for name in ("evaluation.jsonl", "images/classes_00000007.png"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()


def test_a_finished_run_has_nothing_left_to_do(arguments, whole):
    before = (whole / "model" / "model.safetensors").read_bytes()
    assert "holds a finished run" in run("finetune_classification", *arguments, "--output_dir", whole)
    assert (whole / "model" / "model.safetensors").read_bytes() == before


def test_accumulated_gradients_are_those_of_the_whole_batch(arguments, whole, tmp_path):
    run("finetune_classification", *arguments, "--output_dir", tmp_path / "run", "--batch_size", 2)
    assert_close(tmp_path / "run", whole, curves=1e-4, values=1e-4)


def test_two_processes_agree_with_one(arguments, whole, tmp_path):
    output = tmp_path / "run"
    done = fork("finetune_classification", *arguments, "--output_dir", output, processes=2)
    assert done.returncode == 0, done.stderr
    assert_close(output, whole, curves=1e-4, values=1e-4)
    assert {name: metrics(output)[name] for name in ("top1", "top5", "images")} == {
        name: metrics(whole)[name] for name in ("top1", "top5", "images")
    }


def test_streamed_shards_resume_where_they_were(recipe, shards, data, tmp_path):
    given = ["--config", recipe, "--shards", f"{shards}/{{0..2}}.tar", "--class_names", shards / "names.txt"]
    given += ["--test", data / "test", "--epoch_images", 16, "--shuffle_buffer", 2, "--save_steps", 5]
    run("finetune_classification", *given, "--output_dir", tmp_path / "whole", "--num_workers", 2)
    stopped_after(5, tmp_path / "whole", tmp_path / "resumed")
    run("finetune_classification", *given, "--output_dir", tmp_path / "resumed", "--num_workers", 2)
    assert_equal(tmp_path / "resumed", tmp_path / "whole")


# ----------------------------------------------------------------------------------------------- what it takes


def test_a_dataset_and_shards_to_test(recipe, data, shards, tmp_path):
    features = Features({"image": ImageFeature(), "label": Value("string")})
    files = sorted((data / "train").rglob("*.png"))
    rows = {"image": list(map(str, files)), "label": [path.parent.name for path in files]}
    Dataset.from_dict(rows, features).save_to_disk(tmp_path / "dataset")
    given = ["--config", recipe, "--dataset", tmp_path / "dataset", "--epochs", 1]
    given += ["--test_shards", f"{shards}/{{0..2}}.tar", "--class_names", shards / "names.txt"]
    run("finetune_classification", *given, "--output_dir", tmp_path / "run")
    assert metrics(tmp_path / "run")["images"] == 18


def test_a_linear_probe_of_a_pretrained_encoder(arguments, pretrained, tmp_path):
    given = ["--encoder", pretrained, "--linear_probe", "true", "--pooling", "cls", "--epochs", 1]
    run("finetune_classification", *arguments, *given, "--output_dir", tmp_path)
    before = EfficientSamForPreTraining.from_pretrained(pretrained).vision_encoder.state_dict()
    after = EfficientSamForImageClassification.from_pretrained(tmp_path / "model")
    assert after.config.classifier_pooling == "cls" and before.keys() == after.vision_encoder.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in after.vision_encoder.state_dict().items())
    assert after.layernorm.weight.std() > 0 and after.classifier.bias.any()


def test_every_weight_of_a_pretrained_start_has_its_rate(script, pretrained):
    recipe = script.ClassificationConfig(encoder=str(pretrained), size=SIZE, learning_rate=1.0, layer_decay=0.5)
    model = script.build_model(recipe, list(COLORS))
    assert model.config.pretrain_image_size == 64 and model.training
    optimizer, _ = script.get_optimizer(recipe, model, steps=10, warmup_steps=1)
    rates = {id(parameter): group["initial_lr"] for group in optimizer.param_groups for parameter in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    expected = {"embeddings": 1 / 8, "cls_token": 1 / 8, "layers.0": 1 / 4, "layers.1": 1 / 2}
    assert found == {
        name: next((rate for part, rate in expected.items() if name.startswith(f"vision_encoder.{part}")), 1.0)
        for name in found
    }


REFUSALS = {
    "no data": ("--test TEST", "Give one of --train"),
    "nothing to test": ("--train TRAIN", "Give images to evaluate on"),
    "one class": ("--train TRAIN/red --test TEST", "at least two classes"),
    "other classes": ("--train TRAIN --test patterns", "The classes of the images to test are not those"),
    "no names": ("--shards 0.tar --test TEST", "give --class_names"),
    "odd batches": ("--train TRAIN --test TEST --global_batch_size 9", "9 at a time must be even"),
    "batches": ("--train TRAIN --test TEST --batch_size 3", "must be a multiple of --batch_size 3"),
    "no step": ("--train TRAIN --test TEST --epochs 0.2 --warmup_epochs 0", "is less than one step"),
    "all warm-up": ("--train TRAIN --test TEST --warmup_epochs 4", "must be less than --epochs"),
    "size": ("--train TRAIN --test TEST --size 40", "--size 40 must be a multiple"),
    "pooling": ("--train TRAIN --test TEST --pooling max", "--pooling: invalid choice: 'max'"),
    "magnitude": ("--train TRAIN --test TEST --rand_augment_magnitude 30", "must be from 1 to 29"),
    "share": ("--train TRAIN --test TEST --erasing 2", "--erasing is 2.0; it must be between 0 and 1"),
    "dropped": ("--train TRAIN --test TEST --drop_path 1", "it must be at least 0 and less than 1"),
    "frozen": ("--train TRAIN --test TEST --linear_probe true --drop_path 0.1", "leave --drop_path out"),
    "negative": ("--train TRAIN --test TEST --mixup -1", "must be 0 or more"),
    "no encoder": ("--train TRAIN --test TEST --encoder TEST", "cannot be loaded"),
    "no model": ("--evaluate TEST --test TEST", "cannot be loaded"),
    "no classifier": ("--evaluate WHOLE/model --test patterns", "is no classifier of the classes to test"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_train_is_refused_in_a_sentence(recipe, data, whole, tmp_path, case):
    words, sentence = REFUSALS[case]
    words = words.replace("TRAIN", str(data / "train")).replace("TEST", str(data / "test"))
    words = words.replace("WHOLE", str(whole)).split()
    said = refuse("finetune_classification", "--config", recipe, *words, "--output_dir", tmp_path / "run")
    assert said.startswith("finetune_classification: ") and sentence in said
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------- recipes


def test_every_option_is_read(script):
    paths = [script.__file__, classification_data.__file__, *Path(engine.__path__[0]).glob("*.py")]
    source = "".join(Path(path).read_text() for path in paths)
    names = [field.name for field in dataclasses.fields(script.ClassificationConfig)]
    readers = ("config", "options", "self")
    assert [name for name in names if not any(f"{reader}.{name}" in source for reader in readers)] == []


@pytest.mark.parametrize(
    "path",
    [*(TRAINING / "recipes/paper").glob("classification_*.yaml"), TRAINING / "recipes/miniature/classification.yaml"],
    ids=lambda path: path.stem,
)
def test_every_recipe_builds_its_model(script, path):
    recipe = parse_config(script.ClassificationConfig, "", ["--config", str(path)])
    script.check(recipe)
    with torch.device("meta"):
        model = script.build_model(dataclasses.replace(recipe, encoder=None), ["one", "other"])
    if not path.stem.endswith("_imagenet"):
        return
    width, heads = {"ti": (192, 3), "s": (384, 6), "b": (768, 12)}[path.stem.split("_")[1]]
    assert (model.config.hidden_size, model.config.num_attention_heads, model.config.num_hidden_layers) == (
        width,
        heads,
        12,
    )
    # The paper: 100 epochs, 5 of warm-up, batch 1024, 1e-3, layer decay but for Ti, label smoothing, mixup.
    assert (recipe.epochs, recipe.warmup_epochs, recipe.global_batch_size) == (100, 5, 1024)
    assert (recipe.learning_rate, recipe.weight_decay, recipe.size) == (1e-3, 0.05, 224)
    assert recipe.layer_decay == (1 if width == 192 else 0.75)
    assert (recipe.label_smoothing, recipe.mixup, recipe.crop_ratio, recipe.rand_augment) == (0.1, 0.8, 0.875, 2)
