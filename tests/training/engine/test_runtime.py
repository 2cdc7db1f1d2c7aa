import errno
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from PIL import Image
from safetensors import SafetensorError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from hf_efficientsam.training.engine.runtime import (
    TIMINGS,
    Checkpoints,
    Curve,
    Log,
    SaveError,
    check_ranges,
    check_same_run,
    epoch_batches,
    epoch_loader,
    fill_between,
    layer_decay,
    parameter_groups,
    parse_recipe,
    replaced_folder,
    start_accelerator,
    stop_unless_finite,
    tracker_arguments,
    weight_average,
)


@dataclass(frozen=True)
class Recipe:
    train: list[str] = field(default_factory=list)
    scales: list[float] = field(default_factory=lambda: [1.0])
    model: str | None = None
    rate: float = 1.0
    steps: int = 5
    flip: bool = True
    debug: bool = False


def write(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


# ------------------------------------------------------------------------------------------------ recipes


def test_defaults():
    assert parse_recipe(Recipe, "", []) == Recipe()


def test_every_type_from_a_file(tmp_path):
    text = "train: [a.json, b.json]\nscales: [1, 1e-2]\nmodel: 7\nrate: 1e-4\nsteps: 9\nflip: false\ndebug: true\n"
    recipe = parse_recipe(Recipe, "", ["--config", write(tmp_path, text)])
    assert recipe == Recipe(["a.json", "b.json"], [1.0, 0.01], "7", 1e-4, 9, False, True)
    assert all(isinstance(scale, float) for scale in recipe.scales)


def test_one_value_where_a_list_is_wanted_and_null(tmp_path):
    recipe = parse_recipe(Recipe, "", ["--config", write(tmp_path, "train: a.json\nmodel: null\nrate: -2\n")])
    assert (recipe.train, recipe.model, recipe.rate) == (["a.json"], None, -2.0)


@pytest.mark.parametrize("file_last", [True, False])
def test_the_command_line_has_the_last_word(tmp_path, file_last):
    file = ["--config", write(tmp_path, "steps: 9\nrate: 2\ntrain: [a, b]\nflip: true\n")]
    given = ["--steps", "3", "--train", "c", "--flip", "false"]
    recipe = parse_recipe(Recipe, "", given + file if file_last else file + given)
    assert recipe == Recipe(train=["c"], steps=3, rate=2.0, flip=False)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("step: 9\n", "['step']; the names are debug, flip"),
        ("1: 2\nstep: 9\n", "['1', 'step']"),
        ("- 1\n", "no `name: value` lines"),
        ("", "no `name: value` lines"),
        ("steps: [1\n", "is not YAML"),
        ("steps: many\n", "argument --steps: invalid int value: 'many'"),
        ("scales: [1, wide]\n", "argument --scales: invalid float value: 'wide'"),
        ("steps: [1, 2]\n", "unrecognized arguments: 2"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, capsys, text, sentence):
    with pytest.raises(SystemExit) as exit:
        parse_recipe(Recipe, "", ["--config", write(tmp_path, text)])
    assert exit.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_a_file_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "image").write_bytes(b"\x89PNG\xff\xfe\x00")
    for path, sentence in (("absent", "No such file"), ("", "Is a directory"), ("image", "is not YAML")):
        with pytest.raises(SystemExit) as exit:
            parse_recipe(Recipe, "", ["--config", str(tmp_path / path)])
        assert exit.value.code == 2
        assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_an_unknown_option(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_recipe(Recipe, "", ["--stepz", "3"])
    assert exit.value.code == 2
    assert "--stepz" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- checkpoints


class Run:
    """A run whose model takes one random step at a time."""

    def __init__(self, folder, keep=2):
        accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(2, 2)
        self.model, self.optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 0.1))
        self.checkpoints = Checkpoints(accelerator, folder, keep)

    def step(self):
        self.model(torch.randn(3, 2)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.model.weight.detach().clone()


def test_resuming_goes_on_as_if_nothing_had_happened(tmp_path):
    run = Run(tmp_path / "a")
    assert run.checkpoints.resume() == 0 and run.checkpoints.steps() == []
    run.step()
    run.checkpoints.save(1)
    expected = run.step()

    torch.randn(7)  # another state of the random numbers
    resumed = Run(tmp_path / "a")
    assert resumed.checkpoints.resume() == 1
    assert torch.equal(resumed.step(), expected)  # weights, moments and random numbers are all restored


def test_the_newest_are_kept_and_resumed(tmp_path):
    run = Run(tmp_path, keep=2)
    weights = {}
    for step in (9, 100, 20_000):  # of different lengths: sorted as numbers
        weights[step] = run.step()
        run.checkpoints.save(step)
    assert run.checkpoints.steps() == [100, 20_000]
    resumed = Run(tmp_path)
    assert resumed.checkpoints.resume() == 20_000
    assert torch.equal(resumed.model.weight, weights[20_000])


def test_a_killed_save_is_no_checkpoint(tmp_path, monkeypatch):
    run = Run(tmp_path)
    weight = run.step()
    run.checkpoints.save(1)
    run.step()

    def killed(folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half of")
        (folder / "model_1.safetensors").write_bytes(b"of another kind of run")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run.checkpoints.accelerator, "save_state", killed)
        with pytest.raises(KeyboardInterrupt):
            run.checkpoints.save(2)
    resumed = Run(tmp_path)
    assert resumed.checkpoints.resume() == 1
    assert torch.equal(resumed.model.weight, weight)
    resumed.checkpoints.save(2)  # and the next save is not in its way
    assert resumed.checkpoints.steps() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]
    assert not (tmp_path / "step_00000002" / "model_1.safetensors").exists()


