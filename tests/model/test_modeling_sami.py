import json
import math
from itertools import product

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForMaskGeneration, AutoModelForPreTraining

from hf_efficientsam import (
    EfficientSamConfig,
    EfficientSamForPreTraining,
    EfficientSamModel,
    EfficientSamSamiConfig,
    EfficientSamVisionModel,
)
from hf_efficientsam.model.modeling_sami import sincos_positions

B, HEIGHT, WIDTH = 2, 64, 80  # 4 x 5 patches
N, KEPT = 20, 5
TARGET = 8  # channels of the teacher
DECODERS = ("cross_attention", "all_token")


@pytest.fixture
def model() -> EfficientSamForPreTraining:
    return tiny.sami_model()


def images(height=HEIGHT, width=WIDTH) -> torch.Tensor:
    return tiny.pixel_values(B, height, width)


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return images()


@pytest.fixture
def features() -> torch.Tensor:
    return 3 * tiny.random(B, N, TARGET) - 1


@pytest.fixture
def noise() -> torch.Tensor:
    return tiny.random(B, N)


def patch(pixels: torch.Tensor, cell: int) -> torch.Tensor:
    """The pixels of a patch of `[..., H, W]`, counted row by row: a view."""
    row, column = divmod(cell, pixels.shape[-1] // 16)
    return pixels[..., 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]


def table(height: int, width: int, channels: int) -> torch.Tensor:
    """The sines and cosines of a grid, number by number."""
    quarter = channels // 4
    rows = []
    for y, x in product(range(height), range(width)):
        row = []
        for place, function in ((x, math.sin), (x, math.cos), (y, math.sin), (y, math.cos)):
            row += [function(place / 10_000 ** (k / quarter)) for k in range(quarter)]
        rows.append(row)
    return torch.tensor(rows)


def inputs_of(modules) -> list[list[torch.Tensor]]:
    """Fills up, for each of the modules, with the tensors that its next calls are given."""
    seen = []
    for module in modules:
        calls = []
        seen.append(calls)
        module.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(args))
    return seen


def assert_close(output, expected, tolerance=1e-5):
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=0)


# ------------------------------------------------------------------------------------------ the order of patches


