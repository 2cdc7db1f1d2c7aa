"""Image files and prompts -> mask files: what `efficientsam segment` does, for one image or a folder that is resumed.

Prompts are in pixels of the upright image. An object is a dict with its `points` [[x, y], ...], their `labels` (1 on
the object, 0 on the background) and its `box` [x1, y1, x2, y2] or `None`. Wrong input is a ValueError of one sentence.
"""

import io
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from hf_efficientsam.model.image_processing_efficientsam import EfficientSamImageProcessor
from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel
from hf_efficientsam.model.processing_efficientsam import EfficientSamProcessor

from .drawing import draw_masks
from .predictor import EfficientSamPredictor
from .predictor_base import to_picture
from .results import SegmentationResult, tight_boxes

# ------------------------------------------------------------------------------------------------ prompts


def are_numbers(values, count: int) -> bool:
    """Whether `values` is a list of `count` finite numbers; whether they lie in the image is checked later."""
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(isinstance(value, int | float) and abs(value) < 1e9 for value in values)


def parse_line(line: bytes) -> tuple[str, list, list, list]:
    """Image name, points, labels and boxes of one line of a prompts file."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is not JSON: {error}.") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise ValueError('a line must be an object {"image": "name.jpg", "points": [...], "boxes": [...]}.')
    if unknown := entry.keys() - {"image", "points", "labels", "boxes"}:
        raise ValueError(f"unknown key {min(unknown)!r}; there are image, points, labels and boxes.")
    points, boxes = entry.get("points", []), entry.get("boxes", [])
    if not isinstance(points, list) or not all(are_numbers(point, 2) for point in points):
        raise ValueError("points must be a list of [x, y], finite numbers in pixels.")
    if not isinstance(boxes, list) or not all(are_numbers(box, 4) for box in boxes):
        raise ValueError("boxes must be a list of [x1, y1, x2, y2], finite numbers in pixels.")
    labels = entry.get("labels", [1] * len(points))
    if not isinstance(labels, list) or len(labels) != len(points):
        raise ValueError(f"labels must be a list with one label for each of the {len(points)} points.")
    for label in labels:
        if label not in (0, 1):
            raise ValueError(f"a label is 1 (on the object) or 0 (on the background), not {json.dumps(label)}.")
    return entry["image"], points, labels, boxes


def group_prompts(points: list, labels: list, boxes: list, separate_points: bool) -> list[dict]:
    """Which points and boxes of an image belong to which object, by the rules in the help of `segment`."""
    on_object = [point for point, label in zip(points, labels, strict=True) if label == 1]
    background = [point for point, label in zip(points, labels, strict=True) if label == 0]
    if not on_object and not boxes:
        raise ValueError("nothing to segment; give at least one point on the object or one box.")
    if separate_points:
        groups = [(box, []) for box in boxes] + [(None, [point]) for point in on_object]
    elif len(boxes) > 1:
        groups = [(box, []) for box in boxes]
        for x, y in on_object:
            owners = [own for (x1, y1, x2, y2), own in groups if x1 <= x <= x2 and y1 <= y <= y2]
            if len(owners) != 1:
                raise ValueError(
                    f"the point {x:g},{y:g} lies in {len(owners)} of the {len(groups)} boxes, so its object is not "
                    "clear; place it in exactly one box, or make each point an object with --separate-points."
                )
            owners[0].append([x, y])
    else:
        groups = [(boxes[0] if boxes else None, on_object)]
    return [
        {"points": own + background, "labels": [1] * len(own) + [0] * len(background), "box": box}
        for box, own in groups
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


class ImageError(ValueError):
    """An image that cannot be read or is too large."""


@contextmanager
def pil_limit_lifted() -> Iterator[None]:
    """PIL refuses large pictures when it opens them (12.3: also when it crops); our own limit counts instead."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def read_image(path: Path, max_pixels: int, read: Callable[[Image.Image], Any]) -> Any:
    """
    What `read` makes of the opened image; PIL decodes its pixels only if `read` needs them.

    Raises:
        ImageError: if there is no such file, if it is no whole image, or if it has more than `max_pixels`.
    """
    if not path.is_file():
        raise ImageError(f"{path}: no such file.")
    if path.stat().st_size == 0:
        raise ImageError(f"{path}: the file is empty (0 bytes).")
    try:
        with pil_limit_lifted(), Image.open(path) as image:
            width, height = image.size
            if width * height <= max_pixels:
                return read(image)
    except Exception as error:  # PIL's readers raise errors of many kinds for broken files
        raise ImageError(f"{path}: not an image, or a damaged one ({error}).") from None
    raise ImageError(
        f"{path}: {width} x {height} pixels are over the limit of {max_pixels}; to take it all the same, lift the "
        f"limit with --max-pixels {width * height}."
    )


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after turning as the EXIF tag says, from the header."""
    sideways = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return image.size[::-1] if sideways else image.size


def as_model_sees(image: Image.Image, image_processor: EfficientSamImageProcessor) -> Image.Image:
    """The picture in RGB, upright, as the model sees it: PIL's own conversion turns 16-bit pictures white."""
    return to_picture(image_processor.process_image(image))


