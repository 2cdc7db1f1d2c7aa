"""Images without labels, for pretraining: from folders, from a `datasets` dataset or streamed from tar shards.

What is random about an image depends on the seed, its key and the epoch alone, so every process, worker, batch size
and resumed run sees the same crops and the same noise.
"""

import hashlib
import io
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from torch.utils import data
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hf_efficientsam.inference.image_files import find_files, local_path

from .augment import random_resized_crop
from .reading import IMAGE_SUFFIXES, Header, decode_image, read_headers, say_what_is_read
from .shards import Shards, Streamed, hash_lines, shared_number


@dataclass(frozen=True)
class ImageSourceConfig:
    """Where images without labels come from: one of folders, a dataset, shards."""

    images: list[str] = field(default_factory=list, metadata={"help": "folders of images"})
    dataset: str | None = field(default=None, metadata={"help": "a `datasets` dataset: Hub name or directory"})
    split: str = field(default="train", metadata={"help": "of the dataset"})
    image_column: str = field(default="image", metadata={"help": "of the dataset"})
    shards: list[str] = field(
        default_factory=list, metadata={"help": "webdataset tars, streamed: paths or URLs, {000..099} for a range"}
    )


def open_images(
    images: Sequence[str] = (),
    dataset: str | None = None,
    split: str = "train",
    image_column: str = "image",
    shards: Sequence[str] = (),
) -> "FolderImages | DatasetImages | ShardImages":
    """The one source that is given.

    Args:
        images: folders, see `FolderImages`.
        dataset, split, image_column: see `DatasetImages`.
        shards: tar files, see `ShardImages`.

    Raises:
        ValueError: if none or more than one is given, if it cannot be opened, or files of folders are broken.
    """
    if sum(map(bool, (images, dataset, shards))) != 1:
        raise ValueError("Give exactly one of images (folders), dataset and shards.")
    if images:
        source = FolderImages(images)
        source.headers()  # names all broken files now: without them a run would be another one later
        return source
    return DatasetImages(dataset, split, image_column) if dataset else ShardImages(shards)


class FolderImages:
    """The image files (`IMAGE_SUFFIXES`) under one or several folders; `source[i]` is its key and the image.

    The key is the file's path relative to the folder, or to the folders' common parent, so that it is unique and
    stays the same where all are moved together. Sorted by key.

    Args:
        folders: searched as `find_files` does; other files are left out and counted.

    Raises:
        ValueError: for a folder that is not there or holds no image, and on access for a file that cannot be read.
    """

    def __init__(self, folders: Sequence[str | Path]):
        folders = [os.path.abspath(local_path(folder)) for folder in folders]
        self.root = os.path.commonpath(folders)
        keys, others = set(), Counter()
        for folder in folders:
            found = set()
            for path in find_files(folder):
                if path.name.lower().endswith(IMAGE_SUFFIXES):
                    found.add(path.relative_to(self.root).as_posix())
                else:
                    others[f"files ending in {path.suffix or 'nothing'}"] += 1
            if not found:
                raise ValueError(f"There is no image ({', '.join(IMAGE_SUFFIXES)}) under {folder}; check the folder.")
            keys |= found
        self.files = sorted(keys)
        say_what_is_read(self.root, f"{len(self.files)} images", Counter(dict(sorted(others.items()))))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, Image.Image]:
        path = self.path(self.files[index])
        return self.files[index], decode_image(path, path)

    def path(self, key: str) -> str:
        return os.path.join(self.root, key)

    def headers(self) -> list[Header]:
        """Of all files; ValueError naming the first ten that cannot be opened."""
        return read_headers([self.path(key) for key in self.files], self.root)

    def fingerprint(self) -> str:
        """Changes with any key and with the size in bytes of any file."""
        return hash_lines(f"{key} {os.path.getsize(self.path(key))}" for key in self.files)


