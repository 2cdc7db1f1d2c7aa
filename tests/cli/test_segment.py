"""`efficientsam segment` on one image."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
import tiny
import torch
from commands import (
    BOX,
    HEIGHT,
    POINT,
    WIDTH,
    all_files,
    assert_refused,
    assert_segment_refused,
    noise,
    run,
    run_segment,
    turned,
)
from PIL import Image

from hf_efficientsam import EfficientSamImageProcessor, EfficientSamModel, EfficientSamProcessor
from hf_efficientsam.inference.results import mask_rles


def test_mask_and_numbers_are_those_of_model_and_processor(photo, model):
    output, overlay = photo.with_name("mask.png"), photo.with_name("overlay.jpg")
    arguments = ["--point", POINT, "--box", BOX, "--background", "1,1", "--output", output, "--overlay", overlay]
    record = run_segment(photo, *arguments, model=model)

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
                    "file": str(output),
                    "segmentation": mask_rles(expected[None])[0],
                }
            ],
        }
    ]
    assert Image.open(overlay).size == (WIDTH, HEIGHT)
    assert all_files(photo.parent) == {"photo.png", "mask.png", "overlay.jpg"}


def test_text_says_what_json_says(photo, model):
    arguments = ["--point", POINT, "--box", BOX, "--output", photo.with_name("mask.png")]
    mask = run_segment(photo, *arguments, model=model)["objects"][0]["masks"][0]
    result = run("segment", photo, *arguments, "--model", model)
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout.splitlines() == [
        f"{photo}: {WIDTH} x {HEIGHT} pixels",
        f"  object 1: score {mask['score']:.3f}, area {mask['area']} pixels, "
        f"box {','.join(map(str, mask['box']))}, file {photo.with_name('mask.png')}",
    ]


def test_nothing_is_written_unless_asked(photo, model):
    record = run_segment(photo, "--point", POINT, model=model)
    assert "file" not in record["objects"][0]["masks"][0]
    assert all_files(photo.parent) == {"photo.png"}


def test_folders_of_the_output_are_made(photo, model):
    run_segment(photo, "--point", POINT, "--output", photo.parent / "new/folder/mask.png", model=model)
    assert all_files(photo.parent) == {"photo.png", "new/folder/mask.png"}


def test_all_candidates_come_best_first(photo, model):
    record = run_segment(photo, "--box", BOX, "--all-masks", "--output", photo.with_name("m.png"), model=model)
    masks = record["objects"][0]["masks"]
    scores = [mask["score"] for mask in masks]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    assert [mask["file"] for mask in masks] == [str(photo.with_name(f"m_1_{k}.png")) for k in (1, 2, 3)]
    for mask in masks:
        assert np.count_nonzero(np.asarray(Image.open(mask["file"]))) == mask["area"]
    best = run_segment(photo, "--box", BOX, model=model)["objects"][0]["masks"]
    assert [mask["score"] for mask in best] == scores[:1]
    assert "object 1, candidate 3: " in run("segment", photo, "--box", BOX, "--all-masks", "--model", model).stdout


def prompts_of(record: dict) -> list[tuple]:
    return [(one["points"], one["labels"], one["box"]) for one in record["objects"]]


def test_points_of_one_call_are_one_object(photo, model):
    record = run_segment(photo, "--point", "20,20", "--point", "30,10", "--background", "5,5", model=model)
    assert prompts_of(record) == [([[20, 20], [30, 10], [5, 5]], [1, 1, 0], None)]


def test_several_boxes_are_several_objects_and_each_point_belongs_to_its_box(photo, model):
    record = run_segment(
        *[photo, "--box", "0,0,20,20", "--box", "30,10,50,30", "--point", "40,20", "--point", "1,2"],
        *["--background", "25,5", "--output", photo.with_name("m.png")],
        model=model,
    )
    assert prompts_of(record) == [
        ([[1, 2], [25, 5]], [1, 0], [0, 0, 20, 20]),
        ([[40, 20], [25, 5]], [1, 0], [30, 10, 50, 30]),
    ]
    assert all_files(photo.parent) == {"photo.png", "m_1.png", "m_2.png"}
    alone = run_segment(photo, "--box", "30,10,50,30", "--point", "40,20", "--background", "25,5", model=model)
    together, alone = record["objects"][1]["masks"][0], alone["objects"][0]["masks"][0]
    assert together["score"] == pytest.approx(alone["score"], abs=2e-4) and together["box"] == alone["box"]


def test_separate_points_are_objects_of_their_own(photo, model):
    arguments = ["--separate-points", "--point", "20,20", "--point", "30,10", "--background", "5,5", "--box", BOX]
    assert prompts_of(run_segment(photo, *arguments, model=model)) == [
        ([[5, 5]], [0], [10, 5, 50, 35]),
        ([[20, 20], [5, 5]], [1, 0], None),
        ([[30, 10], [5, 5]], [1, 0], None),
    ]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "YCbCr"])
def test_images_of_every_mode_give_what_they_show(tmp_path, model, mode):
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
    found = run_segment(path, *arguments, model=model)
    mask, overlay = (np.asarray(Image.open(tmp_path / name)) for name in ("mask.png", "overlay.png"))
    expected = run_segment(tmp_path / "plain.png", *arguments, model=model)
    assert found["objects"][0]["masks"][0]["score"] == pytest.approx(
        expected["objects"][0]["masks"][0]["score"], abs=1e-3
    )
    assert np.mean(mask != np.asarray(Image.open(tmp_path / "mask.png"))) < 0.01
    difference = np.abs(overlay - np.asarray(Image.open(tmp_path / "overlay.png")).astype(int))
    assert np.mean(difference > 2) < 0.02


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_coordinates_are_those_of_the_upright_image(tmp_path, model, ending, orientation):
    """Coordinates and masks are those of the upright image, 60 x 40."""
    path = tmp_path / f"turned.{ending}"
    stored, exif = turned(noise(), orientation)
    stored.save(path, exif=exif, **({"quality": 98} if ending == "jpg" else {}))
    noise().save(tmp_path / "upright.png")
    arguments = ["--point", "58,20", "--box", "30,5,60,35", "--output", tmp_path / "mask.png"]
    found = run_segment(path, *arguments, model=model)
    mask = np.asarray(Image.open(tmp_path / "mask.png"))
    expected = run_segment(tmp_path / "upright.png", *arguments, model=model)
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
def test_wrong_arguments_are_refused_and_nothing_is_written(photo, model, arguments, words):
    assert_segment_refused(photo.parent, photo, *arguments, model=model, words=words)


def test_the_largest_point_lies_in_the_image(photo, model):
    run_segment(photo, "--point", f"{WIDTH},{HEIGHT}", model=model)


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
def test_broken_images_are_refused(tmp_path, model, name):
    content, words = broken_images()[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert_segment_refused(tmp_path, tmp_path / name, "--point", POINT, model=model, words=words)


def test_the_pixel_limit_can_be_lifted(photo, tmp_path, monkeypatch):
    """Beyond our limit, PIL's and the processor's, which all stand at the same number by default."""
    assert EfficientSamImageProcessor.max_image_pixels == 178_956_970
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL raises an error from twice its limit on
    (tmp_path / "limited").mkdir()
    tiny.save(tmp_path / "limited", tiny.model(), tiny.processor(max_image_pixels=1000))
    arguments = ["--point", POINT, "--overlay", tmp_path / "overlay.png", "--max-pixels", WIDTH * HEIGHT]
    run_segment(photo, *arguments, model=tmp_path / "limited")


def test_background_needs_a_model_that_knows_it(photo, model_without_background):
    arguments = [photo, "--point", POINT, "--background", "1,1"]
    assert_segment_refused(
        photo.parent, *arguments, model=model_without_background, words=("background points", "--model")
    )
    run_segment(photo, "--point", POINT, model=model_without_background)


def test_outputs_that_would_overwrite_something_are_refused(photo, model):
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


# ------------------------------------------------------------------------------------------------ warnings


def test_a_box_beyond_the_image_is_clipped_and_the_command_says_so(photo, model):
    arguments = ["segment", photo, "--box", f"-9,5,50,{HEIGHT + 3}", "--model", model, "--json"]
    result = run(*arguments)
    assert result.exit_code == 0
    assert result.stderr.splitlines()[-1] == (
        "efficientsam: a box reaches beyond the image; such boxes are clipped to their image."
    )
    found = json.loads(result.stdout)["objects"][0]["masks"]
    assert found == run_segment(photo, "--box", f"0,5,50,{HEIGHT}", model=model)["objects"][0]["masks"]
