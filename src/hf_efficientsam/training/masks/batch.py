"""From samples to the batches that mask training consumes."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_efficientsam.training.data.augment import any_masks, crop_image, crop_masks, random_crop_flip
from hf_efficientsam.training.data.coco import AnnotationConfig, CocoMasks, Sample, with_folders
from hf_efficientsam.training.data.dataset_masks import DatasetMasks
from hf_efficientsam.training.data.folder_masks import FolderMasks, open_annotations
from hf_efficientsam.training.data.images import hash_key, normalize
from hf_efficientsam.training.data.mask_bits import unpack_masks
from hf_efficientsam.training.data.sa1b import Sa1bShards
from hf_efficientsam.training.data.shards import Streamed, hash_lines, shared_number
from hf_efficientsam.training.engine.config import NotNegativeFloat, PositiveInt, PositiveRatio

from .input_formats import OUR_FORMAT, InputFormat, pad_to_square
from .views import View, view_of


@dataclass
class Batch:
    """B images with Q masks each; images with fewer are padded with empty masks that are not `valid`.

    pixel_values float32 [B,3,S,S] (normalised), None where cached features stand for them; mask_bits uint8
    [B,Q,S,S/8] (see `unpack_masks`), valid bool [B,Q], noise float32 [B,Q,K] (uniform, for the prompts), keys: B names
    of images. Of `MaskViews` also the images' indices, and which of its fixed views each is shown in.
    """

    pixel_values: torch.Tensor | None
    mask_bits: torch.Tensor
    valid: torch.Tensor
    noise: torch.Tensor
    keys: list[str]
    indices: list[int] = field(default_factory=list)
    views: list[int] = field(default_factory=list)

    @property
    def masks(self) -> torch.Tensor:
        """uint8 [B,Q,S,S] of 0 and 1, made at each call, on the device of the bits."""
        return unpack_masks(self.mask_bits)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: function(v) if isinstance(v, torch.Tensor) else v for name, v in values.items()})


@dataclass(frozen=True)
class CropConfig:
    """What of an image becomes the model's input."""

    image_size: PositiveInt | None = field(
        default=None, metadata={"help": "side of the model input in pixels; by default that of the model"}
    )
    crop_scale: PositiveRatio = field(
        default=0.3, metadata={"help": "smallest part of an image's area that a crop keeps"}
    )
    color_jitter: NotNegativeFloat = field(
        default=0.2, metadata={"help": "strength of brightness, contrast, saturation changes"}
    )


@dataclass(frozen=True)
class MaskDataConfig(AnnotationConfig, CropConfig):
    """Which masks are trained on, and how their images are augmented."""

    train: list[str] = field(
        default_factory=list,
        metadata={
            "help": "json as COCO's; folders: images/ with masks/, YOLO's, labelme's; one named twice weighs double"
        },
    )
    images: list[str] = field(
        default_factory=list, metadata={"help": "folder of the json files' images, or one for each"}
    )
    dataset: str | None = field(default=None, metadata={"help": "or a `datasets` dataset: Hub name or directory"})
    split: str = field(default="train", metadata={"help": "of the dataset"})
    image_column: str = field(default="image", metadata={"help": "of the dataset"})
    mask_column: str = field(default="masks", metadata={"help": "of the dataset"})
    shards: list[str] = field(
        default_factory=list, metadata={"help": "or SA-1B's tars, streamed: paths or URLs, {000..099} for a range"}
    )
    every: PositiveInt = field(
        default=1, metadata={"help": "take only every so many-th image of json files or a dataset"}
    )
    flip: bool = field(default=True, metadata={"help": "half of the images are mirrored"})
    max_masks: PositiveInt = field(default=12, metadata={"help": "masks an image and step"})
    prompts_per_mask: PositiveInt = field(default=1, metadata={"help": "prompts for each mask, each drawn anew"})


