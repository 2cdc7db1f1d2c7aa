import pytest
from transformers import AutoConfig

from hf_efficientsam import (
    EfficientSamBackboneConfig,
    EfficientSamConfig,
    EfficientSamMaskDecoderConfig,
    EfficientSamPromptEncoderConfig,
    EfficientSamSamiConfig,
    EfficientSamVisionConfig,
)

PARTS = {
    "vision_config": EfficientSamVisionConfig,
    "prompt_encoder_config": EfficientSamPromptEncoderConfig,
    "mask_decoder_config": EfficientSamMaskDecoderConfig,
}


def test_defaults_are_the_published_tiny_model():
    config = EfficientSamConfig()
    vision = config.vision_config
    assert (vision.hidden_size, vision.num_attention_heads, vision.num_hidden_layers) == (192, 3, 12)
    assert (vision.intermediate_size, vision.image_size, vision.patch_size) == (768, 1024, 16)
    assert config.mask_decoder_config.upscaling_channels == [64, 32]
    # the two that the official model lacks are off
    assert not config.prompt_encoder_config.background_points
    assert not config.prompt_encoder_config.mask_prompts


def test_mlp_width_follows_the_hidden_size_unless_given():
    assert EfficientSamVisionConfig(hidden_size=384, num_attention_heads=6).intermediate_size == 4 * 384
    assert EfficientSamVisionConfig(intermediate_size=100).intermediate_size == 100


@pytest.mark.parametrize("name", PARTS)
def test_parts_may_be_dicts_or_configs(name):
    values = {"initializer_range": 0.5}
    for part in (values, PARTS[name](**values)):
        config = EfficientSamConfig(**{name: part})
        assert type(getattr(config, name)) is PARTS[name]
        assert getattr(config, name).initializer_range == 0.5
        for other in PARTS.keys() - {name}:
            assert type(getattr(config, other)) is PARTS[other]


def test_thresholds_of_mask_generation_are_segment_anythings_unless_given(tmp_path):
    defaults = {"pred_iou_thresh": 0.88, "stability_score_thresh": 0.95, "stability_score_offset": 1.0}
    assert EfficientSamConfig().mask_generation == defaults
    config = EfficientSamConfig(mask_generation={"pred_iou_thresh": 0.5, "stability_score_offset": 2})
    assert config.mask_generation == defaults | {"pred_iou_thresh": 0.5, "stability_score_offset": 2.0}
    config.save_pretrained(tmp_path)
    assert EfficientSamConfig.from_pretrained(tmp_path).mask_generation == config.mask_generation
    with pytest.raises(ValueError, match="stability_score_offset, and not points_per_side"):
        EfficientSamConfig(mask_generation={"points_per_side": 16})


