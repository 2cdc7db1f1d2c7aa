"""Salient objects: maps become objects, boxes and masks."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_efficientsam.inference.prompters import SalientPrompter
from hf_efficientsam.inference.prompters.saliency import fit_map, separate_objects

WIDTH, HEIGHT = 60, 40  # of the images


def two_objects() -> np.ndarray:
    """A map with a large object at 0.9, a smaller one at 0.7 and a speck."""
    saliency = np.full((HEIGHT, WIDTH), 0.1, np.float32)
    saliency[5:25, 30:55], saliency[10:20, 5:15], saliency[38, 2] = 0.9, 0.7, 1
    return saliency


def test_objects_of_a_map_become_masks(predictor):
    saliency = two_objects()
    found = SalientPrompter(predictor, lambda image: saliency)()
    assert found.boxes.tolist() == [[30, 5, 55, 25], [5, 10, 15, 20]] and found.labels == ["salient object"] * 2
    expected = predictor.segment(boxes=found.boxes.tolist())
    assert np.array_equal(found.masks, expected.masks) and np.array_equal(found.iou_scores, expected.iou_scores)
    means = [saliency[mask].mean() if mask.any() else 0 for mask in expected.masks]
    assert found.masks.any() and found.scores == pytest.approx(means) and found.scores.dtype == np.float32
    assert len(SalientPrompter(predictor, lambda image: saliency, threshold=0.8)()) == 1
    assert len(SalientPrompter(predictor, lambda image: saliency, min_area=0)()) == 3
    assert len(SalientPrompter(predictor, lambda image: np.zeros((4, 4)))()) == 0


def test_a_map_that_is_there_already_is_segmented_too(predictor):
    prompter = SalientPrompter(predictor, lambda image: two_objects())
    expected, found = prompter(), prompter.segment_map(two_objects())
    assert np.array_equal(found.masks, expected.masks) and np.array_equal(found.scores, expected.scores)
    with pytest.raises(TypeError, match="call segment_map"):
        SalientPrompter(predictor, two_objects())


def test_objects_are_apart_unless_corners_touch():
    salient = np.zeros((8, 9), bool)
    salient[:2, :2], salient[2:5, 2:5], salient[7, 7:9] = True, True, True
    objects = separate_objects(salient, 0)
    assert objects.sum(axis=(1, 2)).tolist() == [13, 2] and np.array_equal(objects.any(axis=0), salient)
    assert len(separate_objects(salient, 2 / 13)) == 2 and len(separate_objects(salient, 0.2)) == 1


@pytest.mark.parametrize("kind", ["bool", "bytes", "16 bits", "I;16B", "tensor", "L", "RGB", "zeros and ones", "half"])
def test_kinds_of_maps(kind):
    truth = np.zeros((20, 30), bool)
    truth[5:15, 8:20] = True
    gray = truth.astype(np.uint8) * 255
    values = {
        "bool": truth,
        "bytes": gray,
        "16 bits": truth.astype(np.uint16) * 65535,
        "tensor": torch.from_numpy(truth)[None, None],
        "L": Image.fromarray(gray),
        "I;16B": Image.frombytes("I;16B", (30, 20), (truth.astype(">u2") * 65535).tobytes()),
        "RGB": Image.fromarray(gray).convert("RGB"),
        "zeros and ones": truth.astype(np.uint8),
        "half": torch.from_numpy(truth).half(),
    }[kind]
    assert np.array_equal(fit_map(values, (20, 30)), truth)
    larger = fit_map(values, (40, 60))
    assert larger.shape == (40, 60) and larger.dtype == np.float32
    assert np.array_equal(larger > 0.5, truth.repeat(2, axis=0).repeat(2, axis=1))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full((4, 4), -1.0), "0 to 1"),
        (np.full((4, 4), np.nan), "0 to 1"),
        (np.zeros((3, 4, 4)), r"\[height, width\]"),
        (np.zeros(4), r"\[height, width\]"),
        (np.zeros((0, 4)), r"\[height, width\]"),
    ],
)
def test_what_is_no_map(predictor, values, words):
    with pytest.raises(ValueError, match=words):
        SalientPrompter(predictor, lambda image: values)()


def test_a_function_sees_the_upright_picture_and_may_be_asked_about_a_new_one(predictor, other_image):
    seen = []

    def source(image):
        seen.append(image)
        return two_objects()

    prompter = SalientPrompter(predictor, source)
    assert prompter.map(other_image).shape == (HEIGHT, WIDTH)
    assert np.array_equal(seen[0], other_image) and np.array_equal(predictor.image, other_image)
    prompter()
    assert np.array_equal(seen[1], other_image)
    predictor.reset_image()
    with pytest.raises(RuntimeError, match="set_image"):
        prompter()


@pytest.mark.parametrize("option", ["threshold", "min_area"])
@pytest.mark.parametrize("value", [-0.1, 1, float("nan")])
def test_numbers_out_of_range(predictor, option, value):
    with pytest.raises(ValueError, match=option):
        SalientPrompter(predictor, lambda image: two_objects(), **{option: value})