@pytest.mark.parametrize("decoder_type", DECODERS)
@pytest.mark.parametrize("mask_ratio", [0, 0.5, 0.75, 0.85])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 80), (112, 32)])
@torch.no_grad()
def test_the_noisiest_patches_are_removed(decoder_type, mask_ratio, height, width):
    model = tiny.sami_model(decoder_type=decoder_type, mask_ratio=mask_ratio)
    n = height * width // 256
    noise = tiny.random(B, n)
    output = model(images(height, width), noise=noise)
    assert output.reconstruction.shape == (B, n, TARGET)
    assert output.mask.shape == output.ids_restore.shape == (B, n)
    kept = {0: n, 0.5: n // 2, 0.75: n // 4, 0.85: {16: 2, 20: 3, 14: 2}[n]}[mask_ratio]
    assert output.loss is None
    for mask, ids, values in zip(output.mask, output.ids_restore, noise, strict=True):
        order = np.argsort(values.numpy())
        assert mask.tolist() == [float(cell in order[kept:]) for cell in range(n)]
        assert ids[torch.from_numpy(order)].tolist() == list(range(n))  # its place among the sorted


def written_out(model, pixels, noise) -> torch.Tensor:
    """The reconstruction of one image with cells named one by one, kept and removed ones in image order."""
    encoder, decoder = model.vision_encoder, model.decoder
    height, width = pixels.shape[1] // 16, pixels.shape[2] // 16
    n, channels = height * width, model.config.decoder_hidden_size
    kept = sorted(noise.argsort()[: int(n * (1 - model.config.mask_ratio))].tolist())
    removed = [cell for cell in range(n) if cell not in kept]

    positions = encoder.embeddings.interpolate_positions(height, width)[0]
    kernel = encoder.embeddings.projection
    tokens = [kernel.weight.flatten(1) @ patch(pixels, cell).flatten() + kernel.bias for cell in kept]
    tokens = [token + positions[cell] for token, cell in zip(tokens, kept, strict=True)]
    states = torch.stack([encoder.cls_token[0, 0] + encoder.embeddings.position_embeddings[0, 0], *tokens])[None]
    for layer in encoder.layers:
        states = layer(states)
    states = decoder.projection(decoder.layernorm_before(states))

    cells = table(height, width, channels)
    seen = states.clone()
    seen[0, 1:] += cells[kept]
    masked = decoder.mask_token + cells[removed]
    result = torch.zeros(n, channels)
    if model.config.decoder_type == "cross_attention":
        for layer in decoder.layers:
            masked = layer(masked, seen)
        result[kept], result[removed] = states[0, 1:], masked[0]
    else:
        every = torch.cat([seen, masked], dim=1)
        for layer in decoder.layers:
            every = layer(every)
        result[kept + removed] = every[0, 1:]
    return decoder.head(decoder.layernorm_after(result))


@pytest.mark.parametrize("decoder_type", DECODERS)
@pytest.mark.parametrize("mask_ratio", [0, 0.5, 0.75])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 80), (112, 32)])
@torch.no_grad()
def test_equals_the_model_written_out(decoder_type, mask_ratio, height, width):
    model = tiny.sami_model(decoder_type=decoder_type, mask_ratio=mask_ratio)
    model.decoder.mask_token.normal_()  # larger than it starts
    pixels, noise = images(height, width), tiny.random(B, height * width // 256)
    output = model(pixels, noise=noise).reconstruction
    assert_close(output, torch.stack([written_out(model, *image) for image in zip(pixels, noise, strict=True)]))


@torch.no_grad()
def test_a_decoder_layer_attends_and_then_widens(model):
    """Two heads of pre-norm attention over memory and queries, then the MLP."""
    layer = model.decoder.layers[0]
    queries, memory = tiny.random(1, 3, 16), tiny.random(1, 4, 16) - 1
    attention = layer.attention
    rows = layer.layernorm_before(torch.cat([memory, queries], dim=1))[0]
    query = attention.q_proj(layer.layernorm_before(queries))[0]
    key, value = attention.k_proj(rows), attention.v_proj(rows)
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        weights = (query[:, head] @ key[:, head].T / 8**0.5).softmax(dim=1)
        heads.append(weights @ value[:, head])
    expected = queries + attention.o_proj(torch.cat(heads, dim=1))
    expected = expected + layer.mlp(layer.layernorm_after(expected))
    assert_close(layer(queries, memory), expected)


@pytest.mark.parametrize("decoder_type", DECODERS)
@torch.no_grad()
def test_pixels_of_a_removed_patch_are_never_seen(decoder_type, pixel_values, noise):
    model = tiny.sami_model(decoder_type=decoder_type)
    output = model(pixel_values, noise=noise)
    for cell in range(N):
        changed = pixel_values.clone()
        patch(changed, cell).neg_()
        difference = (model(changed, noise=noise).reconstruction - output.reconstruction).abs().amax(dim=(1, 2))
        for image in range(B):
            assert (difference[image] == 0) if output.mask[image, cell] else (difference[image] > 1e-3), (image, cell)


@torch.no_grad()
def test_noise_decides_alone(model, pixel_values, noise):
    output = model(pixel_values, noise=noise)
    assert torch.equal(model(pixel_values, noise=noise).reconstruction, output.reconstruction)
    assert_close(model(pixel_values, noise=noise**2).reconstruction, output.reconstruction, 0)  # its order, that is
    assert not torch.equal(model(pixel_values, noise=1 - noise).mask, output.mask)


@torch.no_grad()
def test_noise_is_drawn_where_none_is_given(model, pixel_values):
    torch.manual_seed(1)
    first, second = model(pixel_values), model(pixel_values)
    torch.manual_seed(1)
    assert torch.equal(model(pixel_values).ids_restore, first.ids_restore)
    assert not torch.equal(first.ids_restore, second.ids_restore)
    assert not torch.equal(first.ids_restore[0], first.ids_restore[1])  # each image its own


# ------------------------------------------------------------------------------------------------- the encoder


@pytest.mark.parametrize(("mask_ratio", "kept"), [(0, 20), (0.5, 10), (0.75, 5), (0.85, 3), (0.9, 2), (0.95, 1)])
@torch.no_grad()
def test_only_kept_patches_go_through_the_encoder(mask_ratio, kept, pixel_values):
    model = tiny.sami_model(mask_ratio=mask_ratio)
    seen = inputs_of(model.vision_encoder.layers)
    model(pixel_values)
    assert [tuple(x.shape) for ((x,),) in seen] == 2 * [(B, 1 + kept, 24)]


@torch.no_grad()
def test_the_papers_number_of_patches():
    """196 patches of 224 x 224 pixels: 49 kept of 75 %, 29 of 85 %."""
    for mask_ratio, kept in ((0.5, 98), (0.75, 49), (0.85, 29)):
        model = tiny.sami_model({"pretrain_image_size": 224}, mask_ratio=mask_ratio)
        assert (model(images(224, 224)).mask == 0).sum(1).tolist() == B * [kept]


@torch.no_grad()
def test_encoder_input(model, pixel_values, noise):
    """The class token with row 0 of the table, then the patches as `EfficientSamModel` embeds them."""
    encoder = model.vision_encoder
    tokens = model(pixel_values, noise=noise, output_hidden_states=True).hidden_states[0]
    cls_token = encoder.cls_token[0, 0] + encoder.embeddings.position_embeddings[0, 0]
    patches = encoder.embeddings(pixel_values)
    for image in range(B):
        assert torch.equal(tokens[image, 0], cls_token)
        assert torch.equal(tokens[image, 1:], patches[image, noise[image].argsort()[:KEPT]])


@pytest.mark.parametrize("decoder_type", DECODERS)
@torch.no_grad()
def test_the_class_token_and_its_position_count(decoder_type, pixel_values, noise):
    model = tiny.sami_model(decoder_type=decoder_type)
    expected = model(pixel_values, noise=noise).reconstruction
    model.vision_encoder.cls_token += tiny.random(24)
    moved = model(pixel_values, noise=noise).reconstruction
    assert (moved - expected).abs().amax(-1).min() > 1e-5  # everywhere
    model.vision_encoder.embeddings.position_embeddings[:, 0] -= tiny.random(24)
    assert_close(model(pixel_values, noise=noise).reconstruction, expected)


@torch.no_grad()
def test_it_is_the_encoder_of_the_vision_model_but_for_the_class_token(pixel_values, noise, tmp_path):
    """The same embeddings and the same layers; without the class token the vision model's tokens come out."""
    model = tiny.sami_model(mask_ratio=0)
    model.save_pretrained(tmp_path)
    expected = EfficientSamVisionModel.from_pretrained(tmp_path)(pixel_values, output_hidden_states=True).hidden_states
    output = model(pixel_values, noise=noise, output_hidden_states=True)
    order = output.ids_restore[..., None]
    assert_close(output.hidden_states[0][:, 1:].take_along_dim(order, 1), expected[0], 0)
    states = output.hidden_states[0][:, 1:]
    for layer, layer_expected in zip(model.vision_encoder.layers, expected[1:], strict=True):
        states = layer(states)
        assert_close(states.take_along_dim(order, 1), layer_expected)
    assert (output.hidden_states[-1][:, 1:].take_along_dim(order, 1) - expected[-1]).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------- the decoder


@torch.no_grad()
def test_cross_attention_queries_are_the_removed_patches(model, pixel_values, noise):
    """Keys and values: class token and kept patches as the encoder left them, then the mask tokens."""
    first, second = inputs_of(model.decoder.layers)
    attended = inputs_of(layer.attention for layer in model.decoder.layers)
    output = model(pixel_values, noise=noise, output_hidden_states=True)
    encoded = model.decoder.projection(model.decoder.layernorm_before(output.hidden_states[-1]))
    cells = table(4, 5, 16)
    order = noise.argsort(dim=1)

    (queries, memory), (next_queries, next_memory) = first[0], second[0]
    assert queries.shape == next_queries.shape == (B, N - KEPT, 16)
    assert_close(queries, model.decoder.mask_token + cells[order[:, KEPT:]])
    assert_close(memory[:, 0], encoded[:, 0])
    assert_close(memory[:, 1:], encoded[:, 1:] + cells[order[:, :KEPT]])
    assert torch.equal(next_memory, memory)  # not decoded
    for layer, [(queries, context)], tokens in zip(
        model.decoder.layers, attended, (first[0][0], next_queries), strict=True
    ):
        assert_close(queries, layer.layernorm_before(tokens))
        assert_close(context, layer.layernorm_before(torch.cat([memory, tokens], dim=1)))


@torch.no_grad()
def test_all_token_decodes_all_of_them(pixel_values):
    model = tiny.sami_model(decoder_type="all_token")
    seen = inputs_of(layer.attention for layer in model.decoder.layers)
    model(pixel_values)
    for [(queries, context)] in seen:
        assert queries.shape == context.shape == (B, 1 + N, 16)


@pytest.mark.parametrize("decoder_type", DECODERS)
@torch.no_grad()
def test_visible_tokens_are_the_encoders_own(decoder_type, pixel_values, noise):
    """With cross-attention they do not depend on the decoder's layers; with all-token they do."""
    model = tiny.sami_model(decoder_type=decoder_type)
    before = model(pixel_values, noise=noise, output_hidden_states=True)
    for parameter in model.decoder.layers.parameters():
        parameter += 0.1 * tiny.random(*parameter.shape)
    after = model(pixel_values, noise=noise).reconstruction
    change = (after - before.reconstruction).abs().amax(-1)
    assert (change[before.mask == 1] > 1e-3).all()
    if decoder_type == "all_token":
        assert (change[before.mask == 0] > 1e-3).all()
        return
    assert (change[before.mask == 0] == 0).all()
    decoder = model.decoder
    own = decoder.projection(decoder.layernorm_before(before.hidden_states[-1][:, 1:]))
    own = decoder.head(decoder.layernorm_after(own))
    order = noise.argsort(dim=1)[:, :KEPT, None]
    assert_close(after.take_along_dim(order, dim=1), own)


@torch.no_grad()
def test_nothing_to_decode_where_nothing_is_removed():
    assert len(tiny.sami_model(mask_ratio=0).decoder.layers) == 0
    assert len(tiny.sami_model(mask_ratio=0, decoder_type="all_token").decoder.layers) == 2


# ------------------------------------------------------------------------------------------------------ the loss


def normalised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def errors_by_hand(reconstruction: np.ndarray, target: np.ndarray, loss: str) -> np.ndarray:
    if loss == "mse":
        return ((reconstruction - target) ** 2).mean(-1)
    lengths = np.linalg.norm(reconstruction, axis=-1) * np.linalg.norm(target, axis=-1)
    return 1 - (reconstruction * target).sum(-1) / lengths


@pytest.mark.parametrize("decoder_type", DECODERS)
@pytest.mark.parametrize("normalization", ["layer_norm", "none"])
@pytest.mark.parametrize("loss", ["mse", "cosine"])
@torch.no_grad()
def test_features_loss_is_over_all_patches(decoder_type, normalization, loss, pixel_values, features, noise):
    model = tiny.sami_model(decoder_type=decoder_type, target_normalization=normalization, loss=loss)
    output = model(pixel_values, features, noise)
    target = features.double().numpy()
    if normalization == "layer_norm":
        target = normalised(target)
    expected = errors_by_hand(output.reconstruction.double().numpy(), target, loss).mean()
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("decoder_type", DECODERS)
@pytest.mark.parametrize("normalization", ["layer_norm", "none"])
@pytest.mark.parametrize("loss", ["mse", "cosine"])
@torch.no_grad()
def test_pixels_loss_is_over_removed_patches(decoder_type, normalization, loss, pixel_values, noise):
    model = tiny.sami_model(decoder_type=decoder_type, target="pixels", target_normalization=normalization, loss=loss)
    output = model(pixel_values, noise=noise)
    assert output.reconstruction.shape == (B, N, 3 * 16 * 16)
    target = torch.stack([patch(pixel_values, cell).flatten(1) for cell in range(N)], dim=1).double().numpy()
    if normalization == "layer_norm":
        target = normalised(target)
    assert_close(model.target(pixel_values), torch.from_numpy(target).float(), 1e-4)
    errors = errors_by_hand(output.reconstruction.double().numpy(), target, loss)
    assert output.loss.item() == pytest.approx(errors[output.mask.numpy() == 1].mean(), rel=1e-5)


def test_losses_worked_by_hand():
    """Two patches of two channels, one of them removed."""
    reconstruction = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]])
    target = torch.tensor([[[1.0, 0.0], [0.0, 4.0]]])
    mask = torch.tensor([[0.0, 1.0]])
    mse, cosine = tiny.sami_model(target_size=2), tiny.sami_model(target_size=2, loss="cosine")
    assert mse.loss(reconstruction, mask, target).item() == (0 + 4 + 9 + 16) / 4
    assert cosine.loss(reconstruction, mask, target).item() == pytest.approx(1 - (1 / 5**0.5 + 0) / 2)
    pixels = tiny.sami_model({"num_channels": 1}, target="pixels")
    assert pixels.loss(reconstruction, mask, target).item() == (9 + 16) / 2
    assert mse.loss(reconstruction, mask, None) is None


