import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel
from transformers import logging as transformers_logging
from typer.testing import CliRunner

from hf_efficientsam import (
    EfficientSamConfig,
    EfficientSamImageProcessor,
    EfficientSamModel,
    EfficientSamProcessor,
    __version__,
)
from hf_efficientsam.cli.app import app
from hf_efficientsam.inference import loading as hub
from hf_efficientsam.inference import segment_files
from hf_efficientsam.inference.prompters import Detector, saliency_sources

WIDTH, HEIGHT = 60, 40  # of most pictures here
BOX, POINT = "10,5,50,35", "20,20"


def tiny_config(background_points: bool = True) -> EfficientSamConfig:
    return EfficientSamConfig(
        vision_config={
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 128,
            "output_channels": 32,
        },
        prompt_encoder_config={"hidden_size": 32, "background_points": background_points, "mask_prompts": True},
        mask_decoder_config={
            "hidden_size": 32,
            "num_attention_heads": 4,
            "mlp_dim": 64,
            "iou_head_hidden_dim": 32,
            "upscaling_channels": (16, 8),
        },
    )


def save_tiny(folder: Path, background_points: bool = True) -> Path:
    torch.manual_seed(0)
    EfficientSamModel(tiny_config(background_points)).save_pretrained(folder)
    EfficientSamProcessor(EfficientSamImageProcessor(size=128)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model_without_background(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("without_background"), background_points=False)


@pytest.fixture(autouse=True)
def library_settings():
    """The command silences transformers for its process; here the process goes on."""
    verbosity, limit = transformers_logging.get_verbosity(), Image.MAX_IMAGE_PIXELS
    yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()
    assert limit == Image.MAX_IMAGE_PIXELS


def noise(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> Image.Image:
    """A picture with something to see: noise, enlarged."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photo(tmp_path) -> Path:
    noise().save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def segment(image, *arguments, model) -> dict:
    """The document that a call prints which must work."""
    result = run("segment", image, *arguments, "--model", model, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def all_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_refused(result, *words: str):
    """One sentence on stderr that holds all `words`, nothing else, exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("efficientsam: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


def refused(folder: Path, *arguments, words: tuple[str, ...], model=None):
    """`segment` with these arguments must be refused and leave `folder` as it was."""
    before = all_files(folder)
    options = ["--output", folder / "mask.png", "--overlay", folder / "overlay.png"]
    result = run("segment", *arguments, *options, *(["--model", model] if model else []))
    assert_refused(result, *words)
    assert all_files(folder) == before


# ------------------------------------------------------------------------------------------------ one image


def test_mask_overlay_and_numbers(photo, model):
    output, overlay = photo.with_name("mask.png"), photo.with_name("overlay.jpg")
    arguments = ["--point", POINT, "--box", BOX, "--background", "1,1", "--output", output, "--overlay", overlay]
    record = segment(photo, *arguments, model=model)

    loaded, processor = EfficientSamModel.from_pretrained(model).eval(), EfficientSamProcessor.from_pretrained(model)
    prompts = {"input_points": [[[20, 20], [1, 1]]], "input_labels": [[1, 0]], "input_boxes": [[10, 5, 50, 35]]}
    inputs = processor(Image.open(photo), **prompts)
    sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
    with torch.no_grad():
        outputs = loaded(**inputs)
    best = int(outputs.iou_scores[0, 0].argmax())
    expected = processor.post_process_masks(outputs.pred_masks, *sizes)[0][0, best].numpy()

    mask = Image.open(output)
    assert mask.mode == "L" and mask.size == (WIDTH, HEIGHT)
    assert np.array_equal(np.asarray(mask), expected * 255) and 0 < expected.sum() < expected.size
    rows, columns = np.nonzero(expected)
    assert record["image"] == str(photo) and (record["width"], record["height"]) == (WIDTH, HEIGHT)
    assert record["objects"] == [
        {
            "points": [[20, 20], [1, 1]],
            "labels": [1, 0],
            "box": [10, 5, 50, 35],
            "masks": [
                {
                    "score": round(float(outputs.iou_scores[0, 0, best]), 4),
                    "area": int(expected.sum()),
                    "box": [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1],
                    "file": "mask.png",
                }
            ],
        }
    ]
    assert Image.open(overlay).size == (WIDTH, HEIGHT)
    assert all_files(photo.parent) == {"photo.png", "mask.png", "overlay.jpg"}


def test_text_says_what_json_says(photo, model):
    arguments = ["--point", POINT, "--box", BOX, "--output", photo.with_name("mask.png")]
    mask = segment(photo, *arguments, model=model)["objects"][0]["masks"][0]
    result = run("segment", photo, *arguments, "--model", model)
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout.splitlines() == [
        f"{photo}: {WIDTH} x {HEIGHT} pixels",
        f"  object 1: score {mask['score']:.3f}, area {mask['area']} pixels, "
        f"box {','.join(map(str, mask['box']))}, file mask.png",
    ]


def test_nothing_is_written_unless_asked(photo, model):
    record = segment(photo, "--point", POINT, model=model)
    assert "file" not in record["objects"][0]["masks"][0]
    assert all_files(photo.parent) == {"photo.png"}


def test_folders_of_the_output_are_made(photo, model):
    segment(photo, "--point", POINT, "--output", photo.parent / "new/folder/mask.png", model=model)
    assert all_files(photo.parent) == {"photo.png", "new/folder/mask.png"}


def test_all_candidates(photo, model):
    record = segment(photo, "--box", BOX, "--all-masks", "--output", photo.with_name("m.png"), model=model)
    masks = record["objects"][0]["masks"]
    scores = [mask["score"] for mask in masks]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    assert [mask["file"] for mask in masks] == ["m_1_1.png", "m_1_2.png", "m_1_3.png"]
    for mask in masks:
        assert np.count_nonzero(np.asarray(Image.open(photo.with_name(mask["file"])))) == mask["area"]
    best = segment(photo, "--box", BOX, model=model)["objects"][0]["masks"]
    assert [mask["score"] for mask in best] == scores[:1]
    assert "object 1, candidate 3: " in run("segment", photo, "--box", BOX, "--all-masks", "--model", model).stdout


def prompts_of(record: dict) -> list[tuple]:
    return [(one["points"], one["labels"], one["box"]) for one in record["objects"]]


def test_points_of_one_call_are_one_object(photo, model):
    record = segment(photo, "--point", "20,20", "--point", "30,10", "--background", "5,5", model=model)
    assert prompts_of(record) == [([[20, 20], [30, 10], [5, 5]], [1, 1, 0], None)]


def test_several_boxes_are_several_objects_that_share_out_the_points(photo, model):
    record = segment(
        *[photo, "--box", "0,0,20,20", "--box", "30,10,50,30", "--point", "40,20", "--point", "1,2"],
        *["--background", "25,5", "--output", photo.with_name("m.png")],
        model=model,
    )
    assert prompts_of(record) == [
        ([[1, 2], [25, 5]], [1, 0], [0, 0, 20, 20]),
        ([[40, 20], [25, 5]], [1, 0], [30, 10, 50, 30]),
    ]
    assert all_files(photo.parent) == {"photo.png", "m_1.png", "m_2.png"}
    alone = segment(photo, "--box", "30,10,50,30", "--point", "40,20", "--background", "25,5", model=model)
    together, alone = record["objects"][1]["masks"][0], alone["objects"][0]["masks"][0]
    assert together["score"] == pytest.approx(alone["score"], abs=2e-4) and together["box"] == alone["box"]


def test_separate_points(photo, model):
    arguments = ["--separate-points", "--point", "20,20", "--point", "30,10", "--background", "5,5", "--box", BOX]
    assert prompts_of(segment(photo, *arguments, model=model)) == [
        ([[5, 5]], [0], [10, 5, 50, 35]),
        ([[20, 20], [5, 5]], [1, 0], None),
        ([[30, 10], [5, 5]], [1, 0], None),
    ]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "YCbCr"])
def test_any_kind_of_image(tmp_path, model, mode):
    """What an image shows counts, not how it is stored."""
    path = tmp_path / ("image.tif" if mode in ("CMYK", "I;16", "I", "YCbCr") else "image.png")
    if mode in ("I;16", "I"):
        gray = np.asarray(noise().convert("L"))
        plain = Image.fromarray(gray).convert("RGB")
        pixels = gray.astype(np.uint16) * 257
        Image.fromarray(pixels if mode == "I;16" else pixels.astype(np.int32)).save(path)
    else:
        # PIL 12.3 cannot read the YCbCr that it writes without compression.
        noise().convert(mode).save(path, **({"compression": "tiff_lzw"} if mode == "YCbCr" else {}))
        plain = Image.open(path).convert("RGB")
    plain.save(tmp_path / "plain.png")
    arguments = ["--box", BOX, "--output", tmp_path / "mask.png", "--overlay", tmp_path / "overlay.png"]
    found = segment(path, *arguments, model=model)
    mask, overlay = (np.asarray(Image.open(tmp_path / name)) for name in ("mask.png", "overlay.png"))
    expected = segment(tmp_path / "plain.png", *arguments, model=model)
    assert found["objects"][0]["masks"][0]["score"] == pytest.approx(
        expected["objects"][0]["masks"][0]["score"], abs=1e-3
    )
    assert np.mean(mask != np.asarray(Image.open(tmp_path / "mask.png"))) < 0.01
    difference = np.abs(overlay - np.asarray(Image.open(tmp_path / "overlay.png")).astype(int))
    assert np.mean(difference > 2) < 0.02


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_rotation(tmp_path, model, ending, orientation):
    """Coordinates and masks are those of the upright image, 60 x 40."""
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{ending}"
    noise().transpose(turn).save(path, exif=exif, **({"quality": 98} if ending == "jpg" else {}))
    noise().save(tmp_path / "upright.png")
    arguments = ["--point", "58,20", "--box", "30,5,60,35", "--output", tmp_path / "mask.png"]
    found = segment(path, *arguments, model=model)
    mask = np.asarray(Image.open(tmp_path / "mask.png"))
    expected = segment(tmp_path / "upright.png", *arguments, model=model)
    assert (found["width"], found["height"]) == (WIDTH, HEIGHT) and mask.shape == (HEIGHT, WIDTH)
    assert np.mean(mask != np.asarray(Image.open(tmp_path / "mask.png"))) < (0.05 if ending == "jpg" else 1e-9)
    assert found["objects"][0]["masks"][0]["score"] == pytest.approx(
        expected["objects"][0]["masks"][0]["score"], abs=0.02 if ending == "jpg" else 0
    )
    assert_refused(run("segment", path, "--point", "20,50", "--model", model), "outside the image", "60 pixels wide")


# ------------------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--point", "60.5,3"], ("60.5", "outside the image", "60 pixels wide and 40 high")),
        (["--point", "-1,3"], ("-1", "outside the image")),
        (["--background", "3,41", "--point", POINT], ("41", "outside the image")),
        (["--box", "10,10,10,30"], ("no area",)),
        (["--box", "30,10,10,30"], ("no area", "x1 < x2")),
        (["--box", "70,10,80,30"], ("outside the image",)),
        (["--point", "nan,3"], ("--point", "finite", "nan,3")),
        (["--box", "1,2,inf,4"], ("--box", "finite")),
        (["--point", "580;350"], ("--point", "X,Y", "580;350")),
        (["--point", "1,2,3"], ("--point", "X,Y")),
        (["--point", ""], ("--point", "X,Y")),
        (["--box", "1,2,3"], ("--box", "X1,Y1,X2,Y2")),
        (["--background", "here"], ("--background", "here")),
        ([], ("nothing to segment", "point", "box")),
        (["--background", "3,3"], ("nothing to segment",)),
        (["--box", "0,0,30,30", "--box", "20,20,40,40", "--point", "25,25"], ("25,25", "2 of the 2 boxes")),
        (["--box", "0,0,30,30", "--box", "20,20,40,40", "--point", "50,5"], ("50,5", "0 of the 2 boxes")),
        (["--point", POINT, "--prompts", "prompts.jsonl"], ("is no folder",)),
        (["--point", POINT, "--max-pixels", "2399"], ("60 x 40", "2399", "--max-pixels 2400")),
    ],
)  # fmt: skip
def test_wrong_arguments(photo, model, arguments, words):
    refused(photo.parent, photo, *arguments, model=model, words=words)


