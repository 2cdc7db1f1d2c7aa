"""Image files -> a COCO dataset of all masks in them: what `efficientsam everything` does, for one image or a folder.

An image's record, a JSON file with its masks and how they were found, is written last (see folder_runs.py); the
dataset is put together from the records. Masks and coordinates are those of the upright image. Wrong input is a
ValueError of one sentence.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from .drawing import lay_masks
from .folder_runs import FolderJob, check_results_folder, find_shared_file
from .image_files import (
    ImageError,
    as_model_sees,
    encode_image,
    find_images,
    pil_limit_lifted,
    read_image,
    write_files,
)
from .loading import find_checkpoint, load_model
from .mask_generation import THRESHOLDS, EfficientSamMaskGenerator
from .records import image_record
from .results import draw_label_map, largest_first

CATEGORY = {"id": 1, "name": "object", "supercategory": "object"}


@dataclass(frozen=True)
class EverythingSegmenter:
    """
    A mask generator and the options that hold for every image of a call.

    Attributes:
        name: of the checkpoint.
        generator: its `output_mode` is "coco_rle".
        options: arguments of the generator that the masks depend on, its thresholds among them.
        max_pixels: larger images are refused.
        crop_progress: show a bar over the crops of each image.
    """

    name: str
    generator: EfficientSamMaskGenerator
    options: dict
    max_pixels: int
    crop_progress: bool

    @classmethod
    def load(
        cls, name: str | None, options: dict, points_per_batch: int, max_pixels: int, crop_progress: bool
    ) -> "EverythingSegmenter":
        """From a checkpoint's name as `find_checkpoint` takes it."""
        name = find_checkpoint(name)
        model, processor = load_model(name)
        processor.image_processor.max_image_pixels = max_pixels
        generator = EfficientSamMaskGenerator(
            model, processor, points_per_batch=points_per_batch, output_mode="coco_rle", **options
        )
        options = options | {threshold: getattr(generator, threshold) for threshold in THRESHOLDS}
        return cls(name, generator, options, max_pixels, crop_progress)

    def __call__(self, path: Path) -> tuple[Image.Image, list[dict]]:
        """The upright image and its annotations in the order of the generator, as COCO has them but without ids."""
        image = read_image(path, self.max_pixels, ImageOps.exif_transpose)
        try:
            found = self.generator.generate(image, progress=self.crop_progress)
        except ValueError as error:  # the options are checked, so these are pixels without sense
            raise ImageError(f"{path}: {error}") from None
        return image, [annotation_of(mask) for mask in found]


def annotation_of(mask: dict) -> dict:
    """A mask of the generator as a COCO annotation without ids."""
    return {
        "category_id": CATEGORY["id"],
        "segmentation": mask["segmentation"],
        "area": mask["area"],
        "bbox": coco_mask.toBbox(mask["segmentation"]).tolist(),  # the generator's is a pixel smaller
        "iscrowd": 0,
        "predicted_iou": mask["predicted_iou"],
        "stability_score": mask["stability_score"],
        "point_coords": mask["point_coords"],
    }


class DecodedMasks(Sequence):
    """The masks of annotations, bool `[height, width]`, each decoded when asked for: all at once are too many."""

    def __init__(self, annotations: list[dict]):
        self.annotations = annotations

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> np.ndarray:
        return coco_mask.decode(self.annotations[index]["segmentation"]).astype(bool)


@dataclass(frozen=True)
class EverythingJob(FolderJob):
    """
    One image and where its results go.

    Attributes:
        name: of the image in the dataset, relative to the folder of images.
        output: folder for the results of all images.
        with_overlay: also draw the masks over the image.
    """

    name: Path
    output: Path
    with_overlay: bool

    @property
    def record_file(self) -> Path:
        return self.output / "records" / self.name.with_suffix(".json")

    @property
    def label_map(self) -> Path:
        return self.output / "labels" / self.name.with_suffix(".png")

    @property
    def overlay(self) -> Path:
        return self.output / "overlays" / self.name.with_suffix(".jpg")

    def result_files(self, segmenter: EverythingSegmenter | None = None) -> list[Path]:
        return [self.label_map, self.overlay] if self.with_overlay else [self.label_map]

    def is_answered_by(self, record: dict, segmenter: EverythingSegmenter) -> bool:
        return record["image"] == self.name.as_posix() and record["options"] == segmenter.options

    def compute(self, segmenter: EverythingSegmenter) -> tuple[dict, dict[Path, bytes]]:
        image, annotations = segmenter(self.image)
        size = image.size[::-1]
        content = {"options": segmenter.options, "annotations": annotations}
        record = image_record(self.name.as_posix(), size, segmenter.name, **content)
        masks, areas = DecodedMasks(annotations), [one["area"] for one in annotations]
        files = {self.label_map: encode_image(draw_label_map(masks, areas, size), self.label_map)}
        if self.with_overlay:
            with pil_limit_lifted():
                seen = as_model_sees(image, segmenter.generator.image_processor)
                overlay = lay_masks(seen, (masks[i] for i in largest_first(areas)))
            files[self.overlay] = encode_image(overlay, self.overlay)
        return record, files


def plan_everything_jobs(images: Path, output: Path, with_overlay: bool) -> list[EverythingJob]:
    """
    The job of each image, after all checks that can be made before the first one starts.

    Args:
        images: an image, or a folder of them and of subfolders.
        output: folder for the results; if it lies in `images`, what is in it is no input.
    """
    if not images.exists():
        raise ValueError(f"{images}: no such file.")
    if images.is_dir():
        check_results_folder(output, images)
        folder, names = images, find_images(images, [output])
        if not names:
            raise ValueError(f"{images} holds no images.")
    else:
        if output.is_file():
            raise ValueError(f"{output} must be a folder for results, but is a file.")
        folder, names = images.parent, [Path(images.name)]
    if not (output / "records").is_dir():
        for name in ("instances.json", "labels", "overlays"):
            if (output / name).exists():
                raise ValueError(
                    f"{output / name} is there already, but not from this command; choose another --output."
                )
    jobs = [EverythingJob(folder / name, name, output, with_overlay) for name in names]
    if shared := find_shared_file(jobs, None):
        owner, job, file = shared
        raise ValueError(f"{owner.image} and {job.image} would both be written to {file}; rename one.")
    for job in jobs:
        if job.image.resolve() in [file.resolve() for file in [*job.result_files(), job.record_file]]:
            raise ValueError(f"{job.image} would be overwritten by a result; choose another --output.")
    return jobs


def write_dataset(records: list[dict], output: Path) -> None:
    """`instances.json` of images and annotations, both numbered from 1 in the order of the records."""
    images, annotations = [], []
    for i, record in enumerate(records, start=1):
        images.append({"id": i, "file_name": record["image"], "height": record["height"], "width": record["width"]})
        annotations += [
            {"id": len(annotations) + k, "image_id": i, **annotation}
            for k, annotation in enumerate(record["annotations"], start=1)
        ]
    info = {"description": "Found by `efficientsam everything`", "model": records[0]["model"]}
    info |= {"options": records[0]["options"]}
    dataset = {"info": info, "images": images, "annotations": annotations, "categories": [CATEGORY]}
    write_files({output / "instances.json": json.dumps(dataset).encode()})


__all__ = ["DecodedMasks", "EverythingJob", "EverythingSegmenter", "plan_everything_jobs", "write_dataset"]