def find_images(folder: Path, results: list[Path]) -> list[Path]:
    """The images in a folder and its subfolders, relative to it and sorted, less those in the folders of `results`."""
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    folder, results = folder.resolve(), [result.resolve() for result in results]
    found = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in endings and path.is_file())
    return [path.relative_to(folder) for path in found if not any(path.is_relative_to(result) for result in results)]


def check_results_folder(results: Path, images: Path) -> None:
    if results.is_file() or images.resolve().is_relative_to(results.resolve()):
        raise ValueError(f"{results} must be a folder for results that does not hold the images.")


def is_newer(record_file: Path, image: Path, model: str) -> bool:
    """Whether a record was written after its image and, where the model is a directory, after the weights."""
    sources = [image, *Path(model).glob("*.safetensors")]
    return record_file.stat().st_mtime >= max(path.stat().st_mtime for path in sources)


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


def describe_mask(mask: np.ndarray, score: float) -> dict:
    box = tight_boxes(mask[None])[0].astype(int).tolist() if mask.any() else None
    return {"score": round(float(score), 4), "area": int(mask.sum()), "box": box}


def encode_mask(mask: np.ndarray, path: Path) -> bytes:
    return encode_image(Image.fromarray(mask.astype(np.uint8) * 255), path)


def check_targets(targets: list[Path], image: Path, overlay: Path | None) -> None:
    """Raises a ValueError if files to be written would replace the image or each other."""
    for file in targets:
        if file.resolve() == image.resolve():
            raise ValueError(f"{file} is the image itself and would be overwritten; choose another name.")
    if len({file.resolve() for file in targets}) < len(targets):
        raise ValueError(f"{overlay} would hold both a mask and the overlay; choose another name for one.")


def mask_files(output: Path, num_objects: int, num_candidates: int | None = None) -> list[list[Path]]:
    """The file of each candidate of each object, by the rule in the help of `segment`; `None`: only the best."""

    def tail(i: int, k: int) -> str:
        if num_candidates is not None:
            return f"_{i}_{k}"
        return f"_{i}" if num_objects > 1 else ""

    return [
        [output.with_name(output.stem + tail(i, k) + output.suffix) for k in range(1, (num_candidates or 1) + 1)]
        for i in range(1, num_objects + 1)
    ]


# ------------------------------------------------------------------------------------------------ segment


