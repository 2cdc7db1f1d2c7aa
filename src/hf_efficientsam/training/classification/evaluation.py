"""How good a classifier is."""

from collections.abc import Sequence


def top_accuracy(ranked: Sequence[Sequence[int]], labels: Sequence[int]) -> dict[str, float]:
    """
    `top1` and `top5`: the ratio of images whose class is the likeliest, or one of the five likeliest.

    Args:
        ranked: of each image classes from the likeliest on, up to five of them.
        labels: its class.
    """

    def ratio(count: int) -> float:
        found = [label in classes[:count] for classes, label in zip(ranked, labels, strict=True)]
        return sum(found) / len(found)

    return {"top1": ratio(1), "top5": ratio(5)}