def no_space(path):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "free"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), 2),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), 0),  # torch.save's
    ],
    ids=["python", "safetensors", "torch"],
)
def test_a_full_disk(tmp_path, monkeypatch, error, free):
    run = Run(tmp_path)
    run.step()

    def half(folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(3 * 2**20))
        raise error

    for kept in ("there is no earlier one", "the checkpoint of step 1 is kept"):
        with monkeypatch.context() as patch:
            patch.setattr(run.checkpoints.accelerator, "save_state", half)
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free * 2**20))
            with pytest.raises(SaveError) as caught:
                run.checkpoints.save(2)
        assert str(caught.value) == (
            f"The checkpoint of step 2 could not be written: the disk is full, {tmp_path} needs more than the "
            f"{3 + free}.0 MiB that were free; free space and start again; {kept}."
        )
        assert caught.value.__cause__ is error
        assert not (tmp_path / "writing").exists() and not (tmp_path / "step_00000002").exists()
        if run.checkpoints.steps() == []:
            run.checkpoints.save(1)
    assert Run(tmp_path).checkpoints.resume() == 1


def test_another_reason_is_told_as_it_is(tmp_path, monkeypatch):
    run = Run(tmp_path)

    def refused(folder):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(run.checkpoints.accelerator, "save_state", refused)
    with pytest.raises(
        SaveError, match=r"step 2 could not be written: PermissionError: .*Permission denied; there is"
    ):
        run.checkpoints.save(2)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    run = Run(tmp_path)
    synced, fsync = set(), os.fsync

    def noted(descriptor):
        assert not list(tmp_path.glob("step_*"))
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", noted)
        run.checkpoints.save(1)
    files = [path for path in (tmp_path / "step_00000001").rglob("*") if path.is_file()]
    assert synced == {path.stat().st_ino for path in files} and len(files) >= 3

    monkeypatch.setattr(os, "fsync", no_space)  # where some file systems first say so
    with pytest.raises(SaveError, match=r"the disk is full.*step 1 is kept"):
        run.checkpoints.save(2)
    assert run.checkpoints.steps() == [1] and not (tmp_path / "writing").exists()


def two_processes(function: str, folder: Path):
    """Runs a function of this file on two, each started anew: a fork would inherit Accelerate's state and threads."""
    start = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    start += f"from pathlib import Path\nfrom test_runtime import {function}\n{function}(Path({str(folder)!r}))\n"
    (folder / "start.py").write_text(start)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, folder / "start.py"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def fail_on_one_process(folder):
    """One of the two cannot write, then the other; at last they find different checkpoints."""
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 2)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    checkpoints = Checkpoints(accelerator, folder)
    save_state, index = accelerator.save_state, accelerator.process_index
    checkpoints.save(1)
    for failing in (0, 1):
        accelerator.save_state = no_space if index == failing else save_state
        try:
            checkpoints.save(2)
        except SaveError as error:
            (folder / f"sentence_{failing}_{index}").write_text(str(error))
    accelerator.save_state = save_state
    checkpoints.save(3)
    assert checkpoints.resume() == 3
    if index == 1:
        checkpoints.folder = folder / "not shared"
    with pytest.raises(ValueError, match=r"different steps \(\[0, 3\]\).*all machines share"):
        checkpoints.resume()
    accelerator.end_training()


