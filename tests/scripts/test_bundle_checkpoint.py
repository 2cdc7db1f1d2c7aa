"""`training/bundle_checkpoint.py`, on a copy of a tiny checkpoint."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from script_runs import load_script, refuse, run

from hf_efficientsam import EfficientSamModel, EfficientSamSaliencyConfig, EfficientSamSaliencyHead
from hf_efficientsam.inference.loading import find_checkpoint

CARD = "Prose.\n<!-- saliency: begin -->\nold\n<!-- saliency: end -->\nMore prose.\n"


@pytest.fixture
def checkpoint(tiny_model, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_model, tmp_path / "checkpoint")
    (folder / "README.md").write_text(CARD)
    monkeypatch.setattr(load_script("bundle_checkpoint"), "bundled_checkpoint", lambda: str(folder))
    return folder


@pytest.mark.slow
def test_another_saliency_head_leaves_the_model_as_it_is(checkpoint, tmp_path):
    for kind in ("train", "val"):
        for part in ("images", "masks"):
            (tmp_path / kind / part).mkdir(parents=True)
        mask = Image.fromarray(np.uint8(255 * np.eye(24, 32)))
        mask.convert("RGB").save(tmp_path / kind / "images" / "0.png")
        mask.save(tmp_path / kind / "masks" / "0.png")
    config = EfficientSamSaliencyConfig(input_channels=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    head = EfficientSamSaliencyHead(config)
    head.save_pretrained(tmp_path / "head")
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != "README.md"}
    run("bundle_checkpoint", "--saliency", tmp_path / "head", "--salient", tmp_path)
    assert {path.name for path in checkpoint.iterdir()} == {*before, "README.md", "saliency"}
    assert all((checkpoint / name).read_bytes() == content for name, content in before.items())
    assert {path.name for path in (checkpoint / "saliency").iterdir()} == {
        "config.json",
        "metrics.json",
        "model.safetensors",
    }
    saved = EfficientSamSaliencyHead.from_pretrained(checkpoint, subfolder="saliency", dtype="auto")
    assert saved.dtype == torch.float16 and torch.equal(saved.upscaling.weight, head.upscaling.weight.half())
    results = json.loads((checkpoint / "saliency" / "metrics.json").read_text())["results"]
    card = (checkpoint / "README.md").read_text()
    assert card.startswith("Prose.\n<!-- saliency: begin -->\n1 images.") and card.endswith("More prose.\n")
    assert f"| the head | {results['own']['map']['iou']:.3f} | " in card and "old" not in card


def test_a_new_edition_replaces_only_the_file_of_what_is_trained(tiny_model, tmp_path):
    script, folders = load_script("bundle_checkpoint"), [tmp_path / "first", tmp_path / "second"]
    trained = EfficientSamModel.from_pretrained(tiny_model)
    trained.config.vision_config.num_hidden_layers = 4  # one that stays, and the three that are trained
    trained = EfficientSamModel(trained.config)
    for folder in folders:
        trained.save_pretrained(tmp_path / "trained")
        folder.mkdir()
        script.save_half_precision(script.BundleConfig(str(tmp_path / "trained"), pred_iou_thresh=0.5), folder)
        loaded, info = EfficientSamModel.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()) and loaded.dtype == torch.float32  # whole
        assert loaded.config.mask_generation["pred_iou_thresh"] == 0.5
        expected = trained.state_dict()
        assert all(torch.equal(value.half(), expected[name].half()) for name, value in loaded.state_dict().items())
        for part in (trained.vision_encoder.layers[1], trained.vision_encoder.neck, trained.mask_decoder):
            torch.nn.init.normal_(next(part.parameters()))
    assert find_checkpoint(str(folders[0])) == str(folders[0])
    files = {path.name for path in folders[0].glob("*.safetensors*")}
    assert files == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    changed = {name for name in files if len({(folder / name).read_bytes() for folder in folders}) == 2}
    assert changed == {"model-00002-of-00002.safetensors"}


def test_a_model_without_a_head_for_it_is_refused(checkpoint):
    assert refuse("bundle_checkpoint", "--model", checkpoint).startswith("bundle_checkpoint: Give --saliency a head")
