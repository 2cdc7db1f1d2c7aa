"""The command `efficientsam`: segment pictures, describe a checkpoint, convert an official one.

Every wrong input ends in one sentence on stderr and exit code 2. Files appear whole or not at all.
"""

import io
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image, ImageOps
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import logging as transformers_logging
from transformers.utils import cached_file

from . import __version__
from .configuration_efficientsam import EfficientSamConfig
from .convert import convert as convert_checkpoint
from .hub import bundled_checkpoint
from .image_processing_efficientsam import EfficientSamImageProcessor
from .modeling_efficientsam import EfficientSamModel
from .processing_efficientsam import EfficientSamProcessor
from .visualize import draw_masks


class OneSentenceErrors(typer.core.TyperGroup):
    """Reports wrong input, and what the operating system refuses, in one sentence instead of a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of our output has gone; typer knows what to do
            raise
        except (ValueError, OSError) as error:
            typer.echo(f"efficientsam: {explain(error)}", err=True)
            raise typer.Exit(2) from None


def explain(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return str(error)


app = typer.Typer(cls=OneSentenceErrors, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


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


# ------------------------------------------------------------------------------------------------ prompts


@dataclass(frozen=True)
class Prompts:
    """What was asked of one image, in pixels of the upright image; `labels` has 1 (object) or 0 for each point."""

    points: list[list[float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    boxes: list[list[float]] = field(default_factory=list)


def read_numbers(values, count: int, name: str, form: str) -> list[float]:
    """`values`, a list of `count` finite numbers, as floats; else an error that shows the `form` they should have."""
    right_type = isinstance(values, list) and len(values) == count
    if not right_type or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise ValueError(f"{name} must be {form}, {count} finite numbers, not {json.dumps(values)}.")
    return [float(value) for value in values]


def parse_option(text: str, count: int, name: str, form: str) -> list[float]:
    """Numbers of an option such as `--point 580,350`."""
    try:
        return read_numbers([float(part) for part in text.split(",")], count, name, form)
    except ValueError:
        raise ValueError(f"{name} must be {form}, {count} finite numbers with commas between, not {text!r}.") from None


def parse_prompt_line(line: dict) -> Prompts:
    """The prompts of one line of a prompts file."""
    if unknown := line.keys() - {"image", "points", "labels", "boxes"}:
        raise ValueError(f"unknown key {min(unknown)!r}; a line has image, points, labels and boxes.")
    for key in ("points", "labels", "boxes"):
        if not isinstance(line.get(key, []), list):
            raise ValueError(f"{key} must be a list, not {json.dumps(line[key])}.")
    points = [read_numbers(point, 2, "a point", "[x, y]") for point in line.get("points", [])]
    boxes = [read_numbers(box, 4, "a box", "[x1, y1, x2, y2]") for box in line.get("boxes", [])]
    labels = line.get("labels", [1] * len(points))
    if len(labels) != len(points):
        raise ValueError(f"there are {len(points)} points but {len(labels)} labels.")
    for label in labels:
        if label not in (0, 1):
            raise ValueError(f"a label is 1 (on the object) or 0 (on the background), not {json.dumps(label)}.")
    return Prompts(points, labels, boxes)


def group_prompts(prompts: Prompts, separate_points: bool) -> list[dict]:
    """
    Which prompts belong to which object, by the rules in the help of `segment`: one dict an object with its `points`,
    `labels` and `box` (or `None`).
    """
    on_object = [point for point, label in zip(prompts.points, prompts.labels, strict=True) if label == 1]
    background = [point for point, label in zip(prompts.points, prompts.labels, strict=True) if label == 0]
    if not on_object and not prompts.boxes:
        raise ValueError("nothing to segment: give at least one point on the object or one box.")
    if separate_points:
        groups = [(box, []) for box in prompts.boxes] + [(None, [point]) for point in on_object]
    elif len(prompts.boxes) <= 1:
        groups = [(prompts.boxes[0] if prompts.boxes else None, on_object)]
    else:
        groups = [(box, []) for box in prompts.boxes]
        for x, y in on_object:
            owners = [points for (x1, y1, x2, y2), points in groups if x1 <= x <= x2 and y1 <= y <= y2]
            if len(owners) != 1:
                raise ValueError(
                    f"the point {x:g},{y:g} lies in {len(owners)} of the {len(groups)} boxes, so its object is not "
                    "clear; put it into exactly one box, or make points objects of their own (--separate-points)."
                )
            owners[0].append([x, y])
    return [
        {"points": points + background, "labels": [1] * len(points) + [0] * len(background), "box": box}
        for box, points in groups
    ]


def as_processor_input(objects: list[dict]) -> dict:
    return {
        "input_points": [[one["points"] for one in objects]],
        "input_labels": [[one["labels"] for one in objects]],
        "input_boxes": [[one["box"] for one in objects]],
    }


def check_objects(objects: list[dict], size: tuple[int, int], model, processor) -> None:
    """Raises a ValueError if the prompts do not fit the image of `size` (width, height) or the model."""
    has_background = any(0 in one["labels"] for one in objects)
    if has_background and not model.config.prompt_encoder_config.background_points:
        raise ValueError("this model takes no background points; leave them out, or use one that does (--model).")
    try:
        processor(original_sizes=[(size[1], size[0])], **as_processor_input(objects))
    except ValueError as error:  # the processor numbers images and prompts, which says nothing here
        raise ValueError(re.sub(r"^Image \d+, prompt \d+: ", "", str(error))) from None


# ------------------------------------------------------------------------------------------------ images and files


def open_image(path: Path, max_pixels: int, decode: bool = True) -> Image.Image:
    """
    The upright image, of any mode. With `decode=False` only its header is read, and its size may be sideways.

    Raises:
        ValueError: if there is no such file, if it is no whole image, or if it has more than `max_pixels`.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes).")
    pil_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the limit below says how to lift it
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height <= max_pixels:
                return ImageOps.exif_transpose(image) if decode else image
    except Exception as error:  # PIL's readers raise errors of many kinds for broken files
        raise ValueError(f"{path}: not an image that can be read, or a damaged one ({error}).") from None
    finally:
        Image.MAX_IMAGE_PIXELS = pil_limit
    raise ValueError(
        f"{path}: {width} x {height} pixels are over the limit of {max_pixels}; to take it all the same, raise the "
        f"limit with --max-pixels {width * height}."
    )


