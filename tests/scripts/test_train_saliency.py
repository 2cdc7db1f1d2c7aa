"""`training/train_saliency.py`, run as a user does, on a tiny encoder and a handful of made-up images."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from script_runs import (
    ROOT,
    assert_close,
    assert_equal,
    card_of,
    curve,
    fork,
    kill_after_step_5,
    refuse,
    run,
    steps_saved,
)

from hf_efficientsam import EfficientSamSaliencyConfig, EfficientSamSaliencyHead
from hf_efficientsam.inference.loading import load_model
from hf_efficientsam.training.data.coco import CocoMasks, decode_rles
from hf_efficientsam.training.data.folder_masks import FolderMasks, UnitedMasks
from hf_efficientsam.training.saliency.embeddings import EmbeddedImages, MirroredEmbeddings, whiten
from hf_efficientsam.training.saliency.evaluation import predict_map

STEPS = 7
# Epochs have 2 steps of 4 images: checkpoints lie within epochs and between them.
RECIPE = f"""
hidden_size: 24
num_hidden_layers: 1
global_batch_size: 4
steps: {STEPS}
warmup_steps: 2
learning_rate: 3e-3
ema_decay: 0.5
log_steps: 1
eval_steps: 4
save_steps: 3
image_steps: 5
"""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """9 images of a bright rectangle on a dark ground, the rectangle being what is salient."""
    folder = tmp_path_factory.mktemp("saliency")
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for number in range(9):
        mask = np.zeros((48 + number, 64), np.uint8)
        mask[8 + number : 30, 5 + 3 * number : 25 + 4 * number] = 255
        pixels = np.stack([mask // 2 + 60, mask, 20 * number + mask // 4], axis=2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def arguments(recipe, folder, tiny_model) -> list:
    return ["--config", recipe, "--model", tiny_model, "--train", folder, "--val", folder]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The output folder of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    run("train_saliency", *arguments, "--output_dir", output)
    return output


# -------------------------------------------------------------------------------------------- what it leaves


def test_a_run_leaves_a_head_metrics_curves_and_pictures(whole, folder, tiny_model):
    assert card_of(whole).data.pipeline_tag == "image-segmentation"
    assert (whole / "model" / "metrics.json").read_text() == (whole / "metrics.json").read_text()
    rows = curve(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)) and rows[2]["lr"] == pytest.approx(3e-3)
    assert steps_saved(whole) == ["step_00000006", "step_00000007"]
    assert sorted(path.name for path in (whole / "images").iterdir()) == [f"saliency_{n:08}.png" for n in (5, 7)]
    assert Image.open(whole / "images" / "saliency_00000007.png").width > 3 * 256
    evaluations = [json.loads(line) for line in (whole / "evaluation.jsonl").read_text().splitlines()]
    metrics = json.loads((whole / "metrics.json").read_text())
    assert [row["step"] for row in evaluations] == [4, 7]
    assert evaluations[1] == {"step": 7, **{name: metrics[name] for name in ("iou", "mae", "max_f")}}
    assert metrics["images"] == 9 and metrics["config"]["hidden_size"] == 24 and "torch" in metrics["versions"]

    # The numbers are those of the saved head.
    head = EfficientSamSaliencyHead.from_pretrained(whole / "model")
    images = EmbeddedImages(*load_model(str(tiny_model)), FolderMasks(folder))
    mae = [
        np.abs(predict_map(head, images.processor, image) - image["truth"]).mean()
        for image in map(images.__getitem__, range(9))
    ]
    assert metrics["mae"] == pytest.approx(np.mean(mae), rel=1e-5)


def test_a_finished_run_has_nothing_left_to_do(arguments, whole):
    before, rows = (whole / "model" / "model.safetensors").read_bytes(), curve(whole)
    assert "holds a finished run" in run("train_saliency", *arguments, "--output_dir", whole)
    assert (whole / "model" / "model.safetensors").read_bytes() == before and curve(whole) == rows


# ------------------------------------------------------------------------------------------------- exactness


def test_a_killed_and_resumed_run_ends_as_one_that_was_not(arguments, whole, tmp_path):
    output = tmp_path / "run"
    given = [*arguments, "--output_dir", output]
    killed = fork("train_saliency", *given, before=kill_after_step_5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert steps_saved(output) == ["step_00000003"] and [row["step"] for row in curve(output)] == [1, 2, 3, 4, 5]
    run("train_saliency", *given)
    assert_equal(output, whole)
    assert (output / "evaluation.jsonl").read_text() == (whole / "evaluation.jsonl").read_text()


def test_accumulated_and_shared_steps_are_those_of_the_whole_batch(arguments, tmp_path):
    given = [*arguments, "--dropout", 0, "--drop_path", 0, "--steps", 3, "--global_batch_size", 8]
    run("train_saliency", *given, "--output_dir", tmp_path / "whole")
    run("train_saliency", *given, "--output_dir", tmp_path / "accumulated", "--batch_size", 2)
    done = fork("train_saliency", *given, "--output_dir", tmp_path / "shared", processes=2)
    assert done.returncode == 0, done.stderr
    for name in ("accumulated", "shared"):
        assert_close(tmp_path / name, tmp_path / "whole", curves=1e-4, values=1e-4)
        ours, theirs = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in (name, "whole"))
        assert ours["images"] == theirs["images"] == 9 and ours["mae"] == pytest.approx(theirs["mae"], rel=1e-3)


# ---------------------------------------------------------------------------------------------------- its data


def test_images_are_encoded_once_and_mirrored_half_of_the_time(folder, tiny_model):
    model, processor = load_model(str(tiny_model))
    encoded, get_image_embeddings = [], model.get_image_embeddings
    model.get_image_embeddings = lambda pixels: encoded.append(1) or get_image_embeddings(pixels)
    images = EmbeddedImages(model, processor, FolderMasks(folder))
    data, seen = MirroredEmbeddings(images), []
    for epoch in range(12):
        data.set_epoch(epoch)
        seen.append(data[4])
    assert len(encoded) == 1 and len({one["seed"] for one in seen}) == 12
    plain, labels = images[4]["image_embeddings"].float(), seen[0]["labels"]
    assert plain.shape == (32, 4, 4) and labels.shape == (16, 16)
    assert labels.mean() == pytest.approx(images[4]["truth"].mean(), abs=0.02)  # its columns overlap a little
    kept = [torch.equal(one["image_embeddings"], plain) for one in seen]
    assert 2 < sum(kept) < 10
    for one, is_kept in zip(seen, kept, strict=True):
        assert torch.equal(one["image_embeddings"], plain if is_kept else plain.flip(-1))
        assert torch.equal(one["labels"], labels if is_kept == kept[0] else labels.flip(-1))
    data.set_epoch(3)
    assert data[4]["seed"] == seen[3]["seed"]


def test_a_new_head_sees_all_directions_of_the_embeddings_alike():
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -2, 32)[:, None, None]
    mixed = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q
    embeddings = torch.einsum("ij,bjhw->bihw", mixed, scales * torch.randn(8, 32, 16, 16, generator=generator)) + 3
    head = EfficientSamSaliencyHead(EfficientSamSaliencyConfig(input_channels=32, hidden_size=12))
    whiten(head, embeddings)
    with torch.no_grad():
        seen = head.projection(embeddings.permute(0, 2, 3, 1)).flatten(0, 2)
    torch.testing.assert_close(seen.mean(0), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen.T @ seen / len(seen), torch.eye(12), atol=1e-2, rtol=0)


def test_the_objects_of_a_coco_json_are_salient_together(coco):
    dataset = UnitedMasks(CocoMasks(coco / "masks.json"))
    assert len(dataset) == 5
    for united, sample in ((dataset[i], dataset.masks[i]) for i in range(5)):
        assert len(united.rles) == len(united.annotation_ids) == 1 and len(sample.rles) == sample.image_id + 1
        assert (decode_rles(united.rles)[0] == decode_rles(sample.rles).any(0)).all()


# ----------------------------------------------------------------------------------------------- what it takes


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--train", "absent"], "There is no annotation file absent; check the path."),
        (["--model", "absent/absent/absent"], "absent/absent/absent: no such directory."),
        (["--global_batch_size", 64], "9 images are less than one step; lower --global_batch_size 64."),
        (["--image_size", 40], "--image_size 40 must be a multiple of 16."),
        (["--hidden_size", 25], "choose num_attention_heads so that it divides hidden_size."),
        (["--hidden_size", 64], "--hidden_size 64 must be at most the encoder's 32 channels."),
        (["--dropout", 1], "--dropout is 1.0; it must be at least 0 and less than 1."),
        (["--num_hidden_layers", 0], "--num_hidden_layers is 0; it must be more than 0."),
    ],
)
def test_what_cannot_train_is_refused(arguments, tmp_path, options, sentence):
    assert sentence in refuse("train_saliency", *arguments, *options, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_nothing_to_train_on_is_refused(tmp_path):
    said = refuse("train_saliency", "--output_dir", tmp_path / "run")
    assert said == "train_saliency: Give --train folders with images/ and masks/, or COCO-style json files."


def test_another_run_and_a_broken_mask_are_refused(arguments, folder, whole, tmp_path):
    said = refuse("train_saliency", *arguments, "--output_dir", whole, "--dropout", 0.3)
    assert "another dropout; choose a new --output_dir" in said
    shutil.copytree(folder, tmp_path / "broken")
    Image.new("L", (64, 48)).save(tmp_path / "broken" / "masks" / "0.png")
    given = [*arguments, "--train", tmp_path / "broken", "--output_dir", tmp_path / "run"]
    said = run("train_saliency", *given)
    assert "8 images with 8 masks; left out: 1 images with an empty mask." in said


def test_the_miniature_runs_without_arguments_and_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    run("train_saliency")
    rows = curve(tmp_path / "runs/saliency_miniature")
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]  # it falls by a fifth
