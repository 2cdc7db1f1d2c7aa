"""Average recall of masks that were found without a prompt, whatever is on them."""

from collections.abc import Sequence

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as rle_codec

MAX_MASKS = (1, 100, 1000)
# What is averaged: area range and number of masks, as they stand in the evaluator's recall.
NAMES = {"AR100": (0, 1), "AR1000": (0, 2), "ARs": (1, 2), "ARm": (2, 2), "ARl": (3, 2)}
PROTOCOL = (
    "Recall of the true masks through faster-coco-eval, averaged over the IoU thresholds 0.50, 0.55, ... 0.95; "
    "categories do not matter. AR100 counts the 100 masks of an image with the best predicted IoU, the others 1000. "
    "Crowds are left out. ARs, ARm and ARl are of true masks of up to 32 x 32, up to 96 x 96 and more pixels."
)


def average_recall(truth: Sequence[list[dict]], found: Sequence[list[dict]]) -> dict[str, float | None]:
    """
    Args:
        truth: for each image the RLEs of its true masks, at least one; compressed, as COCO's.
        found: for each image `{segmentation, score}` of its masks, RLEs likewise.

    Returns:
        numbers from 0 to 1 by `NAMES`; None where there is no true mask of that size.
    """
    images, annotations, results = [], [], []
    for number, (rles, masks) in enumerate(zip(truth, found, strict=True), start=1):
        height, width = rles[0]["size"]
        images.append({"id": number, "height": height, "width": width})
        belongs = {"image_id": number, "category_id": 1}
        annotations += [{**belongs, "segmentation": rle, "area": float(rle_codec.area(rle))} for rle in rles]
        results += [{**belongs, **mask} for mask in masks]
    for number, annotation in enumerate(annotations, start=1):  # 0 means no match to the evaluator
        annotation |= {"id": number, "iscrowd": 0}
    reference = COCO({"images": images, "categories": [{"id": 1}], "annotations": annotations})
    evaluation = COCOeval_faster(reference, reference.loadRes(results), "segm")
    evaluation.params.useCats = 0
    evaluation.params.maxDets = list(MAX_MASKS)
    evaluation.evaluate()
    evaluation.accumulate()
    recall = np.asarray(evaluation.eval["recall"])[:, 0]  # [IoU thresholds, area ranges, MAX_MASKS]
    means = {name: recall[:, area, count].mean() for name, (area, count) in NAMES.items()}
    return {name: None if value < 0 else float(value) for name, value in means.items()}
