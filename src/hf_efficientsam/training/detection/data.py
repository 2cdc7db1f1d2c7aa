"""What a detector is trained on: images with their objects, much smaller or larger than they are."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from hf_efficientsam.model.mask_operations_efficientsam import boxes_from_masks
from hf_efficientsam.training.data.coco import CocoMasks, decode_rles
from hf_efficientsam.training.data.images import normalize
from hf_efficientsam.training.data.shards import shared_number


def fit(image: Image.Image, size: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """An image as the detector sees it: normalised `[3, size, size]`, zeros below and right of it, and the height and
    width that the image itself takes of that."""
    ratio = size / max(image.size)
    width, height = (max(1, round(side * ratio)) for side in image.size)
    pixels = _to_tensor(image.resize((width, height), Image.Resampling.BILINEAR))
    return F.pad(pixels, (0, size - width, 0, size - height)), (height, width)


def large_scale_jitter(
    image: Image.Image,
    rles: list[dict],
    size: int,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.1, 2.0),
    flip: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    An image much smaller or larger than it is (arXiv 2012.07177): what is too large for the square is cropped at
    random, what is too small padded below and to the right.

    Args:
        image: RGB.
        rles: compressed COCO RLEs at the image's size, at least one.
        size: side S of the square in pixels.
        generator: source of all randomness, on the CPU.
        scale: least and greatest length of the image's longer side, as a ratio of S; uniform between.
        flip: mirrored half of the time.

    Returns:
        image float32 `[3, S, S]`, normalised, zeros where it is padded; masks uint8 `[N, S, S]` of 0 and 1, none
        empty; and which of the `rles` they are, int64 `[N]`. N may be 0.
    """
    if not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale is a range of sizes, 0 < least <= greatest: got {scale}.")
    uniform, x, y, mirror = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    ratio = (scale[0] + uniform * (scale[1] - scale[0])) * size / max(image.size)
    shown = [min(side, max(1, round(size / ratio))) for side in image.size]  # width and height in pixels of the image
    width, height = (min(size, max(1, round(side * ratio))) for side in shown)
    left, top = (int(place * (side - part + 1)) for place, side, part in zip((x, y), image.size, shown, strict=True))
    right, bottom = left + shown[0], top + shown[1]

    pixels = _to_tensor(image.crop((left, top, right, bottom)).resize((width, height), Image.Resampling.BILINEAR))
    masks = torch.from_numpy(decode_rles(rles))[:, None, top:bottom, left:right]
    masks = F.interpolate(masks * 255, (height, width), mode="bilinear", antialias=True)[:, 0] >= 128
    kept = masks.flatten(1).any(1).nonzero()[:, 0]
    masks = masks[kept].byte()
    if flip and mirror < 0.5:
        pixels, masks = pixels.flip(-1), masks.flip(-1)
    padding = (0, size - width, 0, size - height)
    return F.pad(pixels, padding), F.pad(masks, padding), kept


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return normalize(torch.from_numpy(np.array(image)).permute(2, 0, 1))


class DetectionViews(Dataset):
    """
    The images of a json with their objects, jittered; an item depends on (seed, epoch, index) and on nothing else.
    Call `set_epoch` before each epoch. Crowds are left out.

    Args:
        source: whose annotations have categories.
        size, scale, flip: see `large_scale_jitter`.
        seed: of all chance.

    Raises:
        ValueError: if there is no image, or an object has no category or one that the json does not list.
    """

    def __init__(
        self, source: CocoMasks, size: int, scale: tuple[float, float] = (0.1, 2.0), flip: bool = True, seed: int = 0
    ):
        if not len(source):
            raise ValueError(f"There is no object to learn in {source.annotations}; check the file.")
        self.source, self.size, self.scale, self.flip, self.seed = source, size, scale, flip, seed
        self.categories = categories_of(source)
        self.label_of = {category["id"]: label for label, category in enumerate(self.categories, start=1)}
        if unknown := {one for ids in source.category_ids for one in ids} - self.label_of.keys():
            raise ValueError(
                f"{source.annotations} has objects of the category {unknown.pop()}, which it does not list; add it."
            )
        self.epoch = shared_number()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        """`pixel_values` and `masks` as of `large_scale_jitter`, `boxes` float32 `[N, 4]` (left, top, right, bottom)
        and `labels` int64 `[N]` of the masks, `key`, the image's name, and `seed`, for what is drawn later."""
        sample = self.source[index]
        seed = int(np.random.SeedSequence([self.seed, self.epoch.item(), index]).generate_state(1)[0])
        pixel_values, masks, kept = large_scale_jitter(
            sample.image, sample.rles, self.size, torch.Generator().manual_seed(seed), self.scale, self.flip
        )
        labels = torch.tensor([self.label_of[one] for one in self.source.category_ids[index]])[kept]
        item = {"pixel_values": pixel_values, "masks": masks, "boxes": boxes_from_masks(masks), "labels": labels}
        return {**item, "key": f"{sample.source}/{sample.image_id}", "seed": seed}


def categories_of(source: CocoMasks) -> list[dict]:
    """`{id, name}` of a json's categories by id; of those that its annotations name where it has no list of them."""
    named = source.categories or [{"id": one} for one in {one for ids in source.category_ids for one in ids}]
    categories = [{"id": one["id"], "name": str(one.get("name", one["id"]))} for one in named if one["id"] is not None]
    return sorted(categories, key=lambda category: category["id"])
