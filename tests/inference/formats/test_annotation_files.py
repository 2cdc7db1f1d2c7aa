import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import supervision
from PIL import Image

from hf_efficientsam import SegmentationResult
from hf_efficientsam.inference.formats.polygons import mask_of_polygons
from hf_efficientsam.inference.results import boxes_from_masks_np

HEIGHT, WIDTH = 150, 200


def disc(radius, x, y):
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


RING = disc(40, 60, 60) & ~disc(15, 60, 60)
TWO_PARTS = disc(20, 150, 40) | disc(18, 150, 110)
AT_THE_EDGE = disc(30, 190, 140)
MASKS = np.stack([RING, TWO_PARTS, np.zeros((HEIGHT, WIDTH), bool), AT_THE_EDGE])
NOT_EMPTY = [RING, TWO_PARTS, AT_THE_EDGE]


@pytest.fixture
def result():
    scores = np.float32([0.9, 0.8, 0.1, 0.7])
    labels = ["dog", "cat", "dog", "a bird"]
    return SegmentationResult(MASKS, scores, scores / 2, boxes_from_masks_np(MASKS), labels)


def iou(one, other):
    return (one & other).sum() / (one | other).sum()


def yolo_masks(text):
    """As the format says: a class and one polygon of relative corners a line."""
    corners = [np.array(line.split()[1:], float).reshape(-1, 2) * [WIDTH, HEIGHT] for line in text.splitlines()]
    return [mask_of_polygons([polygon], HEIGHT, WIDTH) for polygon in corners]


def test_yolo_lines_have_holes_and_parts_and_leave_out_empty_masks(result):
    text = result.yolo(tolerance=0)
    assert [line.split()[0] for line in text.splitlines()] == ["2", "1", "0"]  # a bird, cat, dog
    assert all(np.array_equal(mask, true) for mask, true in zip(yolo_masks(text), NOT_EMPTY, strict=True))
    simple = result.yolo()
    assert len(simple) < 0.7 * len(text)
    assert all(iou(mask, true) > 0.96 for mask, true in zip(yolo_masks(simple), NOT_EMPTY, strict=True))


def test_yolo_classes_can_be_those_of_a_dataset(result):
    text = result.yolo(categories=["cat", "dog", "horse", "a bird"])
    assert [line.split()[0] for line in text.splitlines()] == ["1", "0", "3"]
    with pytest.raises(ValueError, match="'a bird' is not among the categories"):
        result.yolo(categories=["cat", "dog"])


def test_yolo_and_coco_are_read_by_supervision(result, tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "images").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / "a.jpg")
    (tmp_path / "labels" / "a.txt").write_text(result.yolo())
    (tmp_path / "data.yaml").write_text(f"names: {json.dumps(result.categories)}")
    (tmp_path / "coco.json").write_text(json.dumps(result.coco("a.jpg")))
    read, images = supervision.DetectionDataset, str(tmp_path / "images")
    yolo = read.from_yolo(images, str(tmp_path / "labels"), str(tmp_path / "data.yaml"), force_masks=True)
    coco = read.from_coco(images, str(tmp_path / "coco.json"), force_masks=True)
    # Its YOLO reader paints the outlines of polygons, which widens each by half a pixel and draws the bridges.
    for dataset, least in ((yolo, 0.9), (coco, 1)):
        _, _, found = dataset[0]
        assert [dataset.classes[number] for number in found.class_id] == ["dog", "cat", "a bird"]
        assert all(iou(mask, true) >= least for mask, true in zip(found.mask, NOT_EMPTY, strict=True))
        assert not found.mask[0][60, 60]  # the hole


def test_detections_of_supervision(result):
    found = result.to_supervision()
    assert np.array_equal(found.mask, MASKS) and np.array_equal(found.confidence, result.scores)
    assert found["class_name"].tolist() == result.labels and found.class_id.tolist() == [2, 1, 2, 0]
    assert found.xyxy.tolist() == result.boxes.tolist()


def test_detections_of_fiftyone_have_relative_boxes_with_their_masks(result, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "fiftyone", SimpleNamespace(Detection=SimpleNamespace, Detections=SimpleNamespace)
    )
    found = result.to_fiftyone().detections
    assert [one.label for one in found] == ["dog", "cat", "a bird"]
    for one, true in zip(found, NOT_EMPTY, strict=True):
        left, top, width, height = np.round(np.multiply(one.bounding_box, [WIDTH, HEIGHT] * 2)).astype(int)
        pasted = np.zeros((HEIGHT, WIDTH), bool)
        pasted[top : top + height, left : left + width] = one.mask
        assert np.array_equal(pasted, true)


def test_labelme_groups_the_parts_of_an_object(result):
    content = json.loads(json.dumps(result.labelme("a.jpg", tolerance=0)))
    assert (content["imagePath"], content["imageHeight"], content["imageWidth"]) == ("a.jpg", HEIGHT, WIDTH)
    shapes = content["shapes"]
    assert [(shape["label"], shape["group_id"]) for shape in shapes] == [
        ("dog", None), ("cat", 2), ("cat", 2), ("a bird", None)
    ]  # fmt: skip
    assert {shape["shape_type"] for shape in shapes} == {"polygon"}
    masks = [mask_of_polygons([np.array(shape["points"])], HEIGHT, WIDTH) for shape in shapes]
    expected = [RING, disc(20, 150, 40), disc(18, 150, 110), AT_THE_EDGE]
    assert sorted(mask.sum() for mask in masks) == sorted(mask.sum() for mask in expected)
    assert np.array_equal(masks[0], RING) and np.array_equal(masks[1] | masks[2], TWO_PARTS)


def test_label_studio_regions_are_in_percent_and_parts_name_their_parent(result):
    task = json.loads(json.dumps(result.label_studio("/data/a.jpg", tolerance=0)))
    assert task["data"] == {"image": "/data/a.jpg"}
    [prediction] = task["predictions"]
    regions = prediction["result"]
    assert [region["value"]["polygonlabels"] for region in regions] == [["dog"], ["cat"], ["cat"], ["a bird"]]
    assert [region.get("parentID") for region in regions] == [None, None, regions[1]["id"], None]
    scale = np.array([WIDTH, HEIGHT]) / 100
    points = [np.array(region["value"]["points"]) * scale for region in regions]
    assert np.array_equal(mask_of_polygons(points[:1], HEIGHT, WIDTH), RING)
    assert np.array_equal(mask_of_polygons(points[1:3], HEIGHT, WIDTH), TWO_PARTS)
    assert prediction["score"] == pytest.approx(result.scores.mean(), abs=1e-3)
