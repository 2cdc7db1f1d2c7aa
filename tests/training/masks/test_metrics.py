import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion

from hf_efficientsam.model.mask_operations_efficientsam import boxes_from_masks
from hf_efficientsam.training.data.coco import CocoMasks, decode_rles
from hf_efficientsam.training.masks.metrics import (
    MeanIoU,
    boundary_iou,
    calibration_error,
    filled_box,
    inscribed_ellipse,
    mask_iou,
    mean_by_size,
)


def test_iou_perfect_degenerate_and_by_hand():
    target = torch.zeros(5, 4, 4, dtype=torch.uint8)
    target[:4, :2, :2] = 1
    predicted = torch.zeros(5, 4, 4, dtype=torch.bool)
    predicted[0, :2, :2] = True  # the same
    predicted[1, 2:, 2:] = True  # elsewhere
    predicted[2, :2, 1:3] = True  # 2 shared, 2 more on either side
    # 3: nothing predicted, 4: nothing there and nothing predicted
    assert mask_iou(predicted, target).tolist() == pytest.approx([1, 0, 2 / 6, 0, 1])
    assert mask_iou(predicted[:4].view(2, 2, 4, 4), target[:4].view(2, 2, 4, 4)).shape == (2, 2)


def square(side, *, size=100, left=20, top=20):
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_boundary_iou_perfect_degenerate_and_by_hand():
    mask, nothing = square(50), square(0)
    assert boundary_iou(mask, mask.byte()) == 1 and boundary_iou(nothing, nothing) == 1
    assert boundary_iou(nothing, mask) == 0 and boundary_iou(mask, square(10, left=80, top=80)) == 0
    # 2 % of the diagonal of 141 are 3 pixels. The ring of a square of 50 has 50^2 - 44^2 = 564 pixels, that of the
    # square of 48 in its corner 48^2 - 42^2 = 540. Of these the outer one has the two sides that they share, 48 and 45
    # long, and of the other two what lies in its own, a pixel wide: 45 and 44.
    inner = square(48)
    shared = 3 * 48 + 3 * 45 + 45 + 44
    assert boundary_iou(inner, mask).item() == pytest.approx(shared / (564 + 540 - shared))
    assert boundary_iou(inner, mask) < mask_iou(inner, mask)
    # A filled hole inside is seen as well as the outline: 20 x 20 with a ring of 3 around it.
    hole = mask & ~square(20, left=35, top=35)
    assert boundary_iou(hole, mask).item() == pytest.approx(564 / (564 + 26**2 - 20**2))


def test_boundary_iou_at_the_edge_of_an_image_and_of_thin_masks():
    everything = torch.ones(100, 100, dtype=torch.bool)  # the image's edge is a boundary
    assert boundary_iou(square(94, left=3, top=3), everything) == 0
    thin = square(6)  # all of it is boundary
    assert boundary_iou(square(5), thin) == mask_iou(square(5), thin)
    tiny = torch.ones(2, 3, 4, 3, dtype=torch.bool)  # an image narrower than two distances
    assert boundary_iou(tiny, tiny, 0.5).tolist() == [[1] * 3] * 2
    line = torch.zeros(1, 30, dtype=torch.bool)
    line[0, 10:20] = True
    assert boundary_iou(line, line) == 1


def test_boundary_iou_equals_that_of_erosion(shared):
    """Pixel by pixel, as the authors' code: erosion by 3 x 3, as often as the distance is pixels."""

    def ring(mask, distance):
        return mask & ~binary_erosion(mask, np.ones((3, 3)), iterations=distance)

    dataset = CocoMasks(shared / "data/coco-val-dev/instances_val.json")
    for rles in dataset.rles[:5]:
        masks = decode_rles(rles).astype(bool)
        moved = np.roll(masks, 4, axis=2)
        distance = round(0.02 * math.hypot(*masks.shape[1:]))
        rings = [np.stack([ring(mask, distance) for mask in group]) for group in (masks, moved)]
        expected = (rings[0] & rings[1]).sum((1, 2)) / (rings[0] | rings[1]).sum((1, 2))
        ours = boundary_iou(torch.from_numpy(moved), torch.from_numpy(masks))
        assert ours.numpy() == pytest.approx(expected)


