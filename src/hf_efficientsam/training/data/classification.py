"""Images with a class each: from folders, from a `datasets` dataset or streamed from tar shards.

A source gives `(key, image, label)`: a name that is unique in it, an RGB image, and the place of the image's class in
the source's `classes`. What is random about a training image depends on the seed, its key and the epoch alone, see
`images.py`.
"""

import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel
from kornia.augmentation import RandomErasing
from kornia.augmentation.auto import RandAugment
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from hf_efficientsam.training.engine.config import NotNegativeFloat, NotNegativeInt, PositiveInt, PositiveRatio, Ratio

from .augment import random_resized_crop
from .images import DatasetImages, FolderImages, hash_key, load_split
from .reading import IMAGE_SUFFIXES, decode_image, logger
from .shards import Shards, Streamed, shared_number

PATTERNS = "patterns"  # in place of a folder's name


@dataclass(frozen=True)
class ClassSourceConfig:
    """Where labelled images come from: one of folders, a dataset, shards."""

    train: str | None = field(
        default=None, metadata={"help": f"folder with a folder of images for each class, or: {PATTERNS} (made up)"}
    )
    test: str | None = field(default=None, metadata={"help": "the same, for evaluation"})
    dataset: str | None = field(default=None, metadata={"help": "or a `datasets` dataset: Hub name or directory"})
    split: str = field(default="train", metadata={"help": "of the dataset"})
    test_split: str = field(default="test", metadata={"help": "of the dataset, for evaluation"})
    image_column: str = field(default="image", metadata={"help": "of the dataset"})
    label_column: str = field(default="label", metadata={"help": "of the dataset"})
    shards: list[str] = field(
        default_factory=list,
        metadata={"help": "or webdataset tars (jpg, cls), streamed: paths or URLs, {000..099} for a range"},
    )
    test_shards: list[str] = field(default_factory=list, metadata={"help": "the same, for evaluation"})
    class_names: str | None = field(
        default=None, metadata={"help": "text file with a class a line, for shards, which only number them"}
    )


@dataclass(frozen=True)
class ClassViewConfig:
    """How training images are augmented and mixed."""

    size: PositiveInt = field(default=224, metadata={"help": "side of the model input in pixels"})
    crop_scale: PositiveRatio = field(
        default=0.08, metadata={"help": "smallest part of an image's area that a crop keeps"}
    )
    flip: bool = field(default=True, metadata={"help": "half of the images are mirrored"})
    rand_augment: NotNegativeInt = field(default=2, metadata={"help": "RandAugment's operations an image; 0 for none"})
    rand_augment_magnitude: int = field(default=27, metadata={"help": "their strength, 1 to 29"})
    erasing: Ratio = field(default=0.25, metadata={"help": "ratio of the images in which a rectangle is erased"})
    mixup: NotNegativeFloat = field(
        default=0.8, metadata={"help": "both parameters of mixup's Beta distribution; 0 for none"}
    )
    cutmix: NotNegativeFloat = field(
        default=1.0, metadata={"help": "of cutmix's, which takes turns with mixup; 0 for none"}
    )


# ------------------------------------------------------------------------------------------ sources


