"""`training/evaluate_everything.py` and the benchmarks of the same, run as a user does, on tiny models."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from script_runs import refuse, run

from hf_efficientsam import EfficientSamModel
from hf_efficientsam.inference.mask_generation import EfficientSamMaskGenerator
from hf_efficientsam.training.data.coco import CocoMasks

pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(folder: Path, *arguments) -> dict:
    """What the script writes, and prints alike."""
    table = run("evaluate_everything", *arguments, "--output", folder / "numbers.json")
    report = json.loads((folder / "numbers.json").read_text())
    for points, searches in report["results"].items():
        for search, row in searches.items():
            cells = [f"{value:.4f}" for name, value in row.items() if name != "masks" and value is not None]
            assert any(
                line.split()[:2] == [points, search] and set(cells) <= set(line.split()) for line in table.splitlines()
            )
    return report


def test_masks_that_are_the_truth_are_all_recalled(coco, tiny_model, tmp_path, monkeypatch):
    """Records in the generator's own form, for the very images that the truth is of."""
    truth = CocoMasks(coco / "masks.json")
    sizes = ((record["width"], record["height"]) for record in truth.records)
    by_size = dict(zip(sizes, truth.rles, strict=True))
    asked = []

    def perfect(generator, image):
        assert generator.output_mode == "coco_rle" and generator.pred_iou_thresh == 0
        asked.append(len(generator.point_grids[0]))
        kept = by_size[image.size][: None if asked[-1] == 9 else 1]
        rles = [rle | {"counts": rle["counts"].decode()} for rle in kept]
        return [{"segmentation": rle, "predicted_iou": 0.5} for rle in rles]

    monkeypatch.setattr(EfficientSamMaskGenerator, "generate", perfect)
    given = ["--model", tiny_model, "--annotations", coco / "masks.json", "--points_per_side", 3, 2]
    report = numbers(tmp_path, *given)
    assert asked == 5 * [9] + 5 * [4] and report["images"] == 5
    assert report["results"]["3"]["exact"] == {"AR100": 1, "AR1000": 1, "ARs": 1, "ARm": None, "ARl": None, "masks": 3}
    assert report["results"]["2"]["exact"]["AR100"] == pytest.approx(5 / 15)  # one of the 1 to 5 objects of each image
    assert report["config"]["points_per_side"] == [3, 2] and report["versions"]["torch"] == torch.__version__


def test_found_masks_are_kept(coco, tiny_model, tmp_path, monkeypatch):
    given = ["--model", tiny_model, "--annotations", coco / "masks.json", "--points_per_side", 2, "--limit"]
    expected = numbers(tmp_path, *given, 3)
    assert expected["images"] == 3 and expected["results"]["2"]["exact"]["masks"] > 0
    kept = [*given[:-1], "--masks", tmp_path / "masks", "--limit"]
    numbers(tmp_path, *kept, 2)
    generate, calls = EfficientSamMaskGenerator.generate, []
    monkeypatch.setattr(
        EfficientSamMaskGenerator, "generate", lambda self, image: calls.append(image) or generate(self, image)
    )
    assert numbers(tmp_path, *kept, 3)["results"] == expected["results"]
    assert len(calls) == 1
    sentence = refuse("evaluate_everything", *kept, 3, "--pred_iou_thresh", 0.5)
    assert "were found with another pred_iou_thresh" in sentence

    weights = shutil.copytree(tiny_model, tmp_path / "other")
    again = ["--model", weights, *kept[2:]]
    numbers(tmp_path / "again", *[tmp_path / "of_other" if one == tmp_path / "masks" else one for one in again], 2)
    tiny.save(weights, tiny.model(), tiny.processor())
    assert "were found with another weights" in refuse(
        "evaluate_everything", *[tmp_path / "of_other" if one == tmp_path / "masks" else one for one in again], 2
    )


