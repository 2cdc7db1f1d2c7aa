"""Folders of YOLO's segmentation format and of labelme, read as what a COCO-style json holds (see coco_json.py).

An annotation without a mask has `segmentation` None, and `left_out` says what it is, if it is not a box.
"""

import base64
import io
import json
import math
import os.path
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from pycocotools import mask as rle_codec

from hf_efficientsam.inference.image_files import find_files

from .reading import IMAGE_SUFFIXES, Header, listed, logger, read_header, read_headers, refuse_shared

SETTINGS = ("data.yaml", "data.yml")
SLACK = 0.01  # of relative coordinates beyond the image's edge, as Ultralytics allows


def is_annotation_folder(path: Path) -> bool:
    """Whether this is no json: a folder, or the settings of a YOLO dataset."""
    return path.is_dir() or path.suffix.lower() in (".yaml", ".yml")


def read_folder(path: Path, images: str | Path | None, split: str, mask_frame: str | None) -> tuple[dict, Path]:
    """
    `images`, `annotations` and, where something names the classes, `categories` as COCO has them; and the folder that
    each `file_name` is relative to. An image whose annotations come without its size has `own_size`, too.

    Args:
        path: `data.yaml`, or the folder that has it; or a folder with `images` and `labels`; or one with labelme's
            files.
        images: a folder in which labelme's images are, if they are not where its files say.
        split: the part of `data.yaml` to read, train or val.
        mask_frame: the frame of annotations that come without a size, see `FrameConfig`.

    Raises:
        FileNotFoundError: for files that are not there.
        ValueError: for a folder of neither kind, and for files that are broken.
    """
    if path.is_file():
        settings = path
    elif path.is_dir():
        settings = next((path / name for name in SETTINGS if (path / name).is_file()), None)
    else:
        raise FileNotFoundError(f"There is no annotation file {path}; check the path.")
    if settings is None and not all((path / name).is_dir() for name in ("images", "labels")):
        return read_labelme(path, images, mask_frame), path if images is None else Path(images)
    if images is not None:
        raise ValueError(f"{path} is a YOLO dataset, which says itself where its images are; leave --images out.")
    folder = path if settings is None else settings.parent
    return read_yolo(folder, settings, split, mask_frame), folder


# ------------------------------------------------------------------------------------------ YOLO


def read_yolo(folder: Path, settings: Path | None, split: str, mask_frame: str | None) -> dict:
    """The images of a split, or all of them without settings; an image without a label file has no annotations."""
    places, names = ([str(folder / "images")], None) if settings is None else read_settings(settings, split)
    files = [os.path.abspath(file) for place in places for file in image_files(place)]
    refuse_shared(((file, file) for file in files), f"Images of {folder} are listed twice")
    shared = [(labels, file) for file in files if (labels := label_file(file)).is_file()]
    refuse_shared(shared, f"Images of {folder} have one file of labels")
    say_stray_labels(places, files, folder)
    headers = read_headers(files, str(folder))
    records, annotations = [], []
    for number, (file, header) in enumerate(zip(files, headers, strict=True), start=1):
        width, height = frame_size(header, mask_frame)
        names_file = {"id": number, "file_name": os.path.relpath(file, folder), "source": folder.name}
        records.append({**names_file, "width": width, "height": height, "own_size": True})
        for one in read_labels(label_file(file), width, height, names):
            annotations.append({"id": len(annotations) + 1, "image_id": number, **one})
    content = {"images": records, "annotations": annotations}
    if names is not None:
        content["categories"] = [{"id": number, "name": name} for number, name in names.items()]
    return content


def frame_size(header: Header, mask_frame: str | None) -> tuple[int, int]:
    """(width, height) of the frame that annotations without a size are in."""
    return header.stored_size if mask_frame == "stored" else header.size


def say_stray_labels(places: list[str], files: list[str], folder: Path) -> None:
    """Counts files of labels that belong to none of these images, for places that are folders."""
    found = {
        labels
        for place in filter(os.path.isdir, places)
        for labels in find_files(label_file(os.path.join(os.path.abspath(place), "x")).parent)
        if labels.suffix == ".txt" and labels.name != "classes.txt"
    }
    if strays := sorted(found - set(map(label_file, files))):
        logger.warning(
            "%s: %s files of labels are of no image and are left out: %s.", folder, len(strays), listed(strays)
        )