class ClassFolders:
    """The images under `folder/CLASS/`, sorted; hidden files are left out.

    Args:
        folder: with a folder for each class.
        limit: only so many images, the same number of each class.
        seed: of which images the limit chooses.

    Raises:
        ValueError: if there are less than two classes, one without images, a file that cannot be opened, or a limit
            that cannot be met, and on access for a file that cannot be decoded.
    """

    def __init__(self, folder: str | Path, limit: int | None = None, seed: int = 0):
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()] if os.path.isdir(folder) else []
        self.classes = sorted(name for name in names if not name.startswith("."))
        if len(self.classes) < 2:
            raise ValueError(f"{folder} must hold a folder of images for each of at least two classes.")
        each, rest = (None, 0) if limit is None else divmod(limit, len(self.classes))
        if rest or each == 0:
            raise ValueError(f"The limit {limit} must be a multiple of the {len(self.classes)} classes of {folder}.")
        self.images = FolderImages([folder])
        rows = {name: [] for name in self.classes}
        for row, key in enumerate(self.images.files):
            name, _, file = key.partition("/")
            if file and name in rows:
                rows[name].append(row)
        self.images.headers()  # a broken file is named now, not in the middle of a run
        if strays := len(self.images.files) - sum(map(len, rows.values())):
            logger.warning("%s: %s images lie in no class's folder and are left out.", folder, strays)
        self.rows, self.labels, random = [], [], np.random.default_rng(seed)
        for label, (name, found) in enumerate(rows.items()):
            if len(found) < (each or 1):
                raise ValueError(f"{Path(folder) / name} holds only {len(found)} images.")
            chosen = [found[i] for i in random.permutation(len(found))[:each]] if each else found
            self.rows += chosen
            self.labels += [label] * len(chosen)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[str, Image.Image, int]:
        return *self.images[self.rows[index]], self.labels[index]


class DatasetClasses:
    """The rows of a split of a `datasets` dataset.

    Classes are those of the column's `ClassLabel`, or else the different values in it, sorted as text.

    Args:
        name, split, image_column: see `DatasetImages`.
        label_column: of classes, numbers or strings.

    Raises:
        ValueError: if it cannot be loaded or has no such split or column, or a row has no class, and on access for an
            unreadable row.
    """

    def __init__(self, name: str, split: str, image_column: str = "image", label_column: str = "label"):
        rows = load_split(name, split)
        if label_column not in rows.column_names:
            raise ValueError(
                f"{name} has no column {label_column}; set the label column to one of {', '.join(rows.column_names)}."
            )
        self.images = DatasetImages(name, split, image_column, rows)
        rows = rows.select_columns(label_column)
        if not isinstance(rows.features[label_column], ClassLabel):
            rows = rows.class_encode_column(label_column)
        self.classes, self.labels = rows.features[label_column].names, rows[label_column][:]
        for row, label in enumerate(self.labels):
            if label is None or label < 0:
                raise ValueError(f"Row {row} of {name}, split {split}, has no class; choose another split.")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str, Image.Image, int]:
        return *self.images[index], self.labels[index]


class ShardClasses(Shards):
    """The records of webdataset shards that have an image and a `.cls`, the number of its class. See `Shards`.

    Args:
        shards: see `Shards`.
        classes: their names, in the order of the numbers.

    A record is broken if its image or number cannot be read, or if there is no such class.
    """

    needs = (IMAGE_SUFFIXES, (".cls",))

    def __init__(self, shards: list[str], classes: list[str]):
        super().__init__(shards)
        self.classes = classes

    def decode(self, record: dict) -> tuple[Image.Image, int]:
        (name, encoded), (number_name, text) = record["members"]
        try:
            label = int(text)
        except ValueError as error:
            raise ValueError(f"{number_name} in {record['shard']} is not a number.") from error
        if not 0 <= label < len(self.classes):
            raise ValueError(f"{number_name} in {record['shard']} is {label}, of {len(self.classes)} classes.")
        return decode_image(io.BytesIO(encoded), f"{name} in {record['shard']}"), label


class Patterns:
    """Made-up images of 64 x 64 pixels that need no file: bright patterns on a dark ground, of any colour and width.

    Args:
        count: of images; the classes take turns.
        seed: of all chance, so another seed gives other images.
    """

    classes = ["checks", "columns", "dots", "rows"]

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[str, Image.Image, int]:
        generator, label = np.random.default_rng([self.seed, index]), index % len(self.classes)
        width = generator.uniform(4, 10)
        x, y = np.arange(64) + generator.uniform(0, 2 * width, (2, 1))
        column, row = x // width % 2 > 0, (y // width % 2 > 0)[:, None]
        everywhere = np.ones((64, 64), bool)
        bright = [column ^ row, column & everywhere, column & row, row & everywhere][label]
        ground, ink = generator.integers([[0], [150]], [[100], [256]], (2, 3))
        pixels = np.where(bright[..., None], ink, ground).astype(np.uint8)
        return f"{self.seed}/{index}", Image.fromarray(pixels), label


