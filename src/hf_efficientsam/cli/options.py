"""Options that several commands have, declared once, and what is checked for them."""

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hf_efficientsam.inference.folder_runs import check_results_folder
from hf_efficientsam.inference.image_files import check_folder, local_path
from hf_efficientsam.inference.record_datasets import WRITERS
from hf_efficientsam.model.image_processing_efficientsam import EfficientSamImageProcessor

MAX_PIXELS = EfficientSamImageProcessor.max_image_pixels
OVERLAY_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
LOCAL = {"parser": local_path, "metavar": "PATH"}  # of each option that is a path


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Format = StrEnum("Format", [(name, name) for name in WRITERS])


ImageArgument = Annotated[Path, typer.Argument(parser=local_path, metavar="IMAGE", help="An image.")]
MaskOption = Annotated[
    Path | None, typer.Option(**LOCAL, help="PNG file for the mask; with --format, a folder for the results.")
]
OverlayOption = Annotated[
    Path | None, typer.Option(**LOCAL, help="Image file to write, with the masks drawn over the image.")
]
ModelOption = Annotated[
    str | None, typer.Option(metavar="DIR_OR_HUB_ID", help="Checkpoint to use instead of the bundled one.")
]
DeviceOption = Annotated[Device, typer.Option(help="Where the model runs; auto takes cuda, else mps, else cpu.")]
DtypeOption = Annotated[
    Dtype, typer.Option(help="Precision of the model; auto: as the weights are stored, but float32 on a CPU.")
]
FormatOption = Annotated[
    list[Format],
    typer.Option(
        "--format",
        help="Also write OUTPUT/FORMAT, a dataset of all images whose results are in OUTPUT. "
        "May be given several times.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
MaxPixelsOption = Annotated[int, typer.Option(min=1, help="Refuse images of more pixels than this.")]
HostOption = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all addresses of this computer.")]


def new_commands() -> typer.Typer:
    """What the commands of a module are registered with; `app` finds them there."""
    return typer.Typer(add_completion=False, rich_markup_mode=None)


def check_ending(path: Path | None, name: str, endings: Iterable[str]) -> None:
    """Raises a ValueError if an option `name` is given that is no file name with one of the endings."""
    if path is None:
        return
    if path.suffix.lower() not in endings or path.is_dir():
        raise ValueError(f"{name} {path} must be the name of a file that ends in {', '.join(endings)}.")
    check_folder(path.parent)


def check_image_outputs(image: Path, output: Path | None, overlay: Path | None, formats: list[Format]) -> None:
    """
    Raises a ValueError unless --overlay of one image is the name of an image file and --output that of another, or
    with --format that of a folder.
    """
    if formats and output is None:
        raise ValueError("--format needs a folder for results (--output).")
    if formats:
        check_results_folder(output, image)
    else:
        check_ending(output, "--output", [".png"])
    check_ending(overlay, "--overlay", OVERLAY_ENDINGS)
