"""`--format` of the commands that find masks: datasets for other tools, made of the records in a folder of results."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import supervision
import yaml
from commands import BOX, HEIGHT, WIDTH, all_files, assert_refused, noise, run
from pycocotools import mask as coco_mask

from hf_efficientsam.inference.formats.polygons import mask_of_polygons
from hf_efficientsam.inference.prompters import saliency_sources

EVERY_FORMAT = [part for name in ("coco", "yolo", "labelme", "label-studio") for part in ("--format", name)]
TWO_BOXES = ["--box", BOX, "--box", "0,0,30,30"]


def segment(image, model, out, *arguments):
    result = run("segment", image, "--model", model, "--output", out, *arguments)
    assert result.exit_code == 0, result.output
    return result


def best_masks(record: Path) -> list[np.ndarray]:
    """The best mask of each object that is not empty."""
    found = [one["masks"][0]["segmentation"] for one in json.loads(record.read_bytes())["objects"]]
    masks = [coco_mask.decode(rle).astype(bool) for rle in found]
    return [mask for mask in masks if mask.any()]


def assert_close(masks, expected):
    assert len(masks) == len(expected) > 0
    assert all((one ^ other).sum() < 0.1 * WIDTH * HEIGHT for one, other in zip(masks, expected, strict=True))


def test_every_format_has_the_masks_of_the_records(photo, model):
    out = photo.parent / "out"
    segment(photo, model, out, *TWO_BOXES, "--all-masks", *EVERY_FORMAT)
    names = {f"photo_{i}_{k}.png" for i in (1, 2) for k in (1, 2, 3)} | {"photo.json", "coco/instances.json"}
    names |= {"yolo/data.yaml", "yolo/classes.txt", "yolo/images/photo.png", "yolo/labels/photo.txt"}
    assert all_files(out) == names | {
        "labelme/photo.json", "label-studio/tasks.json", "label-studio/label_config.xml"
    }  # fmt: skip
    expected = best_masks(out / "photo.json")

    read = supervision.DetectionDataset.from_coco(
        str(photo.parent), str(out / "coco/instances.json"), force_masks=True
    )
    _, _, found = read[0]
    assert read.classes == ["object"] and np.array_equal(found.mask, expected)

    settings = yaml.safe_load((out / "yolo/data.yaml").read_text())
    assert settings == {"train": "images", "val": "images", "names": ["object"]}
    assert (out / "yolo/images/photo.png").read_bytes() == photo.read_bytes()
    lines = (out / "yolo/labels/photo.txt").read_text().splitlines()
    corners = [np.array(line.split()[1:], float).reshape(-1, 2) * [WIDTH, HEIGHT] for line in lines]
    assert_close([mask_of_polygons([one], HEIGHT, WIDTH) for one in corners], expected)

    content = json.loads((out / "labelme/photo.json").read_bytes())
    assert (out / "labelme" / content["imagePath"]).samefile(photo)
    polygons = [np.array(shape["points"]) for shape in content["shapes"]]
    union = mask_of_polygons(polygons, HEIGHT, WIDTH)
    assert_close([union], [np.any(expected, axis=0)])

    [task] = json.loads((out / "label-studio/tasks.json").read_bytes())
    assert task["data"]["image"] == f"/data/local-files/?d={photo.parent.name}/photo.png"
    config = ElementTree.parse(out / "label-studio/label_config.xml").getroot()
    used = {label for one in task["predictions"][0]["result"] for label in one["value"]["polygonlabels"]}
    assert {label.get("value") for label in config.iter("Label")} == used == {"object"}


def test_single_images_gather_in_one_dataset_and_what_is_done_is_not_done_again(photos, model):
    out = photos.parent / "out"
    for name in ("a.png", "b.jpg"):
        segment(photos / name, model, out, "--box", BOX, "--format", "yolo", "--format", "coco")
    assert {"yolo/images/a.png", "yolo/images/b.jpg", "yolo/labels/a.txt", "yolo/labels/b.txt"} <= all_files(out)
    images = json.loads((out / "coco/instances.json").read_bytes())["images"]
    assert [(one["id"], one["file_name"]) for one in images] == [(1, "a.png"), (2, "b.jpg")]
    before = (out / "a.png").stat().st_mtime_ns
    segment(photos / "a.png", model, out, "--box", BOX, "--format", "yolo")
    assert (out / "a.png").stat().st_mtime_ns == before

    (photos / "b.jpg").unlink()
    result = segment(photos / "a.png", model, out, "--box", BOX, "--format", "yolo")
    assert "b.jpg is left out of yolo" in result.stderr
    assert "yolo/labels/a.txt" in all_files(out) and not {"yolo/images/b.jpg", "yolo/labels/b.txt"} & all_files(out)


def test_results_of_another_image_of_the_same_name_are_kept(photos, model):
    out = photos.parent / "out"
    segment(photos / "a.png", model, out, "--box", BOX, "--format", "coco")
    before = (out / "a.json").read_bytes()
    noise(seed=9).save(photos / "sub" / "a.png")
    result = run("segment", photos / "sub/a.png", "--model", model, "--output", out, "--box", BOX, "--format", "coco")
    assert_refused(result, "is of another image", "choose another --output")
    assert (out / "a.json").read_bytes() == before


def test_a_folder_has_names_with_its_subfolders(photos, model):
    prompts, out = photos.parent / "prompts.jsonl", photos.parent / "out"
    lines = [{"image": name, "boxes": [[10, 5, 50, 35]]} for name in ("a.png", "b.jpg", "sub/c.png")]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    segment(photos, model, out, "--prompts", prompts, *EVERY_FORMAT)
    assert {"yolo/images/sub/c.png", "yolo/labels/sub/c.txt", "labelme/sub/c.json"} <= all_files(out)
    images = json.loads((out / "coco/instances.json").read_bytes())["images"]
    assert [one["file_name"] for one in images] == ["a.png", "b.jpg", "sub/c.png"]
    tasks = json.loads((out / "label-studio/tasks.json").read_bytes())
    assert tasks[2]["data"]["image"] == "/data/local-files/?d=photos/sub/c.png"
    content = json.loads((out / "labelme/sub/c.json").read_bytes())
    assert (out / "labelme/sub" / content["imagePath"]).samefile(photos / "sub/c.png")


def test_everything_writes_the_masks_of_instances_json(photos, model):
    out = photos.parent / "out"
    options = ["--points-per-side", 2, "--pred-iou-thresh", -10, "--stability-score-thresh", -1]
    result = run("everything", photos, "--output", out, "--model", model, *options, *EVERY_FORMAT)
    assert result.exit_code == 0, result.output
    ours, theirs = (json.loads((out / name).read_bytes()) for name in ("instances.json", "coco/instances.json"))
    keys = ("id", "image_id", "segmentation", "area", "bbox")
    assert ours["images"] == theirs["images"] and ours["annotations"]
    assert [[one[key] for key in keys] for one in ours["annotations"] if one["area"]] == [
        [one[key] for key in keys] for one in theirs["annotations"]
    ]
    assert {f"yolo/labels/{name}.txt" for name in ("a", "b", "sub/c")} <= all_files(out)


def test_found_objects_have_their_labels(photo, model, monkeypatch):
    saliency = np.full((HEIGHT, WIDTH), 0.2, np.float32)
    saliency[5:25, 30:55] = 0.9
    monkeypatch.setattr(saliency_sources, "OnnxSaliency", lambda path: lambda image: saliency)
    out = photo.parent / "out"
    options = ["--saliency", "net.onnx", "--model", model, "--output", out, "--format", "yolo"]
    result = run("salient", photo, *options)
    assert result.exit_code == 0, result.output
    assert (out / "yolo/classes.txt").read_text() == "salient object\n"
    assert all_files(out) >= {"photo.png", "photo.json", "yolo/labels/photo.txt"}
    assert (out / "yolo/labels/photo.txt").read_text().startswith("0 ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("--format", "--output")),
        (["--output", "{photo}"], ("is a file, so",)),
        (["--output", "{folder}"], ("does not hold the images",)),
    ],
)
def test_a_format_needs_a_folder_of_its_own(photo, model, arguments, words):
    arguments = [one.format(photo=photo, folder=photo.parent) for one in arguments]
    for command in (["segment", photo, "--box", BOX], ["salient", photo]):
        assert_refused(run(*command, "--model", model, "--format", "yolo", *arguments), *words)
    assert all_files(photo.parent) == {"photo.png"}
