"""Masks, boxes, run-length encodings, crops and suppression."""

import numpy as np
import pytest
import tiny
import torch
from pycocotools import mask as coco_mask

from hf_efficientsam.model import mask_operations_efficientsam
from hf_efficientsam.model.mask_operations_efficientsam import (
    batched_mask_to_box,
    boxes_from_masks,
    is_box_near_crop_edge,
    mask_to_rle_pytorch,
    measure_resized_masks,
    non_maximum_suppression,
    resize_masks,
    resize_masks_in_parts,
    suppress_duplicates,
    uncrop_boxes_xyxy,
    uncrop_masks,
)
from hf_efficientsam.model.run_lengths_efficientsam import mask_to_rle, rle_from_borders, rle_to_mask, run_borders


def test_rle_by_hand_and_back():
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]], dtype=torch.bool)
    assert mask_to_rle_pytorch(mask[None]) == [{"size": [2, 3], "counts": [1, 4, 1]}]  # down the columns: 0 1 1 1 1 0
    masks = torch.stack([torch.zeros(3, 4), torch.ones(3, 4), torch.eye(3, 4)]).bool()
    rles = mask_to_rle_pytorch(masks)
    assert [rle["counts"] for rle in rles[:2]] == [[12], [0, 12]]
    assert all(np.array_equal(rle_to_mask(rle), mask) for rle, mask in zip(rles, masks.numpy(), strict=True))


@pytest.mark.parametrize("density", [0, 0.02, 0.5, 0.98, 1])
def test_rle_in_bands_is_that_of_the_whole_and_of_pycocotools(density):
    mask = np.random.default_rng(0).random((13, 40)) < density
    mask[:, 5:9] = mask[:4, 9:20] = mask[9:, 20:30] = True  # runs that go on in the next column, and that end there
    expected = mask_to_rle(mask)
    compressed = coco_mask.frPyObjects(expected, *mask.shape)["counts"]
    assert compressed == coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"]
    for columns in (1, 5, 7, 39):
        parts = [run_borders(mask[:, left : left + columns], 13, left) for left in range(0, 40, columns)]
        assert rle_from_borders(parts, (13, 40)) == expected
    whole = np.zeros((20, 50), dtype=bool)
    whole[3:16, 6:46] = mask
    parts = [run_borders(mask[:, left : left + 8], 20, 6 + left, 3) for left in range(0, 40, 8)]
    assert rle_from_borders(parts, whole.shape) == mask_to_rle(whole)


@pytest.mark.parametrize("size", [(300, 200), (17, 900), (900, 17), (64, 64), (3, 5), (1, 40)])
@pytest.mark.parametrize("input_size", [None, (64, 80), (64, 51), (33, 80), (37, 53)])
@pytest.mark.parametrize("pixels_at_once", [7, 900, 40_000])
def test_masks_resized_in_parts_are_those_of_the_whole_to_the_bit(size, input_size, pixels_at_once, monkeypatch):
    logits = 10 * tiny.random(5, 16, 20) - 5
    expected = resize_masks(logits[:, None], size, input_size)[:, 0]
    monkeypatch.setattr(mask_operations_efficientsam, "PIXELS_AT_ONCE", pixels_at_once)
    found, parts = torch.full_like(expected, torch.nan), 0
    for masks, columns, resized in resize_masks_in_parts(logits, size, input_size):
        assert resized.numel() <= max(pixels_at_once, size[0])
        found[masks, :, columns] = resized
        parts += 1
    assert torch.equal(found, expected)
    assert parts > 1 or expected.numel() <= pixels_at_once
    counts, boxes = measure_resized_masks(logits, size, input_size, [1.0, 0.0])
    assert counts.tolist() == [(expected > threshold).flatten(1).sum(dim=1).tolist() for threshold in (1, 0)]
    assert torch.equal(boxes, batched_mask_to_box(expected > 0))


