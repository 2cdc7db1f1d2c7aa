import json

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2Model,
    Sam2VisionConfig,
    Sam2VisionModel,
    SamConfig,
    SamModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    YolosConfig,
    YolosModel,
)

from hf_efficientsam import EfficientSamModel, bundled_checkpoint
from hf_efficientsam.training.sami.teachers import load_teacher

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
PLAIN = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
CLIP_VISION = {**PLAIN, "image_size": 32, "patch_size": 8}
SAM_VISION = {
    "hidden_size": 16, "output_channels": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 32,
    "image_size": 64, "patch_size": 16, "global_attn_indexes": [0], "num_pos_feats": 6, "initializer_range": 0.2,
}  # fmt: skip
HIERA = {
    "hidden_size": 8, "num_attention_heads": 1, "image_size": [64, 64], "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [8, 4, 4, 2], "global_attention_blocks": [3],
}  # fmt: skip
SAM2_VISION = {
    "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 16,
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}  # fmt: skip


def sam2_vision() -> dict:
    return {**SAM2_VISION, "backbone_config": Sam2HieraDetConfig(**HIERA)}


def sam2() -> Sam2Model:
    decoder = {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    prompts = {"hidden_size": 16, "image_size": 64, "patch_size": 16}
    config = Sam2Config(vision_config=sam2_vision(), prompt_encoder_config=prompts, mask_decoder_config=decoder)
    model = Sam2Model(config)
    torch.nn.init.normal_(model.no_memory_embedding)
    return model


def registers() -> Dinov2WithRegistersModel:
    return Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**PLAIN, image_size=56, patch_size=14, num_register_tokens=4)
    )


# What saves the model, the size in its preprocessor_config.json, its grid at that size, its width.
FAMILIES = {
    "sam": (
        lambda: SamModel(SamConfig(vision_config=SAM_VISION)),
        {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}},
        4,
        12,
    ),
    "sam2": (sam2, {"size": {"height": 64, "width": 64}}, 4, 16),
    "sam2_vision": (lambda: Sam2VisionModel(Sam2VisionConfig(**sam2_vision())), {"size": 64}, 4, 16),
    "clip": (
        lambda: CLIPModel(CLIPConfig(vision_config=CLIP_VISION, text_config=PLAIN)),
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
        4,
        16,
    ),
    "clip_vision": (
        lambda: CLIPVisionModel(CLIPVisionConfig(**CLIP_VISION)),
        {"size": 40, "crop_size": 32},
        4,
        16,
    ),
    "siglip_vision": (
        lambda: SiglipVisionModel(SiglipVisionConfig(**CLIP_VISION)),
        {"size": {"height": 32, "width": 32}},
        4,
        16,
    ),
    "dinov2": (
        lambda: Dinov2Model(Dinov2Config(**PLAIN, image_size=70, patch_size=14)),
        {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}, "do_center_crop": True},
        4,
        16,
    ),
    "registers": (registers, {"size": {"height": 56, "width": 56}}, 4, 16),
    "vit": (
        lambda: ViTModel(ViTConfig(**PLAIN, image_size=64, patch_size=16)),
        {"size": 64, "crop_size": 50, "do_center_crop": False},
        4,
        16,
    ),
    "mae": (lambda: ViTMAEModel(ViTMAEConfig(**PLAIN, image_size=64, patch_size=16)), {"size": 64}, 4, 16),
}