def test_two_searches_share_the_image_and_its_points_and_find_what_each_finds_alone(
    coco, tiny_model, tmp_path, monkeypatch
):
    encoded, asked = [], []
    encode, predict = EfficientSamModel.get_image_embeddings, EfficientSamModel.predict_confident
    monkeypatch.setattr(
        EfficientSamModel, "get_image_embeddings", lambda *args: encoded.append(args[1]) or encode(*args)
    )
    monkeypatch.setattr(
        EfficientSamModel, "predict_confident", lambda *args: asked.append(args[2].shape[1]) or predict(*args)
    )
    given = ["--model", tiny_model, "--annotations", coco / "masks.json", "--points_per_side", 4, "--limit", 2]
    given += ["--box_nms_thresh", 1]
    both = numbers(tmp_path / "both", *given, "--search", "exact", "adaptive")["results"]["4"]
    assert len(encoded) == 2 and asked == 2 * [16]
    other = numbers(tmp_path / "other", *given, "--search", "adaptive", "exact")["results"]["4"]
    assert asked[2] == 6 and sum(asked) == 4 * 16
    for search in ("exact", "adaptive"):
        alone = numbers(tmp_path / search, *given, "--search", search)["results"]["4"]
        assert alone == {search: both[search]} == {search: other[search]}
    assert both["exact"]["masks"] > both["adaptive"]["masks"] > 0


def test_a_broken_image_is_left_out_named_and_counted(coco, tiny_model, tmp_path):
    folder = shutil.copytree(coco, tmp_path / "coco")
    image = folder / "images" / "3.jpg"
    image.write_bytes(image.read_bytes()[:-30])
    given = ["--model", tiny_model, "--annotations", folder / "masks.json", "--points_per_side", 2]
    said = run("evaluate_everything", *given, "--output", tmp_path / "everything.json", code=2)
    assert "3.jpg cannot be read as an image" in said
    assert said.endswith("evaluate_everything: 1 images could not be evaluated; the numbers are without them.\n")
    report = json.loads((tmp_path / "everything.json").read_text())
    assert report["images"] == 4 and len(report["broken"]) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Give --annotations"),
        (["--annotations", "absent.json"], "There is no annotation file absent.json"),
        (["--annotations", "COCO", "--limit", 0], "--limit is 0; it must be more than 0"),
        (["--annotations", "COCO", "--points_per_side", 8, 8], "Give --points_per_side no number twice."),
        (["--annotations", "COCO", "--search", "fast"], "--search: invalid choice: 'fast'"),
        (["--annotations", "COCO", "--points_per_side", 0], "--points_per_side is 0; it must be more than 0."),
        (["--annotations", "COCO", "--model", "absent/runs/model"], "absent/runs/model: no such directory"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(coco, tiny_model, arguments, sentence):
    arguments = [coco / "masks.json" if argument == "COCO" else argument for argument in arguments]
    if "--model" not in arguments:
        arguments += ["--model", tiny_model]
    assert sentence in refuse("evaluate_everything", *arguments)


@pytest.mark.slow
def test_the_ways_of_the_benchmark_agree(monkeypatch):
    """On few points and pixels; with the bundled model, for a random one's masks are all alike."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import everything
    import everything_naive_memory

    scene = "--image-size 128 --points-per-side 6"
    args = everything.parse(f"{scene} --repeats 1 --naive-batch 20".split())
    result = everything.compare(args)
    assert result["masks"]["ours"] == result["masks"]["naive"] > 3
    assert result["masks"]["pipeline"] > 1
    assert result["matched"]["ours"] == result["matched"]["naive"] == (1, 1)
    assert set(result["stages"]) >= {"encode", "decode: masks", "decode: tokens and IoU", "measure", "NMS", "enlarge"}
    everything.show(args, result)
    rows = everything_naive_memory.compare_memory(everything_naive_memory.parse(f"{scene} --memory-points 2".split()))
    assert [row[0] for row in rows] == [4, 36] and all(row[3] > 0 for row in rows)
    everything_naive_memory.show_memory(rows)
