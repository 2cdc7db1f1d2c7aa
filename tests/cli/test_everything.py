"""`efficientsam everything`: an image or a folder of images becomes a COCO dataset, and is resumed."""

import functools
import inspect
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from commands import all_files, assert_refused, noise, run, turned
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from hf_efficientsam import EfficientSamConfig
from hf_efficientsam.cli import everything
from hf_efficientsam.cli.everything import GENERATOR_DEFAULTS, everything_command
from hf_efficientsam.inference import everything_files, folder_runs
from hf_efficientsam.inference.drawing import lay_masks
from hf_efficientsam.inference.image_files import encode_image
from hf_efficientsam.inference.loading import load_model
from hf_efficientsam.inference.mask_generation import EfficientSamMaskGenerator

# A box of random weights' masks is mostly the whole image, so boxes tell no duplicates.
OPTIONS = {"points_per_side": 3, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.4, "box_nms_thresh": 1.0}
NAMES = ["a", "b", "sub/c"]


load_once = functools.cache(load_model)


def save(folder: Path, seed: int = 1, **options) -> Path:
    return tiny.save(folder, tiny.model_for_mask_generation(seed), tiny.processor(**options))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    """Loading takes most of the time of a call here."""
    monkeypatch.setattr(everything, "load_model", load_once)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b.jpg", "sub/c.png"]):
        noise(90, 61, seed=i).save(folder / name)
    (folder / "notes.md").touch()
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def annotate(image, out, *arguments, model, **options):
    """`everything` with OPTIONS, but for those given."""
    for name, value in (OPTIONS | options).items():
        arguments += (f"--{name.replace('_', '-')}", value)
    return run("everything", image, "--output", out, "--model", model, *arguments)


def annotate_well(*arguments, **options):
    result = annotate(*arguments, **options)
    assert result.exit_code == 0, result.output
    return result


def results(names=NAMES, folders=("labels/{}.png", "overlays/{}.jpg", "records/{}.json")) -> set[str]:
    return {"instances.json"} | {folder.format(name) for name in names for folder in folders}


def counting(monkeypatch, stop_at: int | None = None) -> list[str]:
    """The images that are annotated from now on; ends the process, as it were, when it is the turn of `stop_at`."""
    images, original = [], everything_files.EverythingSegmenter.__call__

    def call(self, path):
        if len(images) == stop_at:
            raise KeyboardInterrupt
        images.append(path.name)
        return original(self, path)

    monkeypatch.setattr(everything_files.EverythingSegmenter, "__call__", call)
    return images


# ------------------------------------------------------------------------------------------------ the dataset


def test_the_dataset_holds_the_masks_of_the_generator(photos, out, model):
    result = annotate_well(photos, out, "--exact", model=model)
    assert "3/3" in result.stderr and all_files(out) == results()
    dataset = COCO(out / "instances.json")
    images = dataset.loadImgs(dataset.getImgIds())
    assert [image["file_name"] for image in images] == ["a.png", "b.jpg", "sub/c.png"]
    assert all((image["height"], image["width"]) == (61, 90) for image in images)
    assert sorted(dataset.anns) == list(range(1, len(dataset.anns) + 1))
    assert dataset.loadCats(dataset.getCatIds())[0]["name"] == "object"

    generator, number = EfficientSamMaskGenerator(*load_once(str(model)), **OPTIONS), 0
    for image in images:
        expected = generator.generate(Image.open(photos / image["file_name"]))
        assert len(expected) > 3
        for record in expected:
            number += 1
            annotation = dataset.anns[number]
            mask = dataset.annToMask(annotation).astype(bool)
            assert annotation["image_id"] == image["id"] and np.array_equal(mask, record["segmentation"])
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
            assert annotation["area"] == mask.sum() and annotation["iscrowd"] == 0 and annotation["category_id"] == 1
            for key in ("predicted_iou", "stability_score", "point_coords"):
                assert annotation[key] == record[key]
    assert number == len(dataset.anns)


