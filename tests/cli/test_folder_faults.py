"""Folders in which one file is the trouble: the others are done, and it is named and counted at the end."""

import errno
import json
import os
from pathlib import Path

import pytest
import tiny
from commands import all_files, noise, run
from PIL import Image
from pycocotools.coco import COCO

from hf_efficientsam.inference import image_files
from hf_efficientsam.inference.results import draw_label_map

POINT_PROMPT = {"points": [[20, 20]]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny"), tiny.model_for_mask_generation(1), tiny.processor())


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def everything(images, out, *arguments, model):
    options = ["--points-per-side", 1, "--pred-iou-thresh", 0, "--stability-score-thresh", 0]
    return run("everything", images, "--output", out, "--model", model, *options, *arguments)


def segment(images, out, *arguments, model, lines=None):
    """With a prompts file of `lines`, or one point for each file of the folder."""
    files = sorted(path.relative_to(images).as_posix() for path in images.rglob("*") if path.is_file())
    lines = lines or [{"image": name, **POINT_PROMPT} for name in files]
    prompts = images.parent / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, lines)))
    return run("segment", images, "--prompts", prompts, "--output", out, "--model", model, *arguments)


COMMANDS = {"everything": everything, "segment": segment}


def document_of(result, done: int, failed: int) -> dict:
    """The printed document; so many images are done, and so many are named at the end."""
    assert result.exit_code == (2 if failed else 0), result.output
    document = json.loads(result.stdout)
    assert (len(document["images"]), len(document["failed"])) == (done, failed)
    named = result.stderr.splitlines()[-failed:] if failed else []
    for failure, line in zip(document["failed"], named, strict=True):
        assert failure["image"] in line and line == f"efficientsam: {failure['error']}"
    return document


def dataset_images(out: Path) -> list[str]:
    return [image["file_name"] for image in COCO(out / "instances.json").dataset["images"]]


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_cannot_be_written_does_not_stop_the_others(photos, out, model, command):
    taken = out / {"everything": "labels/b.png", "segment": "b.png"}[command]
    (taken / "in the way").mkdir(parents=True)
    (out / "records").mkdir(exist_ok=True)
    document = document_of(COMMANDS[command](photos, out, "--json", model=model), done=2, failed=1)
    assert str(taken) in document["failed"][0]["error"] and not any(".part" in name for name in all_files(out))
    (taken / "in the way").rmdir()
    taken.rmdir()
    document_of(COMMANDS[command](photos, out, "--json", model=model), done=3, failed=0)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_said_of_each_image_by_the_name_of_its_file(photos, out, model, monkeypatch, command):
    write = Path.write_bytes

    def full(path, content):
        if path.suffix == ".part" and path.parent.name == "sub":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as of a write: without a name
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    document = document_of(COMMANDS[command](photos, out, "--json", model=model), done=2, failed=1)
    file = out / {"everything": "labels/sub/c.png", "segment": "sub/c.png"}[command]
    assert document["failed"][0]["error"] == f"{photos / 'sub/c.png'}: {file}: No space left on device."


def test_an_image_too_wide_for_jpeg_does_not_stop_everything(photos, out, model):
    noise(66000, 8).save(photos / "b.png")
    (photos / "b.jpg").unlink()
    document = document_of(everything(photos, out, "--json", model=model), done=2, failed=1)
    assert "66000 x 8" in document["failed"][0]["error"] and "JPEG" in document["failed"][0]["error"]
    assert dataset_images(out) == ["a.png", "sub/c.png"]
    document_of(everything(photos, out, "--json", "--no-overlay", model=model), done=3, failed=0)


@pytest.mark.parametrize(("ending", "side"), [(".jpg", 65500), (".webp", 16383), (".png", 70000)])
def test_every_format_takes_images_up_to_its_limit(ending, side):
    path = Path(f"image{ending}")
    image_files.encode_image(Image.new("L", (side, 1)), path)
    if ending != ".png":
        with pytest.raises(image_files.ImageError, match=f"{side + 1} x 1 pixels does not fit"):
            image_files.encode_image(Image.new("L", (side + 1, 1)), path)


def test_a_label_map_counts_as_many_masks_as_a_png_does():
    with pytest.raises(ValueError, match="65535"):
        draw_label_map([None] * 65536, [1] * 65536, (1, 1))


