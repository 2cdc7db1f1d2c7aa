"""What tests of commands share: a run of the command in this process, and images for it."""

import json
from pathlib import Path

import numpy as np
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from hf_efficientsam.cli.app import app

WIDTH, HEIGHT = 60, 40  # of most images here
BOX, POINT = "10,5,50,35", "20,20"


def noise(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> Image.Image:
    """An image with something to see: noise, enlarged."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def turned(image: Image.Image, orientation: int) -> tuple[Image.Image, Image.Exif]:
    """An upright image as a camera stores it, and the EXIF tag that turns it back."""
    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image.transpose(turns[orientation]), exif


def run(*arguments) -> Result:
    """`efficientsam` with these arguments."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_segment(image, *arguments, model) -> dict:
    """The JSON document that `segment` prints; it must succeed."""
    result = run("segment", image, *arguments, "--model", model, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def all_files(folder: Path) -> set[str]:
    """Paths of the files in a folder, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_refused(result: Result, *words: str) -> None:
    """One sentence on stderr that holds all `words`, nothing else, exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("efficientsam: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


def assert_segment_refused(folder: Path, *arguments, words: tuple[str, ...], model=None) -> None:
    """`segment` with these arguments must be refused and leave `folder` as it was."""
    before = all_files(folder)
    options = ["--output", folder / "mask.png", "--overlay", folder / "overlay.png"]
    result = run("segment", *arguments, *options, *(["--model", model] if model else []))
    assert_refused(result, *words)
    assert all_files(folder) == before