def test_the_label_map_shows_the_smallest_mask_and_the_overlay_all(photos, out, model):
    annotate_well(photos / "a.png", out, model=model)
    annotations = json.loads((out / "instances.json").read_bytes())["annotations"]
    masks = np.stack([coco_mask.decode(annotation["segmentation"]) for annotation in annotations])
    labels = Image.open(out / "labels/a.png")
    assert labels.mode == "L" and labels.size == (90, 61)
    labels = np.asarray(labels)
    areas = masks.sum(axis=(1, 2))
    assert len(set(areas)) == len(areas)  # so that the smallest is clear
    smallest = np.where(masks.astype(bool), areas[:, None, None], areas.max() + 1).argmin(axis=0) + 1
    assert np.array_equal(labels, np.where(masks.any(axis=0), smallest, 0))
    assert 0 in labels and len(np.unique(labels)) > 3

    expected = lay_masks(Image.open(photos / "a.png"), masks[np.argsort(-areas)].astype(bool))
    assert (out / "overlays/a.jpg").read_bytes() == encode_image(expected, Path("a.jpg"))


def test_one_image_is_a_dataset_too(photos, out, model):
    result = annotate_well(photos / "sub/c.png", out, "--no-overlay", "--json", model=model)
    assert result.stderr == "" and all_files(out) == results(["c"], ("labels/{}.png", "records/{}.json"))
    dataset, document = json.loads((out / "instances.json").read_bytes()), json.loads(result.stdout)
    assert dataset["images"] == [{"id": 1, "file_name": "c.png", "height": 61, "width": 90}]
    (record,) = document["images"]
    assert (record["image"], record["width"], record["height"]) == (str(photos / "sub/c.png"), 90, 61)
    assert document["failed"] == []
    expected = OPTIONS | {
        "crop_n_layers": 0,
        "min_mask_region_area": 0,
        "stability_score_offset": 1.0,
        "adaptive": True,
    }
    assert record["options"] == expected
    left_out = {"id", "image_id"}
    assert record["annotations"] == [
        {key: value for key, value in annotation.items() if key not in left_out}
        for annotation in dataset["annotations"]
    ]


def test_text_says_how_many_masks(photos, out, model):
    lines = annotate_well(photos, out, model=model).stdout.splitlines()
    count = len(json.loads((out / "records/a.json").read_bytes())["annotations"])
    assert lines[0] == f"{photos / 'a.png'}: 90 x 61 pixels, {count} masks" and len(lines) == 4
    assert lines[-1] == "3 of 3 images are done"
    assert annotate_well(photos, out, model=model).stdout == "3 of 3 images are done\n"


def test_options_reach_the_generator(photos, out, model, monkeypatch):
    """And crops have a bar of their own, where there is but one image."""
    given = []

    def generator(*arguments, **options):
        given.append(options)
        return EfficientSamMaskGenerator(*arguments, **options)

    monkeypatch.setattr(everything, "EfficientSamMaskGenerator", generator)
    options = {"crop_n_layers": 1, "min_mask_region_area": 30, "points_per_side": 2, "box_nms_thresh": 0.5}
    options |= {"points_per_batch": 3, "pred_iou_thresh": 0.1, "stability_score_thresh": 0.2}
    result = annotate_well(photos / "a.png", out, "--exact", model=model, **options)
    assert given == [options | {"output_mode": "coco_rle", "adaptive": False}]
    assert "5/5" in result.stderr and "crop" in result.stderr and "image" not in result.stderr


def test_defaults_are_those_of_the_generator_but_for_the_search():
    names = {*OPTIONS, "points_per_batch", "crop_n_layers", "min_mask_region_area"}
    parameters = inspect.signature(everything_command).parameters
    assert {name: parameters[name].default for name in names} == {name: GENERATOR_DEFAULTS[name] for name in names}
    assert GENERATOR_DEFAULTS["points_per_side"] == 32
    assert parameters["adaptive"].default and not GENERATOR_DEFAULTS["adaptive"]  # equal to transformers' pipeline


