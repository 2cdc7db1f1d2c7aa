"""What was found, and the forms in which it is taken away."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from hf_efficientsam import SegmentationResult
from hf_efficientsam.inference.results import boxes_from_masks_np, draw_label_map, mask_rles

MASKS = np.zeros((3, 20, 30), bool)
MASKS[0, 2:12, 3:23] = True
MASKS[1, 5:9, 20:28] = True  # smaller, and partly over the first; the last one is empty


def result(labels=("dog", "cat", "dog")) -> SegmentationResult:
    scores = np.float32([0.9, 0.8, 0.1])
    return SegmentationResult(MASKS, scores, scores / 2, boxes_from_masks_np(MASKS), list(labels))


def test_one_of_each():
    assert len(result()) == 3
    with pytest.raises(ValueError, match="'labels': 1"):
        result(["dog"])


def test_boxes_are_tight_and_reach_behind_the_last_pixel():
    boxes = boxes_from_masks_np(MASKS)
    assert boxes.tolist() == [[3, 2, 23, 12], [20, 5, 28, 9], [0, 0, 0, 0]] and boxes.dtype == np.float32
    assert boxes_from_masks_np(MASKS[:0]).shape == (0, 4)


def test_rles_come_back():
    rles = result().rles()
    assert all(isinstance(rle["counts"], str) and rle["size"] == [20, 30] for rle in rles)
    assert np.array_equal(np.moveaxis(coco_mask.decode(rles), -1, 0), MASKS)
    assert mask_rles(MASKS[:0]) == []


def test_label_map_shows_the_smallest():
    expected = np.zeros((20, 30))
    expected[MASKS[0]], expected[MASKS[1]] = 1, 2
    labels = np.asarray(result().label_map())
    assert labels.dtype == np.uint8 and np.array_equal(labels, expected)
    assert np.array_equal(draw_label_map(MASKS[[1, 0]], [32, 200], (20, 30)), np.choose(labels, [0, 2, 1]))
    assert not np.asarray(draw_label_map([], [], (20, 30))).any()


def test_cut_out_is_transparent_around_the_objects():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    cut = np.asarray(result().cut_out(Image.fromarray(pixels)))
    assert np.array_equal(cut[..., :3], pixels) and np.array_equal(cut[..., 3], MASKS.any(axis=0) * 255)


def test_coco_is_read_by_pycocotools():
    dataset = COCO()
    dataset.dataset = result().coco("a.jpg")
    dataset.createIndex()
    assert dataset.imgs[1] == {"id": 1, "file_name": "a.jpg", "height": 20, "width": 30}
    assert [one["id"] for one in dataset.loadAnns(dataset.getAnnIds())] == [1, 2]  # the empty one is left out
    for i, name in enumerate(["dog", "cat"]):
        (annotation,) = dataset.loadAnns(dataset.getAnnIds(catIds=dataset.getCatIds(catNms=[name])))
        assert np.array_equal(dataset.annToMask(annotation), MASKS[i]) and annotation["area"] == MASKS[i].sum()
        x1, y1, x2, y2 = boxes_from_masks_np(MASKS)[i].tolist()
        assert annotation["bbox"] == [x1, y1, x2 - x1, y2 - y1]
        assert annotation["score"] == pytest.approx([0.9, 0.8][i])
        assert annotation["predicted_iou"] == pytest.approx([0.45, 0.4][i])
