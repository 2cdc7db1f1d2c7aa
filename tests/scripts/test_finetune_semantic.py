"""`training/finetune_semantic.py`, run as a user does, on tiny models and a handful of made-up images."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from script_runs import (
    TRAINING,
    assert_close,
    assert_equal,
    curve,
    fork,
    kill_after_step_5,
    load_script,
    refuse,
    run,
    steps_saved,
    stopped_after,
)

from hf_efficientsam import EfficientSamForPreTraining, EfficientSamSamiConfig
from hf_efficientsam.training.data.semantic import Shapes
from hf_efficientsam.training.engine.config import parse_config

STEPS = 7
# Epochs have 2 steps of 4 images: checkpoints lie within epochs and between them.
RECIPE = f"""
size: 64
min_scale: 0.6
hidden_size: 24
num_attention_heads: 2
num_hidden_layers: 2
width: 64
num_queries: 5
pixel_decoder_layers: 1
decoder_layers: 1
num_points: 32
global_batch_size: 4
steps: {STEPS}
warmup_steps: 2
learning_rate: 1e-3
ema_decay: 0.5
log_steps: 1
eval_steps: 4
save_steps: 3
image_steps: 5
num_workers: 0
"""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """9 made-up images, with a border that is no class; names one folder up."""
    folder, source = tmp_path_factory.mktemp("semantic"), Shapes(9, seed=0)
    (folder / "labels.json").write_text(json.dumps([*source.classes, "border"]))
    for kind in ("images", "labels"):
        (folder / "all" / kind).mkdir(parents=True)
    for index in range(len(source)):
        _, image, labels = source[index]
        labels[:9] = 4
        size = (96, 72) if index == 0 else (96, 96)
        image.resize(size).save(folder / "all" / "images" / f"{index}.jpg")
        Image.fromarray(labels).resize(size, Image.Resampling.NEAREST).save(folder / "all" / "labels" / f"{index}.png")
    return folder / "all"


@pytest.fixture(scope="module")
def arguments(recipe, images) -> list:
    return ["--config", recipe, "--train", images, "--test", images, "--ignore_label", 4]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The output folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run("finetune_semantic", *arguments, "--output_dir", folder)
    return folder


# -------------------------------------------------------------------------------------------- what it leaves


def test_a_run_leaves_a_model_metrics_curves_and_pictures(whole):
    rows = curve(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["loss"] > 0 for row in rows)
    assert [row["lr"] for row in rows] == pytest.approx(
        [1e-3 / 3, 2e-3 / 3, *(1e-3 * (left / 5) ** 0.9 for left in (5, 4, 3, 2, 1))], rel=1e-4
    )
    assert steps_saved(whole) == ["step_00000006", "step_00000007"]
    assert sorted(path.name for path in (whole / "images").iterdir()) == [f"classes_{n:08}.png" for n in (5, 7)]
    assert Image.open(whole / "images" / "classes_00000007.png").width > 3 * 256
    evaluations = [json.loads(line) for line in (whole / "evaluation.jsonl").read_text().splitlines()]
    metrics = json.loads((whole / "metrics.json").read_text())
    assert [row["step"] for row in evaluations] == [4, 7] and evaluations[1]["mean_iou"] == metrics["mean_iou"]
    assert list(metrics["class_iou"]) == Shapes.classes and metrics["images"] == 9
    assert metrics["config"]["size"] == 64 and "torch" in metrics["versions"]
    found = [iou for iou in metrics["class_iou"].values() if iou is not None]
    assert metrics["mean_iou"] == pytest.approx(sum(found) / len(found))


FRESH = """
import sys
import hf_efficientsam
from PIL import Image
from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation, pipeline

