"""Image files: finding and reading them, and writing several files so that all appear, each whole, or none.

One reader for commands, folder runs, export and demo. What cannot be read is an [`ImageError`] of one sentence.
"""

import io
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError

from hf_efficientsam.model.image_reading_efficientsam import (
    AVIF_SUFFIXES,
    HEIF_SUFFIXES,
    ImageError,
    open_image,
    pil_limit_lifted,
    to_pil_image,
    upright_image,
    upright_size,
)


def local_path(name: str | Path) -> Path:
    """
    The path of a file or folder that a user names.

    Raises:
        FileNotFoundError: for an address such as https://..., of which a path would lose a slash.
    """
    if re.match(r"[a-z][a-z0-9+.-]*://", str(name), re.IGNORECASE):
        raise FileNotFoundError(f"{name}: an address is neither read nor written; download it, and name what is here.")
    return Path(name)


def describe_error(error: Exception) -> str:
    """An error in one line; one of the operating system as the file's name and what is wrong with it."""
    if isinstance(error, OSError) and error.filename is not None:
        is_blocked = isinstance(error, FileExistsError | NotADirectoryError)
        return f"{error.filename}: {'a file is where a folder is needed' if is_blocked else error.strerror}."
    return " ".join(str(error).split()) or type(error).__name__


def read_image(path: Path, max_pixels: int, read: Callable[[Image.Image], Any]) -> Any:
    """
    What `read` makes of the opened image; PIL decodes the pixels only if `read` needs them.

    Args:
        path: the file.
        max_pixels: larger images are refused before they are decoded.
        read: for example `upright_size` or `upright_image`.

    Raises:
        ImageError: if there is no such file, if it is no whole image, or if it has more than `max_pixels`.
    """
    try:
        with open_image(path) as image:
            width, height = image.size
            if width * height <= max_pixels:
                return read(image)
    except MemoryError:
        raise ImageError(f"{path}: the image does not fit into memory; make it smaller.") from None
    raise ImageError(
        f"{path}: {width} x {height} pixels are over the limit of {max_pixels}; to take it all the same, lift the "
        f"limit with --max-pixels {width * height}."
    )


def as_model_sees(image: Any, image_processor) -> Image.Image:
    """
    An image in RGB, upright, with the pixels that the model is given: PIL's own conversion turns 16-bit images white.
    `image_processor` is an [`EfficientSamImageProcessor`], and the image anything that it takes.
    """
    source = image_processor.read_pixels(image).source
    return source if isinstance(source, Image.Image) else to_pil_image(source)


def find_files(folder: str | Path) -> list[Path]:
    """
    What is no folder in a folder and its subfolders, linked ones too, sorted; without hidden files (macOS writes
    `._a.jpg` beside `a.jpg`) and hidden folders (Jupyter's `.ipynb_checkpoints`).
    """
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        above = os.path.realpath(parent) + os.sep
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not above.startswith(os.path.realpath(os.path.join(parent, name)) + os.sep)
        ]  # a link to a folder above would lead around for ever
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(found)


def find_images(folder: Path, results: list[Path]) -> list[Path]:
    """
    Images of `find_files`, relative to the folder, without those in the folders of `results`. HEIC, AVIF and broken
    links are found, too, whether or not they can be read here.
    """
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    endings |= HEIF_SUFFIXES | AVIF_SUFFIXES
    folder, results = folder.resolve(), [result.resolve() for result in results]
    return [
        path.relative_to(folder)
        for path in find_files(folder)
        if path.suffix.lower() in endings
        and (path.is_file() or not path.exists())
        and not any(path.is_relative_to(result) for result in results)
    ]


def encode_image(image: Image.Image, path: Path) -> bytes:
    """
    The bytes of an image file in the format that the ending of `path` asks for.

    Raises:
        ImageError: an image that this format cannot hold.
    """
    kind = Image.registered_extensions()[path.suffix.lower()]
    if max(image.size) > SIDE_LIMITS.get(kind, max(image.size)):
        width, height = image.size
        raise ImageError(
            f"{path}: an image of {width} x {height} pixels does not fit into a {kind} file, whose sides are at most "
            f"{SIDE_LIMITS[kind]} pixels; give it another ending, or leave it out."
        )
    buffer = io.BytesIO()
    try:
        image.save(buffer, format=kind)
    except Exception as error:  # PIL's writers raise errors of many kinds
        raise ImageError(f"{path}: the image cannot be written as {kind} ({error}).") from None
    return buffer.getvalue()


SIDE_LIMITS = {"JPEG": 65500, "WEBP": 16383}  # in pixels; libjpeg's is less than the format's 65535


def encode_mask(mask: np.ndarray, path: Path) -> bytes:
    """The bytes of an image file with a mask `[height, width]`, bool: 255 on the object, 0 elsewhere."""
    return encode_image(Image.fromarray(mask.astype(np.uint8) * 255), path)


@contextmanager
def errors_about(path: Path) -> Iterator[None]:
    """
    Errors of the operating system, which may name a temporary file or none, get the name of the user's file. So do
    those that safetensors reports in words of its own.
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    except SafetensorError as error:
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def blocking_file(folder: Path) -> Path | None:
    """The file that keeps a folder from being made: one of its name, or one that it would lie below."""
    nearest = next(one for one in (folder, *folder.parents) if one.exists())
    return None if nearest.is_dir() else nearest


def check_folder(folder: Path) -> None:
    """Raises a ValueError if what is to be written into is no folder and cannot become one."""
    if (file := blocking_file(folder)) is not None:
        raise ValueError(f"{file} is a file, so {folder} cannot be a folder; give another name.")


def write_files(files: dict[Path, bytes]) -> None:
    """
    Writes all files, or none if one cannot be written. Each appears whole, in the order given.

    Raises:
        OSError: with the name of the file that cannot be written, not of the hidden one that comes before it.
    """
    parts = {}
    try:
        for path, content in files.items():
            with errors_about(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                # Not the file's own name with something added, which may be too long.
                parts[path] = path.with_name(f".{secrets.token_hex(8)}.part")
                parts[path].write_bytes(content)
        for path, part in parts.items():
            with errors_about(path):
                os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


__all__ = [
    "ImageError",
    "as_model_sees",
    "blocking_file",
    "check_folder",
    "describe_error",
    "encode_image",
    "encode_mask",
    "errors_about",
    "find_files",
    "find_images",
    "local_path",
    "pil_limit_lifted",
    "read_image",
    "upright_image",
    "upright_size",
    "write_files",
]
