import math

import pytest
import tiny
import torch
from torch import nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
)

from hf_efficientsam import (
    EfficientSamBackbone,
    EfficientSamBackboneConfig,
    EfficientSamImageProcessor,
)
from hf_efficientsam.model.modeling_vision_efficientsam import drop_path, join_windows, split_windows

STRIDES = [4, 8, 16, 32, 64]


def make(**options) -> EfficientSamBackbone:
    """The same encoder for all options, of larger weights than new ones: attention is uneven, every layer shows."""
    model = tiny.backbone(**options)
    tiny.enlarge_weights(model.vision_encoder)
    return model


def images(height: int, width: int, number: int = 1) -> torch.Tensor:
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(height + width))


def assert_close(output, expected, tolerance=1e-5):
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=0)


# ------------------------------------------------------------------------------------------------ plain maps


@torch.no_grad()
def test_the_last_layers_map_row_by_row():
    model, pixel_values = make(), images(48, 80)
    assert model.out_features == ["stage2"] and model.channels == [24]
    output = model(pixel_values)
    assert output.hidden_states is None and output.attentions is None
    (grid,) = output.feature_maps
    assert grid.shape == (1, 24, 3, 5)
    tokens = model.vision_encoder.embeddings(pixel_values)
    for layer in model.vision_encoder.layers:
        tokens = layer(tokens)
    for row in range(3):
        for column in range(5):
            assert_close(grid[0, :, row, column], tokens[0, 5 * row + column])


@torch.no_grad()
def test_chosen_layers():
    pixel_values = images(32, 64)
    every = make(out_features=["stem", "stage1", "stage2"])(pixel_values, output_hidden_states=True)
    for state, grid in zip(every.hidden_states, every.feature_maps, strict=True):
        assert_close(grid.flatten(2).transpose(1, 2), state)
    for chosen in ([0], [1], [0, 2], [-1]):
        model = make(out_indices=chosen)
        assert len(model.vision_encoder.layers) == max(1, *(index % 3 for index in chosen))  # no more than are used
        output = model(pixel_values)
        assert len(output.feature_maps) == len(model.channels) == len(chosen)
        for index, grid in zip(chosen, output.feature_maps, strict=True):
            assert_close(grid, every.feature_maps[index])


@torch.no_grad()
def test_normalised_maps():
    options = {"out_features": ["stage1", "stage2"]}
    plain, model = make(**options), make(**options, apply_layernorm=True)
    model.load_state_dict(plain.state_dict(), strict=False)
    model.layernorms[1].bias.fill_(7.0)  # one for each map
    grids = model(images(32, 48)).feature_maps
    for grid, mean in zip(grids, (0, 7), strict=True):
        assert_close(grid.mean(dim=1), torch.full((1, 2, 3), float(mean)))
        assert_close(grid.var(dim=1, unbiased=False), torch.ones(1, 2, 3), 1e-3)


# --------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("grid_size", [(4, 6), (3, 5), (1, 7), (5, 2)])
def test_windows_are_put_together_again(grid_size):
    cells = grid_size[0] * grid_size[1]
    tokens = torch.arange(1.0, 1 + 2 * cells * 3).reshape(2, cells, 3)
    windows = split_windows(tokens, grid_size, 2)
    tall, wide = (min(2, side) for side in grid_size)
    assert windows.shape == (2 * math.ceil(grid_size[0] / tall) * math.ceil(grid_size[1] / wide), tall * wide, 3)
    assert torch.equal(join_windows(windows, grid_size, 2), tokens)
    assert windows.count_nonzero() == tokens.numel()  # the rest is filled with zeros


def test_a_window_holds_neighbours():
    tokens = torch.arange(24.0).reshape(1, 24, 1)  # 4 rows of 6
    windows = split_windows(tokens, (4, 6), 2).squeeze(-1).tolist()
    assert windows[:2] == [[0, 1, 6, 7], [2, 3, 8, 9]]
    assert windows[-1] == [16, 17, 22, 23]


