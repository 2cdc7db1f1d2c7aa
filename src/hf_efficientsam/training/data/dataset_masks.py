"""Masks from a `datasets` dataset, in whichever of the usual ways its rows hold them."""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Image as ImageFeature
from datasets import LargeList, List, Value
from PIL import Image
from pycocotools import mask as rle_codec
from torch.utils.data import Dataset

from .coco import DEFAULT_READING, AnnotationConfig, Sample, encode_mask, to_rle, turn_rle
from .images import DatasetImages, load_split
from .mask_images import all_objects, is_soft, mask_values, one_object
from .reading import Header, logger, read_header, say_what_is_read
from .shards import CountedWarnings, hash_lines

MASKS_PER_ROW = 100_000  # ids that each row reserves for its masks
JSON = getattr(datasets, "Json", ())  # which the oldest versions that we allow do not have


class DatasetMasks(Dataset):
    """The rows of a split of a `datasets` dataset that list masks; `dataset[i]` is a `Sample`.

    The column of masks may be
    - an image: each of its values (or colours) but 0 is an object, so a binary mask is one and a map of instances
      several; of a mask with a soft edge what is at least half white is the object;
    - a list of images: each is an object, where it is not 0, or half white at a soft edge;
    - a list of COCO segmentations: polygons or RLE, compressed or not, or json of any of these;
    - a list of structs with a `segmentation`, or a struct of such lists; those with `iscrowd` are left out,
      unless all have it.

    Images of masks are not JPEG. Masks are drawn on the upright image, or on the stored one if an EXIF tag turns it by
    90 degrees and their size says so, or if `reading` does. A sample's `image_id` is its row's number, an annotation
    id that number times 100,000 plus the mask's place in the row (maps: the place of its value among those but 0), and
    `source` the dataset's name.

    Args:
        name: of a dataset on the Hub, or a directory: written by `save_to_disk`, or with images or parquet files.
        split: its name, or a slice such as "train[:10%]" except with `save_to_disk`.
        image_column: of images, or of their encoded bytes.
        mask_column: see above.
        min_area: leave out masks of fewer pixels, with warnings that count them.
        reading: how masks are read that may mean two things, see `CocoMasks`.

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
        reading: AnnotationConfig = DEFAULT_READING,
    ):
        self.name, self.split, self.mask_column, self.min_area = name, split, mask_column, min_area
        self.mask_frame = reading.mask_frame
        self.empty = CountedWarnings("Left out")
        self.hidden = CountedWarnings("Taken to be, give --mask_frame upright or stored")
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
        column = self.rows.data.column(mask_column)
        self.row_numbers = _rows_with_masks(column)
        if not len(self.row_numbers):
            raise ValueError(f"The column {mask_column} of {name}, split {split}, lists no mask; set another.")
        marked, total = _count_crowds(column)
        self.keeps_crowds = reading.crowds == "keep" or (reading.crowds == "auto" and marked == total)
        left_out = {"rows without a mask": len(self.rows) - len(self.row_numbers)}
        if self.keeps_crowds and marked:
            logger.warning("%s: %s masks are marked as crowds (iscrowd) and are read as masks.", name, marked)
        else:
            left_out["masks marked as crowds (--crowds keep reads them)"] = marked
        say_what_is_read(f"{name}, split {split}", f"{len(self.row_numbers)} rows with masks", Counter(left_out))

    def __len__(self) -> int:
        return len(self.row_numbers)

    def __getitem__(self, index: int) -> Sample:
        sample = self.without_image(index)
        return replace(sample, image=self.images[sample.image_id][1])

    def without_image(self, index: int) -> Sample:
        """The sample without its image, of which the header alone is read."""
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
        place = f"Row {row} of {self.name}, split {self.split},"
        header = read_header(self.images.file(row), place)
        try:
            rles = self._read_upright(row, header)
        except MemoryError:
            raise
        except Exception as error:  # damaged masks make Pillow and pycocotools raise nearly anything
            raise ValueError(f"{place} has masks that cannot be used ({error!r}); repair or remove them.") from error
        kept = [i for i, rle in enumerate(rles) if rle is not None and rle_codec.area(rle) >= self.min_area]
        if not kept:
            return None
        if len(kept) < len(rles):
            self.empty(f"{place} has {len(rles) - len(kept)} crowds or masks of less than {self.min_area} pixels.")
        annotation_ids = [row * MASKS_PER_ROW + i for i in kept]
        return Sample(None, [rles[i] for i in kept], row, annotation_ids, self.name)

    def _read_upright(self, row: int, header: Header) -> list[dict | None]:
        """The masks of a row, upright: read at the upright image's size, or at the stored one's."""
        value = self.rows[row][self.mask_column]
        if self.keeps_crowds:
            value = _unmarked(value)
        if header.hides_frame and self.mask_frame is None:
            self.hidden(f"An EXIF tag turns or mirrors row {row} of {self.name}; are its masks upright?")
        tried = [(header.size, 1), (header.stored_size, header.orientation)]
        first, second = tried[::-1] if self.mask_frame == "stored" else tried
        try:
            rles, orientation = self.read(value, *first[0]), first[1]
        except ValueError:
            if first[0] == second[0]:
                raise
            rles, orientation = self.read(value, *second[0]), second[1]
        return [rle if rle is None or orientation == 1 else turn_rle(rle, orientation) for rle in rles]


def _unmarked(value: Any) -> Any:
    """Annotations, a list or a struct of lists, without `iscrowd`."""
    if isinstance(value, dict):
        return {name: one for name, one in value.items() if name != "iscrowd"}
    return [_unmarked(one) for one in value] if isinstance(value, list) else value


def _count_crowds(column: pa.ChunkedArray) -> tuple[int, int]:
    """How many annotations of a column have `iscrowd`, and how many there are; zeros where none can have it."""
    lists = _field(column, "iscrowd") if pa.types.is_struct(column.type) else column
    if lists is None or not hasattr(lists.type, "value_type"):
        return 0, 0
    marks = pc.list_flatten(lists)
    marks = _field(marks, "iscrowd") if pa.types.is_struct(marks.type) else marks if lists is not column else None
    if marks is None or not (pa.types.is_integer(marks.type) or pa.types.is_boolean(marks.type)):
        return 0, 0
    return pc.sum(pc.cast(marks, pa.int64())).as_py() or 0, len(marks)


def _field(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray | None:
    return pc.struct_field(column, name) if column.type.get_field_index(name) >= 0 else None


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
    return [encode_mask(pixels) for pixels in all_objects(_mask_values(mask, width, height))]


def _read_images(masks: list[Image.Image], width: int, height: int) -> list[dict]:
    return [encode_mask(one_object(_mask_values(mask, width, height))) for mask in masks]


def _read_segmentations(segmentations: list, width: int, height: int) -> list[dict | None]:
    return [to_rle(segmentation, height, width) for segmentation in segmentations]


def _read_annotations(annotations: list[dict], width: int, height: int) -> list[dict | None]:
    is_left_out = [one.get("iscrowd") or one["segmentation"] is None for one in annotations]
    return [
        None if skip else to_rle(one["segmentation"], height, width)
        for one, skip in zip(annotations, is_left_out, strict=True)
    ]


def _read_annotation_lists(lists: dict[str, list], width: int, height: int) -> list[dict | None]:
    names = [name for name in ("segmentation", "iscrowd") if name in lists]
    columns = [lists[name] for name in names]
    annotations = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    return _read_annotations(annotations, width, height)


def _mask_values(mask: Image.Image, width: int, height: int) -> np.ndarray:
    """The values [H,W] of a mask's image."""
    if mask.size != (width, height):
        raise ValueError(f"a mask is {mask.width} x {mask.height} pixels, but the image is {width} x {height}")
    values = mask_values(mask)
    if is_soft(values):
        warnings.warn("Masks have soft edges; what is at least half white is taken.", stacklevel=2)
    return values
