"""Linear layers and attention by oneDNN: torch's numbers, and only where torch's own operators can be left out."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from hf_efficientsam.model import onednn_efficientsam
from hf_efficientsam.model.onednn_efficientsam import EfficientSamLinear, attention_forward, can_attend, linear

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()), reason="torch without MKL"
)


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """Arguments of the calls of oneDNN."""
    calls, operator = [], onednn_efficientsam.LINEAR

    def record(*args):
        calls.append(args)
        return operator(*args)

    monkeypatch.setattr(onednn_efficientsam, "LINEAR", record)
    return calls


def large_layer() -> nn.Linear:
    torch.manual_seed(0)
    return EfficientSamLinear(192, 256)


def test_torch_still_has_the_operator():
    assert onednn_efficientsam.LINEAR is not None


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_layer_gives_torchs_numbers(calls, bias):
    layer, states = large_layer(), torch.randn(2, 300, 192)
    bias = layer.bias if bias else None
    expected = F.linear(states.double(), layer.weight.double(), None if bias is None else bias.double())
    output = linear(states, layer.weight, bias)
    assert len(calls) == 1 and output.dtype == torch.float32
    assert (output - expected).abs().max() < 1e-5


@torch.no_grad()
def test_views_are_copied_before(calls):
    """oneDNN's operator takes a thousand times as long for a transposed weight."""
    states, weight = torch.randn(192, 600).T, torch.randn(192, 256).T
    assert (linear(states, weight) - F.linear(states, weight)).abs().max() < 1e-3
    assert calls[0][0].is_contiguous() and calls[0][1].is_contiguous()


@torch.no_grad()
def test_changed_weights_count_at_once(calls):
    layer, states = large_layer(), torch.randn(600, 192)
    before = layer(states)
    layer.weight.mul_(2)
    layer.bias.mul_(2)
    assert torch.equal(layer(states), 2 * before) and len(calls) == 2


def test_gradients_are_torchs(calls):
    layer, states = large_layer(), torch.randn(600, 192)
    layer(states).sum().backward()
    assert not calls and layer.weight.grad is not None


@pytest.mark.parametrize("case", ["float64", "autocast", "few rows", "turned off", "meta"])
@torch.no_grad()
def test_what_stays_with_torch(calls, case):
    layer, states = large_layer(), torch.randn(600, 192)
    if case == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(states).dtype == torch.bfloat16
    elif case == "turned off":
        with torch.backends.mkldnn.flags(enabled=False):
            layer(states)
    elif case == "few rows":
        layer(states[:7])
    elif case == "float64":
        layer.double()(states.double())
    else:
        layer.to("meta")(states.to("meta"))
    assert not calls


@torch.no_grad()
def test_compiled_and_exported_code_has_torchs_operators(calls):
    layer, states = large_layer().eval(), torch.randn(600, 192)
    graph = torch.export.export(layer, (states,)).graph
    assert "aten.linear" in str(graph) and not calls
    traced = torch.jit.trace(layer, states, check_trace=False)  # the check would run the layer as it is
    assert "aten::linear" in str(traced.inlined_graph) and not calls


@torch.no_grad()
def test_vmap_gives_torchs_numbers():
    layer, states = large_layer(), torch.randn(3, 600, 192)
    assert (torch.func.vmap(layer)(states) - F.linear(states, layer.weight, layer.bias)).abs().max() < 1e-5


@pytest.mark.parametrize("length", [512, 700])
@torch.no_grad()
def test_attention_gives_torchs_numbers(calls, length):
    """For more than one image, and views as they come out of the projections."""
    query, key, value = (4 * torch.randn(2, length, 3, 16).transpose(1, 2) for _ in range(3))
    assert can_attend(query, key, value)
    output, _ = attention_forward(None, query, key, value, None, scaling=0.25)
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=0.25)
    assert (output - expected.transpose(1, 2)).abs().max() < 1e-4


@torch.no_grad()
def test_the_encoder_gives_the_numbers_of_torchs_products(calls, monkeypatch):
    model, pixel_values = tiny.model(), torch.randn(1, 3, 384, 384)
    output = model.get_image_embeddings(pixel_values)
    assert calls
    monkeypatch.setattr(onednn_efficientsam, "LINEAR", None)
    assert (output - model.get_image_embeddings(pixel_values)).abs().max() < 1e-5
