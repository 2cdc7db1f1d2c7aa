import numpy as np
import pytest
from pycocotools import mask as rle_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hf_efficientsam.training.masks.coco_ap import encode_masks
from hf_efficientsam.training.masks.coco_ar import NAMES, average_recall

HEIGHT, WIDTH = 150, 200


def rectangle(top, left, bottom, right, pixels=None):
    """RLE of rows top to bottom and columns left to right, or of its first so many pixels, row by row."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    rows, columns = np.mgrid[top:bottom, left:right]
    mask[rows.ravel()[:pixels], columns.ravel()[:pixels]] = 1
    return encode_masks(np.ascontiguousarray(mask.T[None]))[0]


def scored(*rles):
    """As they come out of the generator: the most confident first."""
    return [{"segmentation": rle, "score": 1 - number / 2000} for number, rle in enumerate(rles)]


SMALL, MEDIUM, LARGE = rectangle(0, 0, 5, 10), rectangle(20, 20, 80, 80), rectangle(10, 10, 140, 180)


def test_perfect_and_empty():
    truth = [[SMALL, MEDIUM], [LARGE]]
    perfect = average_recall(truth, [scored(SMALL, MEDIUM), scored(LARGE)])
    assert perfect == dict.fromkeys(NAMES, 1.0)
    assert average_recall(truth, [[], []]) == dict.fromkeys(NAMES, 0.0)
    assert average_recall(truth, [scored(rectangle(145, 190, 150, 200)), []]) == dict.fromkeys(NAMES, 0.0)


def test_by_hand():
    """Of two small objects of 50 pixels one is found with IoU 0.82, the other with 0.62; the large one is not."""
    truth = [[SMALL, rectangle(10, 0, 15, 10)], [LARGE]]
    found = [scored(rectangle(100, 100, 110, 110), rectangle(10, 0, 15, 10, 31), rectangle(0, 0, 5, 10, 41)), []]
    recall = average_recall(truth, found)
    # IoU thresholds 0.50 to 0.60: both; 0.65 to 0.80: one; 0.85 to 0.95: none.
    small = (3 * 1 + 4 / 2) / 10
    assert recall["ARs"] == pytest.approx(small)
    assert recall["AR100"] == recall["AR1000"] == pytest.approx(2 / 3 * small)
    assert recall["ARl"] == 0 and recall["ARm"] is None


def test_so_many_masks_count():
    """The 100 best of an image for AR100, the 1000 best for the others, whatever order they come in."""
    wrong = [rectangle(140, 190, 150, 200)] * 1001
    for place, expected in ((99, (1, 1)), (100, (0, 1)), (999, (0, 1)), (1000, (0, 0))):
        found = scored(*wrong[:place], MEDIUM)[::-1]
        recall = average_recall([[MEDIUM]], [found])
        assert (recall["AR100"], recall["AR1000"], recall["ARm"]) == (*expected, expected[1])


def test_recall_is_that_of_pycocotools():
    generator = np.random.default_rng(0)
    truth, found = [], []
    for _ in range(6):
        corners = generator.integers(0, 60, (8, 2))
        sides = np.exp(generator.uniform(np.log(4), np.log(300), (8, 2))).astype(int)
        moved = (corners + generator.integers(-2, 3, (8, 2))).clip(0)
        for places, images in ((corners, truth), (moved, found)):
            boxes = np.concatenate([places, (places + sides).clip(max=(HEIGHT, WIDTH))], axis=1)
            images.append([rectangle(*box) for box in boxes])
    found = [scored(*rles) for rles in found]
    reference = COCO()
    annotations = [
        {"id": 10 * i + n + 1, "image_id": i, "category_id": 1, "segmentation": rle, "iscrowd": 0}
        | {"area": int(rle_codec.area(rle))}
        for i, rles in enumerate(truth)
        for n, rle in enumerate(rles)
    ]
    images = [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(len(truth))]
    reference.dataset = {"images": images, "categories": [{"id": 1}], "annotations": annotations}
    reference.createIndex()
    results = [{"image_id": i, "category_id": 1, **mask} for i, masks in enumerate(found) for mask in masks]
    theirs = COCOeval(reference, reference.loadRes(results), "segm")
    theirs.params.useCats, theirs.params.maxDets = 0, [1, 100, 1000]
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    recall = average_recall(truth, found)
    assert 0.1 < recall["AR1000"] < 0.9
    assert [recall[name] for name in ("AR100", "AR1000", "ARs", "ARm", "ARl")] == pytest.approx(
        theirs.stats[[7, 8, 9, 10, 11]].tolist(), abs=1e-6
    )
