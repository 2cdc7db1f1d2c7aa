import math

import pytest
import torch

from hf_efficientsam.model.mask_operations_efficientsam import boxes_from_masks
from hf_efficientsam.training.data.synthetic import random_ellipses


def ellipses(*shape, size=64, seed=0):
    return random_ellipses(torch.rand(*shape, 4, generator=torch.Generator().manual_seed(seed)), size)


def test_shape_and_values():
    masks = ellipses(2, 3, size=32)
    assert masks.shape == (2, 3, 32, 32) and masks.dtype == torch.uint8
    assert masks.unique().tolist() == [0, 1]


def test_each_depends_on_its_own_numbers_alone():
    assert torch.equal(ellipses(4, seed=1)[:2], ellipses(2, seed=1))
    assert not torch.equal(ellipses(4, seed=1), ellipses(4, seed=2))


@pytest.mark.parametrize("size", [2, 16])
def test_never_empty(size):
    assert ellipses(300, size=size).flatten(1).any(1).all()


def test_they_are_ellipses_of_many_sizes_and_proportions():
    masks = ellipses(600, size=128)
    boxes = boxes_from_masks(masks)
    inside = (boxes[:, :2] > 0).all(1) & (boxes[:, 2:] < 128).all(1)  # not cut off by the border
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    large = inside & (width > 20) & (height > 20)
    assert large.sum() > 30
    filled = masks[large].sum((1, 2)) / (width * height)[large]
    assert filled.mean().item() == pytest.approx(math.pi / 4, abs=0.01)
    assert (filled - math.pi / 4).abs().max() < 0.06
    assert width[inside].min() < 10 and height[inside].min() < 10 and (width > 90).any()
    assert (width > 3 * height).any() and (height > 3 * width).any()
    assert not inside.all()  # some reach beyond the image


def test_the_smallest_side_is_as_asked():
    uniform = torch.rand(200, 4, generator=torch.Generator().manual_seed(0))
    uniform[:, :2] = 0.5  # in the middle, so that none is cut off
    boxes = boxes_from_masks(random_ellipses(uniform, 256, smallest=0.25))
    sides = boxes[:, 2:] - boxes[:, :2]
    assert 60 < sides.min() < 75 and sides.max() > 230


def test_x_and_y_are_drawn_alike():
    masks = ellipses(600, size=64).float()
    columns, rows = masks.mean((0, 1)), masks.mean((0, 2))
    assert (columns - rows).abs().max() < 0.06
    assert torch.allclose(columns, columns.flip(0), atol=0.08)
