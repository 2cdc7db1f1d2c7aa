"""`training/finetune_masks.py --validation`: scores on other images while it trains, and the best model."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from script_runs import assert_equal, fork, kill_after_step_5, refuse, run

RECIPE = """
image_size: 64
max_masks: 3
global_batch_size: 4
steps: 6
warmup_steps: 0
learning_rate: 1e-2
ema_decay: 0.5
log_steps: 1
save_steps: 3
eval_steps: 2
num_workers: 0
"""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def given(recipe, coco, tiny_model):
    masks = coco / "masks.json"
    return ["--config", recipe, "--train", masks, masks, "--model", tiny_model]


@pytest.fixture(scope="module")
def whole(given, coco, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run("finetune_masks", *given, "--validation", coco / "masks.json", "--output_dir", folder)
    return folder


def scores(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]


def best_weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "best" / "model.safetensors")


def test_scores_are_the_evaluations_and_the_best_model_is_kept(whole, coco, tmp_path):
    rows = scores(whole)
    assert [row["step"] for row in rows] == [2, 4, 6]
    best = max(rows, key=lambda row: row["miou"])
    assert best["miou"] == pytest.approx((best["box"] + best["click1"] + best["click3"]) / 3)
    options = ["--annotations", coco / "masks.json", "--prompts", "box", "click1", "click3", "--num_workers", 0]
    run("evaluate_masks", "--model", whole / "best", *options, "--output", tmp_path / "scores.json")
    report = json.loads((tmp_path / "scores.json").read_text())
    kept = json.loads((whole / "best" / "metrics.json").read_text())
    assert kept["step"] == best["step"] and kept["masks"] == report["masks"] == 15
    for prompt in ("box", "click1", "click3"):
        (ours, theirs) = (one["results"][prompt]["confident"]["all"]["miou"] for one in (kept, report))
        assert best[prompt] == ours == pytest.approx(theirs, abs=1e-6)
    assert (whole / "evaluation.png").is_file()


def test_a_worse_model_does_not_take_the_best_ones_place(given, coco, tmp_path):
    """A learning rate that destroys what the first steps were."""
    options = ["--validation", coco / "masks.json", "--eval_steps", 1, "--ema_decay", 0, "--learning_rate", 0.3]
    run("finetune_masks", *given, *options, "--schedule", "constant", "--output_dir", tmp_path / "run")
    rows = scores(tmp_path / "run")
    best = max(rows, key=lambda row: row["miou"])
    kept = json.loads((tmp_path / "run" / "best" / "metrics.json").read_text())
    assert kept["step"] == best["step"] < rows[-1]["step"]
    last = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert any(not torch.equal(one, last[name]) for name, one in best_weights(tmp_path / "run").items())


def test_measuring_changes_nothing_of_the_training(given, whole, tmp_path):
    run("finetune_masks", *given, "--output_dir", tmp_path / "run")
    assert_equal(tmp_path / "run", whole)
    assert not (tmp_path / "run" / "best").exists()


def test_a_killed_and_resumed_run_ends_with_the_same_scores_and_the_same_best_model(given, whole, coco, tmp_path):
    options = [*given, "--validation", coco / "masks.json", "--output_dir", tmp_path / "run"]
    killed = fork("finetune_masks", *options, before=kill_after_step_5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [row["step"] for row in scores(tmp_path / "run")] == [2, 4]
    run("finetune_masks", *options)
    assert_equal(tmp_path / "run", whole)
    assert scores(tmp_path / "run") == scores(whole)
    ours, theirs = best_weights(tmp_path / "run"), best_weights(whole)
    assert all(torch.equal(ours[name], one) for name, one in theirs.items())


def test_two_processes_measure_what_one_does(given, whole, coco, tmp_path):
    options = [*given, "--validation", coco / "masks.json", "--output_dir", tmp_path / "run"]
    done = fork("finetune_masks", *options, processes=2)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(scores(tmp_path / "run"), scores(whole), strict=True):
        assert ours == pytest.approx(theirs, abs=0.02)
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()


def test_only_so_many_images_are_measured(given, coco, tmp_path):
    options = ["--validation", coco / "masks.json", "--validation_limit", 2, "--steps", 1]
    run("finetune_masks", *given, *options, "--output_dir", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["images"] == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--validation", "absent.json"], "absent.json"),
        (["--validation_images", "images"], "--validation_images are of --validation; give that, too."),
    ],
)
def test_what_cannot_be_measured_is_refused(given, tmp_path, options, sentence):
    assert sentence in refuse("finetune_masks", *given, *options, "--output_dir", tmp_path / "run")
