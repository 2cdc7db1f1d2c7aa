"""`training/distill.py`, run as a user does, with a tiny student, a tiny teacher and a handful of images."""

import hashlib

import backbones
import pytest
import tiny
import torch
from script_runs import assert_close, assert_equal, curve, fork, load_script, refuse, run, stopped_after
from transformers import AutoBackbone

from hf_efficientsam import EfficientSamModel
from hf_efficientsam.inference.loading import load_model
from hf_efficientsam.training.data.images import normalize
from hf_efficientsam.training.engine.config import parse_config
from hf_efficientsam.training.sami.teachers import load_teacher

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
SIZE, STEPS = 64, 14
RECIPE = f"""
size: {SIZE}
crop_scale: 0.5
hidden_size: 12
global_batch_size: 4
steps: {STEPS}
warmup_steps: 2
learning_rate: 0.01
save_steps: 5
log_steps: 1
num_workers: 0
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Of the width of a new student's embedding, in a folder of its own, whose bytes tests compare."""
    parts = {"vision": {"output_channels": 256}, "prompt_encoder": {"hidden_size": 256, "mask_input_channels": 16}}
    decoder = {"hidden_size": 256, "num_attention_heads": 8, "mlp_dim": 2048, "upscaling_channels": [64, 32]}
    decoder |= {"iou_head_hidden_dim": 16}  # of which the student's differs
    return tiny.save(tmp_path_factory.mktemp("teacher"), tiny.model(**parts, mask_decoder=decoder), tiny.processor())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.save_images(tmp_path_factory.mktemp("images"), 12, 70, 60)


@pytest.fixture(scope="module")
def arguments(recipe, images, teacher) -> list:
    return ["--config", recipe, "--images", images, "--teacher", teacher, "--views", 2, "--ema_decay", 0.5]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The output folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run("distill", *arguments, "--output_dir", folder)
    return folder


def content(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def test_the_student_has_the_teachers_decoder_and_learns_its_embeddings(arguments, teacher, tmp_path):
    before = content(teacher)
    said = run("distill", *arguments, "--output_dir", tmp_path / "run")
    assert "weights of the decoder do not fit" in said and content(teacher) == before
    losses = [row["loss"] for row in curve(tmp_path / "run")]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    student, loading = EfficientSamModel.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    theirs = load_model(str(teacher))[0].state_dict()
    decoder = {name for name in student.state_dict() if not name.startswith("vision_encoder.")}
    new = {name for name in decoder if not torch.equal(student.state_dict()[name], theirs[name])}
    assert new and all(name.startswith("mask_decoder.iou_head.") for name in new)


def test_two_steps_by_hand(arguments, images, teacher, tmp_path):
    given = [*arguments, "--steps", 2, "--views", 1, "--global_batch_size", 12, "--ema_decay", 0, "--warmup_steps", 0]
    run("distill", *given, "--output_dir", tmp_path / "run")
    script = load_script("distill")
    config = parse_config(script.DistillConfig, "", [*given, "--output_dir", tmp_path / "other"])
    model = load_teacher(str(teacher))
    data = script.open_views(config, model)
    items = [data[index] for index in range(12)]
    pixel_values = normalize(torch.stack([item["pixel_values"] for item in items]))
    target = model(torch.stack([item["teacher_pixels"] for item in items]), (4, 4))
    encoder = script.build_model(config, config.size, config.seed).vision_encoder.train()
    decays = [one for name, one in encoder.named_parameters() if one.ndim > 1 and "position" not in name]
    others = [one for one in encoder.parameters() if all(one is not other for other in decays)]
    groups = [{"params": decays, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for row, rate in zip(curve(tmp_path / "run"), (0.01, 0.005), strict=True):
        embeddings = encoder(pixel_values).last_hidden_state
        loss = (embeddings.flatten(2).transpose(1, 2) - target).square().mean()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4) and row["lr"] == pytest.approx(rate)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()


def test_a_stopped_and_resumed_run_ends_as_one_that_was_not(arguments, whole, tmp_path):
    stopped_after(5, whole, tmp_path / "run")
    run("distill", *arguments, "--output_dir", tmp_path / "run")
    assert_equal(tmp_path / "run", whole)


def test_two_processes_agree_with_one(arguments, whole, tmp_path):
    done = fork("distill", *arguments, "--output_dir", tmp_path / "run", processes=2)
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "run", whole, curves=1e-4, values=1e-3)


def test_cached_embeddings_do_as_well(arguments, images, teacher, whole, tmp_path):
    options = ["--size", SIZE, "--crop_scale", 0.5, "--views", 2, "--num_workers", 0]
    run("cache_features", "--images", images, "--teacher", teacher, *options, "--output_dir", tmp_path / "cache")
    run("distill", *arguments, "--cache", tmp_path / "cache", "--output_dir", tmp_path / "run")
    ours, theirs = curve(tmp_path / "run"), curve(whole)
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-2)


def test_features_of_any_vision_model_are_reconstructed(recipe, images, tmp_path):
    vit = tiny.save_teacher(tmp_path / "vit", hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    given = ["--config", recipe, "--images", images, "--teacher", vit]
    assert "choose --target features" in refuse("distill", *given, "--output_dir", tmp_path / "refused")
    run("distill", *given, "--target", "features", "--output_dir", tmp_path / "run")
    losses = [row["loss"] for row in curve(tmp_path / "run")]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    _, loading = EfficientSamModel.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]


@pytest.mark.parametrize("target", ["embeddings", "features"])
def test_an_encoder_of_convolutions_learns_both(recipe, images, teacher, target, tmp_path):
    torch.manual_seed(0)
    AutoBackbone.from_config(backbones.configs()["convnext"]).save_pretrained(tmp_path / "convnext")
    given = ["--config", recipe, "--images", images, "--teacher", teacher, "--encoder", tmp_path / "convnext"]
    run("distill", *given, "--target", target, "--output_dir", tmp_path / "run")
    losses = [row["loss"] for row in curve(tmp_path / "run")]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    student, loading = EfficientSamModel.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert student.config.vision_config.image_size == SIZE
    assert student.get_image_embeddings(torch.zeros(1, 3, SIZE, SIZE)).shape == (1, 256, 4, 4)


def test_wrong_options_are_refused(arguments):
    assert "--target: invalid choice: 'x'" in refuse("distill", *arguments, "--target", "x")
    assert "Give --teacher a model" in refuse("distill", *arguments[:4])
