"""Features of images on disk: of each image and each of its views, in half precision, such as a teacher's.

FOLDER/manifest.json                        what the features depend on; written first
FOLDER/view_0000/part_000000.safetensors    of n images: `features` float16 [n, N, C], `key_hashes` and
                                            `checksums` int64 [n]
FOLDER/index.safetensors                    where to find each key; written last, so a cache that has it is complete

A part holds the same images in every view, so one index serves them all: a sorted 64-bit hash, a part and a row for
each image, 16 bytes, 20 MB for ImageNet however many views there are. Random crops are cached one by one rather than
cut out of the features of the whole image, because only so does the cache hold what the teacher says of that crop.
"""

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save as save_arrays
from safetensors.torch import save
from torch.utils.data import IterableDataset, get_worker_info

from hf_efficientsam.training.data.images import ImageViews, ShardImages, StreamedViews, hash_key
from hf_efficientsam.training.engine.reports import replace_text

AGAIN = "run the same command again, which keeps what is done"
INFORMATIVE = ("teacher.name", "teacher.dtype")  # a teacher that has moved or runs on another device is the same one


class FeatureCache:
    """
    Features that `training/cache_features.py` has written, read row by row. Files are opened for each read (less
    than 0.1 ms), so the object can be sent to the workers of a DataLoader and holds no more than the index.

    Args:
        folder: of the cache.
        expected: names and values that the manifest must agree with, some or all of those in `open_manifest`.

    Attributes: `manifest`, `views` (how many of each image), `width` (C).

    Raises:
        ValueError: if there is no complete cache, or one of something else.
    """

    def __init__(self, folder: str | Path, expected: dict):
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        if self.manifest is None:
            raise ValueError(f"{folder} holds no feature cache; make one with training/cache_features.py.")
        _compare(self.folder, self.manifest, expected)
        self.views, self.width = (self.manifest.get(name) for name in ("views", "width"))
        if not isinstance(self.views, int) or not isinstance(self.width, int):
            raise ValueError(
                f"{self.folder / 'manifest.json'} lacks the number of views or the width; start a new cache."
            )
        try:
            self.index = load_arrays(self.folder / "index.safetensors")
        except FileNotFoundError:
            raise ValueError(f"The feature cache {folder} is not complete; {AGAIN}.") from None
        except SafetensorError as error:
            raise ValueError(f"{self.folder / 'index.safetensors'} is damaged ({error}); {AGAIN}.") from None
        if self.index.keys() != {"key_hashes", "parts", "rows"} or len({len(one) for one in self.index.values()}) > 1:
            raise ValueError(f"{self.folder / 'index.safetensors'} is damaged; {AGAIN}.")

    def __len__(self) -> int:
        """The number of images."""
        return len(self.index["key_hashes"])

    def __contains__(self, key: str) -> bool:
        return self._position(key) is not None

    def read(self, key: str, view: int) -> torch.Tensor:
        """
        The features float16 [N, C] of a view, row by row.

        Raises:
            ValueError: if it is not in the cache, or its file is gone or damaged.
        """
        position = self._position(key)
        if position is None or not 0 <= view < self.views:
            raise ValueError(
                f"View {view} of {key} is not in {self.folder}, which holds {self.views} view(s) of {len(self)} "
                "images; run training/cache_features.py on this data."
            )
        path = part_path(self.folder, view, int(self.index["parts"][position]))
        row = int(self.index["rows"][position])
        with _open_part(path) as part:
            # A copy, because the slice would keep the whole file in memory.
            features = part.get_slice("features")[row].clone()
            expected = part.get_slice("checksums")[row] if "checksums" in part.keys() else None  # noqa: SIM118
        if expected is not None and checksum(features) != int(expected):  # parts of 0.1.0 have none
            raise ValueError(f"{path} is damaged (its checksum differs); delete it and {AGAIN}.")
        return features

    def _position(self, key: str) -> int | None:
        """The place of a key in the index, which is sorted."""
        hashes, key_hash = self.index["key_hashes"], _hash_key(key)
        position = int(np.searchsorted(hashes, key_hash))
        return position if position < len(hashes) and hashes[position] == key_hash else None


def open_manifest(folder: str | Path, manifest: dict) -> None:
    """
    Starts a cache, or goes on with the one that is there.

    Args:
        folder: is made if it is not there.
        manifest: what the features depend on, named as the options are: `teacher` (its description), `width`, `size`,
            `patch_size`, `crop_scale`, `views`, `view_seed`, `part_size` and `data` (the source's fingerprint).

    Raises:
        ValueError: if the folder holds a cache with another manifest.
    """
    folder = Path(folder)
    if (before := _read_manifest(folder)) is not None:
        _compare(folder, before, manifest)
        return
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


