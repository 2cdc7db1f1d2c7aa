"""`training/sami.py`, run as a user does, with a tiny student, a tiny teacher and a handful of images."""

import dataclasses
import errno
import json
import re
import shutil
import signal
import sqlite3
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image
from script_runs import (
    ROOT,
    TRAINING,
    assert_close,
    assert_equal,
    check_that_the_model_is_freed,
    curve,
    fork,
    kill_after_step_5,
    load_script,
    run,
    steps_saved,
    stopped_after,
    weights,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Dinov2Model

from hf_efficientsam import (
    EfficientSamConfig,
    EfficientSamForPreTraining,
    EfficientSamImageProcessor,
    EfficientSamModel,
    EfficientSamProcessor,
)
from hf_efficientsam.training import engine
from hf_efficientsam.training.engine.config import parse_config
from hf_efficientsam.training.engine.optimization import parameter_groups
from hf_efficientsam.training.sami import teacher_views

# Epochs have 2 steps of 8 images, the run has 7 steps: checkpoints lie within epochs and between them.
IMAGES = 20
pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = """
size: 64
hidden_size: 16
num_attention_heads: 2
num_hidden_layers: 2
decoder_hidden_size: 16
decoder_num_hidden_layers: 1
decoder_num_attention_heads: 2
global_batch_size: 8
batch_size: 4
epochs: 3.5
warmup_epochs: 0.5
base_learning_rate: 0.05
save_steps: 3
log_steps: 2
image_steps: 5
num_workers: 0
"""


TEACHER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny.save_teacher(tmp_path_factory.mktemp("teacher"), **TEACHER)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return tiny.save_images(tmp_path_factory.mktemp("images"), IMAGES, 70, 60)


@pytest.fixture(scope="module")
def shards(images, tmp_path_factory) -> str:
    """Four of four images."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(4 * shard, 4 * shard + 4):
                tar.add(images / f"{i:02}.png", f"{i:02}.png")
    return f"{folder}/{{0..3}}.tar"


@pytest.fixture(scope="module")
def arguments(recipe, images, teacher) -> list:
    return ["--config", recipe, "--images", images, "--teacher", teacher, "--views", 2, "--ema_decay", 0.5]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> Path:
    """The output folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    done = fork("sami", *arguments, "--output_dir", folder, "--trackers", "tensorboard", "trackio")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def cache(images, teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    options = ["--size", 64, "--views", 2, "--num_workers", 0, "--output_dir", folder]
    run("cache_features", "--images", images, "--teacher", teacher, *options)
    return folder


# -------------------------------------------------------------------------------------------- what it leaves


@pytest.mark.slow
def test_a_run_leaves_a_model_a_curve_and_pictures(whole):
    model, loading = EfficientSamForPreTraining.from_pretrained(whole / "model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.config.target_size == 32 and model.config.vision_config.pretrain_image_size == 64
    assert all(value.isfinite().all() for value in model.state_dict().values())
    rows = curve(whole)
    assert [row["step"] for row in rows] == [2, 4, 6, 7]  # the last mean is of one step
    assert all(row["loss"] > 0 for row in rows)
    # A step of warm-up, then a cosine over six, whose zero comes after the last.
    cosine = [0.05 * 8 / 256 * (1 + np.cos(np.pi * i / 6)) / 2 for i in (0, 2, 4, 5)]
    assert [row["lr"] for row in rows] == pytest.approx(cosine, rel=1e-5)
    assert (whole / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (whole / "images").iterdir()) == [
        f"reconstruction_{step:08}.png" for step in (5, 7)
    ]
    assert len(np.unique(np.array(Image.open(whole / "images" / "reconstruction_00000007.png")))) > 50
    assert steps_saved(whole) == ["step_00000006", "step_00000007"]
    averaged, last = (weights(whole)[f"{start}decoder.head.weight"] for start in ("", "checkpoint."))
    assert 0 < (averaged - last).abs().max() < 0.02


@pytest.mark.slow
def test_trackers_write_without_a_network(whole):
    events = EventAccumulator(str(whole / "trackers" / "sami")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 7]
    assert [event.step for event in events.Images("reconstruction")] == [5, 7]
    rows = sqlite3.connect(whole / "trackers" / "sami.db").execute("SELECT step, metrics FROM metrics ORDER BY id")
    values = [(step, json.loads(metrics)) for step, metrics in rows.fetchall()]
    assert [step for step, value in values if "loss" in value] == [2, 4, 6, 7]
    assert [step for step, value in values if "reconstruction" in value] == [5, 7]


@pytest.mark.slow
def test_the_miniature_learns(tmp_path, monkeypatch):
    """In a third of its steps; .ci/run starts the whole without arguments."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # where its recipe looks, as in the repository
    run("sami", "--config", TRAINING / "recipes" / "miniature" / "sami.yaml", "--epochs", 33)
    rows = [json.loads(row) for row in (tmp_path / "runs/sami_miniature/curve.jsonl").read_text().splitlines()]
    assert rows[-1]["seconds_to_go"] == 0
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]  # 0.5 with the weights of 28 November
    EfficientSamModel.from_pretrained(tmp_path / "runs/sami_miniature/model")


KINDS = {
    "mae": "--target pixels --decoder_type all_token",
    "cosine": "--loss cosine",
    "all_token": "--decoder_type all_token --mask_ratio 0.5",
    "unnormalized": "--target_normalization none",
    "shards": "--epoch_images 16 --shuffle_buffer 4",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_an_encoder(recipe, images, shards, teacher, tmp_path, kind):
    given = ["--shards", shards] if kind == "shards" else ["--images", images]
    given += [] if kind == "mae" else ["--teacher", teacher]
    words = KINDS[kind].split()
    run("sami", "--config", recipe, *given, *words, "--epochs", 1, "--log_steps", 1, "--output_dir", tmp_path / "run")
    assert [row["step"] for row in curve(tmp_path / "run")] == [1, 2]
    assert len({row["loss"] for row in curve(tmp_path / "run")}) == 2
    pretrained = EfficientSamForPreTraining.from_pretrained(tmp_path / "run/model")
    options = {name[2:]: value for name, value in zip(words[::2], words[1::2], strict=True) if kind != "shards"}
    assert {name: str(getattr(pretrained.config, name)) for name in options} == options
    model = EfficientSamModel.from_pretrained(tmp_path / "run/model")
    ours = model.vision_encoder.state_dict()
    theirs = pretrained.vision_encoder.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items() if not name.startswith("neck."))


@pytest.mark.slow
def test_selected_weights_are_kept_by_finetuning(recipe, images, teacher, tmp_path):
    """With nothing masked it distils, as for the bundled checkpoint; here at a rate of zero, to see the start."""
    options = ["--mask_ratio", 0, "--select_weights", "true", "--base_learning_rate", 0, "--epochs", 1]
    given = ["--config", recipe, "--images", images, "--teacher", teacher, *options]
    run("sami", *given, "--output_dir", tmp_path / "encoder")
    pretrained = EfficientSamForPreTraining.from_pretrained(tmp_path / "encoder/model").vision_encoder
    selected = Dinov2Model.from_pretrained(teacher).encoder.layer[1].mlp.fc1.weight[::2, ::2]
    assert torch.equal(pretrained.layers[1].mlp.fc1.weight, selected)

    torch.manual_seed(1)
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pretrain_image_size": 64}
    before = EfficientSamModel(EfficientSamConfig(vision_config=vision))
    before.save_pretrained(tmp_path / "model")
    EfficientSamProcessor(EfficientSamImageProcessor(size=64)).save_pretrained(tmp_path / "model")
    finetune = load_script("finetune_masks")
    config = finetune.MasksConfig(model=str(tmp_path / "model"), encoder=str(tmp_path / "encoder/model"))
    after = finetune.build_model(config).state_dict()
    for name, value in before.state_dict().items():
        encoder = name.startswith("vision_encoder.") and ".neck." not in name
        expected = pretrained.state_dict()[name.removeprefix("vision_encoder.")] if encoder else value
        assert torch.equal(after[name], expected), name

    annotation = {"segmentation": [[5, 5, 45, 5, 45, 45, 5, 45]], "iscrowd": 0, "category_id": 1}
    files = [{"id": i, "file_name": f"{i:02}.png", "width": 70 + i, "height": 60} for i in range(2)]
    masks = {"images": files, "annotations": [{"id": i + 1, "image_id": i, **annotation} for i in range(2)]}
    shutil.copytree(images, tmp_path / "coco/images")
    (tmp_path / "coco/masks.json").write_text(json.dumps(masks))
    run(
        "finetune_masks",
        "--train", tmp_path / "coco/masks.json", "--encoder", tmp_path / "encoder/model", "--image_size", 64,
        "--global_batch_size", 2, "--steps", 1, "--num_workers", 0, "--synthetic_steps", 1,
        "--output_dir", tmp_path / "masks",
    )  # fmt: skip
    finetuned = EfficientSamModel.from_pretrained(tmp_path / "masks/model")
    assert finetuned.config.prompt_encoder_config.background_points
    assert finetuned.config.prompt_encoder_config.mask_prompts
    # A step of geometry leaves the encoder as it was pretrained.
    layers = zip(finetuned.vision_encoder.layers.parameters(), pretrained.layers.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in layers)


# ------------------------------------------------------------------------------------------------- exactness


@pytest.mark.slow
def test_a_killed_and_resumed_run_ends_as_one_that_was_not(arguments, whole, tmp_path):
    """With a worker; without one it is resumed after a full disk, below."""
    output = tmp_path / "run"
    given = [*arguments, "--output_dir", output, "--num_workers", 1]
    assert fork("sami", *given, before=kill_after_step_5).returncode == -signal.SIGKILL
    assert steps_saved(output) == ["step_00000003"] and [row["step"] for row in curve(output)] == [2, 4]
    # Half a checkpoint, as if the kill had struck while the next one was written.
    (output / "checkpoints" / "writing").mkdir()
    (output / "checkpoints" / "writing" / "model.safetensors").write_bytes(b"half of")

    run("sami", *given)
    assert_equal(output, whole)
    assert steps_saved(output) == ["step_00000006", "step_00000007"]


@pytest.mark.slow
def test_killed_before_the_first_checkpoint_it_starts_anew(arguments, whole, tmp_path):
    stopped_after(0, whole, tmp_path / "run")
    run("sami", *arguments, "--output_dir", tmp_path / "run", "--num_workers", 2)
    assert_equal(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_finished_run_has_nothing_left_to_do(arguments, whole):
    before, rows = (whole / "model" / "model.safetensors").read_bytes(), curve(whole)
    run("sami", *arguments, "--output_dir", whole)
    assert (whole / "model" / "model.safetensors").read_bytes() == before and curve(whole) == rows


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [8, 2])
def test_accumulated_gradients_are_those_of_the_whole_batch(arguments, whole, tmp_path, batch_size):
    run("sami", *arguments, "--output_dir", tmp_path / "run", "--batch_size", batch_size)
    assert_close(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_run_resumes_with_another_batch_size(arguments, whole, tmp_path):
    stopped_after(6, whole, tmp_path / "run")
    run("sami", *arguments, "--output_dir", tmp_path / "run", "--batch_size", 1)
    assert_close(tmp_path / "run", whole)


@pytest.mark.slow
def test_two_processes_agree_with_one_even_if_one_of_them_is_killed(arguments, whole, tmp_path):
    output = tmp_path / "run"
    given = [*arguments, "--output_dir", output, "--batch_size", 2]
    killed = fork("sami", *given, before=kill_after_step_5, processes=2)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert steps_saved(output) == ["step_00000003"]
    done = fork("sami", *given, processes=2)
    assert done.returncode == 0, done.stderr
    assert_close(output, whole)


@pytest.mark.slow
def test_streamed_shards_resume_and_accumulate(recipe, shards, teacher, tmp_path):
    """Batch sizes agree with up to one worker: of several, each fills batches of its own."""
    given = ["--config", recipe, "--shards", shards, "--teacher", teacher, "--epoch_images", 16, "--shuffle_buffer", 3]
    given += ["--save_steps", 5]
    run("sami", *given, "--output_dir", tmp_path / "workers", "--num_workers", 2)
    stopped_after(5, tmp_path / "workers", tmp_path / "resumed")
    run("sami", *given, "--output_dir", tmp_path / "resumed", "--num_workers", 2)
    assert_equal(tmp_path / "resumed", tmp_path / "workers")
    # With another number of workers the order would be another.
    assert "another num_workers;" in run(
        "sami", *given, "--output_dir", tmp_path / "workers", "--num_workers", 1, code=2
    )
    for batch_size in (8, 2):
        run("sami", *given, "--output_dir", tmp_path / str(batch_size), "--num_workers", 1, "--batch_size", batch_size)
    assert_close(tmp_path / "2", tmp_path / "8")


@pytest.mark.slow
def test_two_processes_divide_the_shards(recipe, shards, teacher, tmp_path):
    """Where a step is all images the two agree with one; else each process has an order of its own."""
    given = ["--config", recipe, "--shards", shards, "--teacher", teacher, "--epoch_images", 16]
    given += ["--global_batch_size", 16, "--epochs", 3]
    run("sami", *given, "--output_dir", tmp_path / "one", "--batch_size", 16)
    given += ["--output_dir", tmp_path / "two", "--batch_size", 4]
    done = fork("sami", *given, before=check_that_the_model_is_freed, processes=2)
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_cached_features_train_as_the_teacher_does(arguments, whole, cache, tmp_path):
    alone = list(arguments)
    del alone[alone.index("--teacher") : alone.index("--teacher") + 2]
    run("sami", *alone, "--cache", cache, "--output_dir", tmp_path / "alone")
    assert_close(tmp_path / "alone", whole, curves=1e-4, values=1e-4)
    run(
        "sami", *arguments, "--cache", cache, "--output_dir", tmp_path / "both"
    )  # the teacher is compared, then left idle
    assert_equal(tmp_path / "both", tmp_path / "alone")


# ------------------------------------------------------------------------------------------------- accidents


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(arguments, tmp_path):
    named = {}
    for seed in (0, 1):
        options = ["--base_learning_rate", 1e30, "--warmup_epochs", 0, "--save_steps", 1, "--seed", seed]
        said = run("sami", *arguments, *options, "--output_dir", tmp_path / str(seed), code=1)
        (sentence,) = [line for line in said.splitlines() if line.startswith("sami: ")]
        assert sentence.startswith("sami: The loss of step ") and "in a row" in sentence and "Traceback" not in said
        named[seed] = re.findall(r"\d\d\.png", sentence)
        assert len(named[seed]) == len(set(named[seed])) == 8
    assert set(named[0]) != set(named[1])  # another seed, another order


@pytest.mark.slow
@pytest.mark.parametrize(
    "owner, method", [(Accelerator, "save_state"), (EfficientSamForPreTraining, "save_pretrained")]
)
def test_a_full_disk_is_said_and_the_last_checkpoint_stays(arguments, whole, tmp_path, monkeypatch, owner, method):
    save, calls = getattr(owner, method), []

    def save_once(self, folder, **options):
        calls.append(folder)
        if len(calls) == 1:
            return save(self, folder, **options)
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half of")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, save_once)
        said = run("sami", *arguments, "--output_dir", tmp_path / "run", code=1)
    what = "The checkpoint of step 6" if method == "save_state" else f"{tmp_path / 'run' / 'model'}"
    (sentence,) = [line for line in said.splitlines() if line.startswith("sami: ")]
    assert sentence.startswith(f"sami: {what} could not be written: the disk is full") and "Traceback" not in said
    assert steps_saved(tmp_path / "run") == ["step_00000003"]
    EfficientSamForPreTraining.from_pretrained(tmp_path / "run/model")
    run("sami", *arguments, "--output_dir", tmp_path / "run")
    assert_equal(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_broken_image_is_named(recipe, images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    options = ["--images", tmp_path / "images", "--target", "pixels", "--num_workers", 1]
    said = run("sami", "--config", recipe, *options, "--output_dir", tmp_path / "run", code=2)
    assert f"sami: Images of {tmp_path / 'images'} are broken; replace or remove (20):" in said.splitlines()
    assert f"{tmp_path / 'images' / '00.png'} cannot be read as an image" in said and "and 10 more" in said


REFUSALS = {
    "no data": ("--teacher TEACHER", "Give exactly one of images (folders), dataset and shards."),
    "two kinds of data": ("--images IMAGES --shards SHARDS --teacher TEACHER", "Give exactly one of images"),
    "no images": ("--images TEACHER --teacher TEACHER", "There is no image"),
    "no teacher": ("--images IMAGES", "Give --teacher a vision model, or --cache its features, or --target pixels"),
    "absent teacher": ("--images IMAGES --teacher absent/model", "The teacher absent/model is neither"),
    "pixels with a teacher": ("--images IMAGES --teacher TEACHER --target pixels", "Pixels are reconstructed without"),
    "batches": ("--images IMAGES --target pixels --batch_size 3", "8 must be a multiple of --batch_size 3 times 1"),
    "few images": ("--images IMAGES --target pixels --global_batch_size 24", "20 images are less than one step"),
    "endless shards": ("--shards SHARDS --target pixels", "give --epoch_images."),
    "no selection": ("--images IMAGES --target pixels --select_weights true", "takes them from a teacher"),
    "no steps": ("--images IMAGES --target pixels --log_steps 0", "--log_steps is 0; it must be more than 0."),
    "all warm-up": ("--images IMAGES --target pixels --warmup_epochs 4", "must be less than --epochs 3.5."),
    "no average": ("--images IMAGES --target pixels --ema_decay 1", "--ema_decay is 1.0; it must be at least 0"),
    "no seed": ("--images IMAGES --target pixels --seed -1", "must be 0 or more."),
    "no size": ("--images IMAGES --target pixels --size 60", "must be a multiple of the patch's 16 pixels: got 60."),
    "no such loss": ("--images IMAGES --teacher TEACHER --loss l1", "--loss: invalid choice: 'l1'"),
    "no such tracker": ("--images IMAGES --teacher TEACHER --trackers wandb", "There is no tracker wandb here"),
    "another teacher": ("--images IMAGES --cache CACHE --teacher OTHER", "made with other options"),
    "another size": ("--images IMAGES --cache CACHE --size 32", "size is 64, not 32."),
    "too many views": ("--images IMAGES --cache CACHE --views 3", "The cache holds 2 views"),
    "no cache": ("--images IMAGES --cache TEACHER", "holds no feature cache"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_train_is_refused_in_a_sentence(recipe, images, shards, teacher, cache, tmp_path, case):
    words, sentence = REFUSALS[case]
    places = {"IMAGES": images, "SHARDS": shards, "TEACHER": teacher, "CACHE": cache}
    if "OTHER" in words:
        places["OTHER"] = tiny.save_teacher(tmp_path / "other", seed=1, **TEACHER)
    given = [places.get(word, word) for word in words.split()]
    said = run("sami", "--config", recipe, *given, "--output_dir", tmp_path / "run", code=2).splitlines()
    assert said[-1].startswith("sami: ") and sentence in said[-1] and "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_runs_are_not_mixed(arguments, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    said = run("sami", *arguments, "--output_dir", whole, "--weight_decay", 0.1, code=2)
    assert "holds a run with another weight_decay; choose a new --output_dir" in said
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


# --------------------------------------------------------------------------------------------------- recipes


@pytest.fixture(scope="module")
def sami() -> ModuleType:
    return load_script("sami")


def test_every_option_is_read(sami):
    paths = [TRAINING / "sami.py", Path(teacher_views.__file__), *Path(engine.__path__[0]).glob("*.py")]
    source = "".join(path.read_text() for path in paths).replace("self.epochs", "config.epochs")
    source = source.replace("self.warmup_epochs", "config.warmup_epochs")
    unread = [f.name for f in dataclasses.fields(sami.SamiConfig) if f"config.{f.name}" not in source]
    assert unread == []


RECIPES = [TRAINING / "recipes" / name for name in ("miniature/sami.yaml", "studies/sami.yaml")]


@pytest.mark.parametrize(
    "path", [*RECIPES, *sorted((TRAINING / "recipes/paper").glob("sami_*.yaml"))], ids=lambda path: path.stem
)
def test_every_recipe_builds_its_model(sami, path):
    recipe = parse_config(sami.SamiConfig, "", ["--config", str(path)])
    assert recipe.global_batch_size % recipe.batch_size == 0
    with torch.device("meta"):
        model = sami.build_model(dataclasses.replace(recipe, select_weights=False), 256)
    if not path.stem.endswith("_imagenet"):
        return
    vision = model.config.vision_config
    width, heads = {"sami_ti": (192, 3), "sami_s": (384, 6), "sami_b": (768, 12)}[path.stem.removesuffix("_imagenet")]
    assert (vision.hidden_size, vision.num_attention_heads, vision.num_hidden_layers) == (width, heads, 12)
    assert (vision.patch_size, recipe.size, model.config.mask_ratio, model.config.loss) == (16, 224, 0.75, "mse")
    assert (model.config.decoder_type, model.config.decoder_hidden_size) == ("cross_attention", 512)
    assert model.config.decoder_num_hidden_layers == 8 and recipe.teacher == "facebook/sam-vit-huge"
    # FACTS of the paper: AdamW (0.9, 0.95), 2.4e-3 at a batch of 4096, 40 epochs of warm-up of 400.
    assert (recipe.global_batch_size, recipe.epochs, recipe.warmup_epochs) == (4096, 400, 40)
    assert recipe.base_learning_rate * 4096 / 256 == pytest.approx(2.4e-3)
    assert (recipe.weight_decay, recipe.adam_beta2) == (0.05, 0.95)


def test_the_seed_decides_about_start_and_masks_and_not_about_crops(sami, images):
    starts, masks, crops = set(), set(), set()
    for seed in (0, 1, 1):
        recipe = sami.SamiConfig(images=[str(images)], target="pixels", num_hidden_layers=1, seed=seed)
        starts.add(sami.build_model(recipe, None).decoder.head.weight.sum().item())
        item = sami.open_views(recipe, None)[0]
        masks.add(item["noise"].sum().item())
        crops.add(item["pixel_values"].sum().item())
    assert (len(starts), len(masks), len(crops)) == (2, 2, 1)


@pytest.mark.slow
def test_gradients_are_clipped(sami, recipe, images, tmp_path):
    """To so small a norm that AdamW's epsilon makes no step of them."""
    options = ["--images", images, "--target", "pixels", "--weight_decay", 0, "--max_grad_norm", 1e-20]
    run("sami", "--config", recipe, *options, "--epochs", 1, "--output_dir", tmp_path)
    start = sami.build_model(parse_config(sami.SamiConfig, "", ["--config", str(recipe), *map(str, options)]), None)
    model = EfficientSamForPreTraining.from_pretrained(tmp_path / "model")
    for (name, ours), theirs in zip(model.named_parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8, msg=name)


def test_weight_decay_is_for_matrices_alone(sami):
    with torch.device("meta"):
        model = EfficientSamForPreTraining(sami.EfficientSamSamiConfig())
    groups = sorted(parameter_groups(model, 0.1, 0.05), key=lambda group: group["weight_decay"])
    spared, decayed = ({id(p) for p in group["params"]} for group in groups)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.1, 0.0), (0.1, 0.05)]
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and "token" not in name and "position" not in name
        assert (id(parameter) in decayed) == is_matrix and (id(parameter) in spared) != is_matrix, name


@pytest.mark.parametrize("path", sorted((TRAINING / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_takes_its_configs(path):
    config = load_config_from_file(str(path))
    # FSDP2 would cast the noise and the teacher's features as well.
    assert (
        config.mixed_precision == ("no" if config.fsdp_config else "bf16")
        and config.num_processes % config.num_machines == 0
    )
    if config.fsdp_config:
        layers = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
        assert set(layers) == set(EfficientSamForPreTraining._no_split_modules)
