"""
One image means the same through every way into the package: what reaches the encoder is compared, for each kind of
image and each way. The model's input has the size of the images, so nothing is resized.
"""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageCms, features
from transformers import pipeline

from hf_efficientsam import (
    EfficientSamMaskGenerator,
    EfficientSamModel,
    EfficientSamOnnxPredictor,
    EfficientSamPredictor,
)
from hf_efficientsam.demo.service import Demo
from hf_efficientsam.export.onnx_export import describe
from hf_efficientsam.inference.everything_files import EverythingSegmenter
from hf_efficientsam.inference.segment_files import Segmenter, set_image_file
from hf_efficientsam.training.data.reading import decode_image

SIDE = tiny.SIZE
SMALL = np.random.default_rng(0).integers(40, 216, (8, 8, 3), dtype=np.uint8)
RGB = np.asarray(Image.fromarray(SMALL).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
GRAY = RGB[..., 0]
DEEP = GRAY.astype(np.uint16) * 257  # 16 bits
BINARY = GRAY > 128
ALPHA = np.where(BINARY, 0, 255).astype(np.uint8)  # in part transparent, which changes nothing
PALETTE = Image.fromarray(RGB).quantize(32)
COLORS = np.asarray(PALETTE.convert("RGB"))


def unit(pixels: np.ndarray) -> np.ndarray:
    """`[3, H, W]` in [0, 1], of bytes or booleans."""
    pixels = pixels / (1 if pixels.dtype == bool else 255)
    return (
        np.broadcast_to(pixels[..., None], (SIDE, SIDE, 3)).transpose(2, 0, 1)
        if pixels.ndim == 2
        else (pixels.transpose(2, 0, 1))
    )


# ------------------------------------------------------------------------------------------------ kinds of images


def with_transparency() -> Image.Image:
    image = PALETTE.copy()
    image.info["transparency"] = bytes(range(32))
    return image


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(Image.fromarray(RGB), *profiles, outputMode="LAB")


RGB_IMAGE, CHANNELS_FIRST = Image.fromarray(RGB), RGB.transpose(2, 0, 1)
EXACT, LOSSY = 1e-4, 0.03
# What it is: the image, the pixels that it means, and by how much these may differ.
IN_MEMORY = {
    "uint8": (RGB, RGB, EXACT),
    "uint8, channels first": (CHANNELS_FIRST, RGB, EXACT),
    "uint8, 4 channels": (np.dstack([RGB, ALPHA]), RGB, EXACT),
    "uint8, 1 channel": (GRAY[..., None], GRAY, EXACT),
    "uint8, 2-D": (GRAY, GRAY, EXACT),
    "uint16": (RGB.astype(np.uint16) * 257, RGB, EXACT),
    "int32": (RGB.astype(np.int32), RGB, EXACT),
    "int32 of 16 bits": (RGB.astype(np.int32) * 257, RGB, EXACT),
    "bool": (BINARY, BINARY, EXACT),
    "float16 to 1": ((RGB / 255).astype(np.float16), RGB, 1e-3),
    "float32 to 1": ((RGB / 255).astype(np.float32), RGB, EXACT),
    "float32 to 255": (RGB.astype(np.float32), RGB, EXACT),
    "float64 to 1": (RGB / 255, RGB, EXACT),
    "float64 to 255": (RGB.astype(np.float64), RGB, EXACT),
    "torch uint8": (torch.tensor(CHANNELS_FIRST), RGB, EXACT),
    "torch uint8, channels last": (torch.tensor(RGB), RGB, EXACT),
    "torch uint16": (torch.tensor(CHANNELS_FIRST.astype(np.uint16) * 257), RGB, EXACT),
    "torch int16": (torch.tensor(CHANNELS_FIRST.astype(np.int16)), RGB, EXACT),
    "torch int64": (torch.tensor(CHANNELS_FIRST.astype(np.int64)), RGB, EXACT),
    "torch bool": (torch.tensor(BINARY), BINARY, EXACT),
    "torch float16": (torch.tensor(CHANNELS_FIRST / 255).half(), RGB, 1e-3),
    "torch bfloat16": (torch.tensor(CHANNELS_FIRST / 255).bfloat16(), RGB, 5e-3),
    "torch float32": (torch.tensor(CHANNELS_FIRST / 255).float(), RGB, EXACT),
    "torch float64": (torch.tensor(CHANNELS_FIRST.astype(float), requires_grad=True), RGB, EXACT),
    "PIL 1": (Image.fromarray(BINARY), BINARY, EXACT),
    "PIL L": (Image.fromarray(GRAY), GRAY, EXACT),
    "PIL LA": (Image.fromarray(np.dstack([GRAY, ALPHA])), GRAY, EXACT),
    "PIL P": (PALETTE, COLORS, EXACT),
    "PIL P with transparency": (with_transparency(), COLORS, EXACT),
    "PIL PA": (PALETTE.convert("PA"), COLORS, EXACT),
    "PIL RGB": (RGB_IMAGE, RGB, EXACT),
    "PIL RGBA": (Image.fromarray(np.dstack([RGB, ALPHA])), RGB, EXACT),
    "PIL RGBa": (RGB_IMAGE.convert("RGBA").convert("RGBa"), RGB, EXACT),
    "PIL CMYK": (RGB_IMAGE.convert("CMYK"), RGB, EXACT),
    "PIL YCbCr": (RGB_IMAGE.convert("YCbCr"), RGB, LOSSY),
    "PIL HSV": (RGB_IMAGE.convert("HSV"), RGB, LOSSY),
    "PIL LAB": (lab(), RGB, 4 * LOSSY),
    "PIL I": (Image.fromarray(DEEP.astype(np.int32)), GRAY, EXACT),
    "PIL I;16": (Image.fromarray(DEEP), GRAY, EXACT),
    "PIL I;16B": (Image.frombytes("I;16B", (SIDE, SIDE), DEEP.astype(">u2").tobytes()), GRAY, EXACT),
    "PIL F to 1": (Image.fromarray((GRAY / 255).astype(np.float32)), GRAY, EXACT),
    "PIL F to 255": (Image.fromarray(GRAY.astype(np.float32)), GRAY, EXACT),
}


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(kind: str, orientation: int) -> bytes:
    """The image as a camera stores it that was held in another way."""
    back = [None, 0, 3, 1, 5, 2, 6, 4]  # PIL's transpositions that undo the orientations 1 to 8
    image = RGB_IMAGE if orientation == 1 else RGB_IMAGE.transpose(Image.Transpose(back[orientation - 1]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, kind, exif=exif)


OTHER = Image.new("RGB", (SIDE, SIDE), "red")  # of the second frame
FRAMES = {"save_all": True, "append_images": [OTHER]}
FILES = {
    "gray.png": (encode(Image.fromarray(GRAY), "PNG"), GRAY, EXACT),
    "16 bits.png": (encode(Image.fromarray(DEEP), "PNG"), GRAY, EXACT),
    "16 bits.tif": (encode(Image.fromarray(DEEP), "TIFF"), GRAY, EXACT),
    "float.tif": (encode(Image.fromarray((GRAY / 255).astype(np.float32)), "TIFF"), GRAY, EXACT),
    "transparent.png": (encode(Image.fromarray(np.dstack([RGB, ALPHA])), "PNG"), RGB, EXACT),
    "lab.tif": (encode(lab(), "TIFF"), RGB, 4 * LOSSY),
    "cmyk.jpg": (encode(RGB_IMAGE.convert("CMYK"), "JPEG", quality=98), RGB, 2 * LOSSY),
    "profile.png": (
        encode(RGB_IMAGE, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        RGB,
        EXACT,
    ),
    "really a png.jpg": (encode(RGB_IMAGE, "PNG"), RGB, EXACT),
    "animated.png": (encode(RGB_IMAGE, "PNG", **FRAMES), RGB, EXACT),
    "animated.webp": (encode(RGB_IMAGE, "WEBP", lossless=True, **FRAMES), RGB, EXACT),
    "animated.gif": (encode(PALETTE, "GIF", **FRAMES), COLORS, EXACT),
    "pages.tif": (encode(RGB_IMAGE, "TIFF", **FRAMES), RGB, EXACT),
    **{f"turned {i}.png": (turned("PNG", i), RGB, EXACT) for i in range(1, 9)},
    **{f"turned {i}.tif": (turned("TIFF", i), RGB, EXACT) for i in range(1, 9)},
}
if features.check("avif"):
    FILES["lossy.avif"] = (encode(RGB_IMAGE, "AVIF", quality=95), RGB, 2 * LOSSY)
SHOWN_BY_PIL = [name for name in FILES if name not in ("16 bits.png", "16 bits.tif", "float.tif", "lab.tif")]


# ------------------------------------------------------------------------------------------------ ways in


@pytest.fixture(scope="module")
def onnx(tiny_onnx) -> EfficientSamOnnxPredictor:
    return EfficientSamOnnxPredictor(tiny_onnx)


@pytest.fixture(scope="module")
def ways(tiny_model, onnx):
    """By name, a function that takes an image and returns the `pixel_values` `[1, 3, H, W]` that the encoder got."""
    seen = []

    def watched(model, take):
        model.vision_encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

        def way(image):
            seen.clear()
            take(image)
            return seen[0].numpy()

        return way

    predictor = EfficientSamPredictor.from_pretrained(tiny_model)
    run = onnx._run_encoder
    onnx._run_encoder = lambda inputs: seen.append(torch.from_numpy(inputs["pixel_values"])) or run(inputs)
    few = {"points_per_side": 1}
    generator = EfficientSamMaskGenerator(tiny.model(), tiny.processor(), **few)
    segment, demo = Segmenter(EfficientSamPredictor.from_pretrained(tiny_model), False), Demo(str(tiny_model))
    everything = EverythingSegmenter(EfficientSamMaskGenerator(tiny.model(), tiny.processor(), **few), few, False)
    piped = pipeline("mask-generation", model=tiny.model(), image_processor=tiny.image_processor())
    processor = tiny.image_processor()

    def with_onnx(image):
        seen.clear()
        onnx.set_image(image)
        return seen[0].numpy()

    return {
        "processor": lambda image: processor(image)["pixel_values"].numpy(),
        "predictor": watched(predictor.model, predictor.set_image),
        "onnx": with_onnx,
        "generator": watched(generator.model, generator.generate),
        "segment": watched(segment.predictor.model, lambda path: set_image_file(segment.predictor, Path(path))),
        "everything": watched(everything.generator.model, lambda path: everything(Path(path))),
        "demo": watched(demo.model, lambda path: demo.open(path, "image")),
        "training": lambda path: processor(decode_image(path, path))["pixel_values"].numpy(),
        "pipeline": watched(piped.model, lambda path: piped(path, points_per_batch=1, points_per_crop=1)),
    }


def difference(pixel_values: np.ndarray, meant: np.ndarray) -> float:
    """The largest one of pixels in [0, 1]."""
    processor = tiny.image_processor()
    mean, std = (np.reshape(x, (3, 1, 1)) for x in (processor.image_mean, processor.image_std))
    return float(np.abs(pixel_values[0] * std + mean - unit(meant)).max())


@pytest.mark.parametrize("way", ["processor", "predictor", "onnx", "generator"])
@pytest.mark.parametrize("kind", IN_MEMORY)
def test_an_image_in_memory_means_the_same(ways, kind, way):
    image, meant, tolerance = IN_MEMORY[kind]
    assert difference(ways[way](image), meant) < tolerance


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("way", ["processor", "onnx", "predictor", "generator", "segment", "everything", "demo"])
def test_a_file_means_the_same(ways, way, name, tmp_path):
    content, meant, tolerance = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert difference(ways[way](str(tmp_path / name)), meant) < tolerance


@pytest.mark.parametrize("name", FILES)
def test_training_sees_the_same_in_8_bits(ways, name, tmp_path):
    content, meant, tolerance = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert difference(ways["training"](str(tmp_path / name)), meant) < max(tolerance, 0.6 / 255)


@pytest.mark.parametrize("name", SHOWN_BY_PIL)
def test_the_pipeline_sees_the_same_where_pil_itself_makes_rgb_of_it(ways, name, tmp_path):
    content, meant, tolerance = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert difference(ways["pipeline"](str(tmp_path / name)), meant) < tolerance


@pytest.mark.parametrize("way", ["processor", "predictor", "onnx", "generator"])
def test_paths_bytes_and_files_are_the_same(ways, way, tmp_path):
    content = FILES["16 bits.png"][0]
    (tmp_path / "a.png").write_bytes(content)
    expected = ways[way](tmp_path / "a.png")
    with open(tmp_path / "a.png", "rb") as file:
        sources = [content, bytearray(content), io.BytesIO(content), file]
        for source in sources:
            assert np.array_equal(ways[way](source), expected)
        assert not file.closed
    assert np.array_equal(ways[way]("data:image/png;base64," + base64.b64encode(content).decode()), expected)


# ------------------------------------------------------------------------------------------------ options

OPTIONS = [
    {"do_rescale": False, "image_mean": [124.0, 116.0, 104.0], "image_std": [58.0, 57.0, 57.0]},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
    {"do_convert_rgb": False},
    {"do_resize": False},
    {"size": {"height": 64, "width": 96}, "keep_aspect_ratio": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(options))
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_every_option_holds_for_every_way(tiny_model, onnx, monkeypatch, options, dtype):
    model, processor = EfficientSamModel.from_pretrained(tiny_model), tiny.processor(**options)
    image = RGB[:50].astype(dtype)
    with torch.no_grad():
        expected = model.get_image_embeddings(processor(image)["pixel_values"]).numpy()
    predictor, generator = EfficientSamPredictor(model, processor), EfficientSamMaskGenerator(model, processor)
    predictor.set_image(image)
    monkeypatch.setattr(onnx, "options", describe("", model, processor)["preprocessing"])
    onnx.set_image(image)
    ((embedding, _),) = generator.embed([generator.image_processor.read_pixels(image)], batch_size=1)
    for found in (predictor.features, onnx.features, embedding.detach()):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    assert np.array_equal(predictor.image, RGB[:50]) and np.array_equal(onnx.image, RGB[:50])
    if options.get("do_convert_rgb") is False:
        for one in (predictor, onnx):
            with pytest.raises(ValueError, match="needs 3 channels, got 1"):
                one.set_image(GRAY)
