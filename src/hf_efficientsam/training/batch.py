"""From samples to the batches that training consumes."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .augment import random_crop_flip
from .data.coco import CocoMasks


@dataclass
class Batch:
    """B images with Q masks each; images with fewer are padded with empty masks that are not `valid`.

    pixel_values float32 [B,3,S,S] (ImageNet normalised), masks uint8 [B,Q,S,S] of 0 and 1, valid bool [B,Q],
    image_ids: B of them.
    """

    pixel_values: torch.Tensor
    masks: torch.Tensor
    valid: torch.Tensor
    image_ids: list[int]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function) -> "Batch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: function(v) if isinstance(v, torch.Tensor) else v for name, v in values.items()})


class MaskTrainingSet(Dataset):
    """Augmented images with their masks from one or several `CocoMasks`.

    An item depends on (seed, epoch, index) and on nothing else, so a resumed run sees the data that an uninterrupted
    one does, with any number of workers. Call `set_epoch` before each epoch.

    Args:
        datasets: read one after the other.
        size: side S of the images in pixels.
        max_masks, scale, color_jitter: see `random_crop_flip`.
        seed: of all augmentation.
    """

    def __init__(
        self,
        datasets: CocoMasks | Sequence[CocoMasks],
        size: int,
        max_masks: int = 16,
        scale: tuple[float, float] = (0.3, 1.0),
        color_jitter: float = 0.0,
        seed: int = 0,
    ):
        self.datasets = [datasets] if isinstance(datasets, CocoMasks) else list(datasets)
        self.ends = list(accumulate(len(dataset) for dataset in self.datasets))
        if not any(self.ends):
            raise ValueError("There is no image with masks to train on; check the annotation files.")
        self.size = size
        self.max_masks = max_masks
        self.scale = scale
        self.color_jitter = color_jitter
        self.seed = seed
        # In shared memory, because persistent workers keep the copy of this object that they were started with.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict:
        """`pixel_values` float32 [3,S,S], `masks` uint8 [N,S,S] with 1 <= N <= max_masks, `image_id`."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        which = bisect_right(self.ends, index)
        dataset = self.datasets[which]
        sample = dataset[index - self.ends[which] + len(dataset)]
        state = np.random.SeedSequence([self.seed, self.epoch.item(), index]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        image, masks = random_crop_flip(
            sample.image, sample.rles, self.size, generator, self.scale, self.max_masks, self.color_jitter
        )
        mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
        pixel_values = (image - mean[:, None, None]) / std[:, None, None]
        return {"pixel_values": pixel_values, "masks": masks, "image_id": sample.image_id}


def collate(items: list[dict]) -> Batch:
    """Items of `MaskTrainingSet` -> `Batch`, Q being the largest number of masks among them."""
    counts = torch.tensor([len(item["masks"]) for item in items])
    size = items[0]["masks"].shape[-2:]
    masks = torch.zeros(len(items), int(counts.max()), *size, dtype=torch.uint8)
    for padded, item in zip(masks, items, strict=True):
        padded[: len(item["masks"])] = item["masks"]
    return Batch(
        pixel_values=torch.stack([item["pixel_values"] for item in items]),
        masks=masks,
        valid=torch.arange(masks.shape[1]) < counts[:, None],
        image_ids=[item["image_id"] for item in items],
    )
