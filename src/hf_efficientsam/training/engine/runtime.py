"""What every training script needs around its loop: its recipe, its checkpoints, its log."""

import argparse
import dataclasses
import errno
import json
import math
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, gather_object
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from tqdm.auto import tqdm
from transformers import HfArgumentParser

Recipe = TypeVar("Recipe")


def parse_recipe(recipe_class: type[Recipe], description: str, arguments: list[str] | None = None) -> Recipe:
    """
    A recipe from `--config FILE.yaml` and the command line, which has the last word. Every field needs a default.

    Raises:
        SystemExit: with code 2 and one sentence if the file or an argument does not fit.
    """
    parser = HfArgumentParser(
        recipe_class, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    config_parser = argparse.ArgumentParser(add_help=False)
    config_parser.add_argument("--config", type=Path)
    parser.add_argument("--config", metavar="FILE.yaml", help="values for the options above")
    config, given = config_parser.parse_known_args(arguments)
    names = {f.name for f in dataclasses.fields(recipe_class)}
    from_file = [] if config.config is None else _read_yaml(parser, config.config, names)
    values = vars(parser.parse_args(from_file + given))
    return recipe_class(**{name: values[name] for name in names})


def _read_yaml(parser: argparse.ArgumentParser, path: Path, names: set[str]) -> list[str]:
    """The file as command-line arguments, so that argparse converts and checks both alike; null is the default."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"--config: {path} cannot be read ({error.strerror}).")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config: {path} is not YAML: {' '.join(str(error).split())}")
    if not isinstance(values, dict) or not values.keys() <= names:
        unknown = sorted(map(str, values.keys() - names)) if isinstance(values, dict) else "no `name: value` lines"
        parser.error(f"--config: {path} has {unknown}; the names are {', '.join(sorted(names))}.")
    arguments = []
    for name, value in values.items():
        if value is not None:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def check_ranges(
    recipe: Any,
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
    shares: Sequence[str] = (),
    below_one: Sequence[str] = (),
) -> None:
    """
    Raises ValueError, naming the option, if one of these fields is out of range. `shares` are from 0 to 1, `below_one`
    from 0 to below 1; a positive one may be None.
    """
    for name in positive:
        if getattr(recipe, name) is not None and getattr(recipe, name) <= 0:
            raise ValueError(f"--{name} is {getattr(recipe, name)}; it must be more than 0.")
    for name in not_negative:
        if getattr(recipe, name) < 0:
            raise ValueError(f"--{name} is {getattr(recipe, name)}; it must not be negative.")
    for name in shares:
        if not 0 <= getattr(recipe, name) <= 1:
            raise ValueError(f"--{name} is {getattr(recipe, name)}; it must be between 0 and 1.")
    for name in below_one:
        if not 0 <= getattr(recipe, name) < 1:
            raise ValueError(f"--{name} is {getattr(recipe, name)}; it must be at least 0 and less than 1.")


def write_with_versions(path: str | Path, report: dict, libraries: Sequence[str]) -> None:
    """The numbers of a run as json, with the versions of Python, this package, torch, transformers and `libraries`."""
    names = ("hf-efficientsam", "torch", "transformers", *libraries)
    versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
    replace_text(Path(path), json.dumps({**report, "versions": versions}, indent=1) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Writes a file that is there whole or as it was before."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def fill_between(page: str, begin: str, end: str, text: str) -> str:
    """`page` with `text` in place of what stands between its two marks."""
    before, rest = page.split(begin)
    return before + begin + "\n" + text + "\n" + end + rest.split(end)[1]


def last_line(error: Exception) -> str:
    """Of what a worker of a DataLoader raises, which comes with its traceback, the sentence at its end."""
    return str(error).strip().splitlines()[-1].removeprefix("ValueError: ")


def start_accelerator(recipe: Any, **options) -> Accelerator:
    """
    With the recipe's trackers, and accumulating gradients to its `global_batch_size`; `options` are `Accelerator`'s.

    Raises:
        ValueError: for an unknown tracker, and if batches of `batch_size` (None: all images of a process) do not make
            the global batch.
    """
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(1, sync_with_dataloader=False),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=recipe.seed),
        **tracker_arguments(recipe.trackers, Path(recipe.output_dir)),
        **options,
    )
    images, processes = recipe.global_batch_size, accelerator.num_processes
    batch_size = recipe.batch_size or max(1, images // processes)
    accelerator.gradient_accumulation_steps, left = divmod(images, batch_size * processes)
    if left:
        raise ValueError(
            f"--global_batch_size {images} must be a multiple of --batch_size {batch_size} times {processes} "
            "process(es); change one of them, or start fewer processes with `accelerate launch --num_processes 1`."
        )
    return accelerator


def epoch_loader(accelerator: Accelerator, data: Any, recipe: Any, **options) -> tuple[DataLoader, int]:
    """
    Shuffled batches for this process, and optimiser steps an epoch.

    Args:
        accelerator: of `start_accelerator`.
        data: a map-style dataset, or a stream that is split over the processes already.
        recipe: `epoch_images` count as an epoch; by default all, which a stream cannot know. An epoch has a whole
            number of steps of `global_batch_size` images, however many processes there are.
        options: `DataLoader`'s.

    Raises:
        ValueError: if an epoch is less than one step, or not known.
    """
    streamed = isinstance(data, IterableDataset)
    if streamed and recipe.epoch_images is None:
        raise ValueError("How many images there are in streamed shards is not known; give --epoch_images.")
    images, images_a_step = recipe.epoch_images or len(data), recipe.global_batch_size
    steps = images // images_a_step
    if steps == 0:
        raise ValueError(f"{images} images are less than one step; lower --global_batch_size {images_a_step}.")
    batches_a_step = accelerator.gradient_accumulation_steps * accelerator.num_processes
    options |= {"batch_size": images_a_step // batches_a_step, "num_workers": recipe.num_workers}
    options |= {"persistent_workers": recipe.num_workers > 0, "pin_memory": accelerator.device.type == "cuda"}
    if streamed:
        return DataLoader(data, **options), steps
    sampler = RandomSampler(data, num_samples=steps * images_a_step)
    loader = DataLoader(data, sampler=sampler, **options)
    return accelerator.prepare_data_loader(loader, device_placement=False), steps


def step_batches(
    accelerator: Accelerator, loader: DataLoader, data: Any, step: int, steps: int, epoch_steps: int
) -> Iterator[Iterator[Any]]:
    """
    For each optimiser step after `step` up to `steps` the batches of this process, to be used up before the next.
    They are not on its device yet: gathered for one step of many, they need not fit there together.

    Args:
        accelerator, loader, data, epoch_steps: of `start_accelerator` and `epoch_loader`.
        step: how many steps are done, as `Checkpoints.resume` says.
        steps: how many there are in all.
    """
    accumulation = accelerator.gradient_accumulation_steps
    while step < steps:
        epoch, position = divmod(step, epoch_steps)
        batches = epoch_batches(accelerator, loader, data, epoch, position * accumulation)
        for _ in range(min(epoch_steps - position, steps - step)):
            yield islice(batches, accumulation)
            step += 1


def epoch_batches(accelerator: Accelerator, loader: DataLoader, data: Any, epoch: int, skip: int) -> Iterator[Any]:
    """The batches of an epoch for this process, after the first `skip`."""
    data.set_epoch(epoch)
    if isinstance(data, IterableDataset):
        skip = data.fast_forward(skip, loader.batch_size, loader.num_workers)
    batches = accelerator.skip_first_batches(loader, skip) if skip else loader
    if hasattr(batches, "set_epoch"):  # a prepared one, which also shuffles
        batches.set_epoch(epoch)
    yield from batches


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, scale: Callable[[str], float] = lambda name: 1.0
) -> list[dict]:
    """
    For an optimiser: the trainable parameters by learning rate, `learning_rate * scale(name)`, and by weight decay,
    which is for the weights of linear layers and convolutions alone.
    """
    layers, groups = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d), {}
    decaying = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, layers)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((scale(name), name in decaying), []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rate * share, "weight_decay": weight_decay if decays else 0.0}
        for (share, decays), parameters in groups.items()
    ]


def layer_decay(name: str, num_layers: int, decay: float) -> float:
    """
    Share of the learning rate for a parameter of a model with our encoder, as BEiT has it (arXiv 2106.08254): `decay`
    for the last of the encoder's `num_layers` layers, its square for the one before, and so on to the embeddings and
    the class token; 1 for all that comes after the layers. The encoder may lie anywhere in the model.
    """
    if found := re.search(r"\bvision_encoder\.layers\.(\d+)\.", name):
        return decay ** (num_layers - int(found[1]))
    return decay ** (num_layers + 1) if re.search(r"\bvision_encoder\.(embeddings\.|cls_token)", name) else 1.0


def run_script(name: str, main: Callable[[], None], code: int = 1) -> None:
    """Calls a training script's `main`; what a user can mend (a full disk, a broken image) ends it with a sentence and
    this exit code."""
    try:
        main()
    except (FloatingPointError, OSError, SaveError, ValueError) as error:
        print(f"\n{name}: {last_line(error)}", file=sys.stderr)
        raise SystemExit(code) from None


def stop_unless_finite(
    accelerator: Accelerator, loss: torch.Tensor, grad_norm: torch.Tensor | float, step: int, images: list
) -> None:
    """
    Raises FloatingPointError on all processes if the loss or the gradient of one of them is not finite, naming its
    images. Called on every process before the step is saved, with its own loss `[]` and images. In float16 a gradient
    may be infinite: the step is then left out and the next one scaled less.
    """
    grad_norm = 0.0 if accelerator.scaler is not None else grad_norm
    if accelerator.reduce(loss.detach().float() + float(grad_norm), "mean").isfinite():
        return
    names = ", ".join(map(str, images))
    fine = loss.isfinite() and math.isfinite(grad_norm)
    problems = gather_object([None if fine else f"{loss.item()} (gradient {float(grad_norm)}) on the images {names}"])
    raise FloatingPointError(
        f"The loss of step {step} is {'; '.join(filter(None, problems))}. It is not saved; look at these "
        "images or lower the learning rate, and start again from the last checkpoint."
    )


def weight_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights, as timm and others have it: of a young run, only of its last
    tenth, so that the start is not remembered longer than it deserves."""

    def update(averages: list[torch.Tensor], weights: list[torch.Tensor], updates: torch.Tensor) -> None:
        share = 1 - min(decay, (1 + int(updates)) / (10 + int(updates)))
        torch._foreach_lerp_(averages, weights, share)

    return AveragedModel(model, multi_avg_fn=update)


class Optimization:
    """
    Optimiser, schedule, clipping and average of the weights: what becomes of losses.

        for batches in step_batches(...):
            for batch in batches:
                with accelerator.accumulate(optimization.model):
                    optimization.add(optimization.model(...).loss)
            rate = optimization.finish(step, loss, keys)

    Args:
        accelerator: that prepares the model and the optimiser.
        model: to be trained; `model` of the result is the prepared one.
        optimizer: of the model's parameters.
        schedule: of the optimiser, stepped once for each optimiser step.
        max_grad_norm: gradients are clipped to it.
        averaged: the part of the model that is saved, by default all of it.
        ema_decay: of the average of its weights; 0 for none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        max_grad_norm: float,
        averaged: nn.Module | None = None,
        ema_decay: float = 0.0,
    ):
        self.accelerator, self.schedule, self.max_grad_norm = accelerator, schedule, max_grad_norm
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.current = accelerator.unwrap_model(self.model) if averaged is None else averaged
        self.average = weight_average(self.current, ema_decay) if ema_decay else None
        accelerator.register_for_checkpointing(schedule)  # a prepared one would step once for every process
        if self.average is not None:
            accelerator.register_for_checkpointing(self.average)

    def add(self, loss: torch.Tensor) -> None:
        """Takes the gradient of a batch's loss `[]`, and with a step's last batch the step. Under `accumulate`."""
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            self.grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def finish(self, step: int, loss: torch.Tensor, images: list) -> float:
        """
        After a step's batches, before anything is saved: moves on the schedule and the average.

        Args:
            step: the number of this step.
            loss: its mean `[]`.
            images: names of this process's images, for the message.

        Returns:
            the largest learning rate of the step.

        Raises:
            FloatingPointError: see `stop_unless_finite`.
        """
        stop_unless_finite(self.accelerator, loss, self.grad_norm, step, images)
        rate = max(self.schedule.get_last_lr())
        if not self.accelerator.optimizer_step_was_skipped:  # as in float16, see stop_unless_finite
            self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.current)
        return rate

    @property
    def result(self) -> nn.Module:
        """What is to be saved and measured: the average if there is one."""
        return self.current if self.average is None else self.average.module


class SaveError(RuntimeError):
    """A result that could not be written; the message is one sentence for the user."""


def _reason(error: Exception, writing: Path) -> str:
    """Why the folder `writing` was not finished. Of a full disk, torch and safetensors say it in no standard way."""
    free = shutil.disk_usage(writing.parent).free
    if getattr(error, "errno", None) != errno.ENOSPC and "os error 28" not in str(error) and free > 2**20:
        return f"{type(error).__name__}: {error}"
    tried = free + sum(path.stat().st_size for path in writing.rglob("*") if path.is_file())
    return (
        f"the disk is full, {writing.parent} needs more than the {tried / 2**20:.1f} MiB that were free; free space "
        "and start again"
    )


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """
    A new folder to write into, which takes the place of `path` once all is written.

    Raises:
        SaveError: if the disk is full; `path` is then as it was.
    """
    writing, old = path.with_name(f"{path.name}.writing"), path.with_name(f"{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)  # a run was killed between the two renames below
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        yield writing
    except (OSError, SafetensorError) as error:
        reason = _reason(error, writing)
        shutil.rmtree(writing, ignore_errors=True)
        raise SaveError(f"{path} could not be written: {reason}.") from error
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    writing.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def check_same_run(recipe: Any, num_processes: int) -> None:
    """
    Notes the recipe in its `output_dir`, and once there is a checkpoint compares at each start what decides about what
    is learnt.

    Raises:
        ValueError: if a run with another recipe is there, which resuming would mix with this one.
    """
    folder, now = Path(recipe.output_dir), dataclasses.asdict(recipe)
    free = {"save_steps", "log_steps", "picture_steps", "trackers", "output_dir"}
    if recipe.shards:  # who reads how many images at a time decides about the order of streamed ones
        now["num_processes"] = num_processes
    else:
        free |= {"num_workers", "batch_size"}
    path = folder / "recipe.json"
    if not path.is_file() or not any((folder / "checkpoints").glob("step_*")):
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(now, indent=1) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if changed := [name for name in now if name not in free and before.get(name) != now[name]]:
        raise ValueError(
            f"{folder} holds a run with another {', '.join(changed)}; choose a new --output_dir, or delete that one."
        )


class Checkpoints:
    """
    The states of a run under `folder`, one directory for each saved step. A directory appears under its name only
    when it is complete, so a killed run never leaves one that cannot be resumed.

    Args:
        accelerator: whose prepared models, optimisers, schedules and random states are saved.
        folder: made on first use; if several machines train together, on a disk that they share.
        keep: how many of the newest to keep.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, keep: int = 2):
        self.accelerator, self.folder, self.keep = accelerator, Path(folder), keep

    def steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step_")) for path in self.folder.glob("step_*"))

    def save(self, step: int) -> None:
        """
        Called on every process.

        Raises:
            SaveError: on every process if one of them cannot write, mostly as the disk is full. What was half
                written is removed, the earlier checkpoints stay.
        """
        writing = self.folder / "writing"
        if self.accelerator.is_main_process:
            shutil.rmtree(writing, ignore_errors=True)  # what a killed run left
            self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        self._try_everywhere(step, writing, lambda: self.accelerator.save_state(writing))
        self._try_everywhere(step, writing, lambda: self._publish(step, writing))

    def _try_everywhere(self, step: int, writing: Path, action: Callable[[], None]) -> None:
        """Returns, or raises, on all processes together, so that none waits for one that has failed."""
        problem = cause = None
        try:
            action()
        except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError is torch.save's
            problem, cause = _reason(error, writing), error
        problems = [one for one in gather_object([problem]) if one is not None]
        if problems:
            if self.accelerator.is_main_process:
                shutil.rmtree(writing, ignore_errors=True)
            kept = f"the checkpoint of step {self.steps()[-1]} is kept" if self.steps() else "there is no earlier one"
            raise SaveError(f"The checkpoint of step {step} could not be written: {problems[0]}; {kept}.") from cause

    def _publish(self, step: int, writing: Path) -> None:
        if not self.accelerator.is_main_process:
            return
        # To the disk first: a name must not outlive its content if the power fails, and some file systems (NFS,
        # quotas) report only here that the disk is full.
        for path in writing.rglob("*"):
            if path.is_file():
                with path.open("r+b") as file:
                    os.fsync(file.fileno())
        writing.rename(self.folder / f"step_{step:08d}")
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"step_{old:08d}")

    def resume(self) -> int:
        """
        Loads the newest state and returns its step; 0 if there is none. Called on every process.

        Raises:
            ValueError: if the processes do not find the same one, as their machines do not share the folder.
        """
        step = max(self.steps(), default=0)
        if len(found := set(gather_object([step]))) > 1:
            raise ValueError(
                f"The processes find checkpoints of different steps ({sorted(found)}) in {self.folder}; choose an "
                "--output_dir that all machines share."
            )
        if step:
            self.accelerator.load_state(self.folder / f"step_{step:08d}")
            # Its count of micro-batches, on which gradient accumulation rests, is of another split of the batch.
            self.accelerator.step = 0
        return step


