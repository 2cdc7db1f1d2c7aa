"""The command `efficientsam`: segment pictures, by prompts or whole; describe a checkpoint, convert an official one.

Every wrong input ends in one sentence on stderr and exit code 2. Files appear whole or not at all.
"""

import inspect
import json
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm
from transformers import logging as transformers_logging

from hf_efficientsam import __version__
from hf_efficientsam.demo.session import MAX_PIXELS
from hf_efficientsam.export.convert import convert as convert_checkpoint
from hf_efficientsam.export.publish import Repository, check_hub_in_reach, made_repositories, upload
from hf_efficientsam.inference.everything_files import Annotator, plan_everything, write_dataset
from hf_efficientsam.inference.loading import find_checkpoint, load_model
from hf_efficientsam.inference.mask_generation import EfficientSamMaskGenerator
from hf_efficientsam.inference.predictor import EfficientSamPredictor
from hf_efficientsam.inference.prompters import Detector, SalientPrompter, TextPrompter, split_names
from hf_efficientsam.inference.segment_files import (
    Segmenter,
    are_numbers,
    check_images_listed,
    check_results_folder,
    find_in_file,
    group_prompts,
    plan_jobs,
    read_image,
    read_prompts_file,
    run_jobs,
    segment_file,
    upright_size,
)
from hf_efficientsam.model.image_processing_efficientsam import EfficientSamImageProcessor
from hf_efficientsam.model.model_card_efficientsam import read_metrics


class OneSentenceErrors(typer.core.TyperGroup):
    """Reports wrong input, and what the operating system refuses, in one sentence instead of a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of our output has gone; typer knows what to do
            raise
        except (ValueError, OSError) as error:
            typer.echo(f"efficientsam: {' '.join(explain(error).splitlines())}", err=True)
            raise typer.Exit(2) from None


def explain(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return str(error)


app = typer.Typer(
    cls=OneSentenceErrors,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"efficientsam {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Cut objects out of pictures with EfficientSAM: point at them, or draw a box around them."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def parse_option(text: str, name: str, form: str) -> list[float]:
    """The numbers of an option such as `--point 580,350`, whose form is "X,Y"."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = None
    if not are_numbers(values, form.count(",") + 1):
        raise ValueError(f"{name} needs finite numbers {form} with commas between them, not {text!r}.")
    return values


def describe_record(record: dict) -> str:
    lines = [f"{record['image']}: {record['width']} x {record['height']} pixels"]
    for i, one in enumerate(record["objects"], start=1):
        for k, mask in enumerate(one["masks"], start=1):
            name = f"object {i}, candidate {k}" if len(one["masks"]) > 1 else f"object {i}"
            name += f", {one['label']}" if "label" in one else ""
            box = ",".join(map(str, mask["box"])) if mask["box"] else "none (the mask is empty)"
            file = f", file {mask['file']}" if "file" in mask else ""
            lines.append(f"  {name}: score {mask['score']:.3f}, area {mask['area']} pixels, box {box}{file}")
    return "\n".join(lines)


def check_ending(path: Path | None, name: str, endings: Iterable[str]) -> None:
    if path is not None and (path.suffix.lower() not in endings or path.is_dir()):
        raise ValueError(f"{name} {path} must be the name of a file that ends in {', '.join(endings)}.")