class ViewParts(IterableDataset):
    """
    What the teacher is to see of whole parts of a view, without shuffling and repeating. Each worker reads parts of
    its own, so batches of different parts alternate.

    Args:
        views: set to the view with `set_epoch`; with a `teacher_size`.
        parts: the numbers of those to read; a part is a shard of `ShardImages`, or `part_size` images.
        batch_size: images in a batch, fewer at the end of a part.

    Yields (part, keys, teacher_pixels uint8 [B,3,T,T]), and (part, [], None) at the end of each part.
    """

    def __init__(self, views: ImageViews | StreamedViews, parts: Sequence[int], part_size: int, batch_size: int):
        self.views, self.parts, self.part_size, self.batch_size = views, parts, part_size, batch_size

    @staticmethod
    def count(views: ImageViews | StreamedViews, part_size: int) -> int:
        """How many parts there are in all."""
        if isinstance(views.source, ShardImages):
            return len(views.source.shards)
        return -(-len(views.source) // part_size)

    def __iter__(self) -> Iterator[tuple[int, list[str], torch.Tensor | None]]:
        worker = get_worker_info()
        for part in self.parts if worker is None else self.parts[worker.id :: worker.num_workers]:
            images = self._read(part)
            while items := [self.views.item(key, image) for key, image in islice(images, self.batch_size)]:
                yield part, [item["key"] for item in items], torch.stack([item["teacher_pixels"] for item in items])
            yield part, [], None

    def _read(self, part: int) -> Iterator[tuple[str, Image.Image]]:
        """Key and image of each image of a part."""
        source, first = self.views.source, part * self.part_size
        if isinstance(source, ShardImages):
            return source.read(part)
        return (source[i] for i in range(first, min(first + self.part_size, len(source))))


def part_path(folder: str | Path, view: int, part: int) -> Path:
    """The file of a part of a view's features."""
    return Path(folder) / f"view_{view:04d}" / f"part_{part:06d}.safetensors"


def write_part(folder: str | Path, view: int, part: int, keys: list[str], features: torch.Tensor) -> None:
    """
    `features` [n, N, C] of a view of the n images with `keys`. The file is there whole or not at all.

    Raises:
        ValueError: if a feature is beyond float16, or if the file cannot be written.
    """
    features = features.to("cpu", torch.float16).contiguous()
    finite = features.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        broken = keys[int(finite.int().argmin())]
        raise ValueError(f"The teacher's features of {broken} do not fit into float16; choose another teacher.")
    key_hashes = torch.tensor([_hash_key(key) for key in keys], dtype=torch.int64)
    checksums = torch.tensor([checksum(row) for row in features], dtype=torch.int64)
    tensors = {"features": features, "key_hashes": key_hashes, "checksums": checksums}
    _write(part_path(folder, view, part), save(tensors))


def checksum(features: torch.Tensor) -> int:
    """CRC-32 of a contiguous tensor's bytes: a flipped bit passes for a number, and nothing else would tell."""
    return zlib.crc32(features.numpy())


def write_index(folder: str | Path, num_parts: int, views: int) -> None:
    """
    Completes a cache of which all parts are there.

    Raises:
        ValueError: if a part is missing or damaged, if views differ in their images, or if two images share a key.
    """
    hashes = []
    for part in range(num_parts):
        first, *others = [_read_hashes(part_path(folder, view, part)) for view in range(views)]
        if not all(np.array_equal(first, other) for other in others):
            raise ValueError(f"Part {part} of {folder} does not hold the same images in all views; start a new cache.")
        hashes.append(first)
    parts = np.repeat(np.arange(num_parts, dtype=np.int32), [len(part) for part in hashes])
    rows = np.concatenate([np.arange(len(part), dtype=np.int32) for part in hashes])
    hashes = np.concatenate(hashes)
    order = np.argsort(hashes, kind="stable")
    hashes, parts, rows = hashes[order], parts[order], rows[order]
    # Hashes of different keys collide with a chance of 4e-8 in ImageNet: if so, that too is found here.
    if len(same := np.flatnonzero(hashes[1:] == hashes[:-1])):
        places = " and ".join(f"row {rows[i]} of part {parts[i]}" for i in (same[0], same[0] + 1))
        raise ValueError(f"Two images have the same key ({places}); give each image in the data a key of its own.")
    _write(Path(folder) / "index.safetensors", save_arrays({"key_hashes": hashes, "parts": parts, "rows": rows}))


def _write(path: Path, content: bytes) -> None:
    """The file appears under its name only when it is whole and on the disk."""
    writing = path.with_suffix(".writing")
    try:
        path.parent.mkdir(exist_ok=True)
        with writing.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        writing.replace(path)
    except OSError as error:
        writing.unlink(missing_ok=True)
        raise ValueError(f"{path} cannot be written ({error.strerror}); mend that and {AGAIN}.") from None


def _hash_key(key: str) -> int:
    """As int64, which safetensors and torch know."""
    return int(np.uint64(hash_key(key)).astype(np.int64))


def _read_manifest(folder: Path) -> dict | None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("it holds no object")
        return manifest
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder / 'manifest.json'} cannot be read ({error}); start a new cache.") from None


def _compare(folder: Path, manifest: dict, expected: dict) -> None:
    there, wanted = _flatten(manifest), _flatten(json.loads(json.dumps(expected)))  # in json tuples are lists
    different = [
        f"{name} is {there.get(name)}, not {value}"
        for name, value in wanted.items()
        if name not in INFORMATIVE and there.get(name) != value
    ]
    if different:
        raise ValueError(
            f"{folder} holds a feature cache made with other options; use those or another folder: "
            f"{'; '.join(different)}."
        )


def _flatten(values: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat = {}
    for name, value in values.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


@contextmanager
def _open_part(path: Path) -> Iterator[safe_open]:
    """A ValueError if there is none, or if what is read from it is not there."""
    try:
        with safe_open(path, "pt") as part:
            yield part
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {AGAIN}.") from None
    except (SafetensorError, IndexError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and {AGAIN}.") from None


def _read_hashes(path: Path) -> np.ndarray:
    with _open_part(path) as part:
        return part.get_tensor("key_hashes").numpy()
