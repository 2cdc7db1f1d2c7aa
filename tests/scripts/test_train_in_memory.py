"""`training/train_in_memory.py` on a CPU: from packed images to weights that load and are measured."""

import json
import os
import signal
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from script_runs import load_script, refuse, run

from hf_efficientsam import EfficientSamModel
from hf_efficientsam.inference.loading import load_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
SIZE = 64


@pytest.fixture(scope="module", autouse=True)
def clock():
    """Time passes by 0.1 seconds whenever a run looks at it, so that a busy machine makes as many steps as another."""
    ticks = count()
    with pytest.MonkeyPatch.context() as patch:
        clock = SimpleNamespace(perf_counter=lambda: next(ticks) / 10)
        patch.setattr(load_script("train_in_memory"), "time", clock)
        yield


@pytest.fixture(scope="module")
def data(coco, tmp_path_factory) -> list:
    """The options of training on the images of `coco`, squashed, and measuring on them as they are."""
    folder = tmp_path_factory.mktemp("packs")
    run("pack_masks", "--annotations", coco / "masks.json", "--size", SIZE, "--output_dir", folder / "train")
    run("pack_masks", "--annotations", coco / "masks.json", "--output_dir", folder / "val")
    (train,), (val,) = ((folder / kind).glob("*/*.tar") for kind in ("train", "val"))
    return ["--shards", train, "--val", val, "--device", "cpu", "--num_workers", 0, "--batch_size", 2, "--prompts", 3]


@pytest.fixture(scope="module")
def trained(data, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run("train_in_memory", *data, "--model", tiny_model, "--minutes", 0.1, "--warmup_steps", 1, "--evaluations", 2,
        "--val_images", 4, "--learning_rate", 1e-3, "--output_dir", folder)  # fmt: skip
    return folder


def test_the_weights_come_back_in_few_files_and_load(trained, tiny_model):
    assert {path.name for path in trained.iterdir()} == {"model", "summary.json"}
    names = {"config.json", "model.safetensors", "processor_config.json"}
    assert {path.name for path in (trained / "model").iterdir()} == names
    stored = load_file(trained / "model" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    model, processor = load_model(str(trained / "model"))
    assert model.dtype == torch.float32 and processor.image_processor.size.height == SIZE
    assert torch.get_float32_matmul_precision() == "highest"  # "high" is for a GPU, and would stay for what follows
    before = EfficientSamModel.from_pretrained(tiny_model).state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"vision_encoder.embeddings.projection.weight", "mask_decoder.iou_token.weight"} <= changed


def test_the_summary_has_the_curve_and_what_was_measured(trained):
    summary = json.loads((trained / "summary.json").read_text())
    steps = [row["step"] for row in summary["curve"]]
    assert steps[0] == 1 and steps == sorted(steps) and summary["seconds"] < 30
    assert all(row["loss"] > 0 for row in summary["curve"])
    images = [row["images"] for row in summary["evaluations"]]
    assert images[0] == 4 and images[-1] == 5  # the start; all at the end


def test_what_it_measures_is_what_evaluate_masks_measures(trained, coco, tmp_path):
    given = ["--annotations", coco / "masks.json", "--prompts", "box", "click1", "click3", "--num_workers", 0]
    run("evaluate_masks", "--model", trained / "model", *given, "--output", tmp_path / "metrics.json")
    expected = json.loads((tmp_path / "metrics.json").read_text())["results"]
    last = json.loads((trained / "summary.json").read_text())["evaluations"][-1]
    for prompt in ("box", "click1", "click3"):
        assert last[prompt] == pytest.approx(expected[prompt]["confident"]["all"]["miou"], abs=0.02)


def test_a_narrower_student_learns_its_teachers_embeddings_and_takes_its_decoder(data, tiny_model, tmp_path):
    run("train_in_memory", *data, "--model", tiny_model, "--hidden_size", 8, "--num_attention_heads", 1,
        "--reconstruct_minutes", 0.05, "--minutes", 0.1, "--evaluations", 1, "--warmup_steps", 1,
        "--output_dir", tmp_path)  # fmt: skip
    model, _ = load_model(str(tmp_path / "model"))
    assert model.config.vision_config.hidden_size == 8
    teacher = EfficientSamModel.from_pretrained(tiny_model)
    distance = (model.mask_decoder.iou_token.weight - teacher.mask_decoder.iou_token.weight).abs().max()
    assert 0 < distance < 0.1  # from the teacher's, a little further trained


def on_step(monkeypatch, step: int, change) -> None:
    """`change(norm)` takes the place of the gradient's norm at this step."""
    clip, steps = torch.nn.utils.clip_grad_norm_, count(1)

    def clipped(*arguments):
        norm = clip(*arguments)
        return change(norm) if next(steps) == step else norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_the_model_and_says_how_to_go_on(data, tiny_model, tmp_path, monkeypatch, number):
    handler = signal.getsignal(number)
    on_step(monkeypatch, 3, lambda norm: os.kill(os.getpid(), number) or norm)
    given = [*data, "--model", tiny_model, "--minutes", 5, "--val_images", 4, "--output_dir", tmp_path]
    said = run("train_in_memory", *given, code=128 + number).splitlines()[-1]
    assert said == (
        f"train_in_memory: Stopped by {number.name} after step 3, which is saved; --model {tmp_path / 'model'} goes "
        "on from there."
    )
    assert signal.getsignal(number) is handler
    changed, before = load_model(str(tmp_path / "model"))[0], load_model(str(tiny_model))[0]
    name = "mask_decoder.iou_token.weight"
    assert not torch.equal(changed.state_dict()[name], before.state_dict()[name])
    assert json.loads((tmp_path / "summary.json").read_text())["curve"][0]["step"] == 1


def test_a_step_that_is_not_finite_is_left_out_and_five_in_a_row_stop(data, tiny_model, tmp_path, monkeypatch):
    given = [*data, "--model", tiny_model, "--val_images", 4, "--evaluations", 1, "--output_dir", tmp_path]
    on_step(monkeypatch, 2, lambda norm: norm * float("nan"))
    said = run("train_in_memory", *given, "--minutes", 0.05)
    assert "The loss of step 2 is" in said and "(gradient nan); the step is left out." in said
    assert all(weight.isfinite().all() for weight in load_model(str(tmp_path / "model"))[0].state_dict().values())
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *arguments: torch.tensor(float("inf")))
    said = run("train_in_memory", *given, "--minutes", 5, code=1).splitlines()[-1]
    assert "The loss of step 5 is" in said and "5 in a row" in said and "lower --learning_rate" in said


def test_bad_options_are_refused_in_one_sentence(data, tiny_model, tmp_path):
    assert "Give --shards and --val" in refuse("train_in_memory", "--model", tiny_model)
    assert "needs a teacher" in refuse("train_in_memory", *data, "--reconstruct_minutes", 1)
    longer = ["--model", tiny_model, "--reconstruct_minutes", 9]
    assert "less than --minutes" in refuse("train_in_memory", *data, *longer)
    narrow = ["--model", tiny_model, "--hidden_size", 7, "--num_attention_heads", 1, "--reconstruct_minutes", 0.01]
    given = [*data, *narrow, "--minutes", 0.1, "--output_dir", tmp_path]
    assert "has no evenly spaced part" in refuse("train_in_memory", *given)
    if not torch.cuda.is_available():
        without_device = [one for one in data if one not in ("--device", "cpu")]
        assert "finds no GPU" in refuse("train_in_memory", *without_device, "--model", tiny_model)
