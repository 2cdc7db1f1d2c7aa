"""Masks from COCO-style json, kept as run-length code (RLE) until someone asks for the pixels."""

import json
import os.path
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle_codec
from torch.utils.data import Dataset

from .reading import decode_image
from .shards import hash_lines


@dataclass(frozen=True)
class Sample:
    """One image with its masks.

    `image` is RGB and upright; `rles` are compressed COCO RLEs at the image's size, one for each of `annotation_ids`.
    """

    image: Image.Image
    rles: list[dict]
    image_id: int
    annotation_ids: list[int]
    source: str


class CocoMasks(Dataset):
    """The images of a COCO- or LVIS-style json that have masks; `dataset[i]` is a `Sample`.

    Segmentations may be polygons or RLE, compressed or not. Where images have only a `coco_url`, as in LVIS, its last
    folder and name (train2017/000000391895.jpg) are looked for, then the name alone.

    All masks are read at the start, some two minutes for a million of them, and kept as compressed RLE, which takes a
    third of the memory of their polygons. `categories` are the json's, `category_ids[i]` those of `dataset[i].rles`;
    both are None where the json leaves them out.

    Args:
        annotations: the json file.
        images: the folder that `file_name` is relative to; by default `images` beside the json.
        skip_crowd: leave out annotations with `iscrowd`.
        min_area: leave out masks of fewer pixels, counted in the mask itself (the json's `area` is not read).

    Raises FileNotFoundError for a json or image that is not there, and ValueError for a json that is broken, that
    names files outside the folder of images or whose sizes do not fit them. The pixels of an image are first looked at
    when it is read.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path | None = None,
        skip_crowd: bool = True,
        min_area: int = 1,
    ):
        self.annotations = Path(annotations)
        self.images = Path(images) if images is not None else self.annotations.parent / "images"
        content = read_json(self.annotations)
        records = {record["id"]: record for record in content["images"]}

        rles, ids, categories = defaultdict(list), defaultdict(list), defaultdict(list)
        for number, annotation in enumerate(content["annotations"]):
            if skip_crowd and annotation.get("iscrowd", 0):
                continue
            try:
                record = records[annotation["image_id"]]
                rle = to_rle(annotation["segmentation"], record["height"], record["width"])
            except Exception as error:  # damaged masks make pycocotools raise nearly anything
                name = f"annotation {annotation.get('id')} of {self.annotations}"
                raise ValueError(f"{name} cannot be read ({error!r}); repair or remove it.") from error
            if rle is not None and rle_codec.area(rle) >= min_area:
                rles[record["id"]].append(rle)
                ids[record["id"]].append(annotation.get("id", number))
                categories[record["id"]].append(annotation.get("category_id"))

        self.categories = content.get("categories")
        self.records = [record for record in content["images"] if record["id"] in rles]
        self.rles = [rles[record["id"]] for record in self.records]
        self.annotation_ids = [ids[record["id"]] for record in self.records]
        self.category_ids = [categories[record["id"]] for record in self.records]
        self.files = [self._find(record) for record in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        path = self.files[index]
        image = decode_image(path, path)
        if image.size != (record["width"], record["height"]):
            raise ValueError(
                f"{path} is {image.width} x {image.height} pixels when upright, but {self.annotations} says "
                f"{record['width']} x {record['height']}; the masks belong to another version of the image."
            )
        source = record.get("source", self.annotations.parent.name)
        return Sample(image, self.rles[index], record["id"], self.annotation_ids[index], source)

    def fingerprint(self) -> str:
        """Changes with the name or the size in bytes of any image, and with any mask."""
        lines = (f"{path} {os.path.getsize(path)} {rles}" for path, rles in zip(self.files, self.rles, strict=True))
        return hash_lines(line.removeprefix(str(self.images)) for line in lines)

    def _find(self, record: dict) -> str:
        names = _file_names(record)
        for path in (os.path.join(self.images, name) for name in names):
            if os.path.isfile(path):
                return path
        raise FileNotFoundError(
            f"{self.annotations} lists {' or '.join(names)}, which is not in {self.images}; "
            "give the folder of the images (`--images`)."
        )


def with_folders(annotations: list[str], images: list[str], option: str) -> list[tuple[str, str | None]]:
    """Each json with its folder of images: one for all, one for each, or None for `images` beside it."""
    if len(images) > 1 and len(images) != len(annotations):
        raise ValueError(f"Give --images one folder, or one for each of the {len(annotations)} files of {option}.")
    folders = images or [None]
    return list(zip(annotations, folders * len(annotations) if len(folders) == 1 else folders, strict=True))


def decode_rles(rles: list[dict]) -> np.ndarray:
    """RLEs of one image -> uint8 [N,H,W] of 0 and 1 (a view whose memory is column by column, as RLE is)."""
    if not rles:
        raise ValueError("There is no mask to decode; pass at least one RLE.")
    return rle_codec.decode(rles).transpose(2, 0, 1)


def read_json(path: Path) -> dict:
    """What a COCO-style json holds, once its images have what is needed of them; see `CocoMasks` for errors."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no annotation file {path}.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid json ({error}); download or export it again.") from error
    lists = [content.get(key) for key in ("images", "annotations")] if isinstance(content, dict) else [None]
    if not all(isinstance(entries, list) and all(isinstance(one, dict) for one in entries) for entries in lists):
        raise ValueError(f"{path} is not COCO-style: it needs the lists `images` and `annotations` of objects.")
    for record in content["images"]:
        missing = {key for key in ("id", "width", "height") if not isinstance(record.get(key), int | float | str)}
        if not any(isinstance(record.get(key), str) for key in ("file_name", "coco_url")):
            missing.add("file_name")
        if missing:
            raise ValueError(f"{path} has an image without {', '.join(sorted(missing))}: {record}.")
        for name in _file_names(record):
            if Path(name).anchor or ".." in Path(os.path.normpath(name)).parts:
                raise ValueError(
                    f"{path} names the image {name}, outside the folder of images; make it relative to that."
                )
    return content


