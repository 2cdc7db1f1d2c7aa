"""`efficientsam salient` and `text`."""

import json

import numpy as np
import pytest
import torch
from commands import BOX, HEIGHT, WIDTH, all_files, assert_refused, run, run_segment
from PIL import Image

from hf_efficientsam.inference.prompters import Detector, saliency_sources


@pytest.fixture
def objects(monkeypatch) -> np.ndarray:
    """Two objects that every saliency file shows, whatever is in the picture."""
    saliency = np.full((HEIGHT, WIDTH), 0.2, np.float32)
    saliency[5:25, 30:55], saliency[10:20, 5:15] = 0.9, 0.7
    monkeypatch.setattr(saliency_sources, "OnnxSaliency", lambda path: lambda image: saliency)
    return saliency


def test_salient_objects_are_those_of_their_boxes(photo, model, objects):
    folder, options = photo.parent, ["--saliency", "net.onnx", "--model", model]
    files = ["--output", folder / "new/mask.png", "--overlay", folder / "overlay.jpg"]
    result = run("salient", photo, *options, *files, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["image"], record["width"], record["height"]) == (str(photo), WIDTH, HEIGHT)
    assert record["model"] == str(model) and len(record["objects"]) == 2
    for i, box in enumerate(["30,5,55,25", "5,10,15,20"], start=1):
        mask = np.asarray(Image.open(folder / f"new/mask_{i}.png"))
        expected = run_segment(photo, "--box", box, model=model)["objects"][0]["masks"][0]
        assert record["objects"][i - 1] == {
            "label": "salient object",
            "score": round(float(objects[mask > 0].mean()), 4),
            "area": np.count_nonzero(mask),
            "box": expected["box"],
            "segmentation": expected["segmentation"],
            "iou": expected["score"],
            "file": str(folder / f"new/mask_{i}.png"),
        }
        assert record["objects"][i - 1]["area"] == expected["area"] > 0
    assert all_files(folder) == {"photo.png", "new/mask_1.png", "new/mask_2.png", "overlay.jpg"}
    text = run("salient", photo, *options, "--threshold", "0.8", "--output", folder / "one.png").stdout
    assert (
        "object 1, salient object: score " in text and f"file {folder / 'one.png'}" in text and "object 2" not in text
    )


def test_advice_where_nothing_is_salient(photo, model, objects):
    result = run("salient", photo, "--saliency", "net.onnx", "--model", model, "--threshold", "0.95", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["objects"] == []
    assert result.stderr.startswith("efficientsam: nothing was found") and "--threshold" in result.stderr


def test_objects_by_name_are_those_of_the_detectors_boxes(photo, model, monkeypatch):
    class Dogs(Detector):
        def __init__(self, name, device):
            assert name == "some/detector"

        def __call__(self, image, names, threshold):
            assert np.array_equal(image, Image.open(photo)) and threshold == 0.25
            return torch.tensor([[10.0, 5, 50, 35]]), torch.tensor([0.5]), names

    monkeypatch.setattr("hf_efficientsam.cli.find.Detector", Dogs)
    options = ["--detector", "some/detector", "--threshold", "0.25", "--model", model, "--json"]
    (found,) = json.loads(run("text", photo, "a dog", *options).stdout)["objects"]
    expected = run_segment(photo, "--box", BOX, model=model)["objects"][0]["masks"][0]
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
def test_wrong_arguments_are_refused_and_nothing_is_written(photo, model, arguments, words):
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
