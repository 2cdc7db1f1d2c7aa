"""Images with a class for each pixel: from ADE20K, or from any folder of images and label images.

A source gives `(key, image, labels)`: a name that is unique in it, an RGB image, and of each pixel the place of its
class in the source's `classes`, uint8 `[H, W]` with `NO_CLASS` where there is none. What is random about a training
image depends on the seed, its key and the epoch alone, see `images.py`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import Dataset

from hf_efficientsam.model.image_reading_efficientsam import open_image, upright_image
from hf_efficientsam.training.engine.config import PositiveFloat, PositiveInt, RatioBelowOne

from .augment import jitter_color
from .folder_masks import find_partners
from .images import FolderImages, hash_key, normalize
from .reading import TURNS, FrameConfig, read_headers, refuse_if_any, warn_of_hidden_frames
from .shards import shared_number

SHAPES = "shapes"  # in place of a folder's name
NO_CLASS = 255  # of pixels that are neither learnt nor measured


@dataclass(frozen=True)
class LabelSourceConfig(FrameConfig):
    """Where images with labels come from."""

    train: str | None = field(
        default=None,
        metadata={"help": f"folder with images/, labels/ and labels.json, or ADE20K's, or: {SHAPES} (made up)"},
    )
    test: str | None = field(
        default=None, metadata={"help": "the same, for evaluation; ADE20K's folder is the same one"}
    )
    reduce_labels: bool = field(
        default=False, metadata={"help": "classes count from 1 and 0 is no class, as in ADE20K"}
    )
    ignore_label: int | None = field(
        default=None, metadata={"help": "this value of the label images is no class either; 255 never is"}
    )


@dataclass(frozen=True)
class SemanticCropConfig:
    """How training images are augmented."""

    size: PositiveInt = field(
        default=512, metadata={"help": "side of the crops; in evaluation the shorter side of the image"}
    )
    min_scale: PositiveFloat = field(
        default=0.5, metadata={"help": "images are resized to a shorter side of --size times"}
    )
    max_scale: PositiveFloat = field(default=2.0, metadata={"help": "this to this, before they are cropped"})
    flip: bool = field(default=True, metadata={"help": "half of the images are mirrored"})
    color_jitter: RatioBelowOne = field(
        default=0.4, metadata={"help": "brightness, contrast, saturation times 1 - this to 1 + this"}
    )


# ------------------------------------------------------------------------------------------ sources


class LabelledImages:
    """The images of a folder with a label image for each: an 8-bit PNG whose values are classes.

    Two layouts are known. `images/` and `labels/` hold files of the same names, and `labels.json`, beside them or one
    folder up, the list of the classes' names. ADE20K holds `images/training`, `images/validation`, the same under
    `annotations/`, and the names in `objectInfo150.txt`.

    Args:
        folder: in one of these layouts.
        validation: of ADE20K the images to evaluate on.
        reduce_labels: the names count from value 1, and 0 is no class.
        ignore_label: a value that is no class; a name that it has is left out.
        mask_frame: see `FrameConfig`.

    Raises:
        ValueError: if files or names are missing, files cannot be opened, or sizes do not fit, and on access for a
            file that cannot be decoded or has a value without a name.
    """

    def __init__(
        self,
        folder: str | Path,
        validation: bool = False,
        reduce_labels: bool = False,
        ignore_label: int | None = None,
        mask_frame: str | None = None,
    ):
        images, labels, names = _find(Path(folder), validation)
        if not reduce_labels and (Path(folder) / "images" / "training").is_dir():
            raise ValueError(f"In ADE20K, as {folder} is, 0 is no class; give --reduce_labels true.")
        first = int(reduce_labels)
        named = {value: name for value, name in enumerate(names, first) if value != ignore_label}
        self.classes = list(named.values())
        if not 2 <= len(named) <= NO_CLASS or max(named) >= NO_CLASS:
            raise ValueError(f"{folder} must have 2 to {NO_CLASS - first} classes, and has {len(named)}.")
        # What a value means: a class, no class, or -1 for nothing.
        self.meaning = np.full(256, -1, dtype=np.int16)
        self.meaning[list(named)] = range(len(named))
        no_class = {NO_CLASS, *range(first), *([] if ignore_label is None else [ignore_label])}
        self.meaning[list(no_class)] = NO_CLASS
        self.images = FolderImages([images])
        self.label_files = find_partners(images, self.images.files, labels)
        headers, label_headers = self.images.headers(), read_headers(self.label_files, str(folder))
        self.orientations, problems = [], []
        for path, header, label_header in zip(self.label_files, headers, label_headers, strict=True):
            try:
                self.orientations.append(header.mask_orientation(label_header.size, mask_frame))
            except ValueError as error:
                problems.append(f"{path} does not fit its image: {error}")
            if label_header.mode not in ("L", "P") or label_header.format == "JPEG":
                kind = f"{label_header.mode} in {label_header.format}"
                problems.append(f"{path} is {kind}; labels are 8-bit, one value a pixel, and no JPEG")
        refuse_if_any(problems, f"Labels of {folder} do not fit")
        hidden = [key for key, header in zip(self.images.files, headers, strict=True) if header.hides_frame]
        warn_of_hidden_frames(hidden, mask_frame, str(folder))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str, Image.Image, np.ndarray]:
        key, image = self.images[index]
        path = self.label_files[index]
        with open_image(path) as opened:
            values = TURNS[self.orientations[index]](np.array(upright_image(opened)))
        if values.shape != (image.height, image.width):
            raise ValueError(f"{path} has changed since it was first looked at; put it back.")
        labels = self.meaning[values]
        if labels.min() < 0:
            value = values[labels < 0][0]
            raise ValueError(f"{path} has the value {value}, which has no name; name it or set --ignore_label.")
        return key, image, labels.astype(np.uint8)


def _find(folder: Path, validation: bool) -> tuple[Path, Path, list[str]]:
    """The folders of images and labels, and the names of the values."""
    images, labels = folder / "images", folder / "labels"
    if (images / "training").is_dir():
        part = "validation" if validation else "training"
        images, labels = images / part, folder / "annotations" / part
    for path in (images, labels):
        if not path.is_dir():
            raise ValueError(f"There is no folder {path}; a folder with images/ and labels/ is needed, or ADE20K's.")
    for path in (folder / "labels.json", folder.absolute().parent / "labels.json"):
        if path.is_file():
            try:
                names = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is not valid json ({error}); repair it.") from error
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"{path} must be a list of names.")
            if len(set(names)) < len(names):
                raise ValueError(f"{path} has a name twice; each class needs its own.")
            return images, labels, names
    path = folder / "objectInfo150.txt"
    if not path.is_file():
        raise ValueError(f"{folder} needs a labels.json, a list of the names of its classes.")
    rows = path.read_text(encoding="utf-8").splitlines()[1:]
    return images, labels, [row.split("\t")[-1].split(",")[0].strip() for row in rows if row.strip()]


class Shapes:
    """Made-up images of 96 x 96 pixels that need no file: three shapes of any colour, size and place on a ground.

    Args:
        count: of images.
        seed: of all chance, so another seed gives other images.
    """

    classes = ["ground", "disc", "square", "triangle"]

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[str, Image.Image, np.ndarray]:
        generator = np.random.default_rng([self.seed, index])
        ground, *colors = (tuple(color) for color in generator.integers(0, 256, (4, 3)).tolist())
        image, labels = Image.new("RGB", (96, 96), ground), Image.new("L", (96, 96))
        for label, color in zip(generator.permutation(3) + 1, colors, strict=True):
            radius = generator.uniform(10, 22)
            x, y = generator.uniform(radius, 96 - radius, 2)
            for target, fill in ((image, color), (labels, int(label))):
                draw, box = ImageDraw.Draw(target), (x - radius, y - radius, x + radius, y + radius)
                match self.classes[label]:
                    case "disc":
                        draw.ellipse(box, fill=fill)
                    case "square":
                        draw.rectangle(box, fill=fill)
                    case "triangle":
                        draw.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=fill)
        return f"{self.seed}/{index}", image, np.array(labels)


Source = LabelledImages | Shapes


def open_source(options: LabelSourceConfig, test: bool) -> Source:
    """
    The images to train on, or those to evaluate on.

    Raises:
        ValueError: if none are given, or if they cannot be opened.
    """
    folder = options.test if test else options.train
    if folder is None:
        raise ValueError(f"Give images: --{'test' if test else 'train'} a folder with images/, labels/, labels.json.")
    if folder == SHAPES:
        return Shapes(*((48, 1) if test else (256, 0)))
    return LabelledImages(folder, test, options.reduce_labels, options.ignore_label, options.mask_frame)


# ------------------------------------------------------------------------------------------ to train on


class SemanticCrops(Dataset):
    """A square crop of each image after a random resize, mirrored half of the time, its colours varied.

    An item depends on the seed, the epoch and the key, and on nothing else. Call `set_epoch` before each epoch.

    Args:
        source: see there.
        options: see there.
        seed: of all chance.
    """

    def __init__(self, source: Source, options: SemanticCropConfig, seed: int = 0):
        self.source, self.options, self.seed = source, options, seed
        self.epoch = shared_number()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        """An item, which torch's default collate makes a batch of B of:

        `pixel_values` float32 [3,S,S], normalised, and `labels` uint8 [S,S], filled up with zeros and `NO_CLASS` at
        the right and bottom where the resized image is smaller; `key` str; `seed` int, of what the loss draws.
        """
        key, image, labels = self.source[index]
        options, generator = self.options, np.random.default_rng([self.seed, self.epoch.item(), hash_key(key)])
        box, size = random_scale_crop(*image.size, options, generator)
        image = image.resize(size, Image.Resampling.BILINEAR, box)
        labels = Image.fromarray(labels).resize(size, Image.Resampling.NEAREST, box)
        if options.flip and generator.random() < 0.5:
            image, labels = ImageOps.mirror(image), ImageOps.mirror(labels)
        seeds = generator.integers(2**63, size=2).tolist()
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        if options.color_jitter:
            pixels = jitter_color(pixels, options.color_jitter, torch.Generator().manual_seed(seeds[0]))
        fill = (0, options.size - size[0], 0, options.size - size[1])
        return {
            "pixel_values": F.pad(normalize(pixels), fill),
            "labels": F.pad(torch.from_numpy(np.array(labels)), fill, value=NO_CLASS),
            "key": key,
            "seed": seeds[1],
        }


def random_scale_crop(
    width: int, height: int, options: SemanticCropConfig, generator: np.random.Generator
) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    """
    What to cut out of an image of `width` x `height` pixels, and to which size: the whole image would become one whose
    shorter side is `options.size` times `min_scale` to `max_scale`, of which the crop is `options.size` square, or as
    much as there is.

    Returns:
        the box (left, top, right, bottom) in pixels of the image, and (width, height) of the crop.
    """
    scale, x, y = generator.random(3)
    scale = options.min_scale + scale * (options.max_scale - options.min_scale)
    ratio = scale * options.size / min(width, height)
    whole_width, whole_height = max(1, round(width * ratio)), max(1, round(height * ratio))
    size = (min(options.size, whole_width), min(options.size, whole_height))
    left, top = int(x * (whole_width - size[0] + 1)), int(y * (whole_height - size[1] + 1))
    across, down = width / whole_width, height / whole_height
    return (left * across, top * down, (left + size[0]) * across, (top + size[1]) * down), size


# ------------------------------------------------------------------------------------------ to evaluate on


class EvaluationImages(Dataset):
    """Every image of a source as the processor makes it, `pixel_values` [1,3,h,w], and its labels uint8 [H,W] at the
    image's own size."""

    def __init__(self, source: Source, processor):
        self.source, self.processor = source, processor

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        _, image, labels = self.source[index]
        return self.processor(image, return_tensors="pt")["pixel_values"], torch.from_numpy(labels)