@torch.inference_mode()
def predict_masks(model, processor, inputs, all_masks: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Masks [objects, candidates, height, width] bool and scores [objects, candidates] of one image, of which `inputs`
    are what the processor made; the most confident candidate first, and only that one unless `all_masks`.
    """
    inputs = inputs.to(model.device)
    sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
    outputs = model(**inputs)
    scores, order = outputs.iou_scores[0].cpu().sort(dim=-1, descending=True)
    if not all_masks:  # dropped before they are enlarged, which takes the time and memory
        scores, order = scores[:, :1], order[:, :1]
    masks = outputs.pred_masks[0].cpu().take_along_dim(order[..., None, None], dim=1)
    return processor.post_process_masks(masks[None], *sizes)[0], scores


@dataclass(frozen=True)
class Segmenter:
    """A model and the options that hold for every image of a call."""

    name: str
    model: EfficientSamModel
    processor: EfficientSamProcessor
    all_masks: bool
    max_pixels: int

    def mask_files(self, output: Path, num_objects: int) -> list[list[Path]]:
        """The file of each candidate of each object, by the rule in the help of `segment`."""
        candidates = self.model.config.mask_decoder_config.num_multimask_outputs
        return mask_files(output, num_objects, candidates if self.all_masks else None)

    def __call__(
        self, path: Path, objects: list[dict], output: Path | None, with_overlay: bool
    ) -> tuple[dict, dict[Path, bytes], Image.Image | None]:
        """
        Args:
            path: the image.
            objects: what to segment, see `group_prompts`.
            output: where the masks are to go, if anywhere.
            with_overlay: draw the best mask of each object over the image.

        Returns:
            the record of the image, as `--json` prints it; the mask files to be written; the overlay or `None`.
        """
        image = read_image(path, self.max_pixels, ImageOps.exif_transpose)
        check_objects(objects, image.size, self.model, self.processor)
        try:
            inputs = self.processor(image, **as_processor_input(objects), max_image_pixels=self.max_pixels)
        except ValueError as error:  # the prompts are checked, so these are pixels without sense
            raise ImageError(f"{path}: {error}") from None
        masks, scores = predict_masks(self.model, self.processor, inputs, self.all_masks)
        record = {"image": str(path), "width": image.width, "height": image.height, "model": self.name, "objects": []}
        files = {}
        targets = self.mask_files(output, len(objects)) if output else None
        for i, one in enumerate(objects):
            found = []
            for k, (mask, score) in enumerate(zip(masks[i].numpy(), scores[i].tolist(), strict=True)):
                found.append(describe_mask(mask, score))
                if targets:
                    found[-1]["file"] = targets[i][k].name
                    files[targets[i][k]] = encode_mask(mask, output)
            record["objects"].append({**one, "masks": found})
        return record, files, self.draw(image, objects, masks, scores) if with_overlay else None

    def draw(self, image: Image.Image, objects: list[dict], masks: torch.Tensor, scores: torch.Tensor) -> Image.Image:
        with pil_limit_lifted():
            return draw_masks(
                as_model_sees(image, self.processor.image_processor),
                masks[:, 0].numpy(),
                points=[one["points"] for one in objects],
                labels=[one["labels"] for one in objects],
                boxes=[one["box"] for one in objects],
                scores=scores[:, 0].tolist(),
            )


def segment_file(
    segmenter: Segmenter, path: Path, objects: list[dict], output: Path | None, overlay: Path | None
) -> dict:
    """Segments one image, writes what was asked for, returns the record."""
    targets = [file for row in segmenter.mask_files(output, len(objects)) for file in row] if output else []
    targets += [overlay] if overlay else []
    check_targets(targets, path, overlay)
    record, files, picture = segmenter(path, objects, output, overlay is not None)
    if overlay is not None:
        files[overlay] = encode_image(picture, overlay)
    write_files(files)
    return record


def find_in_file(
    predictor: EfficientSamPredictor,
    path: Path,
    find: Callable[[], SegmentationResult],
    output: Path | None,
    overlay: Path | None,
    max_pixels: int,
) -> dict:
    """
    Writes the masks of what `find` finds in one image, once that is the predictor's, and returns the record: as
    `segment_file`, but the objects are known afterwards only.
    """
    image = read_image(path, max_pixels, ImageOps.exif_transpose)
    predictor.processor.image_processor.max_image_pixels = max_pixels
    try:
        predictor.set_image(image)
    except ValueError as error:  # pixels without sense
        raise ImageError(f"{path}: {error}") from None
    found = find()
    targets = [file for row in mask_files(output, len(found)) for file in row] if output else []
    check_targets([*targets, *([overlay] if overlay else [])], path, overlay)
    files = {file: encode_mask(mask, file) for file, mask in zip(targets, found.masks, strict=bool(targets))}
    record = {"image": str(path), "width": image.width, "height": image.height}
    record |= {"model": predictor.model.name_or_path, "objects": []}
    for i, mask in enumerate(found.masks):
        one = {"label": found.labels[i], **describe_mask(mask, found.scores[i])}
        one["iou"] = round(float(found.iou_scores[i]), 4)
        record["objects"].append(one | ({"file": targets[i].name} if targets else {}))
    if overlay is not None:
        with pil_limit_lifted():
            picture = draw_masks(predictor.image, found.masks, boxes=found.boxes.tolist(), scores=found.scores)
        files[overlay] = encode_image(picture, overlay)
    write_files(files)
    return record


def read_prompts_file(path: Path, separate_points: bool) -> dict[Path, tuple[str, list[dict]]]:
    """For each image, relative to its folder: where it is mentioned ("FILE, line N"), and its objects."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    entries: dict[Path, tuple[str, list[dict]]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            name, *prompts = parse_line(line)
            image = Path(name)
            if image.anchor or ".." in image.parts:
                raise ValueError(f"the image {name!r} must lie inside the folder.")
            if image in entries:
                raise ValueError(f"{name!r} has prompts in {entries[image][0]} already; put them all on one line.")
            entries[image] = place, group_prompts(*prompts, separate_points)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    if not entries:
        raise ValueError(f"{path} holds no prompts.")
    return entries


def check_images_listed(
    folder: Path, entries: dict, prompts_file: Path, only_listed: bool, results: list[Path]
) -> None:
    """Raises a ValueError unless the prompts file and the folder (less the `results` in it) name the same images."""
    for image, (place, _) in entries.items():
        if not (folder / image).is_file():
            raise ValueError(f"{place}: there is no image {image} in {folder}.")
    left_out = [name for name in find_images(folder, results) if name not in entries]
    if left_out and not only_listed:
        raise ValueError(
            f"{prompts_file} has prompts for {len(entries)} images, but {folder} holds {len(left_out)} more, such as "
            f"{folder / left_out[0]}; add lines for them, or pass --only-listed to leave them out."
        )


@dataclass(frozen=True)
class Job:
    """One image of a folder and where its results go."""

    image: Path
    objects: list[dict]
    output: Path
    overlay: Path | None

    @property
    def record_file(self) -> Path:
        return self.output.with_suffix(".json")

    def finished(self, segmenter: Segmenter) -> dict | None:
        """The record of an earlier run if it answers the same question and all of its files are there."""
        files = [file for row in segmenter.mask_files(self.output, len(self.objects)) for file in row]
        try:
            record = json.loads(self.record_file.read_bytes())
            asked = [{key: one[key] for key in ("points", "labels", "box")} for one in record["objects"]]
            written = [mask["file"] for one in record["objects"] for mask in one["masks"]]
            same = record["model"] == segmenter.name and asked == self.objects
            same = same and is_newer(self.record_file, self.image, segmenter.name)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        same = same and written == [file.name for file in files]
        files += [self.overlay] if self.overlay else []
        return record if same and all(file.is_file() for file in files) else None

    def run(self, segmenter: Segmenter) -> dict:
        record, files, picture = segmenter(self.image, self.objects, self.output, self.overlay is not None)
        if self.overlay is not None:
            files[self.overlay] = encode_image(picture, self.overlay)
        # An image is done once its record is there, so that goes first if it is outdated and comes last.
        self.record_file.unlink(missing_ok=True)
        files[self.record_file] = json.dumps(record).encode()
        write_files(files)
        return record


def plan_jobs(segmenter: Segmenter, folder: Path, entries: dict, output: Path, overlay: Path | None) -> list[Job]:
    """The job of each image, after all checks that can be made before the first one starts."""
    jobs, owners = [], {}
    for image, (place, objects) in entries.items():
        result = image.with_suffix(".png")
        job = Job(folder / image, objects, output / result, overlay and overlay / result)
        targets = [file for row in segmenter.mask_files(job.output, len(objects)) for file in row]
        for target in [*targets, job.record_file, *([job.overlay] if overlay else [])]:
            if owner := owners.get(target):
                raise ValueError(f"{place}: {target} would be written twice, also for {owner}; rename an image.")
            owners[target] = place
        try:
            size = read_image(job.image, segmenter.max_pixels, upright_size)
            check_objects(objects, size, segmenter.model, segmenter.processor)
        except ImageError:
            pass  # the others can be segmented; this one is reported at the end
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        jobs.append(job)
    return jobs


def run_jobs(jobs: list, segmenter, report: Callable[[dict], None]) -> tuple[list[dict], list[dict]]:
    """
    Segments the images that are not finished yet, with a progress bar on stderr; each new record goes to `report`.

    Args:
        jobs: each has an `image`, `finished(segmenter)` and `run(segmenter)`, as [`Job`] has.

    Returns:
        the records of all images in the order of `jobs`, but for those that cannot be read; these, with their errors.
    """
    records = [job.finished(segmenter) for job in jobs]
    failures = []
    done = len(jobs) - records.count(None)
    with tqdm(total=len(jobs), initial=done, unit="image", disable=len(jobs) == 1) as progress:
        for i, job in enumerate(jobs):
            if records[i] is not None:
                continue
            try:
                records[i] = job.run(segmenter)
                report(records[i])
            except ImageError as error:
                failures.append({"image": str(job.image), "error": str(error)})
            progress.update()
    return [record for record in records if record is not None], failures
