"""Files of results that are there whole or not at all: texts, numbers with the versions behind them, marked tables."""

import json
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_efficientsam.export.model_card import Provenance, training_card
from hf_efficientsam.inference.image_files import write_files
from hf_efficientsam.inference.loading import is_bundled


def replace_text(path: Path, text: str) -> None:
    """Writes a file that is there whole or as it was before."""
    write_files({path: text.encode()})


def versions_of(libraries: Sequence[str]) -> dict[str, str]:
    """The versions of Python, this package, torch, transformers and `libraries`."""
    names = ("hf-efficientsam", "torch", "transformers", *libraries)
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def write_report(path: str | Path, report: dict, libraries: Sequence[str]) -> None:
    """The numbers of a run as json, with `versions_of` the libraries."""
    replace_text(Path(path), json.dumps({**report, "versions": versions_of(libraries)}, indent=1) + "\n")


def describe_model(writing: Path, script: str, model: PreTrainedModel, config: Any) -> None:
    """
    The model card and the run's `metrics.json`, if it has been written, beside a model's weights.

    Args:
        writing: folder of the weights.
        script: that trained the model, without `.py`.
        config: of the run. What it started from and was trained on is named in the card if it is of the Hub.
    """

    def of_hub(*options: str) -> list[str]:
        names = [getattr(config, option, None) for option in options]
        return [name for name in names if not is_bundled(name) and name.count("/") == 1 and not Path(name).exists()]

    base_model = next(iter(of_hub("model", "encoder")), None)
    card = training_card(script, model, Provenance(base_model=base_model, datasets=of_hub("dataset")))
    card.save(writing / "README.md")
    metrics = Path(config.output_dir) / "metrics.json"
    if metrics.exists():
        shutil.copyfile(metrics, writing / "metrics.json")


def end_without(broken: list[str]) -> None:
    """
    The end of an evaluation that left images out: each is named on stderr, and they are counted.

    Args:
        broken: a sentence about each image that could not be evaluated.

    Raises:
        ValueError: if there is one, so that the script ends with exit code 2.
    """
    if broken:
        print(*broken, sep="\n", file=sys.stderr)
        raise ValueError(f"{len(broken)} images could not be evaluated; the numbers are without them.")


def fill_between(page: str, begin: str, end: str, text: str) -> str:
    """`page` with `text` in place of what stands between its two marks."""
    before, rest = page.split(begin)
    return before + begin + "\n" + text + "\n" + end + rest.split(end)[1]
