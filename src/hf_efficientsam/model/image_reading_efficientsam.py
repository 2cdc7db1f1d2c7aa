"""The one reader of images, for inference, export, demo and training: whatever holds an image -> an array.

What may hold an image, and what its values mean, is documented in [`EfficientSamImageProcessor`]. Needs numpy and PIL
only, so that the ONNX predictor reads images as the image processor does, without torch.
"""

import functools
import io
import logging
import os
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MAX_IMAGE_PIXELS = 178_956_970  # where PIL itself takes a file for a decompression bomb
PIXELS_AT_ONCE = 2**20  # that become an array
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
HEIF_SUFFIXES = {".heic", ".heif", ".heics", ".heifs", ".hif"}
AVIF_BRANDS, AVIF_SUFFIXES = {b"avif", b"avis"}, {".avif", ".avifs"}
URL_SCHEMES = ("http://", "https://", "data:image/")

logger = logging.getLogger(__name__)


class ImageError(ValueError):
    """An image that cannot be read or written, has too many pixels, or holds pixel values that make no sense."""


# ------------------------------------------------------------------------------------------------ files


@contextmanager
def open_image(source: Any, name: str | None = None) -> Iterator[Image.Image]:
    """
    Opens a file, and closes it again. PIL decodes the pixels when they are asked for; its own limit of pixels does not
    count meanwhile.

    Args:
        source: a path, an http, https or data URL, `bytes`, or a file object, which stays open.
        name: of the file, for error messages; by default its path or URL.

    Raises:
        ImageError: something that cannot be read, here or in the `with` block: no such file, an empty one, no image, a
            damaged one.
    """
    if name is None:
        name = str(source)[:200] if isinstance(source, (str, os.PathLike)) else "The file"
    try:
        with pil_limit_lifted(), _as_file(source) as file, _identify(file) as image:
            # The second picture in a telephone's JPEG (MPO) and the depth beside a HEIC are no frames.
            if getattr(image, "is_animated", False) and image.format not in ("MPO", "HEIF"):
                _say_first_frame()
            yield image
    except ImageError as error:
        raise ImageError(f"{name.rstrip(',')}: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # PIL's readers raise errors of many kinds for damaged files
        raise ImageError(f"{name} cannot be read as an image; it is damaged, or not an image ({error}).") from error


def is_file_like(source: Any) -> bool:
    """Whether `open_image` takes it."""
    return isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(source, "read")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image once it is turned as its EXIF tag says; only the header is read."""
    # PIL turns TIFF by itself, some versions the size before the pixels are decoded, others after.
    width, height = (image.tag_v2[256], image.tag_v2[257]) if image.format == "TIFF" else image.size
    sideways = 5 <= image.getexif().get(ExifTags.Base.Orientation, 1) <= 8
    return (height, width) if sideways else (width, height)


def upright_image(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF tag says: the image itself, decoded, if it is upright."""
    image.load()  # some files have their EXIF tags after their pixels
    is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    return image if is_upright else ImageOps.exif_transpose(image)  # which copies in any case


def _as_file(source: Any) -> AbstractContextManager[BinaryIO]:
    if isinstance(source, str) and source.startswith(URL_SCHEMES):
        try:
            with urllib.request.urlopen(source, timeout=60) as answer:
                source = answer.read()
        except OSError as error:
            raise ImageError(f"cannot be downloaded ({error}); check the address.") from None
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        if not os.path.isfile(source):
            raise ImageError("no such file.")
        if os.path.getsize(source) == 0:
            raise ImageError("the file is empty (0 bytes).")
        return open(source, "rb")
    elif not source.seekable():
        source = io.BytesIO(source.read())
    if not source.seek(0, os.SEEK_END):
        raise ImageError("the file is empty (0 bytes).")
    source.seek(0)
    return nullcontext(source)


def _identify(file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        file.seek(4)
        start = file.read(8)
        if start[:4] == b"ftyp" and start[4:] in AVIF_BRANDS:
            raise ImageError("an AVIF image, which is read only with Pillow 11.3 or later; upgrade it.") from None
        if start[:4] != b"ftyp" or start[4:] not in HEIF_BRANDS:
            raise ValueError("its format is unknown") from None
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise ImageError("a HEIC image, which is read only with pillow-heif; install it with pip.") from None
    file.seek(0)
    return HeifImageFile(file)


@functools.cache
def _say_first_frame() -> None:
    logger.warning("Of images with several frames or pages, such as animated ones, only the first is read.")


class _PilLimit:
    """How many readers have PIL's limit lifted, and what it was before the first of them."""

    lock, readers, value = threading.Lock(), 0, None


@contextmanager
def pil_limit_lifted() -> Iterator[None]:
    """
    PIL's limit of pixels holds for the whole process and for opening, cropping and decoding; ours, `max_image_pixels`,
    holds for a call. PIL's is lifted while any thread is in here, and the last one puts it back.
    """
    with _PilLimit.lock:
        if not _PilLimit.readers:
            _PilLimit.value, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _PilLimit.readers += 1
    try:
        yield
    finally:
        with _PilLimit.lock:
            _PilLimit.readers -= 1
            if not _PilLimit.readers and Image.MAX_IMAGE_PIXELS is None:  # else somebody has set another meanwhile
                Image.MAX_IMAGE_PIXELS = _PilLimit.value


# ------------------------------------------------------------------------------------------------ arrays


@dataclass(frozen=True)
class ImagePixels:
    """
    The pixels of an image, or of a crop of it, that become an array some rows at a time: for a large image of PIL the
    whole array would nearly double the memory.

    Attributes:
        source: of the whole image: `[3, height, width]`, bytes or float32, or an upright image of PIL in RGB.
        box: (left, top, right, bottom) of the crop.
    """

    source: np.ndarray | Image.Image
    box: tuple[int, int, int, int]

    @classmethod
    def whole(cls, source: np.ndarray | Image.Image) -> "ImagePixels":
        height, width = source.shape[1:] if isinstance(source, np.ndarray) else source.size[::-1]
        return cls(source, (0, 0, width, height))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        left, top, right, bottom = self.box
        return bottom - top, right - left

    @property
    def are_bytes(self) -> bool:
        return not isinstance(self.source, np.ndarray) or self.source.dtype == np.uint8

    def crop(self, left: int, top: int, right: int, bottom: int) -> "ImagePixels":
        """A part of these."""
        x, y, _, _ = self.box
        return ImagePixels(self.source, (x + left, y + top, x + right, y + bottom))

    def bands(self) -> Iterator[np.ndarray]:
        """`[3, rows, width]`, from the top down."""
        left, top, right, bottom = self.box
        rows = max(1, PIXELS_AT_ONCE // (right - left))
        for start in range(top, bottom, rows):
            end = min(start + rows, bottom)
            if isinstance(self.source, np.ndarray):
                yield self.source[:, start:end, left:right]
            else:
                with pil_limit_lifted():
                    band = np.asarray(self.source.crop((left, start, right, end)))
                yield np.moveaxis(band, -1, 0)

    def array(self) -> np.ndarray:
        """`[3, height, width]`; of an array a view."""
        left, top, right, bottom = self.box
        if isinstance(self.source, np.ndarray):
            return self.source[:, top:bottom, left:right]
        pixels, start = np.moveaxis(np.empty((*self.size, 3), np.uint8), -1, 0), 0
        for band in self.bands():
            pixels[:, start : start + band.shape[1]] = band
            start += band.shape[1]
        return pixels


def image_to_array(image: Any, *args, **kwargs) -> np.ndarray:
    """One image with the arguments of `read_pixels`: `[3, H, W]`, bytes where the image has bytes, else float32."""
    return read_pixels(image, *args, **kwargs).array()


def read_pixels(
    image: Any,
    do_convert_rgb: bool = True,
    do_rescale: bool = True,
    max_image_pixels: int | None = None,
    input_data_format: str | None = None,
    name: str | None = None,
) -> ImagePixels:
    """
    One image, read as [`EfficientSamImageProcessor`] says.

    Args:
        image: a path, URL, `bytes`, file object, PIL image, array or tensor, or what this function returned.
        do_convert_rgb: turn every other mode into RGB; if off, there must be three channels.
        do_rescale: bring the values to [0, 1]; if off, they stay as they are.
        max_image_pixels: larger images are refused, files before they are decoded; `None`: no limit.
        input_data_format: "channels_first" or "channels_last", of an array or tensor.
        name: of a file, for error messages; by default its path or URL.

    Raises:
        ImageError (a ValueError): as of `open_image`; or no pixels, or too many, a shape that is no image, NaN, or
            values out of range.
        TypeError: something that is no image.
    """
    options = do_convert_rgb, do_rescale, max_image_pixels
    if is_file_like(image):
        with open_image(image, name) as opened:
            return read_pixels(opened, *options)
    if isinstance(image, ImagePixels):
        return image
    if isinstance(image, Image.Image):
        _check_image_size(image.height, image.width, max_image_pixels)
        pixels, input_data_format = _pil_to_pixels(image, do_convert_rgb), "channels_last"
        if isinstance(pixels, Image.Image):
            return ImagePixels.whole(pixels)
    elif isinstance(image, np.ndarray):
        pixels = image
        input_data_format = input_data_format or infer_data_format(pixels.shape, "channels_last")
    elif "torch" in sys.modules and isinstance(image, sys.modules["torch"].Tensor):  # never imported here
        image = image.detach().cpu()
        pixels = (image.float() if image.is_floating_point() else image).numpy()
        input_data_format = input_data_format or infer_data_format(pixels.shape, "channels_first")
    else:
        raise TypeError(
            "An image must be a PIL image, a path, a URL, bytes, a file, an array or a tensor, not "
            f"{type(image).__name__}; pass several as a list."
        )
    pixels = _to_channels_first(pixels, input_data_format)
    _check_image_size(*pixels.shape[-2:], max_image_pixels)
    if do_convert_rgb:
        pixels = np.repeat(pixels, 3, axis=0) if len(pixels) == 1 else pixels[:3]
    if len(pixels) != 3:
        raise ImageError(f"The model needs 3 channels, got {len(pixels)}; set do_convert_rgb=True.")
    return ImagePixels.whole(_to_bytes_or_unit_floats(pixels, do_rescale))


def to_pil_image(pixels: np.ndarray) -> Image.Image:
    """
    `[3, height, width]` as `image_to_array` returns it -> that in RGB. Values that `do_rescale=False` left as they
    were and that make no image are stretched from black to white.
    """
    if pixels.dtype != np.uint8:
        try:
            pixels = _to_bytes_or_unit_floats(pixels, do_rescale=True)
        except ImageError:
            low, high = pixels.min(), pixels.max()
            pixels = (pixels - low) / max(high - low, np.finfo(np.float32).tiny)
        pixels = (255 * pixels.clip(0, 1) + 0.5).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def segmentation_map_to_array(segmentation_map) -> np.ndarray:
    """
    A file, PIL image, array or tensor of whole numbers or booleans -> array [H, W]. Its values are kept: a palette's
    indices are classes, not colours.
    """
    if is_file_like(segmentation_map):
        with open_image(segmentation_map) as opened:
            return segmentation_map_to_array(opened)
    if isinstance(segmentation_map, Image.Image):
        segmentation_map = upright_image(segmentation_map)
    values = np.asarray(segmentation_map)
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise ImageError(
            "A segmentation map must be [height, width] of whole numbers or booleans, got "
            f"{values.dtype} of shape {values.shape}."
        )
    return values


def _check_image_size(height: int, width: int, max_image_pixels: int | None):
    if height == 0 or width == 0:
        raise ImageError(f"An image has no pixels: its height is {height} and its width {width}.")
    if max_image_pixels is not None and height * width > max_image_pixels:
        raise ImageError(
            f"An image of {width} x {height} pixels is over the limit of {max_image_pixels} pixels; make it smaller, "
            "or raise max_image_pixels of the image processor (None lifts the limit)."
        )


def _pil_to_pixels(image: Image.Image, do_convert_rgb: bool) -> np.ndarray | Image.Image:
    """The upright image in RGB; where it is to have other values than bytes in RGB, H x W or H x W x C."""
    image = upright_image(image)
    if image.mode.startswith("I"):
        # 16-bit gray ("I;16..."), or "I", which is how PIL has long opened 16-bit files: convert("RGB") would clip it.
        pixels = np.array(image)
        return pixels.astype(np.uint16) if pixels.min() >= 0 and pixels.max() <= 65535 else pixels
    if image.mode == "F" or not do_convert_rgb:
        return np.array(image)
    if image.mode == "LAB":
        image = _lab_to_rgb(image)
    elif image.mode in ("La", "RGBa"):  # colours that are multiplied by alpha; PIL asks for this detour
        image = image.convert(image.mode.upper())
    if "transparency" in image.info:
        image = image.convert("RGBA")  # PIL asks for this detour for palettes with transparency
    return image if image.mode == "RGB" else image.convert("RGB")


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms  # needs a library that PIL can be built without

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")


def infer_data_format(shape: tuple[int, ...], preferred: str) -> str:
    """Whichever of "channels_first" and "channels_last" has 1, 3 or 4 channels; `preferred` if both do."""
    if len(shape) == 2:
        return "channels_last"
    if len(shape) != 3:
        raise ImageError(
            f"An image must be H x W, H x W x C or C x H x W, got an array of shape {tuple(shape)}; pass several as a "
            "list."
        )
    found = [
        data_format
        for data_format, channels in (("channels_first", shape[0]), ("channels_last", shape[-1]))
        if channels in (1, 3, 4)
    ]
    if not found:
        raise ImageError(
            f"An image must have 1, 3 or 4 channels, first or last, got an array of shape {tuple(shape)}; pass "
            "several gray images as a list."
        )
    return preferred if preferred in found else found[0]


def _to_channels_first(pixels: np.ndarray, data_format: str) -> np.ndarray:
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.ndim != 3:
        raise ImageError(f"An image must have 2 or 3 dimensions, got an array of shape {tuple(pixels.shape)}.")
    return np.moveaxis(pixels, -1, 0) if str(getattr(data_format, "value", data_format)) == "channels_last" else pixels


def _to_bytes_or_unit_floats(pixels: np.ndarray, do_rescale: bool) -> np.ndarray:
    """Bytes stay, everything else becomes float32 in [0, 1] by the rules in the class's docstring."""
    kind = pixels.dtype.kind
    if pixels.dtype == np.uint8:
        return pixels
    if kind not in "buif":
        raise TypeError(f"Pixels must be numbers, got an array of {pixels.dtype}.")
    if kind == "f" and not np.isfinite(pixels).all():
        raise ImageError("An image holds NaN or infinite pixels.")
    if not do_rescale or kind == "b":
        return pixels.astype(np.float32)
    low, high = float(pixels.min()), float(pixels.max())
    if kind == "f":
        return _floats_to_unit(pixels.astype(np.float32), low, high)
    if low < 0 or high > 65535:
        raise ImageError(f"Integer pixels must lie in 0 to 65535, got {low:g} to {high:g}.")
    return pixels.astype(np.float32) / (65535 if pixels.dtype.type is np.uint16 or high > 255 else 255)


def _floats_to_unit(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    slack = 1e-3  # rounding of an earlier resize
    if low >= -slack and high <= 1 + slack:
        return pixels
    if low < -slack * 255 or high > 255 * (1 + slack) or high < 2:
        raise ImageError(
            f"Float pixels must lie in [0, 1] or in [0, 255], got {low:g} to {high:g}; clip or scale them, or, if the "
            "image is normalised already, set do_rescale=False and do_normalize=False."
        )
    return pixels / 255


def resized_size(original_size: tuple[int, int], size: tuple[int, int], keep_aspect_ratio: bool) -> tuple[int, int]:
    """Height and width of an image squashed to `size`, or scaled until its longest side is the longest of `size`."""
    if not keep_aspect_ratio:
        return size
    height, width = original_size
    scale = max(size) / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
