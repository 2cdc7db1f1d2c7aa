"""`training/evaluate_saliency.py`, and the scores that it and the training print."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from script_runs import load_script, refuse, run

from hf_efficientsam import EfficientSamPredictor, EfficientSamSaliencyConfig, EfficientSamSaliencyHead
from hf_efficientsam.inference.prompters import SalientPrompter
from hf_efficientsam.training.data.folder_masks import FolderMasks
from hf_efficientsam.training.saliency.evaluation import mean_scores, score_map

SHARES = (0.25, 0.5)  # of the two images that is salient


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two images of 40 x 20 pixels, whose left quarter and left half are salient."""
    folder = tmp_path_factory.mktemp("saliency")
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    for number, share in enumerate(SHARES):
        mask = np.zeros((20, 40), np.uint8)
        mask[:, : int(40 * share)] = 255
        Image.fromarray(mask).convert("RGB").save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """The tiny model with a tiny head."""
    folder = tmp_path_factory.mktemp("with_head") / "model"
    shutil.copytree(tiny_model, folder)
    torch.manual_seed(0)
    config = EfficientSamSaliencyConfig(input_channels=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    EfficientSamSaliencyHead(config).save_pretrained(folder / "saliency")
    return folder


# ------------------------------------------------------------------------------------------------- the scores


def test_a_perfect_map():
    truth = np.zeros((6, 8), bool)
    truth[2:4, 3:] = True
    means = mean_scores([score_map(truth.astype(np.float32), truth)])
    assert (means["iou"], means["mae"], means["best_iou"], means["max_f"]) == (1, 0, 1, pytest.approx(1))


def test_maps_that_say_nothing():
    truth = np.zeros((4, 5), bool)
    truth[:2, :5] = True
    for value, iou, mae in ((0.0, 0, 0.5), (1.0, 0.5, 0.5), (0.5, 0, 0.5)):  # what is above 0.5 is salient
        means = mean_scores([score_map(np.full((4, 5), value, np.float32), truth)])
        assert (means["iou"], means["mae"], means["best_iou"]) == (iou, mae, 0.5)
        assert means["max_f"] == pytest.approx(1.3 * 0.5 / (0.3 * 0.5 + 1))  # all of it, half of it rightly


def test_paper_and_pencil():
    """Two images of four pixels; at 0.25 both are found best: 2 of 3, and 2 of 2."""
    first = score_map(np.array([[0.9, 0.4], [0.6, 0.1]], np.float32), np.array([[True, True], [False, False]]))
    second = score_map(np.array([[0.3, 0.3], [0.2, 0.0]], np.float32), np.array([[True, True], [False, False]]))
    assert (first["iou"], first["mae"]) == (pytest.approx(1 / 3), pytest.approx((0.1 + 0.6 + 0.6 + 0.1) / 4))
    assert (second["iou"], second["mae"]) == (0, pytest.approx((0.7 + 0.7 + 0.2) / 4))
    means = mean_scores([first, second])
    assert (means["iou"], means["mae"]) == (pytest.approx(1 / 6), pytest.approx(0.375))
    assert means["best_iou"] == pytest.approx((2 / 3 + 1) / 2) and 0.2 < means["best_threshold"] <= 0.3
    precision, recall = (2 / 3 + 1) / 2, 1
    assert means["max_f"] == pytest.approx(1.3 * precision * recall / (0.3 * precision + recall))


def test_a_perfect_map_through_the_prompter(folder, model):
    """The map is measured as it comes, and the masks are those of the prompter."""
    script, predictor = (
        load_script("evaluate_saliency"),
        EfficientSamPredictor.from_pretrained(model),
    )
    sample = FolderMasks(folder)[0]
    truth = np.zeros((20, 40), bool)
    truth[:, :10] = True
    predictor.set_image(sample.image)
    scores = script.measure(SalientPrompter(predictor, lambda image: truth), truth)
    assert (scores["map"]["iou"], scores["map"]["mae"], scores["objects"]) == (1, 0, 1)
    mask = predictor.segment(boxes=[[0, 0, 10, 20]]).masks[0]
    assert scores["masks"]["iou"] == (mask & truth).sum() / (mask | truth).sum()
    assert scores["masks"]["mae"] == (mask != truth).mean()


# ------------------------------------------------------------------------------------------------- the script


def test_several_sources_side_by_side(folder, model, tmp_path):
    head = shutil.copytree(model / "saliency", tmp_path / "head")
    said = run(
        "evaluate_saliency", "--model", model, "--data", folder, "--saliency", "own", "whole", "prior", head,
        "--prior", folder, "--output", tmp_path / "scores.json", "--cases", tmp_path / "cases.png",
    )  # fmt: skip
    report = json.loads((tmp_path / "scores.json").read_text())
    results = report["results"]
    assert (
        report["images"] == 2
        and "torch" in report["versions"]
        and list(results) == ["own", "whole", "prior", str(head)]
    )
    assert results["own"] == results[str(head)]
    assert results["whole"]["map"]["iou"] == pytest.approx(np.mean(SHARES))
    assert results["whole"]["map"]["mae"] == pytest.approx(1 - np.mean(SHARES))
    # The prior is 1 in the left quarter, 0.5 in the next one: not above 0.5.
    assert results["prior"]["map"]["iou"] == pytest.approx((1 + 0.5) / 2, abs=0.05)
    assert results["prior"]["map"]["mae"] == pytest.approx((0.5 * 0.25 + 0.5 * 0.25) / 2, abs=0.01)
    rows = [line for line in said.splitlines() if line.startswith(("own ", "whole ", "prior ", "head "))]
    assert [row.split()[0] for row in rows] == ["own", "whole", "prior", "head"]
    assert f"{results['own']['masks']['iou']:.4f}" in rows[0]
    assert Image.open(tmp_path / "cases.png").width > 10 * 256  # image, truth, and two for each source


def test_a_limit(folder, model, tmp_path):
    given = ["--model", model, "--data", folder, "--limit", 1, "--saliency", "whole"]
    run("evaluate_saliency", *given, "--output", tmp_path / "scores.json")
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["images"] == 1 and report["results"]["whole"]["map"]["iou"] == pytest.approx(SHARES[0])


def test_a_broken_image_is_left_out_named_and_counted(folder, model, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    image = data / "images" / "1.jpg"  # its header can be read, its end is missing
    Image.open(image.with_suffix(".png")).save(image)
    image.with_suffix(".png").unlink()
    image.write_bytes(image.read_bytes()[:-30])
    given = ["--model", model, "--data", data, "--saliency", "whole", "--cases", tmp_path / "cases.png"]
    said = run("evaluate_saliency", *given, "--output", tmp_path / "scores.json", code=2)
    assert "1.jpg" in said
    assert said.endswith("evaluate_saliency: 1 images could not be evaluated; the numbers are without them.\n")
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["images"] == 1 and report["results"]["whole"]["map"]["iou"] == pytest.approx(SHARES[0])
    assert "1.jpg" in report["broken"][0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "Give --data a folder with images/ and masks/, or a COCO-style json file."),
        (["--data", "FOLDER", "--limit", 0], "--limit is 0; it must be more than 0."),
        (["--data", "FOLDER", "--saliency", "own", "own"], "Give --saliency at least one source, and none twice."),
        (["--data", "FOLDER", "--saliency", "prior"], "the mean of the masks of --prior; give both or neither."),
        (["--data", "FOLDER", "--prior", "FOLDER"], "the mean of the masks of --prior; give both or neither."),
        (["--data", "FOLDER", "--saliency", "absent.onnx"], "absent.onnx: no such file."),
        (["--data", "FOLDER", "--threshold", 1], "--threshold is 1.0; it must be at least 0 and less than 1."),
        (["--data", "absent"], "There is no annotation file absent; check the path."),
    ],
)
def test_what_cannot_be_measured_is_refused(folder, model, options, sentence):
    given = [folder if one == "FOLDER" else one for one in options]
    assert sentence in refuse("evaluate_saliency", "--model", model, *given)


def test_a_model_without_a_head_is_refused(folder, tiny_model):
    said = refuse("evaluate_saliency", "--model", tiny_model, "--data", folder)
    assert said.startswith("evaluate_saliency: ") and "has no saliency head" in said
