"""`efficientsam segment`: masks of objects that are marked with points and boxes, in an image or a folder."""

import json
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from hf_efficientsam.inference.folder_runs import check_results_folder, run_jobs
from hf_efficientsam.inference.image_files import read_image, upright_size
from hf_efficientsam.inference.loading import load_model
from hf_efficientsam.inference.predictor import EfficientSamPredictor
from hf_efficientsam.inference.prompt_files import (
    are_numbers,
    check_images_listed,
    group_prompts,
    read_prompts_file,
)
from hf_efficientsam.inference.segment_files import (
    Segmenter,
    plan_segment_jobs,
    segment_file,
    segment_into_folder,
)

from .options import (
    LOCAL,
    MAX_PIXELS,
    Device,
    DeviceOption,
    Dtype,
    DtypeOption,
    Format,
    FormatOption,
    JsonOption,
    MaxPixelsOption,
    ModelOption,
    check_image_outputs,
    local_path,
    new_commands,
)
from .reports import describe_objects, report_folder, write_formats

commands = new_commands()


# Options of this command alone; the others are in options.py.
InputArgument = Annotated[
    Path,
    typer.Argument(
        parser=local_path, metavar="IMAGE_OR_DIR", help="An image, or a folder of images (with --prompts)."
    ),
]
PointOption = Annotated[
    list[str], typer.Option(metavar="X,Y", help="A point on the object. May be given several times.")
]
BackgroundOption = Annotated[
    list[str], typer.Option(metavar="X,Y", help="A point that is not on the object. May be given several times.")
]
BoxOption = Annotated[
    list[str],
    typer.Option(
        metavar="X1,Y1,X2,Y2", help="A box around an object: left, top, right, bottom. May be given several times."
    ),
]
SeparatePointsOption = Annotated[bool, typer.Option("--separate-points", help="Each point is an object of its own.")]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        **LOCAL, help="PNG file for the mask; for a folder of images or with --format, a folder for the results."
    ),
]
OverlaysOption = Annotated[
    Path | None,
    typer.Option(
        **LOCAL,
        help="Image file to write, with the masks drawn over the image; for a folder of images, another folder.",
    ),
]
AllMasksOption = Annotated[
    bool, typer.Option("--all-masks", help="Give every candidate of each object, best first, not only the best.")
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        **LOCAL,
        help='For a folder: a file of lines {"image": NAME, "points": ..., "labels": ..., "boxes": ...}.',
    ),
]
OnlyListedOption = Annotated[
    bool, typer.Option("--only-listed", help="Leave out images of the folder that the prompts file does not name.")
]


@commands.command("segment", no_args_is_help=True)
def segment_command(
    image: InputArgument,
    point: PointOption = [],  # noqa: B006
    background: BackgroundOption = [],  # noqa: B006
    box: BoxOption = [],  # noqa: B006
    separate_points: SeparatePointsOption = False,
    output: OutputOption = None,
    overlay: OverlaysOption = None,
    formats: FormatOption = [],  # noqa: B006
    model: ModelOption = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.float32,
    as_json: JsonOption = False,
    all_masks: AllMasksOption = False,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
    prompts: PromptsOption = None,
    only_listed: OnlyListedOption = False,
) -> None:
    """
    Cut out objects that you mark with points and boxes.

    Coordinates are pixels of the upright image, x to the right and y down from the top left corner. All points of a
    call belong to one object, and a box, if there is one, is around it. Several boxes are several objects: a point
    then belongs to the one box that contains it, and background points count for every object. With
    --separate-points each point is an object of its own, too.

    For each object it prints the model's own estimate of the mask's quality (0 to 1), the mask's area, and the
    tight box around it (left, top, right, bottom; the right and bottom edges lie behind the last pixel).

    The mask is a PNG of the size of the upright image, 255 on the object and 0 elsewhere. With --output mask.png
    there is mask.png for one object, and mask_1.png, mask_2.png, ... for several, in the order of the boxes, then
    of separate points. With --all-masks it is mask_OBJECT_CANDIDATE.png, such as mask_1_3.png.

    A folder is segmented as its prompts file says, a JSON object a line: {"image": "a.jpg", "points": [[580, 350],
    [10, 10]], "labels": [1, 0], "boxes": []}, where label 0 means background. OUTPUT/a.png is the mask and
    OUTPUT/a.json says what was found; where two images would share a file (a.jpg and a.png), it is a.jpg.png and
    a.jpg.json. Run again, it does only what is missing or was made from another image, prompt, model, option or
    version of this package. Images that cannot be read, and those whose masks cannot be written, are listed at the
    end, with exit code 2, when all others are done.

    With --format the results of one image go into a folder as well, as OUTPUT/NAME.png and NAME.json, and stay there
    with those of other calls. OUTPUT/FORMAT is a dataset of all of them with the best mask of each object: for coco
    instances.json; for yolo data.yaml and classes.txt, images and labels; for labelme a json for each image, which
    `labelme IMAGES --output OUTPUT/labelme` opens; for label-studio tasks.json and label_config.xml, the labelling
    interface, where the images are served by a local storage that is their folder. Polygons are up to a pixel from
    the masks.

    With --json each mask is printed with its COCO RLE, too.
    """
    if not image.exists():
        raise ValueError(f"{image}: no such file.")
    if image.is_dir():
        if point or background or box:
            raise ValueError(f"{image} is a folder; write its prompts into a file and pass it with --prompts.")
        entries = read_entries(image, prompts, separate_points, only_listed, output, overlay)
    else:
        if prompts is not None or only_listed:
            raise ValueError(f"{image} is no folder; give its prompts with --point, --background and --box.")
        check_image_outputs(image, output, overlay, formats)
        objects = parse_objects(point, background, box, separate_points)
        read_image(image, max_pixels, upright_size)  # before the model is loaded
    segmenter = Segmenter(EfficientSamPredictor(*load_model(model, dtype, device, max_pixels)), all_masks)
    if image.is_dir():
        segment_folder(segmenter, image, entries, output, overlay, as_json, formats)
    else:
        segment_image(segmenter, image, objects, output, overlay, as_json, formats)