class DatasetImages:
    """A split of a `datasets` dataset; `source[i]` is the row's number, as a string, and the image.

    Args:
        name: of a dataset on the Hub, or a directory: written by `save_to_disk`, or with images or parquet files.
        split: its name, or a slice such as "train[:10%]" except with `save_to_disk`.
        image_column: of images, or of their encoded bytes.
        rows: what `load_split` gives for them, if that is known already.

    Raises:
        ValueError: if it cannot be loaded or has no such split or column, and on access for an unreadable row.
    """

    def __init__(self, name: str, split: str = "train", image_column: str = "image", rows: Dataset | None = None):
        self.name, self.split, self.column = name, split, image_column
        rows = load_split(name, split) if rows is None else rows
        if image_column not in rows.column_names:
            raise ValueError(
                f"{name} has no column {image_column}; set the image column to one of {', '.join(rows.column_names)}."
            )
        try:
            # Not decoded by `datasets`, so that all sources are decoded alike.
            self.rows = rows.select_columns(image_column).cast_column(image_column, ImageFeature(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:
            kind = rows.features[image_column]
            raise ValueError(f"The column {image_column} of {name} holds {kind}, not images; set another.") from error
        if not len(self.rows):
            raise ValueError(f"The split {split} of {name} is empty; set another.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[str, Image.Image]:
        return str(index), decode_image(self.file(index), f"Row {index} of {self.name}, split {self.split},")

    def file(self, index: int) -> str | io.BytesIO:
        """Where the image of a row is, or its bytes."""
        encoded = self.rows[index][self.column] or {"bytes": b""}
        return encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"])

    def fingerprint(self) -> str:
        """Changes with the size in bytes of any row, or its file's name where the bytes are not in the dataset."""
        column = self.rows.data.column(self.column)  # read without the bytes themselves
        sizes = pc.binary_length(pc.struct_field(column, "bytes")).to_pylist()
        paths = pc.struct_field(column, "path").to_pylist()
        return hash_lines(
            f"{row} {os.path.basename(path or '') if size is None else size}"
            for row, (size, path) in enumerate(zip(sizes, paths, strict=True))
        )


def load_split(name: str, split: str) -> Dataset:
    """All columns of a split of a `datasets` dataset; ValueError if it cannot be loaded. See `DatasetImages`."""
    if not any(Path(name, file).is_file() for file in ("state.json", "dataset_dict.json")):
        try:
            return load_dataset(name, split=split)
        except (OSError, ValueError) as error:
            raise ValueError(f"The split {split} of {name} cannot be loaded: {error}") from error
    try:
        loaded = load_from_disk(name)
    except IndexError as error:
        raise ValueError(f"{name} has a split without rows, which cannot be loaded; save it without that.") from error
    splits = loaded if isinstance(loaded, DatasetDict) else {str(loaded.split or split): loaded}
    if split not in splits:
        raise ValueError(f"{name} has no split {split}; set it to one of {', '.join(splits)}.")
    return splits[split]


class ShardImages(Shards):
    """The images in webdataset tar shards: of each record the first one, and nothing else. See `Shards`."""

    needs = (IMAGE_SUFFIXES,)

    def decode(self, record: dict) -> Image.Image:
        ((name, encoded),) = record["members"]
        return decode_image(io.BytesIO(encoded), f"{name} in {record['shard']}")


class _Views:
    """What both datasets share: their arguments, the epoch, and how an image becomes an item."""

    def __init__(
        self,
        source: FolderImages | DatasetImages | ShardImages,
        size: int,
        patch_size: int = 16,
        teacher_size: int | None = None,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        views: int | None = None,
        seed: int = 0,
        noise_seed: int | None = None,
        cache=None,
    ):
        if size % patch_size:
            raise ValueError(f"size must be a multiple of the patch's {patch_size} pixels: got {size}.")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale must be 0 < least <= greatest <= 1, ratios of the image's area: got {crop_scale}."
            )
        if views is not None and views < 1:
            raise ValueError(f"views must be at least 1, or None for new ones in each epoch: got {views}.")
        if cache is not None and (views is None or views > cache.views):
            raise ValueError(f"The cache holds {cache.views} views of each image; set views to at most that.")
        self.source = source
        self.size = size
        self.patch_size = patch_size
        self.patches = (size // patch_size) ** 2
        self.teacher_size = teacher_size
        self.crop_scale = crop_scale
        self.views = views
        self.seed = seed
        self.noise_seed = seed if noise_seed is None else noise_seed
        self.cache = cache
        self.epoch = shared_number()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def item(self, key: str, image: Image.Image) -> dict:
        epoch = self.epoch.item()
        view = epoch % self.views if self.views else epoch
        key_hash = hash_key(key)
        generator = np.random.default_rng([self.seed, view, key_hash])
        # The last number keeps the noise apart from the crop; it is new in each epoch even where the view is not.
        noise = np.random.default_rng([self.noise_seed, epoch, key_hash, 1]).random(self.patches, dtype=np.float32)
        crop = image.crop(random_resized_crop(*image.size, self.crop_scale, generator))
        flip = generator.random() < 0.5
        item = {"key": key, "view": view, "pixel_values": _resize(crop, self.size, flip)}
        item["noise"] = torch.from_numpy(noise)
        if self.teacher_size is not None:
            item["teacher_pixels"] = _resize(crop, self.teacher_size, flip)
        if self.cache is not None:
            item["features"] = self.cache.read(key, view)
        return item


class ImageViews(_Views, data.Dataset):
    """A random resized crop of each image, flipped half of the time.

    An item depends on the seeds, the epoch and the key, and on nothing else. Call `set_epoch` before each epoch.

    Args:
        source: `FolderImages` or `DatasetImages`.
        size: side S of the student's square view in pixels.
        patch_size: of the student; N = (S / patch_size)^2 patches.
        teacher_size: side T of the teacher's square view, if it is needed.
        crop_scale: least and greatest ratio of the image's area in the crop, see `random_resized_crop`.
        views: how many crops of an image there are, repeated epoch by epoch; None for new ones in each epoch.
        seed: of the crops, which a cache shares.
        noise_seed: of the noise, and of the order of a stream; `seed` if not given.
        cache: a `FeatureCache` with at least that many views.

    Raises ValueError for arguments that do not fit together and for an image that cannot be read.
    """

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        """An item, which torch's default collate makes a batch of B of:

        `pixel_values` uint8 [3,S,S] (RGB, not normalised), `noise` float32 [N], uniform in [0, 1), `key` str, `view`
        int, and where asked for `teacher_pixels` uint8 [3,T,T], the same crop of the original image, and `features`
        float16 [N,C] of it.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        return self.item(*self.source[index])


class StreamedViews(Streamed, _Views):
    """The items of `ImageViews` from `ShardImages`, without an end: the training script says how long an epoch is.

    The order depends on noise_seed, epoch, number of processes and number of workers, see `Shards.stream`. An image
    that comes again within an epoch, in another pass or in the place of a broken one, has the same view and noise.

    Args:
        source, ...: see `ImageViews`.
        process_index, num_processes, shuffle_buffer: see `Shards.stream`.
    """

    def __init__(
        self,
        source: ShardImages,
        size: int,
        *args,
        process_index: int = 0,
        num_processes: int = 1,
        shuffle_buffer: int = 1000,
        **kwargs,
    ):
        _Views.__init__(self, source, size, *args, **kwargs)
        Streamed.__init__(self, source, self.noise_seed, process_index, num_processes, shuffle_buffer)


def hash_key(key: str) -> int:
    """64 bits that tell keys apart, the same in every process."""
    return int.from_bytes(hashlib.sha256(os.fsencode(key)).digest()[:8], "big")


def normalize(
    pixels: torch.Tensor,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> torch.Tensor:
    """RGB `[..., 3, H, W]`, uint8 or in [0, 1] -> float32 as a model takes it, by default ours: mean 0 and variance 1
    of ImageNet's pixels."""
    mean, std = torch.tensor([mean, std]).to(pixels.device, non_blocking=True)
    pixels = pixels / 255 if pixels.dtype == torch.uint8 else pixels
    return (pixels - mean[:, None, None]) / std[:, None, None]


def to_image(
    pixels: torch.Tensor,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Image.Image:
    """The inverse of `normalize`: `[3, H, W]` -> the image."""
    mean, std = torch.tensor([mean, std])
    pixels = pixels.float().cpu() * std[:, None, None] + mean[:, None, None]
    return Image.fromarray((255 * pixels).clamp(0, 255).byte().permute(1, 2, 0).numpy())


def _resize(crop: Image.Image, size: int, flip: bool) -> torch.Tensor:
    """uint8 [3,size,size]"""
    resized = crop.resize((size, size), Image.Resampling.BICUBIC)
    if flip:
        resized = ImageOps.mirror(resized)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()
