"""The predictors: whatever comes in, there is a result of the right form or a clear error, with and without torch."""

import numpy as np
import pytest
from fuzz import ONE_IMAGE, examples, prompts
from hypothesis import given
from hypothesis import strategies as st

from hf_efficientsam import EfficientSamOnnxPredictor, EfficientSamPredictor


@pytest.fixture(scope="module")
def predictors(tiny_model, tiny_onnx) -> list:
    return [EfficientSamPredictor.from_pretrained(tiny_model), EfficientSamOnnxPredictor(tiny_onnx, num_threads=1)]


def outcomes(predictors: list, ask) -> list:
    """What each answers, or the type of its error; a path may lead to no file."""
    found = []
    for predictor in predictors:
        try:
            found.append(ask(predictor))
        except (ValueError, TypeError, FileNotFoundError) as error:
            assert str(error)
            found.append(type(error))
    return found


def refused(ours, theirs) -> bool:
    """Both refuse the same, but for masks of other sizes, which torch alone resizes."""
    assert isinstance(theirs, type) or not isinstance(ours, type), (ours, theirs)
    return isinstance(theirs, type)


@examples(100)
@given(ONE_IMAGE)
def test_predictors_with_any_image(predictors, image):
    for features in outcomes(predictors, lambda one: one.set_image(image) or np.asarray(one.get_image_embedding())):
        assert isinstance(features, type) or np.isfinite(features).all()
    for predictor in predictors:
        assert predictor.is_image_set == (predictor.image is not None)


@examples(150)
@given(prompts(), st.sampled_from([(9, 7), (30, 40)]))
def test_predictors_with_any_prompts(predictors, asked, size):
    for predictor in predictors:
        predictor.set_image(np.full((*size, 3), 90, np.uint8))
    ours, theirs = outcomes(predictors, lambda one: one.segment(**asked))
    if refused(ours, theirs):
        return
    assert ours.masks.shape == theirs.masks.shape == (len(ours), *size) and ours.masks.dtype == theirs.masks.dtype
    assert np.isfinite(ours.scores).all() and np.allclose(ours.scores, theirs.scores, atol=1e-3)
    assert np.isfinite(ours.boxes).all() and ours.boxes.shape == theirs.boxes.shape == (len(ours), 4)


@examples(100)
@given(prompts())
def test_predictors_asked_as_segment_anythings(predictors, asked):
    for predictor in predictors:
        predictor.set_image(np.full((9, 7, 3), 90, np.uint8))
    names = {"points": "point_coords", "labels": "point_labels", "boxes": "box", "masks": "mask_input"}
    # Of the first object, as far as there is one.
    first = {names[kind]: of[0] if isinstance(of, list) and of else of for kind, of in asked.items()}
    ours, theirs = outcomes(predictors, lambda one: one.predict(**first))
    if not refused(ours, theirs):
        assert ours[0].shape == theirs[0].shape == (3, 9, 7) and np.allclose(ours[1], theirs[1], atol=1e-3)
