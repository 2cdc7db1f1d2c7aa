"""training/probe_encoder.py, run as a user does, on a handful of images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from script_runs import refuse, run
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from transformers import Dinov2Config, Dinov2Model

from hf_efficientsam import (
    EfficientSamForPreTraining,
    EfficientSamSamiConfig,
    EfficientSamVisionConfig,
    EfficientSamVisionModel,
)
from hf_efficientsam.training.data.classification import ClassFolders

VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "output_channels": 8, "image_size": 32}


def measure(folder: Path, *arguments) -> dict:
    output = folder / "results" / "probe.json"
    run("probe_encoder", "--data", folder, "--output", output, *arguments)
    return json.loads(output.read_text())


def save(folder: Path, part: str, name: str, images: list[np.ndarray]) -> None:
    (folder / part / name).mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.astype(np.uint8)).save(folder / part / name / f"{i}.png")


def noise(number: int, seed: int, color=(0, 0, 0)) -> list[np.ndarray]:
    """Noise around a colour, 32 x 32."""
    return list(np.random.default_rng(seed).integers(0, 100, (number, 32, 32, 3)) + np.array(color))


@pytest.fixture
def colors(tmp_path) -> Path:
    """Classes that their colour tells apart."""
    for i, (name, color) in enumerate({"blue": (0, 0, 150), "green": (0, 150, 0), "red": (150, 0, 0)}.items()):
        save(tmp_path, "train", name, noise(12, i, color))
        save(tmp_path, "test", name, noise(4, 10 + i, color))
    return tmp_path


def tiny(folder: Path) -> Path:
    torch.manual_seed(0)
    EfficientSamVisionModel(EfficientSamVisionConfig(**VISION)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("encoder", ["pixels", "tiny"])
def test_classes_that_can_be_told_apart(colors, encoder):
    encoder = tiny(colors / "encoder") if encoder == "tiny" else encoder
    result = measure(colors, "--encoder", encoder, "--size", 32)
    assert (result["nearest_neighbors"], result["linear_probe"]) == (1, 1)
    assert result["classes"] == ["blue", "green", "red"]
    assert (result["train_images"], result["test_images"]) == (36, 12)
    assert result["width"] == (3 * 32 * 32 if encoder == "pixels" else 16)
    assert result["config"]["encoder"] == str(encoder) and result["config"]["neighbors"] == 10
    assert result["versions"].keys() >= {"torch", "scikit-learn"} and result["probe_iterations"] > 0


def test_classes_that_cannot_be_told_apart(tmp_path):
    for i, name in enumerate(("heads", "tails")):
        save(tmp_path, "train", name, noise(40, i))
        save(tmp_path, "test", name, noise(40, 10 + i))
    result = measure(tmp_path, "--encoder", tiny(tmp_path / "encoder"), "--size", 32)
    assert 0.3 < result["nearest_neighbors"] < 0.7 and 0.3 < result["linear_probe"] < 0.7


def test_three_of_four(colors):
    """The nearest neighbour of an image is itself, with its label in training; one of four is said to be another."""
    train = {name: colors / "train" / name for name in ("blue", "green", "red")}
    for path in (colors / "test").rglob("*.png"):
        path.unlink()
    for name, source in {"blue": ["blue"], "green": ["green"], "red": ["red", "green"]}.items():
        for i, class_name in enumerate(source):
            (colors / "test" / name / f"{i}.png").write_bytes((train[class_name] / "3.png").read_bytes())
    result = measure(colors, "--encoder", "pixels", "--neighbors", 1, "--size", 32)
    assert result["nearest_neighbors"] == 0.75 and result["linear_probe"] == 0.75


def test_against_the_same_by_hand(tmp_path):
    """A pretraining directory, whose encoder has no neck: pixels, features and both classifiers step by step."""
    for i, name in enumerate(("dim", "dimmer")):
        save(tmp_path, "train", name, noise(15, i, (20 * i, 10, 0)))
        save(tmp_path, "test", name, noise(15, 10 + i, (20 * i, 10, 0)))
    torch.manual_seed(0)
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    model = EfficientSamForPreTraining(EfficientSamSamiConfig(vision_config=VISION, **decoder))
    model.save_pretrained(tmp_path / "sami")
    result = measure(tmp_path, "--encoder", tmp_path / "sami", "--size", 48, "--neighbors", 3)

    encoder = EfficientSamVisionModel.from_pretrained(tmp_path / "sami").eval()
    features, labels = {}, np.repeat([0, 1], 15)
    for part in ("train", "test"):
        rows = []
        for name in ("dim", "dimmer"):
            for path in sorted((tmp_path / part / name).iterdir()):
                pixels = np.asarray(Image.open(path).resize((48, 48), Image.Resampling.BICUBIC)) / 255
                pixels = (pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
                pixels = torch.from_numpy(pixels.transpose(2, 0, 1)).float()[None]
                with torch.no_grad():
                    rows.append(encoder(pixels, output_hidden_states=True).hidden_states[-1][0].mean(0).numpy())
        features[part] = np.stack(rows)
    # sorted() above is by name as text, like the script's; labels are the same within a class anyway
    unit = {part: rows / np.linalg.norm(rows, axis=1, keepdims=True) for part, rows in features.items()}
    nearest = np.argsort(-unit["test"] @ unit["train"].T, axis=1)[:, :3]
    voted = labels[nearest].mean(axis=1) > 0.5
    scaler = StandardScaler().fit(features["train"])
    probe = LogisticRegression(C=0.1, max_iter=1000).fit(scaler.transform(features["train"]), labels)
    assert result["nearest_neighbors"] == round(float((voted == labels).mean()), 4)
    assert result["linear_probe"] == round(probe.score(scaler.transform(features["test"]), labels), 4)
    assert 0.5 < result["nearest_neighbors"] < 1  # so that a mistake would show


def test_limits_are_balanced_and_repeatable(colors):
    arguments = ["--encoder", "pixels", "--size", 32, "--train_limit", 30, "--test_limit", 6]
    result = measure(colors, *arguments)
    assert (result["train_images"], result["test_images"]) == (30, 6)
    chosen = [ClassFolders(colors / "train", 30, seed) for seed in (0, 0, 1)]
    assert [chosen[0].labels.count(label) for label in (0, 1, 2)] == [10, 10, 10]
    assert chosen[0].rows == chosen[1].rows != chosen[2].rows
    assert len(set(chosen[0].rows)) == 30


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (None, ["--encoder", "pixels", "--data", "nowhere"], "no folder nowhere/train and no nowhere/test"),
        (None, ["--encoder", "nowhere/at/all"], "nowhere/at/all cannot be loaded"),
        (None, ["--encoder", "DINO"], "lacks weights of the encoder, such as vision_encoder."),
        (None, ["--encoder", "TINY", "--size", "40"], "--size 40 must be a multiple of the patch size, 16"),
        (None, ["--encoder", "pixels", "--train_limit", "31"], "limit 31 must be a multiple of the 3 classes"),
        (None, ["--encoder", "pixels", "--train_limit", "0"], "--train_limit is 0; it must be more than 0."),
        (None, ["--encoder", "pixels", "--test_limit", "15"], "test/blue holds only 4 images"),
        (None, ["--encoder", "pixels", "--neighbors", "37"], "--neighbors 37 are more than the 36"),
        (lambda folder: (folder / "test" / "red").rename(folder / "test" / "rot"), ["--encoder", "pixels"], "differ"),
        (None, ["--encoder", "pixels", "--device", "gpu"], "--device gpu: "),
        (
            lambda folder: (folder / "train" / "red" / "3.png").write_bytes(b"words"),
            ["--encoder", "pixels"],
            "red/3.png cannot be read as an image",
        ),
    ],
)
def test_what_does_not_fit_is_said(monkeypatch, colors, change, arguments, words):
    if "TINY" in arguments:
        tiny(colors / "TINY")
    if "DINO" in arguments:
        Dinov2Model(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
            colors / "DINO"
        )
    if change is not None:
        change(colors)
    monkeypatch.chdir(colors)
    assert words in refuse("probe_encoder", "--data", colors, *arguments)
    assert not (colors / "results").exists()


def test_a_diverged_encoder(colors):
    model = EfficientSamVisionModel.from_pretrained(tiny(colors / "encoder"))
    torch.nn.init.constant_(model.vision_encoder.layers[0].mlp.fc1.weight, float("nan"))
    model.save_pretrained(colors / "encoder")
    said = refuse("probe_encoder", "--data", colors, "--encoder", colors / "encoder", "--size", 32)
    assert "are not finite; its training has diverged" in said