def read_settings(settings: Path, split: str) -> tuple[list[str], dict[int, str]]:
    """Of a data.yaml the folders or lists of images of a split, and the names of the classes."""
    try:
        content = yaml.safe_load(settings.read_text(encoding="utf-8"))
        names = content["names"] if isinstance(content["names"], dict) else dict(enumerate(content["names"]))
        names = {int(number): str(name) for number, name in names.items()}
        places = [content[split]] if isinstance(content[split], str) else list(content[split])
        base = settings.parent / (content.get("path") or "")
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{settings} is no data.yaml with `{split}` and `names` ({error!r}); repair it.") from error
    base = base if base.is_dir() else settings.parent  # the path of another computer
    found = []
    for place in places:
        # Roboflow writes ../train/images for what lies beside data.yaml, and Ultralytics reads it so.
        choices = [base / place, base / place.removeprefix("../")]
        found.append(next((str(one) for one in choices if one.exists()), None))
        if found[-1] is None:
            raise FileNotFoundError(f"{settings} names {choices[0]}, which is not there; correct its `{split}`.")
    return found, names


def image_files(place: str) -> list[str]:
    """The images of a folder and its subfolders, or those that a text file lists."""
    if os.path.isdir(place):
        if not (found := [str(path) for path in find_files(place) if path.suffix.lower() in IMAGE_SUFFIXES]):
            raise ValueError(f"There is no image ({', '.join(IMAGE_SUFFIXES)}) under {place}; check the folder.")
        return found
    lines = Path(place).read_text(encoding="utf-8").split("\n")
    return [os.path.join(os.path.dirname(place), line.strip()) for line in lines if line.strip()]


def label_file(image: str) -> Path:
    """Where Ultralytics looks for the labels of an image: in `labels` for the last `images` of its path."""
    before, found, after = image.rpartition(f"{os.sep}images{os.sep}")
    return Path(os.path.join(before, "labels", after) if found else image).with_suffix(".txt")


def read_labels(file: Path, width: int, height: int, names: dict[int, str] | None) -> list[dict]:
    """The objects of a label file; lines of five numbers are boxes. None without such a file."""
    objects = []
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            kind, *corners = map(float, line.split())
        except ValueError:
            kind, corners = math.nan, []
        is_shape = len(corners) == 4 or (len(corners) >= 6 and len(corners) % 2 == 0)
        if not is_shape or not all(-SLACK <= value <= 1 + SLACK for value in corners):
            raise ValueError(
                f"{file}, line {number}: must be a class and the corners x y of a polygon, from 0 to 1; repair it."
            )
        if not kind.is_integer() or kind < 0 or (names is not None and kind not in names):
            raise ValueError(f"{file}, line {number}: there is no class {line.split()[0]}; add it to data.yaml.")
        scaled = (np.reshape(corners, (-1, 2)) * [width, height]).ravel().tolist()
        objects.append({"category_id": int(kind), "segmentation": None if len(corners) == 4 else [scaled]})
    return objects


# ------------------------------------------------------------------------------------------ labelme


