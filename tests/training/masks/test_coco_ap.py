import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hf_efficientsam.training.masks.coco_ap import (
    COCO_NAMES,
    Detections,
    DetectionSample,
    RleEncoder,
    choose,
    encode_masks,
    segment_detections,
)
from hf_efficientsam.training.masks.metrics import filled_box, inscribed_ellipse

HEIGHT, WIDTH = 150, 200


def rle(mask):
    return encode_masks(np.ascontiguousarray(mask.T[None]))[0]


def rectangle(top, left, bottom, right, pixels=None):
    """A mask of rows top to bottom and columns left to right, or of its first so many pixels, row by row."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    rows, columns = np.mgrid[top:bottom, left:right]
    mask[rows.ravel()[:pixels], columns.ravel()[:pixels]] = 1
    return mask


def write(folder, images, annotations, found, categories=(1, 2, 3), **detection):
    """Files of annotations (image_id, category_id, mask, iscrowd) and of detections (image_id, category_id, score)."""
    (folder / "images").mkdir(exist_ok=True)
    records = []
    for image in images:
        image = image if isinstance(image, dict) else {"id": image}
        records.append({**image, "file_name": f"{image['id']}.png", "width": WIDTH, "height": HEIGHT})
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / f"{image['id']}.png")
    truth = {
        "images": records,
        "categories": [one if isinstance(one, dict) else {"id": one, "name": str(one)} for one in categories],
        "annotations": [
            {"id": number, "image_id": image, "category_id": category, "segmentation": rle(mask), "iscrowd": crowd}
            | {"area": int(mask.sum()), "bbox": rle_codec.toBbox(rle(mask)).tolist()}
            for number, (image, category, mask, crowd) in enumerate(annotations, start=1)
        ],
    }
    (folder / "truth.json").write_text(json.dumps(truth))
    boxes = [
        {"image_id": image, "category_id": category, "bbox": [1, 2, 30, 40], "score": score, **detection}
        for image, category, score in found
    ]
    (folder / "boxes.json").write_text(json.dumps(boxes))
    return Detections(str(folder / "truth.json"), str(folder / "boxes.json"))


def mask_ap(detections, masks):
    return detections.mask_ap(detections.results({number: rle(mask) for number, mask in enumerate(masks)}))


def test_two_objects_and_three_detections_by_hand(tmp_path):
    objects = [rectangle(0, 0, 5, 10), rectangle(10, 0, 15, 10)]  # 50 pixels each
    found = [rectangle(0, 0, 5, 10, 41), rectangle(50, 50, 60, 60), rectangle(10, 0, 15, 10, 31)]
    scores = [0.9, 0.8, 0.7]
    detections = write(tmp_path, [1], [(1, 1, mask, 0) for mask in objects], [(1, 1, score) for score in scores])
    values = mask_ap(detections, found)
    # IoU with the truth: 0.82, 0 and 0.62. Precision is read off at the recalls 0, 0.01, ... 1, of which 51 are up to
    # 1/2. From threshold 0.50 to 0.60 right, wrong, right: precision 1 up to recall 1/2, then 2/3.
    low = (51 + 50 * 2 / 3) / 101
    # From 0.65 to 0.80 right, wrong, wrong: precision 1 up to recall 1/2, then nothing. From 0.85 on nothing.
    middle = 51 / 101
    assert values["AP"] == pytest.approx((3 * low + 4 * middle) / 10)
    assert values["AP50"] == pytest.approx(low)
    assert values["AP75"] == pytest.approx(middle)
    assert values["APs"] == values["AP"] and values["APm"] is None and values["APl"] is None
    assert values["AR100"] == pytest.approx((3 * 1 + 4 * 0.5) / 10)
    assert values["AR1"] == pytest.approx(7 * 0.5 / 10)


def test_perfect_and_nothing_right(tmp_path):
    masks = [rectangle(0, 0, 5, 10), rectangle(20, 20, 80, 80), rectangle(10, 10, 140, 180)]
    objects = [(1, 1, masks[0], 0), (1, 2, masks[1], 0), (2, 1, masks[2], 0)]
    detections = write(tmp_path, [1, 2, 3], objects, [(1, 1, 0.3), (1, 2, 0.9), (2, 1, 0.1)])
    values = mask_ap(detections, masks)
    assert all(value == pytest.approx(1) for value in values.values())
    wrong = mask_ap(detections, [rectangle(145, 190, 150, 200)] * 3)
    assert set(wrong) == set(COCO_NAMES) and all(value == 0 for value in wrong.values())


def random_scene(generator):
    """Ellipses of all sizes in several categories, some of them crowds; and what a bad detector makes of them."""
    objects, found, masks = [], [], []

    def ellipse(centre, sides):
        box = torch.tensor([*(centre - sides / 2), *(centre + sides / 2)])
        return inscribed_ellipse(box, HEIGHT, WIDTH).numpy().astype(np.uint8)

    for image in range(1, 9):
        for _ in range(generator.integers(1, 7)):
            centre = generator.random(2) * [WIDTH, HEIGHT]
            sides = np.exp(generator.uniform(np.log(12), np.log(300), 2))
            category, crowd = int(generator.integers(1, 4)), int(generator.random() < 0.15)
            objects.append((image, category, ellipse(centre, sides), crowd))
            for _ in range(generator.integers(0, 4)):
                near = centre + generator.normal(size=2) * sides * 0.06
                masks.append(ellipse(near, sides * np.exp(generator.normal(size=2) * 0.12)))
                other = int(generator.integers(1, 4)) if generator.random() < 0.1 else category
                found.append((image, other, float(generator.integers(1, 50)) / 50))  # with equal scores
        masks.append(ellipse(generator.random(2) * [WIDTH, HEIGHT], np.array([30.0, 30.0])))
        found.append((image, int(generator.integers(1, 4)), float(generator.random())))
    objects = [one for one in objects if one[2].any()]
    return objects, found, masks


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ap_is_that_of_pycocotools(tmp_path, seed):
    objects, found, masks = random_scene(np.random.default_rng(seed))
    detections = write(tmp_path, range(1, 11), objects, found)  # two images are empty
    ours = mask_ap(detections, masks)
    truth = COCO(str(tmp_path / "truth.json"))
    results = [
        {"image_id": image, "category_id": category, "segmentation": rle(mask), "score": score}
        for (image, category, score), mask in zip(found, masks, strict=True)
    ]
    theirs = COCOeval(truth, truth.loadRes(results), "segm")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    assert len(found) > 40 and sum(one[3] for one in objects) > 1
    assert 0.05 < theirs.stats[0] < 0.8 and min(theirs.stats) > -1  # objects of all sizes, and not all is right
    assert list(ours) == list(COCO_NAMES)
    assert list(ours.values()) == pytest.approx(theirs.stats.tolist(), abs=1e-6)


def test_first_images_alone(tmp_path):
    masks = [rectangle(0, 0, 40, 40), rectangle(0, 0, 40, 40)]
    objects = [(1, 1, masks[0], 0), (2, 1, masks[1], 0)]
    write(tmp_path, [1, 2], objects, [(2, 1, 0.5), (1, 1, 0.9)])
    first = Detections(str(tmp_path / "truth.json"), str(tmp_path / "boxes.json"), limit=1)
    assert [first[i].numbers for i in range(len(first))] == [[1]]
    assert first.mask_ap(first.results({1: rle(masks[0])}))["AP"] == pytest.approx(1)


def test_lvis_by_hand(tmp_path):
    """Categories 1 (rare), 2 (common) and 3 (frequent). A detection of a category that nobody looked for in an image
    is not counted, nor an unmatched one where not all objects are annotated."""
    square = rectangle(0, 0, 40, 40)
    elsewhere = rectangle(100, 100, 140, 140)
    images = [
        {"id": 1, "neg_category_ids": [3], "not_exhaustive_category_ids": []},
        {"id": 2, "neg_category_ids": [], "not_exhaustive_category_ids": [2]},
    ]
    categories = [{"id": n, "name": str(n), "frequency": f} for n, f in ((1, "r"), (2, "c"), (3, "f"))]
    objects = [(1, 1, square, 0), (1, 2, square, 0), (2, 2, square, 0), (2, 3, square, 0)]
    found = {
        (1, 1, 0.5): square,  # right
        (2, 1, 0.9): elsewhere,  # nobody looked for category 1 in image 2: not counted
        (1, 2, 0.8): square,  # right
        (2, 2, 0.9): elsewhere,  # unmatched, but not all of category 2 are annotated there: not counted
        (1, 3, 0.9): elsewhere,  # wrong: category 3 is known not to be in image 1
        (2, 3, 0.8): square,  # right
    }
    detections = write(tmp_path, images, objects, list(found), categories)
    values = mask_ap(detections, list(found.values()))
    assert detections.is_lvis and "300" in detections.protocol("box_iou")
    assert values["APr"] == pytest.approx(1)
    assert values["APc"] == pytest.approx(51 / 101)  # precision 1 up to recall 1/2: image 2's was not found
    assert values["APf"] == pytest.approx(1 / 2)  # wrong, right
    assert values["AP"] == values["APm"] == pytest.approx((1 + 51 / 101 + 1 / 2) / 3)
    assert values["APs"] is None and values["AR300"] == pytest.approx((1 + 1 / 2 + 1) / 3)


def test_lvis_counts_the_best_300_of_an_image(tmp_path):
    image = {"id": 1, "neg_category_ids": [], "not_exhaustive_category_ids": []}
    categories = [{"id": 1, "name": "1", "frequency": "r"}]
    found = [(1, 1, score / 400) for score in range(1, 351)]
    detections = write(tmp_path, [image], [(1, 1, rectangle(0, 0, 9, 9), 0)], found, categories)
    assert detections[0].numbers == list(range(50, 350))
    del categories[0]["frequency"]
    with pytest.raises(ValueError, match="without `frequency`"):
        write(tmp_path, [image], [(1, 1, rectangle(0, 0, 9, 9), 0)], found, categories)


def test_annotations_without_area_and_categories(tmp_path):
    mask = rectangle(0, 0, 40, 40)
    write(tmp_path, [1], [(1, 7, mask, 0)], [(1, 7, 0.5)], categories=[7])
    truth = json.loads((tmp_path / "truth.json").read_text())
    del truth["categories"], truth["annotations"][0]["area"], truth["annotations"][0]["iscrowd"]
    truth["annotations"][0]["id"] = 0  # which the evaluator would take for no match
    truth["annotations"][0]["segmentation"] = [[0, 0, 40, 0, 40, 40, 0, 40]]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    detections = Detections(str(tmp_path / "truth.json"), str(tmp_path / "boxes.json"))
    values = mask_ap(detections, [mask])
    assert (values["AP"], values["APm"], values["APs"]) == (pytest.approx(1), pytest.approx(1), None)


# ------------------------------------------------------------------------------------------ masks for boxes


def test_which_candidate_is_scored():
    boxes = torch.tensor([[10.0, 10, 30, 20], [50, 40, 90, 80]])
    filled = filled_box(boxes, HEIGHT, WIDTH)
    half = filled.clone()
    half[..., 15:, :] = False
    candidates = torch.stack([half, filled, torch.ones_like(filled)], 1)
    scores = torch.tensor([[0.9, 0.2, 0.3], [0.1, 0.2, 0.3]])
    assert torch.equal(choose(candidates, scores, boxes, "box_iou"), filled)
    assert torch.equal(choose(candidates, scores, boxes, "confidence"), torch.stack([half[0], candidates[1, 2]]))


@pytest.mark.parametrize("at_once", [1, 2, 64])
def test_segmented_in_parts(at_once):
    boxes = torch.tensor([[10.0, 10, 30, 20], [50, 40, 90, 80], [0, 0, 200, 150]])
    asked = []

    def predict(input_boxes):
        asked.append(len(input_boxes))
        return filled_box(input_boxes, HEIGHT, WIDTH)[:, None], torch.ones(len(input_boxes), 1), None

    sample = DetectionSample(None, boxes, [4, 5, 6])
    parts = segment_detections(predict, sample, (HEIGHT, WIDTH), "box_iou", at_once)
    assert max(asked) == min(at_once, 3) and sum(asked) == 3
    rles = [one for part in parts for one in encode_masks(part)]
    assert rle_codec.area(rles).tolist() == [200, 1600, HEIGHT * WIDTH]
    assert rle_codec.toBbox(rles)[1].tolist() == [50, 40, 40, 40]


@pytest.mark.slow
def test_masks_are_encoded_in_a_process_as_here():
    masks = np.random.default_rng(0).random((3, 31, 17)) < 0.5
    with RleEncoder(1) as there, RleEncoder(0) as here:
        assert (
            there(masks.astype(np.uint8)).result()
            == here(masks.astype(np.uint8)).result()
            == encode_masks(masks.astype(np.uint8))
        )


def test_boxes_of_an_image(tmp_path):
    detections = write(tmp_path, [1, 2], [(1, 1, rectangle(0, 0, 9, 9), 0)], [(2, 1, 0.5), (2, 3, 0.25)])
    assert len(detections) == 1  # nothing was found on the first
    sample = detections[0]
    assert sample.numbers == [0, 1] and sample.boxes.tolist() == [[1, 2, 31, 42]] * 2
    assert sample.image.size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "There is no file of detections"),
        ("[{", "is not valid json"),
        ("[" * 100_000, "is not valid json"),
        ('{"annotations": []}', "does not hold detections: it must be a flat list of"),
        ("[]", "has no detections"),
        ('[{"image_id": 1, "category_id": 1}]', "Detection 0 of .* has no bbox, score"),
        ([1, 1, {"bbox": [1, 2, 3]}], "needs four numbers as bbox"),
        ([1, 1, {"bbox": [1, 2, "x", 3]}], "needs four numbers as bbox"),
        ([1, 1, {"score": None}], "one as score"),
        ([1, 1, {"bbox": [9, 9, -3, 3]}], "of negative size"),
        ([77, 1, {}], "has the image_id 77, which .*truth.json lacks"),
        ([[1], 1, {}], r"has the image_id \[1\], which .*truth.json lacks"),
        ([1, 1, {"bbox": [1, 2, 10**400, 3]}], "needs four numbers as bbox"),
        ([1, 77, {}], "has the category_id 77, which .*truth.json lacks"),
    ],
)
def test_bad_detections_are_refused(tmp_path, content, sentence):
    write(tmp_path, [1], [(1, 1, rectangle(0, 0, 9, 9), 0)], [(1, 1, 0.5)])
    path = tmp_path / "boxes.json"
    if isinstance(content, list):
        good = {"image_id": content[0], "category_id": content[1], "bbox": [1, 2, 3, 4], "score": 0.5}
        content = json.dumps([good | content[2]])
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        Detections(str(tmp_path / "truth.json"), str(path))


def test_bad_images_are_refused(tmp_path):
    detections = write(tmp_path, [1], [(1, 1, rectangle(0, 0, 9, 9), 0)], [(1, 1, 0.5)])
    Image.new("RGB", (5, 5)).save(tmp_path / "images" / "1.png")
    with pytest.raises(ValueError, match=r"is 5 x 5 pixels when upright, but .* says 200 x 150"):
        detections[0]
    (tmp_path / "images" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"lists 1.png, which is not in"):
        Detections(str(tmp_path / "truth.json"), str(tmp_path / "boxes.json"))
