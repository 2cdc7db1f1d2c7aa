"""Loose boxes and scribbles."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from hf_efficientsam.inference.prompters import RoughPrompter
from hf_efficientsam.inference.prompters.rough import mask_prompt, spread_points

WIDTH, HEIGHT = 60, 40  # of the images


def test_loose_boxes_are_put_in_order_and_cut_off(predictor):
    with pytest.warns(UserWarning, match="clipped"):
        found = RoughPrompter(predictor).boxes([[70, 30, 10, -5], [5, 6, 20, 20]])
    expected = predictor.segment(boxes=[[10, 0, 60, 30], [5, 6, 20, 20]])
    assert found.boxes.tolist() == expected.boxes.tolist() and np.array_equal(found.masks, expected.masks)
    for box, problem in (([70, 5, 80, 9], "entirely outside"), ([5, 5, 5, 9], "no area")):
        with pytest.raises(ValueError, match=problem):
            RoughPrompter(predictor).boxes([box])


def paint() -> np.ndarray:
    painted = np.zeros((HEIGHT, WIDTH), bool)
    painted[10:20, 5:25] = True
    return painted


def test_a_scribble_is_a_mask_and_a_grown_box(predictor):
    found = RoughPrompter(predictor).scribble(paint())
    box = [3, 9, 27, 21]  # a tenth larger on each side
    expected = predictor.segment(boxes=[box], masks=[mask_prompt(paint(), predictor)])
    assert found.boxes.tolist() == [box] and np.array_equal(found.masks, expected.masks) and found.masks.any()
    off = np.zeros_like(paint())
    off[30:38, 40:58] = True
    found = RoughPrompter(predictor).scribble(paint(), off)
    points = spread_points(off, 3)
    expected = predictor.segment([points], [[0] * 3], [box], [mask_prompt(paint(), predictor)])
    assert np.array_equal(found.iou_scores, expected.iou_scores) and len(points) == 3
    assert np.array_equal(RoughPrompter(predictor).scribble(paint(), ~paint() & False).boxes, [box])


def test_without_mask_prompts_a_scribble_is_points_and_a_box(predictor):
    config = predictor.model.config.prompt_encoder_config
    config.mask_prompts = False
    found = RoughPrompter(predictor).scribble(paint())
    expected = predictor.segment([spread_points(paint(), 3)], None, [[3, 9, 27, 21]])
    assert np.array_equal(found.iou_scores, expected.iou_scores)
    config.background_points = False
    with pytest.raises(ValueError, match="no background points"):
        RoughPrompter(predictor).scribble(paint(), paint())


def test_points_lie_deep_and_apart():
    painted = paint()
    points = spread_points(painted, 3)
    depth = ndimage.distance_transform_edt(painted)
    assert len(points) == 3 and depth[int(points[0][1]), int(points[0][0])] == depth.max()
    assert all(painted[int(y), int(x)] for x, y in points)
    assert (
        min(np.hypot(*np.subtract(a, b)) for i, a in enumerate(points) for b in points[:i]) > painted.sum() ** 0.5 / 2
    )
    assert len(spread_points(np.eye(1, dtype=bool), 3)) == 1 and spread_points(painted & False, 3) == []


@pytest.mark.parametrize("keep_aspect_ratio", [False, True])
def test_mask_prompts_are_in_the_frame_of_the_models_logits(predictor, keep_aspect_ratio, image):
    """What is brought to the model's frame and back is what it was."""
    predictor.processor.image_processor.keep_aspect_ratio = keep_aspect_ratio
    predictor.set_image(image)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:, 20:] = True
    logits = mask_prompt(mask, predictor)
    assert logits.shape == tuple(4 * n for n in predictor.features.shape[-2:]) and set(np.sign(logits[0])) == {-1, 1}
    sizes = [predictor.original_size], [predictor.input_size]
    back = predictor.processor.post_process_masks([torch.from_numpy(logits)[None, None]], *sizes)[0][0, 0].numpy()
    assert np.mean(back != mask) < 0.1 and not back[:, :17].any() and back[:-2, 24:].all()


@pytest.mark.parametrize(
    ("painted", "words"), [(np.zeros((40, 60)), "nothing is painted"), (np.ones((60, 40)), "40, 60")]
)
def test_paint_that_does_not_fit(predictor, painted, words):
    with pytest.raises(ValueError, match=words):
        RoughPrompter(predictor).scribble(painted)
