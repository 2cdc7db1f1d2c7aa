"""Records of images as a dataset in a folder that an annotation tool or trainer opens as it is.

A dataset is made from the records that lie in a folder of results (see records.py), so it has the images of earlier
calls too, and a run that was stopped makes it whole when it is started again. The file by which a tool opens it is
removed first and written last.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from .formats.annotation_files import coco_annotations, label_studio_task, labelme_file, yolo_file
from .formats.polygons import EDITABLE_TOLERANCE, polygons_of_mask
from .image_files import write_files
from .records import recorded_file
from .results import RleMasks

UNNAMED = "object"


@dataclass(frozen=True)
class RecordedImage:
    """
    N objects of an image, of each its best mask.

    Attributes:
        file: the image.
        name: of its results, relative to their folder and without an ending; different for each image.
        width, height: of the upright image.
        labels, rles, scores, iou_scores: N of each, see [`SegmentationResult`].
    """

    file: Path
    name: Path
    width: int
    height: int
    labels: list[str]
    rles: list[dict]
    scores: list[float]
    iou_scores: list[float]

    @classmethod
    def of_record(cls, record: dict, name: Path) -> "RecordedImage":
        """From a record of `segment`, `salient`, `text` or `everything`; other content raises nearly anything."""
        if "annotations" in record:
            found = [{"score": one["predicted_iou"], **one} for one in record["annotations"]]
        else:
            found = [one | one["masks"][0] if "masks" in one else one for one in record["objects"]]
        scores = [one["score"] for one in found]
        ious = [one.get("iou", one["score"]) for one in found]
        labels, rles = [one.get("label", UNNAMED) for one in found], [one["segmentation"] for one in found]
        return cls(recorded_file(record), name, record["width"], record["height"], labels, rles, scores, ious)

    @property
    def relative_file(self) -> Path:
        """The image relative to the folder of images, whose subfolders the results have as well."""
        return Path(*self.file.parts[-len(self.name.parts) :])

    def polygons(self) -> list[list[np.ndarray]]:
        """Of each object its parts, `[n, 2]` in pixels; masks are decoded one at a time."""
        masks = RleMasks(self.rles, (self.height, self.width))
        return [polygons_of_mask(mask, EDITABLE_TOLERANCE) for mask in masks]


class RecordedImages:
    """
    The images of the records in a folder and its subfolders, in the order of their names; read anew at each iteration.

    Attributes:
        categories: the different labels, sorted.
        gone: images that have a record and are not there any more; they are left out.
    """

    def __init__(self, folder: Path):
        self.folder, self.gone, labels = folder, [], set()
        for image in self._read():
            if image.file.is_file():
                labels |= set(image.labels)
            else:
                self.gone.append(image.file)
        self.categories = sorted(labels)

    def __iter__(self) -> Iterator[RecordedImage]:
        return (image for image in self._read() if image.file.is_file())

    def _read(self) -> Iterator[RecordedImage]:
        for file in sorted(self.folder.rglob("*.json")):
            try:
                record = json.loads(file.read_bytes())
                yield RecordedImage.of_record(record, file.relative_to(self.folder).with_suffix(""))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):  # no record, or not whole
                continue


def write_coco(images: RecordedImages, output: Path) -> None:
    """`instances.json`; its `file_name` is relative to the folder of images."""
    numbers = {label: number for number, label in enumerate(images.categories, start=1)}
    entries, annotations = [], []
    for number, image in enumerate(images, start=1):
        size = {"height": image.height, "width": image.width}
        entries.append({"id": number, "file_name": image.relative_file.as_posix(), **size})
        categories = [numbers[label] for label in image.labels]
        found = coco_annotations(image.rles, categories, image.scores, image.iou_scores)
        first = len(annotations) + 1
        annotations += [{"id": k, "image_id": number, **one} for k, one in enumerate(found, start=first)]
    categories = [{"id": number, "name": label} for label, number in numbers.items()]
    dataset = {"images": entries, "annotations": annotations, "categories": categories}
    write_files({output / "instances.json": json.dumps(dataset).encode()})


def write_yolo(images: RecordedImages, output: Path) -> None:
    """`data.yaml`, `classes.txt`, and for each image a copy in `images` and its label file in `labels`."""
    (output / "data.yaml").unlink(missing_ok=True)
    numbers = {label: number for number, label in enumerate(images.categories)}
    written = set()
    for image in images:
        copy = output / "images" / image.name.with_name(image.name.name + image.file.suffix)
        labels = output / "labels" / image.name.with_name(image.name.name + ".txt")
        classes = [numbers[label] for label in image.labels]
        files = {labels: yolo_file(image.polygons(), classes, image.width, image.height).encode()}
        content = image.file.read_bytes()
        if not copy.is_file() or copy.read_bytes() != content:
            files[copy] = content
        write_files(files)
        written |= {copy, labels}
    for file in [*(output / "images").rglob("*"), *(output / "labels").rglob("*.txt")]:
        if file.is_file() and file not in written:  # of an image that is gone, with numbers of other classes
            file.unlink()
    settings = "# All images are in both parts; divide them before you train.\ntrain: images\nval: images\n"
    settings += f"names: {json.dumps(images.categories)}\n"  # a list in json is one in yaml
    classes = "".join(f"{label}\n" for label in images.categories)
    write_files({output / "classes.txt": classes.encode(), output / "data.yaml": settings.encode()})


def write_labelme(images: RecordedImages, output: Path) -> None:
    """A json file for each image, with the image's path relative to it."""
    for image in images:
        file = output / image.name.with_name(image.name.name + ".json")
        path = Path(os.path.relpath(image.file.resolve(), file.parent.resolve())).as_posix()
        content = labelme_file(image.polygons(), image.labels, path, image.width, image.height)
        write_files({file: json.dumps(content).encode()})


def write_label_studio(images: RecordedImages, output: Path) -> None:
    """`tasks.json` to import, and `label_config.xml`, the labelling interface that the tasks are for."""
    tasks = []
    for image in images:
        # A local storage of Label Studio is a folder below the one that it serves files from.
        path = Path(image.file.absolute().parents[len(image.name.parts) - 1].name, image.relative_file).as_posix()
        found = (
            image.labels,
            image.scores,
            f"/data/local-files/?d={quote(os.fsencode(path))}",
            image.width,
            image.height,
        )
        tasks.append(json.dumps(label_studio_task(image.polygons(), *found)))
    labels = "".join(f"    <Label value={quoteattr(label)}/>\n" for label in images.categories)
    config = (
        '<View>\n  <Image name="image" value="$image"/>\n'
        f'  <PolygonLabels name="label" toName="image">\n{labels}  </PolygonLabels>\n</View>\n'
    )
    content = f"[{', '.join(tasks)}]"
    write_files({output / "label_config.xml": config.encode(), output / "tasks.json": content.encode()})


WRITERS = {"coco": write_coco, "yolo": write_yolo, "labelme": write_labelme, "label-studio": write_label_studio}


def write_datasets(formats: list[str], records: Path, output: Path) -> list[Path]:
    """
    Writes `OUTPUT/FORMAT` of the images whose records are in a folder.

    Args:
        formats: keys of `WRITERS`.
        records: the folder, with subfolders.
        output: folder of the datasets.

    Returns:
        images that have a record and are left out, because they are not there any more.
    """
    images = RecordedImages(records)
    for name in formats:
        WRITERS[name](images, output / name)
    return images.gone


__all__ = ["WRITERS", "write_datasets"]