@torch.no_grad()
def test_a_perfect_reconstruction_has_no_loss(features, pixel_values):
    for options in ({}, {"target_normalization": "none"}, {"loss": "cosine"}, {"target": "pixels"}):
        model = tiny.sami_model(**options)
        target = model.target(pixel_values, None if "target" in options else features)
        assert abs(model.loss(target, torch.ones(B, N), target).item()) < 1e-6


@torch.no_grad()
def test_a_constant_target_is_no_division_by_zero(pixel_values):
    assert tiny.sami_model()(pixel_values, torch.full((B, N, TARGET), 5.0)).loss.isfinite()
    assert tiny.sami_model(target="pixels")(torch.ones_like(pixel_values)).loss.isfinite()


def test_half_precision_features_are_normalised_in_float32(model, features, pixel_values):
    """As a cache holds them."""
    half = (1000 * features).half()
    target = model.target(pixel_values, half)
    assert target.dtype == torch.float32
    assert_close(target, torch.from_numpy(normalised(half.double().numpy())).float())


def test_head_is_as_wide_as_the_target():
    assert tiny.sami_model(target_size=384).decoder.head.out_features == 384
    assert tiny.sami_model(target_size=None).decoder.head.out_features == 256
    assert tiny.sami_model({"num_channels": 1}, target="pixels", target_size=5).decoder.head.out_features == 256


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"noise": torch.zeros(B, N + 1)}, r"noise has shape \(2, 21\); it must be \(2, 20\)"),
        ({"noise": torch.zeros(1, N)}, r"noise has shape \(1, 20\); it must be \(2, 20\)"),
        ({"target_features": torch.zeros(B, N, TARGET + 1)}, r"\(2, 20, 9\); it must be \(2, 20, 8\)"),
        ({"target_features": torch.zeros(B, N + 1, TARGET)}, r"\(2, 21, 8\); it must be \(2, 20, 8\)"),
        ({"target_features": torch.zeros(1, N, TARGET)}, r"\(1, 20, 8\); it must be \(2, 20, 8\)"),
        ({"target_features": torch.zeros(B, TARGET, 4, 5)}, r"\(2, 8, 4, 5\); it must be \(2, 20, 8\)"),
        ({"pixel_values": torch.zeros(B, 3, HEIGHT, 72)}, "multiples of 16"),
        ({"pixel_values": torch.zeros(B, 4, HEIGHT, WIDTH)}, "needs 3 channels"),
        ({"pixel_values": torch.zeros(B, 3, 16, 32)}, "mask_ratio 0.75 keeps none of 2 patches"),
    ],
)
def test_inputs_that_do_not_fit(model, pixel_values, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(**{"pixel_values": pixel_values, **inputs})


def test_pixels_take_no_features(pixel_values, features):
    with pytest.raises(ValueError, match="without target_features"):
        tiny.sami_model(target="pixels")(pixel_values, features)


# ------------------------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("decoder_type", DECODERS)
@pytest.mark.parametrize("mask_ratio", [0, 0.5, 0.75, 0.85])
@pytest.mark.parametrize("target", ["features", "pixels"])
@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_every_parameter_has_a_gradient(decoder_type, mask_ratio, target, loss, pixel_values, features, noise):
    """DistributedDataParallel waits for those of all parameters."""
    if target == "pixels" and mask_ratio == 0:
        return  # refused by the config
    model = tiny.sami_model(decoder_type=decoder_type, mask_ratio=mask_ratio, target=target, loss=loss)
    model(pixel_values, features if target == "features" else None, noise).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    zero = {name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 1e-7}
    zero = {name for name in zero if not name.endswith("k_proj.bias")}  # softmax does not see them
    assert zero == ({"decoder.mask_token"} if mask_ratio == 0 else set())


@pytest.mark.parametrize("decoder_type", DECODERS)
def test_gradient_checkpointing(decoder_type, pixel_values, features, noise):
    model = tiny.sami_model(decoder_type=decoder_type).train()
    layers = [*model.vision_encoder.layers, *model.decoder.layers]
    calls = inputs_of(layer.mlp for layer in layers)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(pixel_values, features, noise).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        assert [len(made) for made in calls] == len(layers) * [3 if checkpointing else 1]
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, 1e-7)


