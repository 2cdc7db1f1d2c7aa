"""EfficientSAM around backbones of timm: in a process of its own, by `scripts/test_other_encoders.py`."""

import json

import backbones
import numpy as np
import pytest
import tiny
import torch
from script_runs import run

from hf_efficientsam import (
    EfficientSamConfig,
    EfficientSamMaskGenerator,
    EfficientSamModel,
)
from hf_efficientsam.export.onnx_export import export_onnx
from hf_efficientsam.training.engine.optimization import count_layers, layer_depth

# EdgeSAM's encoder, and others that are made for phones: names and channels of the last three stages.
NAMES = {"repvit_m0_9": [96, 192, 384], "mobilenetv4_conv_small": [64, 96, 960], "fastvit_t8": [96, 192, 384]}
POINTS = torch.tensor([[[[10.0, 20.0]], [[40.0, 30.0]]]])


def model(name: str) -> EfficientSamModel:
    torch.manual_seed(0)
    vision = EfficientSamConfig(vision_config=name).vision_config.to_dict()
    return backbones.around(vision | {"image_size": tiny.SIZE, "output_channels": tiny.CHANNELS})


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


def test_its_last_three_stages_are_fused_and_saved_and_loaded_it_is_the_same(name, tmp_path):
    expected, pixel_values = model(name), torch.randn(1, 3, 64, 96)
    assert expected.vision_encoder.backbone.channels == NAMES[name]
    assert expected.get_image_embeddings(pixel_values).shape == (1, tiny.CHANNELS, 4, 6)
    layers = count_layers(expected)
    assert layers >= 4 and {layer_depth(one, layers) for one, _ in expected.named_parameters()} == set(
        range(layers + 2)
    )
    expected.save_pretrained(tmp_path)
    loaded, info = EfficientSamModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    masks = [one(pixel_values, input_points=POINTS).pred_masks for one in (expected, loaded)]
    assert masks[0].shape == (1, 2, 3, 16, 24) and torch.equal(*masks)


def test_it_is_trained_and_evaluated_and_finds_everything(name, coco, tmp_path):
    start = model(name)
    tiny.save(tmp_path / "start", start, tiny.processor(size_divisor=32))
    options = ["--steps", 2, "--warmup_steps", 0, "--batch_size", 2, "--global_batch_size", 2, "--num_workers", 0]
    options += ["--model", tmp_path / "start", "--train", coco / "masks.json", "--image_size", 64]
    run("finetune_masks", *options, "--output_dir", tmp_path / "run")
    trained = EfficientSamModel.from_pretrained(tmp_path / "run" / "model")
    before = dict(start.named_parameters())
    still = [key for key, value in trained.named_parameters() if torch.equal(value, before[key])]
    assert not [key for key in still if key.startswith("vision_encoder.")]
    given = ["--annotations", coco / "masks.json", "--model", tmp_path / "run" / "model"]
    run("evaluate_masks", *given, "--output", tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())
    thresholds = {"pred_iou_thresh": -100.0, "stability_score_thresh": 0.0}
    generator = EfficientSamMaskGenerator.from_pretrained(
        tmp_path / "run" / "model", device="cpu", points_per_side=2, **thresholds
    )
    image = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    assert all(one["segmentation"].shape == (50, 90) for one in generator.generate(image))


def test_it_is_exported_to_onnx(name, tmp_path):
    """Which compares the files with torch."""
    tiny.save(tmp_path / "model", model(name), tiny.processor(size_divisor=32))
    report = export_onnx(str(tmp_path / "model"), tmp_path / "onnx")
    assert max(one["difference"] for one in report.values()) < 1e-4


def test_one_with_a_table_of_positions_is_refused():
    with pytest.raises(ValueError, match="timm's vit_tiny_patch16_224 takes images of one size alone; choose a conv"):
        EfficientSamModel(EfficientSamConfig(vision_config="vit_tiny_patch16_224"))
