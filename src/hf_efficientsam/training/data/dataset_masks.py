"""Masks from a `datasets` dataset, in whichever of the usual ways its rows hold them."""

import warnings
from collections.abc import Callable

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Image as ImageFeature
from datasets import LargeList, List, Value
from PIL import Image
from pycocotools import mask as rle_codec
from torch.utils.data import Dataset

from .coco import Sample, to_rle
from .images import DatasetImages, load_split
from .shards import hash_lines

MASKS_PER_ROW = 100_000  # ids that each row reserves for its masks
MASK_MODES = ("1", "L", "P", "I", "I;16", "I;16B")
JSON = getattr(datasets, "Json", ())  # which the oldest versions that we allow do not have


class DatasetMasks(Dataset):
    """The rows of a split of a `datasets` dataset that list masks; `dataset[i]` is a `Sample`.

    The column of masks may be
    - an image: each of its values but 0 is an object, so a binary mask is one and a map of instances several;
    - a list of images: each is an object, where it is not 0;
    - a list of COCO segmentations: polygons or RLE, compressed or not, or json of any of these;
    - a list of structs with a `segmentation`, or a struct of such lists; those with `iscrowd` are left out.

    Images of masks have one channel and the upright image's size, and are not JPEG. A sample's `image_id` is its row's
    number, an annotation id that number times 100,000 plus the mask's place in the row (maps: the place of its value
    among those but 0), and `source` the dataset's name.

    Args:
        name: of a dataset on the Hub, or a directory: written by `save_to_disk`, or with images or parquet files.
        split: its name, or a slice such as "train[:10%]" except with `save_to_disk`.
        image_column: of images, or of their encoded bytes.
        mask_column: see above.
        min_area: leave out masks of fewer pixels.

    Rows whose list of masks is empty, or whose map is missing, are left out at the start, without a look at any mask.
    In the place of a row of which no mask has `min_area`, such as an empty map, comes the next one that has, with a
    warning.

    Raises:
        ValueError: if it cannot be loaded or has no such split or column, or none with masks, and on access for a row
            that cannot be read or whose masks do not fit its image.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        image_column: str = "image",
        mask_column: str = "masks",
        min_area: int = 1,
    ):
        self.name, self.split, self.mask_column, self.min_area = name, split, mask_column, min_area
        rows = load_split(name, split)
        self.images = DatasetImages(name, split, image_column, rows)
        if mask_column not in rows.column_names:
            raise ValueError(
                f"{name} has no column {mask_column}; set the mask column to one of {', '.join(rows.column_names)}."
            )
        self.rows = rows.select_columns(mask_column)
        self.read = _reader(rows.features[mask_column])
        if self.read is None:
            raise ValueError(
                f"The column {mask_column} of {name} holds {rows.features[mask_column]}, not masks (an image, a list "
                "of images, of COCO segmentations or of structs with a `segmentation`); set another or cast it."
            )
        self.row_numbers = _rows_with_masks(self.rows.data.column(mask_column))
        if not len(self.row_numbers):
            raise ValueError(f"The column {mask_column} of {name}, split {split}, lists no mask; set another.")

    def __len__(self) -> int:
        return len(self.row_numbers)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):  # also what ends a loop over the dataset
            raise IndexError(f"index {index} is out of range for {len(self)} rows")
        for number in range(len(self)):
            row = int(self.row_numbers[(index + number) % len(self)])
            if (sample := self._read_row(row)) is not None:
                return sample
            warnings.warn(
                f"Row {row} of {self.name} has no mask of {self.min_area} pixels; the next comes in its place.",
                stacklevel=2,
            )
        raise ValueError(f"No row of {self.name} has a mask of {self.min_area} pixels; set another mask column.")

    def fingerprint(self) -> str:
        """Changes with the size in bytes of any image, and with the rows that have masks."""
        return hash_lines([self.images.fingerprint(), *map(str, self.row_numbers)])

    def _read_row(self, row: int) -> Sample | None:
        _, image = self.images[row]
        place = f"Row {row} of {self.name}, split {self.split},"
        try:
            rles = self.read(self.rows[row][self.mask_column], *image.size)
        except MemoryError:
            raise
        except Exception as error:  # damaged masks make Pillow and pycocotools raise nearly anything
            raise ValueError(f"{place} has masks that cannot be used ({error!r}); repair or remove them.") from error
        kept = [i for i, rle in enumerate(rles) if rle is not None and rle_codec.area(rle) >= self.min_area]
        if not kept:
            return None
        annotation_ids = [row * MASKS_PER_ROW + i for i in kept]
        return Sample(image, [rles[i] for i in kept], row, annotation_ids, self.name)


def _reader(feature) -> Callable[..., list[dict | None]] | None:
    """Which function reads the values of a column, None if it holds no masks.

    It is called with value, width and height of the image, and gives the RLE of each object, None where there is none.
    """
    item = _item(feature)
    if _is_image(feature):
        return _read_map
    if _is_image(item):
        return _read_images
    if _is_segmentation(item):
        return _read_segmentations
    if isinstance(item, dict) and _is_segmentation(item.get("segmentation")):
        return _read_annotations
    if isinstance(feature, dict) and _is_segmentation(_item(feature.get("segmentation"))):
        return _read_annotation_lists
    return None


def _item(feature):
    """What a list is of, None for anything else."""
    return feature.feature if isinstance(feature, List | LargeList) else None


def _is_image(feature) -> bool:
    return isinstance(feature, ImageFeature) and feature.decode


def _is_segmentation(feature) -> bool:
    if isinstance(feature, dict):
        return {"size", "counts"} <= feature.keys()
    number = _item(_item(feature))
    is_polygons = isinstance(number, Value) and number.dtype.startswith(("int", "uint", "float"))
    return is_polygons or isinstance(feature, JSON)


def _rows_with_masks(column: pa.ChunkedArray) -> np.ndarray:
    """The numbers of the rows that are not empty, from the lengths of the lists alone."""
    if pa.types.is_struct(column.type) and column.type.get_field_index("segmentation") >= 0:
        column = pc.struct_field(column, "segmentation")
    if pa.types.is_struct(column.type):  # encoded images
        return np.flatnonzero(column.is_valid())
    return np.flatnonzero(pc.fill_null(pc.list_value_length(column), 0))


def _read_map(mask: Image.Image, width: int, height: int) -> list[dict]:
    values = _mask_values(mask, width, height)
    return [_encode(values == value) for value in np.unique(values) if value != 0]


def _read_images(masks: list[Image.Image], width: int, height: int) -> list[dict]:
    return [_encode(_mask_values(mask, width, height) != 0) for mask in masks]


def _read_segmentations(segmentations: list, width: int, height: int) -> list[dict | None]:
    return [to_rle(segmentation, height, width) for segmentation in segmentations]


def _read_annotations(annotations: list[dict], width: int, height: int) -> list[dict | None]:
    return [None if a.get("iscrowd") else to_rle(a["segmentation"], height, width) for a in annotations]


def _read_annotation_lists(lists: dict[str, list], width: int, height: int) -> list[dict | None]:
    names = [name for name in ("segmentation", "iscrowd") if name in lists]
    columns = [lists[name] for name in names]
    annotations = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    return _read_annotations(annotations, width, height)


def _mask_values(mask: Image.Image, width: int, height: int) -> np.ndarray:
    """The values [H,W] of a mask's image."""
    if mask.mode not in MASK_MODES:
        raise ValueError(f"a mask is an image of mode {mask.mode}, but one channel of 8, 16 or 32 bits is needed")
    if mask.format == "JPEG":
        raise ValueError("a mask is a JPEG, whose values are not exact; save masks as PNG")
    if mask.size != (width, height):
        raise ValueError(f"a mask is {mask.width} x {mask.height} pixels, but the image is {width} x {height}")
    return np.asarray(mask)


def _encode(mask: np.ndarray) -> dict:
    return rle_codec.encode(np.asfortranarray(mask, np.uint8))