@app.command(no_args_is_help=True)
def segment(
    image: Annotated[Path, typer.Argument(help="An image, or a folder of images (with --prompts).")],
    point: Annotated[
        list[str], typer.Option(metavar="X,Y", help="A point on the object. May be given several times.")
    ] = [],  # noqa: B006
    background: Annotated[
        list[str], typer.Option(metavar="X,Y", help="A point that is not on the object. May be given several times.")
    ] = [],  # noqa: B006
    box: Annotated[
        list[str],
        typer.Option(metavar="X1,Y1,X2,Y2", help="A box around an object: left, top, right, bottom. May be repeated."),
    ] = [],  # noqa: B006
    separate_points: Annotated[
        bool, typer.Option("--separate-points", help="Each point is an object of its own.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="PNG file for the mask; for a folder of images, a folder for the results.")
    ] = None,
    overlay: Annotated[
        Path | None,
        typer.Option(help="Image file for a picture with the masks drawn in; for a folder of images, another folder."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="DIR_OR_HUB_ID", help="Checkpoint to use instead of the bundled one.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")
    ] = False,
    all_masks: Annotated[
        bool, typer.Option("--all-masks", help="Give every candidate of each object, best first, not only the best.")
    ] = False,
    max_pixels: Annotated[int, typer.Option(min=1, help="Refuse images of more pixels than this.")] = (
        EfficientSamImageProcessor.max_image_pixels
    ),
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='For a folder: a file of lines {"image": NAME, "points": ..., "labels": ..., "boxes": ...}.'
        ),
    ] = None,
    only_listed: Annotated[
        bool, typer.Option("--only-listed", help="Leave out images of the folder that the prompts file does not name.")
    ] = False,
) -> None:
    """
    Cut out objects that points and boxes show.

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
    OUTPUT/a.json says what was found. Run again, it does only what is missing. Images that cannot be read are
    listed at the end, with exit code 2, when all others are done.
    """
    if not image.exists():
        raise ValueError(f"{image}: no such file.")
    if image.is_dir():
        if point or background or box:
            raise ValueError(f"{image} is a folder; write its prompts into a file and pass it with --prompts.")
        if prompts is None or output is None:
            raise ValueError(
                f"{image} is a folder; it needs a prompts file (--prompts) and a folder for results (--output)."
            )
        results = [folder for folder in (output, overlay) if folder is not None]
        for folder in results:
            check_results_folder(folder, image)
        entries = read_prompts_file(prompts, separate_points)
        check_images_listed(image, entries, prompts, only_listed, results)
    else:
        if prompts is not None or only_listed:
            raise ValueError(f"{image} is no folder; give its prompts with --point, --background and --box.")
        check_ending(output, "--output", [".png"])
        check_ending(overlay, "--overlay", [".png", ".jpg", ".jpeg", ".webp"])
        points = [parse_option(text, "--point", "X,Y") for text in point]
        background_points = [parse_option(text, "--background", "X,Y") for text in background]
        boxes = [parse_option(text, "--box", "X1,Y1,X2,Y2") for text in box]
        labels = [1] * len(points) + [0] * len(background_points)
        objects = group_prompts(points + background_points, labels, boxes, separate_points)
        read_image(image, max_pixels, upright_size)  # before the model is loaded

    name = find_checkpoint(model)
    segmenter = Segmenter(name, *load_model(name), all_masks, max_pixels)
    if image.is_dir():
        jobs = plan_jobs(segmenter, image, entries, output, overlay)
        records, failures = run_jobs(
            jobs, segmenter, lambda record: None if as_json else tqdm.write(describe_record(record))
        )
        finish(records, failures, as_json)
    else:
        record = segment_file(segmenter, image, objects, output, overlay)
        typer.echo(json.dumps(record) if as_json else describe_record(record))


def finish(records: list[dict], failures: list[dict], as_json: bool) -> None:
    """Says at the end which images are done and which could not be read."""
    if as_json:
        typer.echo(json.dumps({"images": records, "failed": failures}))
    else:
        typer.echo(f"{len(records)} of {len(records) + len(failures)} images are done")
    for failure in failures:
        typer.echo(f"efficientsam: {failure['error']}", err=True)
    if failures:
        raise typer.Exit(2)


# ------------------------------------------------------------------------------------------------ salient and text

