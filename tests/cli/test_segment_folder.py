"""`efficientsam segment` on a folder: as its prompts file says, and resumed."""

import json
import os
from pathlib import Path

import pytest
from commands import HEIGHT, POINT, WIDTH, all_files, assert_refused, noise, run, run_segment, turned
from PIL import Image

from hf_efficientsam.inference.segment_files import Segmenter

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


def test_a_folder_gives_what_its_images_give_one_by_one(photos, model):
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
    single = run_segment(photos / "a.png", *prompts, "--output", photos.parent / "a.png", model=model)
    folder_record = document["images"][0]
    folder_record["objects"][0]["masks"][0]["file"] = str(photos.parent / "a.png")
    assert folder_record.pop("made_from") and folder_record.pop("files") and folder_record == single
    assert (out / "a.png").read_bytes() == (photos.parent / "a.png").read_bytes()


def test_text_lists_each_image_and_a_total(photos, model):
    result = run_folder(photos, LINES, model=model)
    lines = result.stdout.splitlines()
    assert lines[0] == f"{photos / 'a.png'}: 60 x 40 pixels" and lines[1].startswith("  object 1: score ")
    assert lines[-1] == "3 of 3 images are done"


def counting(monkeypatch, stop_at: int | None = None) -> list[Path]:
    """The images that are segmented from now on; ends the process, as it were, when it is the turn of `stop_at`."""
    images, original = [], Segmenter.__call__

    def call(self, path, *arguments):
        if len(images) == stop_at:
            raise KeyboardInterrupt
        images.append(path.name)
        return original(self, path, *arguments)

    monkeypatch.setattr(Segmenter, "__call__", call)
    return images


def test_a_stopped_run_goes_on_and_ends_with_the_same_files(photos, model, monkeypatch):
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


def test_no_record_describes_masks_of_another_run(photos, model, monkeypatch):
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
    os.utime(photos / "a.png", (later, later))  # the same picture
    assert again() == []
    noise(seed=7).save(photos / "a.png")  # another one under the old name
    os.utime(photos / "a.png", (0, 0))
    assert again() == ["a.png"]
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


def test_coordinates_in_a_folder_are_those_of_the_upright_image(tmp_path, model):
    stored, exif = turned(noise(), 6)
    (tmp_path / "photos").mkdir()
    stored.save(tmp_path / "photos" / "a.jpg", exif=exif)
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
    ],
)  # fmt: skip
def test_a_wrong_line_is_refused_with_its_number(photos, model, line, words):
    prompts = photos.parent / "prompts.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    prompts.write_bytes(f"{json.dumps(LINES[1])}\n\n{text}\n".encode(errors="surrogateescape"))
    before = all_files(photos.parent)
    result = run(
        "segment", photos, "--prompts", prompts, "--only-listed", "--output", photos / "out", "--model", model
    )
    assert_refused(result, f"{prompts}, line 3: ", *words)
    assert all_files(photos.parent) == before


def test_background_points_need_a_model_that_takes_them(photos, model_without_background):
    result = run_folder(photos, LINES, model=model_without_background)
    assert_refused(result, "prompts.jsonl, line 1: ", "background points")


def test_every_image_needs_a_line_unless_only_listed(photos, model):
    out = photos.parent / "out"
    assert_refused(
        run_folder(photos, LINES[:1], model=model), "prompts for 1 images", "2 more", "b.jpg", "--only-listed"
    )
    assert not out.exists()
    assert run_folder(photos, LINES[:1], "--only-listed", model=model).exit_code == 0
    assert all_files(out) == {"a.png", "a.json"}
    assert_refused(run_folder(photos, [], model=model), "holds no prompts")


def test_wrong_arguments_are_refused_and_nothing_is_written(photos, model):
    prompts, out = write_prompts(photos, LINES), photos.parent / "out"
    (photos.parent / "file").touch()
    for arguments, words in [
        (["--output", out], ("--prompts",)),
        (["--prompts", prompts], ("--output",)),
        (["--prompts", prompts, "--output", out, "--point", POINT], ("is a folder", "--prompts")),
        (["--prompts", photos / "none.jsonl", "--output", out], ("none.jsonl", "no such file")),
        (["--prompts", prompts, "--output", photos], ("does not hold the images",)),
        (["--prompts", prompts, "--output", photos.parent], ("does not hold the images",)),
        (["--prompts", prompts, "--output", photos.parent / "file"], ("is a file, so",)),
        (["--prompts", prompts, "--output", out, "--overlay", photos], ("does not hold the images",)),
        (["--prompts", prompts, "--output", out, "--overlay", out], ("twice",)),
    ]:
        assert_refused(run("segment", photos, "--model", model, *arguments), *words)
    assert not out.exists()
