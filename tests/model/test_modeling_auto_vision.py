"""EfficientSAM around other backbones than its plain ViT, on tiny ones of transformers."""

import sys

import backbones
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskGeneration,
    ConvNextConfig,
    Dinov2Config,
    HieraConfig,
    SwinConfig,
    ViTConfig,
)
from without_package import run_without_package

from hf_efficientsam import (
    EfficientSamAutoVisionConfig,
    EfficientSamBackbone,
    EfficientSamConfig,
    EfficientSamMaskGenerator,
    EfficientSamModel,
    EfficientSamPredictor,
    EfficientSamSamiConfig,
    EfficientSamVisionConfig,
    EfficientSamVisionModel,
)

POINTS = torch.tensor([[[[10.0, 20.0]], [[40.0, 30.0]]]])


@pytest.fixture(params=backbones.NAMES)
def name(request) -> str:
    return request.param


def image_of(model) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(1, 3, *2 * [model.config.vision_config.image_size])


# ----------------------------------------------------------------------------------------------- configuration


def test_a_backbones_configuration_becomes_an_encoder_around_it():
    backbone = ConvNextConfig(out_features=["stage3", "stage4"])
    for given in (
        backbone,
        backbone.to_dict(),
        {"model_type": "efficientsam_auto_vision_model", "backbone_config": backbone},
    ):
        vision = EfficientSamConfig(vision_config=given).vision_config
        assert type(vision) is EfficientSamAutoVisionConfig and type(vision.backbone_config) is ConvNextConfig
        assert vision.backbone_config.out_features == ["stage3", "stage4"]
        assert (vision.image_size, vision.patch_size, vision.size_divisor, vision.num_channels) == (1024, 16, 32, 3)


def test_the_plain_vit_stays_the_default():
    for given in (None, {"hidden_size": 24}, {"model_type": "efficientsam_vision_model"}, EfficientSamVisionConfig()):
        assert type(EfficientSamConfig(vision_config=given).vision_config) is EfficientSamVisionConfig


def test_a_name_is_a_timm_model_of_which_the_last_three_stages_are_fused():
    backbone = EfficientSamConfig(vision_config="repvit_m1").vision_config.backbone_config
    assert (backbone.model_type, backbone.backbone, backbone.out_indices) == (
        "timm_backbone",
        "repvit_m1",
        [-3, -2, -1],
    )


def test_configurations_survive_being_saved(name, tmp_path):
    config = backbones.model(name).config
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.vision_config.to_dict() == config.vision_config.to_dict()
    assert type(loaded.vision_config.backbone_config) is type(config.vision_config.backbone_config)


@pytest.mark.parametrize(
    ("backbone", "size_divisor", "image_size"),
    [
        (SwinConfig(), 32, 1024),
        (Dinov2Config(patch_size=16), 16, 1024),
        (Dinov2Config(patch_size=14), 112, 1008),
        (HieraConfig(image_size=[224, 224]), 32, 224),
    ],
    ids=["swin", "16", "14", "hiera"],
)
def test_the_size_of_images_fits_the_backbone(backbone, size_divisor, image_size):
    vision = EfficientSamAutoVisionConfig(backbone_config=backbone)
    assert (vision.size_divisor, vision.image_size) == (size_divisor, image_size)


@pytest.mark.parametrize(
    ("vision_config", "says"),
    [
        (ViTConfig(), "ViTConfig is not the configuration of a backbone; give one whose model AutoBackbone knows"),
        ({"model_type": "nonsense"}, "The backbone has the model type 'nonsense', which transformers does not know"),
        (HieraConfig(image_size=[224, 192]), "224 x 192 pixels; give one for square images"),
        (
            {"model_type": "efficientsam_auto_vision_model", "backbone_config": HieraConfig(), "image_size": 512},
            "takes images of 224 x 224 pixels alone, and image_size is 512; set image_size and that of the backbone",
        ),
        (
            {"model_type": "efficientsam_auto_vision_model", "image_size": 1000},
            "image_size 1000 must be a multiple of size_divisor 32",
        ),
    ],
    ids=["no backbone", "unknown", "not square", "fixed size", "size"],
)
def test_what_is_no_encoder_is_refused(vision_config, says):
    with pytest.raises(ValueError, match=says):
        EfficientSamConfig(vision_config=vision_config)


def test_a_timm_model_without_timm_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    config = EfficientSamConfig(vision_config="repvit_m1")
    with pytest.raises(
        ImportError, match=r"is timm's repvit_m1, and timm cannot be imported; install timm and a torchv"
    ):
        EfficientSamModel(config)