@torch.no_grad()
def test_windows_that_cover_the_grid_are_global():
    pixel_values = images(48, 64, number=2)
    (expected,) = make()(pixel_values).feature_maps
    for window_size in (4, 14):  # a grid of 3 x 4: nothing is filled up
        (grid,) = make(window_size=window_size, global_attention_layers=[])(pixel_values).feature_maps
        assert_close(grid, expected)
    (grid,) = make(window_size=2, global_attention_layers=[0, 1])(pixel_values).feature_maps
    assert_close(grid, expected, 0)
    for everywhere in ([], [0], [1]):
        (grid,) = make(window_size=2, global_attention_layers=everywhere)(pixel_values).feature_maps
        assert (grid - expected).abs().max() > 0.01


@pytest.mark.parametrize("everywhere", [[], [0], [1]])
@torch.no_grad()
def test_a_pixel_reaches_its_own_window_only(everywhere):
    model = make(window_size=2, global_attention_layers=everywhere)
    before = images(64, 80)  # 4 x 5 patches: the last column is a window that is half empty
    after = before.clone()
    after[..., 50, 70] += 10  # in the patch of row 3 and column 4
    changed = (model(after).feature_maps[0] != model(before).feature_maps[0]).any(dim=1)[0]
    expected = torch.zeros(4, 5, dtype=torch.bool)
    expected[2:, 4:] = True
    assert torch.equal(changed, expected if not everywhere else torch.ones_like(expected))


@torch.no_grad()
def test_zeros_that_fill_up_a_window_are_attended_to():
    """As ViTDet has it. Written out for one layer: after normalisation, so their keys and values are the biases."""
    model = make(num_hidden_layers=1, window_size=2, global_attention_layers=[])
    (layer,) = model.vision_encoder.layers
    pixel_values = images(16, 48)  # 1 x 3 patches: a window of two, and one of one and a zero
    hidden = model.vision_encoder.embeddings(pixel_values)
    window = torch.cat([layer.layernorm_before(hidden[:, 2:]), torch.zeros(1, 1, 24)], dim=1)
    expected = hidden[:, 2] + layer.attention(window)[0][:, 0]
    expected = expected + layer.mlp(layer.layernorm_after(expected))
    assert_close(model(pixel_values).feature_maps[0][:, :, 0, 2], expected)


def test_which_layers_attend_everywhere():
    def everywhere(depth: int, **options) -> list[int]:
        config = EfficientSamBackboneConfig(num_hidden_layers=depth, **options)
        return [layer for layer, size in enumerate(config.window_sizes) if size == 0]

    assert everywhere(12, window_size=14) == [2, 5, 8, 11]  # ViTDet's base model
    assert everywhere(24, window_size=14) == [5, 11, 17, 23]  # and its large one
    assert everywhere(12, window_size=14, global_attention_layers=[11]) == [11]
    assert everywhere(12, window_size=14, global_attention_layers=()) == []
    assert everywhere(12) == list(range(12))


@torch.no_grad()
def test_eager_equals_sdpa():
    model, pixel_values = make(window_size=2, global_attention_layers=[1], pyramid_strides=[8, 32]), images(48, 80, 2)
    assert model.config._attn_implementation == "sdpa"
    expected = model(pixel_values).feature_maps
    model.set_attn_implementation("eager")
    output = model(pixel_values, output_attentions=True, output_hidden_states=True)
    for grid, wanted in zip(output.feature_maps, expected, strict=True):
        assert_close(grid, wanted)
    assert [tuple(weights.shape) for weights in output.attentions] == [(12, 3, 4, 4), (2, 3, 15, 15)]
    assert [tuple(state.shape) for state in output.hidden_states] == 3 * [(2, 15, 24)]


# --------------------------------------------------------------------------------------------------- pyramid


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (16, 112)])
@torch.no_grad()
def test_pyramid_of_every_stride(height, width):
    model = make(pyramid_strides=STRIDES)
    assert model.out_features == ["stage1", "stage2", "stage3", "stage4", "stage5"]
    maps = model(images(height, width, number=2)).feature_maps
    assert model.channels == 5 * [8]
    for stride, grid in zip(STRIDES, maps, strict=True):
        assert grid.shape == (2, 8, math.ceil(height / stride), math.ceil(width / stride))
        assert grid.mean(dim=1).abs().max() < 1e-5  # the last normalisation is over channels
    assert torch.equal(maps[4], maps[3][..., ::2, ::2])