ImageFile = Annotated[Path, typer.Argument(help="An image.")]
MaskOption = Annotated[Path | None, typer.Option(help="PNG file for the mask.")]
OverlayOption = Annotated[Path | None, typer.Option(help="Image file for a picture with the masks drawn in.")]
ModelOption = Annotated[
    str | None, typer.Option(metavar="DIR_OR_HUB_ID", help="Checkpoint to use instead of the bundled one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
PixelsOption = Annotated[int, typer.Option(min=1, help="Refuse images of more pixels than this.")]


def open_predictor(
    image: Path, output: Path | None, overlay: Path | None, model: str | None, max_pixels: int
) -> EfficientSamPredictor:
    """The model, after all checks that can be made before it is loaded."""
    if image.is_dir():
        raise ValueError(f"{image} is a folder; give one image.")
    check_ending(output, "--output", [".png"])
    check_ending(overlay, "--overlay", [".png", ".jpg", ".jpeg", ".webp"])
    read_image(image, max_pixels, upright_size)
    return EfficientSamPredictor.from_pretrained(model)


def report_found(record: dict, as_json: bool, advice: str) -> None:
    if not record["objects"]:
        typer.echo(f"efficientsam: nothing was found in {record['image']}; {advice}.", err=True)
    if as_json:
        typer.echo(json.dumps(record))
    else:
        shown = [{"label": one["label"], "masks": [one]} for one in record["objects"]]
        typer.echo(describe_record({**record, "objects": shown}))


@app.command(no_args_is_help=True)
def salient(
    image: ImageFile,
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
    threshold: Annotated[float, typer.Option(help="What is salient: at least 0 (all), below 1.")] = 0.5,
    min_area: Annotated[
        float, typer.Option(help="Leave out objects of less than this share of the largest one's area, 0 to 1.")
    ] = 0.05,
    model: ModelOption = None,
    as_json: JsonOption = False,
    max_pixels: PixelsOption = EfficientSamImageProcessor.max_image_pixels,
) -> None:
    """
    Cut out what stands out in an image, object by object, without a prompt.

    A saliency map says how much each pixel stands out; what hangs together in it is an object, and the box around it
    asks for the mask. For each object, largest first, it prints the mean saliency in the mask (0 to 1), the mask's
    area, and the tight box around it, as `segment` does. Masks are written as `segment` writes them: mask.png for one
    object, and mask_1.png, mask_2.png, ... for several.
    """
    predictor = open_predictor(image, output, overlay, model, max_pixels)
    prompter = SalientPrompter(predictor, saliency, threshold, min_area, trust_remote_code)
    record = find_in_file(predictor, image, prompter, output, overlay, max_pixels)
    report_found(record, as_json, f"try a lower --threshold (now {threshold:g})")


@app.command(no_args_is_help=True)
def text(
    image: ImageFile,
    words: Annotated[str, typer.Argument(metavar="NAMES", help='What to look for, such as "a dog, a cat".')],
    detector: Annotated[
        str, typer.Option(metavar="DIR_OR_HUB_ID", help="Model for zero-shot object detection: OWLv2, Grounding DINO.")
    ],
    output: MaskOption = None,
    overlay: OverlayOption = None,
    threshold: Annotated[
        float | None, typer.Option(help="Leave out boxes of lower scores, 0 to 1; by default the detector's own.")
    ] = None,
    model: ModelOption = None,
    as_json: JsonOption = False,
    max_pixels: PixelsOption = EfficientSamImageProcessor.max_image_pixels,
) -> None:
    """
    Cut out objects by their names, with a detector of your choice; none comes with the package.

    The detector finds boxes, and those are what is segmented. For each object, best first, it prints its name, the
    detector's score (0 to 1), the mask's area, and the tight box around it, as `segment` does. Masks are written as
    `segment` writes them: mask.png for one object, and mask_1.png, mask_2.png, ... for several.
    """
    split_names(words)
    predictor = open_predictor(image, output, overlay, model, max_pixels)
    prompter = TextPrompter(predictor, Detector(detector, predictor.device), threshold)
    record = find_in_file(predictor, image, lambda: prompter(words), output, overlay, max_pixels)
    report_found(record, as_json, "try other names or a lower --threshold")


# ------------------------------------------------------------------------------------------------ everything

GENERATOR_DEFAULTS = {
    name: parameter.default for name, parameter in inspect.signature(EfficientSamMaskGenerator).parameters.items()
}


@app.command(no_args_is_help=True)
def everything(
    image: Annotated[Path, typer.Argument(metavar="IMAGE_OR_DIR", help="An image, or a folder of images.")],
    output: Annotated[Path, typer.Option(help="Folder for the results.")],
    points_per_side: Annotated[
        int, typer.Option(help="Points along each side of the grid that is laid over the image.")
    ] = GENERATOR_DEFAULTS["points_per_side"],
    points_per_batch: Annotated[
        int, typer.Option(help="Points that go through the model at a time; fewer need less memory.")
    ] = GENERATOR_DEFAULTS["points_per_batch"],
    pred_iou_thresh: Annotated[
        float, typer.Option(help="Keep masks whose quality the model puts above this; 0 keeps all.")
    ] = GENERATOR_DEFAULTS["pred_iou_thresh"],
    stability_score_thresh: Annotated[
        float, typer.Option(help="Keep masks whose edge is clear, from 0 (all) to 1.")
    ] = GENERATOR_DEFAULTS["stability_score_thresh"],
    box_nms_thresh: Annotated[
        float, typer.Option(help="Of masks whose boxes overlap by a larger IoU keep the best only.")
    ] = GENERATOR_DEFAULTS["box_nms_thresh"],
    crop_n_layers: Annotated[
        int, typer.Option(help="For small objects: layer i also looks at 4**i crops of the image.")
    ] = GENERATOR_DEFAULTS["crop_n_layers"],
    min_mask_region_area: Annotated[
        int, typer.Option(help="Fill holes and remove islands of fewer pixels in masks.")
    ] = GENERATOR_DEFAULTS["min_mask_region_area"],
    overlay: Annotated[bool, typer.Option("--overlay/--no-overlay", help="Draw the masks over each image.")] = True,
    model: Annotated[
        str | None, typer.Option(metavar="DIR_OR_HUB_ID", help="Checkpoint to use instead of the bundled one.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")
    ] = False,
    max_pixels: Annotated[int, typer.Option(min=1, help="Refuse images of more pixels than this.")] = (
        EfficientSamImageProcessor.max_image_pixels
    ),
) -> None:
    """
    Find all objects, without prompts: an image or a folder of images becomes a COCO dataset.

    OUTPUT/instances.json has the images (file_name relative to the folder) and their masks as compressed RLE, all of
    one category, with the scores and the point that led to each. OUTPUT/labels/NAME.png has at each pixel the number
    of its mask, counted from 1 in the order of the image's annotations: where masks overlap, of the smallest, and 0
    where there is none. OUTPUT/overlays/NAME.jpg shows the masks. Pixels are those of the upright image.

    Run again, it does only what is missing, as OUTPUT/records tells: images that are new or changed, or all if the
    model or an option is another. instances.json has the images of the last call. Images that cannot be read are
    listed at the end, with exit code 2, when all others are done.
    """
    jobs = plan_everything(image, output, overlay)
    if not image.is_dir():
        read_image(image, max_pixels, upright_size)  # before the model is loaded
    options = {
        "points_per_side": points_per_side,
        "pred_iou_thresh": pred_iou_thresh,
        "stability_score_thresh": stability_score_thresh,
        "box_nms_thresh": box_nms_thresh,
        "crop_n_layers": crop_n_layers,
        "min_mask_region_area": min_mask_region_area,
    }
    crop_progress = len(jobs) == 1 and crop_n_layers > 0
    annotator = Annotator.load(find_checkpoint(model), options, points_per_batch, max_pixels, crop_progress)
    records, failures = run_jobs(
        jobs, annotator, lambda record: None if as_json else tqdm.write(describe_annotations(record))
    )
    if records:
        write_dataset(records, output)
    if empty := [record["image"] for record in records if not record["annotations"]]:
        where = empty[0] if len(empty) == 1 else f"{len(empty)} of {len(records)} images, such as {empty[0]}"
        typer.echo(
            f"efficientsam: no mask was found in {where}; try a lower --pred-iou-thresh (now {pred_iou_thresh:g}) or "
            f"--stability-score-thresh (now {stability_score_thresh:g}).",
            err=True,
        )
    for record in records:  # the masks are in the files; here they would drown everything else
        for annotation in record["annotations"]:
            del annotation["segmentation"]
    finish(records, failures, as_json)


def describe_annotations(record: dict) -> str:
    count = len(record["annotations"])
    return f"{record['image']}: {record['width']} x {record['height']} pixels, {count} mask{'s' * (count != 1)}"


# ------------------------------------------------------------------------------------------------ info and convert


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="Directory or Hub name; the bundled one if not given.")] = None,
):
    """Describe a checkpoint: its size, the prompts it takes, and its measured numbers if they come with it."""
    name = find_checkpoint(model)
    network, processor = load_model(name)
    config, size = network.config, processor.image_processor.size

    def millions(module: torch.nn.Module) -> str:
        return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M"

    vision, prompt_encoder = config.vision_config, config.prompt_encoder_config
    kinds = ["points", "boxes"]
    kinds += ["background points"] if prompt_encoder.background_points else []
    kinds += ["masks"] if prompt_encoder.mask_prompts else []
    aspect = "kept" if processor.image_processor.keep_aspect_ratio else "ignored"
    rows = {
        "checkpoint": name,
        "parameters": millions(network),
        "  encoder": f"{millions(network.vision_encoder)}, {vision.num_hidden_layers} layers of {vision.hidden_size}",
        "  prompts": millions(network.prompt_encoder),
        "  decoder": millions(network.mask_decoder),
        "input": f"{size.width} x {size.height} pixels, aspect ratio {aspect}",
        "prompts": ", ".join(kinds),
        "candidates": f"{config.mask_decoder_config.num_multimask_outputs} masks for each object",
    }
    for key, value in rows.items():
        typer.echo(f"{key:11} {value}")
    if metrics := read_metrics(name):
        typer.echo(describe_metrics(json.loads(metrics)))