def read_labelme(folder: Path, images: str | Path | None, mask_frame: str | None) -> dict:
    """The images of labelme's files in a folder and its subfolders; shapes of one label and group are one object."""
    files = [file for file in find_files(folder) if file.suffix == ".json"]
    contents = {file: content for file in files if (content := read_labelme_file(file)) is not None}
    if not contents:
        raise ValueError(
            f"{folder} needs the folders images/ and masks/, or images/ and labels/, or a data.yaml, or json files of "
            "labelme; or give a COCO-style json file."
        )
    if others := [file for file in files if file not in contents]:
        logger.warning("%s: not labelme's, and left out: %s.", folder, listed(others))
    records, annotations = [], []
    place = folder if images is None else Path(images)
    found = {file: find_image(file, content["imagePath"], place) for file, content in contents.items()}
    refuse_shared(((image.resolve(), file) for file, image in found.items()), f"Files under {folder} are of one image")
    for number, (file, content) in enumerate(contents.items(), start=1):
        image = found[file]
        try:
            width, height, own_size = content.get("imageWidth"), content.get("imageHeight"), {}
            if not (isinstance(width, int) and isinstance(height, int)):
                width, height = frame_size(read_header(str(image)), mask_frame)
                own_size = {"own_size": True}
            objects = read_shapes(content["shapes"], width, height)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
            raise ValueError(f"{file} cannot be read ({error!r}); repair or remove it.") from error
        name = os.path.relpath(image, folder if images is None else images)
        names_file = {"id": number, "file_name": name, "source": folder.name}
        records.append({**names_file, "width": width, "height": height, **own_size})
        annotations += [{"image_id": number, **one} for one in objects]
    numbers = {label: k for k, label in enumerate(sorted({one["label"] for one in annotations}), start=1)}
    for number, one in enumerate(annotations, start=1):
        one |= {"id": number, "category_id": numbers[one.pop("label")]}
    categories = [{"id": number, "name": label} for label, number in numbers.items()]
    return {"images": records, "annotations": annotations, "categories": categories}


def read_labelme_file(file: Path) -> dict | None:
    """What labelme wrote into a json file; None if it is another's."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid json ({error}); repair or remove it.") from error
    is_own = isinstance(content, dict) and isinstance(content.get("shapes"), list)
    return content if is_own and isinstance(content.get("imagePath"), str) else None


def find_image(file: Path, name: str, folder: Path) -> Path:
    """The image of a labelme file: where that says, or else of the same name beside it or in the folder of images."""
    name = name.replace("\\", "/")
    choices = [file.parent / name, file.parent / Path(name).name, folder / Path(name).name]
    choices += [file.with_suffix(suffix) for suffix in IMAGE_SUFFIXES]
    return next((choice for choice in choices if choice.is_file()), choices[0])


def read_shapes(shapes: list[dict], width: int, height: int) -> list[dict]:
    """The objects of an image, each with `label`."""
    groups, objects = defaultdict(list), []
    for number, shape in enumerate(shapes):
        label, kind = str(shape["label"]), shape.get("shape_type") or "polygon"
        if kind in MASKS:
            group = shape.get("group_id")
            groups[label, number if group is None else ("group", group)].append(MASKS[kind](shape, width, height))
        elif kind == "rectangle":
            objects.append({"label": label, "segmentation": None})
        else:
            objects.append({"label": label, "segmentation": None, "left_out": f"shapes of the type {kind}"})
    for (label, _), parts in groups.items():
        if any(isinstance(part, dict) for part in parts):
            whole = [one if isinstance(one, dict) else rle_codec.frPyObjects([one], height, width)[0] for one in parts]
        else:
            whole = parts
        objects.append({"label": label, "segmentation": whole})
    return objects


def polygon_of(shape: dict, width: int, height: int) -> list[float]:
    return [float(number) for x, y in shape["points"] for number in (x, y)]


def circle_of(shape: dict, width: int, height: int) -> list[float]:
    """A polygon of 64 corners around the first point, through the second."""
    (x, y), edge = shape["points"]
    radius = math.dist((x, y), edge)
    angles = [math.tau * k / 64 for k in range(64)]
    return [number for angle in angles for number in (x + radius * math.cos(angle), y + radius * math.sin(angle))]


def mask_of(shape: dict, width: int, height: int) -> dict[str, Any]:
    """RLE of a mask that is stored as a PNG of its box, whose first point is the pixel at the top left."""
    left, top = (round(number) for number in shape["points"][0])
    with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as opened:
        pixels = np.asarray(opened.convert("L")) > 0
    whole = np.zeros((height, width), np.uint8, order="F")
    if left < 0 or top < 0:
        raise ValueError("a mask lies outside the image")
    place = whole[top : top + pixels.shape[0], left : left + pixels.shape[1]]
    place[:] = pixels[: place.shape[0], : place.shape[1]]
    return rle_codec.encode(whole)


MASKS = {"polygon": polygon_of, "circle": circle_of, "mask": mask_of}