@pytest.mark.parametrize("decoder_type", DECODERS)
@torch.no_grad()
def test_eager_equals_sdpa(decoder_type, pixel_values, features, noise):
    model = tiny.sami_model(decoder_type=decoder_type)
    assert model.config._attn_implementation == "sdpa"
    expected = model(pixel_values, features, noise)
    for other in (tiny.sami_model(decoder_type=decoder_type), EfficientSamForPreTraining(model.config)):
        other.load_state_dict(model.state_dict())
        other.set_attn_implementation("eager")
        parts = [other, other.vision_encoder, other.decoder.layers[0].attention]
        assert {part.config._attn_implementation for part in parts} == {"eager"}
        output = other(pixel_values, features, noise)
        assert_close(output.reconstruction, expected.reconstruction)
        assert_close(output.loss, expected.loss)


@pytest.mark.parametrize("by_config", [False, True])
@torch.no_grad()
def test_hidden_states_and_attentions(model, pixel_values, by_config):
    model.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    if by_config:
        for name in wanted:
            setattr(model.config, name, True)
        wanted = {}
    output = model(pixel_values, **wanted)
    assert [tuple(x.shape) for x in output.hidden_states] == 3 * [(B, 1 + KEPT, 24)]
    assert [tuple(x.shape) for x in output.attentions] == 2 * [(B, 3, 1 + KEPT, 1 + KEPT)]
    for weights in output.attentions:
        assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@torch.no_grad()