def encode_image(image: Image.Image, path: Path) -> bytes:
    """The bytes of an image file of the kind that the ending of `path` asks for."""
    buffer = io.BytesIO()
    image.save(buffer, format=Image.registered_extensions()[path.suffix.lower()])
    return buffer.getvalue()


def write_files(files: dict[Path, bytes]) -> None:
    """Writes all files, or none if one cannot be written. Each appears whole, in the order given."""
    parts = {path: path.with_name(f".{path.name}.part") for path in files}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            parts[path].write_bytes(content)
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ the model


def find_checkpoint(name: str | None) -> str:
    """The name or directory to load, after the checks that can be made without loading."""
    if name is None:
        name = bundled_checkpoint()
        if not Path(name).is_dir():
            raise ValueError(f"The bundled checkpoint is missing at {name}; reinstall hf-efficientsam or use --model.")
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{name} is a file; a checkpoint is a directory, which `efficientsam convert` makes.")
    if path.is_dir():
        for pattern, what in (("config.json", "config.json"), ("*.safetensors", "weights (model.safetensors)")):
            if not any(path.glob(pattern)):
                raise ValueError(f"{name} is no checkpoint: it has no {what}.")
    elif path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2:
        raise ValueError(f"{name}: no such directory.")
    try:
        model_type = EfficientSamConfig.get_config_dict(name)[0].get("model_type")
    except OSError:
        raise ValueError(f"{name} is neither a directory nor a Hub model that can be reached.") from None
    if model_type != EfficientSamConfig.model_type:
        raise ValueError(f"{name} holds a model of type {model_type!r}, not {EfficientSamConfig.model_type!r}.")
    return name


