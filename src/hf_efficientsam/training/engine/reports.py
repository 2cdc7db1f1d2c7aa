"""Files of results that are there whole or not at all: texts, numbers with the versions behind them, marked tables."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from hf_efficientsam.inference.image_files import write_files


def replace_text(path: Path, text: str) -> None:
    """Writes a file that is there whole or as it was before."""
    write_files({path: text.encode()})


def write_report(path: str | Path, report: dict, libraries: Sequence[str]) -> None:
    """The numbers of a run as json, with the versions of Python, this package, torch, transformers and `libraries`."""
    names = ("hf-efficientsam", "torch", "transformers", *libraries)
    versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
    replace_text(Path(path), json.dumps({**report, "versions": versions}, indent=1) + "\n")


def fill_between(page: str, begin: str, end: str, text: str) -> str:
    """`page` with `text` in place of what stands between its two marks."""
    before, rest = page.split(begin)
    return before + begin + "\n" + text + "\n" + end + rest.split(end)[1]