@pytest.mark.slow
def test_two_processes_fail_together(tmp_path):
    two_processes("fail_on_one_process", tmp_path)
    for failing in (0, 1):
        sentences = {(tmp_path / f"sentence_{failing}_{index}").read_text() for index in (0, 1)}
        assert len(sentences) == 1 and sentences.pop().endswith("the checkpoint of step 1 is kept.")
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000001", "step_00000003"]


def test_an_averaged_model_is_part_of_a_checkpoint(tmp_path):
    def start():
        run = Run(tmp_path)
        unwrapped = run.checkpoints.accelerator.unwrap_model(run.model)
        average = weight_average(unwrapped, 0.9)
        run.checkpoints.accelerator.register_for_checkpointing(average)
        return run, average

    def step(run, average):
        run.step()
        average.update_parameters(run.model)
        return average.module.weight.clone()

    run, average = start()
    step(run, average)
    step(run, average)
    run.checkpoints.save(2)
    expected = step(run, average)
    assert not torch.equal(expected, run.model.weight)
    run, average = start()
    assert run.checkpoints.resume() == 2 and average.n_averaged == 2
    assert torch.equal(step(run, average), expected)


# -------------------------------------------------------------------------------------------------- curve


def test_curve_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "run" / "curve.jsonl"
    curve = Curve(path, 0)
    for step in (2, 4, 6):
        curve.add(step=step, loss=1 / step)
    resumed = Curve(path, 4)
    resumed.add(step=6, loss=9.0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == resumed.rows == [{"step": 2, "loss": 0.5}, {"step": 4, "loss": 0.25}, {"step": 6, "loss": 9.0}]
    assert Curve(path, 0).rows == [] and path.read_text() == ""  # a new run in an old place


def test_curve_is_drawn(tmp_path):
    curve = Curve(tmp_path / "curve.jsonl", 0)
    curve.add(step=1, loss=2.0, lr=0.1)
    curve.add(step=2, loss=1.0, lr=0.2)
    curve.plot(["loss", "lr"])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KeyError):
        curve.plot(["accuracy"])


def test_a_torn_last_line_of_the_curve_is_dropped(tmp_path):
    path = tmp_path / "curve.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert Curve(path, 2).rows == [{"step": 1, "loss": 2.0}]
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    with pytest.raises(KeyboardInterrupt), replaced_folder(folder) as writing:
        (writing / "weights").write_text("half")
        raise KeyboardInterrupt
    assert (folder / "weights").read_text() == "old"
    with replaced_folder(folder) as writing:
        (writing / "weights").write_text("new")
    assert (folder / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    folder.rename(tmp_path / "model.old")  # where a kill between the two renames leaves it
    with pytest.raises(KeyboardInterrupt), replaced_folder(folder):
        raise KeyboardInterrupt
    assert (folder / "weights").read_text() == "new"


def test_a_full_disk_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    with (
        pytest.raises(
            SaveError, match=r"model could not be written: the disk is full, .* free space and start again\."
        ),
        replaced_folder(folder) as writing,
    ):
        (writing / "weights").write_text("half")
        no_space(writing)
    assert (folder / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_another_recipe_in_the_same_folder_is_refused(tmp_path):
    @dataclass(frozen=True)
    class Recipe:
        output_dir: str = str(tmp_path)
        shards: list[str] = field(default_factory=list)
        steps: int = 3
        save_steps: int = 1
        batch_size: int = 4
        num_workers: int = 0

    check_same_run(Recipe(steps=9), 1)
    check_same_run(Recipe(), 1)  # nothing of the first one was kept
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    check_same_run(Recipe(save_steps=2, batch_size=2, num_workers=1), 2)
    with pytest.raises(ValueError, match="another steps; choose a new --output_dir"):
        check_same_run(Recipe(steps=4), 1)
    (tmp_path / "recipe.json").unlink()
    check_same_run(Recipe(shards=["a.tar"]), 1)
    check_same_run(Recipe(shards=["a.tar"], save_steps=2), 1)
    with pytest.raises(ValueError, match="another batch_size, num_workers, num_processes; choose"):
        check_same_run(Recipe(shards=["a.tar"], batch_size=2, num_workers=1), 2)


def groups_by_name(model, *arguments):
    """{name of a parameter: (learning rate, weight decay)}"""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, *arguments)
    return {names[one]: (group["lr"], group["weight_decay"]) for group in groups for one in group["params"]}


def test_weight_decay_is_for_the_weights_of_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(4), nn.Embedding(5, 4), nn.Linear(4, 2))
    found = groups_by_name(model, 0.1, 0.05)
    assert {name for name, (_, decay) in found.items() if decay} == {"0.weight", "3.weight"}
    assert set(found.values()) == {(0.1, 0.05), (0.1, 0.0)} and len(found) == 7


