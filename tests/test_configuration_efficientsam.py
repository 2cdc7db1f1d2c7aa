import pytest
from transformers import AutoConfig

from hf_efficientsam import (
    EfficientSamConfig,
    EfficientSamMaskDecoderConfig,
    EfficientSamPromptEncoderConfig,
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
        (EfficientSamConfig, {"vision_config": {"output_channels": 32}}, "must agree in width"),
        (EfficientSamConfig, {"prompt_encoder_config": {"hidden_size": 32}}, "must agree in width"),
        (EfficientSamConfig, {"mask_decoder_config": {"hidden_size": 32}}, "must agree in width"),
    ],
)
def test_sizes_that_do_not_fit(part, values, message):
    with pytest.raises(ValueError, match=message):
        part(**values)


@pytest.mark.parametrize("values", [{"hidden_size": "wide"}, {"num_hidden_layers": 1.5}, {"hidden_act": 3}])
def test_wrong_types_are_refused(values):
    with pytest.raises(Exception, match=next(iter(values))):
        EfficientSamVisionConfig(**values)
