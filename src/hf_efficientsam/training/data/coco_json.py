"""COCO-style json as annotation tools write it: read, its ids made alike, and refused where it is ambiguous."""

import json
import os.path
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import Any

from .reading import listed

CROWDS = ("auto", "skip", "keep")


def read_json(path: Path) -> dict:
    """
    What a COCO-style json holds. Sizes are numbers, `image_id` and `category_id` are as the images and categories have
    their ids (a tool may write 12 here and "12" there), and names of files use slashes.

    Raises:
        FileNotFoundError: without the file.
        ValueError: if it is broken, lacks what is needed of its images, names images outside their folder, has an id
            or the name of an image twice, or annotations of images that it does not list.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no annotation file {path}; check the path.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid json ({error}); download or export it again.") from error
    lists = [content.get(key) for key in ("images", "annotations")] if isinstance(content, dict) else [None]
    if not all(isinstance(entries, list) and all(isinstance(one, dict) for one in entries) for entries in lists):
        raise ValueError(f"{path} is not COCO-style: it needs the lists `images` and `annotations` of objects.")
    for record in content["images"]:
        _check_image(record, path)
    images, annotations = content["images"], content["annotations"]
    _refuse_twice("image id", (_plain_id(record["id"]) for record in images), path)
    _refuse_twice("image", (os.path.normpath(file_names(record)[0].replace("\\", "/")) for record in images), path)
    _refuse_twice("annotation id", (_plain_id(one["id"]) for one in annotations if _is_id(one.get("id"))), path)
    _match_ids(annotations, "image_id", images)
    _match_ids(annotations, "category_id", content.get("categories"))
    known = {record["id"] for record in images}
    strays = [one for one in annotations if not _is_id(one.get("image_id")) or one["image_id"] not in known]
    if strays:
        names = listed(one.get("id") for one in strays)
        raise ValueError(
            f"annotation {names} of {path} belongs to an image that it does not list "
            f"({listed(dict.fromkeys(str(one.get('image_id')) for one in strays))}); remove it or add the image."
        )
    return content


def file_names(record: dict) -> list[str]:
    """Where an image may be in the folder of images, the likeliest first."""
    if isinstance(record.get("file_name"), str):
        names = [record["file_name"]]
    else:
        # Some images of LVIS's val split lie in COCO's train2017.
        parts = record["coco_url"].split("/")
        names = ["/".join(parts[-2:]), parts[-1]]
    return [*names, *(name.replace("\\", "/") for name in names if "\\" in name)]  # written under Windows


def mark_crowds(annotations: list[dict], path: Path, crowds: str) -> int:
    """
    Makes `iscrowd` of annotations 0 or 1, the 1 for a region of many objects, as in COCO.

    CVAT and others of its kind write 1 for every mask that was drawn with a brush or by a model, because it is stored
    as RLE. COCO itself marks at most one region of an image and category, and few in all. So in a file that marks two
    RLE masks of one kind in an image, or half of its annotations, or some with Datumaro's `attributes`, the 1 of RLE
    masks means nothing.

    Args:
        annotations: of one file, changed in place.
        path: the file, for messages.
        crowds: "skip" trusts the marks, "keep" takes all for masks, "auto" decides by the above.

    Returns:
        how many marks were taken away.

    Raises:
        ValueError: for an `iscrowd` that means neither.
    """
    for annotation in annotations:
        value = str(annotation.get("iscrowd") or 0).lower()
        if value not in ("0", "0.0", "false", "1", "1.0", "true"):
            raise ValueError(
                f"annotation {annotation.get('id')} of {path} has the iscrowd {value[:20]}; it must be 0 or 1."
            )
        annotation["iscrowd"] = int(value in ("1", "1.0", "true"))
    marked = [one for one in annotations if one["iscrowd"]]
    as_rle = [one for one in marked if isinstance(one.get("segmentation"), dict)]
    kinds = Counter((one["image_id"], str(one.get("category_id"))) for one in as_rle)
    means_nothing = (
        len(as_rle) == len(annotations)
        or len(as_rle) >= max(2, len(annotations) / 2)
        or max(kinds.values(), default=0) > 1
        or any("attributes" in one for one in as_rle)
    )
    marked = marked if crowds == "keep" else as_rle
    if crowds == "skip" or (crowds == "auto" and not means_nothing):
        return 0
    for annotation in marked:
        annotation["iscrowd"] = 0
    return len(marked)


def find_folder(annotations: Path, records: Iterable[dict]) -> Path:
    """
    The folder of a json's images where none is given: the first in which one of them is. Tools put them into `images`
    or `data` beside the json, beside it as they are (Roboflow, labelme), or beside the json's own folder, into
    `images` or one that is named as the part after `instances_` (COCO, CVAT). `images` if there is none.
    """
    here, above = annotations.parent, annotations.absolute().parent.parent
    part = annotations.stem.removeprefix("instances_")
    folders = [here / "images", here, here / "data", above / "images", above / part, above / "images" / part]
    names = [name for record in records for name in file_names(record)]
    return next((one for one in folders if any(os.path.isfile(os.path.join(one, name)) for name in names)), folders[0])


def _check_image(record: dict, path: Path) -> None:
    missing = set() if _is_id(record.get("id")) else {"id"}
    for side in ("width", "height"):
        number = _plain_id(record.get(side))
        if isinstance(number, int) and not isinstance(number, bool):
            record[side] = number
        else:
            missing.add(side)
    if not any(isinstance(record.get(key), str) for key in ("file_name", "coco_url")):
        missing.add("file_name")
    if missing:
        names = ", ".join(sorted(missing))
        raise ValueError(f"{path} has an image without {names}; add it, or remove the image: {record}.")
    for name in file_names(record):
        is_absolute = Path(name).anchor or ("\\" in name and PureWindowsPath(name).anchor)
        if is_absolute or ".." in Path(os.path.normpath(name)).parts:
            raise ValueError(f"{path} names the image {name}, outside the folder of images; make it relative to that.")


def _is_id(value: Any) -> bool:
    return isinstance(value, int | float | str)


def _plain_id(value: Any) -> Any:
    """A whole number for 12, 12.0, "12" and "012"; anything else as it is."""
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refuse_twice(what: str, values: Iterable[Any], path: Path) -> None:
    if twice := [value for value, number in Counter(values).items() if number > 1]:
        raise ValueError(
            f"{path} has the {what} {listed(twice)} more than once, as where exports that each count from 1 are put "
            "together; number them anew, or give the files one by one."
        )


def _match_ids(annotations: list[dict], key: str, entries: Any) -> None:
    """Writes the ids of annotations as the entries that they name have them."""
    entries = entries if isinstance(entries, list) else []
    ids = [one["id"] for one in entries if isinstance(one, dict) and _is_id(one.get("id"))]
    own = {_plain_id(one): one for one in ids}
    for annotation in annotations:
        if _is_id(annotation.get(key)):
            annotation[key] = own.get(_plain_id(annotation[key]), annotation[key])
