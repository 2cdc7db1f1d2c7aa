from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch

from hf_efficientsam.model.mask_operations_efficientsam import boxes_from_masks
from hf_efficientsam.training.masks.feature_views import encode_frozen
from hf_efficientsam.training.masks.interactive import InteractiveSegmentation, PromptConfig
from hf_efficientsam.training.masks.losses import MaskLoss

SIZE = 64
EVERYTHING = {"background_points": True, "mask_prompts": True}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.rand(*shape, 24, generator=generator(seed))  # of which `make_task` takes what it needs


def rectangles(*boxes):
    masks = torch.zeros(len(boxes), SIZE, SIZE, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return masks


def batch():
    """Two images; of the second's two masks one is padding. And their random numbers."""
    masks = torch.stack([rectangles((4, 8, 40, 30), (30, 30, 50, 60)), rectangles((10, 10, 20, 50), (0, 0, 0, 0))])
    pixel_values = torch.randn(2, 3, SIZE, SIZE, generator=generator(7))
    return pixel_values, masks, torch.tensor([[True, True], [True, False]]), noise(2, 2)


@pytest.fixture
def make_task():
    def make(prompt_encoder=None, **options):
        model = tiny.one_layer_model(**(EVERYTHING if prompt_encoder is None else prompt_encoder))
        task = InteractiveSegmentation(model, MaskLoss(), PromptConfig(**options))
        size = task.options.noise_size
        task.register_forward_pre_hook(lambda _, inputs: (*inputs[:3], inputs[3][..., :size], *inputs[4:]))
        return task

    return make


# ------------------------------------------------------------------------------------------- first prompt


@pytest.fixture
def first_prompt(make_task):
    """(masks, prompt) of many objects, for a choice of probabilities."""

    def sample(**options):
        masks = rectangles((4, 8, 40, 30), (30, 30, 50, 60)).repeat(300, 1, 1).view(3, 200, SIZE, SIZE)
        task = make_task(**options)
        kind, box, clicks, *_ = noise(3, 200)[..., : task.options.noise_size].split(task.options.noise_columns, -1)
        return masks, task.first_prompt(masks, kind, box, clicks)

    return sample


def test_first_prompt_shapes(first_prompt):
    _, prompt = first_prompt(max_clicks=4)
    shapes = {name: tuple(value.shape) for name, value in prompt.items()}
    assert shapes == {"input_points": (3, 200, 4, 2), "input_labels": (3, 200, 4), "input_boxes": (3, 200, 4)}


def test_boxes_alone_are_tight_half_of_the_time(first_prompt):
    masks, prompt = first_prompt(box_probability=1.0, both_probability=0.0)
    assert (prompt["input_labels"] == -1).all()
    difference = (prompt["input_boxes"] - boxes_from_masks(masks)).abs().amax(-1)
    assert 0.4 < (difference == 0).float().mean() < 0.6
    assert difference.max() <= 20 and difference.max() > 3
    assert prompt["input_boxes"].min() >= 0 and prompt["input_boxes"].max() <= SIZE


def test_clicks_alone_lie_inside_and_half_are_single(first_prompt):
    masks, prompt = first_prompt(box_probability=0.0, both_probability=0.0, max_clicks=3)
    assert (prompt["input_boxes"] == -10).all()  # what the model takes for no box
    labels = prompt["input_labels"]
    assert set(labels.unique().tolist()) == {-1, 1}
    count = (labels == 1).sum(-1)
    assert torch.equal(labels == 1, torch.arange(3) < count[..., None])  # padding comes last
    shares = [(count == n).float().mean().item() for n in (0, 1, 2, 3)]
    assert shares == pytest.approx([0, 0.5, 0.25, 0.25], abs=0.08)
    x, y = prompt["input_points"].long().unbind(-1)
    assert masks.flatten(2).gather(2, y * SIZE + x).all()


def test_both_together_and_in_the_given_shares(first_prompt):
    _, prompt = first_prompt(box_probability=0.3, both_probability=0.2)
    has_box = (prompt["input_boxes"] != -10).any(-1)
    has_click = (prompt["input_labels"] == 1).any(-1)
    shares = [
        (a & b).float().mean().item() for a, b in ((has_box, ~has_click), (has_box, has_click), (~has_box, has_click))
    ]
    assert shares == pytest.approx([0.3, 0.2, 0.5], abs=0.07)


# -------------------------------------------------------------------------------------------- corrections


def answer(*masks):
    """A model output whose candidates are these [h, w] masks of 0 and 1; the first is the most confident."""
    logits = torch.stack(masks).float() * 60 - 30
    scores = torch.tensor([0.9, *[0.1] * (len(masks) - 1)])
    return SimpleNamespace(pred_masks=logits[None, None].requires_grad_(), iou_scores=scores[None, None])


def corrected(task, target, output):
    masks = target[None, None]
    prompt = {
        "input_points": torch.full((1, 1, 2, 2), 5.0),
        "input_labels": torch.tensor([[[1, -1]]]),
        "input_boxes": torch.full((1, 1, 4), -10.0),
    }
    return prompt, task.corrected(prompt, output, masks, torch.rand(1, 1, generator=generator()))


def coarse(mask):
    return mask[::4, ::4]


def test_a_click_where_the_object_was_missed(make_task):
    target, predicted = rectangles((0, 0, 64, 32), (0, 0, 32, 32))
    # Another, less confident candidate would have been perfect.
    prompt, result = corrected(make_task(), target, answer(coarse(predicted), coarse(target)))
    assert result["input_points"].shape == (1, 1, 3, 2) and result["input_labels"].tolist() == [[[1, -1, 1]]]
    assert torch.equal(result["input_points"][:, :, :2], prompt["input_points"])
    assert torch.equal(result["input_boxes"], prompt["input_boxes"])
    x, y = result["input_points"][0, 0, 2].tolist()
    assert 32 <= x < 64 and 0 <= y < 32


def test_a_click_where_the_mask_is_too_large(make_task):
    target, predicted = rectangles((0, 0, 32, 32), (0, 0, 64, 32))
    _, result = corrected(make_task(), target, answer(coarse(predicted)))
    assert result["input_labels"].tolist() == [[[1, -1, 0]]]
    assert result["input_points"][0, 0, 2, 0] >= 32


def test_without_background_points_such_a_click_is_padding(make_task):
    target, predicted = rectangles((0, 0, 32, 32), (0, 0, 64, 32))
    _, result = corrected(make_task({"mask_prompts": True}), target, answer(coarse(predicted)))
    assert result["input_labels"].tolist() == [[[1, -1, -1]]]
    _, result = corrected(make_task({"mask_prompts": True}), predicted, answer(coarse(target)))
    assert result["input_labels"].tolist() == [[[1, -1, 1]]]


def test_the_mask_goes_along_and_carries_no_gradient(make_task):
    target, predicted = rectangles((0, 0, 64, 32), (0, 0, 32, 32))
    output = answer(coarse(predicted), coarse(target))
    _, result = corrected(make_task(), target, output)
    assert torch.equal(result["input_masks"], output.pred_masks[:, :, 0].clamp(-20, 20))
    assert not any(value.requires_grad for value in result.values())
    _, result = corrected(make_task({"background_points": True}), target, output)
    assert "input_masks" not in result


# ------------------------------------------------------------------------------------------------ forward


def gradients(task, synthetic=False):
    """Names of the parameters of the model that one step reaches."""
    task(*batch(), generator(), synthetic=synthetic)["loss"].backward()
    return {name for name, p in task.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_chance_is_what_is_given(make_task):
    task = make_task(correction_probability=1.0)
    *inputs, _ = batch()
    first = task(*batch(), generator(1))["loss"]
    torch.rand(5)
    assert torch.equal(first, task(*batch(), generator(1))["loss"])
    assert len({task(*batch(), generator(seed))["loss"].item() for seed in range(8)}) == 2  # one mask, or candidates
    assert not torch.equal(first, task(*inputs, noise(2, 2, seed=1), generator(1))["loss"])


def test_images_can_be_split_over_batches(make_task):
    task = make_task(correction_probability=1.0, corrections=2, mask_only_rounds=2)
    whole = task(*batch(), generator(), num_prompts=3)
    parts = [task(*(one[i : i + 1] for one in batch()), generator(), num_prompts=3) for i in range(2)]
    for name, value in whole.items():
        assert torch.allclose(value, parts[0][name] + parts[1][name], rtol=1e-5), name


def test_what_all_masks_need_is_what_is_said(make_task):
    task = make_task(corrections=3, max_clicks=2, correction_probability=1.0)
    pixel_values, masks, valid, numbers = batch()
    task(pixel_values, masks, valid, numbers[..., : task.options.noise_size], generator())
    with pytest.raises(RuntimeError):
        task(pixel_values, masks, valid, numbers[..., : task.options.noise_size - 1], generator())


def test_parts_of_the_loss(make_task):
    losses = make_task()(*batch(), generator())
    assert set(losses) == {"loss", "focal", "dice", "bce", "iou"}
    assert losses["loss"].requires_grad and not losses["dice"].requires_grad
    assert all(value.ndim == 0 and value.isfinite() for value in losses.values())


def test_the_first_round_trains_one_mask_or_the_candidates(make_task):
    single = gradients(make_task(single_mask_probability=1.0, correction_probability=0.0))
    several = gradients(make_task(single_mask_probability=0.0, correction_probability=0.0))
    networks = [f"mask_decoder.hypernetworks.{i}.layers.0.weight" for i in range(4)]
    assert [name in single for name in networks] == [True, False, False, False]
    # One candidate a mask is trained: the one with the lowest loss.
    assert networks[0] not in several and any(name in several for name in networks[1:])
    assert "mask_decoder.iou_head.layers.0.weight" in single & several


def test_corrections_train_the_single_mask_and_the_mask_prompt(make_task):
    names = gradients(make_task(single_mask_probability=0.0, correction_probability=1.0))
    assert "mask_decoder.hypernetworks.0.layers.0.weight" in names
    assert {"prompt_encoder.mask_embed.conv1.weight", "prompt_encoder.no_mask_embed.weight"} <= names


@pytest.mark.parametrize(
    ("corrections", "mask_only", "expected"),
    [(0, 0, {(4,)}), (1, 0, {(4, 5)}), (3, 0, {(4, 5, 6, 7)}), (0, 1, {(4, 4)}), (2, 1, {(4, 5, 6, 6)}),
     (2, 2, {(4, 4, 5, 6, 6), (4, 5, 5, 6, 6), (4, 5, 6, 6, 6)})],
)  # fmt: skip
def test_rounds_on_one_encoding(make_task, corrections, mask_only, expected):
    task = make_task(corrections=corrections, mask_only_rounds=mask_only, correction_probability=1.0, max_clicks=4)
    encodings, clicks, found = [], [], set()
    task.model.vision_encoder.register_forward_hook(lambda *_: encodings.append(1))
    task.model.prompt_encoder.register_forward_hook(lambda _, inputs, __: clicks.append(inputs[0].shape[2]))
    for seed in range(12):
        encodings.clear()
        clicks.clear()
        task(*batch(), generator(seed))
        assert len(encodings) == 1
        found.add(tuple(clicks))
    assert found == expected  # where the round without a click comes is drawn by chance


def test_rounds_without_a_click_need_mask_prompts(make_task):
    with pytest.raises(ValueError, match="set mask_only_rounds to 0"):
        make_task({"background_points": True}, mask_only_rounds=1)


def test_a_synthetic_step_asks_for_ellipses_and_leaves_the_encoder_alone(make_task):
    names = gradients(make_task(correction_probability=0.0), synthetic=True)
    assert names and not any(name.startswith("vision_encoder") for name in names)
    task = make_task(correction_probability=0.0)
    pixel_values, masks, valid, numbers = batch()
    loss = task(pixel_values, masks, valid, numbers, generator(), synthetic=True)["loss"]
    assert torch.equal(loss, task(pixel_values, masks.flip(1), valid, numbers, generator(), synthetic=True)["loss"])


def test_hidden_states_stand_for_pixels(make_task):
    task, (pixel_values, masks, valid, numbers) = make_task(correction_probability=0.0), batch()
    hidden_states = encode_frozen(task.model.vision_encoder, pixel_values, 0).detach()
    expected = task(pixel_values, masks, valid, numbers, generator())["loss"]
    found = task(0 * pixel_values, masks, valid, numbers, generator(), hidden_states=hidden_states)["loss"]
    torch.testing.assert_close(found, expected)


def test_a_sampled_round_trains_every_part_and_does_not_depend_on_the_batch(make_task):
    task, (pixel_values, masks, valid, numbers) = make_task(), batch()
    parts = task(pixel_values, masks, valid, numbers, generator(), num_prompts=1, num_cells=6)
    parts["loss"].backward()
    missing = {name for name, parameter in task.model.named_parameters() if parameter.grad is None}
    assert not {name.split(".")[0] for name in missing} & {"vision_encoder", "mask_decoder"}, missing
    alone = [
        task(*(x[one : one + 1] for x in (pixel_values, masks, valid, numbers)), generator(), 1, num_cells=6)["loss"]
        for one in range(2)
    ]
    torch.testing.assert_close(sum(alone), parts["loss"])
    assert set(parts) == {"loss", "focal", "dice", "bce", "iou"}


def test_a_sampled_round_heeds_where_masks_are_to_end(make_task):
    task, inputs = make_task(), batch()
    even = task(*inputs, generator(), num_cells=6)["bce"]
    task.loss = MaskLoss(replace(task.loss.weights, bce_threshold=0.1))
    assert task(*inputs, generator(), num_cells=6)["bce"] != even


def test_padding_does_not_count(make_task):
    task = make_task(correction_probability=0.0)
    pixel_values, masks, valid, numbers = batch()
    loss = task(pixel_values, masks, valid, numbers, generator())["loss"]
    assert torch.allclose(loss, task(pixel_values, masks, valid, numbers, generator(), num_prompts=3)["loss"])
    assert torch.allclose(loss / 2, task(pixel_values, masks, valid, numbers, generator(), num_prompts=6)["loss"])
    masks[1, 1] = 1
    assert torch.allclose(loss, task(pixel_values, masks, valid, numbers, generator())["loss"])


def test_an_object_smaller_than_half_a_cell_fills_the_cell_it_is_in(make_task):
    task, targets = make_task(correction_probability=0.0, loss_stride=4), []
    task.loss.register_forward_pre_hook(lambda _, inputs: targets.append(inputs[2]))
    pixel_values, masks, valid, numbers = batch()
    masks[:] = 0
    masks[0, 0, 4:6, 4:6] = 1  # a quarter of a cell of 4 x 4 pixels
    masks[0, 1, 40, 3] = 1
    masks[1, 0, 8:16, 8:14] = 1  # two cells and two halves
    assert task(pixel_values, masks, valid, numbers, generator())["loss"].isfinite()
    found = [target.nonzero().tolist() for target in targets[0].flatten(0, 1)[:3]]
    assert found == [[[1, 1]], [[10, 0]], [[2, 2], [2, 3], [3, 2], [3, 3]]]


@pytest.mark.parametrize("prompt_encoder", [{}, {"background_points": True}, {"mask_prompts": True}])
def test_models_without_the_additions_are_trained_too(make_task, prompt_encoder):
    task = make_task(prompt_encoder, corrections=2, correction_probability=1.0)
    for seed in range(5):  # both kinds of error occur
        *inputs, _ = batch()
        assert task(*inputs, noise(2, 2, seed=seed), generator(seed))["loss"].isfinite()
    assert "prompt_encoder.foreground_embed.weight" in gradients(make_task(prompt_encoder, box_probability=0.0))


def test_training_lowers_the_loss(make_task):
    task = make_task(correction_probability=1.0, single_mask_probability=0.0)
    optimizer = torch.optim.AdamW(task.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        losses.append(task(*batch(), generator())["loss"])
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]