@torch.no_grad()
def test_a_level_written_out():
    model, pixel_values = make(pyramid_strides=[4, 32]), images(32, 48)
    (last,) = make()(pixel_values).feature_maps
    finest, coarsest = model(pixel_values).feature_maps

    def normalize(grid, norm):
        mean, variance = grid.mean(dim=1, keepdim=True), grid.var(dim=1, keepdim=True, unbiased=False)
        scale, shift = (x[None, :, None, None] for x in (norm.weight, norm.bias))
        return (grid - mean) / (variance + 1e-6).sqrt() * scale + shift

    def finish(grid, neck):
        grid = nn.functional.conv2d(grid, neck.projection.weight[:, :, None, None])
        grid = nn.functional.conv2d(normalize(grid, neck.layernorm1), neck.conv.weight, padding=1)
        return normalize(grid, neck.layernorm2)

    first, norm, _, second = model.pyramid.levels["4"].resize
    grid = second(nn.functional.gelu(normalize(first(last), norm)))
    assert_close(finest, finish(grid, model.pyramid.levels["4"].neck))
    grid = torch.stack([last[:, :, :2, x : x + 2].amax(dim=(2, 3)) for x in (0, 2)], dim=-1)[
        :, :, None
    ]  # of 2 x 3 cells the last column is alone
    assert_close(coarsest, finish(grid, model.pyramid.levels["32"].neck))


@torch.no_grad()
def test_some_levels_of_a_pyramid():
    whole, pixel_values = make(pyramid_strides=STRIDES), images(64, 64)
    maps = whole(pixel_values).feature_maps
    for options, built in (
        ({"pyramid_strides": [8, 64]}, {"8", "32"}),
        ({"pyramid_strides": STRIDES, "out_features": ["stage2", "stage5"]}, {"8", "32"}),
        ({"pyramid_strides": STRIDES, "out_indices": [1]}, {"8"}),
    ):
        model = make(**options)
        assert model.pyramid.levels.keys() == built
        assert not model.load_state_dict(whole.state_dict(), strict=False).missing_keys
        for grid, index in zip(model(pixel_values).feature_maps, (1, 4), strict=False):
            assert_close(grid, maps[index])


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "not reentrant", "reentrant"])
def test_every_parameter_has_a_gradient(checkpointing):
    options = {"window_size": 2, "global_attention_layers": [1], "apply_layernorm": True, "pyramid_strides": STRIDES}
    gradients = []
    for used in (None, checkpointing):
        model = make(**options).train()
        if used is not None:
            model.activation_checkpointing_enable({"use_reentrant": used})
            # As the Trainer does: a checkpoint that is entered again needs an input with a gradient.
            model.enable_input_require_grads()
        sum(grid.square().mean() for grid in model(images(48, 80)).feature_maps).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("options", [{"out_indices": [0, 1]}, {"pyramid_strides": STRIDES, "out_indices": [4]}])
def test_nothing_is_left_unused(options):
    model = make(**options).train()
    sum(grid.square().mean() for grid in model(images(64, 64)).feature_maps).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


# ----------------------------------------------------------------------------------------- stochastic depth


def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    dropped = drop_path(torch.full((4000, 3, 2), 2.0), 0.25)
    assert set(dropped.unique().tolist()) == {0, torch.tensor(2 / 0.75).item()}
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))  # an image as a whole
    assert dropped.mean().item() == pytest.approx(2, rel=0.05)


def test_drop_path_grows_with_the_layers_and_is_for_training_alone():
    pixel_values = images(32, 32, number=64)
    model, plain = make(drop_path_rate=0.5), make()
    assert [layer.drop_path_rate for layer in model.vision_encoder.layers] == [0, 0.5]
    assert [layer.drop_path_rate for layer in make(num_hidden_layers=5, drop_path_rate=0.4).vision_encoder.layers] == (
        pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    )
    assert model.state_dict().keys() == plain.state_dict().keys()
    states = {}
    for training in (False, True):
        with torch.no_grad():
            output = model.train(training)(pixel_values, output_hidden_states=True)
            states[training] = output.hidden_states
            assert_close(
                plain.train(training)(pixel_values).feature_maps[0], model.eval()(pixel_values).feature_maps[0]
            )
    assert_close(states[True][1], states[False][1])
    skipped = (states[True][2] == states[True][1]).all(dim=(1, 2))  # both branches dropped: a quarter
    assert 5 < skipped.sum() < 30


