"""segment-anything's predictor interface gives what model and processor give by hand."""

import inspect
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from hf_efficientsam import EfficientSamModel, EfficientSamPredictor, EfficientSamProcessor
from hf_efficientsam import EfficientSamPredictor as SamPredictor
from hf_efficientsam.inference.results import boxes_from_masks_np

WIDTH, HEIGHT = 60, 40
POINTS, LABELS, BOX = [[20, 20], [1, 1]], [1, 0], [10, 5, 50, 35]


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


@pytest.fixture(params=[False, True], ids=["squashed", "padded"])
def predictor(tiny_model, request) -> EfficientSamPredictor:
    predictor = EfficientSamPredictor.from_pretrained(str(tiny_model))
    predictor.processor.image_processor.keep_aspect_ratio = request.param
    predictor.set_image(picture())
    return predictor


def by_hand(predictor, binarize=True, **prompts):
    """Masks, scores and logits of all candidates of all objects `[Q, M, ...]`."""
    inputs = predictor.processor(picture(), **prompts)
    sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
    with torch.no_grad():
        outputs = predictor.model(**inputs)
    masks = predictor.processor.post_process_masks(outputs.pred_masks, *sizes, binarize=binarize)[0]
    return masks.numpy(), outputs.iou_scores[0].numpy(), outputs.pred_masks[0].numpy()


def test_code_for_sam_runs_with_one_import_changed(tiny_model):
    sam, processor = EfficientSamModel.from_pretrained(tiny_model), EfficientSamProcessor.from_pretrained(tiny_model)
    for predictor in (SamPredictor(sam), SamPredictor(sam, processor)):
        assert not predictor.is_image_set
        predictor.set_image(np.asarray(picture()))
        masks, scores, logits = predictor.predict(
            point_coords=np.array(POINTS), point_labels=np.array(LABELS), box=np.array(BOX), multimask_output=True
        )
        assert masks.shape == (3, HEIGHT, WIDTH) and masks.dtype == bool and scores.shape == (3,)
        mask_input = logits[np.argmax(scores), :, :]
        masks, scores, again = predictor.predict(
            point_coords=np.array(POINTS),
            point_labels=np.array(LABELS),
            mask_input=mask_input[None, :, :],
            multimask_output=False,
        )
        assert masks.shape == (1, HEIGHT, WIDTH) and again.shape == (1, *mask_input.shape)
        assert predictor.get_image_embedding().shape[1] == 32
        assert next(iter(inspect.signature(predictor.predict).parameters)) == "point_coords"


@pytest.mark.parametrize("asked", ["points", "box", "both"])
def test_predictions_are_those_by_hand(predictor, asked):
    points = {"point_coords": np.array(POINTS), "point_labels": np.array(LABELS)} if asked != "box" else {}
    box = {"box": np.array(BOX)} if asked != "points" else {}
    prompts = {"input_points": [[POINTS]], "input_labels": [[LABELS]]} if points else {}
    prompts |= {"input_boxes": [[BOX]]} if box else {}
    for return_logits in (False, True):
        masks, scores, logits = predictor.predict(**points, **box, return_logits=return_logits)
        expected = by_hand(predictor, not return_logits, **prompts)
        assert logits == pytest.approx(expected[2][0], abs=1e-4) and scores == pytest.approx(expected[1][0], abs=1e-4)
        assert masks.dtype == (np.float32 if return_logits else bool)
        assert np.mean(np.abs(masks.astype(float) - expected[0][0])) < 1e-3


