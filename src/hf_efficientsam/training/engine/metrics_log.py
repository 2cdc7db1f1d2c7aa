"""The numbers and images of a run: JSON lines, plots, a progress bar, trackers."""

import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from PIL import Image
from tqdm.auto import tqdm

from .reports import replace_text

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
    if "trackio" in names:
        os.environ.setdefault("TRACKIO_DIR", str(folder.absolute()))  # read when trackio is imported
    return {"log_with": names or None, "project_dir": folder}


class MetricsLog:
    """
    The numbers and images of a run: `curve.jsonl` of training and `evaluation.jsonl`, a plot of each beside it,
    `images/`, a progress bar, and the accelerator's trackers.

    Steps between two rows of training are averaged, and what is summed up belongs to the checkpoints: a resumed run
    writes the same rows as one that was never stopped, but for the `TIMINGS`. `TrainingRun` makes and starts it.

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
            config: the configuration, which the trackers show.
        """
        self.first, self.started = step, time.perf_counter()
        self.clock, self.drawn = self.started, {}
        main = self.accelerator.is_main_process
        if main:
            self.rows, self.furthest = _read_rows(self.folder / "curve.jsonl", step)
            self.evaluations, _ = _read_rows(self.folder / "evaluation.jsonl", step)
            self.seconds_before = self.rows[-1]["seconds"] if self.rows else 0
            # Tensorboard takes no lists and no None, and would show a resumed run's configuration once more.
            flat = {name: one if isinstance(one, int | float | str) else str(one) for name, one in config.items()}
            run = {"name": self.folder.absolute().name, "resume": "allow", "embed": False, "config": flat}
            self.accelerator.init_trackers(project, None if step else flat, {"trackio": run})
        self.progress = tqdm(total=self.steps, initial=step, disable=not main, mininterval=2)

    def add(self, step: int, images: int, **values: torch.Tensor | float) -> None:
        """
        Args:
            step: the step just done.
            images: how many images it took, on all processes.
            values: tensors `[]` are averaged, over the processes and the steps since the last row but those where one
                is not finite; numbers (a learning rate) are written as they are now. Always the same names.
        """
        means = {name: value.detach().float() for name, value in values.items() if isinstance(value, torch.Tensor)}
        own = self.accelerator.reduce(torch.stack(list(means.values())), "mean")
        self.images += images
        if own.isfinite().all():
            self.sums, self.summed = self.sums + own, self.summed + 1
        self.progress.update()
        if (step % self.every and step != self.steps) or not self.summed:
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
        _add_row(self.folder / "curve.jsonl", self.rows, {"step": step, **values})
        if step > self.furthest:  # a resumed run comes once more by what the trackers know already
            self.accelerator.log(values, step)

    def add_evaluation(self, step: int, **scores: float) -> None:
        """A row of `evaluation.jsonl`; always the same names."""
        if self.accelerator.is_main_process:
            _add_row(self.folder / "evaluation.jsonl", self.evaluations, {"step": step, **scores})
            self.accelerator.log(scores, step)

    def add_image(self, step: int, image: Image.Image, name: str) -> None:
        """Writes `images/NAME_STEP.png`, and shows it in tensorboard and trackio."""
        if not self.accelerator.is_main_process:
            return
        path = self.folder / "images" / f"{name}_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        for tracker in self.accelerator.trackers if step > self.furthest else []:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(image.convert("RGB"))[None]}, step, dataformats="NHWC")
            elif tracker.name == "trackio":
                import trackio

                tracker.log({name: trackio.Image(image)}, step)

    def plot(self) -> None:
        """Draws each value over the steps into `curve.png` and `evaluation.png`, unless these have all rows."""
        if self.accelerator.is_main_process:
            for name, rows in (("curve", self.rows), ("evaluation", self.evaluations)):
                if rows and rows[-1]["step"] != self.drawn.get(name):
                    _plot(self.folder / f"{name}.png", rows)
                    self.drawn[name] = rows[-1]["step"]

    def close(self) -> None:
        self.progress.close()
        self.plot()


def _read_rows(path: Path, step: int) -> tuple[list[dict], int]:
    """The rows up to a step, after which the file is cut, and the step that it had come to."""
    if not path.is_file():
        return [], 0
    lines = path.read_text().split("\n")[:-1]  # what follows the last line's end was torn by a kill
    rows = [json.loads(line) for line in lines]
    kept = [row for row in rows if row["step"] <= step]
    replace_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept, max((row["step"] for row in rows), default=0)


def _add_row(path: Path, rows: list[dict], row: dict) -> None:
    rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _plot(path: Path, rows: list[dict]) -> None:
    """A panel for each value but the step and the timings."""
    from matplotlib.figure import Figure

    names = [name for name in rows[-1] if name not in ("step", *TIMINGS)]
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axis.plot([row["step"] for row in rows], [row[name] for row in rows])
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