def test_without_drop_path_nothing_is_drawn():
    model = make().train()
    torch.manual_seed(1)
    model(images(32, 32))
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------------------------------ where it comes from


@pytest.mark.parametrize("make_other", [tiny.sami_model, tiny.model, tiny.classifier])
@torch.no_grad()
def test_the_encoder_of_another_model(make_other, tmp_path, caplog):
    other = make_other()
    other.save_pretrained(tmp_path)
    options = {"pyramid_strides": [8, 16], "pyramid_channels": 4, "window_size": 2}
    model, info = EfficientSamBackbone.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert "You are using a model of type" not in caplog.text
    config = model.config
    assert (config.hidden_size, config.pyramid_strides, config.window_size) == (24, [8, 16], 2)
    assert model.channels == [4, 4] and config.out_features == ["stage1", "stage2"]
    assert info["missing_keys"] == {key for key in model.state_dict() if key.startswith("pyramid.")}
    theirs = other.state_dict()
    kept = [key for key in theirs if key.startswith(("vision_encoder.embeddings.", "vision_encoder.layers."))]
    assert info["unexpected_keys"] == theirs.keys() - kept and not info["mismatched_keys"]
    assert len(kept) == 3 + 2 * 16
    for key in kept:
        assert torch.equal(model.state_dict()[key], theirs[key])


@torch.no_grad()
def test_options_of_loading_are_checked(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"global_attention_layers is \[40\]"):
        EfficientSamBackbone.from_pretrained(tmp_path, global_attention_layers=[40])
    assert EfficientSamBackbone.from_pretrained(tmp_path, num_hidden_layers=1).config.out_features == ["stage1"]


def test_round_trip(tmp_path):
    options = {"window_size": 2, "global_attention_layers": (1,), "pyramid_strides": (8, 16, 64)}
    model, pixel_values = make(**options, out_features=["stage1", "stage3"], apply_layernorm=True), images(48, 64)
    expected = model(pixel_values).feature_maps
    model.save_pretrained(tmp_path)
    loaded, info = EfficientSamBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.to_diff_dict() == AutoConfig.from_pretrained(tmp_path).to_diff_dict()
    for grid, wanted in zip(loaded(pixel_values).feature_maps, expected, strict=True):
        assert_close(grid, wanted)
    # An option replaces what was saved, and what follows from it.
    for changed, features in (
        ({"out_features": ["stage2"]}, ["stage2"]),
        ({"out_indices": [0, 1]}, ["stage1", "stage2"]),
        ({"pyramid_strides": [16, 32]}, ["stage1", "stage2"]),
        ({"pyramid_strides": None}, ["stage2"]),
        ({"pyramid_strides": None, "out_indices": [0, 1]}, ["stem", "stage1"]),
        ({"pyramid_strides": STRIDES, "out_features": ["stage5"]}, ["stage5"]),
    ):
        loaded = EfficientSamBackbone.from_pretrained(tmp_path, **changed)
        assert loaded.out_features == features and loaded.config.window_size == 2
        assert len(loaded(pixel_values).feature_maps) == len(loaded.channels) == len(features)