Source = ClassFolders | DatasetClasses | ShardClasses | Patterns


def open_train(options: ClassSourceConfig) -> Source:
    """
    The images to train on.

    Raises:
        ValueError: if none or more than one kind is given, or if it cannot be opened.
    """
    if sum(map(bool, (options.train, options.dataset, options.shards))) != 1:
        raise ValueError("Give one of --train (a folder with a folder for each class), --dataset and --shards.")
    if options.train:
        return Patterns(512, seed=0) if options.train == PATTERNS else ClassFolders(options.train)
    if options.dataset:
        return DatasetClasses(options.dataset, options.split, options.image_column, options.label_column)
    return ShardClasses(options.shards, read_names(options.class_names))


def open_test(options: ClassSourceConfig) -> Source:
    """
    The images to evaluate on, which may be of another kind than those to train on.

    Raises:
        ValueError: if none or more than one kind is given, or if it cannot be opened.
    """
    if options.test and options.test_shards:
        raise ValueError("Give --test or --test_shards, not both.")
    if options.test:
        return Patterns(128, seed=1) if options.test == PATTERNS else ClassFolders(options.test)
    if options.test_shards:
        return ShardClasses(options.test_shards, read_names(options.class_names))
    if options.dataset:
        return DatasetClasses(options.dataset, options.test_split, options.image_column, options.label_column)
    raise ValueError("Give images to evaluate on: --test a folder with a folder for each class, or --test_shards.")


def read_names(path: str | None) -> list[str]:
    """The lines of a text file; ValueError if it cannot be read, or has less than two or one twice."""
    if path is None:
        raise ValueError("Shards only number their classes; give --class_names a text file with a class a line.")
    try:
        names = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--class_names {path} cannot be read ({error}); give a text file with a class a line."
        ) from error
    names = [name.strip() for name in names if name.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"--class_names {path} must name at least two classes, and none twice.")
    return names


# ------------------------------------------------------------------------------------------ to train on


def draw_mixing(options: ClassViewConfig, generator: np.random.Generator) -> tuple[float, tuple[int, int, int, int]]:
    """
    How much of an image is kept when it is mixed with another, see `mixup.mix_neighbors`: by mixup (arXiv
    1710.09412) a part of each pixel, by cutmix (arXiv 1905.04899) all pixels outside a box.

    Returns:
        the ratio that an image keeps, and the box (left, top, right, bottom) in pixels, right and bottom exclusive.
    """
    size, nowhere = options.size, (0, 0, 0, 0)
    if options.cutmix and (not options.mixup or generator.random() < 0.5):
        side = size * math.sqrt(1 - generator.beta(options.cutmix, options.cutmix))
        x, y = generator.uniform(0, size, 2)
        sides = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
        return 1.0, tuple(min(max(round(one), 0), size) for one in sides)
    return (generator.beta(options.mixup, options.mixup), nowhere) if options.mixup else (1.0, nowhere)


