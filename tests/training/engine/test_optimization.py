import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import get_scheduler

from hf_efficientsam.training.engine.optimization import (
    clip_gradients,
    describe_unless_finite,
    encoder_lr_scale,
    parameter_groups,
    warmed_up,
    weight_average,
)


def groups_by_name(model, *arguments):
    """{name of a parameter: (learning rate, weight decay)}"""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, *arguments)
    return {names[one]: (group["lr"], group["weight_decay"]) for group in groups for one in group["params"]}


def test_weight_decay_is_for_the_weights_of_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm(4), nn.Embedding(5, 4), nn.Linear(4, 2))
    found = groups_by_name(model, 0.1, 0.05)
    assert {name for name, (_, decay) in found.items() if decay} == {"0.weight", "3.weight"}
    assert set(found.values()) == {(0.1, 0.05), (0.1, 0.0)} and len(found) == 7


def test_a_warm_up_begins_to_learn_at_once():
    def rates(warmup_steps):
        optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.5)])
        schedule = warmed_up(get_scheduler("linear", optimizer, warmup_steps, 6), warmup_steps)
        found = []
        for _ in range(6):
            found.append(schedule.get_last_lr())
            optimizer.step()
            schedule.step()
        assert all(half == one / 2 for one, half in found)
        return [one for one, _ in found]

    assert rates(3) == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 2 / 3, 1 / 3])
    assert rates(0) == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_frozen_parameters_are_in_no_group_and_rates_are_scaled():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].bias.requires_grad = False
    found = groups_by_name(model, 0.1, 0.05, lambda name: 0.5 if name.startswith("1") else 1.0)
    assert found == {"0.weight": (0.1, 0.05), "1.weight": (0.05, 0.05), "1.bias": (0.05, 0.0)}


def test_an_average_of_the_weights_forgets_its_start():
    model = nn.Linear(1, 1)
    average, expected = weight_average(model, 0.9), None
    for step in range(200):
        nn.init.constant_(model.weight, step)
        average.update_parameters(model)
        weight = min(0.9, (1 + step) / (10 + step))
        expected = step if expected is None else weight * expected + (1 - weight) * step
    assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)
    short = weight_average(model, 0.9999)
    for step in range(100):
        nn.init.constant_(model.weight, step)
        short.update_parameters(model)
    assert short.module.weight.item() > 80  # a mean that forgot nothing would be near 0


def test_in_float16_an_infinite_gradient_is_left_to_the_scaler(monkeypatch):
    accelerator = Accelerator(cpu=True)
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), float("inf"))
    monkeypatch.setattr(accelerator, "scaler", object())
    monkeypatch.setattr(accelerator, "unscale_gradients", lambda: None)
    assert not clip_gradients(accelerator, [weight], 1.0).isfinite() and weight.grad is not None
    assert describe_unless_finite(accelerator, torch.tensor(1.0), torch.tensor(float("inf")), ["a.jpg"]) is None
    assert describe_unless_finite(accelerator, torch.tensor(float("nan")), torch.tensor(1.0), ["a.jpg"]) is not None


@pytest.mark.parametrize(("loss", "grad_norm"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_a_step_that_is_not_finite_names_its_images(loss, grad_norm):
    accelerator = Accelerator(cpu=True)
    assert describe_unless_finite(accelerator, torch.tensor(1.0), torch.tensor(2.0), ["a.jpg"]) is None
    said = describe_unless_finite(accelerator, torch.tensor(loss), torch.tensor(grad_norm), ["a.jpg", "b.jpg"])
    assert said.endswith("on the images a.jpg, b.jpg")


@pytest.mark.parametrize("gradient", [3.0, float("nan"), float("inf")])
def test_gradients_are_clipped_or_removed(gradient):
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.full((1,), gradient)
    norm = clip_gradients(Accelerator(cpu=True), [weight], 1.0)
    assert norm.item() == pytest.approx(gradient, nan_ok=True)
    assert weight.grad.item() == pytest.approx(1) if gradient == 3 else weight.grad is None


def test_layer_decay_counts_from_the_last_layer_of_the_encoder():
    scales = {
        "vision_encoder.layers.11.mlp.fc1.weight": 0.8,
        "vision_encoder.layers.0.mlp.fc1.weight": 0.8**12,
        "vision_encoder.embeddings.projection.weight": 0.8**13,
        "vision_encoder.layernorm.weight": 1,
        "vision_encoder.cls_token": 0.8**13,
        "model.pixel_level_module.encoder.vision_encoder.layers.10.mlp.fc1.weight": 0.8**2,
        "model.pixel_level_module.encoder.vision_encoder.embeddings.position_embeddings": 0.8**13,
    }
    others = (
        "vision_encoder.neck.conv1.weight",
        "mask_decoder.layers.0.mlp.fc1.weight",
        "classifier.weight",
        "model.pixel_level_module.encoder.pyramid.levels.4.neck.conv.weight",
        "model.transformer_module.decoder.layers.0.fc1.weight",
    )
    for encoder_scale in (1, 0.5):
        found = {name: encoder_lr_scale(name, 12, 0.8, encoder_scale) for name in scales}
        assert found == pytest.approx({name: encoder_scale * scale for name, scale in scales.items()})
        assert {encoder_lr_scale(name, 12, 0.8, encoder_scale) for name in others} == {1}


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_average_leaves_weights_that_stay_as_they_are_to_the_last_bit(decay):
    model = nn.Linear(8, 50)
    nn.init.normal_(model.weight, std=1e20)
    with torch.no_grad():
        model.weight[:3] = torch.tensor([-0.0, 0.0, 1e-42])[:, None]
    before, average = model.weight.detach().clone(), weight_average(model, decay)
    for _ in range(12):
        average.update_parameters(model)
    assert torch.equal(average.module.weight.view(torch.int32), before.view(torch.int32))


def test_without_a_decay_there_is_no_average():
    assert weight_average(nn.Linear(1, 1), 0) is None