def test_frozen_parameters_are_in_no_group_and_rates_are_scaled():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].bias.requires_grad = False
    found = groups_by_name(model, 0.1, 0.05, lambda name: 0.5 if name.startswith("1") else 1.0)
    assert found == {"0.weight": (0.1, 0.05), "1.weight": (0.05, 0.05), "1.bias": (0.05, 0.0)}


def test_an_average_of_the_weights_forgets_its_start():
    model = nn.Linear(1, 1)
    average, expected = weight_average(model, 0.9), None
    for step in range(200):
        nn.init.constant_(model.weight, step)
        average.update_parameters(model)
        share = min(0.9, (1 + step) / (10 + step))
        expected = step if expected is None else share * expected + (1 - share) * step
    assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)
    short = weight_average(model, 0.9999)
    for step in range(100):
        nn.init.constant_(model.weight, step)
        short.update_parameters(model)
    assert short.module.weight.item() > 80  # a mean that forgot nothing would be near 0


def test_in_float16_an_infinite_gradient_is_left_to_the_scaler(monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "scaler", object())
    stop_unless_finite(accelerator, torch.tensor(1.0), torch.tensor(float("inf")), 3, ["a.jpg"])
    with pytest.raises(FloatingPointError, match="step 3"):
        stop_unless_finite(accelerator, torch.tensor(float("nan")), torch.tensor(1.0), 3, ["a.jpg"])


def test_layer_decay_counts_from_the_last_layer():
    rates = {
        "vision_encoder.layers.11.mlp.fc1.weight": 0.8,
        "vision_encoder.layers.0.mlp.fc1.weight": 0.8**12,
        "vision_encoder.embeddings.projection.weight": 0.8**13,
        "vision_encoder.neck.conv1.weight": 1,
        "mask_decoder.layers.0.mlp.fc1.weight": 1,
        "vision_encoder.cls_token": 0.8**13,
        "classifier.weight": 1,
        "model.pixel_level_module.encoder.vision_encoder.layers.10.mlp.fc1.weight": 0.8**2,
        "model.pixel_level_module.encoder.vision_encoder.embeddings.position_embeddings": 0.8**13,
        "model.pixel_level_module.encoder.pyramid.levels.4.neck.conv.weight": 1,
        "model.transformer_module.decoder.layers.0.fc1.weight": 1,
    }
    assert {name: layer_decay(name, 12, 0.8) for name in rates} == pytest.approx(rates)


def test_gradients_are_accumulated_to_the_global_batch(monkeypatch, tmp_path):
    def steps(batch_size, processes):
        monkeypatch.setattr(Accelerator, "num_processes", processes)
        recipe = SimpleNamespace(global_batch_size=8, batch_size=batch_size, seed=0, trackers=[], output_dir=tmp_path)
        return start_accelerator(recipe, cpu=True).gradient_accumulation_steps

    assert [steps(2, n) for n in (1, 2, 4)] == [4, 2, 1] and [steps(None, n) for n in (1, 2, 8)] == [1, 1, 1]
    for batch_size, processes in ((3, 2), (1, 16)):
        with pytest.raises(ValueError, match=f"8 must be a multiple of --batch_size {batch_size} times {processes}"):
            steps(batch_size, processes)


class Numbers(torch.utils.data.Dataset):
    epoch = 0

    def __len__(self):
        return 11

    def __getitem__(self, index):
        return 100 * self.epoch + index

    def set_epoch(self, epoch):
        self.epoch = epoch


