"""Files: what cannot be read is refused in one sentence with the file's name; PIL's limit and frames."""

import io
import logging
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from hf_efficientsam.inference.image_files import find_images, read_image
from hf_efficientsam.model import image_reading_efficientsam
from hf_efficientsam.model.image_reading_efficientsam import (
    ImageError,
    image_to_array,
    open_image,
    read_pixels,
    upright_image,
    upright_size,
)
from hf_efficientsam.training.data.reading import decode_image


def encoded(kind: str = "PNG", size: tuple[int, int] = (9, 5), **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "green").save(buffer, kind, **options)
    return buffer.getvalue()


HEIC = b"\0\0\0\x18ftypheic" + bytes(40)
NOT_FINITE = io.BytesIO()
Image.fromarray(np.full((5, 9), np.nan, np.float32)).save(NOT_FINITE, "TIFF")
BROKEN = {
    "absent.png": (None, "no such file"),
    "empty.png": (b"", "empty"),
    "text.jpg": (b"words " * 9, "damaged, or not an image"),
    "cut.png": (encoded(size=(99, 99))[:-60], "damaged, or not an image"),
    "nan.tif": (NOT_FINITE.getvalue(), "NaN or infinite"),
    "phone.heic": (HEIC, "HEIC image, which is read only with pillow-heif"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize(
    "read", [image_to_array, lambda path: decode_image(path, path)], ids=["inference", "training"]
)
def test_a_broken_file_is_named(tmp_path, monkeypatch, read, name):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
    content, words = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=f"{name}.*{words}") as caught:
        read(str(tmp_path / name))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.filterwarnings("ignore:image file could not be identified")
def test_an_avif_is_found_and_named_where_pillow_cannot_read_it(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.AvifImagePlugin.SUPPORTED", False)
    Image.preinit()
    monkeypatch.delitem(Image.EXTENSION, ".avif", raising=False)
    (tmp_path / "a.AVIF").write_bytes(HEIC.replace(b"heic", b"avif"))
    assert [str(name) for name in find_images(tmp_path, [])] == ["a.AVIF"]
    with pytest.raises(ImageError, match=r"a\.AVIF: an AVIF image, which is read only with Pillow 11\.3 or later"):
        image_to_array(tmp_path / "a.AVIF")


def test_heic_is_read_with_pillow_heif(monkeypatch):
    fake = SimpleNamespace(HeifImageFile=lambda file: Image.new("RGB", (len(file.read()), 1), "red"))
    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    assert image_to_array(HEIC).shape == (3, 1, len(HEIC))


def test_a_folder_has_heic_images_and_no_hidden_ones(tmp_path):
    for name in ("a.png", "b.HEIC", "._a.png", ".hidden/c.png", "sub/d.avif", "sub/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "e.png").symlink_to(tmp_path / "gone")
    (tmp_path / "sub" / "above").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "sub")
    found = ["a.png", "b.HEIC", "e.png", "linked/d.avif", "sub/d.avif"]
    assert [path.as_posix() for path in find_images(tmp_path, [])] == found


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_upright_image(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(kind, exif=exif)
    with open_image(content) as image:
        size = upright_size(image)
    assert size == image_to_array(content).shape[:0:-1] == ((5, 9) if orientation >= 5 else (9, 5))


def test_that_only_the_first_frame_is_read_is_said_once(caplog):
    image_reading_efficientsam._say_first_frame.cache_clear()
    frames = encoded("GIF", save_all=True, append_images=[Image.new("RGB", (9, 5), "red")])
    with caplog.at_level(logging.WARNING):
        for content in (encoded("GIF"), frames, frames):
            assert image_to_array(content)[:, 0, 0].tolist() == [0, 128, 0]
    assert [record.message for record in caplog.records] == [
        "Of images with several frames or pages, such as animated ones, only the first is read."
    ]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_our_limit_counts_and_pils_does_not(monkeypatch, recwarn, kind):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # PIL refuses from 20 pixels on, and TIFF once more later
    content = encoded(kind)
    assert image_to_array(content).shape == image_to_array(content, max_image_pixels=45).shape == (3, 5, 9)
    with pytest.raises(ImageError, match=r"a: An image of 9 x 5 pixels is over the limit of 44.*max_image_pixels"):
        image_to_array(content, max_image_pixels=44, name="a")
    assert Image.MAX_IMAGE_PIXELS == 10 and not recwarn.list


def test_pils_limit_outlives_readers_in_threads(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    before = Image.MAX_IMAGE_PIXELS
    first_reads, second_reads, first_is_done = (threading.Event() for _ in range(3))

    def read(*steps):
        read_image(tmp_path / "a.png", 10**9, lambda image: [step() for step in steps])

    first = threading.Thread(target=read, args=(first_reads.set, lambda: second_reads.wait(60)))
    first.start()
    assert first_reads.wait(60)
    second = threading.Thread(target=read, args=(second_reads.set, lambda: first_is_done.wait(60)))
    second.start()
    first.join()
    first_is_done.set()
    second.join()
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_limit_that_is_set_while_reading_stays():
    before = Image.MAX_IMAGE_PIXELS
    try:
        with open_image(encoded()):
            Image.MAX_IMAGE_PIXELS = 1234
        assert Image.MAX_IMAGE_PIXELS == 1234
    finally:
        Image.MAX_IMAGE_PIXELS = before


def test_an_upright_image_is_not_copied():
    image, turned = Image.new("RGB", (9, 5)), Image.new("RGB", (9, 5))
    turned.getexif()[274] = 6
    assert upright_image(image) is image and upright_image(turned).size == (5, 9)
    assert read_pixels(image).source is image and read_pixels(turned).size == (9, 5)
    array = np.zeros((5, 9, 3), np.uint8)
    assert np.shares_memory(image_to_array(array), array)
    file = io.BytesIO()
    image.save(file, "PNG")
    with open_image(file.getvalue()) as opened:
        upright = upright_image(opened)
    assert upright is opened and upright.crop((0, 0, 2, 2)).tobytes() == bytes(12)  # also once the file is closed


@pytest.mark.parametrize("make", [Image.fromarray, np.asarray, np.float32], ids=["PIL", "bytes", "floats"])
def test_pixels_are_read_in_bands(make, monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (60, 100, 3), np.uint8)
    pixels = read_pixels(make(image))
    whole = pixels.array()
    monkeypatch.setattr(image_reading_efficientsam, "PIXELS_AT_ONCE", 350)
    for part, expected in ((pixels, whole), (pixels.crop(7, 3, 90, 50).crop(0, 1, 83, 47), whole[:, 4:50, 7:90])):
        bands = list(part.bands())
        assert len(bands) > 10 and all(band.shape[1] * band.shape[2] <= 350 for band in bands)
        np.testing.assert_array_equal(np.concatenate(bands, axis=1), expected)
        np.testing.assert_array_equal(part.array(), expected)
        assert part.size == expected.shape[1:] and part.are_bytes == (make is not np.float32)
