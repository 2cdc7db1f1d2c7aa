"""Masks from COCO-style json, kept as run-length code (RLE) until someone asks for the pixels."""

import os.path
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle_codec
from torch.utils.data import Dataset

from hf_efficientsam.inference.image_files import local_path

from .annotation_folders import is_annotation_folder, read_folder
from .coco_json import CROWDS, file_names, find_folder, mark_crowds, read_json
from .reading import (
    FRAMES,
    TURNS,
    FrameConfig,
    Header,
    decode_image,
    listed,
    logger,
    read_headers,
    refuse_if_any,
    say_what_is_read,
    warn_of_hidden_frames,
)
from .shards import hash_lines


@dataclass(frozen=True)
class AnnotationConfig(FrameConfig):
    """How masks are read that may mean two things."""

    crowds: str = field(
        default="auto",
        metadata={
            "help": "iscrowd 1 in json: skip (regions of many objects), keep (masks as others), or auto: by the file",
            "choices": CROWDS,
        },
    )


DEFAULT_READING = AnnotationConfig()


@dataclass(frozen=True)
class Sample:
    """One image with its masks.

    `image` is RGB and upright, or None where only the masks were asked for; `rles` are compressed COCO RLEs at the
    image's size, one for each of `annotation_ids`.
    """

    image: Image.Image | None
    rles: list[dict]
    image_id: int
    annotation_ids: list[int]
    source: str