# ------------------------------------------------------------------------------------------------------- forward


def test_masks_and_embeddings_have_the_plain_vits_shapes(name):
    model = backbones.model(name)
    side = model.config.vision_config.image_size
    output = model(image_of(model), input_points=POINTS)
    assert output.pred_masks.shape == (1, 2, 3, side // 4, side // 4) and output.iou_scores.shape == (1, 2, 3)
    assert model.get_image_embeddings(image_of(model)).shape == (1, tiny.CHANNELS, side // 16, side // 16)
    assert model.get_image_wide_positional_embeddings().shape == (1, tiny.CHANNELS, side // 16, side // 16)


@pytest.mark.parametrize("name", ["convnext", "resnet", "swin", "dinov2", "pvt_v2"])
def test_images_need_not_be_square(name):
    assert backbones.model(name).get_image_embeddings(torch.zeros(2, 3, 64, 96)).shape == (2, tiny.CHANNELS, 4, 6)


def test_every_weight_learns(name):
    model = backbones.model(name).train()
    output = model(image_of(model), input_points=POINTS)
    (output.pred_masks.sum() + output.iou_scores.sum()).backward()
    encoder = model.vision_encoder
    idle = {one for one, weight in encoder.named_parameters() if weight.grad is None or not weight.grad.any()}
    # Weights of transformers' classes that have no part in the maps that are asked for.
    without_part = ("backbone.embeddings.mask_token", "backbone.swin.layernorm.")
    without_part += ("backbone.encoder.stages.3.",) if name == "one stage" else ()
    assert [one for one in idle if not one.startswith(without_part)] == []


def test_the_embedding_is_a_sum_of_the_projected_maps():
    """By the formula of a feature pyramid: project each map, resize it to the grid, add them."""
    model = backbones.model()
    encoder, pixel_values = model.vision_encoder, image_of(model)
    maps = encoder.backbone(pixel_values).feature_maps
    weights = encoder.neck.projection.weight.split([one.shape[1] for one in maps], dim=1)
    projected = [torch.einsum("oc,bchw->bohw", *pair) for pair in zip(weights, maps, strict=True)]
    assert [one.shape[-1] for one in projected] == [8, 4, 2]
    resized = [
        torch.nn.functional.interpolate(one, size=4, mode="bilinear", antialias=True, align_corners=False)
        for one in projected
    ]
    seen = []
    encoder.neck.layernorm1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    encoder(pixel_values)
    torch.testing.assert_close(seen[0].transpose(1, 2).unflatten(2, (4, 4)), sum(resized), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("convnext", (1, 3, 48, 64), r"multiples of 32. A processor with size_divisor=32 makes it so"),
        ("convnext", (1, 4, 64, 64), "it needs 3 channels"),
        ("dinov2_14", (1, 3, 128, 128), "multiples of 112"),
        ("hiera", (1, 3, 96, 96), "takes images of 64 x 64 pixels, and not of 96 x 96"),
    ],
)
def test_images_that_do_not_fit_are_refused(name, shape, says):
    with pytest.raises(ValueError, match=says):
        backbones.model(name).get_image_embeddings(torch.zeros(shape))


@pytest.mark.parametrize("name", ["convnext", "resnet", "swin", "dinov2"])
def test_outputs_that_are_recorded_leave_the_masks_as_they_are(name):
    model = backbones.model(name)
    model.set_attn_implementation("eager")
    expected = model(image_of(model), input_points=POINTS).pred_masks
    asked = {"output_attentions": True, "output_hidden_states": True}
    output = model(image_of(model), input_points=POINTS, **asked)
    torch.testing.assert_close(output.pred_masks, expected, atol=1e-5, rtol=0)  # the reference decoder records
    depth = {"convnext": 4, "resnet": 4, "swin": 4, "dinov2": 2}[name]
    assert len(output.vision_hidden_states) == depth + 1 and output.mask_decoder_attentions
    assert len(output.vision_attentions or ()) == (depth if name in ("swin", "dinov2") else 0)
    assert torch.equal(model(image_of(model), input_points=POINTS).pred_masks, expected)


@pytest.mark.parametrize("name", ["convnext", "swin", "dinov2"])
def test_attention_is_chosen_for_backbones_that_know_it_and_for_others(name, tmp_path):
    model = backbones.model(name)
    model.save_pretrained(tmp_path)
    expected = model(image_of(model), input_points=POINTS).pred_masks
    for attention in ("eager", "sdpa"):
        loaded = EfficientSamModel.from_pretrained(tmp_path, attn_implementation=attention)
        model.set_attn_implementation(attention)
        for one in (loaded, model):
            own = one.vision_encoder.backbone.config._attn_implementation
            assert own == ("eager" if name == "convnext" else attention)
            masks = one(image_of(model), input_points=POINTS).pred_masks
            torch.testing.assert_close(masks, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = backbones.model()
    expected = model.get_image_embeddings(image_of(model))
    embeddings = model.to(dtype).get_image_embeddings(image_of(model))
    assert embeddings.dtype == dtype
    torch.testing.assert_close(embeddings.float(), expected, atol=0.1, rtol=0)


def test_frozen_parts_of_a_backbone_stay_in_evaluation_mode():
    """Their batch normalisations keep their statistics, and frozen or not, the rest of the model trains."""
    model = backbones.model("resnet")
    encoder, pixel_values = model.vision_encoder, image_of(model)
    stages = encoder.backbone.encoder.stages
    stages[:2].requires_grad_(False)
    before = {key: value.clone() for key, value in encoder.backbone.named_buffers()}
    model.train()
    assert not stages[0].training and stages[2].training and encoder.neck.training and model.mask_decoder.training
    encoder(pixel_values)
    changed = {key for key, value in encoder.backbone.named_buffers() if not torch.equal(value, before[key])}
    assert changed and not any(key.startswith(("encoder.stages.0.", "encoder.stages.1.")) for key in changed)
    encoder.backbone.requires_grad_(False)
    model.train()
    with torch.no_grad():
        assert torch.equal(encoder(pixel_values)[0], encoder.eval()(pixel_values)[0])


# ------------------------------------------------------------------------------------------------ files and tools


def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    model = backbones.model(name)
    model.save_pretrained(tmp_path)
    expected = model(image_of(model), input_points=POINTS).pred_masks
    for auto_class in (AutoModel, AutoModelForMaskGeneration):
        loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is EfficientSamModel and not info["missing_keys"] and not info["unexpected_keys"]
        assert torch.equal(loaded(image_of(model), input_points=POINTS).pred_masks, expected)


STRANGER = """
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForMaskGeneration, AutoProcessor

folder, output = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForMaskGeneration.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model.vision_encoder).__module__.startswith("transformers_modules.")
inputs = processor(np.arange(50 * 70 * 3, dtype=np.uint8).reshape(50, 70, 3), input_points=[[[[10, 20]]]])
with torch.no_grad():
    save_file({"masks": model(**inputs).pred_masks}, output)
assert not any(name.startswith("hf_efficientsam") for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext", "dinov2_14"])
def test_a_saved_folder_needs_no_package(name, tmp_path):
    model = backbones.model(name)
    processor = tiny.processor(size_divisor=model.config.vision_config.size_divisor)
    tiny.save(tmp_path / "model", model, processor)
    assert (tmp_path / "model" / "modeling_auto_vision_efficientsam.py").is_file()
    inputs = processor(np.arange(50 * 70 * 3, dtype=np.uint8).reshape(50, 70, 3), input_points=[[[[10, 20]]]])
    with torch.no_grad():
        expected = model(**inputs).pred_masks
    run_without_package(STRANGER, tmp_path / "model", tmp_path / "masks", modules_cache=tmp_path / "modules")
    torch.testing.assert_close(load_file(tmp_path / "masks")["masks"], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["convnext", "swin", "hiera", "dinov2"])
def test_predictor_and_everything(name, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    folder = tiny.save(tmp_path, backbones.model(name), tiny.processor(size_divisor=32, keep_aspect_ratio=True))
    predictor = EfficientSamPredictor.from_pretrained(folder, device="cpu")
    predictor.set_image(image)
    assert predictor.features.shape == (1, tiny.CHANNELS, 4, 4)  # 36 of 64 pixels, padded to 64
    assert predictor.predict(np.array([[60, 20]]))[0].shape == (3, 50, 90)
    thresholds = {"pred_iou_thresh": -100.0, "stability_score_thresh": 0.0}
    generator = EfficientSamMaskGenerator.from_pretrained(folder, device="cpu", points_per_side=2, **thresholds)
    assert all(one["segmentation"].shape == (50, 90) for one in generator.generate(image))


def test_other_models_around_our_encoder_say_what_they_need(tmp_path):
    backbones.model().save_pretrained(tmp_path)
    for other in (EfficientSamVisionModel, EfficientSamBackbone):
        with pytest.raises(
            ValueError, match="Its vision encoder is not EfficientSAM's plain ViT but a convnext backbone"
        ):
            other.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"SAMI leaves patches out, .* without masking, with training/distill.py"):
        EfficientSamSamiConfig(vision_config=backbones.model().config.vision_config)