def test_a_finished_search_is_not_that_of_the_other_mode(photos, out, model):
    for mode, lines in (("--adaptive", 2), ("--adaptive", 1), ("--exact", 2)):
        said = run(
            "everything", photos / "a.png", "--output", out, "--model", model, "--points-per-side", 3, mode
        ).stdout
        assert len(said.splitlines()) == lines
        record = json.loads((out / "records/a.json").read_bytes())
        assert record["options"]["box_nms_thresh"] == (0.8 if mode == "--adaptive" else 0.7)


def test_a_turned_image_gives_what_the_upright_one_gives(tmp_path, out, model):
    """Everything is said of the upright image."""
    stored, exif = turned(noise(90, 61), 6)
    (tmp_path / "photos").mkdir()
    stored.save(tmp_path / "photos/turned.png", exif=exif)
    noise(90, 61).save(tmp_path / "photos/upright.png")
    annotate_well(tmp_path / "photos", out, model=model)
    found, expected = (json.loads((out / f"records/{name}.json").read_bytes()) for name in ("turned", "upright"))
    assert (found["width"], found["height"]) == (90, 61)
    assert found["annotations"] == expected["annotations"] and found["annotations"]
    for drawing in ("labels/{}.png", "overlays/{}.jpg"):
        assert (out / drawing.format("turned")).read_bytes() == (out / drawing.format("upright")).read_bytes()


def test_sixteen_bit_image_does_not_turn_white(tmp_path, out, model):
    gray = np.asarray(noise(90, 61).convert("L"))
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    annotate_well(tmp_path / "deep.png", out, model=model, stability_score_thresh=1)  # no masks
    overlay = np.asarray(Image.open(out / "overlays/deep.jpg"))
    assert np.abs(overlay.astype(int) - gray[..., None]).mean() < 5


def test_advice_where_no_mask_is_found(photos, out, model):
    result = annotate_well(photos / "a.png", out, model=model, stability_score_thresh=1)
    assert result.stdout.splitlines()[0] == f"{photos / 'a.png'}: 90 x 61 pixels, 0 masks"
    assert result.stderr == (
        f"efficientsam: no mask was found in {photos / 'a.png'}; try a lower --pred-iou-thresh (now 0) or "
        "--stability-score-thresh (now 1).\n"
    )
    dataset = COCO(out / "instances.json")
    assert len(dataset.imgs) == 1 and not dataset.anns
    assert np.asarray(Image.open(out / "labels/a.png")).max() == 0
    result = annotate_well(photos, out, "--json", model=model, stability_score_thresh=1)
    assert f"in 3 of 3 images, such as {photos / 'a.png'}; try" in result.stderr
    assert [record["annotations"] for record in json.loads(result.stdout)["images"]] == [[], [], []]


def test_thresholds_are_the_checkpoints_unless_given(photos, out, tmp_path):
    save(tmp_path / "model")
    config = EfficientSamConfig.from_pretrained(tmp_path / "model")
    config.mask_generation = {"pred_iou_thresh": 0.25, "stability_score_thresh": 0.5, "stability_score_offset": 2.0}
    config.save_pretrained(tmp_path / "model")
    given = [photos / "a.png", "--output", out, "--points-per-side", 2, "--model", tmp_path / "model"]
    for options, expected in (([], {}), (["--pred-iou-thresh", 0.75], {"pred_iou_thresh": 0.75})):
        run("everything", *given, *options)
        options = json.loads((out / "records/a.json").read_text())["options"]
        assert config.mask_generation | expected == {name: options[name] for name in config.mask_generation}


# ------------------------------------------------------------------------------------------------ resuming


