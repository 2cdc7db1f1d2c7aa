"""What surrounds the detector: jitter, labels, categories, files, AP. The detector itself needs torchvision: see
`tests/detection_with_torchvision.py`."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as rle_codec

from hf_efficientsam.training.data.coco import CocoMasks
from hf_efficientsam.training.data.images import normalize
from hf_efficientsam.training.detection.data import DetectionViews, categories_of, fit, large_scale_jitter
from hf_efficientsam.training.detection.evaluation import (
    average_precision,
    boxes_alone,
    match_categories,
    results_of,
)
from hf_efficientsam.training.detection.mask_rcnn import check_torchvision, load_detector
from hf_efficientsam.training.masks.coco_ap import Detections, Truth

WIDTH, HEIGHT = 80, 60
BOXES = [(10, 5, 30, 25), (40, 30, 79, 59)]
WHITE = normalize(torch.full((3, 1, 1), 255, dtype=torch.uint8))


def rle(box) -> dict:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return rle_codec.encode(mask)


def picture(boxes=BOXES) -> Image.Image:
    """White rectangles on black."""
    image = Image.new("RGB", (WIDTH, HEIGHT))
    for left, top, right, bottom in boxes:
        ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill="white")
    return image


def write(folder, categories=None, objects=((1, 0, 7), (1, 1, 3), (2, 0, 3)), crowds=(), images=(1, 2, 3)):
    """A json with the objects (image, which of `BOXES`, category)."""
    (folder / "images").mkdir(exist_ok=True)
    records = [{"id": one, "file_name": f"{one}.png", "width": WIDTH, "height": HEIGHT} for one in images]
    annotations = []
    for number, (image, box, category) in enumerate(objects, start=1):
        left, top, right, bottom = BOXES[box]
        polygon = [left, top, right, top, right, bottom, left, bottom]
        annotation = {"id": number, "image_id": image, "segmentation": [polygon], "iscrowd": int(number in crowds)}
        annotations.append(annotation | ({} if category is None else {"category_id": category}))
    for one in images:
        picture([BOXES[box] for image, box, _ in objects if image == one]).save(folder / "images" / f"{one}.png")
    content = {"images": records, "annotations": annotations}
    content |= {} if categories is None else {"categories": categories}
    (folder / "masks.json").write_text(json.dumps(content))
    return folder / "masks.json"


NAMED = [{"id": 7, "name": "cup"}, {"id": 3, "name": "cat"}, {"id": 9, "name": "sun"}]


# ------------------------------------------------------------------------------------------ jitter


def jitter(scale, seed=0, size=80, **options):
    rles = [rle(box) for box in BOXES]
    return large_scale_jitter(picture(), rles, size, torch.Generator().manual_seed(seed), (scale, scale), **options)


def test_an_image_that_just_fits_is_padded_below():
    pixels, masks, kept = jitter(1.0, flip=False)
    assert torch.equal(pixels[:, :HEIGHT], normalize(torch.from_numpy(np.array(picture())).permute(2, 0, 1)))
    assert not pixels[:, HEIGHT:].any() and not masks[:, HEIGHT:].any()
    assert np.array_equal(masks[:, :HEIGHT].numpy(), rle_codec.decode([rle(box) for box in BOXES]).transpose(2, 0, 1))
    assert kept.tolist() == [0, 1] and masks.dtype == torch.uint8 and masks.shape == (2, 80, 80)


def test_a_smaller_one_is_padded_on_both_sides_and_a_larger_one_cropped():
    pixels, masks, _ = jitter(0.5, flip=False)
    assert pixels[:, :30, :40].abs().min() > 0 and not pixels[:, 30:].any() and not pixels[:, :, 40:].any()
    assert masks.sum((1, 2)).tolist() == pytest.approx([100, 283], rel=0.1)  # a quarter of their pixels
    for seed in range(5):
        pixels, masks, kept = jitter(2.0, seed)
        assert pixels.abs().min() > 0  # 160 x 120 pixels are more than the square everywhere
        assert len(masks) == len(kept) and masks.flatten(1).any(1).all()
    assert len({tuple(jitter(2.0, seed)[2].tolist()) for seed in range(8)}) > 1  # crops differ in what they show


@pytest.mark.parametrize("scale", [0.4, 0.9, 1.3, 2.0])
def test_masks_stay_on_their_objects(scale):
    flipped = set()
    for seed in range(6):
        pixels, masks, kept = jitter(scale, seed)
        white = (pixels[0] > WHITE[0] * 0.5).int()
        union = masks.amax(0).int() if len(kept) else torch.zeros_like(white)
        assert (white - union).abs().sum() <= 0.1 * white.sum() + 8
        flipped.add(bool(len(kept) == 2 and masks[0].any(0).nonzero()[0] > masks[1].any(0).nonzero()[0]))
    assert scale > 1 or flipped == {True, False}


def test_jitter_is_the_generators_and_its_range_is_checked():
    first, again = jitter(1.7, 3), jitter(1.7, 3)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    with pytest.raises(ValueError, match="0 < least <= greatest"):
        large_scale_jitter(picture(), [rle(BOXES[0])], 64, torch.Generator(), (0.5, 0.1))


def test_fitted_for_detection():
    pixels, size = fit(picture(), 40)
    assert size == (30, 40) and pixels.shape == (3, 40, 40)
    assert pixels[:, :30].abs().min() > 0 and not pixels[:, 30:].any()
    assert fit(Image.new("RGB", (1, 500)), 64)[1] == (64, 1)


# ------------------------------------------------------------------------------------------ what is trained on


def test_labels_are_places_among_the_categories_and_crowds_are_left_out(tmp_path):
    source = CocoMasks(write(tmp_path, NAMED, crowds={2}))
    views = DetectionViews(source, 64, (1.0, 1.0), flip=False)
    assert views.categories == [{"id": 3, "name": "cat"}, {"id": 7, "name": "cup"}, {"id": 9, "name": "sun"}]
    assert len(views) == 2  # the third image shows nothing
    assert [views[index]["labels"].tolist() for index in range(2)] == [[2], [1]]
    item = views[0]
    assert item["boxes"].tolist() == [[8, 4, 24, 20]] and item["boxes"].dtype == torch.float32  # 64 / 80 of it
    assert item["labels"].dtype == torch.int64 and item["key"].endswith("/1")


def test_an_item_depends_on_seed_epoch_and_index_alone(tmp_path):
    source = CocoMasks(write(tmp_path, NAMED))
    views, others = DetectionViews(source, 64), DetectionViews(source, 64)
    others[1], others[0]
    first = views[0]
    assert torch.equal(first["pixel_values"], others[0]["pixel_values"]) and first["seed"] == others[0]["seed"]
    others.set_epoch(1)
    assert not torch.equal(first["pixel_values"], others[0]["pixel_values"]) and first["seed"] != others[0]["seed"]
    assert not torch.equal(first["pixel_values"], DetectionViews(source, 64, seed=1)[0]["pixel_values"])


def test_an_image_whose_objects_are_all_cut_off_is_still_an_item(tmp_path):
    views = DetectionViews(CocoMasks(write(tmp_path, NAMED, objects=[(1, 0, 7)])), 64, (2.0, 2.0))
    counts = set()
    for epoch in range(12):
        views.set_epoch(epoch)
        item = views[0]
        assert item["boxes"].shape == (len(item["labels"]), 4) and item["masks"].shape[1:] == (64, 64)
        counts.add(len(item["labels"]))
    assert counts == {0, 1}


def test_categories_without_a_list_and_without_any(tmp_path):
    assert categories_of(CocoMasks(write(tmp_path))) == [{"id": 3, "name": "3"}, {"id": 7, "name": "7"}]
    with pytest.raises(ValueError, match="objects of the category 7, which it does not list"):
        DetectionViews(CocoMasks(write(tmp_path, NAMED[1:])), 64)
    with pytest.raises(ValueError, match="objects of the category None"):
        DetectionViews(CocoMasks(write(tmp_path, objects=[(1, 0, None)])), 64)
    with pytest.raises(ValueError, match="no object to learn"):
        DetectionViews(CocoMasks(write(tmp_path, NAMED, objects=[])), 64)


# ------------------------------------------------------------------------------------------ measuring


def test_categories_are_matched_by_name(tmp_path):
    theirs = [{"id": 50, "name": "cat"}, {"id": 70, "name": "cup"}, {"id": 3, "name": "dog"}]
    truth = Truth(write(tmp_path, theirs, objects=[(1, 0, 50)]))
    assert match_categories(NAMED, truth) == {1: 70, 2: 50}
    with pytest.raises(ValueError, match="none of the detector's categories, but cat, cup, dog"):
        match_categories([{"id": 3, "name": "moon"}], truth)


def found(boxes, labels, scores) -> dict:
    masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor(labels), "scores": torch.tensor(scores), "masks": masks}


def test_what_is_found_is_written_as_coco_has_it_and_measured(tmp_path):
    truth = Truth(write(tmp_path, NAMED, crowds={3}))
    assert len(truth) == 3 and [len(rles) for rles in truth.rles] == [2, 0, 0]
    ids = {1: 3, 2: 7}
    right = results_of(found(BOXES, [2, 1], [0.5, 0.75]), 1, ids) + results_of(found([], [], []), 2, ids)
    assert boxes_alone(right) == [
        {"image_id": 1, "category_id": 7, "bbox": [10, 5, 20, 20], "score": 0.5},
        {"image_id": 1, "category_id": 3, "bbox": [40, 30, 39, 29], "score": 0.75},
    ]
    scores = average_precision(right, truth)
    assert scores["box"]["AP"] == scores["mask"]["AP"] == pytest.approx(1)
    # A category that the json lacks is left out; a box on an image without objects costs precision.
    wrong = results_of(found(BOXES, [9, 1], [0.9, 0.9]), 3, ids)
    assert [one["category_id"] for one in wrong] == [3]
    worse = average_precision(wrong + right, truth)
    assert worse["box"]["AP"] == pytest.approx((1 + 0.5) / 2)
    assert average_precision([], truth)["mask"]["AP"] == 0

    (tmp_path / "detections.json").write_text(json.dumps(boxes_alone(right)))
    detections = Detections(str(truth.annotations), str(tmp_path / "detections.json"))
    assert len(detections) == 1 and detections[0].boxes.tolist() == [list(box) for box in BOXES]


def test_a_box_that_is_right_with_a_mask_that_is_not(tmp_path):
    truth = Truth(write(tmp_path, NAMED, objects=[(1, 0, 7)]))
    one = found(BOXES[:1], [2], [0.5])
    one["masks"][:, :, 20:] = False
    scores = average_precision(results_of(one, 1, {2: 7}), truth)
    assert scores["box"]["AP"] == pytest.approx(1) and scores["mask"]["AP"] == pytest.approx(0.1)  # IoU 0.5


# ------------------------------------------------------------------------------------------ without torchvision


def test_without_torchvision(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for needs in (check_torchvision, lambda: load_detector(tmp_path)):
        with pytest.raises(
            ValueError, match=r"needs a torchvision that works with torch .*hf-efficientsam\[detection"
        ):
            needs()


def test_with_a_torchvision_without_operators(monkeypatch, tmp_path):
    (tmp_path / "torchvision").mkdir()
    broken = 'raise RuntimeError("operator torchvision::nms does not exist")'
    (tmp_path / "torchvision" / "__init__.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(ValueError, match=r"operator torchvision::nms does not exist\); install the one that belongs"):
        check_torchvision()
