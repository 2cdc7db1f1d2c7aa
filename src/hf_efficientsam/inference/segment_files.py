"""Image files and prompts -> mask files: what `efficientsam segment`, `salient` and `text` do.

Prompts and masks are in pixels of the upright image. An object is a dict with `points`, `labels` and `box`, see
prompt_files.py. Wrong input is a ValueError of one sentence.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_efficientsam.model.image_processing_efficientsam import EfficientSamImageProcessor
from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel

from .drawing import draw_masks
from .folder_runs import FolderJob, JobSegmenter, check_not_of_another, name_results
from .image_files import (
    ImageError,
    encode_image,
    encode_mask,
    pil_limit_lifted,
    read_image,
    upright_image,
    upright_size,
    write_files,
)
from .predictor import EfficientSamPredictor
from .prompt_files import PROMPTS, check_objects
from .records import image_record, mask_record
from .results import RleMasks, SegmentationResult


def set_image_file(predictor: EfficientSamPredictor, path: Path, objects: list[dict] | None = None) -> None:
    """
    Makes the image in a file that of the predictor.

    Args:
        objects: what will be asked about it; checked before the image is encoded, which takes the time.

    Raises:
        ImageError: an image that cannot be read.
        ValueError: objects that do not fit the image or the model.
    """
    image = read_image(path, predictor.processor.image_processor.max_image_pixels, upright_image)
    if objects is not None:
        check_objects(objects, image.size, predictor.model, predictor.processor)
    try:
        predictor.set_image(image)
    except ValueError as error:  # the size is checked, so these are pixels without sense
        raise ImageError(f"{path}: {error}") from None


# ------------------------------------------------------------------------------------------------ files of masks


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


def check_targets(targets: list[Path], image: Path, overlay: Path | None) -> None:
    """Raises a ValueError if files to be written would replace the image or each other."""
    for file in targets:
        if file.resolve() == image.resolve():
            raise ValueError(f"{file} is the image itself and would be overwritten; choose another name.")
    if len({file.resolve() for file in targets}) < len(targets):
        raise ValueError(f"{overlay} would hold both a mask and the overlay; choose another name for one.")


def encode_overlay(predictor: EfficientSamPredictor, path: Path, masks: np.ndarray | RleMasks, **prompts) -> bytes:
    """The bytes of an image file with masks `[N, height, width]` drawn over the predictor's image."""
    with pil_limit_lifted():
        return encode_image(draw_masks(predictor.image, masks, **prompts), path)


# ------------------------------------------------------------------------------------------------ by prompts


@dataclass(frozen=True)
class Segmenter(JobSegmenter):
    """
    A predictor and the options that hold for every image of a call.

    Attributes:
        predictor: of a loaded checkpoint.
        all_masks: give every candidate of each object, best first, not only the best.
    """

    predictor: EfficientSamPredictor
    all_masks: bool

    @property
    def model(self) -> EfficientSamModel:
        return self.predictor.model

    @property
    def image_processor(self) -> EfficientSamImageProcessor:
        return self.predictor.processor.image_processor

    def mask_files(self, output: Path, num_objects: int) -> list[list[Path]]:
        """The file of each candidate of each object."""
        candidates = self.predictor.model.config.mask_decoder_config.num_multimask_outputs
        return mask_files(output, num_objects, candidates if self.all_masks else None)

    def targets(self, output: Path | None, num_objects: int, overlay: Path | None) -> list[Path]:
        """All files that a call writes."""
        masks = [file for row in self.mask_files(output, num_objects) for file in row] if output else []
        return [*masks, *([overlay] if overlay else [])]

    def __call__(
        self, path: Path, objects: list[dict], output: Path | None, overlay: Path | None
    ) -> tuple[dict, dict[Path, bytes]]:
        """
        Args:
            path: the image.
            objects: what to segment, see `group_prompts`.
            output: where the masks are to go, if anywhere.
            overlay: where an image with the best mask of each object drawn in is to go, if anywhere.

        Returns:
            the record of the image, as `--json` prints it; the contents of the files to be written.
        """
        set_image_file(self.predictor, path, objects)
        prompts = {key: [one[name] for one in objects] for key, name in PROMPTS.items()}
        answers = self.predictor.iter_candidates(**prompts, best_only=not self.all_masks)
        targets = self.mask_files(output, len(objects)) if output else None
        files, found = {}, []
        for i, (one, (masks, scores)) in enumerate(zip(objects, answers, strict=True)):
            candidates = [mask_record(*candidate) for candidate in zip(masks, scores, strict=True)]
            if targets:
                for k, (candidate, mask) in enumerate(zip(candidates, masks, strict=True)):
                    candidate["file"] = str(targets[i][k])
                    files[targets[i][k]] = encode_mask(mask, output)
            found.append({**one, "masks": candidates})
        if overlay is not None:
            best = [one["masks"][0] for one in found]
            masks = RleMasks([one["segmentation"] for one in best], self.predictor.original_size)
            scores = [one["score"] for one in best]
            files[overlay] = encode_overlay(self.predictor, overlay, masks, scores=scores, **prompts)
        return image_record(str(path), self.predictor.original_size, self.name, objects=found), files


