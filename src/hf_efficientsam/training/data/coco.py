"""Masks from COCO-style json, kept as run-length code (RLE) until someone asks for the pixels."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from pycocotools import mask as rle_codec
from torch.utils.data import Dataset


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
    """The images of a COCO-style json that have masks; `dataset[i]` is a `Sample`.

    Segmentations may be polygons or RLE, compressed or not.

    Args:
        annotations: the json file.
        images: the folder that `file_name` is relative to; by default `images` beside the json.
        skip_crowd: leave out annotations with `iscrowd`.
        min_area: leave out masks of fewer pixels, counted in the mask itself (the json's `area` is not read).

    Raises FileNotFoundError for a json or image that is not there, and ValueError for a json that is broken or whose
    sizes do not fit the images. The pixels of an image are first looked at when it is read.
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
        content = _read_json(self.annotations)
        records = {record["id"]: record for record in content["images"]}

        rles, ids = defaultdict(list), defaultdict(list)
        for annotation in content["annotations"]:
            if skip_crowd and annotation.get("iscrowd", 0):
                continue
            try:
                record = records[annotation["image_id"]]
                rle = _to_rle(annotation["segmentation"], record["height"], record["width"])
            except (KeyError, TypeError, ValueError) as error:
                name = f"annotation {annotation.get('id')} of {self.annotations}"
                raise ValueError(f"{name} cannot be read ({error!r}); repair or remove it.") from error
            if rle is not None and rle_codec.area(rle) >= min_area:
                rles[record["id"]].append(rle)
                ids[record["id"]].append(annotation["id"])

        self.records = [record for record in content["images"] if record["id"] in rles]
        self.rles = [rles[record["id"]] for record in self.records]
        self.annotation_ids = [ids[record["id"]] for record in self.records]
        for record in self.records:
            if not (self.images / record["file_name"]).is_file():
                raise FileNotFoundError(
                    f"{self.annotations} lists {record['file_name']}, which is not in {self.images}; "
                    "give the folder of the images with `images=`."
                )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        path = self.images / record["file_name"]
        try:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file).convert("RGB")
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an image ({error}); replace the file.") from error
        if image.size != (record["width"], record["height"]):
            raise ValueError(
                f"{path} is {image.width} x {image.height} pixels when upright, but {self.annotations} says "
                f"{record['width']} x {record['height']}; the masks belong to another version of the image."
            )
        source = record.get("source", self.annotations.parent.name)
        return Sample(image, self.rles[index], record["id"], self.annotation_ids[index], source)


def decode(rles: list[dict]) -> np.ndarray:
    """RLEs of one image -> uint8 [N,H,W] of 0 and 1 (a view whose memory is column by column, as RLE is)."""
    if not rles:
        raise ValueError("There is no mask to decode; pass at least one RLE.")
    return rle_codec.decode(rles).transpose(2, 0, 1)


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"There is no annotation file {path}.")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid json ({error}); download or export it again.") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in ("images", "annotations")):
        raise ValueError(f"{path} is not COCO-style: it needs the lists `images` and `annotations`.")
    for record in content["images"]:
        missing = {"id", "file_name", "width", "height"} - record.keys()
        if missing:
            raise ValueError(f"{path} has an image without {', '.join(sorted(missing))}: {record}.")
    return content


def _to_rle(segmentation: list | dict, height: int, width: int) -> dict | None:
    """Any COCO segmentation -> compressed RLE, None where nothing is drawn."""
    if isinstance(segmentation, list):
        # Fewer than three corners enclose nothing, and pycocotools would take four numbers for a box.
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        return rle_codec.merge(rle_codec.frPyObjects(polygons, height, width)) if polygons else None
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"mask size {segmentation['size']} is not the image's [height, width] {[height, width]}")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        if sum(counts) != height * width:
            raise ValueError(f"counts add up to {sum(counts)} pixels of {height * width}")
        return rle_codec.frPyObjects(segmentation, height, width)
    return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
