"""Photographs with masks beside them: `FOLDER/images/NAME.jpg` (or png, ...) and `FOLDER/masks/NAME.png`."""

import os.path
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from pycocotools import mask as rle_codec
from torch.utils.data import Dataset

from hf_efficientsam.model.image_reading_efficientsam import ImageError, open_image

from .coco import DEFAULT_READING, AnnotationConfig, CocoMasks, Sample, encode_mask
from .images import FolderImages
from .mask_images import all_objects, is_soft, mask_values
from .reading import (
    READERS,
    TURNS,
    decode_image,
    listed,
    logger,
    read_headers,
    refuse_if_any,
    refuse_shared,
    say_what_is_read,
    warn_of_hidden_frames,
)
from .shards import hash_lines


class FolderMasks(Dataset):
    """
    The images under `FOLDER/images`, each with the mask of the same name under `FOLDER/masks`; `dataset[i]` is a
    `Sample`. Its `image_id` is the number of the image among those of the folder, its `source` the folder's name.

    A mask is white on black, or holds a label for each object, as grey value, palette index or colour. Of a soft edge
    what is at least half white is the object. All masks are read at the start, 5 ms each, and kept as compressed RLE.
    Images whose mask is black are left out; the log says how many.

    Args:
        folder: that of both.
        reading: how masks are read that may mean two things.
        check_images: as of `CocoMasks`.

    Raises:
        ValueError: if there is no image, or some without a mask, with one that cannot be read, or of another size.
    """

    def __init__(self, folder: str | Path, reading: AnnotationConfig = DEFAULT_READING, check_images: bool = True):
        self.folder = Path(folder)
        images = FolderImages([self.folder / "images"])
        files = [images.path(key) for key in images.files]
        masks = find_partners(self.folder / "images", images.files, self.folder / "masks")
        mask_headers = read_headers(masks, str(folder))
        headers = read_headers(files, images.root, None if check_images else [one.size for one in mask_headers])
        orientations, problems = [], []
        for mask, header, mask_header in zip(masks, headers, mask_headers, strict=True):
            try:
                orientations.append(header.mask_orientation(mask_header.size, reading.mask_frame))
            except ValueError as error:
                problems.append(f"{mask} does not fit its image: {error}")
        refuse_if_any(problems, f"Masks of {folder} belong to other versions of the images")
        hidden = [file for file, header in zip(files, headers, strict=True) if header.hides_frame]
        warn_of_hidden_frames(hidden, reading.mask_frame, str(folder))
        with ThreadPoolExecutor(READERS) as pool:
            read = list(pool.map(_read_mask, masks, orientations))
        refuse_if_any((one for one in read if isinstance(one, str)), f"Masks of {folder} cannot be read")
        if soft := [mask for mask, (_, has_soft_edge) in zip(masks, read, strict=True) if has_soft_edge]:
            logger.warning("%s: of soft edges what is at least half white is taken, in %s.", folder, listed(soft))
        self.numbers = [number for number, (rles, _) in enumerate(read) if rles]
        self.files, self.sizes = [files[number] for number in self.numbers], [headers[n].size for n in self.numbers]
        self.rles = [read[number][0] for number in self.numbers]
        self.num_images = len(files)
        kept = f"{len(self.files)} images with {sum(map(len, self.rles))} masks"
        left_out = {"images with an empty mask": len(files) - len(self.files)}
        say_what_is_read(str(folder), kept, Counter(left_out))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        path = self.files[index]
        image = decode_image(path, path)
        if image.size != self.sizes[index]:
            raise ValueError(f"{path} has another size than when it was first looked at; put the image back.")
        return replace(self.without_image(index), image=image)

    def without_image(self, index: int) -> Sample:
        """The sample without its image, whose file is not opened."""
        number = self.numbers[index]
        # The first object has the image's number, so that clicks on folders of one object each stay the same.
        ids = [number + place * self.num_images for place in range(len(self.rles[index]))]
        return Sample(None, self.rles[index], number, ids, self.folder.name)

    def fingerprint(self) -> str:
        """Changes with the name or the size in bytes of any image, and with any mask."""
        lines = (f"{path} {os.path.getsize(path)} {rles}" for path, rles in zip(self.files, self.rles, strict=True))
        return hash_lines(line.removeprefix(str(self.folder)) for line in lines)


class UnitedMasks(Dataset):
    """The images of another source; `dataset[i]` is a `Sample` with one mask, all of the image's objects together."""

    def __init__(self, masks: CocoMasks | FolderMasks):
        self.masks = masks

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> Sample:
        return self._unite(self.masks[index])

    def without_image(self, index: int) -> Sample:
        """The sample without its image, whose file is not opened."""
        return self._unite(self.masks.without_image(index))

    def _unite(self, sample: Sample) -> Sample:
        return replace(sample, rles=[rle_codec.merge(sample.rles)], annotation_ids=sample.annotation_ids[:1])


def open_annotations(
    path: str | Path,
    images: str | Path | None = None,
    reading: AnnotationConfig = DEFAULT_READING,
    split: str = "train",
    check_images: bool = True,
) -> CocoMasks | FolderMasks:
    """A COCO-style json, a folder of images and masks, a YOLO dataset (of which `split`), or a folder of labelme's."""
    if all((Path(path) / name).is_dir() for name in ("images", "masks")):
        return FolderMasks(path, reading, check_images)
    return CocoMasks(path, images, reading=reading, split=split, check_images=check_images)


def find_partners(images: Path, keys: list[str], folder: Path) -> list[str]:
    """
    For each image (paths relative to `images`) the image file in `folder` of the same name but for its ending.

    Raises:
        ValueError: if two images or two of these files have one name, or some image no such file.
    """
    stems = [os.path.splitext(key)[0] for key in keys]
    refuse_shared(zip(stems, keys, strict=True), f"Images under {images} have one name but for their endings")
    found = FolderImages([folder]) if folder.is_dir() else None
    wanted = set(stems)
    files = [(os.path.splitext(file)[0], file) for file in (found.files if found else [])]
    refuse_shared((one for one in files if one[0] in wanted), f"Files under {folder} are of one image")
    partners = {stem: found.path(file) for stem, file in files}
    if strays := partners.keys() - wanted:
        logger.warning("%s: %s files are of no image and are left out, such as %s.", folder, len(strays), min(strays))
    if missing := [stem for stem in stems if stem not in partners]:
        raise ValueError(f"There is no {listed(f'{folder / stem}.png' for stem in missing)}; every image needs one.")
    return [partners[stem] for stem in stems]


def _read_mask(path: str, orientation: int) -> tuple[list[dict], bool] | str:
    """The upright RLE of each object and whether their edge is soft; what is wrong if it cannot be read."""
    try:
        with open_image(path) as opened:
            values = mask_values(opened)
            upright = TURNS[orientation](values)
            return [encode_mask(mask) for mask in all_objects(upright)], is_soft(values)
    except ImageError as error:
        return str(error)
