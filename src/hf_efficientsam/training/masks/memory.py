"""All images and masks of a training in the memory of its device, which draws and augments batches by itself.

N images of S x S pixels, M masks in all, kept as bits; B images a batch, Q masks an image.
"""

from collections import Counter

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hf_efficientsam.model.mask_operations_efficientsam import boxes_from_masks
from hf_efficientsam.training.data.augment import (
    MAX_IMAGE_FRACTION,
    MIN_KEPT_FRACTION,
    MIN_OUTPUT_PIXELS,
    change_color,
    crop_image,
    large_enough_masks,
)
from hf_efficientsam.training.data.mask_bits import pack_masks, unpack_masks
from hf_efficientsam.training.data.rle_resizing import resize_rles
from hf_efficientsam.training.data.sa1b import Sa1bShards

from .batch import Batch


class MasksInMemory:
    """
    Images and masks of SA-1B shards, such as `pack_masks.py` writes, on a device.

    Args:
        shards: see `Sa1bShards`; one that is named twice weighs double.
        size: S; images are squashed to it.
        device: where they are kept: 0.8 MB an image and 32 KiB a mask at 512 pixels.
        num_workers: processes that read, each a shard at a time.

    Raises:
        ValueError: for shards that are not there, or without masks.
    """

    def __init__(self, shards: list[str], size: int, device: torch.device | str, num_workers: int = 0):
        times = Counter(Sa1bShards(shards).shards)
        data = _ShardArrays(Sa1bShards(list(times)), size)
        parts = list(DataLoader(data, batch_size=None, num_workers=num_workers))
        counts = torch.cat([part["counts"] for part in parts])
        if not len(counts):
            raise ValueError("There is no image with masks in the shards; check the files.")
        weights = [torch.full((len(part["counts"]),), float(n)) for part, n in zip(parts, times.values(), strict=True)]
        self.size, self.device = size, torch.device(device)
        self.images = torch.cat([part["images"] for part in parts]).to(device)  # uint8 [N,3,S,S]
        self.bits = torch.cat([part["bits"] for part in parts]).to(device)  # uint8 [M,S,S/8], by image
        self.counts = counts.to(device)  # of each image's masks
        self.starts = self.counts.cumsum(0) - self.counts
        self.most = int(counts.max())
        self.weights = torch.cat(weights).to(device)
        self.boxes = torch.cat([boxes_from_masks(self.masks(part)) for part in torch.arange(len(self.bits)).split(64)])

    def __len__(self) -> int:
        return len(self.images)

    def masks(self, index: torch.Tensor) -> torch.Tensor:
        """uint8 `[..., S, S]` of 0 and 1, of masks by their numbers."""
        return unpack_masks(self.bits[index.to(self.device)])

    def batch(
        self,
        num_images: int,
        num_masks: int,
        noise_size: int,
        generator: torch.Generator,
        crop_scale: float = 0.3,
        color_jitter: float = 0.2,
    ) -> Batch:
        """
        Random images in random crops, half of them mirrored, resized to S x S.

        Args:
            num_images, num_masks: B and Q. An image that shows fewer masks has some of them several times.
            noise_size: K, see `PromptConfig`.
            generator: source of all randomness, on the device.
            crop_scale, color_jitter: as of `random_crop_flip`. As there, a mask of which too little is left, or that
                fills the crop, is not valid.
        """

        def uniform(*shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=generator, device=self.device)

        images = torch.multinomial(self.weights, num_images, replacement=True, generator=generator)
        crops = random_crops(uniform(num_images, 4), crop_scale)
        grid = sampling_grid(crops, uniform(num_images) < 0.5, self.size)
        pixels = F.grid_sample(self.images[images].float() / 255, grid, padding_mode="border", align_corners=False)
        pixels = change_color(pixels, 1 + color_jitter * (2 * uniform(num_images, 3) - 1))
        mean, std = (pixels.new_tensor(one)[:, None, None] for one in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))

        chosen = self.choose_masks(images, crops, uniform(num_images, self.most), num_masks)
        whole = self.masks(chosen)
        masks = F.grid_sample(whole.float(), grid, align_corners=False) >= 0.5
        before, after = (one.sum((-2, -1), dtype=torch.int32) for one in (whole, masks))
        width, height = (crops[:, 2:] - crops[:, :2]).unbind(-1)
        shown = after * (width * height)[:, None] / before
        valid = (shown >= MIN_KEPT_FRACTION) & (after >= MIN_OUTPUT_PIXELS)
        valid &= after <= MAX_IMAGE_FRACTION * self.size**2
        noise = uniform(num_images, num_masks, noise_size)
        return Batch((pixels - mean) / std, pack_masks(masks.byte()), valid, noise, keys=[])

    def choose_masks(
        self, images: torch.Tensor, crops: torch.Tensor, order: torch.Tensor, num_masks: int
    ) -> torch.Tensor:
        """Numbers `[B, Q]` of masks of the images [B] whose boxes lie mostly in the crops [B,4], in the random order
        `[B, most]`; where none does, of any."""
        place = torch.arange(self.most, device=self.device)
        exists = place < self.counts[images, None]
        boxes = self.boxes[(self.starts[images, None] + place).clamp(max=len(self.boxes) - 1)] / self.size
        left_top = torch.maximum(boxes[..., :2], crops[:, None, :2])
        right_bottom = torch.minimum(boxes[..., 2:], crops[:, None, 2:])
        inside = (right_bottom - left_top).clamp(min=0).prod(-1)
        shown = exists & (inside >= 0.5 * (boxes[..., 2:] - boxes[..., :2]).prod(-1))
        order = (order + 2 * ~exists + (exists & ~shown)).argsort(-1)
        count = torch.where(shown.any(-1), shown.sum(-1), self.counts[images])
        places = torch.arange(num_masks, device=self.device) % count[:, None]
        return self.starts[images, None] + order.gather(-1, places)