def test_boxes_are_tight():
    masks = torch.zeros(2, 2, 6, 8, dtype=torch.uint8)
    masks[0, 0, 1:4, 2:7] = 1
    masks[0, 1, 5, 7] = 1
    masks[1, 0, 0, 3] = masks[1, 0, 4, 1] = 1  # two pixels far apart
    expected = [[[2, 1, 7, 4], [7, 5, 8, 6]], [[1, 0, 4, 5], [0, 0, 0, 0]]]
    for kind in (masks, masks.bool(), masks.float()):
        assert boxes_from_masks(kind).tolist() == expected
        assert boxes_from_masks(kind).dtype == torch.float32
        assert batched_mask_to_box(kind).tolist() == [[[2, 1, 6, 3], [7, 5, 7, 5]], [[1, 0, 3, 4], [0, 0, 0, 0]]]
        assert batched_mask_to_box(kind).dtype == torch.int64


def test_boxes_near_the_border_of_a_crop_but_not_of_the_image():
    crop_box, orig_box = [100, 0, 200, 80], [0, 0, 300, 80]
    boxes = torch.tensor([[30, 0, 60, 80], [20, 30, 60, 50], [21, 30, 79, 50], [21, 30, 80, 50]])  # in the crop
    assert is_box_near_crop_edge(boxes, crop_box, orig_box).tolist() == [False, True, False, True]
    assert is_box_near_crop_edge(boxes, crop_box, orig_box, atol=100).all()
    assert not is_box_near_crop_edge(boxes, orig_box, orig_box).any()


def test_uncropped_masks_and_boxes_agree():
    masks = torch.zeros(1, 5, 6, dtype=torch.bool)
    masks[0, 1:3, 2:6] = True
    crop_box = [10, 20, 16, 25]
    whole = uncrop_masks(masks, crop_box, 40, 30)
    assert whole.shape == (1, 40, 30) and torch.equal(whole[:, 20:25, 10:16], masks) and whole.sum() == masks.sum()
    assert torch.equal(uncrop_boxes_xyxy(batched_mask_to_box(masks), crop_box), batched_mask_to_box(whole))


def one_by_one(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        for k in kept:
            width, height = (min(boxes[i][a + 2], boxes[k][a + 2]) - max(boxes[i][a], boxes[k][a]) for a in (0, 1))
            common = max(width, 0) * max(height, 0)
            areas = [(boxes[n][2] - boxes[n][0]) * (boxes[n][3] - boxes[n][1]) for n in (i, k)]
            if common > threshold * (sum(areas) - common):
                break
        else:
            kept.append(i)
    return [int(i) for i in kept]


@pytest.mark.parametrize("at_once", [1, 7, 1000])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_suppression_equals_one_by_one(at_once, threshold):
    generator = np.random.default_rng(0)
    corners = generator.integers(0, 40, (300, 2))
    boxes = np.concatenate([corners, corners + generator.integers(0, 30, (300, 2))], axis=1)
    scores = generator.integers(0, 50, 300) / 50  # with ties
    keep = non_maximum_suppression(torch.tensor(boxes), torch.tensor(scores), threshold, at_once)
    assert keep.tolist() == one_by_one(boxes, scores, threshold)


def test_smaller_crops_win():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [30, 30, 40, 40], [0, 0, 10, 10]])
    scores = torch.tensor([0.9, 0.8, 0.5, 0.1])
    whole, corner = [0, 0, 50, 50], [0, 0, 20, 20]
    crops = torch.tensor([whole, whole, whole, corner])
    assert suppress_duplicates(boxes, scores, crops, 0.5, 0.5).tolist() == [3, 2]
    assert suppress_duplicates(boxes, scores, crops, 0.5, 1.0).tolist() == [3, 0, 2]
    assert suppress_duplicates(boxes, scores, crops, 1.0, 1.0).tolist() == [3, 0, 1, 2]
    assert suppress_duplicates(boxes[:0], scores[:0], crops[:0], 0.5, 0.5).tolist() == []
