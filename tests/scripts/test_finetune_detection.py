"""`training/finetune_detection.py` without torchvision, and its recipes; with torchvision, in a process of its own, by
`detection_with_torchvision.py`."""

import sys

import pytest
from installed import run_beside_torchvision
from script_runs import TRAINING, load_script, refuse, start

from hf_efficientsam.training.engine.config import parse_config


def test_without_torchvision_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for arguments in ([], ["--evaluate", "runs/detection/model", "--val", "my/instances.json"]):
        said = refuse("finetune_detection", *arguments)
        assert said.startswith("finetune_detection: Detection needs a torchvision that works with torch ")
        assert "pip install 'hf-efficientsam[detection]'" in said


@pytest.mark.slow
def test_a_broken_torchvision_is_named_before_transformers_fails_with_it(tmp_path):
    (tmp_path / "torchvision").mkdir()
    broken = 'raise RuntimeError("operator torchvision::nms does not exist")'
    (tmp_path / "torchvision" / "__init__.py").write_text(broken)
    done = start("finetune_detection", environment={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and not done.stdout
    assert "does not work with this torch (operator torchvision::nms does not exist); install" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seed", 1], "Give --train a COCO-style json, or --evaluate a model."),
        (["--evaluate", "model"], "--evaluate needs --val, a COCO-style json to measure AP on."),
        (["--image_size", 96], "--image_size 96 must be a multiple of 64, the coarsest stride."),
        (["--least_scale", 3], "--least_scale 3.0 must not be more than --greatest_scale 2.0."),
        (["--warmup_epochs", 100], "--warmup_epochs 100.0 must be less than --epochs 100."),
        (["--min_score", 1], "--min_score is 1.0; it must be at least 0 and less than 1."),
        (["--sampled_boxes", 0], "--sampled_boxes is 0; it must be more than 0."),
        (
            ["--train", "a.json", "--freeze_encoder", "true", "--drop_path", 0.1],
            "--freeze_encoder leaves the encoder as it is; leave --drop_path out.",
        ),
        (["--window_size", -1], "--window_size is -1; it must be 0 or more."),
    ],
)
def test_what_does_not_fit_is_refused(arguments, sentence):
    assert refuse("finetune_detection", *arguments) == f"finetune_detection: {sentence}"


@pytest.mark.parametrize(("size", "width"), [("ti", 192), ("s", 384), ("b", 768)])
def test_the_papers_recipes_are_the_papers(size, width):
    """arXiv 2312.00863 for the schedule, arXiv 2203.16527 for the rest."""
    script = load_script("finetune_detection")
    recipe = parse_config(
        script.DetectionConfig, "", ["--config", str(TRAINING / f"recipes/paper/detection_{size}_coco.yaml")]
    )
    assert (recipe.hidden_size, 64 * recipe.num_attention_heads, recipe.num_hidden_layers) == (width, width, 12)
    assert (recipe.image_size, recipe.epochs, recipe.warmup_epochs, recipe.global_batch_size) == (1024, 100, 10, 64)
    assert (recipe.learning_rate, recipe.weight_decay, recipe.layer_decay, recipe.drop_path) == (2e-4, 0.1, 0.7, 0.1)
    assert (recipe.window_size, recipe.pyramid_channels, recipe.anchor_scale, recipe.sampled_boxes) == (
        14,
        256,
        8,
        512,
    )
    assert (recipe.least_scale, recipe.greatest_scale, recipe.flip, recipe.freeze_encoder) == (0.1, 2, True, False)


@pytest.mark.slow
def test_with_torchvision(tmp_path):
    run_beside_torchvision("detection_with_torchvision.py", tmp_path)