class _Items:
    """What both datasets share: their arguments, the epoch, and how a sample becomes an item."""

    def __init__(
        self, options: MaskDataConfig, noise_size: int = 0, seed: int = 0, input_format: InputFormat = OUR_FORMAT
    ):
        self.options, self.noise_size, self.seed, self.format = options, noise_size, seed, input_format
        self.epoch = shared_number()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def make(self, name: str, sample: Sample, number: int) -> dict:
        """`pixel_values` float32 [3,S,S], `mask_bits` uint8 [N,S,S/8] with 1 <= N <= max_masks * prompts_per_mask,
        `noise` float32 [N,K] and `key` of a sample; its chance depends on (seed, epoch, number)."""
        options, size = self.options, self.options.image_size
        generator = self.chance(number)
        image, masks = random_crop_flip(
            sample.image, sample.rles, size, generator, (options.crop_scale, 1.0), options.max_masks,
            options.color_jitter, options.flip, self.format.keeps_aspect_ratio, self.format.antialias,
        )  # fmt: skip
        pixel_values = self.format.normalize(image, size)
        return {"pixel_values": pixel_values, **self.prompted(pad_to_square(masks, size), generator), "key": name}

    def prompted(self, masks: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """The masks as often as they are prompted, and the uniform random numbers of their prompts."""
        bits = torch.from_numpy(np.packbits(masks.numpy(), axis=-1)).repeat_interleave(
            self.options.prompts_per_mask, dim=0
        )
        return {"mask_bits": bits, "noise": torch.rand(len(bits), self.noise_size, generator=generator)}

    def chance(self, number: int) -> torch.Generator:
        state = np.random.SeedSequence([self.seed, self.epoch.item(), number]).generate_state(1)
        return torch.Generator().manual_seed(int(state[0]))


class MaskTrainingSet(_Items, Dataset):
    """Augmented images with their masks from one or several sources, to be batched by `collate`.

    An item depends on (seed, epoch, index) and on nothing else, so a resumed run sees the data that an uninterrupted
    one does, with any number of workers. Call `set_epoch` before each epoch.

    Args:
        sources: `CocoMasks`, `DatasetMasks` or what behaves like them, read one after the other.
        options: `every`, `image_size` and what `random_crop_flip` takes.
        noise_size: K, see `PromptConfig`.
        seed: of all chance.
        input_format: what the model takes; by default ours.
    """

    def __init__(
        self,
        sources: Sequence,
        options: MaskDataConfig,
        noise_size: int = 0,
        seed: int = 0,
        input_format: InputFormat = OUR_FORMAT,
    ):
        super().__init__(options, noise_size, seed, input_format)
        self.sources = list(sources)
        self.ends = list(accumulate(len(range(0, len(source), options.every)) for source in self.sources))
        if not any(self.ends):
            raise ValueError("There is no image with masks to train on; check the annotation files.")

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict:
        return self.make(*self.sample(index), index)

    def sample(self, index: int, with_image: bool = True) -> tuple[str, Sample]:
        """Name and sample of an image, as its source has it."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        first, row = self._place(index)
        source = self.sources[first]
        sample = source[row] if with_image else source.without_image(row)
        source = sample.source + (f" (file {first + 1})" if first else "")  # folders of one name are two sources
        return f"{source}/{sample.image_id}", sample

    def _place(self, index: int) -> tuple[int, int]:
        """The number of the source, the first of those that are the same, and the row in it."""
        which = bisect_right(self.ends, index)
        start = self.ends[which - 1] if which else 0
        return self._first(which), (index - start) * self.options.every

    def _first(self, which: int) -> int:
        """The number of the first source that is the same as this one."""
        return next(i for i, source in enumerate(self.sources) if source is self.sources[which])


class MaskViews(MaskTrainingSet):
    """
    The items of `MaskTrainingSet` with each image in one of its fixed views, drawn anew in every epoch, in place of a
    random crop; an item has its `index` and the number of its `view`.

    Args:
        sources, options, noise_size, seed: see `MaskTrainingSet`; crops, flips and colours are not used.
        views: how many each image has, see `view_of`; one number, or one for each source.
        with_pixels: whether items have `pixel_values`; without them no image is read.

    Raises:
        ValueError: if there are not as many numbers as sources, or two of them for one source.
    """

    def __init__(
        self,
        sources: Sequence,
        options: MaskDataConfig,
        noise_size: int = 0,
        seed: int = 0,
        views: Sequence[int] = (1,),
        with_pixels: bool = True,
    ):
        super().__init__(sources, options, noise_size, seed)
        if len(views) not in (1, len(self.sources)):
            raise ValueError(f"Give --views one number, or one for each of the {len(self.sources)} files of --train.")
        self.views = list(views) * len(self.sources) if len(views) == 1 else list(views)
        if any(self.views[self._first(which)] != number for which, number in enumerate(self.views)):
            raise ValueError("--views gives two numbers to one file of --train; give the same to both.")
        self.with_pixels = with_pixels

    def __getitem__(self, index: int) -> dict:
        name, sample = self.sample(index, self.with_pixels)
        generator = self.chance(index)
        number = int(torch.randint(self.views[self._place(index)[0]], (), generator=generator))
        size, max_masks = self.options.image_size, self.options.max_masks
        view = view_of(name, number, sample.rles)
        masks = crop_masks(sample.rles, view.box, (size, size), max_masks, generator)
        if not len(masks):  # of an image whose masks are all too small or too large
            number = min(number, 1)
            view = view_of(name, number, sample.rles)
            masks = any_masks(sample.rles, size, max_masks, generator)
        masks = masks.flip(-1) if view.is_mirrored else masks
        item = {**self.prompted(masks, generator), "key": name, "index": index, "view": number}
        return item | ({"pixel_values": self._pixels(sample, view)} if self.with_pixels else {})

    def view_pixels(self, index: int, number: int) -> tuple[str, torch.Tensor]:
        """Name and pixels float32 [3,S,S] of a view of an image."""
        name, sample = self.sample(index)
        return name, self._pixels(sample, view_of(name, number, sample.rles))

    def _pixels(self, sample: Sample, view: View) -> torch.Tensor:
        pixels = normalize(crop_image(sample.image, view.box, self.options.image_size))
        return pixels.flip(-1) if view.is_mirrored else pixels

    def distinct_sources(self) -> dict[int, range]:
        """The numbers of the sources, each once though some come twice, and the indices of their images."""
        starts = [0, *self.ends]
        numbers = [which for which in range(len(self.sources)) if self._first(which) == which]
        return {which: range(starts[which], self.ends[which]) for which in numbers}

    def fingerprint(self, which: int) -> str:
        """Changes with the images and the masks of a source."""
        return hash_lines([self.sources[which].fingerprint(), str(self.options.every)])


class StreamedMasks(Streamed, _Items):
    """The items of `MaskTrainingSet` from `Sa1bShards`, without an end; see `Streamed` for order and splitting.

    An item depends on (seed, epoch, key): an image that comes again within an epoch is the same.
    """

    def __init__(
        self,
        source: Sa1bShards,
        options: MaskDataConfig,
        noise_size: int = 0,
        seed: int = 0,
        input_format: InputFormat = OUR_FORMAT,
        **streaming: int,
    ):
        _Items.__init__(self, options, noise_size, seed, input_format)
        Streamed.__init__(self, source, seed, **streaming)

    def item(self, key: str, sample: Sample) -> dict:
        return self.make(f"{sample.source}/{key}", sample, hash_key(key))


def open_masks(options: MaskDataConfig) -> list[CocoMasks | FolderMasks] | list[DatasetMasks] | Sa1bShards:
    """
    The sources that are given.

    Raises:
        ValueError: if none or more than one kind is given, or if it cannot be opened.
    """
    if sum(map(bool, (options.train, options.dataset, options.shards))) != 1:
        raise ValueError("Give --train COCO-style json files or folders, or --dataset, or --shards.")
    if options.shards:
        return Sa1bShards(options.shards, reading=options)
    if options.dataset:
        return [
            DatasetMasks(options.dataset, options.split, options.image_column, options.mask_column, reading=options)
        ]
    pairs = with_folders(options.train, options.images, "--train")
    read = {pair: open_annotations(*pair, options) for pair in dict.fromkeys(pairs)}
    return [read[pair] for pair in pairs]


def collate(items: list[dict]) -> Batch:
    """Items of `MaskTrainingSet` -> `Batch`, Q being the largest number of masks among them."""
    counts = torch.tensor([len(item["mask_bits"]) for item in items])

    def padded(name: str) -> torch.Tensor:
        first = items[0][name]
        stacked = torch.zeros(len(items), int(counts.max()), *first.shape[1:], dtype=first.dtype)
        for row, item in zip(stacked, items, strict=True):
            row[: len(item[name])] = item[name]
        return stacked

    mask_bits = padded("mask_bits")
    return Batch(
        pixel_values=torch.stack([item["pixel_values"] for item in items]) if "pixel_values" in items[0] else None,
        mask_bits=mask_bits,
        valid=torch.arange(mask_bits.shape[1]) < counts[:, None],
        noise=padded("noise"),
        keys=[item["key"] for item in items],
        indices=[item["index"] for item in items if "index" in item],
        views=[item["view"] for item in items if "view" in item],
    )
