"""Mask training, evaluation and export of EfficientSAM around other backbones than its plain ViT."""

import json

import backbones
import numpy as np
import pytest
import tiny
import torch
from installed import run_beside_torchvision
from script_runs import curve, load_script, refuse, run
from transformers import ConvNextBackbone, ConvNextForImageClassification, ResNetModel, ViTConfig, ViTModel

from hf_efficientsam import (
    EfficientSamAutoVisionConfig,
    EfficientSamModel,
    EfficientSamOnnxPredictor,
    EfficientSamPredictor,
    EfficientSamProcessor,
)
from hf_efficientsam.export.onnx_export import export_onnx
from hf_efficientsam.training.engine.optimization import count_layers, layer_depth
from hf_efficientsam.training.masks.feature_views import encode_frozen, encode_rest

RECIPE = """
image_size: 64
max_masks: 3
global_batch_size: 4
steps: 3
warmup_steps: 1
learning_rate: 1e-3
layer_decay: 0.9
log_steps: 1
save_steps: 3
image_steps: 3
num_workers: 0
"""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def arguments(recipe, coco) -> list:
    return ["--config", recipe, "--train", coco / "masks.json"]


@pytest.fixture(scope="module")
def convnext(tmp_path_factory):
    """The directory of a trained classifier, as the Hub has them: its stages are not chosen."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("convnext")
    config = backbones.configs()["convnext"]
    config.out_features, config.drop_path_rate = ["stage4"], 0.1
    ConvNextForImageClassification(config).save_pretrained(folder)
    return folder


def test_a_trained_backbone_gets_a_new_neck_and_is_trained(arguments, convnext, tmp_path):
    run("finetune_masks", *arguments, "--encoder", convnext, "--output_dir", tmp_path / "run")
    assert [row["step"] for row in curve(tmp_path / "run")] == [1, 2, 3]
    model, info = EfficientSamModel.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    vision = model.config.vision_config
    assert type(vision) is EfficientSamAutoVisionConfig and vision.image_size == 64
    assert vision.backbone_config.out_features == ["stage2", "stage3", "stage4"]
    assert vision.backbone_config.drop_path_rate == 0
    before = ConvNextBackbone.from_pretrained(convnext).state_dict()
    after = model.vision_encoder.backbone.state_dict()
    differences = {name: (after[name] - before[name]).abs().max() for name in before if name.startswith("encoder.")}
    assert 0 < max(differences.values()) < 0.02  # trained, and not from scratch
    assert EfficientSamProcessor.from_pretrained(tmp_path / "run" / "model").image_processor.size_divisor == 32


def test_a_decoder_goes_on_with_another_backbone(convnext, tiny_model):
    script = load_script("finetune_masks")
    model = script.build_model(script.MasksConfig(model=str(tiny_model), encoder=str(convnext)), 64)
    assert model.get_image_embeddings(torch.zeros(1, 3, 64, 64)).shape == (1, tiny.CHANNELS, 4, 4)
    before = EfficientSamModel.from_pretrained(tiny_model).mask_decoder.state_dict()
    ours = model.mask_decoder.state_dict()
    assert all(torch.equal(ours[name], before[name]) for name in before)


def test_a_new_decoder_answers_a_box_with_that_box(convnext):
    script = load_script("finetune_masks")
    model = script.build_model(script.MasksConfig(encoder=str(convnext)), 256).eval()
    boxes = torch.tensor([[[40.0, 60.0, 200.0, 180.0]]])
    with torch.no_grad():
        masks = model(torch.randn(1, 3, 256, 256), input_boxes=boxes, multimask_output=False).pred_masks[0, 0, 0] > 0
    box = torch.zeros(64, 64, dtype=torch.bool)
    box[15:45, 10:50] = True
    assert (masks & box).sum() / (masks | box).sum() > 0.8


def test_the_neck_alone_is_trained_on_cached_maps(arguments, convnext, tmp_path):
    given = [*arguments, "--encoder", convnext, "--train_last_layers", 0, "--crop_scale", 1, "--flip", "false"]
    given += ["--color_jitter", 0, "--cache_embeddings", "true", "--output_dir", tmp_path / "run"]
    run("finetune_masks", *given)
    encoder = EfficientSamModel.from_pretrained(tmp_path / "run" / "model").vision_encoder
    frozen, before = encoder.backbone.state_dict(), ConvNextBackbone.from_pretrained(convnext).state_dict()
    assert all(torch.equal(frozen[name], before[name]) for name in before if name.startswith("encoder."))
    pixel_values = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        cached = encode_rest(encoder, encode_frozen(encoder, pixel_values, 0), 0)
        assert torch.equal(cached, encoder(pixel_values).last_hidden_state)


def test_only_the_plain_vit_is_cached_halfway(arguments, convnext, tmp_path):
    given = [*arguments, "--encoder", convnext, "--train_last_layers", 1, "--cache_embeddings", "true"]
    given += ["--crop_scale", 1, "--flip", "false", "--color_jitter", 0, "--output_dir", tmp_path / "run"]
    said = run("finetune_masks", *given, code=1)
    assert "--train_last_layers 1 needs EfficientSAM's plain ViT; give --train_last_layers 0" in said


@pytest.mark.parametrize("name", backbones.NAMES)
def test_layers_are_counted_from_the_last_one(name):
    model = backbones.model(name)
    layers = count_layers(model)
    assert layers == (2 if name.startswith("dinov2") else 4)
    depths = {one: layer_depth(one, layers) for one, _ in model.named_parameters()}
    assert {depths[one] for one in depths if not one.startswith("vision_encoder.backbone.")} == {0}
    order = [depth for depth in depths.values() if depth]
    assert order == sorted(order, reverse=True) and set(order) >= set(range(1, layers + 1))


def test_an_efficientsam_with_such_an_encoder_gives_it_and_its_neck(tmp_path):
    expected = backbones.model("swin")
    expected.save_pretrained(tmp_path / "model")
    tiny.processor(size_divisor=32).save_pretrained(tmp_path / "model")
    script = load_script("finetune_masks")
    options = {"model": str(tmp_path / "model"), "encoder": str(tmp_path / "model")}
    model = script.build_model(script.MasksConfig(**options), 64).eval()
    pixel_values = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.get_image_embeddings(pixel_values), expected.get_image_embeddings(pixel_values))


def test_what_is_no_encoder_is_refused(arguments, tmp_path):
    ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path / "vit")
    ResNetModel(backbones.configs()["resnet"]).save_pretrained(tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").unlink()
    cases = {
        tmp_path / "vit": "ViTConfig is not the configuration of a backbone",
        tmp_path / "torn": "cannot be loaded",
        tmp_path / "missing": "no such directory",
        "timm/repvit_m1": "timm cannot be imported",
    }
    for encoder, says in cases.items():
        said = refuse("finetune_masks", *arguments, "--encoder", encoder, "--output_dir", tmp_path / "run")
        assert f"The encoder {encoder} cannot be loaded" in said and says in said


def test_it_is_evaluated_as_others_are(coco, tmp_path):
    tiny.save(tmp_path / "model", backbones.model("resnet"), tiny.processor(size_divisor=32))
    given = ["--annotations", coco / "masks.json", "--model", tmp_path / "model", "--output", tmp_path / "scores.json"]
    run("evaluate_masks", *given)
    assert json.loads((tmp_path / "scores.json").read_text())


@pytest.mark.parametrize("name", ["convnext", "hiera", "swin", "dinov2_14"])
def test_it_is_exported_to_onnx(name, tmp_path):
    """Which compares the files with torch, for images of any size, or of the only size that Hiera takes."""
    model = backbones.model(name)
    vision = model.config.vision_config
    tiny.save(tmp_path / "model", model, tiny.processor(vision.image_size, size_divisor=vision.size_divisor))
    report = export_onnx(str(tmp_path / "model"), tmp_path / "onnx")
    assert max(one["difference"] for one in report.values()) < 1e-4
    image = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    predictors = (
        EfficientSamOnnxPredictor(tmp_path / "onnx", num_threads=1),
        EfficientSamPredictor.from_pretrained(tmp_path / "model", device="cpu"),
    )
    for predictor in predictors:
        predictor.set_image(image)
    ours, theirs = (predictor.predict(np.array([[60, 20]]), return_logits=True) for predictor in predictors)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=0, atol=1e-4)


def test_backbones_of_timm(tmp_path):
    """timm imports torchvision."""
    run_beside_torchvision("encoders_with_timm.py", tmp_path, "timm==1.0.31")