def test_mask_input_counts(predictor):
    side = predictor.predict(box=np.array(BOX))[2].shape[-2:]
    mask = np.where(np.arange(side[1]) < side[1] // 2, 5, -5) * np.ones(side)
    scores = predictor.predict(box=np.array(BOX), mask_input=mask[None])[1]
    expected = by_hand(predictor, input_boxes=[[BOX]], input_masks=[[mask]])[1][0]
    assert scores == pytest.approx(expected, abs=1e-4)
    assert np.abs(scores - predictor.predict(box=np.array(BOX))[1]).max() > 1e-4


def test_several_ragged_objects_equal_one_at_a_time(predictor):
    points, labels = [POINTS, None, [[50, 30]]], [LABELS, None, [1]]
    boxes = [None, BOX, [40, 20, 60, 40]]
    found = predictor.segment(points, labels, boxes, names=["a", "b", "c"])
    assert len(found) == 3 and found.labels == ["a", "b", "c"]
    for i in range(3):
        point = {} if points[i] is None else {"point_coords": points[i], "point_labels": labels[i]}
        masks, scores, _ = predictor.predict(**point, box=boxes[i])
        best = scores.argmax()
        assert found.iou_scores[i] == pytest.approx(np.clip(scores[best], 0, 1), abs=1e-4)
        assert np.mean(found.masks[i] != masks[best]) < 1e-3
        assert found.boxes[i].tolist() == (boxes[i] or boxes_from_masks_np(found.masks[i : i + 1])[0].tolist())
    single = predictor.segment(boxes=[BOX], multimask_output=False)
    assert np.array_equal(single.masks[0], predictor.predict(box=np.array(BOX), multimask_output=False)[0][0])
    assert single.labels == ["object"] and len(predictor.segment(boxes=[])) == 0


def test_images_of_any_kind(predictor):
    features, array = predictor.get_image_embedding(), np.asarray(picture())
    predictor.set_image(array[..., ::-1], image_format="BGR")
    assert torch.equal(predictor.features, features) and np.array_equal(predictor.image, array)
    with_alpha = np.concatenate([array[..., ::-1], np.full((HEIGHT, WIDTH, 1), 255, np.uint8)], axis=2)
    predictor.set_image(with_alpha, image_format="BGR")
    assert np.array_equal(predictor.image, array)
    predictor.set_image(array[..., 0], image_format="BGR")
    assert np.array_equal(np.asarray(predictor.image)[..., 2], array[..., 0])
    assert predictor.original_size == (HEIGHT, WIDTH)
    predictor.set_image(array[..., ::-1])
    assert not torch.equal(predictor.features, features)
    predictor.set_image(picture().convert("L"))
    assert predictor.image.mode == "RGB"


def test_without_a_picture(predictor):
    predictor.reset_image()
    assert not predictor.is_image_set and predictor.image is None
    for call in (
        predictor.get_image_embedding,
        lambda: predictor.predict(box=np.array(BOX)),
        lambda: predictor.segment(boxes=[BOX]),
        predictor.segment,
    ):
        with pytest.raises(RuntimeError, match="set_image"):
            call()


def test_wrong_questions(predictor):
    with pytest.raises(ValueError, match="There is no prompt"):
        predictor.predict()
    with pytest.raises(ValueError, match="outside the image"):
        predictor.predict(point_coords=np.array([[61, 3]]))
    with pytest.raises(ValueError, match="RGBA"):
        predictor.set_image(picture(), image_format="RGBA")
    predictor.processor.image_processor.max_image_pixels = 10
    with pytest.raises(ValueError, match="pixels"):
        predictor.set_image(picture())


def test_a_box_beyond_the_image_gives_what_the_clipped_one_gives(predictor):
    beyond, clipped = [-7, 5, 900, 41], [0, 5, WIDTH, HEIGHT]
    expected = predictor.predict(box=clipped)
    with pytest.warns(UserWarning, match="clipped"):
        found = predictor.predict(box=beyond)
    assert all(map(np.array_equal, found, expected))
    with pytest.warns(UserWarning, match="clipped"):
        assert predictor.segment(boxes=[beyond]).boxes.tolist() == [clipped]
    boxes = torch.from_numpy(predictor.transform.apply_boxes(np.array([beyond, clipped]), (HEIGHT, WIDTH)))
    with pytest.warns(UserWarning, match="clipped"):
        masks, _, _ = predictor.predict_torch(None, None, boxes.float())
    assert np.array_equal(masks[0], expected[0]) and torch.equal(masks[0], masks[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.predict_torch(None, None, boxes[1:].float())
