"""Prompts from a file or an option -> the objects of an image, by the rules in the help of `efficientsam segment`.

An object is a dict with its `points` [[x, y], ...], their `labels` (1 on the object, 0 on the background) and its
`box` [x1, y1, x2, y2] or `None`, in pixels of the upright image. Wrong input is a ValueError of one sentence.
"""

import json
import re
from pathlib import Path

from .image_files import find_images

PROMPTS = {"points": "points", "labels": "labels", "boxes": "box"}  # argument of the predictor -> key of an object


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
    return entry["image"], *read_prompts(entry)


def read_prompts(entry: dict) -> tuple[list, list, list]:
    """
    The `points`, `labels` and `boxes` of a JSON object, each of which may be missing: without labels every point is
    on the object.

    Raises:
        ValueError: values that are no points, labels or boxes.
    """
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
    return points, labels, boxes


def group_prompts(points: list, labels: list, boxes: list, separate_points: bool) -> list[dict]:
    """Which points and boxes of an image belong to which object."""
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


def check_objects(objects: list[dict], size: tuple[int, int], model, processor) -> None:
    """
    Args:
        objects: as `group_prompts` returns them.
        size: width and height of the upright image.
        model, processor: an [`EfficientSamModel`] and its [`EfficientSamProcessor`].

    Raises:
        ValueError: if the prompts do not fit the image or the model.
    """
    has_background = any(0 in one["labels"] for one in objects)
    if has_background and not model.config.prompt_encoder_config.background_points:
        raise ValueError("this model takes no background points; leave them out, or use one that does (--model).")
    try:
        processor(
            original_sizes=[size[::-1]],
            **{f"input_{name}": [[one[key] for one in objects]] for name, key in PROMPTS.items()},
        )
    except ValueError as error:  # the processor numbers images and prompts, which says nothing here
        raise ValueError(re.sub(r"^Image \d+, prompt \d+: ", "", str(error))) from None


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


__all__ = ["check_images_listed", "check_objects", "group_prompts", "read_prompts", "read_prompts_file"]