def test_a_stopped_run_goes_on_and_ends_with_the_same_files(photos, out, tmp_path, model, monkeypatch):
    whole = annotate_well(photos, tmp_path / "whole", "--json", model=model).stdout
    with monkeypatch.context() as patch:
        counting(patch, stop_at=2)
        assert annotate(photos, out, model=model).exit_code not in (0, 2)
    assert all_files(out) == results(["a", "b"]) - {"instances.json"}
    images = counting(monkeypatch)
    assert annotate_well(photos, out, "--json", model=model).stdout == whole
    assert images == ["c.png"]
    for name in results():
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert annotate_well(photos, out, "--json", "--points-per-batch", 5, model=model).stdout == whole
    assert images == ["c.png"] and all_files(out) == results()


def test_no_record_describes_files_of_another_run(photos, out, model, monkeypatch):
    """Whatever file a run was killed before, no record speaks of files of another run, and the next run completes."""
    replace = os.replace
    expected = None
    for survivors in range(4):
        annotate_well(photos / "a.png", out, model=model, points_per_side=2)
        before = (out / "instances.json").read_bytes()
        done = []

        def killed(source, target, survivors=survivors, done=done):
            if len(done) == survivors:
                raise KeyboardInterrupt
            done.append(target)
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            annotate(photos / "a.png", out, model=model)
        assert len(done) == survivors and ("records/a.json" in all_files(out)) == (survivors == 3)
        assert (out / "instances.json").read_bytes() == before and not any(".part" in name for name in all_files(out))
        annotate_well(photos / "a.png", out, model=model)
        contents = {name: (out / name).read_bytes() for name in results(["a"])}
        assert expected in (None, contents) and contents["instances.json"] != before
        expected = contents


def test_a_run_that_died_in_its_first_image_can_go_on(photos, out, model, monkeypatch):
    """Its folder of results is known again as our own."""
    with monkeypatch.context() as patch:
        patch.setattr(folder_runs, "write_files", lambda files: (out / "labels").mkdir() or sys.exit(1))
        assert annotate(photos, out, model=model).exit_code == 1
    annotate_well(photos, out, model=model)


def test_what_is_not_complete_is_done_again(photos, out, tmp_path, model, monkeypatch):
    annotate_well(photos, out, "--no-overlay", model=model, points_per_side=1)
    images = counting(monkeypatch)

    def again(*arguments, model=model, **options) -> list[str]:
        annotate_well(photos, out, *arguments, model=model, **({"points_per_side": 1} | options))
        done = list(images)
        images.clear()
        return done

    everyone = ["a.png", "b.jpg", "c.png"]
    assert again("--no-overlay") == [] and again() == everyone and again("--no-overlay") == []
    (out / "labels/b.png").unlink()
    assert again() == ["b.jpg"]
    later = (out / "records/a.json").stat().st_mtime + 10
    os.utime(photos / "a.png", (later, later))  # the same picture
    assert again() == []
    noise(90, 61, seed=7).save(photos / "a.png")  # another one under the old name
    os.utime(photos / "a.png", (0, 0))
    assert again() == ["a.png"]
    for content in ('{"image": ', "[]", "{}"):
        (out / "records/a.json").write_text(content)
        assert again() == ["a.png"]
    noise(90, 61, seed=9).save(photos / "new.webp")
    assert again() == ["new.webp"]
    (photos / "new.webp").unlink()
    assert again() == [] and len(json.loads((out / "instances.json").read_bytes())["images"]) == 3
    for name, value in {"points_per_side": 2, "stability_score_thresh": 0.5}.items():
        assert again(**{name: value}) == everyone and again(**{name: value}) == []
    again()
    other = save(tmp_path / "other", seed=2)
    assert again(model=other) == everyone and again(model=other) == []
    later = (out / "records/a.json").stat().st_mtime + 10
    os.utime(other / "model.safetensors", (later, later))
    assert again(model=other) == [] and again(model=shutil.copytree(other, tmp_path / "moved")) == []
    load_once.cache_clear()
    save(other, seed=3)  # other weights under the old name
    assert again(model=other) == everyone
    monkeypatch.setattr(folder_runs, "__version__", "999")
    assert again(model=other) == everyone