class CocoMasks(Dataset):
    """The images of a COCO- or LVIS-style json, a YOLO dataset or a folder of labelme files that have masks;
    `dataset[i]` is a `Sample`.

    Segmentations may be polygons or RLE, compressed or not. Where images have only a `coco_url`, as in LVIS, its last
    folder and name (train2017/000000391895.jpg) are looked for, then the name alone.

    All masks are read at the start, some two minutes for a million of them, and kept as compressed RLE, which takes a
    third of the memory of their polygons. `categories` are the json's, `category_ids[i]` those of `dataset[i].rles`;
    both are None where the json leaves them out. What is kept and what is left out is said in the log, with numbers.

    Masks of a photograph that its EXIF tag turns by 90 degrees are read in the frame that the json's sizes tell, and
    come out upright.

    Args:
        annotations: the json file, or what `read_folder` takes.
        images: the folder that `file_name` is relative to; by default see `find_folder`.
        min_area: leave out masks of fewer pixels, counted in the mask itself (the json's `area` is not read).
        reading: `crowds` is what `iscrowd` means: "skip" leaves these regions out, "keep" reads them as masks, "auto"
            decides for the file, see `mark_crowds`. `mask_frame`: see `FrameConfig`.
        split: the part of a YOLO dataset, train or val.
        check_images: images that cannot be opened are refused now, all at once; else each when it is read, as an
            evaluation wants it, which leaves them out and names them. A YOLO dataset's are refused in any case, for
            its masks are relative to their sizes.

    Raises FileNotFoundError for a json or images that are not there, and ValueError for a json that is broken or
    ambiguous (see `read_json`) and for images that cannot be opened or whose sizes do not fit. The pixels of an image
    are first looked at when it is read.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path | None = None,
        min_area: int = 1,
        reading: AnnotationConfig = DEFAULT_READING,
        split: str = "train",
        check_images: bool = True,
    ):
        content = self._open(annotations, images, reading.crowds, split, reading.mask_frame)
        self.categories, left_out, drawn = content.get("categories"), Counter(), defaultdict(list)
        for number, annotation in enumerate(content["annotations"]):
            if annotation["iscrowd"]:
                left_out["masks marked as crowds (--crowds keep reads them)"] += 1
            elif annotation.get("segmentation") is None:
                left_out[annotation.get("left_out", "boxes without a mask")] += 1
            else:
                drawn[annotation["image_id"]].append((annotation.get("id", number), annotation))
        records = [record for record in content["images"] if record["id"] in drawn]
        files = self._find(records)
        sizes = None if check_images else [(record["width"], record["height"]) for record in records]
        headers = read_headers(files, str(self.annotations), sizes)
        orientations = self._orientations(records, files, headers, reading.mask_frame)

        self.records, self.files, self.rles, self.annotation_ids, self.category_ids = [], [], [], [], []
        for record, file, header, orientation in zip(records, files, headers, orientations, strict=True):
            rles = [self._read_mask(annotation, record, orientation) for _, annotation in drawn[record["id"]]]
            areas = [0 if rle is None else int(rle_codec.area(rle)) for rle in rles]
            kept = [place for place, area in enumerate(areas) if area >= max(min_area, 1)]
            left_out["masks without pixels"] += areas.count(0)
            left_out[f"masks of fewer than {min_area} pixels"] += len(areas) - areas.count(0) - len(kept)
            if kept:
                own = [drawn[record["id"]][place] for place in kept]
                self.records.append(record | dict(zip(("width", "height"), header.size, strict=True)))
                self.files.append(file)
                self.rles.append([rles[place] for place in kept])
                self.annotation_ids.append([name for name, _ in own])
                self.category_ids.append([annotation.get("category_id") for _, annotation in own])
        left_out["images without a mask"] = len(content["images"]) - len(self.records)
        kept = f"{len(self.records)} images with {sum(map(len, self.rles))} masks"
        say_what_is_read(str(self.annotations), kept, left_out)

    def _open(
        self,
        annotations: str | Path,
        images: str | Path | None,
        crowds: str,
        split: str,
        mask_frame: str | None = None,
    ) -> dict:
        """The content of the json or folder, what is a crowd being settled."""
        if mask_frame not in (*FRAMES, None):
            raise ValueError(f"--mask_frame {mask_frame} is not known; choose {', '.join(FRAMES)}.")
        if crowds not in CROWDS:
            raise ValueError(f"--crowds {crowds} is not known; choose {', '.join(CROWDS)}.")
        self.annotations, images = local_path(annotations), None if images is None else local_path(images)
        if is_annotation_folder(self.annotations):
            content, self.images = read_folder(self.annotations, images, split, mask_frame)
        else:
            content = read_json(self.annotations)
            self.images = images or find_folder(self.annotations, content["images"])
        if unmarked := mark_crowds(content["annotations"], self.annotations, crowds):
            logger.warning(
                "%s: %s masks are marked as crowds (iscrowd) and are read as masks, because tools such as CVAT mark "
                "every RLE so; --crowds skip leaves them out.",
                self.annotations,
                unmarked,
            )
        return content

    def _find(self, records: list[dict]) -> list[str]:
        """The files of images."""
        found, missing = [], []
        for record in records:
            paths = [os.path.join(self.images, name) for name in file_names(record)]
            path = next(filter(os.path.isfile, paths), None)
            found.append(path)
            if path is None:
                missing.append(" or ".join(file_names(record)))
        if missing:
            raise FileNotFoundError(
                f"{self.annotations} lists {listed(missing)}, which is not in {self.images}; give the folder of the "
                "images (`--images`)."
            )
        return found

    def _orientations(
        self, records: list[dict], files: list[str], headers: list[Header], mask_frame: str | None
    ) -> list[int]:
        """The EXIF orientation that the masks of each image are stored in."""
        orientations, problems, hidden = [], [], []
        for record, file, header in zip(records, files, headers, strict=True):
            try:
                orientations.append(header.mask_orientation((record["width"], record["height"]), mask_frame))
            except ValueError:
                problems.append(self._other_size(record, file, header.size))
            if header.hides_frame or (header.orientation > 1 and "own_size" in record):
                hidden.append(file)
        what = f"Masks of {self.annotations} belong to other versions of the images"
        refuse_if_any(problems, what)
        warn_of_hidden_frames(hidden, mask_frame, str(self.annotations))
        return orientations

    def _other_size(self, record: dict, file: str, size: tuple[int, int]) -> str:
        """What is wrong with a file of this (width, height)."""
        return (
            f"{file} is {size[0]} x {size[1]} pixels when upright, but {self.annotations} says {record['width']} x "
            f"{record['height']}"
        )

    def _read_mask(self, annotation: dict, record: dict, orientation: int) -> dict | None:
        try:
            rle = to_rle(annotation["segmentation"], record["height"], record["width"])
        except Exception as error:  # damaged masks make pycocotools raise nearly anything
            name = f"annotation {annotation.get('id')} of {self.annotations}"
            raise ValueError(f"{name} cannot be read ({error!r}); repair or remove it.") from error
        return rle if rle is None or orientation == 1 else turn_rle(rle, orientation)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record, path = self.records[index], self.files[index]
        image = decode_image(path, path)
        if image.size != (record["width"], record["height"]):
            problem = self._other_size(record, path, image.size)
            raise ValueError(f"{problem}; put the image back that its masks were drawn on.")
        return replace(self.without_image(index), image=image)

    def without_image(self, index: int) -> Sample:
        """The sample without its image, whose file is not opened."""
        record = self.records[index]
        source = record.get("source", self.annotations.parent.name)
        return Sample(None, self.rles[index], record["id"], self.annotation_ids[index], source)

    def fingerprint(self) -> str:
        """Changes with the name or the size in bytes of any image, and with any mask."""
        lines = (f"{path} {os.path.getsize(path)} {rles}" for path, rles in zip(self.files, self.rles, strict=True))
        return hash_lines(line.removeprefix(str(self.images)) for line in lines)


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


def encode_mask(mask: np.ndarray) -> dict:
    """The compressed COCO RLE of a mask [H,W]."""
    return rle_codec.encode(np.asfortranarray(mask, np.uint8))


def turn_rle(rle: dict, orientation: int) -> dict:
    """The upright mask of one that is stored in an EXIF orientation."""
    return encode_mask(TURNS[orientation](rle_codec.decode(rle)))


def _is_corner(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def to_rle(segmentation: list | dict, height: int, width: int) -> dict | None:
    """Any COCO segmentation -> compressed RLE, None where nothing is drawn.

    A damaged one raises ValueError, or whatever else pycocotools thinks of it: catch Exception.
    """
    if isinstance(segmentation, list):
        if segmentation and all(isinstance(part, dict) for part in segmentation):
            return rle_codec.merge([to_rle(part, height, width) for part in segmentation])
        if segmentation and all(isinstance(number, int | float) for number in segmentation):
            segmentation = [segmentation]  # one polygon that is no list of polygons
        elif len(segmentation) > 2 and all(map(_is_corner, segmentation)):
            segmentation = [segmentation]
        segmentation = [
            [number for corner in part for number in corner] if all(map(_is_corner, part)) else part
            for part in segmentation
        ]
        # Fewer than three corners enclose nothing, and pycocotools would take four numbers for a box.
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        # pycocotools asks for endless memory where a corner is far away or, as some exports have it, NaN.
        limit = max(height, width)
        if not all(-limit <= number <= 2 * limit for polygon in polygons for number in polygon):
            raise ValueError("a corner of a polygon is far outside the image, or no number")
        if any(len(polygon) % 2 for polygon in polygons):
            raise ValueError("a polygon has an x without a y")
        return rle_codec.merge(rle_codec.frPyObjects(polygons, height, width)) if polygons else None
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"mask size {segmentation['size']} is not the image's [height, width] {[height, width]}")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        counts = rle_codec.frPyObjects(segmentation, height, width)["counts"]
    elif isinstance(counts, str):
        counts = counts.encode()
    # Over run lengths that do not fill the image pycocotools reads stray memory or never ends.
    lengths = run_lengths(counts)
    if (lengths < 0).any() or lengths.sum() != height * width:
        raise ValueError(f"counts add up to {lengths.sum()} pixels of {height * width}")
    return {"size": [height, width], "counts": counts}


def run_lengths(counts: bytes) -> np.ndarray:
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