def test_the_largest_point_lies_in_the_image(photo, model):
    segment(photo, "--point", f"{WIDTH},{HEIGHT}", model=model)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and ends where its pixels would be."""
    data = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 10_000) + b"IDAT" + bytes(100)


def broken_images() -> dict[str, tuple[bytes | None, tuple[str, ...]]]:

    png, jpeg = io.BytesIO(), io.BytesIO()
    noise(200, 200).save(png, "png")
    noise(200, 200).save(jpeg, "jpeg")
    return {
        "missing.png": (None, ("missing.png", "no such file")),
        "empty.png": (b"", ("empty.png", "0 bytes")),
        "text.jpg": (b"These are words.\n" * 100, ("text.jpg", "not an image")),
        "truncated.png": (png.getvalue()[: len(png.getvalue()) // 2], ("truncated.png", "damaged")),
        "truncated.jpg": (jpeg.getvalue()[: len(jpeg.getvalue()) // 2], ("truncated.jpg", "damaged")),
        "huge.png": (png_header(30_000, 30_000), ("30000 x 30000", "178956970", "--max-pixels 900000000")),
    }


@pytest.mark.parametrize("name", broken_images())
def test_broken_image(tmp_path, model, name):
    content, words = broken_images()[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refused(tmp_path, tmp_path / name, "--point", POINT, model=model, words=words)


def test_pixel_limit_can_be_lifted(photo, tmp_path, model, monkeypatch):
    """Beyond our limit, PIL's and the processor's, which all stand at the same number by default."""
    assert EfficientSamImageProcessor.max_image_pixels == 178_956_970
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL raises an error from twice its limit on
    limited = EfficientSamProcessor(EfficientSamImageProcessor(size=128, max_image_pixels=1000))
    EfficientSamModel.from_pretrained(model).save_pretrained(tmp_path / "limited")
    limited.save_pretrained(tmp_path / "limited")
    arguments = ["--point", POINT, "--overlay", tmp_path / "overlay.png", "--max-pixels", WIDTH * HEIGHT]
    segment(photo, *arguments, model=tmp_path / "limited")


def test_background_needs_a_model_that_knows_it(photo, model_without_background):
    arguments = [photo, "--point", POINT, "--background", "1,1"]
    refused(photo.parent, *arguments, model=model_without_background, words=("background points", "--model"))
    segment(photo, "--point", POINT, model=model_without_background)


def test_outputs_that_would_destroy_something(photo, model):
    content = photo.read_bytes()
    for option, name, words in [
        ("--output", "photo.png", ("is the image itself",)),
        ("--overlay", "photo.png", ("is the image itself",)),
        ("--output", "mask.jpg", (".png",)),
        ("--overlay", "overlay.xyz", (".png", ".jpg")),
        ("--output", "", (".png",)),
    ]:
        result = run("segment", photo, "--point", POINT, "--model", model, option, photo.parent / name)
        assert_refused(result, *words)
    same = ["--output", photo.with_name("a.png"), "--overlay", photo.parent / "." / "a.png"]
    assert_refused(run("segment", photo, "--point", POINT, "--model", model, *same), "both")
    assert photo.read_bytes() == content and all_files(photo.parent) == {"photo.png"}


def test_no_file_appears_if_one_cannot_be_written(photo, model):
    (photo.parent / "file").touch()
    arguments = ["--point", POINT, "--output", photo.with_name("mask.png"), "--overlay", photo.parent / "file/o.png"]
    assert_refused(run("segment", photo, *arguments, "--model", model), "file")
    assert all_files(photo.parent) == {"photo.png", "file"}


# ------------------------------------------------------------------------------------------------ wrong checkpoints


def bad_checkpoints(folder: Path, model: Path) -> dict[str, tuple[str, ...]]:
    """Makes directories that are no checkpoint, and says what must be said about each."""

    def copy(name: str, *left_out: str) -> Path:
        (folder / name).mkdir()
        for path in model.iterdir():
            if path.name not in left_out:
                (folder / name / path.name).write_bytes(path.read_bytes())
        return folder / name

    copy("no_weights", "model.safetensors")
    copy("no_config", "config.json")
    copy("no_processor", "processor_config.json", "preprocessor_config.json")
    (copy("bad_config") / "config.json").write_text("{")
    damaged = copy("damaged") / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    (folder / "file").write_bytes(b"weights")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**sizes, image_size=32)).save_pretrained(folder / "vit")

    other = tiny_config()
    other.vision_config.num_hidden_layers = 3
    other.save_pretrained(copy("lacks_a_layer"))
    other.vision_config.num_hidden_layers, other.mask_decoder_config.mlp_dim = 2, 32
    other.save_pretrained(copy("other_sizes"))
    return {
        "no_weights": ("no weights", "model.safetensors"),
        "no_config": ("no config.json",),
        "no_processor": ("cannot be loaded",),
        "bad_config": ("valid config.json",),
        "damaged": ("cannot be loaded",),
        "file": ("is a file", "efficientsam convert"),
        "vit": ("'vit'", "'efficientsam'"),
        "lacks_a_layer": ("lacks", "layers.2"),
        "other_sizes": ("cannot be loaded",),
        "nowhere": ("no such directory",),
    }


def test_wrong_checkpoints(photo, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name, words in bad_checkpoints(folder, model).items():
        refused(photo.parent, photo, "--point", POINT, model=folder / name, words=(name, *words))
        assert_refused(run("info", folder / name), name, *words)


def test_hub_name_out_of_reach(photo):
    refused(
        photo.parent, photo, "--point", POINT, model="someone/no-such-model", words=("someone/no-such-model", "Hub")
    )


def test_bundled_checkpoint_is_the_default(photo, model, monkeypatch):
    monkeypatch.setattr(hub, "bundled_checkpoint", lambda: str(model))
    record = json.loads(run("segment", photo, "--point", POINT, "--json").stdout)
    assert record["model"] == str(model)


def test_missing_bundled_checkpoint(photo, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "bundled_checkpoint", lambda: str(tmp_path / "gone"))
    refused(photo.parent, photo, "--point", POINT, words=("bundled checkpoint is missing", "--model"))
    assert_refused(run("info"), "bundled checkpoint is missing")


# ------------------------------------------------------------------------------------------------ folders


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of three images, one of them in a subfolder."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b.jpg", "sub/c.png"]):
        noise(seed=i).save(folder / name)
    return folder


LINES = [
    {"image": "a.png", "points": [[20, 20], [5, 5]], "labels": [1, 0]},
    {"image": "b.jpg", "boxes": [[10, 5, 50, 35], [0, 0, 30, 30]]},
    {"image": "sub/c.png", "points": [[30.5, 20]], "boxes": [[10, 5, 50, 35]]},
]


def write_prompts(folder: Path, lines: list) -> Path:
    path = folder.parent / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def run_folder(photos: Path, lines: list, *arguments, model):
    arguments = ["--output", photos.parent / "out", *arguments]
    return run("segment", photos, "--prompts", write_prompts(photos, lines), "--model", model, *arguments)


RESULTS = {"a.png", "a.json", "b_1.png", "b_2.png", "b.json", "sub/c.png", "sub/c.json"}


def test_folder(photos, model):
    out = photos.parent / "out"
    result = run_folder(photos, [*LINES, ""], "--json", "--overlay", photos.parent / "overlays", model=model)
    assert result.exit_code == 0 and "3/3" in result.stderr  # the progress bar
    assert all_files(out) == RESULTS
    assert all_files(photos.parent / "overlays") == {"a.png", "b.png", "sub/c.png"}
    document = json.loads(result.stdout)
    assert document["failed"] == [] and len(document["images"]) == 3
    for record, name in zip(document["images"], ["a", "b", "sub/c"], strict=True):
        assert json.loads((out / f"{name}.json").read_bytes()) == record

    prompts = ["--point", "20,20", "--background", "5,5"]
    single = segment(photos / "a.png", *prompts, "--output", photos.parent / "a.png", model=model)
    assert document["images"][0] == single
    assert (out / "a.png").read_bytes() == (photos.parent / "a.png").read_bytes()


def test_folder_prints_each_image_and_a_sum(photos, model):
    result = run_folder(photos, LINES, model=model)
    lines = result.stdout.splitlines()
    assert lines[0] == f"{photos / 'a.png'}: 60 x 40 pixels" and lines[1].startswith("  object 1: score ")
    assert lines[-1] == "3 of 3 images are done"


def counting(monkeypatch, stop_at: int | None = None) -> list[Path]:
    """The images that are segmented from now on; ends the process, as it were, when it is the turn of `stop_at`."""
    images, original = [], segment_files.Segmenter.__call__

    def call(self, path, *arguments):
        if len(images) == stop_at:
            raise KeyboardInterrupt
        images.append(path.name)
        return original(self, path, *arguments)

    monkeypatch.setattr(segment_files.Segmenter, "__call__", call)
    return images


def test_resume(photos, model, monkeypatch):
    out = photos.parent / "out"
    whole = json.loads(run_folder(photos, LINES, "--json", model=model).stdout)
    contents = {name: (out / name).read_bytes() for name in all_files(out)}
    for name in contents:
        (out / name).unlink()

    with monkeypatch.context() as patch:
        counting(patch, stop_at=2)
        assert run_folder(photos, LINES, model=model).exit_code not in (0, 2)
    assert all_files(out) == {"a.png", "a.json", "b_1.png", "b_2.png", "b.json"}
    images = counting(monkeypatch)
    result = run_folder(photos, LINES, "--json", model=model)
    assert images == ["c.png"]
    assert json.loads(result.stdout) == whole
    assert {name: (out / name).read_bytes() for name in all_files(out)} == contents
    assert run_folder(photos, LINES, model=model).stdout == "3 of 3 images are done\n"
    assert images == ["c.png"]


def test_killed_between_two_files(photos, model, monkeypatch):
    """
    Whatever file a run was killed before, the next run completes the image, and no record speaks of masks that it does
    not describe: here those of an earlier run with another prompt.
    """
    out, replace = photos.parent / "out", os.replace
    other = {"image": "b.jpg", "boxes": [[10, 5, 50, 35], [20, 0, 30, 30]]}
    for survivors in range(3):
        done = []
        run_folder(photos, [other], "--only-listed", model=model)

        def killed(source, target, survivors=survivors, done=done):
            if len(done) == survivors:
                raise KeyboardInterrupt
            done.append(target)
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            run_folder(photos, LINES[1:2], "--only-listed", model=model)
        assert len(done) == survivors and "b.json" not in all_files(out)
        assert run_folder(photos, LINES[1:2], "--only-listed", model=model).exit_code == 0
        assert all_files(out) == {"b_1.png", "b_2.png", "b.json"}


def test_what_is_not_complete_is_done_again(photos, model, model_without_background, monkeypatch):
    out = photos.parent / "out"
    run_folder(photos, LINES, model=model)
    images = counting(monkeypatch)

    def again(lines=LINES, *arguments, model=model) -> list[str]:
        assert run_folder(photos, lines, *arguments, model=model).exit_code == 0
        done = list(images)
        images.clear()
        return done

    assert again() == []
    (out / "b_2.png").unlink()
    assert again() == ["b.jpg"]
    later = (out / "a.json").stat().st_mtime + 10
    os.utime(photos / "a.png", (later, later))  # another picture under the old name
    assert again() == ["a.png"]
    os.utime(photos / "a.png", (0, 0))
    (out / "a.json").write_text('{"image": ')
    assert again() == ["a.png"]
    (out / "a.json").write_text("[]")
    assert again() == ["a.png"]
    other = [LINES[0], LINES[1], {**LINES[2], "points": [[31, 20]]}]
    assert again(other) == ["c.png"]
    overlay = ["--overlay", photos.parent / "overlays"]
    assert again(other, *overlay) == ["a.png", "b.jpg", "c.png"]
    assert again(other, *overlay) == []
    assert again(other, "--all-masks") == ["a.png", "b.jpg", "c.png"]
    other[0] = {"image": "a.png", "points": [[20, 20]]}
    assert again(other, "--all-masks", model=model_without_background) == ["a.png", "b.jpg", "c.png"]


def test_unreadable_images_do_not_stop_the_others(photos, model):
    (photos / "b.jpg").write_bytes((photos / "b.jpg").read_bytes()[:400])
    (photos / "a.png").write_bytes(b"")
    result = run_folder(photos, LINES, "--json", model=model)
    assert result.exit_code == 2
    document = json.loads(result.stdout)
    assert [record["image"] for record in document["images"]] == [str(photos / "sub/c.png")]
    assert [failure["image"] for failure in document["failed"]] == [str(photos / "a.png"), str(photos / "b.jpg")]
    last = result.stderr.splitlines()[-2:]
    assert "a.png" in last[0] and "0 bytes" in last[0] and "b.jpg" in last[1] and "damaged" in last[1]
    assert all_files(photos.parent / "out") == {"sub/c.png", "sub/c.json"}
    noise(seed=1).save(photos / "b.jpg")
    assert "2 of 3 images are done" in run_folder(photos, LINES, model=model).stdout


def test_results_inside_the_folder_are_not_taken_for_images(photos, model, monkeypatch):
    prompts = write_prompts(photos, LINES)
    monkeypatch.chdir(photos)
    for folder in (photos, photos, "."):  # absolute twice, with results there the second time, and relative
        result = run("segment", folder, "--prompts", prompts, "--model", model, "--output", "results")
        assert result.exit_code == 0, result.stderr


def test_turned_image_in_a_folder(tmp_path, model):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "photos").mkdir()
    noise().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photos" / "a.jpg", exif=exif)
    line = {"image": "a.jpg", "points": [[58, 20]]}
    result = run_folder(tmp_path / "photos", [line], model=model)
    assert result.exit_code == 0, result.stderr
    assert Image.open(tmp_path / "out" / "a.png").size == (WIDTH, HEIGHT)
    line["points"] = [[20, 58]]
    assert_refused(run_folder(tmp_path / "photos", [line], model=model), "line 1", "outside the image")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"image": "a.png", "points": [[20, 20]', ("not JSON",)),
        ("\udcff", ("not JSON",)),
        ("[" * 100_000, ("not JSON",)),
        ("[1, 2]", ("must be an object", '"image"')),
        ('{"points": [[20, 20]]}', ("must be an object", '"image"')),
        ({"image": "a.png", "point": [[20, 20]]}, ("unknown key 'point'",)),
        ({"image": "a.png", "points": [20, 20]}, ("points", "[x, y]")),
        ({"image": "a.png", "points": 20}, ("points", "[x, y]")),
        ({"image": "a.png", "points": [["20", "20"]]}, ("points", "[x, y]")),
        ('{"image": "a.png", "points": [[NaN, 20]]}', ("points", "finite")),
        (f'{{"image": "a.png", "points": [[1{"0" * 400}, 20]]}}', ("points", "finite")),
        ({"image": "a.png", "boxes": [10, 5, 50, 35]}, ("boxes", "[x1, y1, x2, y2]")),
        ({"image": "a.png", "boxes": [[10, 5, 10, 35]]}, ("no area",)),
        ({"image": "a.png", "points": [[20, 20]], "labels": [2]}, ("label", "1", "0", "not 2")),
        ({"image": "a.png", "points": [[20, 20]], "labels": [[1]]}, ("label", "not [1]")),
        ({"image": "a.png", "points": [[20, 20]], "labels": [1, 0]}, ("one label for each of the 1 points",)),
        ({"image": "a.png", "points": [[200, 20]]}, ("outside the image", "60 pixels wide")),
        ({"image": "a.png"}, ("nothing to segment",)),
        ({"image": "missing.png", "points": [[20, 20]]}, ("no image missing.png",)),
        ({"image": "../photos/a.png", "points": [[20, 20]]}, ("must lie inside the folder",)),
        ({"image": "/a.png", "points": [[20, 20]]}, ("must lie inside the folder",)),
        ({"image": "b.jpg", "points": [[20, 20]]}, ("b.jpg", "line 1 already")),
        ({"image": "./b.jpg", "points": [[20, 20]]}, ("b.jpg", "line 1 already")),
        ({"image": "b.png", "boxes": [[0, 0, 9, 9]]}, ("b.json", "twice", "line 1")),
        ({"image": "b_1.png", "boxes": [[0, 0, 9, 9]]}, ("b_1.png", "twice", "line 1")),
    ],
)  # fmt: skip
def test_wrong_line(photos, model, line, words):
    noise().save(photos / "b.png")
    noise().save(photos / "b_1.png")
    prompts = photos.parent / "prompts.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    prompts.write_bytes(f"{json.dumps(LINES[1])}\n\n{text}\n".encode(errors="surrogateescape"))
    before = all_files(photos.parent)
    result = run(
        "segment", photos, "--prompts", prompts, "--only-listed", "--output", photos / "out", "--model", model
    )
    assert_refused(result, f"{prompts}, line 3: ", *words)
    assert all_files(photos.parent) == before


def test_line_with_background_for_a_model_without(photos, model_without_background):
    result = run_folder(photos, LINES, model=model_without_background)
    assert_refused(result, "prompts.jsonl, line 1: ", "background points")


def test_prompts_for_the_wrong_number_of_images(photos, model):
    out = photos.parent / "out"
    assert_refused(
        run_folder(photos, LINES[:1], model=model), "prompts for 1 images", "2 more", "b.jpg", "--only-listed"
    )
    assert not out.exists()
    assert run_folder(photos, LINES[:1], "--only-listed", model=model).exit_code == 0
    assert all_files(out) == {"a.png", "a.json"}
    assert_refused(run_folder(photos, [], model=model), "holds no prompts")


def test_wrong_arguments_for_a_folder(photos, model):
    prompts, out = write_prompts(photos, LINES), photos.parent / "out"
    (photos.parent / "file").touch()
    for arguments, words in [
        (["--output", out], ("--prompts",)),
        (["--prompts", prompts], ("--output",)),
        (["--prompts", prompts, "--output", out, "--point", POINT], ("is a folder", "--prompts")),
        (["--prompts", photos / "none.jsonl", "--output", out], ("none.jsonl", "no such file")),
        (["--prompts", prompts, "--output", photos], ("does not hold the images",)),
        (["--prompts", prompts, "--output", photos.parent], ("does not hold the images",)),
        (["--prompts", prompts, "--output", photos.parent / "file"], ("must be a folder",)),
        (["--prompts", prompts, "--output", out, "--overlay", photos], ("does not hold the images",)),
        (["--prompts", prompts, "--output", out, "--overlay", out], ("twice",)),
    ]:
        assert_refused(run("segment", photos, "--model", model, *arguments), *words)
    assert not out.exists()


# ------------------------------------------------------------------------------------------------ info, convert


def test_info(model, model_without_background, tmp_path):
    text = run("info", model).stdout
    count = EfficientSamModel(tiny_config()).num_parameters() / 1e6
    assert f"parameters  {count:.2f} M" in text and "128 x 128 pixels" in text and "2 layers of 24" in text
    assert "points, boxes, background points, masks\n" in text
    assert "points, boxes, masks\n" in run("info", model_without_background).stdout
    assert "measured" not in text


def test_info_tells_the_measured_numbers(tmp_path):
    save_tiny(tmp_path)
    results = {"box": {"confident": {"all": {"miou": 0.71234}}}, "baseline": {"ellipse": {"all": {"miou": 0.637}}}}
    (tmp_path / "metrics.json").write_text(json.dumps({"masks": 911, "images": 100, "results": results}))
    lines = run("info", tmp_path).stdout.splitlines()
    assert lines[-3:] == [
        "measured    mIoU of 911 masks in 100 images",
        "  box, confident           0.7123",
        "  baseline, ellipse        0.6370",
    ]
    (tmp_path / "metrics.json").write_text('{"f1": 3}')
    assert "not known" in run("info", tmp_path).stdout


def test_convert(shared, tmp_path, photo):
    official = shared / "golden" / "official_layout_checkpoint.pt"
    options = ["--image-size", 128, "--num-attention-heads", 3, "--decoder-num-attention-heads", 4]
    result = run("convert", official, tmp_path / "out", *options)
    assert result.exit_code == 0 and "128 x 128" in result.stdout
    config = EfficientSamModel.from_pretrained(tmp_path / "out").config
    assert config.vision_config.num_attention_heads == 3 and config.mask_decoder_config.num_attention_heads == 4
    segment(photo, "--point", POINT, model=tmp_path / "out")

    assert_refused(run("convert", official, tmp_path / "out", *options), "not empty", "--overwrite")
    (tmp_path / "out" / "model.safetensors").unlink()
    assert run("convert", official, tmp_path / "out", *options, "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_convert_refuses(shared, tmp_path):
    official, out = shared / "golden" / "official_layout_checkpoint.pt", tmp_path / "out"
    (tmp_path / "words.pt").write_text("These are words.")
    (tmp_path / "file").touch()
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pt")
    for arguments, words in [
        ([tmp_path / "none.pt", out], ("none.pt",)),
        ([tmp_path / "words.pt", out], ("words.pt",)),
        ([tmp_path / "other.pt", out], ("no EfficientSAM checkpoint",)),
        ([official, tmp_path / "file"], ("is a file",)),
        ([official, out, "--image-size", 100, "--decoder-num-attention-heads", 4], ("100", "multiple")),
        ([official, out, "--decoder-num-attention-heads", 7], ("attention heads",)),
    ]:
        assert_refused(run("convert", *arguments), *words)
        assert not out.exists()


# ------------------------------------------------------------------------------------------------ the command itself


def test_version_and_help():
    assert run("--version").stdout == f"efficientsam {__version__}\n"
    text = run("segment", "--help").stdout
    for option in ("--point", "--box", "--background", "--all-masks", "--json", "--prompts", "--separate-points"):
        assert option in text
    assert run("segment", "photo.png", "--pont", "3,4").exit_code == 2


@pytest.mark.slow
def test_installed_command(photo, model):
    """In a process of its own: stdout holds the document and nothing else, stderr nothing."""
    command = [Path(sys.executable).with_name("efficientsam"), "segment", photo, "--point", POINT, "--model", model]
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stderr == ""
    assert json.loads(result.stdout)["objects"] == segment(photo, "--point", POINT, model=model)["objects"]
    result = subprocess.run([*command, "--point", "nan,1"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------ salient and text


@pytest.fixture
def objects(monkeypatch) -> np.ndarray:
    """Two objects that every saliency file shows, whatever is in the picture."""
    saliency = np.full((HEIGHT, WIDTH), 0.2, np.float32)
    saliency[5:25, 30:55], saliency[10:20, 5:15] = 0.9, 0.7
    monkeypatch.setattr(saliency_sources, "OnnxSaliency", lambda path: lambda image: saliency)
    return saliency


def test_salient_objects(photo, model, objects):
    folder, options = photo.parent, ["--saliency", "net.onnx", "--model", model]
    files = ["--output", folder / "new/mask.png", "--overlay", folder / "overlay.jpg"]
    result = run("salient", photo, *options, *files, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["image"], record["width"], record["height"]) == (str(photo), WIDTH, HEIGHT)
    assert record["model"] == str(model) and len(record["objects"]) == 2
    for i, box in enumerate(["30,5,55,25", "5,10,15,20"], start=1):
        mask = np.asarray(Image.open(folder / f"new/mask_{i}.png"))
        expected = segment(photo, "--box", box, model=model)["objects"][0]["masks"][0]
        assert record["objects"][i - 1] == {
            "label": "salient object",
            "score": round(float(objects[mask > 0].mean()), 4),
            "area": np.count_nonzero(mask),
            "box": expected["box"],
            "iou": expected["score"],
            "file": f"mask_{i}.png",
        }
        assert record["objects"][i - 1]["area"] == expected["area"] > 0
    assert all_files(folder) == {"photo.png", "new/mask_1.png", "new/mask_2.png", "overlay.jpg"}
    text = run("salient", photo, *options, "--threshold", "0.8", "--output", folder / "one.png").stdout
    assert "object 1, salient object: score " in text and "file one.png" in text and "object 2" not in text


def test_nothing_salient(photo, model, objects):
    result = run("salient", photo, "--saliency", "net.onnx", "--model", model, "--threshold", "0.95", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["objects"] == []
    assert result.stderr.startswith("efficientsam: nothing was found") and "--threshold" in result.stderr


def test_objects_by_name(photo, model, monkeypatch):
    class Dogs(Detector):
        def __init__(self, name, device):
            assert name == "some/detector"

        def __call__(self, image, names, threshold):
            assert np.array_equal(image, Image.open(photo)) and threshold == 0.25
            return torch.tensor([[10.0, 5, 50, 35]]), torch.tensor([0.5]), names

    monkeypatch.setattr("hf_efficientsam.cli.find.Detector", Dogs)
    options = ["--detector", "some/detector", "--threshold", "0.25", "--model", model, "--json"]
    (found,) = json.loads(run("text", photo, "a dog", *options).stdout)["objects"]
    expected = segment(photo, "--box", BOX, model=model)["objects"][0]["masks"][0]
    assert (found["label"], found["score"], found["iou"]) == ("a dog", 0.5, expected["score"])
    assert found["area"] == expected["area"] and "file" not in found and all_files(photo.parent) == {"photo.png"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["salient", "{photo}"], ("no saliency head", "--saliency", "train_saliency.py")),
        (["salient", "{photo}", "--saliency", "absent.onnx"], ("absent.onnx: no such file",)),
        (["salient", "{photo}", "--saliency", "nobody/nothing"], ("nobody/nothing", "nor a Hub model in reach")),
        (["salient", "{folder}"], ("is a folder",)),
        (["salient", "{folder}/absent.png"], ("no such file",)),
        (["salient", "{photo}", "--threshold", "1"], ("threshold",)),
        (["salient", "{photo}", "--max-pixels", "2399"], ("--max-pixels 2400",)),
        (["salient", "{photo}", "--output", "mask.jpg"], ("--output", ".png")),
        (["text", "{photo}", " , ", "--detector", "x/y"], ("a dog, a cat",)),
        (["text", "{photo}", "a dog", "--detector", "x/y"], ("x/y", "nor a Hub model in reach")),
        (["text", "{photo}", "a dog", "--detector", "{model}"], ("finds no objects by their names",)),
    ],
)  # fmt: skip
def test_wrong_arguments_of_salient_and_text(photo, model, arguments, words):
    arguments = [one.format(photo=photo, folder=photo.parent, model=model) for one in arguments]
    assert_refused(run(*arguments, "--model", model), *words)
    assert all_files(photo.parent) == {"photo.png"}


def test_the_image_itself_is_not_overwritten(photo, model, objects):
    before = photo.read_bytes()
    options = ["--saliency", "net.onnx", "--threshold", "0.8", "--model", model]
    assert_refused(run("salient", photo, *options, "--output", photo), "would be overwritten")
    assert_refused(run("salient", photo, *options, "--overlay", photo), "would be overwritten")
    same = photo.with_name("same.png")
    assert_refused(run("salient", photo, *options, "--output", same, "--overlay", same), "both a mask and the overlay")
    assert photo.read_bytes() == before and all_files(photo.parent) == {"photo.png"}