def test_nothing_is_recorded_unless_asked(model, pixel_values, features):
    assert list(model(pixel_values, features)) == ["loss", "reconstruction", "mask", "ids_restore"]
    assert list(model(pixel_values)) == ["reconstruction", "mask", "ids_restore"]


@torch.no_grad()
def test_return_dict_false(model, pixel_values, features, noise):
    expected = model(pixel_values, features, noise)
    for output in (
        model(pixel_values, features, noise, return_dict=False),
        model(pixel_values, features, noise, return_dict=False, output_hidden_states=True)[:4],
    ):
        assert type(output) is tuple
        for value, wanted in zip(output, expected.to_tuple(), strict=True):
            assert torch.equal(value, wanted)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("decoder_type", DECODERS)
@pytest.mark.parametrize("target", ["features", "pixels"])
def test_half_precision(dtype, tolerance, decoder_type, target, pixel_values, features, noise):
    model = tiny.sami_model(decoder_type=decoder_type, target=target)
    features = features if target == "features" else None
    expected = model(pixel_values, features, noise)
    half = model.to(dtype)
    half_features = None if features is None else features.to(dtype)
    for output in (half(pixel_values, features, noise), half(pixel_values.to(dtype), half_features, noise)):
        assert output.reconstruction.dtype == dtype
        # In half precision the number of removed patches would be rounded, or overflow.
        assert output.mask.dtype == output.loss.dtype == torch.float32
        assert_close(output.reconstruction.float(), expected.reconstruction, tolerance)
        assert_close(output.loss, expected.loss, tolerance)
        output.loss.backward()


