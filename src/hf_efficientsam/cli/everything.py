"""`efficientsam everything`: an image or a folder of images becomes a COCO dataset of all masks in them."""

import inspect
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from hf_efficientsam.inference.everything_files import (
    EverythingJob,
    EverythingSegmenter,
    kept_records,
    plan_everything_jobs,
    write_dataset,
)
from hf_efficientsam.inference.folder_runs import run_jobs
from hf_efficientsam.inference.image_files import read_image, upright_size
from hf_efficientsam.inference.loading import load_model
from hf_efficientsam.inference.mask_generation import EfficientSamMaskGenerator

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
    local_path,
    new_commands,
)
from .reports import report_folder, write_formats

commands = new_commands()

GENERATOR_DEFAULTS = {
    name: parameter.default for name, parameter in inspect.signature(EfficientSamMaskGenerator).parameters.items()
}

BY_DEFAULT = "By default what the checkpoint's config says, else segment-anything's"


# Options of this command alone; the others are in options.py.
ImagesArgument = Annotated[
    Path, typer.Argument(parser=local_path, metavar="IMAGE_OR_DIR", help="An image, or a folder of images.")
]
ResultsOption = Annotated[Path, typer.Option(**LOCAL, help="Folder for the results.")]
PointsPerSideOption = Annotated[
    int, typer.Option(help="Points along each side of the grid that is laid over the image.")
]
PointsPerBatchOption = Annotated[
    int, typer.Option(help="Points that go through the model at a time; fewer need less memory.")
]
PredIouOption = Annotated[
    float | None,
    typer.Option(help=f"Keep masks whose quality the model puts above this; 0 keeps all. {BY_DEFAULT} (0.88)."),
]
StabilityOption = Annotated[
    float | None,
    typer.Option(help=f"Keep masks whose edge is clear, from 0 (all) to 1. {BY_DEFAULT} (0.95)."),
]
BoxNmsOption = Annotated[
    float | None,
    typer.Option(
        help="Of masks whose boxes overlap with more than this IoU, keep only the best. "
        "By default 0.8; with --exact 0.7."
    ),
]
AdaptiveOption = Annotated[
    bool,
    typer.Option(
        "--adaptive/--exact",
        help="Prompt with a third of the points, those that differ most from each other; or with all points.",
    ),
]
CropLayersOption = Annotated[
    int, typer.Option(help="For small objects: layer i also looks at 4**i crops of the image.")
]
RegionAreaOption = Annotated[int, typer.Option(help="Fill holes and remove islands of fewer pixels in masks.")]
DrawOption = Annotated[bool, typer.Option("--overlay/--no-overlay", help="Draw the masks over each image.")]


@commands.command("everything", no_args_is_help=True)
def everything_command(
    image: ImagesArgument,
    output: ResultsOption,
    points_per_side: PointsPerSideOption = GENERATOR_DEFAULTS["points_per_side"],
    points_per_batch: PointsPerBatchOption = GENERATOR_DEFAULTS["points_per_batch"],
    pred_iou_thresh: PredIouOption = None,
    stability_score_thresh: StabilityOption = None,
    box_nms_thresh: BoxNmsOption = None,
    adaptive: AdaptiveOption = True,
    crop_n_layers: CropLayersOption = GENERATOR_DEFAULTS["crop_n_layers"],
    min_mask_region_area: RegionAreaOption = GENERATOR_DEFAULTS["min_mask_region_area"],
    overlay: DrawOption = True,
    formats: FormatOption = [],  # noqa: B006
    model: ModelOption = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.float32,
    as_json: JsonOption = False,
    max_pixels: MaxPixelsOption = MAX_PIXELS,
) -> None:
    """
    Find all objects, without prompts: an image or a folder of images becomes a COCO dataset.

    OUTPUT/instances.json has the images (file_name relative to the folder) and their masks as compressed RLE, all of
    one category, with the scores and the point that led to each. OUTPUT/labels/NAME.png has at each pixel the number
    of its mask, counted from 1 in the order of the image's annotations: where masks overlap, of the smallest, and 0
    where there is none. OUTPUT/overlays/NAME.jpg shows the masks. Pixels are those of the upright image.

    With --format there is also the folder OUTPUT/FORMAT, as `segment` writes it.

    NAME is the image's name without its ending, or with it where two images differ only in the ending.

    Run again, it does only what is missing (OUTPUT/records keeps what is done): images that are new or have changed,
    or all images if the model, an option or the version of this package has changed. instances.json keeps the images
    of earlier calls with the same output, except those that are gone from the folder. Images that cannot be read, and
    those whose results cannot be written, are listed at the end, with exit code 2, when all others are done.
    """
    jobs = plan_everything_jobs(image, output, overlay)
    if not image.is_dir():
        read_image(image, max_pixels, upright_size)  # before the model is loaded
    options = {
        "points_per_side": points_per_side,
        "pred_iou_thresh": pred_iou_thresh,
        "stability_score_thresh": stability_score_thresh,
        "box_nms_thresh": box_nms_thresh,
        "adaptive": adaptive,
        "crop_n_layers": crop_n_layers,
        "min_mask_region_area": min_mask_region_area,
    }
    generator = EfficientSamMaskGenerator(
        *load_model(model, dtype, device, max_pixels),
        points_per_batch=points_per_batch,
        output_mode="coco_rle",
        **options,
    )
    crop_progress = len(jobs) == 1 and crop_n_layers > 0
    write_everything(EverythingSegmenter(generator, options, crop_progress), jobs, image, output, as_json, formats)


def write_everything(
    segmenter: EverythingSegmenter,
    jobs: list[EverythingJob],
    image: Path,
    output: Path,
    as_json: bool,
    formats: list[Format],
) -> None:
    """Segments what is not done yet, reports on all images, and writes the dataset."""
    records, failures = run_jobs(
        jobs, segmenter, lambda record: None if as_json else tqdm.write(describe_annotations(record))
    )
    warn_of_empty(records, segmenter.generator)
    report_folder(records, failures, as_json)
    if records or (output / "instances.json").is_file():
        write_dataset(records, kept_records(jobs, image), output)
        write_formats(formats, output / "records", output)
    if failures:
        raise typer.Exit(2)


def warn_of_empty(records: list[dict], generator: EfficientSamMaskGenerator) -> None:
    """Says on stderr in which images no mask was found."""
    if empty := [record["image"] for record in records if not record["annotations"]]:
        where = empty[0] if len(empty) == 1 else f"{len(empty)} of {len(records)} images, such as {empty[0]}"
        typer.echo(
            f"efficientsam: no mask was found in {where}; try a lower --pred-iou-thresh (now "
            f"{generator.pred_iou_thresh:g}) or --stability-score-thresh (now {generator.stability_score_thresh:g}).",
            err=True,
        )


def describe_annotations(record: dict) -> str:
    """The record of an image as a line of text."""
    count = len(record["annotations"])
    return f"{record['image']}: {record['width']} x {record['height']} pixels, {count} mask{'s' * (count != 1)}"