def test_broken_images_do_not_stop_the_others(photos, out, model):
    (photos / "a.png").write_bytes(b"")
    (photos / "b.jpg").write_bytes((photos / "b.jpg").read_bytes()[:400])
    result = annotate(photos, out, "--json", model=model)
    assert result.exit_code == 2 and all_files(out) == results(["sub/c"])
    document = json.loads(result.stdout)
    assert [record["image"] for record in document["images"]] == [str(photos / "sub/c.png")]
    assert [failure["image"] for failure in document["failed"]] == [str(photos / "a.png"), str(photos / "b.jpg")]
    last = result.stderr.splitlines()[-2:]
    assert "a.png" in last[0] and "0 bytes" in last[0] and "b.jpg" in last[1] and "damaged" in last[1]
    assert [image["id"] for image in COCO(out / "instances.json").dataset["images"]] == [1]
    noise(90, 61).save(photos / "b.jpg")
    assert "2 of 3 images are done" in annotate(photos, out, model=model).stdout


# ------------------------------------------------------------------------------------------------ wrong input


def test_wrong_arguments_are_refused_and_nothing_is_written(photos, out, tmp_path, model):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    before = all_files(tmp_path)
    for image, output, options, words in [
        (tmp_path / "none.png", out, {}, ("none.png: no such file",)),
        (tmp_path / "empty", out, {}, ("empty holds no images",)),
        (photos / "notes.md", out, {}, ("notes.md", "0 bytes")),
        (photos, tmp_path / "file", {}, ("file is a file, so",)),
        (photos / "a.png", tmp_path / "file", {}, ("file is a file, so",)),
        (photos, photos, {}, ("does not hold the images",)),
        (photos, tmp_path, {}, ("does not hold the images",)),
        (photos, out, {"points_per_side": 0}, ("points_per_side must be at least 1",)),
        (photos, out, {"points_per_batch": 0}, ("points_per_batch must be at least 1",)),
        (photos, out, {"crop_n_layers": -1}, ("crop_n_layers must be at least 0",)),
        (photos / "a.png", out, {"max_pixels": 5489}, ("90 x 61", "--max-pixels 5490")),
    ]:
        assert_refused(annotate(image, output, model=model, **options), *words)
        assert all_files(tmp_path) == before and not out.exists()


def test_files_of_others_are_not_overwritten(photos, tmp_path, model):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/instances.json").write_text("by hand")
    words = ("coco/instances.json is there already", "--output")
    assert_refused(annotate(photos, tmp_path / "coco", model=model), *words)
    assert (tmp_path / "coco/instances.json").read_text() == "by hand"


def test_a_label_map_as_input_is_not_overwritten(photos, out, model):
    annotate_well(photos, out, model=model)
    content = (out / "labels/a.png").read_bytes()
    assert_refused(annotate(out / "labels/a.png", out, model=model, points_per_side=2), "would be overwritten")
    assert (out / "labels/a.png").read_bytes() == content


def test_results_inside_the_folder_are_not_taken_for_images(photos, model, monkeypatch):
    monkeypatch.chdir(photos)
    images = counting(monkeypatch)
    for folder in (photos, "."):  # absolute, and relative with results there
        annotate_well(folder, "results", model=model)
    assert images == ["a.png", "b.jpg", "c.png"]


def test_the_pixel_limit_can_be_lifted(photos, out, tmp_path, monkeypatch):
    """Beyond our limit, PIL's and the processor's."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    limited = save(tmp_path / "limited", max_image_pixels=1000)
    annotate_well(photos / "a.png", out, model=limited, max_pixels=90 * 61, crop_n_layers=1, points_per_side=1)