@pytest.mark.parametrize("decoder_type", DECODERS)
def test_autocast(decoder_type, pixel_values, features, noise):
    model = tiny.sami_model(decoder_type=decoder_type)
    expected = model(pixel_values, features, noise)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixel_values, features, noise)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert_close(output.reconstruction.float(), expected.reconstruction, 0.1)
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("decoder_type", DECODERS)
def test_whole_forward_is_one_graph(decoder_type, pixel_values, features, noise):
    """Traces without a break; the compiler's own back end would take minutes."""
    torch.compiler.reset()
    model = tiny.sami_model(decoder_type=decoder_type)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    output, expected = compiled(pixel_values, features, noise), model(pixel_values, features, noise)
    assert_close(output.reconstruction, expected.reconstruction)
    assert_close(output.loss, expected.loss)
    output.loss.backward()
    assert model.vision_encoder.cls_token.grad.abs().max() > 0
    torch.compiler.reset()


# ------------------------------------------------------------------------------------------------- initialisation


def test_projections_start_as_xavier():
    model = tiny.sami_model(
        {"hidden_size": 96, "initializer_range": 0.1}, initializer_range=0.3, decoder_hidden_size=256
    )
    kernel = model.vision_encoder.embeddings.projection
    matrices = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(matrices) == 2 * 6 + 1 + 2 * 6 + 1  # encoder, projection, decoder, head
    for name, module in {**matrices, "kernel": kernel}.items():
        rows = module.weight.flatten(1)
        bound = (6 / sum(rows.shape)) ** 0.5
        assert 0.95 * bound < rows.abs().max() <= bound, name
        assert rows.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
        assert not module.bias.any(), name
    assert model.vision_encoder.cls_token.std().item() == pytest.approx(0.1, rel=0.3)
    assert model.decoder.mask_token.std().item() == pytest.approx(0.3, rel=0.3)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name


