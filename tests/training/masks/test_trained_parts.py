import pytest
import tiny
import tiny_peers
import torch
from peft import PeftModel

from hf_efficientsam.training.engine.optimization import count_layers, encoder_lr_scale, layer_depth
from hf_efficientsam.training.masks.lora import merged, save_lora
from hf_efficientsam.training.masks.trained_parts import TrainedPartsConfig, choose_trained

MODELS = {**tiny_peers.PEERS, "ours": tiny.model}
LAYERS = {"sam": 2, "sam_hq": 2, "sam2": 5, "sam3_tracker": 2, "ours": 2, "edgetam": 0}
BACKBONE = {"sam2": "backbone.", "sam3_tracker": "backbone."}  # between the encoder and its layers
WITH_LAYERS = [name for name, layers in LAYERS.items() if layers]


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def in_encoder(name: str) -> bool:
    return name.startswith(("vision_encoder.", "no_memory")) and ".neck." not in name


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_counted_and_all_of_the_encoder_has_a_depth(name):
    model = MODELS[name]()
    layers = count_layers(model)
    depths = {one: layer_depth(one, layers) for one, _ in model.named_parameters()}
    assert layers == LAYERS[name]
    assert {one for one, depth in depths.items() if depth} <= {one for one in depths if in_encoder(one)}
    if layers:
        assert set(depths.values()) == set(range(layers + 2))
        names = {one for one, depth in depths.items() if depth == layers + 1}
        assert names and all("embed" in one or "cls_token" in one for one in names)


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_rates_fall_from_layer_to_layer(name):
    model = MODELS[name]()
    blocks = "blocks" if name == "sam2" else "layers"
    rates = {
        one: encoder_lr_scale(one, LAYERS[name], layer_decay=0.5, encoder_scale=0.1)
        for one, _ in model.named_parameters()
    }
    last = f"vision_encoder.{BACKBONE.get(name, '')}{blocks}.{LAYERS[name] - 1}."
    assert {rate for one, rate in rates.items() if one.startswith(last)} == {0.05}
    assert min(rates.values()) == pytest.approx(0.1 * 0.5 ** (LAYERS[name] + 1))
    assert {rate for one, rate in rates.items() if not in_encoder(one)} == {1.0}


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_only_the_last_layers_are_trained(name):
    model = MODELS[name]()
    choose_trained(model, TrainedPartsConfig(train_last_layers=1))
    left = {layer_depth(one, LAYERS[name]) for one in trained(model)}
    assert left == {0, 1}
    with pytest.raises(ValueError, match=f"--train_last_layers 9: the encoder has {LAYERS[name]} layers"):
        choose_trained(model, TrainedPartsConfig(train_last_layers=9))


@pytest.mark.parametrize("name", MODELS)
def test_parts_are_frozen(name):
    model = MODELS[name]()
    choose_trained(model, TrainedPartsConfig(freeze=["vision_encoder", "prompt_encoder"]))
    assert trained(model)
    assert all(one.startswith("mask_decoder.") for one in trained(model))
    assert not any("positional_embedding" in one for one in trained(model))
    with pytest.raises(ValueError, match="leaves nothing to train"):
        choose_trained(model, TrainedPartsConfig(freeze=["vision_encoder", "prompt_encoder", "mask_decoder"]))


@pytest.mark.parametrize("freeze", [[], ["mask_decoder"]])
@pytest.mark.parametrize("name", WITH_LAYERS)
def test_low_rank_updates_are_saved_as_peft_does_and_make_the_trained_model(name, freeze, tmp_path):
    model = MODELS[name]()
    choose_trained(model, TrainedPartsConfig(lora=2, freeze=freeze))
    names = trained(model)
    assert any("lora_A" in one for one in names) and any(one.startswith("vision_encoder.neck.") for one in names)
    assert all("lora_" in one or not in_encoder(one) for one in names)
    with torch.no_grad():
        for one, parameter in model.named_parameters():
            if one in names:
                parameter += 0.1 * tiny.random(*parameter.shape)
    save_lora(model, "owner/base", tmp_path / "lora")
    loaded = PeftModel.from_pretrained(MODELS[name](), tmp_path / "lora")
    assert loaded.peft_config["default"].base_model_name_or_path == "owner/base"
    ours, theirs = merged(model).state_dict(), loaded.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    changed = {one for one, value in MODELS[name]().state_dict().items() if not torch.equal(value, ours[one])}
    assert changed and all(torch.allclose(ours[one], theirs[one], atol=1e-6) for one in ours)


def test_an_encoder_without_attention_has_no_low_rank_updates_or_layers():
    with pytest.raises(ValueError, match="--lora updates queries and values, which the encoder of EdgeTamModel lacks"):
        choose_trained(tiny_peers.edgetam(), TrainedPartsConfig(lora=2))
    with pytest.raises(ValueError, match="--train_last_layers 0: the encoder has no numbered layers"):
        choose_trained(tiny_peers.edgetam(), TrainedPartsConfig(train_last_layers=0))