def test_round_trip_through_a_folder(tmp_path):
    config = EfficientSamConfig(
        vision_config={"hidden_size": 24, "output_channels": 32, "image_size": 64},
        prompt_encoder_config={"hidden_size": 32, "background_points": True, "position_init": "axes"},
        mask_decoder_config={"hidden_size": 32, "upscaling_channels": (16, 8), "prompts_per_chunk": 3},
    )
    config.save_pretrained(tmp_path)
    for loaded in (EfficientSamConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is EfficientSamConfig
        for name in PARTS:
            assert getattr(loaded, name).to_dict() == getattr(config, name).to_dict()
    for name, part in PARTS.items():  # each part reads its own section of the whole
        assert part.from_pretrained(tmp_path).to_dict() == getattr(config, name).to_dict()


def test_pretraining_defaults_are_the_papers():
    config = EfficientSamSamiConfig()
    assert config.vision_config.to_dict() == EfficientSamVisionConfig().to_dict()
    assert (config.target, config.loss, config.mask_ratio) == ("features", "mse", 0.75)
    decoder = (config.decoder_type, config.decoder_hidden_size, config.decoder_num_hidden_layers)
    assert decoder == ("cross_attention", 512, 8)
    assert config.decoder_intermediate_size == 2048


def test_size_of_the_target():
    assert EfficientSamSamiConfig().target_size == 256  # SAM's image embedding
    assert EfficientSamSamiConfig(target_size=384).target_size == 384
    for given in (None, 384):  # pixels of a patch, whatever is given
        assert EfficientSamSamiConfig(target="pixels", target_size=given).target_size == 3 * 16 * 16
    vision = {"num_channels": 1, "patch_size": 8}
    assert EfficientSamSamiConfig(target="pixels", vision_config=vision).target_size == 64


def test_round_trip_of_pretraining(tmp_path):
    config = EfficientSamSamiConfig(
        vision_config={"hidden_size": 24, "pretrain_image_size": 64},
        target="pixels",
        target_normalization="none",
        loss="cosine",
        mask_ratio=0.5,
        decoder_type="all_token",
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=40,
    )
    config.save_pretrained(tmp_path)
    for loaded in (EfficientSamSamiConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is EfficientSamSamiConfig
        assert loaded.to_diff_dict() == config.to_diff_dict()
        assert loaded.vision_config.to_dict() == config.vision_config.to_dict()


def test_pretraining_config_gives_its_encoder(tmp_path):
    """What belongs to the decoder that is thrown away does not come along, initializer_range included."""
    config = EfficientSamSamiConfig(vision_config={"hidden_size": 24, "image_size": 64}, initializer_range=0.5)
    config.save_pretrained(tmp_path)
    whole, vision = EfficientSamConfig.from_pretrained(tmp_path), EfficientSamVisionConfig.from_pretrained(tmp_path)
    assert type(whole) is EfficientSamConfig and type(vision) is EfficientSamVisionConfig
    assert whole.vision_config.to_dict() == vision.to_dict() == config.vision_config.to_dict()
    assert whole.to_dict() == EfficientSamConfig(vision_config=config.vision_config).to_dict()


def test_backbone_takes_the_encoder_of_any_config(tmp_path):
    vision = EfficientSamVisionConfig(hidden_size=24, num_hidden_layers=8, drop_path_rate=0.1)
    whole = EfficientSamConfig(vision_config=vision)
    for name, config in {"whole": whole, "part": vision, "sami": EfficientSamSamiConfig(vision_config=vision)}.items():
        config.save_pretrained(tmp_path / name)
        loaded = EfficientSamBackboneConfig.from_pretrained(tmp_path / name, window_size=14)
        assert loaded.to_dict() == EfficientSamBackboneConfig(**vision.to_diff_dict(), window_size=14).to_dict() | {
            "model_type": "efficientsam_backbone"
        }
        assert loaded.window_sizes == [14, 0, 14, 0, 14, 0, 14, 0]


def test_backbone_without_options_is_the_last_layers_map():
    config = EfficientSamBackboneConfig()
    assert config.stage_names == ["stem"] + [f"stage{i}" for i in range(1, 13)]
    assert (config.out_features, config.out_indices) == (["stage12"], [12])
    assert config.window_sizes == 12 * [0]
    config.out_features = ["stage3", "stage6"]
    assert config.out_indices == [3, 6]
    config = EfficientSamBackboneConfig(pyramid_strides=(4, 8, 16, 32, 64))
    assert config.out_features == config.stage_names == ["stage1", "stage2", "stage3", "stage4", "stage5"]


def test_configs_do_not_share_their_parts():
    first, second = EfficientSamConfig(), EfficientSamConfig()
    first.vision_config.hidden_size = 7
    first.mask_decoder_config.upscaling_channels.append(1)
    assert second.vision_config.hidden_size == 192
    assert second.mask_decoder_config.upscaling_channels == [64, 32]


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (EfficientSamVisionConfig, {"hidden_size": 100, "num_attention_heads": 3}, "100 cannot be split over 3"),
        (EfficientSamVisionConfig, {"image_size": 1000}, "image_size 1000 must be a multiple of patch_size 16"),
        (EfficientSamVisionConfig, {"pretrain_image_size": 100}, "pretrain_image_size 100 must be a multiple"),
        (EfficientSamPromptEncoderConfig, {"position_init": "uniform"}, "'gaussian' or 'axes'"),
        (EfficientSamSamiConfig, {"mask_ratio": 1}, "mask_ratio is 1; it must be at least 0 and less than 1"),
        (EfficientSamSamiConfig, {"mask_ratio": 1.0}, "less than 1"),
        (EfficientSamSamiConfig, {"mask_ratio": -0.1}, "at least 0"),
        (EfficientSamSamiConfig, {"mask_ratio": 0, "target": "pixels"}, "no pixel is left to reconstruct"),
        (EfficientSamSamiConfig, {"target": "colours"}, "target is 'colours'; it must be 'features' or 'pixels'"),
        (EfficientSamSamiConfig, {"target_normalization": "batch"}, "'layer_norm' or 'none'"),
        (EfficientSamSamiConfig, {"loss": "l1"}, "'mse' or 'cosine'"),
        (EfficientSamSamiConfig, {"decoder_type": "none"}, "'cross_attention' or 'all_token'"),
        (EfficientSamSamiConfig, {"decoder_hidden_size": 36}, "36 must be a multiple of 4 and of .* 16"),
        (EfficientSamSamiConfig, {"decoder_hidden_size": 30, "decoder_num_attention_heads": 3}, "a multiple of 4"),
        (EfficientSamSamiConfig, {"vision_config": {"hidden_size": 18}}, "hidden_size 18 must be a multiple of 4"),
        (EfficientSamConfig, {"vision_config": {"output_channels": 32}}, "must agree in width"),
        (EfficientSamConfig, {"prompt_encoder_config": {"hidden_size": 32}}, "must agree in width"),
        (EfficientSamConfig, {"mask_decoder_config": {"hidden_size": 32}}, "must agree in width"),
    ],
)
def test_sizes_that_do_not_fit(part, values, message):
    with pytest.raises(ValueError, match=message):
        part(**values)


@pytest.mark.parametrize(
    "values", [{"hidden_size": "wide"}, {"num_hidden_layers": 1.5}, {"hidden_act": 3}, {"classifier_pooling": "max"}]
)
def test_wrong_types_are_refused(values):
    with pytest.raises(Exception, match=next(iter(values))):
        EfficientSamVisionConfig(**values)
