"""One way to look at an image file and to decode it, for all data, and one way to say what a reader leaves out."""

import io
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from hf_efficientsam.model.image_reading_efficientsam import (
    AVIF_SUFFIXES,
    HEIF_SUFFIXES,
    MAX_IMAGE_PIXELS,
    ImageError,
    image_to_array,
    open_image,
    to_pil_image,
    upright_size,
)

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".pgm", ".ppm",
    *sorted(HEIF_SUFFIXES | AVIF_SUFFIXES),
)  # fmt: skip
FRAMES = ("upright", "stored")  # in which masks of a photograph with an EXIF orientation may be drawn
# How an array [H,W] becomes upright, by the EXIF orientation that it is stored in.
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).T,
    8: np.rot90,
}
READERS, AT_ONCE = 16, 8192  # threads that look at headers, and files between two of their meetings
LISTED = 10


@dataclass(frozen=True)
class FrameConfig:
    """In which frame masks of a photograph are drawn that its EXIF tag turns, where sizes do not tell: `FRAMES`, or
    None for upright with a warning."""

    mask_frame: str | None = field(
        default=None,
        metadata={
            "help": "the frame of masks of photographs with an EXIF orientation, where sizes do not tell",
            "choices": FRAMES,
        },
    )


logger = logging.getLogger(__name__)


def decode_image(file: str | io.BytesIO, name: str) -> Image.Image:
    """
    The image as inference reads it, but in 8 bits a channel. ValueError with `name` if that cannot be, or if it has
    more pixels than the image processor takes by default.
    """
    return to_pil_image(image_to_array(file, max_image_pixels=MAX_IMAGE_PIXELS, name=name))


# ------------------------------------------------------------------------------------------ headers


@dataclass(frozen=True)
class Header:
    """What an image file says before its pixels: (width, height) once upright, the EXIF orientation, 1 to 8, and PIL's
    names of mode and format."""

    size: tuple[int, int]
    orientation: int = 1
    mode: str = ""
    format: str = ""

    @property
    def stored_size(self) -> tuple[int, int]:
        return self.size[::-1] if self.orientation >= 5 else self.size

    def mask_orientation(self, size: tuple[int, int], frame: str | None) -> int:
        """
        The EXIF orientation in which masks of (width, height) `size` are stored, 1 if they are upright. The size
        decides where it can, else `frame`, one of `FRAMES`; None is upright.

        Raises:
            ValueError: if the size is neither the upright nor the stored one.
        """
        if size == self.size and (size != self.stored_size or frame != "stored"):
            return 1
        if size == self.stored_size:
            return self.orientation
        raise ValueError(f"it is {self.size[0]} x {self.size[1]} pixels, its masks are {size[0]} x {size[1]}")

    @property
    def hides_frame(self) -> bool:
        """Whether the size of masks cannot tell if they are drawn on the upright image."""
        return self.orientation > 1 and self.size == self.stored_size


def read_header(file: str | io.BytesIO, name: str | None = None) -> Header:
    """The header of an image file; ImageError with `name`, by default the path, if it is none."""
    with open_image(file, name) as opened:
        orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
        orientation = orientation if orientation in TURNS else 1
        return Header(upright_size(opened), orientation, opened.mode, opened.format)


def read_headers(files: Sequence[str], what: str, sizes: Sequence[tuple[int, int]] | None = None) -> list[Header]:
    """
    The headers of image files, 0.1 ms each.

    Args:
        files: their paths.
        what: they belong to.
        sizes: (width, height) of each: taken for files that cannot be read, in place of an error.

    Raises:
        ValueError: if some cannot be read, naming `what` they belong to and the first ten.
    """

    def look(file: str) -> Header | str:
        try:
            return read_header(file)
        except ImageError as error:
            return str(error)

    with ThreadPoolExecutor(READERS) as pool:
        parts = (files[start : start + AT_ONCE] for start in range(0, len(files), AT_ONCE))
        headers = [header for part in parts for header in pool.map(look, part)]
    if sizes is not None:
        headers = [Header(size) if isinstance(one, str) else one for one, size in zip(headers, sizes, strict=True)]
    refuse_if_any((one for one in headers if isinstance(one, str)), f"Images of {what} are broken; replace or remove")
    return headers


def warn_of_hidden_frames(hidden: list[str], frame: str | None, what: str) -> None:
    """Says which photographs have masks of which nothing tells in which frame they are, unless `frame` does."""
    if hidden and frame is None:
        logger.warning(
            "%s: an EXIF tag turns or mirrors %s, and nothing tells whether their masks are drawn on the upright "
            "image; they are taken to be. Give --mask_frame upright or stored.",
            what,
            listed(hidden),
        )


# ------------------------------------------------------------------------------------------ what is said


def listed(items: Iterable[Any]) -> str:
    """The first ten, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return ", ".join(map(str, items[:LISTED])) + more


def refuse_if_any(problems: Iterable[str] | Iterator[str], what: str, error: type[Exception] = ValueError) -> None:
    """Raises one error with the first ten of several problems, a line each, and how many more there are."""
    problems = list(problems)
    if problems:
        more = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise error(f"{what} ({len(problems)}):\n  " + "\n  ".join(problems[:LISTED]) + more)


def refuse_shared(owners: Iterable[tuple[Any, Any]], what: str) -> None:
    """Raises a ValueError if two owners share a thing, naming both, for `(thing, owner)` of all."""
    by_thing = defaultdict(list)
    for thing, owner in owners:
        by_thing[thing].append(str(owner))
    refuse_if_any((" and ".join(those) for those in by_thing.values() if len(those) > 1), f"{what}; keep one of each")


def say_what_is_read(what: str, kept: str, left_out: Counter[str]) -> None:
    """One line of the log: what a reader keeps of `what`, and how many of what it leaves out."""
    reasons = ", ".join(f"{number} {reason}" for reason, number in left_out.items() if number)
    level = logging.WARNING if reasons else logging.INFO
    logger.log(level, "%s: %s%s.", what, kept, f"; left out: {reasons}" if reasons else "")