def describe_metrics(metrics: dict) -> str:
    """The mIoU table of the json that training/evaluate_masks.py writes."""
    try:
        lines = [f"measured    mIoU of {metrics['masks']} masks in {metrics['images']} images"]
        for prompt, answers in metrics["results"].items():
            for answer, groups in answers.items():
                lines.append(f"  {prompt + ', ' + answer:24} {groups['all']['miou']:.4f}")
    except (KeyError, TypeError, AttributeError):
        return "measured    see metrics.json, whose form is not known here"
    return "\n".join(lines)


@app.command(no_args_is_help=True)
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Official file, such as efficient_sam_vitt.pt.")],
    output: Annotated[Path, typer.Argument(help="Directory to write model and processor to.")],
    image_size: Annotated[int, typer.Option(min=16, help="Input side in pixels.")] = 1024,
    num_attention_heads: Annotated[
        int | None, typer.Option(min=1, help="Heads of the encoder; by default its width / 64.")
    ] = None,
    decoder_num_attention_heads: Annotated[int, typer.Option(min=1, help="Heads of the mask decoder.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a directory that is not empty.")] = False,
) -> None:
    """Convert an official EfficientSAM checkpoint for from_pretrained and --model."""
    if output.is_file():
        raise ValueError(f"{output} is a file; give the name of a directory.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"{output} is not empty; choose another directory, or pass --overwrite.")
    model = convert_checkpoint(
        checkpoint,
        output,
        image_size=image_size,
        num_attention_heads=num_attention_heads,
        decoder_num_attention_heads=decoder_num_attention_heads,
    )
    typer.echo(f"{output}: {model.num_parameters() / 1e6:.2f} M parameters, input {image_size} x {image_size} pixels")


class Variant(str, Enum):
    """Of an exported model."""

    float16 = "float16"
    int8 = "int8"


@app.command(no_args_is_help=True)
def export_onnx(
    model: Annotated[str, typer.Argument(metavar="DIR_OR_HUB_ID", help="Checkpoint to export.")],
    output: Annotated[Path, typer.Argument(help="Directory to write encoder.onnx and decoder.onnx to.")],
    variants: Annotated[
        list[Variant], typer.Option("--variant", help="Write a smaller variant, too. May be given several times.")
    ] = [],  # noqa: B006
    images: Annotated[Path | None, typer.Option(help="Folder of images on which variants are measured.")] = None,
    allow_loss: Annotated[
        bool, typer.Option("--allow-loss", help="Write variants that lose more than 0.5 % of mask IoU, too.")
    ] = False,
) -> None:
    """
    Export a checkpoint to ONNX, for EfficientSamOnnxPredictor and other runtimes.

    The numbers of images, prompts and points are free, and for the encoder height and width. The files are compared
    with torch on inputs of random shapes; if they differ by more than 0.0001 of the largest value, none is written.

    A variant (encoder_float16.onnx, decoder_float16.onnx, ...) has weights in 16-bit floats or 8-bit integers. Its
    masks are compared with those of the whole files, for boxes laid over the images.
    """
    if output.is_file():
        raise ValueError(f"{output} is a file; give the name of a directory.")
    if not variants and (images is not None or allow_loss):
        raise ValueError("--images and --allow-loss are for variants; add --variant float16 or --variant int8.")
    if variants and images is None:
        raise ValueError("variants are measured on images; pass a folder of them with --images.")
    name = find_checkpoint(model)
    try:
        from hf_efficientsam.export.onnx_export import export_onnx
    except ImportError as error:
        raise ValueError(f"the export needs {error.name}; install hf-efficientsam[onnx].") from None
    written = export_onnx(name, output, [one.value for one in variants], images, allow_loss)
    for file, found in written.items():
        quality = (
            f"mask IoU {found['mask_iou']:.4f} with float32"
            if "mask_iou" in found
            else (f"within {found['difference']:.1e} of torch")
        )
        typer.echo(f"{output / file}: {found['bytes'] / 1e6:.1f} MB, {quality}")


# ------------------------------------------------------------------------------------------------ publish


@app.command(no_args_is_help=True)
def publish(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a checkpoint.")],
    name: Annotated[str, typer.Argument(metavar="REPO", help="Name of the repository on the Hub, such as org/name.")],
    push: Annotated[bool, typer.Option("--push", help="Upload; without it nothing leaves this machine.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make new repositories private.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Export the model to ONNX into the folder onnx.")] = False,
    demo: Annotated[bool, typer.Option("--demo", help="Make a Space with the web demo, named REPO-demo.")] = False,
    space: Annotated[str | None, typer.Option(metavar="NAME", help="Make that Space under another name.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="New folder to keep what would be uploaded, as OUTPUT/model and OUTPUT/space.")
    ] = None,
) -> None:
    """
    Make a checkpoint a repository of the Hugging Face Hub that works with transformers alone.

    It has the weights in the precision that they are stored in, the code (for trust_remote_code), the saliency head
    and metrics.json if the checkpoint has them, and a model card: the checkpoint's README.md, or one with the numbers
    of metrics.json. First it is loaded in a process without this package, where it must give the same masks. The same
    checkpoint makes the same files.

    Without --push this only lists the files. With it each repository is uploaded in one commit: files of the same
    name are replaced, others stay. The token is that of `hf auth login` or HF_TOKEN. A Space needs one of its own, as
    the secret HF_TOKEN, to read a private model. Its files are in a checkout of the project only, not in the package.
    """
    if private and not push:
        raise ValueError("--private is for new repositories that --push makes; give both, or neither.")
    if push:
        check_hub_in_reach()
    if demo and space is None:
        space = f"{name}-demo"
    with made_repositories(directory, name, space, onnx, output) as repositories:
        for repository in repositories:
            typer.echo(describe_repository(repository))
        there, made = ({path.name for path in folder.iterdir()} for folder in (directory, repositories[0].folder))
        if there - made:
            typer.echo(f"left out of {directory}: {', '.join(sorted(there - made))}")
        if not push:
            typer.echo("nothing was uploaded; the same command with --push uploads these files")
        for repository in repositories if push else []:
            typer.echo(f"uploaded to {upload(repository, private)}")


def describe_repository(repository: Repository) -> str:
    files = repository.files()
    lines = [f"{repository.kind} {repository.name}: {len(files)} files, {sum(files.values()) / 1e6:.1f} MB"]
    return "\n".join(lines + [f"  {size:>12,} {file}" for file, size in files.items()])


# ------------------------------------------------------------------------------------------------ demo


@app.command()
def demo(
    model: ModelOption = None,
    detector: Annotated[
        str | None, typer.Option(metavar="DIR_OR_HUB_ID", help="Zero-shot object detector, to find objects by words.")
    ] = None,
    saliency: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_OR_HUB_ID", help="Saliency model instead of the checkpoint's own head; may be .onnx."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is every one of this computer.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen at; by default 7860 or the next free one.")
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Ask gradio's servers for a public link, too.")] = False,
    max_pixels: Annotated[int, typer.Option(min=1, help="Refuse pictures of more pixels than this.")] = MAX_PIXELS,
) -> None:
    """
    Serve a web page where objects are cut out with the mouse, until Ctrl+C.

    The page uses no network beside its own. Pictures stay in this computer's memory, each visitor's apart from all
    others', and are forgotten after an hour.
    """
    try:
        from hf_efficientsam.demo.page import launch_demo  # gradio takes seconds to import
        from hf_efficientsam.demo.service import Demo
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError('the page needs gradio; install it with pip install "hf-efficientsam[demo]".') from None
    launch_demo(Demo(model, detector, saliency, max_pixels), host, port, share)
