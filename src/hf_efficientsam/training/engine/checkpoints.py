"""Checkpoints of a run, and folders that appear only when they are complete."""

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.other import load
from safetensors import SafetensorError

logger = logging.getLogger(__name__)


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
        Loads the newest state that is whole and returns its step; 0 if there is none. Called on every process. A
        damaged one is put aside as `damaged_...`, with one line.

        Raises:
            ValueError: if the processes do not find the same one, as their machines do not share the folder, or if all
                are damaged.
        """
        steps = self.steps()
        if len(found := set(gather_object([max(steps, default=0)]))) > 1:
            raise ValueError(
                f"The processes find checkpoints of different steps ({sorted(found)}) in {self.folder}; choose an "
                "--output_dir that all machines share."
            )
        for step in reversed(steps):
            path = self.folder / f"step_{step:08d}"
            damage = next(filter(None, gather_object([self._load(path)])), None)
            if damage is None:
                return step
            logger.warning("The checkpoint %s is damaged (%s); an earlier one is looked for.", path, damage)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                aside = self.folder / f"damaged_{step:08d}"
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            self.accelerator.wait_for_everyone()
        if steps:
            raise ValueError(f"All checkpoints in {self.folder} are damaged; delete the run's folder to start anew.")
        return 0

    def _load(self, path: Path) -> str | None:
        """Loads a state; what is wrong with it if it cannot be."""
        try:
            # Accelerate would go on without random states that it cannot read. A process more than before has none.
            states = path / f"random_states_{self.accelerator.process_index}.pkl"
            if self.accelerator.is_main_process or states.exists():
                load(states)
            self.accelerator.load_state(path)
        except MemoryError:
            raise
        except Exception as error:  # damaged files make torch, pickle and safetensors raise nearly anything
            return " ".join(f"{type(error).__name__}: {error}".split())[:200]
        # Its count of micro-batches, on which gradient accumulation rests, is of another split of the batch.
        self.accelerator.step = 0
        return None