@pytest.mark.parametrize("command", COMMANDS)
def test_odd_names_and_tiny_images_are_done_and_names_too_long_are_failures(photos, out, model, command):
    for name in ("x" * 250 + ".png", "a b;'\"$%\n.png", "naïve 画像.png", os.fsdecode(b"\xff.png")):
        noise(9, 7).save(photos / name)
    for i, size in enumerate([(1, 1), (1, 300), (300, 1)]):
        noise(*size).save(photos / f"tiny_{i}.png")
    noise().save(photos / ("y" * 251 + ".png"))  # its record's name would be 256 long
    lines = [{"image": path.name, "boxes": [[0, 0, 1, 1]]} for path in sorted(photos.glob("*.*"))]
    options = {} if command == "everything" else {"lines": lines}
    arguments = ["--json"] if command == "everything" else ["--json", "--only-listed"]
    done = 10 if command == "everything" else 9
    document = document_of(COMMANDS[command](photos, out, *arguments, model=model, **options), done=done, failed=1)
    assert "File name too long" in document["failed"][0]["error"]
    shown = COMMANDS[command](photos, out, *arguments[1:], "--format", "label-studio", model=model, **options)
    assert shown.exit_code == 2 and f"{done} of {done + 1} images are done" in shown.stdout
    assert "%FF.png" in (out / "label-studio/tasks.json").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_limit_of_pixels_is_no_part_of_what_a_result_was_made_from(photos, out, model, command, tmp_path):
    records = []
    other = tiny.save(tmp_path / "other", tiny.model_for_mask_generation(1), tiny.processor(max_image_pixels=9999))
    for checkpoint, limit in ((model, 10**6), (other, 10**7)):
        document_of(
            COMMANDS[command](photos, out, "--json", "--max-pixels", limit, model=checkpoint), done=3, failed=0
        )
        records.append([file.stat().st_mtime_ns for file in sorted(out.rglob("[abc].json"))])
    assert len(records[0]) == 3 and records[0] == records[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_overlay_of_other_options_goes_and_is_not_taken_for_one_of_these(photos, out, model, command, tmp_path):
    other = tiny.save(tmp_path / "other", tiny.model_for_mask_generation(2), tiny.processor())
    with_overlay, without = {"everything": ([], ["--no-overlay"]), "segment": (["--overlay", out / "overlays"], [])}[
        command
    ]
    overlay = out / "overlays" / {"everything": "a.jpg", "segment": "a.png"}[command]
    COMMANDS[command](photos, out, *with_overlay, model=model)
    first = overlay.read_bytes()
    COMMANDS[command](photos, out, *without, model=other)
    assert not overlay.exists()
    COMMANDS[command](photos, out, *with_overlay, model=other)
    assert overlay.read_bytes() != first


def test_masks_of_objects_that_are_no_more_go_unless_somebody_has_changed_them(photos, out, model):
    boxes = [[10, 5, 50, 35], [0, 0, 30, 30], [5, 5, 40, 30]]
    segment(photos, out, "--only-listed", model=model, lines=[{"image": "b.jpg", "boxes": boxes}])
    assert {"b_1.png", "b_2.png", "b_3.png"} <= all_files(out)
    noise(seed=3).save(out / "b_3.png")
    segment(photos, out, "--only-listed", model=model, lines=[{"image": "b.jpg", "boxes": boxes[:1]}])
    assert all_files(out) == {"b.png", "b.json", "b_3.png"}


def test_a_dataset_has_the_image_that_was_segmented_though_size_and_time_of_another_are_as_good(photos, out, model):
    noise(seed=1).save(photos / "a.bmp")
    (photos / "a.png").unlink()
    segment(photos, out, "--format", "yolo", model=model)
    noise(seed=2).save(photos / "a.bmp")
    os.utime(photos / "a.bmp", (0, 0))
    segment(photos, out, "--format", "yolo", model=model)
    assert (out / "yolo/images/a.bmp").read_bytes() == (photos / "a.bmp").read_bytes()


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("command", COMMANDS)
def test_images_of_one_stem_have_results_of_their_own(photos, out, model, command):
    noise(90, 61, seed=5).save(photos / "a.webp")
    noise(seed=6).save(photos / "A.bmp")  # one file with a.png's on some file systems
    names = {"a.png.json", "a.webp.json", "A.bmp.json", "b.json", "sub/c.json"}
    document_of(COMMANDS[command](photos, out, "--json", model=model), done=5, failed=0)
    folder = out / "records" if command == "everything" else out
    assert {name for name in all_files(folder) if name.endswith(".json")} - {"instances.json"} == names
    masks = {"everything": out / "labels", "segment": out}[command]
    assert Image.open(masks / "a.webp.png").size == (90, 61) and Image.open(masks / "a.png.png").size == (60, 40)


def test_an_image_named_as_a_mask_of_another_has_a_name_of_its_own(photos, out, model):
    noise(90, 61).save(photos / "b_1.png")
    boxes = {"image": "b.jpg", "boxes": [[10, 5, 50, 35], [0, 0, 30, 30]]}
    result = segment(photos, out, "--only-listed", model=model, lines=[boxes, {"image": "b_1.png", **POINT_PROMPT}])
    assert result.exit_code == 0, result.output
    assert all_files(out) == {"b.jpg_1.png", "b.jpg_2.png", "b.jpg.json", "b_1.png.png", "b_1.png.json"}


# ------------------------------------------------------------------------------------------------ one output, twice


def test_the_dataset_keeps_the_images_of_earlier_calls(photos, out, tmp_path, model):
    (tmp_path / "more").mkdir()
    noise(90, 61, seed=8).save(tmp_path / "more/z.png")
    everything(photos / "a.png", out, model=model)
    everything(photos / "b.jpg", out, model=model)
    assert dataset_images(out) == ["a.png", "b.jpg"]
    everything(tmp_path / "more", out, "--box-nms-thresh", 0.5, model=model)
    assert dataset_images(out) == ["a.png", "b.jpg", "z.png"]
    dataset = json.loads((out / "instances.json").read_text())
    assert dataset["info"]["options"]["box_nms_thresh"] == 0.5
    assert [image.get("options", {}).get("box_nms_thresh") for image in dataset["images"]] == [0.8, 0.8, None]
    (photos / "b.jpg").unlink()
    everything(photos, out, model=model)
    assert dataset_images(out) == ["a.png", "sub/c.png", "z.png"]  # what is gone from the folder is gone here, too


def test_an_image_of_another_folder_does_not_take_the_place_of_one_of_the_same_name(photos, out, tmp_path, model):
    (tmp_path / "more").mkdir()
    noise(90, 61, seed=8).save(tmp_path / "more/a.png")
    noise(90, 61, seed=8).save(tmp_path / "more/z.png")
    everything(photos / "a.png", out, model=model)
    before = (out / "records/a.json").read_bytes()
    document = document_of(everything(tmp_path / "more", out, "--json", model=model), done=1, failed=1)
    assert f"is of another image, {photos / 'a.png'}" in document["failed"][0]["error"]
    assert (out / "records/a.json").read_bytes() == before


@pytest.mark.parametrize(
    "command",
    [
        ["segment", "PHOTO", "--point", "20,20", "--output", "OUT/mask.png"],
        ["segment", "PHOTO", "--point", "20,20", "--overlay", "OUT/overlay.png"],
        ["segment", "PHOTO", "--point", "20,20", "--output", "OUT", "--format", "coco"],
        ["segment", "PHOTOS", "--prompts", "PROMPTS", "--output", "OUT"],
        ["salient", "PHOTO", "--output", "OUT/mask.png"],
        ["everything", "PHOTO", "--output", "OUT"],
        ["everything", "PHOTOS", "--output", "OUT"],
        ["convert", "any.pt", "OUT"],
        ["export-onnx", "MODEL", "OUT"],
        ["export-browser", "MODEL", "OUT"],
        ["publish", "MODEL", "someone/tiny", "--output", "OUT"],
    ],
    ids=lambda command: " ".join(command),
)
def test_nothing_is_written_below_a_file(photos, model, tmp_path, command):
    """Which is said before any work, by the name of the file."""
    file, prompts = tmp_path / "file.txt", tmp_path / "prompts.jsonl"
    file.touch()
    prompts.write_text(json.dumps({"image": "a.png", **POINT_PROMPT}))
    names = {"PHOTOS": photos, "PHOTO": photos / "a.png", "MODEL": model, "OUT": file / "out", "PROMPTS": prompts}

    def filled(word):
        first, slash, rest = word.partition("/")
        return f"{names[first]}{slash}{rest}" if first in names else word

    result = run(*map(filled, command))
    assert result.exit_code == 2
    sentence = f"{file} is a file, so {file / 'out'} cannot be a folder; give another name."
    assert result.stderr == f"efficientsam: {sentence}\n"
