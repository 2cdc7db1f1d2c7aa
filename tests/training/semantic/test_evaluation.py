import pytest
import torch
import torch.nn.functional as F
from transformers import Mask2FormerImageProcessorPil

from hf_efficientsam.training.data.semantic import (
    NO_CLASS,
)
from hf_efficientsam.training.semantic.evaluation import (
    class_scores,
    confusion_matrix,
    confusion_scores,
    sliding_scores,
)


class Output(dict):
    """As transformers' outputs are: fields by name and by attribute."""

    __getattr__ = dict.__getitem__


def test_scores_of_masks_are_those_of_transformers_processor(mask_former):
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        scores = class_scores(mask_former, pixel_values, (384, 384))
        processor = Mask2FormerImageProcessorPil()  # which always looks at masks of 384 x 384 pixels
        theirs = processor.post_process_semantic_segmentation(mask_former(pixel_values), [(384, 384)])[0]
    assert scores.shape == (1, 3, 384, 384) and torch.equal(scores[0].argmax(0), theirs)


def test_windows_overlap_and_are_averaged():
    def model(pixel_values):
        """Two classes; the second one's logit is the number of a pixel's column in what is looked at."""
        columns = torch.arange(pixel_values.shape[-1]).expand(*pixel_values.shape[-2:]).float()
        return Output(logits=torch.stack([torch.zeros_like(columns), columns])[None])

    scores = sliding_scores(model, torch.zeros(1, 3, 6, 9), (6, 9), 6)
    # Windows start at columns 0 and 3 (the last one ends where the image does), which overlap by three.
    single = torch.arange(6.0).sigmoid()
    expected = torch.cat([single[:3], (single[3:] + single[:3]) / 2, single[3:]])
    assert scores.shape == (1, 2, 6, 9) and torch.allclose(scores[0, 1], expected.expand(6, 9), atol=1e-6)
    assert torch.allclose(scores.sum(1), torch.ones(1, 6, 9))
    small = torch.zeros(1, 3, 4, 5)  # than a window
    expected = F.interpolate(class_scores(model, small, (4, 5)), (8, 10), mode="bilinear")
    assert torch.allclose(sliding_scores(model, small, (8, 10), 6), expected)


def test_mean_iou_by_hand():
    true = torch.tensor([[0, 0, 0, 1], [1, 2, 2, NO_CLASS]])
    predicted = torch.tensor([[0, 0, 1, 1], [1, 2, 0, 3]])
    counts = confusion_matrix(predicted, true, 5)
    assert counts.tolist() == [[2, 1, 0, 0, 0], [0, 2, 0, 0, 0], [1, 0, 1, 0, 0], [0] * 5, [0] * 5]
    scores = confusion_scores(counts)
    assert scores["class_iou"] == pytest.approx([2 / 4, 2 / 3, 1 / 2, None, None])
    assert scores["mean_iou"] == pytest.approx((2 / 4 + 2 / 3 + 1 / 2) / 3)
    assert scores["pixel_accuracy"] == pytest.approx(5 / 7)
    rows = [confusion_matrix(one, other, 5) for one, other in zip(predicted, true, strict=True)]
    assert confusion_scores(sum(rows)) == scores


def test_mean_iou_of_the_truth_is_1_and_a_class_that_is_not_there_costs():
    true = torch.tensor([0, 1, 1])
    assert confusion_scores(confusion_matrix(true, true, 3))["mean_iou"] == 1
    wrong = confusion_scores(confusion_matrix(torch.tensor([0, 1, 2]), true, 3))
    assert wrong["class_iou"] == [1, 0.5, 0]
