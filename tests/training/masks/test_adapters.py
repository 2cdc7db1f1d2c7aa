"""A peer behind its adapter answers as its own `forward` does."""

import pytest
import tiny
import tiny_peers
import torch
from safetensors.torch import save_file
from transformers import EdgeTamConfig

from hf_efficientsam.model.modeling_efficientsam import MISSING_BOX, PADDING
from hf_efficientsam.training.masks.adapters import adapt, freeze_batch_norm, is_peer, load_peer

MODELS = {**tiny_peers.PEERS, "ours": tiny.model}
NONE = [MISSING_BOX] * 4
BOXES = torch.tensor([[[2.0, 3, 40, 50], NONE, [8, 9, 60, 30]], [NONE, [1, 1, 9, 20], NONE]])
POINTS = 64 * tiny.random(2, 3, 3, 2)
LABELS = torch.tensor(
    [
        [[PADDING] * 3, [1, PADDING, 0], [PADDING, 1, PADDING]],
        [[1, PADDING, PADDING], [1, 0, 1], [PADDING, PADDING, 1]],
    ]
)
PIXELS = 4 * tiny.random(2, 3, 64, 64) - 2


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def alone(model, image: int, query: int, **more) -> dict:
    """The model's own answer to one prompt of one image."""
    real = LABELS[image, query] != PADDING
    given = {name: values[image, query][None, None] for name, values in more.items() if name == "input_masks"}
    if real.any():
        given["input_points"] = POINTS[image, query][real][None, None]
        given["input_labels"] = LABELS[image, query][real][None, None]
    if (BOXES[image, query] != MISSING_BOX).any():
        given["input_boxes"] = BOXES[image, query][None, None]
    return model(pixel_values=PIXELS[[image]], **given, multimask_output=more["multimask_output"])


@torch.no_grad()
@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize("with_masks", [True, False])
def test_prompts_of_all_kinds_in_one_batch_are_answered_as_each_is_alone(model, with_masks, multimask_output):
    adapter = adapt(model)
    prompt = {"input_boxes": BOXES, "input_points": POINTS, "input_labels": LABELS}
    if with_masks:
        prompt["input_masks"] = 8 * tiny.random(2, 3, 16, 16) - 4
    answer = adapter.decode(adapter.embed(PIXELS), prompt, multimask_output)
    masks = {"input_masks": prompt["input_masks"]} if with_masks else {}
    for image in range(2):
        for query in range(3):
            own = alone(model, image, query, multimask_output=multimask_output, **masks)
            torch.testing.assert_close(answer.pred_masks[image, query], own.pred_masks[0, 0], rtol=0, atol=1e-5)
            torch.testing.assert_close(answer.iou_scores[image, query], own.iou_scores[0, 0], rtol=0, atol=1e-5)


def test_embeddings_have_gradients(model):
    adapter = adapt(model)
    boxes = {"input_boxes": torch.tensor([[[2.0, 3, 40, 50]]])}
    adapter.decode(adapter.embed(PIXELS[:1]), boxes, True).pred_masks.square().sum().backward()
    gradients = {name for name, one in model.named_parameters() if one.grad is not None and one.grad.any()}
    assert any(name.startswith("vision_encoder.") and ".neck." not in name for name in gradients)


def test_what_a_model_takes(model):
    adapter = adapt(model)
    assert (adapter.image_size, adapter.background_points, adapter.mask_prompts) == (64, True, True)
    assert not adapt(tiny.official_model()).mask_prompts and not adapt(tiny.official_model()).background_points


def test_batch_normalisation_keeps_its_statistics():
    model = tiny_peers.edgetam().train()
    freeze_batch_norm(model)
    before = {name: one.clone() for name, one in model.named_buffers()}
    adapt(model).embed(PIXELS)
    assert before and all(torch.equal(before[name], one) for name, one in model.named_buffers())
    assert model.mask_decoder.training


def test_peers_are_told_from_ours_and_loaded(tmp_path, tiny_model):
    assert not any(map(is_peer, (None, "bundled", str(tiny_model), str(tmp_path / "absent"))))
    for name, make in tiny_peers.PEERS.items():
        folder = str(tiny_peers.save(tmp_path / name, name))
        assert is_peer(folder)
        loaded = load_peer(folder)
        assert type(loaded) is type(make()) and not loaded.training


def test_edgetam_without_timm_is_refused_with_what_to_install(tmp_path):
    EdgeTamConfig().save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="cannot be loaded: it needs timm, which is not installed; install it"):
        load_peer(str(tmp_path))