def test_an_epoch_has_whole_steps_and_can_be_entered_anywhere():
    configuration = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, dataloader_config=configuration)
    data, recipe = Numbers(), SimpleNamespace(epoch_images=None, global_batch_size=4, num_workers=0)
    loader, steps = epoch_loader(accelerator, data, recipe)
    assert steps == 2
    epochs = [[batch.tolist() for batch in epoch_batches(accelerator, loader, data, e, 0)] for e in (0, 1, 0)]
    assert [len(epoch) for epoch in epochs] == [4, 4, 4] and epochs[0] == epochs[2]
    assert [[n % 100 for n in batch] for batch in epochs[1]] != epochs[0]
    later = [batch.tolist() for batch in epoch_batches(accelerator, loader, data, 1, 3)]
    assert later == epochs[1][3:]
    with pytest.raises(ValueError, match="3 images are less than one step; lower --global_batch_size 4"):
        epoch_loader(accelerator, data, SimpleNamespace(epoch_images=3, global_batch_size=4, num_workers=0))


@pytest.mark.parametrize(("loss", "grad_norm"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_a_step_that_is_not_finite_names_its_images(loss, grad_norm):
    accelerator = Accelerator(cpu=True)
    stop_unless_finite(accelerator, torch.tensor(1.0), torch.tensor(2.0), 3, ["a.jpg"])
    with pytest.raises(FloatingPointError, match=r"step 3 is .* on the images a\.jpg, b\.jpg"):
        stop_unless_finite(accelerator, torch.tensor(loss), torch.tensor(grad_norm), 3, ["a.jpg", "b.jpg"])


def test_text_between_marks_is_replaced():
    page = "before\n<!-- a -->\nold\n<!-- b -->\nafter\n"
    for text in ("new", "newer"):
        page = fill_between(page, "<!-- a -->", "<!-- b -->", text)
        assert page == f"before\n<!-- a -->\n{text}\n<!-- b -->\nafter\n"


# ---------------------------------------------------------------------------------------------------- log


def log_steps(folder, until, trackers=(), save_at=5, steps=14):
    """A run whose loss is 1 / step, with rows at 4, 8, 12 and 14, pictures at 4 and 8; stopped after `until`."""
    accelerator = Accelerator(cpu=True, **tracker_arguments(list(trackers), folder))
    log = Log(accelerator, folder, steps, every=4)
    checkpoints = Checkpoints(accelerator, folder / "checkpoints")
    step = checkpoints.resume()
    log.start(step, "sami", {"images": ["a", "b"], "cache": None, "rate": 1e-3, "flip": True})
    while step < until:
        step += 1
        log.add(step, images=8, loss=torch.tensor(1 / step), rate=0.1 * step)
        if step == save_at:
            checkpoints.save(step)
        if step in (4, 8):
            log.picture(step, Image.new("RGB", (6, 3), (20 * step, 0, 0)), "colours")
    return accelerator, log


def without_timings(rows):
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def test_rows_are_means_and_the_newest_rate(tmp_path):
    _, log = log_steps(tmp_path, 14)
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    losses = [np.mean([1 / step for step in range(*steps)]) for steps in ((1, 5), (5, 9), (9, 13), (13, 15))]
    assert [row["step"] for row in rows] == [4, 8, 12, 14]
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    assert [row["rate"] for row in rows] == pytest.approx([0.4, 0.8, 1.2, 1.4])
    assert all(row.keys() == {"step", "loss", "rate", *TIMINGS} for row in rows)
    assert rows[-1]["seconds_to_go"] == 0 and rows[0]["images_per_second"] > 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert Image.open(tmp_path / "pictures" / "colours_00000008.png").getpixel((0, 0)) == (160, 0, 0)


def test_time_is_counted(tmp_path, monkeypatch):
    """Two steps of ten seconds: 8 images each, eight more steps to come; the next start adds to the seconds."""
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    log = Log(Accelerator(cpu=True), tmp_path, steps=10, every=2)
    log.start(0, "sami", {})
    for step in (1, 2):
        now += 10
        log.add(step, images=8, loss=torch.tensor(1.0))
    timings = {"images_per_second": 0.8, "seconds": 20, "seconds_to_go": 80}
    assert log.curve.rows == [{"step": 2, "loss": 1.0, **timings}]
    log.start(2, "sami", {})
    for step in (3, 4):
        now += 5
        log.add(step, images=8, loss=torch.tensor(1.0))
    assert log.curve.rows[-1] == {"step": 4, "loss": 1.0, "images_per_second": 1.6, "seconds": 30, "seconds_to_go": 30}


@pytest.mark.parametrize("killed_at", [2, 5, 7, 9])
def test_a_resumed_run_writes_the_same_rows(tmp_path, killed_at):
    """The checkpoint is at step 5, in the middle of the mean over steps 5 to 8."""
    _, whole = log_steps(tmp_path / "whole", 14)
    log_steps(tmp_path / "killed", killed_at)
    _, resumed = log_steps(tmp_path / "killed", 14)
    assert len(whole.curve.rows) == 4
    assert without_timings(resumed.curve.rows) == without_timings(whole.curve.rows)


def log_on_two_processes(folder):
    accelerator = Accelerator(cpu=True)
    log = Log(accelerator, folder, 4, every=4)
    log.start(0, "sami", {})
    for step in (1, 2, 3, 4):
        log.add(step, images=8, loss=torch.tensor(10.0 * accelerator.process_index + step))
        if step == 3:
            torch.save(log.state_dict(), folder / f"state_{accelerator.process_index}")
    accelerator.end_training()


@pytest.mark.slow
def test_losses_are_means_over_the_processes(tmp_path):
    two_processes("log_on_two_processes", tmp_path)
    assert json.loads((tmp_path / "curve.jsonl").read_text())["loss"] == 7.5
    # The state of the main process is saved and loaded on all, so it must be the same on all.
    states = [torch.load(tmp_path / f"state_{index}") for index in (0, 1)]
    assert torch.equal(states[0]["sums"], states[1]["sums"]) and states[0]["summed"] == states[1]["summed"] == 3


def test_tensorboard_sees_each_step_once(tmp_path):
    log_steps(tmp_path, 9, ["tensorboard"])
    accelerator, log = log_steps(tmp_path, 14, ["tensorboard"])
    log.close()
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "trackers" / "sami")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [4, 8, 12, 14]
    assert [event.value for event in events.Scalars("rate")] == pytest.approx([0.4, 0.8, 1.2, 1.4])
    assert set(TIMINGS) < set(events.Tags()["scalars"])
    pictures = events.Images("colours")
    assert [event.step for event in pictures] == [4, 8] and (pictures[0].width, pictures[0].height) == (6, 3)


TRACKIO_RUN = """
import os, socket, sys
from pathlib import Path
from types import SimpleNamespace

def refused(self, address):
    raise AssertionError(f"a connection to {address}")

socket.socket.connect = refused
from test_runtime import log_steps
accelerator, log = log_steps(Path(sys.argv[1]), int(sys.argv[2]), ["trackio"])
log.close()
accelerator.end_training()
"""


@pytest.mark.slow
def test_trackio_sees_each_step_once_and_needs_no_network(tmp_path):
    """In processes of their own: trackio decides where its files go when it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRACKIO_")}
    for until in (9, 14):
        command = [sys.executable, "-c", TRACKIO_RUN, str(tmp_path / "run_a"), str(until)]
        subprocess.run(command, cwd=Path(__file__).parent, env=environment, check=True, capture_output=True)
    database = sqlite3.connect(tmp_path / "run_a" / "trackers" / "sami.db")
    rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    values = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert {name for name, _, _ in rows} == {"run_a"}
    assert [step for step, value in values if "loss" in value] == [4, 8, 12, 14]
    assert [step for step, value in values if "colours" in value] == [4, 8]
    (config,) = database.execute("SELECT config FROM configs").fetchall()
    assert json.loads(config[0])["images"] == "['a', 'b']"
    assert len(list((tmp_path / "run_a" / "trackers" / "media").rglob("*.png"))) == 2


def test_an_unknown_tracker(tmp_path):
    with pytest.raises(ValueError, match=r"no tracker wandb here; install it, or take .*tensorboard.*trackio"):
        tracker_arguments(["wandb", "tensorboard"], tmp_path)


def test_options_out_of_range_are_named():
    fields = {"steps": 1, "batch_size": None, "seed": 0, "erasing": 1.0, "ema_decay": 0.0}
    kinds = {"positive": ["steps", "batch_size"], "not_negative": ["seed"], "shares": ["erasing"]}
    kinds["below_one"] = ["ema_decay"]
    check_ranges(SimpleNamespace(**fields), **kinds)
    for name, value, words in (
        ("steps", 0, "--steps is 0; it must be more than 0."),
        ("batch_size", -1, "--batch_size is -1; it must be more than 0."),
        ("seed", -1, "--seed is -1; it must not be negative."),
        ("erasing", 1.1, "--erasing is 1.1; it must be between 0 and 1."),
        ("ema_decay", 1.0, "--ema_decay is 1.0; it must be at least 0 and less than 1."),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            check_ranges(SimpleNamespace(**fields | {name: value}), **kinds)