def random_crops(uniform: torch.Tensor, scale: float) -> torch.Tensor:
    """Boxes (left, top, right, bottom) [B,4] in fractions of the image from random numbers [B,4]: of at least `scale`
    of its area, and of 3/4 to 4/3 of its aspect ratio."""
    area, ratio, x, y = uniform.unbind(-1)
    area = scale + area * (1 - scale)
    # Ratios that would not fit into the image are not drawn.
    lowest, highest = area.clamp(min=3 / 4).log(), (1 / area).clamp(max=4 / 3).log()
    ratio = (lowest + ratio * (highest - lowest)).exp()
    width, height = (area * ratio).sqrt(), (area / ratio).sqrt()
    left, top = x * (1 - width), y * (1 - height)
    return torch.stack([left, top, left + width, top + height], -1)


def sampling_grid(crops: torch.Tensor, mirrored: torch.Tensor, size: int) -> torch.Tensor:
    """The grid [B,S,S,2] that `grid_sample` takes, for crops [B,4] as of `random_crops`, mirrored where that is so."""
    left, top, right, bottom = crops.unbind(-1)
    zero = torch.zeros_like(left)
    across = torch.stack([torch.where(mirrored, left - right, right - left), zero, left + right - 1], -1)
    down = torch.stack([zero, bottom - top, top + bottom - 1], -1)
    return F.affine_grid(torch.stack([across, down], 1), (len(crops), 1, size, size), align_corners=False)


class _ShardArrays(Dataset):
    """Of each shard `images` [n,3,S,S], `bits` [m,S,S/8] of their masks, and `counts` [n] of these."""

    def __init__(self, source: Sa1bShards, size: int):
        self.source, self.size = source, size

    def __len__(self) -> int:
        return len(self.source.shards)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        images, bits, counts = [], [torch.zeros(0, self.size, self.size // 8, dtype=torch.uint8)], []
        for _, sample in self.source.read(index):
            whole = (0, 0, *sample.image.size)
            masks = resize_rles(sample.rles, whole, self.size)
            masks = masks[large_enough_masks(masks)]
            if len(masks):
                pixels = 255 * crop_image(sample.image, whole, self.size)
                images.append(pixels.round().byte())
                bits.append(pack_masks(masks))
                counts.append(len(masks))
        stacked = torch.stack(images) if images else torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8)
        return {"images": stacked, "bits": torch.cat(bits), "counts": torch.tensor(counts)}
