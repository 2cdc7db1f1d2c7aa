"""`training/finetune_detection.py`, run as a user does, on tiny models: where torchvision is, in a process of
`test_finetune_detection.py`. pytest does not collect this file by itself."""

import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from script_runs import FORKS, IMPORTED, assert_close, assert_equal, curve, fork, run, steps_saved, stopped_after

from hf_efficientsam import EfficientSamBackbone, EfficientSamForPreTraining, EfficientSamSamiConfig
from hf_efficientsam.training.detection.mask_rcnn import load_detector

STEPS = 6
RECIPE = f"""
image_size: 64
least_scale: 0.7
greatest_scale: 1.3
pyramid_channels: 16
anchor_scale: 2
sampled_boxes: 16
min_score: 0.01
window_size: 2
drop_path: 0.1
global_batch_size: 2
epochs: {STEPS // 2}
warmup_epochs: 0.5
learning_rate: 5e-3
layer_decay: 0.9
log_steps: 1
save_steps: 4
image_steps: 6
eval_steps: 3
num_workers: 0
"""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Of SAMI."""
    folder = tmp_path_factory.mktemp("sami") / "model"
    torch.manual_seed(0)
    vision = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "pretrain_image_size": 64}
    EfficientSamForPreTraining(EfficientSamSamiConfig(vision_config=vision)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def val(coco):
    """The objects of `coco`, of two categories in another order than where they are trained on."""
    content = json.loads((coco / "masks.json").read_text())
    for name, ids in (("train", (4, 2)), ("val", (11, 30))):
        for number, annotation in enumerate(content["annotations"]):
            annotation["category_id"] = ids[number % 2]
        categories = [{"id": ids[0], "name": "even"}, {"id": ids[1], "name": "odd"}]
        (coco / f"{name}.json").write_text(json.dumps(content | {"categories": categories}))
    return coco / "val.json"


@pytest.fixture(scope="module")
def arguments(coco, val, pretrained, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return ["--config", path, "--train", coco / "train.json", "--val", val, "--encoder", pretrained]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The output folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run("finetune_detection", *arguments, "--output_dir", folder)
    return folder


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_a_run_learns_and_leaves_a_detector_its_ap_and_pictures(whole):
    rows = curve(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["classes"] + rows[-1]["masks"] < 0.8 * (rows[0]["classes"] + rows[0]["masks"])
    names = ("objectness", "proposals", "classes", "boxes", "masks")
    assert rows[0]["loss"] == pytest.approx(sum(rows[0][name] for name in names), rel=1e-4)
    metrics, detections = read(whole, "metrics.json"), read(whole, "detections.json")
    assert metrics["step"] == STEPS and metrics["images"] == 5 and metrics["detections"] == len(detections) > 0
    assert 0 < metrics["mask"]["AP"] <= 1 and 0 < metrics["box"]["AP"] <= 1 and metrics["versions"]["torchvision"]
    assert {one["category_id"] for one in detections} <= {11, 30} and {len(one) for one in detections} == {4}
    assert [json.loads(line)["step"] for line in (whole / "evaluation.jsonl").read_text().splitlines()] == [3, 6]
    for picture in ("curve.png", "evaluation.png", "detections.png", "images/objects_00000006.png"):
        assert Image.open(whole / picture).width > 300
    assert steps_saved(whole) == ["step_00000004", "step_00000006"]


def test_the_encoder_came_from_sami_and_goes_on_as_a_backbone(whole, pretrained, arguments, tmp_path):
    backbone, info = EfficientSamBackbone.from_pretrained(whole / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and backbone.config.window_size == 2
    frozen = ["--freeze_encoder", "true", "--drop_path", 0]
    run("finetune_detection", *arguments, "--output_dir", tmp_path, *frozen, "--epochs", 1)
    frozen = load_file(tmp_path / "model" / "model.safetensors")
    before = load_file(pretrained / "model.safetensors")
    encoder = [name for name in frozen if name.startswith("vision_encoder.")]
    assert len(encoder) > 20 and all(torch.equal(frozen[name], before[name]) for name in encoder)
    trained = backbone.state_dict()
    assert not torch.equal(trained[encoder[-1]], before[encoder[-1]])


def test_a_saved_detector_measures_as_it_did(whole, val, tmp_path):
    said = run("finetune_detection", "--evaluate", whole / "model", "--val", val, "--output_dir", tmp_path)
    assert read(tmp_path, "detections.json") == read(whole, "detections.json")
    before, after = read(whole, "metrics.json"), read(tmp_path, "metrics.json")
    assert (after["box"], after["mask"]) == (before["box"], before["mask"]) and f"{after['box']['AP']:.4f}" in said


def test_what_a_detector_finds(whole, coco):
    detector = load_detector(whole / "model")
    images = [Image.open(coco / "images" / name).convert("RGB") for name in ("0.jpg", "4.jpg")]
    both, (alone,) = detector.detect(images), detector.detect(images[1:])
    for image, found in zip(images, both, strict=True):
        count = len(found["scores"])
        assert 0 < count <= 100 and found["masks"].shape == (count, image.height, image.width)
        assert (found["scores"].diff() <= 0).all() and found["scores"].min() >= 0.01
        assert found["boxes"].min() >= 0 and (found["boxes"].amax(0)[2:] <= torch.tensor(image.size)).all()
        assert set(found["labels"].tolist()) <= {1, 2} and not detector.training
    torch.testing.assert_close(alone["scores"], both[1]["scores"], rtol=1e-4, atol=1e-5)


def test_its_boxes_become_masks(whole, val, tiny_model, tmp_path):
    given = ["--annotations", val, "--detections", whole / "detections.json", "--output", tmp_path / "masks.json"]
    said = run("evaluate_masks", "--model", tiny_model, *given, "--num_workers", 0)
    assert "AP75" in said and read(tmp_path, "masks.json")["detections"] == read(whole, "metrics.json")["detections"]


def test_a_resumed_run_ends_as_one_that_was_not_stopped(arguments, whole, tmp_path):
    resumed = stopped_after(4, whole, tmp_path / "resumed")
    run("finetune_detection", *arguments, "--output_dir", resumed)
    assert_equal(resumed, whole)
    for name in ("detections.json", "evaluation.jsonl", "model/heads.safetensors"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    said = run("finetune_detection", *arguments, "--output_dir", resumed)
    assert "holds a finished run" in said


def test_two_processes_and_accumulated_gradients_agree_with_one(arguments, val, tmp_path):
    # Without drop path, which is drawn for a batch. One step at a time lest AdamW make a step of a rounding error.
    given = [*arguments, "--drop_path", 0, "--learning_rate", 1e-4, "--epochs", 1, "--warmup_epochs", 0]
    run("finetune_detection", *given, "--output_dir", tmp_path / "one")
    unmeasured = [one for one in given if one not in ("--val", val)]
    run("finetune_detection", *unmeasured, "--output_dir", tmp_path / "accumulated", "--batch_size", 1)
    assert_close(tmp_path / "accumulated", tmp_path / "one", curves=1e-3, values=1e-4)
    FORKS.set_forkserver_preload(["torchvision_shim", *IMPORTED])
    done = fork("finetune_detection", *given, "--output_dir", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "two", tmp_path / "one", curves=1e-3, values=1e-4)
    one, two = (read(tmp_path / name, "metrics.json") for name in ("one", "two"))
    assert one["detections"] == two["detections"] > 0 and math.isclose(
        one["mask"]["AP"], two["mask"]["AP"], abs_tol=0.01
    )


def test_what_does_not_fit_is_refused(whole, coco, tmp_path):
    content = json.loads((coco / "val.json").read_text())
    content["categories"] = [{"id": 11, "name": "moon"}, {"id": 30, "name": "sun"}]
    (coco / "other.json").write_text(json.dumps(content))
    given = ["--evaluate", whole / "model", "--output_dir", tmp_path]
    said = run("finetune_detection", *given, "--val", coco / "other.json", code=2)
    assert said.splitlines()[-1].endswith("none of the detector's categories, but moon, sun; choose another.")
    (tmp_path / "empty").mkdir()
    said = run("finetune_detection", "--evaluate", tmp_path / "empty", "--val", coco / "val.json", code=2)
    assert "holds no detector of finetune_detection.py" in said