def parse_objects(point: list[str], background: list[str], box: list[str], separate_points: bool) -> list[dict]:
    """The objects that the options --point, --background and --box mean, see `group_prompts`."""
    points = [parse_numbers(text, "--point", "X,Y") for text in point]
    background_points = [parse_numbers(text, "--background", "X,Y") for text in background]
    boxes = [parse_numbers(text, "--box", "X1,Y1,X2,Y2") for text in box]
    labels = [1] * len(points) + [0] * len(background_points)
    return group_prompts(points + background_points, labels, boxes, separate_points)


def parse_numbers(text: str, name: str, form: str) -> list[float]:
    """The numbers of an option such as `--point 580,350`, whose form is "X,Y"."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = None
    if not are_numbers(values, form.count(",") + 1):
        raise ValueError(f"{name} needs finite numbers {form} with commas between them, not {text!r}.")
    return values


def read_entries(
    folder: Path,
    prompts: Path | None,
    separate_points: bool,
    only_listed: bool,
    output: Path | None,
    overlay: Path | None,
) -> dict:
    """The entries of a prompts file, after all checks that can be made before the model is loaded."""
    if prompts is None or output is None:
        raise ValueError(
            f"{folder} is a folder; it needs a prompts file (--prompts) and a folder for results (--output)."
        )
    results = [one for one in (output, overlay) if one is not None]
    for one in results:
        check_results_folder(one, folder)
    entries = read_prompts_file(prompts, separate_points)
    check_images_listed(folder, entries, prompts, only_listed, results)
    return entries


def segment_image(
    segmenter: Segmenter,
    image: Path,
    objects: list[dict],
    output: Path | None,
    overlay: Path | None,
    as_json: bool,
    formats: list[Format],
) -> None:
    """Segments one image, into files or with formats into a folder, and prints what was found."""
    segment = segment_into_folder if formats else segment_file
    record = segment(segmenter, image, objects, output, overlay)
    write_formats(formats, output, output)
    typer.echo(json.dumps(record) if as_json else describe_objects(record))


def segment_folder(
    segmenter: Segmenter,
    folder: Path,
    entries: dict,
    output: Path,
    overlay: Path | None,
    as_json: bool,
    formats: list[Format],
) -> None:
    """Segments the images of a folder that are not done yet, and reports on all of them."""
    jobs = plan_segment_jobs(segmenter, folder, entries, output, overlay)
    records, failures = run_jobs(
        jobs, segmenter, lambda record: None if as_json else tqdm.write(describe_objects(record))
    )
    write_formats(formats, output, output)
    report_folder(records, failures, as_json)
    if failures:
        raise typer.Exit(2)