folder, image = sys.argv[1:]
model, info = Mask2FormerForUniversalSegmentation.from_pretrained(folder, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
assert type(model.model.pixel_level_module.encoder).__name__ == "EfficientSamBackbone"
assert list(model.config.id2label.values()) == ["ground", "disc", "square", "triangle"]
processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
segment = pipeline("image-segmentation", model=model, image_processor=processor)
found = segment(Image.open(image), subtask="semantic")
assert found and all(one["label"] in model.config.label2id for one in found)
print(model.class_predictor.weight.double().sum().item())
"""


def test_the_saved_folder_is_transformers_own_in_a_fresh_process(whole, images, tmp_path):
    (tmp_path / "fresh.py").write_text(FRESH)
    command = [sys.executable, tmp_path / "fresh.py", whole / "model", images / "images" / "1.jpg"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    weight = load_file(whole / "model" / "model.safetensors")["class_predictor.weight"]
    assert float(done.stdout) == pytest.approx(weight.double().sum().item())


def test_a_saved_model_is_evaluated_to_the_same_numbers(arguments, whole):
    said = run("finetune_semantic", *arguments, "--evaluate", whole / "model")
    metrics = json.loads((whole / "metrics.json").read_text())
    assert f"mean_iou: {metrics['mean_iou']:.6g}\n" in said and "IoU of disc: " in said
    slid = run("finetune_semantic", *arguments, "--evaluate", whole / "model", "--evaluation", "slide")
    assert "mean_iou: " in slid
    said = run("finetune_semantic", "--evaluate", whole / "model", "--test", arguments[3], code=2)
    assert said.splitlines()[-1].startswith("finetune_semantic: The classes of the images to test are not those of")


def test_a_finished_run_has_nothing_left_to_do(arguments, whole):
    before, rows = (whole / "model" / "model.safetensors").read_bytes(), curve(whole)
    assert "holds a finished run" in run("finetune_semantic", *arguments, "--output_dir", whole)
    assert (whole / "model" / "model.safetensors").read_bytes() == before and curve(whole) == rows


# ------------------------------------------------------------------------------------------------- exactness


def test_a_killed_and_resumed_run_ends_as_one_that_was_not(arguments, whole, tmp_path):
    output = tmp_path / "run"
    given = [*arguments, "--output_dir", output]
    killed = fork("finetune_semantic", *given, "--num_workers", 1, before=kill_after_step_5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert steps_saved(output) == ["step_00000003"] and [row["step"] for row in curve(output)] == [1, 2, 3, 4, 5]
    run("finetune_semantic", *given)
    assert_equal(output, whole)
    assert (output / "evaluation.jsonl").read_text() == (whole / "evaluation.jsonl").read_text()


def test_accumulated_gradients_are_those_of_the_whole_batch(arguments, whole, tmp_path):
    run("finetune_semantic", *arguments, "--output_dir", tmp_path / "run", "--batch_size", 1)
    assert_close(tmp_path / "run", whole, curves=1e-4, values=1e-4)


def test_two_processes_agree_with_one(arguments, whole, tmp_path):
    output = tmp_path / "run"
    done = fork("finetune_semantic", *arguments, "--output_dir", output, processes=2)
    assert done.returncode == 0, done.stderr
    assert_close(output, whole, curves=1e-4, values=1e-4)
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (output, whole))
    assert ours["images"] == theirs["images"] == 9
    assert ours["mean_iou"] == pytest.approx(theirs["mean_iou"], rel=1e-2)


def test_upernet_with_drop_path_resumes_exactly(arguments, tmp_path):
    given = [*arguments, "--head", "upernet", "--drop_path", 0.5, "--steps", 4, "--save_steps", 3]
    run("finetune_semantic", *given, "--output_dir", tmp_path / "whole")
    stopped_after(3, tmp_path / "whole", tmp_path / "resumed")
    run("finetune_semantic", *given, "--output_dir", tmp_path / "resumed")
    assert_equal(tmp_path / "resumed", tmp_path / "whole")
    said = run("finetune_semantic", *arguments, "--evaluate", tmp_path / "whole" / "model")
    assert f"mean_iou: {json.loads((tmp_path / 'whole' / 'metrics.json').read_text())['mean_iou']:.6g}\n" in said


# ----------------------------------------------------------------------------------------------- what it takes


def build(**options):
    script = load_script("finetune_semantic")
    recipe = script.SemanticConfig(
        size=64, width=32, num_queries=5, decoder_layers=1, pixel_decoder_layers=1, **options
    )
    return script.build_model(recipe, ["a", "b"])


@pytest.mark.parametrize("head", ["mask2former", "upernet"])
def test_a_pretrained_encoder(tmp_path, head):
    vision = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "pretrain_image_size": 48}
    pretrained = EfficientSamForPreTraining(EfficientSamSamiConfig(vision_config=vision))
    pretrained.save_pretrained(tmp_path / "sami")
    model = build(encoder=str(tmp_path / "sami"), head=head)
    backbone = model.backbone if head == "upernet" else model.model.pixel_level_module.encoder
    ours, theirs = backbone.state_dict(), pretrained.state_dict()
    names = [name for name in ours if name.startswith("vision_encoder.")]
    assert len(names) == len({name.split(".", 1)[1] for name in names}) > 30
    assert [name for name in names if not torch.equal(ours[name], theirs[name])] == []
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    pixel_values = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 3, 32, 64))).float()
    name = "logits" if head == "upernet" else "masks_queries_logits"
    with torch.no_grad():
        assert torch.equal(model.eval()(pixel_values)[name], again.eval()(pixel_values)[name])


def test_the_encoder_learns_at_a_tenth_and_its_first_layers_least():
    script, model = load_script("finetune_semantic"), build(hidden_size=24, num_attention_heads=2, num_hidden_layers=2)
    optimizer, _ = script.get_optimizer(script.SemanticConfig(layer_decay=0.8, learning_rate=1.0), model)
    rates = {id(parameter): group["initial_lr"] for group in optimizer.param_groups for parameter in group["params"]}
    names = ("layers.1.mlp.fc1.weight", "layers.0.mlp.fc1.weight", "embeddings.projection.weight")
    encoder = dict(model.model.pixel_level_module.encoder.vision_encoder.named_parameters())
    assert [rates[id(encoder[name])] for name in names] == pytest.approx([0.08, 0.064, 0.0512])
    assert rates[id(model.class_predictor.weight)] == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--global_batch_size", 64], "9 images are less than one step; lower --global_batch_size 64."),
        (["--size", 48], "--size 48 must be a multiple of 32."),
        (["--width", 40], "--width 40 must be a multiple of 32."),
        (["--max_scale", 0.5], "--max_scale 0.5 must not be less than --min_scale 0.6."),
        (["--head", "fcn"], "--head: invalid choice: 'fcn'"),
        (["--evaluation", "multi"], "--evaluation: invalid choice: 'multi'"),
        (["--steps", 0], "--steps is 0; it must be more than 0."),
        (["--drop_path", 1], "--drop_path is 1.0; it must be at least 0 and less than 1."),
        (["--seed", -1], "--seed is -1; it must be 0 or more."),
        (["--encoder", "absent"], "The encoder absent cannot be loaded"),
    ],
)
def test_what_cannot_train_is_refused(arguments, tmp_path, options, sentence):
    assert sentence in refuse("finetune_semantic", *arguments, *options, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_other_classes_to_test_and_another_run_are_refused(arguments, whole, tmp_path):
    given = [*arguments[:2], "--train", arguments[3], "--test", "shapes", "--output_dir", tmp_path / "run"]
    said = refuse("finetune_semantic", *given)
    assert said == "finetune_semantic: The classes of the images to test are not those of the images to train on."
    said = refuse("finetune_semantic", *arguments, "--output_dir", whole, "--weight_decay", 0.3)
    assert "another weight_decay; choose a new --output_dir" in said


@pytest.mark.parametrize(("size", "width", "heads"), [("ti", 192, 3), ("s", 384, 6), ("b", 768, 12)])
def test_the_papers_recipes_are_the_papers(size, width, heads):
    """arXiv 2312.00863 for the schedule, arXiv 2112.01527 for Mask2Former's own."""
    script = load_script("finetune_semantic")
    path = TRAINING / "recipes" / "paper" / f"semantic_{size}_ade20k.yaml"
    recipe = parse_config(script.SemanticConfig, "", ["--config", str(path)])
    assert (recipe.hidden_size, recipe.num_attention_heads, recipe.num_hidden_layers) == (width, heads, 12)
    assert (recipe.steps, recipe.global_batch_size, recipe.size, recipe.warmup_steps) == (160000, 16, 512, 0)
    assert (recipe.learning_rate, recipe.encoder_lr_scale, recipe.weight_decay) == (2e-4, 0.1, 0.05)
    assert (recipe.head, recipe.num_queries, recipe.decoder_layers, recipe.num_points) == (
        "mask2former",
        100,
        9,
        12544,
    )
    assert recipe.reduce_labels and recipe.max_grad_norm == 0.01 and recipe.schedule_power == 0.9


def test_the_miniature_runs_without_arguments_and_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("finetune_semantic")
    rows = curve(tmp_path / "runs/semantic_miniature")
    assert rows[-1]["loss"] < 0.85 * rows[0]["loss"]  # it falls by a quarter
    assert (tmp_path / "runs/semantic_miniature/model/preprocessor_config.json").is_file()
