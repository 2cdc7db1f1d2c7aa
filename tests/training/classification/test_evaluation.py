from hf_efficientsam.training.classification.evaluation import top_accuracy


def test_top_accuracy():
    assert top_accuracy([[0, 1], [1, 0]], [0, 1]) == {"top1": 1, "top5": 1}
    assert top_accuracy([[0, 1], [1, 0]], [2, 2]) == {"top1": 0, "top5": 0}
    ranked = [[7, 1, 2, 3, 4], [1, 7, 2, 3, 4], [1, 2, 3, 4, 7], [1, 2, 3, 4, 5]]
    assert top_accuracy(ranked, [7] * 4) == {"top1": 0.25, "top5": 0.75}