def test_positions_start_as_sines_and_cosines():
    embeddings = tiny.sami_model({"pretrain_image_size": 224}).vision_encoder.embeddings
    assert embeddings.position_embeddings.shape == (1, 1 + 14 * 14, 24)
    assert not embeddings.position_embeddings[0, 0].any()
    assert_close(embeddings.position_embeddings[0, 1:], table(14, 14, 24))


def test_sincos_positions():
    positions = sincos_positions(3, 5, 16)
    assert_close(positions, table(3, 5, 16))
    cells = positions.reshape(3, 5, 16)
    assert torch.equal(cells[0, :, :8], cells[2, :, :8])  # the first half is x's
    assert torch.equal(cells[:, 0, 8:], cells[:, 4, 8:])  # the second y's
    assert_close(cells[1, 2, :4], torch.sin(torch.tensor([2, 0.2, 0.02, 0.002])))
    assert len(positions.unique(dim=0)) == 15


# -------------------------------------------------------------------------------------------- saving and loading


@torch.no_grad()
def test_round_trip(model, pixel_values, features, noise, tmp_path):
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    expected = model(pixel_values, features, noise)
    for auto_class in (EfficientSamForPreTraining, AutoModelForPreTraining):
        loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is EfficientSamForPreTraining
        assert not any(info.values()), info
        assert torch.equal(loaded(pixel_values, features, noise).loss, expected.loss)