class Curve:
    """Numbers over steps as JSON lines, and as a picture. Resuming at a step drops what was written after it."""

    def __init__(self, path: Path, step: int):
        self.path = Path(path)
        rows = []
        if self.path.is_file():
            lines = self.path.read_text().split("\n")[:-1]  # what follows the last line's end was torn by a kill
            rows = [json.loads(line) for line in lines]
        self.rows = [row for row in rows if row["step"] <= step]
        self.furthest = max((row["step"] for row in rows), default=0)  # where the run was when it was killed
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, **row: float) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def plot(self, names: list[str]) -> None:
        """Draws a panel for each name into a PNG beside the JSON lines."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
        for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            axis.plot([row["step"] for row in self.rows], [row[name] for row in self.rows])
            axis.set(title=name, xlabel="step")
            axis.grid(alpha=0.3)
        figure.savefig(self.path.with_suffix(".png"), dpi=100)


# What a row of the log says about the machine and not about the run: it differs each time.
TIMINGS = ("images_per_second", "seconds", "seconds_to_go")


def tracker_arguments(names: list[str], folder: Path) -> dict:
    """
    What `Accelerator` must be given to log to these trackers (tensorboard, trackio, ...), all under `folder/trackers`
    and without a network.

    Raises:
        ValueError: if a tracker is unknown or not installed; Accelerate itself would go on without it.
    """
    available = [str(name) for name in get_available_trackers()]
    if unknown := set(names) - set(available):
        raise ValueError(
            f"There is no tracker {', '.join(sorted(unknown))} here; install it, or take {', '.join(available)}."
        )
    folder = Path(folder) / "trackers"
    os.environ.setdefault("TRACKIO_DIR", str(folder.absolute()))  # read when trackio is imported
    return {"log_with": names or None, "project_dir": folder}


class Log:
    """
    The numbers and pictures of a run: `curve.jsonl` with `curve.png`, `pictures/`, a progress bar, and the
    accelerator's trackers. Steps between two rows are averaged, and what is summed up belongs to the checkpoints: a
    resumed run writes the same rows as one that was never stopped, but for the `TIMINGS`.

        accelerator = Accelerator(**tracker_arguments(["tensorboard"], folder))
        log = Log(accelerator, folder, steps=1000, every=20)
        step = Checkpoints(accelerator, folder / "checkpoints").resume()
        log.start(step, "sami", dataclasses.asdict(recipe))
        while step < 1000:
            ...
            log.add(step, images=256, loss=loss, lr=schedule.get_last_lr()[0])
        log.close()
        accelerator.end_training()  # and with it the trackers

    Args:
        accelerator: of every process; all methods are called on all of them.
        folder: the run's, see above.
        steps: the last step of the run.
        every: a row after so many steps, and after the last.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, steps: int, every: int):
        self.accelerator, self.folder, self.steps, self.every = accelerator, Path(folder), steps, every
        self.sums, self.summed, self.images = torch.zeros(()), 0, 0
        accelerator.register_for_checkpointing(self)

    def state_dict(self) -> dict:
        return {"sums": self.sums, "summed": self.summed}

    def load_state_dict(self, state: dict) -> None:
        self.sums, self.summed = state["sums"].to(self.accelerator.device), state["summed"]

    def start(self, step: int, project: str, config: dict) -> None:
        """
        Args:
            step: the last step that is done; what was written after it is dropped.
            project: the name under which trackers keep runs of this kind; the folder's name is the run's.
            config: what the trackers are to show of the recipe.
        """
        self.first, self.started = step, time.perf_counter()
        self.clock = self.started
        main = self.accelerator.is_main_process
        if main:
            self.curve = Curve(self.folder / "curve.jsonl", step)
            self.seconds_before = self.curve.rows[-1]["seconds"] if self.curve.rows else 0
            # Tensorboard takes no lists and no None, and would show a resumed run's recipe once more.
            flat = {name: one if isinstance(one, int | float | str) else str(one) for name, one in config.items()}
            run = {"name": self.folder.absolute().name, "resume": "allow", "embed": False, "config": flat}
            self.accelerator.init_trackers(project, None if step else flat, {"trackio": run})
        self.progress = tqdm(total=self.steps, initial=step, disable=not main, mininterval=2)

    def add(self, step: int, images: int, **values: torch.Tensor | float) -> None:
        """
        Args:
            step: the step just done.
            images: how many images it took, on all processes.
            values: tensors `[]` are averaged, over the processes and the steps since the last row; numbers (a
                learning rate) are written as they are now. Always the same names.
        """
        means = {name: value.detach().float() for name, value in values.items() if isinstance(value, torch.Tensor)}
        self.sums = self.sums + self.accelerator.reduce(torch.stack(list(means.values())), "mean")
        self.summed, self.images = self.summed + 1, self.images + images
        self.progress.update()
        if step % self.every and step != self.steps:
            return
        means = dict(zip(means, (self.sums / self.summed).tolist(), strict=True))
        images, self.sums, self.summed, self.images = self.images, torch.zeros(()), 0, 0
        if self.accelerator.is_main_process:
            self._write(step, images, {name: float(f"{means.get(name, values[name]):.6g}") for name in values})

    def _write(self, step: int, images: int, values: dict[str, float]) -> None:
        now = time.perf_counter()
        values["images_per_second"] = round(images / (now - self.clock), 2)
        values["seconds"] = round(self.seconds_before + now - self.started, 1)
        values["seconds_to_go"] = round((self.steps - step) * (now - self.started) / (step - self.first), 1)
        self.clock = now
        self.progress.set_postfix({name: value for name, value in values.items() if not name.startswith("seconds")})
        self.curve.add(step=step, **values)
        if step > self.curve.furthest:  # a resumed run comes once more by what the trackers know already
            self.accelerator.log(values, step)

    def picture(self, step: int, image: Image.Image, name: str) -> None:
        """Writes `pictures/NAME_STEP.png`, and shows it in tensorboard and trackio."""
        if not self.accelerator.is_main_process:
            return
        path = self.folder / "pictures" / f"{name}_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        for tracker in self.accelerator.trackers if step > self.curve.furthest else []:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(image.convert("RGB"))[None]}, step, dataformats="NHWC")
            elif tracker.name == "trackio":
                import trackio

                tracker.log({name: trackio.Image(image)}, step)

    def plot(self) -> None:
        """Draws the curve of each value into `curve.png`."""
        if self.accelerator.is_main_process and self.curve.rows:
            self.curve.plot([name for name in self.curve.rows[-1] if name not in ("step", *TIMINGS)])

    def close(self) -> None:
        self.progress.close()
        self.plot()