def _file_names(record: dict) -> list[str]:
    """Where an image may be in the folder of images, the likeliest first."""
    if isinstance(record.get("file_name"), str):
        return [record["file_name"]]
    # Some images of LVIS's val split lie in COCO's train2017.
    parts = record["coco_url"].split("/")
    return ["/".join(parts[-2:]), parts[-1]]


def to_rle(segmentation: list | dict, height: int, width: int) -> dict | None:
    """Any COCO segmentation -> compressed RLE, None where nothing is drawn.

    A damaged one raises ValueError, or whatever else pycocotools thinks of it: catch Exception.
    """
    if isinstance(segmentation, list):
        # Fewer than three corners enclose nothing, and pycocotools would take four numbers for a box.
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        # pycocotools asks for endless memory where a corner is far away or, as some exports have it, NaN.
        limit = max(height, width)
        if not all(-limit <= number <= 2 * limit for polygon in polygons for number in polygon):
            raise ValueError("a corner of a polygon is far outside the image, or no number")
        return rle_codec.merge(rle_codec.frPyObjects(polygons, height, width)) if polygons else None
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"mask size {segmentation['size']} is not the image's [height, width] {[height, width]}")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        counts = rle_codec.frPyObjects(segmentation, height, width)["counts"]
    elif isinstance(counts, str):
        counts = counts.encode()
    # Over run lengths that do not fill the image pycocotools reads stray memory or never ends.
    lengths = _run_lengths(counts)
    if (lengths < 0).any() or lengths.sum() != height * width:
        raise ValueError(f"counts add up to {lengths.sum()} pixels of {height * width}")
    return {"size": [height, width], "counts": counts}


def _run_lengths(counts: bytes) -> np.ndarray:
    """The run lengths int64 of a compressed COCO RLE.

    Each is written in bytes from 48 on with five bits apiece, the lowest first, and a sixth that is set where another
    byte follows. Signed, because from the fourth on it is the difference to the length before the last.
    """
    codes = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    last = codes & 32 == 0
    ends = np.flatnonzero(last) + 1
    starts = np.append(0, ends[:-1])
    widths = ends - starts
    # Seven bytes hold 35 bits, and image sizes have at most 32.
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or not last[-1] or widths.max() > 7:
        raise ValueError("its counts are damaged")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, widths))
    lengths = np.add.reduceat((codes & 31) << shifts, starts)
    lengths -= (codes[last] >> 4 & 1) << 5 * widths
    lengths[1::2] = lengths[1::2].cumsum()
    lengths[2::2] = lengths[2::2].cumsum()
    return lengths
