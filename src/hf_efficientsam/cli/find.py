"""`efficientsam salient` and `efficientsam text`: masks of objects that are found by saliency, or by their names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from hf_efficientsam.inference.folder_runs import check_not_of_another
from hf_efficientsam.inference.image_files import read_image, upright_size
from hf_efficientsam.inference.loading import load_model
from hf_efficientsam.inference.predictor import EfficientSamPredictor
from hf_efficientsam.inference.prompters.saliency import SalientPrompter
from hf_efficientsam.inference.prompters.text import Detector, TextPrompter, split_names
from hf_efficientsam.inference.results import SegmentationResult
from hf_efficientsam.inference.segment_files import find_in_file

from .options import (
    MAX_PIXELS,
    Device,
    DeviceOption,
    Dtype,
    DtypeOption,
    Format,
    FormatOption,
    ImageArgument,
    JsonOption,
    MaskOption,
    MaxPixelsOption,
    ModelOption,
    OverlayOption,
    check_image_outputs,
    new_commands,
)
from .reports import describe_objects, write_formats

commands = new_commands()


@commands.command("salient", no_args_is_help=True)
def salient_command(
    image: ImageArgument,
    output: MaskOption = None,
    overlay: OverlayOption = None,
    saliency: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_OR_HUB_ID_OR_FILE",
            help="Saliency model to use instead of the checkpoint's own head: a transformers model for background "
            "removal, an .onnx file, or the directory of another head.",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that the saliency model brings along.")
    ] = False,
    threshold: Annotated[
        float, typer.Option(help="Saliency above which a pixel belongs to an object: at least 0, below 1.")
    ] = 0.5,
    min_area: Annotated[
        float,
        typer.Option(help="Leave out objects whose area is less than this fraction of the largest one's, 0 to 1."),
    ] = 0.05,
    formats: FormatOption = [],  # noqa: B006
    model: ModelOption = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.float32,
    as_json: JsonOption = False,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
) -> None:
    """
    Cut out what stands out in an image, object by object, without a prompt.

    A saliency map says how much each pixel stands out. Each connected region of it is an object, and the box around
    the region is the prompt for the object's mask. For each object, largest first, it prints the mean saliency in the
    mask (0 to 1), the mask's area, and the tight box around it, as `segment` does. Masks are written as `segment`
    writes them: mask.png for one object, and mask_1.png, mask_2.png, ... for several.

    With --format, OUTPUT is a folder for the results of this and other calls, and OUTPUT/FORMAT a dataset of them, as
    `segment` writes it.
    """
    predictor = open_predictor(image, output, overlay, formats, model, max_pixels, device, dtype)
    prompter = SalientPrompter(predictor, saliency, threshold, min_area, trust_remote_code)
    record = write_found(predictor, image, prompter, output, overlay, formats)
    report_found(record, as_json, f"try a lower --threshold (now {threshold:g})")


@commands.command("text", no_args_is_help=True)
def text_command(
    image: ImageArgument,
    words: Annotated[str, typer.Argument(metavar="NAMES", help='What to look for, such as "a dog, a cat".')],
    detector: Annotated[
        str, typer.Option(metavar="DIR_OR_HUB_ID", help="Model for zero-shot object detection: OWLv2, Grounding DINO.")
    ],
    output: MaskOption = None,
    overlay: OverlayOption = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Leave out boxes of lower scores, 0 to 1; by default the detector's own threshold."),
    ] = None,
    formats: FormatOption = [],  # noqa: B006
    model: ModelOption = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.float32,
    as_json: JsonOption = False,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
) -> None:
    """
    Cut out objects by their names, with a detector of your choice; none comes with the package.

    The detector finds boxes, which are the prompts for the masks. For each object, best first, it prints its name, the
    detector's score (0 to 1), the mask's area, and the tight box around it, as `segment` does. Masks are written as
    `segment` writes them: mask.png for one object, and mask_1.png, mask_2.png, ... for several.

    With --format, OUTPUT is a folder for the results of this and other calls, and OUTPUT/FORMAT a dataset of them, as
    `segment` writes it.
    """
    split_names(words)
    predictor = open_predictor(image, output, overlay, formats, model, max_pixels, device, dtype)
    prompter = TextPrompter(predictor, Detector(detector, predictor.device), threshold)
    record = write_found(predictor, image, lambda: prompter(words), output, overlay, formats)
    report_found(record, as_json, "try other names or a lower --threshold")


def open_predictor(
    image: Path,
    output: Path | None,
    overlay: Path | None,
    formats: list[Format],
    model: str | None,
    max_pixels: int,
    device: Device,
    dtype: Dtype,
) -> EfficientSamPredictor:
    """The model, after all checks that can be made before it is loaded."""
    if image.is_dir():
        raise ValueError(f"{image} is a folder; give one image.")
    check_image_outputs(image, output, overlay, formats)
    read_image(image, max_pixels, upright_size)
    return EfficientSamPredictor(*load_model(model, dtype, device, max_pixels))


def write_found(
    predictor: EfficientSamPredictor,
    image: Path,
    find: Callable[[], SegmentationResult],
    output: Path | None,
    overlay: Path | None,
    formats: list[Format],
) -> dict:
    """What `find_in_file` returns and writes; with formats into a folder, of which datasets are made."""
    if not formats:
        return find_in_file(predictor, image, find, output, overlay)
    mask, record_file = output / f"{image.stem}.png", output / f"{image.stem}.json"
    check_not_of_another(record_file, image)
    record = find_in_file(predictor, image, find, mask, overlay, record_file)
    write_formats(formats, output, output)
    return record


def report_found(record: dict, as_json: bool, advice: str) -> None:
    """Prints a record of `find_in_file`; if there is nothing in it, the advice goes to stderr."""
    if not record["objects"]:
        typer.echo(f"efficientsam: nothing was found in {record['image']}; {advice}.", err=True)
    if as_json:
        typer.echo(json.dumps(record))
    else:
        shown = [{"label": one["label"], "masks": [one]} for one in record["objects"]]
        typer.echo(describe_objects({**record, "objects": shown}))