def segment_file(
    segmenter: Segmenter, path: Path, objects: list[dict], output: Path | None, overlay: Path | None
) -> dict:
    """Segments one image, writes what was asked for, returns the record."""
    check_targets(segmenter.targets(output, len(objects), overlay), path, overlay)
    record, files = segmenter(path, objects, output, overlay)
    write_files(files)
    return record


# ------------------------------------------------------------------------------------------------ by a prompter


def find_in_file(
    predictor: EfficientSamPredictor,
    path: Path,
    find: Callable[[], SegmentationResult],
    output: Path | None,
    overlay: Path | None,
    record_file: Path | None = None,
) -> dict:
    """
    Writes the masks of what `find` finds in one image, once that is the predictor's, and returns the record: as
    `segment_file`, but the objects are known afterwards only. The record is written, too, if it is given a file.
    """
    set_image_file(predictor, path)
    found = find()
    targets = [file for row in mask_files(output, len(found)) for file in row] if output else []
    check_targets([*targets, *([overlay] if overlay else [])], path, overlay)
    files = {file: encode_mask(mask, file) for file, mask in zip(targets, found.masks, strict=bool(targets))}
    objects = []
    for i, mask in enumerate(found.masks):
        one = {"label": found.labels[i], **mask_record(mask, found.scores[i])}
        one["iou"] = round(float(found.iou_scores[i]), 4)
        objects.append(one | ({"file": str(targets[i])} if targets else {}))
    if overlay is not None:
        drawn = {"boxes": found.boxes.tolist(), "scores": found.scores}
        files[overlay] = encode_overlay(predictor, overlay, found.masks, **drawn)
    record = image_record(str(path), predictor.original_size, predictor.model.name_or_path, objects=objects)
    write_files(files | ({record_file: json.dumps(record).encode()} if record_file else {}))
    return record


# ------------------------------------------------------------------------------------------------ folders


@dataclass(frozen=True)
class SegmentJob(FolderJob):
    """
    One image of a folder, its objects, and where its results go.

    Attributes:
        place: the line of the prompts file ("FILE, line N").
        objects: what to segment, see `group_prompts`.
        output: file of the mask, from which the other names follow.
        overlay: file of the overlay, if there is to be one.
    """

    place: str
    objects: list[dict]
    output: Path
    overlay: Path | None

    @property
    def record_file(self) -> Path:
        return self.output.with_suffix(".json")

    def result_files(self, segmenter: Segmenter) -> list[Path]:
        return segmenter.targets(self.output, len(self.objects), self.overlay)

    def is_answered_by(self, record: dict, segmenter: Segmenter) -> bool:
        asked = [{key: one[key] for key in PROMPTS.values()} for one in record["objects"]]
        masks = [mask for one in record["objects"] for mask in one["masks"] if mask["segmentation"]]
        written = [Path(mask["file"]).name for mask in masks]
        files = segmenter.targets(self.output, len(self.objects), None)
        return asked == self.objects and written == [file.name for file in files]

    def restate(self, record: dict, segmenter: Segmenter) -> dict:
        for one, files in zip(record["objects"], segmenter.mask_files(self.output, len(self.objects)), strict=True):
            for mask, file in zip(one["masks"], files, strict=True):
                mask["file"] = str(file)
        return super().restate(record, segmenter)

    def compute(self, segmenter: Segmenter) -> tuple[dict, dict[Path, bytes]]:
        return segmenter(self.image, self.objects, self.output, self.overlay)


def segment_into_folder(
    segmenter: Segmenter, path: Path, objects: list[dict], folder: Path, overlay: Path | None
) -> dict:
    """Segments one image as a folder of one, if an earlier call has not; its results are named after it."""
    job = SegmentJob(path, str(path), objects, folder / f"{path.stem}.png", overlay)
    check_not_of_another(job.record_file, path)
    check_targets(job.result_files(segmenter), path, overlay)
    return job.finished(segmenter) or job.run(segmenter)


def plan_segment_jobs(
    segmenter: Segmenter, folder: Path, entries: dict, output: Path, overlay: Path | None
) -> list[SegmentJob]:
    """
    The job of each image, after all checks that can be made before the first one starts.

    Args:
        entries: as `read_prompts_file` returns them.
    """
    images = list(entries)

    def job_of(i: int, name: Path) -> SegmentJob:
        place, objects = entries[images[i]]
        result = name.with_name(f"{name.name}.png")
        return SegmentJob(folder / images[i], place, objects, output / result, overlay and overlay / result)

    def files(i: int, name: Path) -> list[Path]:
        job = job_of(i, name)
        return [*job.result_files(segmenter), job.record_file]

    jobs = [job_of(i, name) for i, name in enumerate(name_results(images, files))]
    for job in jobs:
        try:
            size = read_image(job.image, segmenter.max_pixels, upright_size)
            check_objects(job.objects, size, segmenter.predictor.model, segmenter.predictor.processor)
        except ImageError:
            pass  # the others can be segmented; this one is reported at the end
        except ValueError as error:
            raise ValueError(f"{job.place}: {error}") from None
    return jobs


__all__ = [
    "SegmentJob",
    "Segmenter",
    "find_in_file",
    "plan_segment_jobs",
    "segment_file",
    "segment_into_folder",
    "set_image_file",
]