class _ClassItems:
    """What both datasets share: their arguments, the epoch, and how an image becomes an item."""

    def __init__(self, source: Source, options: ClassViewConfig, seed: int = 0):
        self.source, self.options, self.seed = source, options, seed
        self.epoch = shared_number()
        self.augment = nn.Sequential()
        if options.rand_augment:
            self.augment.append(RandAugment(options.rand_augment, options.rand_augment_magnitude))
        if options.erasing:
            self.augment.append(RandomErasing(value=0.45, p=options.erasing))  # 0.45: about ImageNet's mean

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def make(self, key: str, image: Image.Image, label: int) -> dict:
        size = self.options.size
        generator = np.random.default_rng([self.seed, self.epoch.item(), hash_key(key)])
        ratio, box = draw_mixing(self.options, generator)
        image = image.crop(random_resized_crop(*image.size, (self.options.crop_scale, 1.0), generator))
        image = image.resize((size, size), Image.Resampling.BICUBIC)
        if self.options.flip and generator.random() < 0.5:
            image = ImageOps.mirror(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        if len(self.augment):
            with torch.random.fork_rng(devices=[]):  # kornia draws from torch's own generator
                torch.manual_seed(int(generator.integers(2**63)))
                pixels = (255 * self.augment(pixels[None] / 255)[0]).round().byte()
        mixing = {"ratio": np.float32(ratio), "box": torch.tensor(box)}
        return {"pixel_values": pixels, "labels": label, "key": key} | mixing


class ClassViews(_ClassItems, Dataset):
    """Training images: a random resized crop, mirrored half of the time, RandAugment, a rectangle erased.

    RandAugment (arXiv 1909.13719) and erasing (arXiv 1708.04896) are kornia's, which is kept up, needs torch alone and
    takes 1 to 4 ms an image. The others that we looked at: timm and torchvision's own cannot be imported beside a
    CPU-only torch, albumentations is no longer kept up (its successor's licence is the AGPL) and brings OpenCV,
    imgaug has had no release since 2020, and transformers has none. kornia counts magnitudes from 0 to 30; timm's 9
    of 10 is 27.

    An item depends on the seed, the epoch and the key, and on nothing else. Call `set_epoch` before each epoch.

    Args:
        source: any but shards.
        options: see there.
        seed: of all chance.
    """

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        """An item, which torch's default collate makes a batch of B of:

        `pixel_values` uint8 [3,S,S] (RGB, not normalised), `labels` int, `key` str, `ratio` float32 and `box` int64
        [4] of `draw_mixing`.
        """
        return self.make(*self.source[index])


class StreamedClassViews(Streamed, _ClassItems):
    """The items of `ClassViews` from `ShardClasses`, without an end; see `Streamed` for order and splitting."""

    def __init__(self, source: ShardClasses, options: ClassViewConfig, seed: int = 0, **streaming: int):
        _ClassItems.__init__(self, source, options, seed)
        Streamed.__init__(self, source, seed, **streaming)

    def item(self, key: str, decoded: tuple[Image.Image, int]) -> dict:
        return self.make(key, *decoded)


# ------------------------------------------------------------------------------------------ to evaluate on


class EvaluationBatches(IterableDataset):
    """Every image of a source once, in batches that are the same whatever the number of processes and workers.

    Batches are dealt to the processes, or the shards of a stream are; no image is there twice to fill up a batch. A
    broken record of a shard is left out with a warning.

    Args:
        source: any.
        processor: of the model, makes `pixel_values` of an image.
        batch_size: images in a batch at most.
        process_index, num_processes: which of how many processes reads.
    """

    def __init__(
        self, source: Source, processor: Any, batch_size: int, process_index: int = 0, num_processes: int = 1
    ):
        self.source, self.processor, self.batch_size = source, processor, batch_size
        if isinstance(source, ShardClasses):
            units = range(len(source.shards))
        else:
            units = [range(start, min(start + batch_size, len(source))) for start in range(0, len(source), batch_size)]
        self.units = units[process_index::num_processes]

    def _samples(self, unit: int | range) -> Iterator[tuple[Image.Image, int]]:
        if isinstance(unit, range):
            return (self.source[index][1:] for index in unit)
        return (decoded for _, decoded in self.source.read(unit))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """`pixel_values` float32 [B,3,S,S] and labels int64 [B]."""
        worker = get_worker_info()
        for unit in self.units if worker is None else self.units[worker.id :: worker.num_workers]:
            samples = self._samples(unit)
            while batch := list(islice(samples, self.batch_size)):
                images, labels = zip(*batch, strict=True)
                pixel_values = [self.processor(image, return_tensors="pt")["pixel_values"] for image in images]
                yield torch.cat(pixel_values), torch.tensor(labels)