def test_auto_classes(tmp_path, monkeypatch):
    model = make(pyramid_strides=[16])
    built = AutoBackbone.from_config(model.config)
    assert type(built) is EfficientSamBackbone and built.channels == [8]
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 64, "width": 64}}')
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is EfficientSamImageProcessor
    assert model.config.auto_map == {
        "AutoBackbone": "modeling_backbone_efficientsam.EfficientSamBackbone",
        "AutoConfig": "configuration_backbone_efficientsam.EfficientSamBackboneConfig",
    }
    # transformers asks the Hub even about a folder, whether timm's should be loaded in its place
    monkeypatch.setattr("huggingface_hub.HfApi.repo_exists", lambda *args, **kwargs: True)
    assert type(AutoBackbone.from_pretrained(tmp_path)) is EfficientSamBackbone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pyramid_strides": [8, 4]}, r"pyramid_strides is \[8, 4\]; choose from 4, 8, 16, 32 and 64"),
        ({"pyramid_strides": [16, 16]}, "in ascending order"),
        ({"pyramid_strides": [2, 4]}, "choose from"),
        ({"pyramid_strides": []}, "choose from"),
        ({"pyramid_strides": [16], "patch_size": 8}, "patch_size is 8; the strides of a pyramid need 16"),
        ({"global_attention_layers": [1, 2]}, r"global_attention_layers is \[1, 2\]; there are layers 0 to 1"),
        ({"global_attention_layers": [-1]}, "there are layers 0 to 1"),
        ({"out_features": ["stage3"]}, "stage3"),
        ({"pyramid_strides": [16], "out_features": ["stem"]}, "stem"),
        ({"drop_path_rate": 1}, "drop_path_rate is 1; it must be at least 0 and less than 1"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        EfficientSamBackboneConfig(**tiny.VISION | options)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="multiples of 16"):
        make(pyramid_strides=[4])(torch.zeros(1, 3, 48, 40))


# ---------------------------------------------------------------------------------------- inside of Mask2Former


def make_mask2former(**options) -> Mask2FormerForUniversalSegmentation:
    torch.manual_seed(0)
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_feedforward_dim": 16, "dim_feedforward": 16}
    backbone = EfficientSamBackboneConfig(
        **tiny.VISION, pyramid_strides=[4, 8, 16, 32], pyramid_channels=16, **options
    )
    config = Mask2FormerConfig(
        backbone_config=backbone, **sizes, **layers, num_queries=5, train_num_points=16, num_labels=3
    )
    return Mask2FormerForUniversalSegmentation(config)


def test_mask2former_trains_and_is_loaded_again(tmp_path):
    model = make_mask2former(window_size=2, global_attention_layers=[1]).train()
    pixel_values = images(64, 96, number=2)
    masks = torch.zeros(2, 64, 96)
    masks[0, :32], masks[1, 32:] = 1, 1
    targets = {"mask_labels": [masks, masks], "class_labels": 2 * [torch.tensor([0, 2])]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = model(pixel_values, **targets).loss
    loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not [name for name in still if "pixel_level_module.encoder" in name]

    model.eval().save_pretrained(tmp_path)
    loaded, info = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded.model.pixel_level_module.encoder) is EfficientSamBackbone
    assert loaded.config.backbone_config.window_sizes == [2, 0]
    with torch.no_grad():
        outputs = [one.eval()(pixel_values) for one in (model, loaded)]
    assert_close(outputs[1].masks_queries_logits, outputs[0].masks_queries_logits)
    assert outputs[0].masks_queries_logits.shape == (2, 5, 16, 24)  # stride 4


@torch.no_grad()
def test_a_pretrained_backbone_in_mask2former(tmp_path):
    tiny.sami_model().save_pretrained(tmp_path)
    model = make_mask2former()
    backbone = EfficientSamBackbone.from_pretrained(tmp_path, config=model.config.backbone_config)
    model.model.pixel_level_module.encoder = backbone
    assert torch.isfinite(model.eval()(images(32, 64)).class_queries_logits).all()
    names = [name for name, _ in model.named_parameters() if "vision_encoder." in name]
    assert names and all(name.startswith("model.pixel_level_module.encoder.vision_encoder.") for name in names)


# -------------------------------------------------------------------------------------------- torch.compile


@torch.no_grad()
def test_compiles_as_one_graph():
    model, pixel_values = make(window_size=2, global_attention_layers=[1], pyramid_strides=STRIDES), images(48, 80)
    expected = model(pixel_values).feature_maps
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for grid, wanted in zip(compiled(pixel_values).feature_maps, expected, strict=True):
        assert_close(grid, wanted)
    torch.compiler.reset()
