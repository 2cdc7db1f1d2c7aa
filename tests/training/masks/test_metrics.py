import math

import pytest
import torch

from hf_efficientsam.model.mask_operations_efficientsam import boxes_from_masks
from hf_efficientsam.training.data.coco import CocoMasks, decode_rles
from hf_efficientsam.training.masks.metrics import MeanIoU, calibration_error, filled_box, inscribed_ellipse, mask_iou


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
