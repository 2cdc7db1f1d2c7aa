"""What every training script needs around its loop: its recipe, its checkpoints, its curve."""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from accelerate import Accelerator
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


def replace_text(path: Path, text: str) -> None:
    """Writes a file that is there whole or as it was before."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `path` once all is written."""
    writing, old = path.with_name(f"{path.name}.writing"), path.with_name(f"{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)  # a run was killed between the two renames below
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    yield writing
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    writing.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def check_same_run(recipe: Any, folder: Path) -> None:
    """
    Notes the recipe in `folder` at the first start, and compares it at each later one.

    Raises:
        ValueError: if a run with another recipe is there, which resuming would mix with this one.
    """
    path, now = Path(folder) / "recipe.json", dataclasses.asdict(recipe)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(now, indent=1) + "\n")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    free = {"num_workers", "save_steps", "log_steps", "output_dir"}  # change nothing of what is learnt
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
        folder: made on first use.
        keep: how many of the newest to keep.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, keep: int = 2):
        self.accelerator, self.folder, self.keep = accelerator, Path(folder), keep

    def steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step_")) for path in self.folder.glob("step_*"))

    def save(self, step: int) -> None:
        """Called on every process."""
        writing = self.folder / "writing"
        if self.accelerator.is_main_process:
            shutil.rmtree(writing, ignore_errors=True)  # what a killed run left
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(writing)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            writing.rename(self.folder / f"step_{step:08d}")
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.folder / f"step_{old:08d}")
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Loads the newest state and returns its step; 0 if there is none."""
        steps = self.steps()
        if not steps:
            return 0
        self.accelerator.load_state(self.folder / f"step_{steps[-1]:08d}")
        return steps[-1]


class Curve:
    """Numbers over steps as JSON lines, and as a picture. Resuming at a step drops what was written after it."""

    def __init__(self, path: Path, step: int):
        self.path = Path(path)
        self.rows = []
        if step and self.path.is_file():
            lines = self.path.read_text().split("\n")[:-1]  # what follows the last line's end was torn by a kill
            rows = [json.loads(line) for line in lines]
            self.rows = [row for row in rows if row["step"] <= step]
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
