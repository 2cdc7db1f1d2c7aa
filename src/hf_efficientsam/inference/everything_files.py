"""Image files -> a COCO dataset of all masks in them: what `efficientsam everything` does, for one image or a folder.

An image's record, a JSON file with its masks and how they were found, is written last (see folder_runs.py); the
dataset is put together from the records. Masks and coordinates are those of the upright image. Wrong input is a
ValueError of one sentence.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from pycocotools import mask as coco_mask

from hf_efficientsam.model.image_processing_efficientsam import EfficientSamImageProcessor
from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel

from .drawing import lay_masks
from .folder_runs import FolderJob, JobSegmenter, check_not_of_another, check_results_folder, name_results
from .image_files import (
    ImageError,
    as_model_sees,
    check_folder,
    encode_image,
    find_images,
    pil_limit_lifted,
    read_image,
    upright_image,
    write_files,
)
from .mask_generation import THRESHOLDS, EfficientSamMaskGenerator
from .records import image_record
from .results import RleMasks, draw_label_map, largest_first

CATEGORY = {"id": 1, "name": "object", "supercategory": "object"}


@dataclass(frozen=True)
class EverythingSegmenter(JobSegmenter):
    """
    A mask generator and the options that hold for every image of a call.

    Attributes:
        generator: its `output_mode` is "coco_rle".
        given: arguments of the generator that the masks depend on; its thresholds may be None.
        crop_progress: show a bar over the crops of each image.
    """

    generator: EfficientSamMaskGenerator
    given: dict
    crop_progress: bool

    @property
    def options(self) -> dict:
        """`given`, with the thresholds that the generator took."""
        return self.given | {name: getattr(self.generator, name) for name in (*THRESHOLDS, "box_nms_thresh")}

    @property
    def model(self) -> EfficientSamModel:
        return self.generator.model

    @property
    def image_processor(self) -> EfficientSamImageProcessor:
        return self.generator.image_processor

    def __call__(self, path: Path) -> tuple[Image.Image, list[dict]]:
        """The upright image and its annotations in the order of the generator, as COCO has them but without ids."""
        image = read_image(path, self.max_pixels, upright_image)
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


@dataclass(frozen=True)
class EverythingJob(FolderJob):
    """
    One image and where its results go.

    Attributes:
        folder: of the images.
        name: of the image in the dataset, relative to that folder.
        result: name of its results, without an ending.
        output: folder for the results of all images.
        with_overlay: also draw the masks over the image.
    """

    folder: Path
    name: Path
    result: Path
    output: Path
    with_overlay: bool

    @property
    def record_file(self) -> Path:
        return self.output / "records" / self.result.with_name(f"{self.result.name}.json")

    @property
    def label_map(self) -> Path:
        return self.output / "labels" / self.result.with_name(f"{self.result.name}.png")

    @property
    def overlay(self) -> Path:
        return self.output / "overlays" / self.result.with_name(f"{self.result.name}.jpg")

    def result_files(self, segmenter: EverythingSegmenter | None = None) -> list[Path]:
        return [self.label_map, self.overlay] if self.with_overlay else [self.label_map]

    def is_answered_by(self, record: dict, segmenter: EverythingSegmenter) -> bool:
        return record["file_name"] == self.name.as_posix() and record["options"] == segmenter.options

    def compute(self, segmenter: EverythingSegmenter) -> tuple[dict, dict[Path, bytes]]:
        check_not_of_another(self.record_file, self.image)
        image, annotations = segmenter(self.image)
        size = image.size[::-1]
        origin = {"folder": str(self.folder.resolve()), "file_name": self.name.as_posix()}
        content = {**origin, "options": segmenter.options, "annotations": annotations}
        record = image_record(str(self.image), size, segmenter.name, **content)
        masks = RleMasks([one["segmentation"] for one in annotations], size)
        areas = [one["area"] for one in annotations]
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
        check_folder(output)
        folder, names = images.parent, [Path(images.name)]
    if not (output / "records").is_dir():
        for name in ("instances.json", "labels", "overlays"):
            if (output / name).exists():
                raise ValueError(
                    f"{output / name} is there already, but not from this command; choose another --output."
                )

    def job_of(i: int, result: Path) -> EverythingJob:
        return EverythingJob(folder / names[i], folder, names[i], result, output, with_overlay)

    def files(i: int, result: Path) -> list[Path]:
        job = job_of(i, result)
        return [*job.result_files(), job.record_file]

    jobs = [job_of(i, result) for i, result in enumerate(name_results(names, files))]
    for job in jobs:
        if job.image.resolve() in [file.resolve() for file in [*job.result_files(), job.record_file]]:
            raise ValueError(f"{job.image} would be overwritten by a result; choose another --output.")
    return jobs


def kept_records(jobs: list[EverythingJob], images: Path) -> list[dict]:
    """
    The records of images that earlier calls with the same output had and this one, of `images`, has not. An image that
    is gone from the folder of this call is left out.
    """
    names, kept = {job.name.as_posix() for job in jobs}, []
    for file in sorted((jobs[0].output / "records").rglob("*.json")):
        try:
            record = json.loads(file.read_bytes())
            name, here = record["file_name"], record["folder"] == str(images.resolve())
            if name not in names and not (here and images.is_dir() and not (images / name).is_file()):
                kept.append(record)
        except (OSError, ValueError, KeyError, TypeError):  # of another form, or not whole
            continue
    return kept


def write_dataset(records: list[dict], kept: list[dict], output: Path) -> None:
    """
    `instances.json` of images and annotations, both numbered from 1 in the order of the names.

    Args:
        records: of this call, whose model and options become the dataset's.
        kept: of earlier calls; images of another model or other options say so themselves.
    """
    images, annotations = [], []
    made = {key: (records or kept)[0][key] for key in ("model", "options")}
    for i, record in enumerate(sorted([*records, *kept], key=lambda record: record["file_name"]), start=1):
        image = {"id": i, "file_name": record["file_name"], "height": record["height"], "width": record["width"]}
        images.append(image | {key: record[key] for key, value in made.items() if record[key] != value})
        annotations += [
            {"id": len(annotations) + k, "image_id": i, **annotation}
            for k, annotation in enumerate(record["annotations"], start=1)
        ]
    info = {"description": "Found by `efficientsam everything`", **made}
    dataset = {"info": info, "images": images, "annotations": annotations, "categories": [CATEGORY]}
    write_files({output / "instances.json": json.dumps(dataset).encode()})


__all__ = [
    "EverythingJob",
    "EverythingSegmenter",
    "kept_records",
    "plan_everything_jobs",
    "write_dataset",
]