NECK = {
    "vision_encoder.neck.projection.weight",
    "vision_encoder.neck.layernorm1.weight",
    "vision_encoder.neck.layernorm1.bias",
    "vision_encoder.neck.conv.weight",
    "vision_encoder.neck.layernorm2.weight",
    "vision_encoder.neck.layernorm2.bias",
}


def names_under(state_dict, *prefixes) -> set[str]:
    return {name for name in state_dict if name.startswith(prefixes)}


@pytest.mark.parametrize("loaded_class", [EfficientSamModel, EfficientSamVisionModel])
@pytest.mark.parametrize("decoder_type", DECODERS)
@torch.no_grad()
def test_the_encoder_and_only_it_is_taken(loaded_class, decoder_type, tmp_path):
    model = tiny.sami_model(decoder_type=decoder_type)
    for parameter in model.parameters():
        parameter += tiny.random(*parameter.shape)  # as trained: no two starts are alike
    model.save_pretrained(tmp_path / "sami")
    loaded, info = loaded_class.from_pretrained(tmp_path / "sami", output_loading_info=True)

    weights, pretrained = loaded.state_dict(), model.state_dict()
    assert info["missing_keys"] == NECK | names_under(weights, "prompt_encoder.", "mask_decoder.")
    assert info["unexpected_keys"] == {"vision_encoder.cls_token"} | names_under(pretrained, "decoder.")
    assert not info["mismatched_keys"] and not info["error_msgs"]
    encoder = names_under(pretrained, "vision_encoder.embeddings.", "vision_encoder.layers.")
    assert weights.keys() - info["missing_keys"] == encoder
    assert all(torch.equal(weights[name], pretrained[name]) for name in encoder)
    assert all(value.isfinite().all() for value in weights.values())  # what is new is initialised

    vision = getattr(loaded.config, "vision_config", loaded.config)
    for name in ("hidden_size", "num_hidden_layers", "image_size", "pretrain_image_size", "output_channels"):
        assert getattr(vision, name) == getattr(model.config.vision_config, name), name
    loaded.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    own = EfficientSamSamiConfig().to_dict().keys() - loaded_class.config_class().to_dict().keys()
    assert {"decoder_type", "mask_ratio", "target_size"} < own
    assert not own & saved.keys()
    assert saved["model_type"] == loaded_class.config_class.model_type
    assert "Sami" not in json.dumps(saved) and "PreTraining" not in json.dumps(saved)
    again, info = loaded_class.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())


@torch.no_grad()
def test_the_encoder_is_taken_with_what_from_pretrained_is_told(model, pixel_values, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = EfficientSamModel.from_pretrained(
        tmp_path, attn_implementation="eager", output_attentions=True, dtype="auto"
    )
    assert loaded.dtype == torch.bfloat16
    assert len(loaded(pixel_values).vision_attentions) == 2
    loaded = EfficientSamModel.from_pretrained(tmp_path, dtype=torch.float32, initializer_range=0.5)
    assert loaded.dtype == torch.float32 and loaded.config.initializer_range == 0.5
    config = EfficientSamConfig.from_pretrained(tmp_path, prompt_encoder_config={"background_points": True})
    loaded = EfficientSamModel.from_pretrained(tmp_path, config=config)
    assert loaded.prompt_encoder.background_embed is not None


def test_a_pretrained_encoder_is_no_mask_model(model, tmp_path):
    """Nobody gets random masks without asking for that class."""
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="EfficientSamSamiConfig"):
        AutoModelForMaskGeneration.from_pretrained(tmp_path)
