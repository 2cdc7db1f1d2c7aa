"""`training/finetune_masks.py` with a teacher in the loop of prompts, and on a teacher's pseudo-labels."""

import json

import commands
import pytest
import tiny
from script_runs import assert_equal, curve, refuse, run, stopped_after

from hf_efficientsam.training.data.coco import CocoMasks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
RECIPE = """
image_size: 64
views: 2
crop_scale: 1
flip: false
color_jitter: 0
global_batch_size: 4
max_masks: 3
steps: 7
warmup_steps: 1
learning_rate: 3e-3
correction_probability: 1
log_steps: 1
save_steps: 3
image_steps: 100
num_workers: 0
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A model whose masks are neither empty nor all of the image, at twice the student's size."""
    folder, size = tmp_path_factory.mktemp("teacher"), 2 * tiny.SIZE
    return tiny.save(folder, tiny.model_for_mask_generation(1), tiny.processor(size))


@pytest.fixture(scope="module")
def arguments(recipe, coco, tiny_model, teacher) -> list:
    masks = coco / "masks.json"
    return ["--config", recipe, "--train", masks, masks, "--model", tiny_model, "--teacher", teacher]


@pytest.fixture(scope="module")
def whole(arguments, teacher, tmp_path_factory):
    """The output folder of a run that nothing interrupted."""
    before = {path.name: path.read_bytes() for path in teacher.iterdir()}
    folder = tmp_path_factory.mktemp("whole")
    run("finetune_masks", *arguments, "--output_dir", folder)
    assert {path.name: path.read_bytes() for path in teacher.iterdir()} == before
    return folder


def test_the_student_learns_the_teachers_masks(arguments, tmp_path):
    given = [*arguments, "--correction_probability", 0, "--single_mask_probability", 0, "--steps", 30]
    run("finetune_masks", *given, "--output_dir", tmp_path / "run")
    losses = [row["loss"] for row in curve(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_a_stopped_and_resumed_run_ends_as_one_that_was_not(arguments, whole, tmp_path):
    stopped_after(3, whole, tmp_path / "run")
    run("finetune_masks", *arguments, "--output_dir", tmp_path / "run")
    assert_equal(tmp_path / "run", whole)


def test_each_view_is_given_to_the_teacher_once(arguments, whole, tmp_path):
    """Another run with the same cache leaves its files as they are, and is the same."""
    cache = whole / "embeddings"
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert len(files) == 2 + 1 and all("teacher" in path.parts for path in files)  # two views and the index
    run("finetune_masks", *arguments, "--cache_dir", cache, "--output_dir", tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == files
    assert_equal(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--flip", "true"], "--teacher need --crop_scale 1 --flip false"),
        (["--cells", 6], "leave --cells and --synthetic_... out"),
        (["--synthetic_ratio", 0.5], "leave --cells and --synthetic_... out"),
    ],
)
def test_options_that_exclude_a_teacher_are_refused(arguments, options, words):
    assert words in refuse("finetune_masks", *arguments, *options)


def test_a_teachers_pseudo_labels_are_training_data(recipe, tiny_model, teacher, tmp_path):
    """Segment everything, in two calls; then only what it is sure of; then training on that."""
    (tmp_path / "photos").mkdir()
    options = ["--points-per-side", 3, "--pred-iou-thresh", 0, "--stability-score-thresh", 0.4, "--no-overlay"]
    for i in range(4):
        commands.noise(90, 61, seed=i).save(tmp_path / "photos" / f"{i}.png")
        if i % 2:
            command = ["everything", tmp_path / "photos", "--output", tmp_path / "found", "--model", teacher]
            assert commands.run(*command, *options).exit_code == 0
    found = json.loads((tmp_path / "found" / "instances.json").read_text())
    scores = sorted(one["predicted_iou"] for one in found["annotations"])
    least = (scores[len(scores) // 2 - 1] + scores[len(scores) // 2]) / 2
    given = ["--annotations", tmp_path / "found" / "instances.json", "--images", tmp_path / "photos"]
    pseudo = tmp_path / "pseudo" / "instances.json"
    run("filter_annotations", *given, "--min_predicted_iou", least, "--output", pseudo)
    sure = json.loads(pseudo.read_text())["annotations"]
    assert len(sure) == len(scores) - len(scores) // 2 and all(one["predicted_iou"] >= least for one in sure)
    assert sum(map(len, CocoMasks(pseudo).rles)) == len(sure)
    given = ["--config", recipe, "--train", pseudo, "--model", tiny_model, "--views", 1, "--global_batch_size", 2]
    run("finetune_masks", *given, "--steps", 2, "--output_dir", tmp_path / "run")
    assert (tmp_path / "run" / "model").is_dir()


def test_masks_without_a_predicted_iou_are_not_chosen_by_it(coco, tmp_path):
    given = ["--annotations", coco / "masks.json", "--output", tmp_path / "out" / "x.json", "--min_predicted_iou", 0.5]
    assert "masks without predicted_iou" in refuse("filter_annotations", *given)
