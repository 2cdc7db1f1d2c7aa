"""Photographs with one mask each, as saliency data comes: `FOLDER/images/NAME.jpg` (or png, webp) and
`FOLDER/masks/NAME.png`."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from pycocotools import mask as rle_codec
from torch.utils.data import Dataset

from .coco import CocoMasks, Sample
from .images import FolderImages
from .reading import decode_image


class SaliencyMasks(Dataset):
    """
    The images under `FOLDER/images`, each with the mask of the same name under `FOLDER/masks`; `dataset[i]` is a
    `Sample` with one mask: the pixels that are at least half white. Its `image_id` is i, its `source` the folder's
    name.

    Args:
        folder: that of both.

    Raises:
        ValueError: if there is no image, or one without its mask; on access for a file that cannot be read, a mask of
            another size than its image's, or an empty one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.images = FolderImages([self.folder / "images"])
        self.masks = [(self.folder / "masks" / name).with_suffix(".png") for name in self.images.files]
        if len(set(self.masks)) < len(self.masks):
            raise ValueError(f"Two images under {self.folder / 'images'} have one name; each needs a mask of its own.")
        if missing := next((path for path in self.masks if not path.is_file()), None):
            raise ValueError(f"There is no mask {missing}; each image under {self.folder / 'images'} needs one.")

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> Sample:
        _, image = self.images[index]
        path = str(self.masks[index])
        mask = np.asarray(decode_image(path, path).convert("L")) >= 128
        if mask.shape != (image.height, image.width) or not mask.any():
            size = f"{mask.shape[1]} x {mask.shape[0]} pixels for an image of {image.width} x {image.height}"
            raise ValueError(f"The mask {path} is empty or of another size ({size}); repair or remove it.")
        rle = rle_codec.encode(np.asfortranarray(mask.astype(np.uint8)))
        return Sample(image, [rle], index, [index], self.folder.name)


class UnitedMasks(Dataset):
    """The images of a COCO-style json; `dataset[i]` is a `Sample` with one mask, all of the image's objects together.
    See `CocoMasks`."""

    def __init__(self, annotations: str | Path):
        self.masks = CocoMasks(annotations)

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> Sample:
        sample = self.masks[index]
        return replace(sample, rles=[rle_codec.merge(sample.rles)], annotation_ids=sample.annotation_ids[:1])


def open_saliency(path: str | Path) -> SaliencyMasks | UnitedMasks:
    """A folder of images and masks, or a COCO-style json whose objects are what is salient."""
    return UnitedMasks(path) if Path(path).suffix == ".json" else SaliencyMasks(path)
