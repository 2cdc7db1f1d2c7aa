"""The scripts in `training/`, run as a user does, on tiny models and a handful of images."""

import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from hf_efficientsam import (
    EfficientSamConfig,
    EfficientSamForPreTraining,
    EfficientSamImageProcessor,
    EfficientSamModel,
    EfficientSamProcessor,
    EfficientSamSamiConfig,
    EfficientSamVisionConfig,
    EfficientSamVisionModel,
)

TRAINING = Path(__file__).resolve().parents[1] / "training"
SIZE = 64  # of the model input
STEPS, SAVE_STEPS = 7, 3  # epochs have 2 steps: checkpoints lie within them and between them

pytestmark = pytest.mark.slow  # every run of a script begins with importing torch and transformers


def command(script: str, *arguments) -> list[str]:
    return [sys.executable, str(TRAINING / f"{script}.py"), *map(str, arguments)]


def environment() -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(script: str, *arguments) -> str:
    """What the script prints."""
    done = subprocess.run(command(script, *arguments), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refuse(script: str, *arguments) -> str:
    """What a script says, in this process, before it ends with code 2: its last line."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(output), pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "argv", command(script, *arguments)[1:])
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert exit.value.code == 2
    return output.getvalue().splitlines()[-1]


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """A json of 5 images with 1 to 5 objects each: bright rectangles and discs on a dark ground."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "images").mkdir()
    images, annotations = [], []
    for i in range(5):
        width, height = 60 + 8 * i, 80 - 6 * i
        image = Image.new("RGB", (width, height), (20, 10 * i, 40))
        draw = ImageDraw.Draw(image)
        for n in range(i + 1):
            left, top = 2 + 9 * n, 3 + 7 * n
            right, bottom = left + 12 + i, top + 20
            draw.rectangle((left, top, right - 1, bottom - 1), fill=(250 - 30 * n, 200, 60 * n))
            polygon = [left, top, right, top, right, bottom, left, bottom]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i, "segmentation": [polygon], "iscrowd": 0, "category_id": 1}
            )
        image.save(folder / "images" / f"{i}.jpg")
        images.append({"id": i, "file_name": f"{i}.jpg", "width": width, "height": height})
    (folder / "masks.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_channels": 32}
    decoder = {"hidden_size": 32, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    config = EfficientSamConfig(
        vision_config={**vision, "image_size": SIZE, "pretrain_image_size": SIZE},
        prompt_encoder_config={"hidden_size": 32, "background_points": True, "mask_prompts": True},
        mask_decoder_config={**decoder, "upscaling_channels": [8, 4]},
    )
    EfficientSamModel(config).half().save_pretrained(folder)  # half precision, as the bundled one
    EfficientSamProcessor(EfficientSamImageProcessor(size=SIZE)).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------ finetune_masks


@pytest.fixture(scope="module")
def finetune(coco, tiny_model, tmp_path_factory) -> list:
    """Arguments of a tiny run, part of them in a recipe file."""
    recipe = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    recipe.write_text(
        f"train: {coco / 'masks.json'}\nimage_size: {SIZE}\nbatch_size: 2\nmax_masks: 3\nsteps: {STEPS}\n"
        "warmup_steps: 2\nlearning_rate: 1e-3\ngeometry_steps: 2\nlog_steps: 1\n"
    )
    return ["--config", recipe, "--model", tiny_model, "--save_steps", SAVE_STEPS]


@pytest.fixture(scope="module")
def finetuned(finetune, tmp_path_factory) -> Path:
    """The output folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finetuned")
    run("finetune_masks", *finetune, "--output_dir", folder)
    return folder


def read_curve(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_finetune_writes_a_model_a_processor_and_a_curve(finetuned, tiny_model):
    model, info = EfficientSamModel.from_pretrained(finetuned / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.float32 and model.config.vision_config.image_size == SIZE
    before = EfficientSamModel.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "vision_encoder.layers.0.mlp.fc1.weight" in changed
    assert "prompt_encoder.box_top_left_embed.weight" in changed
    assert "prompt_encoder.position_embedding.frequencies" not in changed

    size = EfficientSamProcessor.from_pretrained(finetuned / "model").image_processor.size
    assert (size.height, size.width) == (SIZE, SIZE)
    curve = read_curve(finetuned)
    assert [row["step"] for row in curve] == list(range(1, STEPS + 1))
    assert all(row["loss"] > 0 for row in curve)
    assert (finetuned / "curve.png").read_bytes().startswith(b"\x89PNG")
    kept = sorted(path.name for path in (finetuned / "checkpoints").iterdir())
    assert kept == [f"step_{SAVE_STEPS * 2:08d}", f"step_{STEPS:08d}"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_killed_and_resumed_run_ends_as_one_that_was_not(finetune, finetuned, tmp_path, num_workers):
    arguments = [*finetune, "--output_dir", tmp_path, "--num_workers", num_workers]
    first = tmp_path / "checkpoints" / f"step_{SAVE_STEPS:08d}"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command("finetune_masks", *arguments), env=environment(), stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 200
        while not first.is_dir():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    # Half a checkpoint, as if the kill had struck while the next one was written.
    writing = tmp_path / "checkpoints" / "writing"
    writing.mkdir(exist_ok=True)
    (writing / "model.safetensors").write_bytes(b"half of")
    done = [path.name for path in (tmp_path / "checkpoints").glob("step_*")]
    assert f"step_{STEPS:08d}" not in done, "the run was over before it could be killed"

    run("finetune_masks", *arguments)
    assert read_curve(tmp_path) == read_curve(finetuned)
    resumed, expected = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, finetuned))
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert not writing.exists()


def test_a_finished_run_has_nothing_left_to_do(finetune, finetuned):
    weights = (finetuned / "model" / "model.safetensors").read_bytes()
    curve = read_curve(finetuned)
    run("finetune_masks", *finetune, "--output_dir", finetuned)
    assert (finetuned / "model" / "model.safetensors").read_bytes() == weights
    assert read_curve(finetuned) == curve


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stepz: 3\n", "['stepz']; the names are"),
        ("steps: [1\n", "is not YAML"),
        ("steps: many\n", "invalid int value: 'many'"),
        (None, "cannot be read"),
    ],
)
def test_finetune_refuses_a_bad_config_in_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    assert sentence in refuse("finetune_masks", "--config", path, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, sentence",
    [(["--batch_size", 64], "are fewer than a batch of 64"), (["--image_size", 100], "must be a multiple of 16")],
)
def test_finetune_refuses_what_cannot_train(coco, tmp_path, arguments, sentence):
    given = ["--train", coco / "masks.json", "--output_dir", tmp_path / "run", "--batch_size", 2, *arguments]
    assert sentence in refuse("finetune_masks", *given)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def pretrained(tmp_path) -> Path:
    """An encoder as wide as the tiny model's, without a neck, from a configuration that knows nothing of that neck."""
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pretrain_image_size": SIZE}
    EfficientSamForPreTraining(EfficientSamSamiConfig(vision_config=vision)).save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


def test_finetune_writes_a_model_that_loads_with_a_pretrained_encoder(coco, tiny_model, pretrained, tmp_path):
    run(
        "finetune_masks", "--train", coco / "masks.json", "--model", tiny_model, "--encoder", pretrained,
        "--image_size", SIZE, "--batch_size", 2, "--steps", 1, "--num_workers", 0, "--output_dir", tmp_path / "run",
    )  # fmt: skip
    model, info = EfficientSamModel.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.vision_config.output_channels == 32


def test_finetune_refuses_an_encoder_of_another_width(coco, pretrained, tmp_path):
    given = ["--train", coco / "masks.json", "--model", "bundled", "--encoder", pretrained, "--batch_size", 2]
    sentence = refuse("finetune_masks", *given, "--output_dir", tmp_path / "run")
    assert "--encoder is 16 wide and --model 192; choose two of one size." in sentence
    assert not (tmp_path / "run").exists()


def test_finetune_refuses_to_mix_runs(finetuned, coco):
    given = ["--train", coco / "masks.json", "--output_dir", finetuned, "--steps", 77]
    assert "choose a new --output_dir" in refuse("finetune_masks", *given, "--batch_size", 2)


def test_finetune_asks_for_data(tmp_path):
    script = command("finetune_masks", "--output_dir", tmp_path / "run")
    done = subprocess.run(script, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "finetune_masks: Give --train at least one COCO-style json file."
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ evaluate_masks


def test_evaluate(coco, tiny_model, tmp_path):
    output, picture = tmp_path / "new" / "metrics.json", tmp_path / "cases.png"
    table = run(
        "evaluate_masks", "--model", tiny_model, "--annotations", coco / "masks.json", "--output", output,
        "--picture", picture,
    )  # fmt: skip
    report = json.loads(output.read_text())
    assert (report["images"], report["masks"]) == (5, 15)
    assert report["input_size"] == {"height": SIZE, "width": SIZE}
    assert report["protocol"] and report["versions"]["torch"] == torch.__version__
    results = report["results"]
    assert set(results) == {"box", "click1", "click3", "click5", "baseline"}
    assert results["baseline"]["filled_box"]["all"] == {"miou": 1.0, "count": 15}  # every object is a rectangle
    assert 0.7 < results["baseline"]["ellipse"]["all"]["miou"] < 0.85  # pi / 4, and pixels
    assert set(results["box"]) == {"confident", "best", "single"}
    for prompt in ("box", "click1", "click3", "click5"):
        assert 0 <= results[prompt]["confident"]["all"]["miou"] <= results[prompt]["best"]["all"]["miou"] <= 1
    assert f"{results['box']['confident']['all']['miou']:.4f}" in table
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_evaluate_repeats_itself_whatever_else_is_asked(coco, tiny_model, tmp_path):
    def numbers(*arguments):
        run(
            "evaluate_masks", "--model", tiny_model, "--annotations", coco / "masks.json", "--images",
            coco / "images", "--limit", 3, "--output", tmp_path / "out.json", *arguments,
        )  # fmt: skip
        return json.loads((tmp_path / "out.json").read_text())

    both, one = numbers("--prompts", "click3", "box"), numbers("--prompts", "click3")
    assert (one["images"], one["masks"]) == (3, 6)
    assert both["results"]["click3"] == one["results"]["click3"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Give --annotations"),
        (["--annotations", "absent.json"], "There is no annotation file absent.json"),
        (["--annotations", "COCO", "--prompts", "circle"], "The prompt 'circle' is unknown"),
        (["--annotations", "COCO", "--limit", "0"], "There is no mask to evaluate"),
        (["--annotations", "COCO", "--images", "elsewhere"], "which is not in elsewhere"),
        (["--annotations", "COCO", "--prompts", "click1", "--picture", "a.png"], "add box to --prompts"),
        (["--annotations", "COCO", "--model", "absent/runs/model"], "absent/runs/model: no such directory"),
        (["--annotations", "COCO", "--model", "VISION"], "holds a model of type 'efficientsam_vision_model'"),
        (["--annotations", "COCO", "--model", "TINY", "--device", "gpu"], "Expected one of cpu"),
    ],
)
def test_evaluate_refuses_bad_input_in_one_sentence(coco, tiny_model, tmp_path, arguments, sentence):
    if "VISION" in arguments:  # an encoder alone
        config = EfficientSamVisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        EfficientSamVisionModel(config).save_pretrained(tmp_path)
    places = {"COCO": coco / "masks.json", "VISION": tmp_path, "TINY": tiny_model}
    assert sentence in refuse("evaluate_masks", *(places.get(argument, argument) for argument in arguments))
