import pytest
import tiny
import torch
import torch.nn.functional as F

from hf_efficientsam.model.mask_decoder_fast_efficientsam import lay_out
from hf_efficientsam.training.masks.cell_sampling import (
    Cells,
    cell_losses,
    choose_cells,
    decode_cells,
    split_into_cells,
    total_cell_loss,
)
from hf_efficientsam.training.masks.losses import MaskLossConfig

GRID = (8, 8)


def rectangles():
    """Two images with three objects each, as masks of the decoder's size `[2, 3, 32, 32]`."""
    masks = torch.zeros(2, 3, 32, 32)
    boxes = [(0, 0, 4, 4), (8, 12, 20, 28), (2, 2, 31, 30), (28, 28, 32, 32), (10, 3, 13, 5), (0, 16, 32, 24)]
    for mask, (left, top, right, bottom) in zip(masks.flatten(0, 1), boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return masks


def noise(seed=0, draws=2):
    return torch.rand(draws, 3, 64, generator=torch.Generator().manual_seed(seed))


def occupied(masks):
    return F.max_pool2d(masks, 4) > 0


@pytest.fixture
def prompted():
    """A model and what `decode_cells` takes for two images with three boxes each."""
    model = tiny.one_layer_model(background_points=True, mask_prompts=True).eval()
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(2, 32, *GRID, generator=generator)
    boxes = 128 * torch.rand(2, 3, 2, 2, generator=generator).sort(dim=2).values.flatten(2)
    *prompts, dense_prompts = model.encode_prompts(embeddings, input_boxes=boxes)
    return model, [model.mask_decoder.embed_image(embeddings, dense_prompts), *prompts]


def test_all_cells_give_the_models_own_forward_and_gradients(prompted):
    model, inputs = prompted
    everything = Cells(torch.randperm(64).expand(2, 3, -1), torch.ones(2, 3, 64))
    results = []
    for sampled in (False, True):
        model.zero_grad()
        inputs = [x.detach() for x in inputs]
        inputs[0].requires_grad_()
        if sampled:
            logits, scores = decode_cells(model.mask_decoder, *inputs, everything)
            back = everything.index[0, 0].argsort()
            logits = logits[:, :, :, back]
        else:
            embeddings = inputs[0].squeeze(1).transpose(1, 2).unflatten(2, GRID)
            masks, scores = model.mask_decoder(embeddings, *inputs[1:], multimask_output=None)
            logits = split_into_cells(masks, GRID)
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
        ((logits * weights).sum() + scores.sum()).backward()
        gradients = {name: p.grad for name, p in model.mask_decoder.named_parameters() if p.grad is not None}
        results.append((logits, scores, inputs[0].grad, gradients))
    full, sampled = results
    for one, other in zip(full[:3], sampled[:3], strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
    assert full[3].keys() == sampled[3].keys()
    for name, gradient in full[3].items():
        torch.testing.assert_close(sampled[3][name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_cells_of_masks_are_in_the_order_of_the_upscaling():
    masks = torch.randn(3, 2, 32, 32)
    assert torch.equal(lay_out(split_into_cells(masks, GRID).flatten(2), GRID, doublings=2), masks)


def test_chosen_cells_are_distinct_and_small_objects_are_covered():
    masks = rectangles()
    cells = choose_cells(occupied(masks), 24, noise())
    assert cells.index.shape == (2, 3, 24)
    for index, touched in zip(cells.index.flatten(0, 1), occupied(masks).flatten(0, 1), strict=True):
        assert len(index.unique()) == 24
        if touched.sum() <= 2:
            assert torch.isin(touched.flatten().nonzero()[:, 0], index).all()
        assert touched.flatten()[index].any()
    torch.testing.assert_close(cells.weight.sum(-1), torch.full((2, 3), 64.0))


def test_every_cell_is_chosen_as_often_as_its_weight_says():
    masks, times, draws = rectangles()[:1].expand(400, -1, -1, -1), torch.zeros(3, 64), 400
    cells = choose_cells(occupied(masks), 24, noise(draws=draws))
    for prompt in range(3):
        times[prompt].scatter_add_(0, cells.index[:, prompt].flatten(), cells.weight[:, prompt].flatten())
    assert ((times / draws - 1).abs() < 4.5 * (cells.weight.max() / draws) ** 0.5).all()


def test_more_cells_than_there_are_means_all_with_weight_one():
    cells = choose_cells(occupied(rectangles()), 1000, noise())
    assert torch.equal(cells.index.sort(-1).values, torch.arange(64).expand(2, 3, -1))
    assert (cells.weight == 1).all()


def test_an_object_without_cells_is_no_error():
    cells = choose_cells(torch.zeros(1, 1, *GRID, dtype=torch.bool), 24, noise()[:1, :1])
    torch.testing.assert_close(cells.weight.sum(), torch.tensor(64.0))


def test_the_mean_over_many_draws_is_the_full_loss():
    draws, masks = 2000, rectangles()[:1]
    logits = 3 * (masks - 0.5).unsqueeze(2) + torch.randn(1, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    logits, targets = split_into_cells(logits, GRID), split_into_cells(masks, GRID)
    full = cell_losses(logits, targets, torch.ones(1, 3, 64), masks.sum((-2, -1)))
    cells = choose_cells(occupied(masks).expand(draws, -1, -1, -1), 32, noise(draws=draws))
    index = cells.index.unsqueeze(-1)
    sampled = cell_losses(
        logits.expand(draws, -1, -1, -1, -1).take_along_dim(index.unsqueeze(2), dim=3),
        targets.expand(draws, -1, -1, -1).take_along_dim(index, dim=2),
        cells.weight,
        masks.sum((-2, -1)).expand(draws, -1),
    )
    # The cross-entropy is a sum and without bias; dice and IoU are ratios, of bias about variance / value.
    for name, bias in {"bce": 0, "dice": 1, "iou": 1}.items():
        error = sampled[name].mean(0) - full[name][0]
        tolerance = 4.5 * (sampled[name].std(0) / draws**0.5) + 3 * bias * sampled[name].var(0) + 1e-5
        assert (error.abs() < tolerance).all(), name


def test_a_cells_mask_ends_where_the_chance_of_a_pixel_is_the_threshold():
    """Two pixels of five are the object's and all have one logit: at the chance of 0.4 its gradient is nothing."""
    targets = torch.tensor([1.0, 1, 0, 0, 0]).view(1, 1, 1, 5)
    for threshold in (0.4, 0.5):
        logit = torch.zeros((), requires_grad=True)
        given = logit.expand(1, 1, 1, 1, 5), targets, torch.ones(1, 1, 1), torch.full((1, 1), 2.0)
        cell_losses(*given, bce_threshold=threshold)["bce"].backward()
        assert logit.grad.item() == pytest.approx(5 * (threshold - 0.4) / 4, abs=1e-6)


def test_the_mean_loss_of_the_sampled_decoder_is_near_the_full_one(prompted):
    model, inputs = prompted
    masks, draws = rectangles(), 60
    targets, areas = split_into_cells(masks, GRID), masks.sum((-2, -1))

    @torch.no_grad()
    def losses(cells):
        logits, _ = decode_cells(model.mask_decoder, *inputs, cells)
        part = cell_losses(logits, cells.gather(targets), cells.weight, areas)
        return part["bce"] + part["dice"]

    full = losses(choose_cells(occupied(masks), 64, noise()))
    sampled = torch.stack([losses(choose_cells(occupied(masks), 40, noise(seed))) for seed in range(draws)])
    error = (sampled.mean() - full.mean()).abs()
    assert error < 4.5 * sampled.mean((1, 2, 3)).std() / draws**0.5 + 0.01 * full.mean()


def test_the_loss_of_cells_heeds_its_weights():
    parts = {"bce": torch.full((1, 1, 4), 2.0), "dice": torch.full((1, 1, 4), 0.5), "iou": torch.full((1, 1, 4), 0.75)}
    given = parts, torch.full((1, 1, 4), 0.25), torch.tensor([[True]]), torch.tensor([[True]])
    plain = total_cell_loss(*given)["loss"]
    assert plain.item() == pytest.approx(1.5 * (2 / 4 * 2.0 + 0.5) + 0.25)  # candidates and half of the single mask
    weights = MaskLossConfig(dice_weight=2.0, iou_weight=8.0, balanced_bce_weight=0.0)
    assert total_cell_loss(*given, weights=weights)["loss"].item() == pytest.approx(1.5 * 2 * 0.5 + 8 * 0.25)