def load_model(name: str) -> tuple[EfficientSamModel, EfficientSamProcessor]:
    try:
        processor = EfficientSamProcessor.from_pretrained(name)
        # float32 whatever was stored: half precision is slow on CPUs.
        model, loading = EfficientSamModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} cannot be loaded: {reason}") from None
    if loading["missing_keys"]:
        raise ValueError(f"{name} lacks {len(loading['missing_keys'])} of the model's weights.")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor


@torch.inference_mode()
def segment_image(
    model: EfficientSamModel,
    processor: EfficientSamProcessor,
    image: Image.Image,
    objects: list[dict],
    all_masks: bool,
    max_pixels: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Masks [objects, candidates, height, width] bool and scores [objects, candidates], the most confident candidate
    first; the only one unless `all_masks`.
    """
    inputs = processor(image, **as_processor_input(objects), max_image_pixels=max_pixels).to(model.device)
    sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
    outputs = model(**inputs)
    scores, order = outputs.iou_scores[0].cpu().sort(dim=-1, descending=True)
    if not all_masks:
        scores, order = scores[:, :1], order[:, :1]
    masks = outputs.pred_masks[0].cpu().take_along_dim(order[..., None, None], dim=1)
    return processor.post_process_masks(masks[None], *sizes)[0], scores


def describe_mask(mask: torch.Tensor, score: float, file: str | None) -> dict:
    rows, columns = mask.any(dim=1).nonzero()[:, 0].tolist(), mask.any(dim=0).nonzero()[:, 0].tolist()
    box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if rows else None
    return {"score": round(score, 4), "area": int(mask.sum()), "box": box, "file": file}


# ------------------------------------------------------------------------------------------------ segment


@dataclass(frozen=True)
class Segmenter:
    """A model and the options that hold for all images of a call."""

    name: str
    model: EfficientSamModel
    processor: EfficientSamProcessor
    separate_points: bool
    all_masks: bool
    max_pixels: int

    def mask_files(self, output: Path, num_objects: int) -> list[list[Path]]:
        """For each object the file of each candidate, by the rule in the help of `segment`."""
        if self.all_masks:
            count = self.model.config.mask_decoder_config.num_multimask_outputs
            tails = [[f"_{i}_{k}" for k in range(1, count + 1)] for i in range(1, num_objects + 1)]
        else:
            tails = [[f"_{i}"] for i in range(1, num_objects + 1)] if num_objects > 1 else [[""]]
        return [[output.with_name(output.stem + tail + output.suffix) for tail in row] for row in tails]

    def __call__(
        self, image_path: Path, prompts: Prompts, output: Path | None, overlay: Path | None
    ) -> tuple[dict, dict[Path, bytes]]:
        """The record of an image, as `--json` prints it, and the files to be written. Errors are ValueErrors."""
        image = open_image(image_path, self.max_pixels)
        objects = group_prompts(prompts, self.separate_points)
        check_objects(objects, image.size, self.model, self.processor)
        masks, scores = segment_image(
            self.model, self.processor, image, objects, self.all_masks, self.max_pixels
        )
        files, record_objects = {}, []
        paths = self.mask_files(output, len(objects)) if output else [[None] * masks.shape[1]] * len(objects)
        for i, one in enumerate(objects):
            found = []
            for mask, score, path in zip(masks[i], scores[i].tolist(), paths[i], strict=True):
                found.append(describe_mask(mask, score, path and path.name))
                if path is not None:
                    files[path] = encode_image(Image.fromarray(mask.byte().numpy() * 255), path)
            record_objects.append({**one, "masks": found})
        if overlay is not None:
            picture = draw_masks(
                as_rgb(image, self.processor),
                masks[:, 0],
                points=[one["points"] for one in objects],
                labels=[one["labels"] for one in objects],
                boxes=[one["box"] for one in objects],
                scores=scores[:, 0],
            )
            files[overlay] = encode_image(picture, overlay)
        record = {
            "image": str(image_path),
            "width": image.width,
            "height": image.height,
            "model": self.name,
            "objects": record_objects,
        }
        return record, files