def save(folder, model, **processor) -> str:
    model.save_pretrained(folder)
    values = {"image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255, **processor}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return str(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, str]:
    torch.manual_seed(0)
    return {
        family: save(tmp_path_factory.mktemp(family), build(), **processor)
        for family, (build, processor, _, _) in FAMILIES.items()
    }


def noise(size: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_lie_row_by_row_on_the_grid(saved, family):
    _, _, side, width = FAMILIES[family]
    teacher = load_teacher(saved[family])
    pixels = noise(teacher.size)
    features = teacher(pixels, (side, side))
    assert features.shape == (2, side * side, width) and teacher.width == width
    assert features.dtype == torch.float32 and not features.requires_grad
    cell = teacher.size // side
    for row, column in [(0, 0), (0, side - 1), (side - 1, 1)]:
        changed = pixels.clone()
        patch = changed[..., row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        patch.copy_(255 - patch)
        moved = (teacher(changed, (side, side)) - features).norm(dim=-1).argmax(dim=-1)
        # The convolution in SAM's neck and SAM 2's windows spread the change to the next cells.
        slack = 1 if family.startswith("sam") else 0
        assert ((moved // side - row).abs() <= slack).all() and ((moved % side - column).abs() <= slack).all()


def by_hand(size: int) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (noise(size) / 255 - mean) / std


@torch.no_grad()
def test_features_are_the_models_own(saved):
    def features(family):
        teacher = load_teacher(saved[family])
        return teacher(noise(teacher.size), (4, 4))

    def flat(maps):
        return maps.flatten(2).transpose(1, 2)

    neck = SamModel.from_pretrained(saved["sam"]).get_image_embeddings(by_hand(64))
    torch.testing.assert_close(features("sam"), flat(neck))
    embeddings = Sam2Model.from_pretrained(saved["sam2"]).get_image_embeddings(by_hand(64))
    torch.testing.assert_close(features("sam2"), flat(embeddings[-1]))
    tokens = CLIPModel.from_pretrained(saved["clip"]).vision_model(by_hand(32)).last_hidden_state
    torch.testing.assert_close(features("clip"), tokens[:, 1:])
    tokens = SiglipVisionModel.from_pretrained(saved["siglip_vision"])(by_hand(32)).last_hidden_state
    torch.testing.assert_close(features("siglip_vision"), tokens)
    tokens = Dinov2WithRegistersModel.from_pretrained(saved["registers"])(by_hand(56)).last_hidden_state
    torch.testing.assert_close(features("registers"), tokens[:, 5:])
    masked = ViTMAEModel.from_pretrained(saved["mae"], mask_ratio=0.0)(by_hand(64))
    places = masked.ids_restore[..., None].expand(-1, -1, 16)  # it has shuffled the patches
    torch.testing.assert_close(features("mae"), masked.last_hidden_state[:, 1:].gather(1, places))


@torch.no_grad()
def test_a_finer_grid_is_resized_to_the_students(saved):
    teacher = load_teacher(saved["dinov2"])
    own = teacher(noise(56), (4, 4)).transpose(1, 2).unflatten(2, (4, 4))
    expected = F.interpolate(own, (2, 3), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(teacher(noise(56), (2, 3)), expected)


@pytest.mark.parametrize("family, size", [("clip", 64), ("siglip_vision", 64), ("dinov2", 84), ("vit", 32)])
def test_another_size_where_the_model_takes_any(saved, family, size):
    teacher = load_teacher(saved[family], size=size)
    side = size // teacher.encoder.config.patch_size
    assert teacher.size == size and teacher(noise(size), (side, side)).shape == (2, side**2, 16)
    assert teacher.description()["size"] == size


@pytest.mark.parametrize(
    "family, size, sentence",
    [
        ("sam", 128, r"cannot be the teacher at 128 x 128 pixels: .*doesn't match"),
        ("dinov2", 60, "multiple of its patch of 14 pixels: got 60; give --teacher_size 56."),
        ("vit", 0, "multiple of its patch of 16 pixels: got 0; give --teacher_size 16."),
    ],
)
def test_a_size_that_the_model_cannot_take_is_refused(saved, family, size, sentence):
    with pytest.raises(ValueError, match=sentence) as refusal:
        load_teacher(saved[family], size=size)
    assert "\n" not in str(refusal.value)


def test_frozen(saved):
    teacher = load_teacher(saved["vit"])
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    torch.nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules())


def test_half_precision(saved):
    exact, half = load_teacher(saved["dinov2"]), load_teacher(saved["dinov2"], dtype=torch.bfloat16)
    features = half(noise(56), (4, 4))
    assert half.encoder.dtype == torch.bfloat16 and features.dtype == torch.float32
    torch.testing.assert_close(features, exact(noise(56), (4, 4)), rtol=0.05, atol=0.05)
    assert exact.description() == {**half.description(), "dtype": "float32"}


def test_the_description_tells_teachers_apart(saved, tmp_path):
    description = load_teacher(saved["vit"]).description()
    assert json.loads(json.dumps(description)) == description
    assert description["mean"] == pytest.approx([255 * value for value in MEAN])

    model = ViTModel.from_pretrained(saved["vit"])
    model.pooler.dense.weight.data += 1  # not used
    same = load_teacher(save(tmp_path / "same", model, size=64)).description()
    assert {**same, "name": saved["vit"]} == description
    model.layernorm.bias.data += 1e-3
    other = load_teacher(save(tmp_path / "other", model, size=64)).description()
    assert other["weights_hash"] != description["weights_hash"]


def test_pixels_are_only_normalised_if_the_processor_says_so(saved, tmp_path):
    model = ViTModel.from_pretrained(saved["vit"])
    teacher = load_teacher(save(tmp_path, model, size=64, do_normalize=False))
    with torch.no_grad():
        expected = model(noise(64) / 255).last_hidden_state[:, 1:]
    torch.testing.assert_close(teacher(noise(64), (4, 4)), expected)


def test_bundled():
    teacher = load_teacher("bundled")
    model = EfficientSamModel.from_pretrained(bundled_checkpoint(), dtype=torch.float32)
    pixels = noise(256, batch=1)
    with torch.no_grad():
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        expected = model.get_image_embeddings((pixels / 255 - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(teacher(pixels, (16, 16)), expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    assert teacher.description()["name"] == "bundled"


def test_a_head_that_is_not_used_may_be_missing_but_no_weight_that_is(tmp_path):
    config = ViTConfig(**PLAIN, image_size=64, patch_size=16)
    load_teacher(save(tmp_path / "classifier", ViTForImageClassification(config), size=64))  # has no pooler
    state = ViTModel(config).state_dict()
    del state["layernorm.weight"]
    ViTModel(config).save_pretrained(tmp_path / "torn", state_dict=state)
    (tmp_path / "torn" / "preprocessor_config.json").write_text(
        json.dumps({"size": 64, "image_mean": MEAN, "image_std": STD})
    )
    with pytest.raises(ValueError, match=r"lacks 1 of its weights, such as layernorm\.weight"):
        load_teacher(str(tmp_path / "torn"))


@pytest.mark.parametrize(
    "build, sentence",
    [
        (lambda: BertModel(BertConfig(**PLAIN, vocab_size=10)), "is a BertModel, which does not read images"),
        (lambda: CLIPTextModel(CLIPTextConfig(**PLAIN, vocab_size=10)), "which does not read images"),
        (lambda: YolosModel(YolosConfig(**PLAIN, image_size=[64, 64])), "are no grid of patches"),
        (
            lambda: SwinModel(SwinConfig(image_size=64, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)),
            "are no grid of patches",
        ),
    ],
)
def test_models_without_a_grid_are_refused(tmp_path, build, sentence):
    with pytest.raises(ValueError, match=sentence) as refusal:
        load_teacher(save(tmp_path, build(), size=64))
    assert "\n" not in str(refusal.value)


def test_unknown_names_are_refused_in_one_sentence(tmp_path, saved):
    for name in ("someone/no-such-teacher", "no/such/folder", "../elsewhere"):
        with pytest.raises(ValueError, match="neither a directory with a model nor a Hub model in reach") as refusal:
            load_teacher(name)
        assert "\n" not in str(refusal.value)
    model = ViTModel.from_pretrained(saved["vit"])
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json that gives"):
        load_teacher(str(tmp_path / "bare"))
    save(tmp_path / "cut", model, size=64)
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"half of")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_teacher(str(tmp_path / "cut"))
    (tmp_path / "cut" / "config.json").write_text('{"model_type": "no such"}')
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_teacher(str(tmp_path / "cut"))


@torch.no_grad()
def test_the_shared_teacher(shared):
    name = str(shared / "weights" / "vit-small-patch14-teacher")
    assert load_teacher(name).size == 224
    teacher = load_teacher(name, size=196)
    pixels = noise(196, batch=1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    model = Dinov2Model.from_pretrained(name, dtype=torch.float32)
    tokens = model((pixels / 255 - mean[:, None, None]) / std[:, None, None]).last_hidden_state
    torch.testing.assert_close(teacher(pixels, (14, 14)), tokens[:, 1:], rtol=1e-4, atol=1e-4)