def test_filled_box():
    boxes = torch.tensor([[1.0, 0.0, 4.0, 2.0], [2.0, 2.0, 2.0, 2.0], [0.4, 0.6, 1.6, 1.4]])
    masks = filled_box(boxes, 3, 5)
    expected = torch.zeros(3, 3, 5, dtype=torch.bool)
    expected[0, 0:2, 1:4] = True
    expected[2, :, :0] = True
    expected[2, 0, 0] = False  # its centre (0.5, 0.5) lies above the box
    assert torch.equal(masks, expected)
    assert torch.equal(boxes_from_masks(masks[:1]), boxes[:1])


def test_inscribed_ellipse():
    (ellipse,) = inscribed_ellipse(torch.tensor([[0.0, 0.0, 4.0, 4.0]]), 5, 5)
    assert ellipse.int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [0, 1, 1, 0, 0], [0] * 5]
    box = torch.tensor([100.0, 50.0, 900.0, 650.0])
    assert inscribed_ellipse(box, 700, 1000).sum() == pytest.approx(math.pi * 400 * 300, rel=1e-3)
    assert not inscribed_ellipse(torch.tensor([3.0, 3.0, 3.0, 3.0]), 6, 6).any()
    assert inscribed_ellipse(torch.tensor([3.0, 3.0, 4.0, 4.0]), 6, 6).sum() == 1
    assert inscribed_ellipse(torch.zeros(2, 3, 4), 6, 7).shape == (2, 3, 6, 7)


def test_mean_iou_by_size():
    mean = MeanIoU()
    mean.update(torch.tensor([0.2, 0.4]), torch.tensor([1023, 1024]))
    mean.update(torch.tensor([0.6]), torch.tensor([9215]))
    mean.update(torch.tensor([0.8]), torch.tensor([9216]))
    result = mean.compute()
    assert result["all"] == {"miou": pytest.approx(0.5), "count": 4}
    assert result["small"] == {"miou": pytest.approx(0.2), "count": 1}
    assert result["medium"] == {"miou": pytest.approx(0.5), "count": 2}
    assert result["large"] == {"miou": pytest.approx(0.8), "count": 1}


def test_means_by_size():
    means = mean_by_size(torch.tensor([2.0, 20.0, 5.0]), torch.tensor([100, 10, 20_000]))
    assert means["all"] == {"mean": 9.0, "count": 3} and means["small"] == {"mean": 11.0, "count": 2}
    assert means["large"] == {"mean": 5.0, "count": 1} and "medium" not in means


def test_mean_iou_of_few_and_none():
    assert MeanIoU().compute() == {}
    mean = MeanIoU()
    mean.update(torch.tensor([1.0]), torch.tensor([5]))
    assert set(mean.compute()) == {"all", "small"}
    with pytest.raises(ValueError, match="one area"):
        mean.update(torch.tensor([1.0, 0.5]), torch.tensor([5]))


def test_trivial_answers_on_real_masks(shared):
    """Tight boxes at image size, crowds left out: what a model must beat."""
    box, ellipse = MeanIoU(), MeanIoU()
    dataset = CocoMasks(shared / "data/coco-val-dev/instances_val.json")
    for rles in dataset.rles:
        masks = torch.from_numpy(decode_rles(rles))
        boxes, areas, size = boxes_from_masks(masks), masks.sum((1, 2)), masks.shape[-2:]
        box.update(mask_iou(filled_box(boxes, *size), masks), areas)
        ellipse.update(mask_iou(inscribed_ellipse(boxes, *size), masks), areas)
    assert box.compute()["all"] == {"miou": pytest.approx(0.604, abs=1e-3), "count": 899}
    assert ellipse.compute()["all"] == {"miou": pytest.approx(0.637, abs=1e-3), "count": 899}


def test_calibration_error_perfect_degenerate_and_by_hand():
    true = torch.tensor([0.0, 0.5, 1.0])
    assert calibration_error(true, true) == 0
    assert calibration_error(1 - true, true) == pytest.approx(2 / 3)  # certain, and wrong
    assert calibration_error(torch.full((3,), 0.5), true) == pytest.approx(1 / 3)  # the mean alone
    assert calibration_error(torch.tensor([0.9, 0.2]), torch.tensor([0.6, 0.3])) == pytest.approx(0.2)
    assert calibration_error(torch.tensor([1.25]), torch.tensor([1.0])) == 0.25  # scores have no bounds
    for predicted in (torch.empty(0), torch.zeros(2)):
        with pytest.raises(ValueError, match="one true IoU for each predicted one, and at least one"):
            calibration_error(predicted, torch.empty(0))
