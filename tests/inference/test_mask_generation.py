"""Segment everything: the same masks as by resizing each and asking, with less done for them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import pipeline

from hf_efficientsam import EfficientSamImageProcessor, EfficientSamModel, bundled_checkpoint
from hf_efficientsam.inference import mask_bounds, mask_generation, point_grids
from hf_efficientsam.inference.amg import remove_small_regions
from hf_efficientsam.inference.mask_bounds import bound_masks, mask_axes, measure_masks
from hf_efficientsam.inference.mask_generation import EfficientSamMaskGenerator
from hf_efficientsam.inference.point_grids import distinct_points
from hf_efficientsam.model import mask_decoder_fast_efficientsam
from hf_efficientsam.model.mask_operations_efficientsam import (
    batched_mask_to_box,
    build_point_grid,
    calculate_stability_score,
    resize_masks,
)
from hf_efficientsam.model.run_lengths_efficientsam import rle_to_mask


@pytest.fixture(scope="module")
def model() -> EfficientSamModel:
    return tiny.model_for_mask_generation()


def small_image(height: int = 70, width: int = 91, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def smooth_logits(count: int, height: int, width: int, seed: int = 0, detail: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = 8 * torch.randn(count, 1, height // detail + 2, width // detail + 2, generator=generator)
    return F.interpolate(coarse, size=(height, width), mode="bicubic")[:, 0]


# ------------------------------------------------------------------------------------------------ low resolution

SIZES = {
    "four times": ((48, 48), (192, 192), (192, 192)),
    "an odd scale": ((32, 48), (123, 287), (128, 192)),
    "smaller than the logits": ((40, 32), (27, 19), (160, 128)),
    "one pixel": ((32, 32), (1, 1), (128, 128)),
    "padded": ((32, 32), (180, 122), (128, 86)),
    "padded to a strip": ((32, 32), (200, 7), (128, 4)),
}


@pytest.mark.parametrize(("logits_size", "size", "input_size"), SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("detail", [3, 16])
def test_measured_masks_are_as_if_resized(logits_size, size, input_size, detail):
    logits = smooth_logits(60, *logits_size, detail=detail)
    logits[50] = -1  # empty
    logits[51] = 3  # full
    logits[52] = 0  # at the threshold everywhere
    resized = resize_masks(logits[:, None], size, input_size)[:, 0]
    for threshold, offset, stability in ((0.0, 1.0, 0.7), (0.5, 2.0, 0.3), (0.0, 1.0, 0.0), (-0.2, 0.1, 0.95)):
        expected = (resized > threshold).flatten(1).any(dim=1)
        if stability > 0:
            expected &= calculate_stability_score(resized, threshold, offset) > stability
        good, boxes = measure_masks(logits, size, input_size, threshold, offset, stability)
        assert torch.equal(good, expected)
        assert torch.equal(boxes[good], batched_mask_to_box(resized[good] > threshold))
        assert 0 < good.sum() < len(good) or min(size) < 10


@pytest.mark.parametrize(("logits_size", "size", "input_size"), SIZES.values(), ids=SIZES)
def test_bounds_hold_and_leave_little_open(logits_size, size, input_size):
    """They hold, and they leave next to nothing open; a wrong weight or pixel would show in either."""
    logits = 10 * smooth_logits(60, *logits_size, detail=40)
    resized = resize_masks(logits[:, None], size, input_size)[:, 0]
    thresholds = [1.0, -1.0, 0.0]
    counts, boxes, dense = bound_masks(logits, mask_axes(logits_size, size, input_size, "cpu"), thresholds)
    expected = torch.stack([(resized > threshold).flatten(1).sum(dim=1) for threshold in thresholds])
    assert (counts[0] <= expected)[:, ~dense].all() and (expected <= counts[1])[:, ~dense].all()
    assert (counts[1] - counts[0])[:, ~dense].float().mean() < 0.5
    seen = ~dense & (resized > 0).flatten(1).any(dim=1) & (counts[0] == counts[1]).all(dim=0)
    assert torch.equal(boxes[0, seen], batched_mask_to_box(resized[seen] > 0))
    assert torch.equal(boxes[0, seen], boxes[1, seen])


def test_few_masks_are_resized(monkeypatch):
    """On masks as smooth as a model's. What has to be resized is what the bounds leave open."""
    resized = []
    measure = mask_bounds.measure_resized_masks
    monkeypatch.setattr(
        mask_bounds, "measure_resized_masks", lambda *args: resized.append(len(args[0])) or measure(*args)
    )
    measure_masks(4 * smooth_logits(100, 128, 128, detail=60), (200, 301), (512, 512), 0.0, 1.0, 0.7)
    assert sum(resized) < 10


# ------------------------------------------------------------------------------------------------ the decoder


@pytest.mark.parametrize("multimask_output", [True, False])
@torch.no_grad()
def test_only_confident_masks_are_predicted(model, multimask_output):
    embedding = model.get_image_embeddings(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    points = 64 * torch.rand(1, 11, 2, 2, generator=torch.Generator().manual_seed(1))
    labels = torch.ones(1, 11, 2, dtype=torch.long)
    labels[0, 3:, 1] = -10
    everything = model(
        image_embeddings=embedding, input_points=points, input_labels=labels, multimask_output=multimask_output
    )
    ordered = everything.iou_scores.flatten().sort().values
    threshold = ordered[len(ordered) // 2 :][:2].mean().item()  # between two scores, which may be rounded otherwise
    kept, scores, masks = model.predict_confident(embedding, points, threshold, labels, multimask_output)
    assert torch.equal(kept, everything.iou_scores[0] > threshold)
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(scores, everything.iou_scores[0][kept])
    torch.testing.assert_close(masks, everything.pred_masks[0][kept], rtol=1e-4, atol=1e-4)
    kept, scores, masks = model.predict_confident(embedding, points, 1e9, labels, multimask_output)
    assert not kept.any() and scores.shape == (0,) and masks.shape == (0, 16, 16)


def test_rejected_prompts_are_not_enlarged(model, monkeypatch):
    enlarged = []
    upscale_masks = mask_decoder_fast_efficientsam.upscale_masks

    def count(upscaling, image, filters, grid_size):
        enlarged.append((len(image), filters.shape[1]))
        return upscale_masks(upscaling, image, filters, grid_size)

    monkeypatch.setattr(mask_decoder_fast_efficientsam, "upscale_masks", count)
    embedding = torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    points = 64 * torch.rand(1, 11, 1, 2, generator=torch.Generator().manual_seed(1))
    _, scores, _ = model.predict_confident(embedding, points, -1e9)
    threshold = scores.unflatten(0, (11, 3)).amax(dim=1).median()
    enlarged.clear()
    kept = model.predict_confident(embedding, points, float(threshold))[0]
    assert enlarged == [(1, int(row.sum())) for row in kept if row.any()]
    assert not kept.any(dim=1).all()


# ------------------------------------------------------------------------------------------------ the generator


@pytest.fixture(scope="module")
def bundled() -> EfficientSamModel:
    """Trained weights: their masks are of places and sizes of all kinds, which those of random ones are not."""
    return EfficientSamModel.from_pretrained(bundled_checkpoint(), dtype=torch.float32).eval()


def photo(name: str = "elephant") -> Image.Image:
    image = Image.open(Path(__file__).parents[2] / "examples" / f"{name}.jpg")
    image.thumbnail((240, 240))
    return image


@pytest.mark.slow
@pytest.mark.parametrize("keep_aspect_ratio", [False, True])
@pytest.mark.parametrize("layers", [0, 1])
def test_masks_equal_those_of_the_pipeline(bundled, keep_aspect_ratio, layers):
    processor = EfficientSamImageProcessor(size=128, keep_aspect_ratio=keep_aspect_ratio)
    options = {"pred_iou_thresh": 0.2, "stability_score_thresh": 0.1}
    generator = EfficientSamMaskGenerator(
        bundled, processor, 6, 5, box_nms_thresh=0.6, crop_nms_thresh=0.6, crop_n_layers=layers, **options
    )
    records = generator.generate(photo())
    slow = pipeline("mask-generation", model=bundled, image_processor=processor, device="cpu")
    expected = slow(
        photo(),
        points_per_crop=6,
        points_per_batch=5,
        crops_n_layers=layers,
        crops_nms_thresh=0.6,
        output_bboxes_mask=True,
        **options,
    )
    assert len(records) == len(expected["masks"]) > 5
    for record, mask, score, box in zip(
        records, expected["masks"], expected["scores"], expected["bounding_boxes"].tolist(), strict=True
    ):
        assert np.array_equal(record["segmentation"], mask)
        assert record["predicted_iou"] == pytest.approx(float(score), rel=1e-5)
        x, y, width, height = record["bbox"]
        assert [x, y, x + width, y + height] == box
    assert len({tuple(record["crop_box"]) for record in records}) > layers


def test_records_agree_in_every_output_mode(model):
    processor = tiny.image_processor()
    image = small_image(50, 80)
    options = {"points_per_side": 4, "pred_iou_thresh": 0, "stability_score_thresh": 0}
    masks = EfficientSamMaskGenerator(model, processor, **options).generate(image)
    rles = EfficientSamMaskGenerator(model, processor, output_mode="uncompressed_rle", **options).generate(image)
    strings = EfficientSamMaskGenerator(model, processor, output_mode="coco_rle", **options).generate(image)
    decode = pytest.importorskip("pycocotools.mask").decode
    assert len(masks) == len(rles) == len(strings) > 0
    for mask, rle, string in zip(masks, rles, strings, strict=True):
        segmentation = mask["segmentation"]
        assert segmentation.shape == (50, 80) and segmentation.dtype == bool
        assert mask["area"] == segmentation.sum()
        rows, columns = np.nonzero(segmentation)
        assert mask["bbox"] == [columns.min(), rows.min(), np.ptp(columns), np.ptp(rows)]
        assert mask["crop_box"] == [0, 0, 80, 50]
        ((x, y),) = mask["point_coords"]
        assert (x / 20) % 1 == 0.5 and (y / 12.5) % 1 == 0.5
        assert np.array_equal(rle_to_mask(rle["segmentation"]), segmentation)
        json.dumps(string)
        assert np.array_equal(decode(string["segmentation"]).astype(bool), segmentation)
        assert {k: v for k, v in mask.items() if k != "segmentation"} == {
            k: v for k, v in string.items() if k != "segmentation"
        }
    scores = [mask["predicted_iou"] for mask in masks]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.slow
def test_suppressed_masks_come_back_when_the_better_one_falls(bundled, monkeypatch):
    """With points one by one, a mask may fall to a better one that falls itself later; it is then decoded again."""
    processor = EfficientSamImageProcessor(size=128)
    options = {"pred_iou_thresh": 0, "stability_score_thresh": 0.2, "box_nms_thresh": 0.4, "points_per_side": 12}
    expected = EfficientSamMaskGenerator(bundled, processor, points_per_batch=64, **options).generate(photo("bus"))
    thresholds = []
    predict = bundled.predict_confident
    monkeypatch.setattr(
        bundled,
        "predict_confident",
        lambda embedding, points, threshold, *args, **kwargs: (
            thresholds.append(threshold) or predict(embedding, points, threshold, *args, **kwargs)
        ),
    )
    found = EfficientSamMaskGenerator(bundled, processor, points_per_batch=1, **options).generate(photo("bus"))
    assert len(thresholds) > 12 * 12
    assert len(found) == len(expected) > 5
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one["segmentation"], other["segmentation"])
        assert one["point_coords"] == other["point_coords"]


@pytest.mark.parametrize("layers", [0, 1])
def test_several_images_give_what_each_gives_alone(model, layers):
    processor = tiny.image_processor(keep_aspect_ratio=True)
    options = {"pred_iou_thresh": 0, "stability_score_thresh": 0, "points_per_side": 3, "crop_n_layers": layers}
    generator = EfficientSamMaskGenerator(model, processor, **options)
    images = [
        small_image(70, 91, 0),
        small_image(70, 91, 1),
        small_image(91, 70, 2),
        np.asarray(small_image(64, 64, 3)),
    ]
    encoded = []
    encode = model.get_image_embeddings
    model.get_image_embeddings = lambda pixels: encoded.append(len(pixels)) or encode(pixels)
    try:
        many = list(generator.generate_many(images, batch_size=3))
    finally:
        del model.get_image_embeddings
    assert sum(encoded) == 20 and max(encoded) > 1 if layers else encoded == [2, 1, 1]
    for image, records in zip(images, many, strict=True):
        alone = generator.generate(image)
        assert len(records) == len(alone) > 0
        for one, other in zip(records, alone, strict=True):
            assert (one["segmentation"] != other["segmentation"]).mean() < 0.001


def test_thresholds_are_the_checkpoints_unless_given():
    def thresholds(model, **given):
        generator = EfficientSamMaskGenerator(model, tiny.image_processor(), **given)
        return generator.pred_iou_thresh, generator.stability_score_thresh, generator.stability_score_offset

    model = tiny.model_for_mask_generation()
    assert thresholds(model) == (0.88, 0.95, 1.0)  # segment-anything's
    model.config.mask_generation = {
        "pred_iou_thresh": 0.5,
        "stability_score_thresh": 0.6,
        "stability_score_offset": 0.7,
    }
    assert thresholds(model) == (0.5, 0.6, 0.7)
    assert thresholds(model, pred_iou_thresh=0, stability_score_offset=2.0) == (0, 0.6, 2.0)


def test_nothing_stable_gives_no_records(model):
    generator = EfficientSamMaskGenerator(model, tiny.image_processor(), 2, stability_score_thresh=1)
    assert generator.generate(small_image()) == []


def test_single_masks_and_own_points_are_taken(model):
    processor = tiny.image_processor()
    options = {"pred_iou_thresh": 0, "stability_score_thresh": 0, "box_nms_thresh": 1, "multimask_output": False}
    grid = [np.array([[0.25, 0.5], [1, 0]])]
    records = EfficientSamMaskGenerator(model, processor, point_grids=grid, **options).generate(small_image(40, 80))
    assert 0 < len(records) <= 2
    assert all(record["point_coords"][0] in ([20, 20], [80, 0]) for record in records)


def test_records_have_no_small_regions(model):
    processor = tiny.image_processor()
    options = {"pred_iou_thresh": 0, "stability_score_thresh": 0, "points_per_side": 6}
    before = EfficientSamMaskGenerator(model, processor, **options).generate(small_image())
    after = EfficientSamMaskGenerator(model, processor, min_mask_region_area=60, **options).generate(small_image())
    assert 0 < len(after) <= len(before)
    for record in after:
        assert record["area"] == record["segmentation"].sum()
        assert not remove_small_regions(record["segmentation"], 60, "holes")[1]
    assert sum(remove_small_regions(record["segmentation"], 60, "holes")[1] for record in before) > 0


def test_a_batch_that_does_not_fit_is_halved(model):
    """A batch that does not fit is halved, with a warning, and no point is lost."""
    processor = tiny.image_processor()
    options = {"pred_iou_thresh": 0, "stability_score_thresh": 0, "points_per_side": 6}
    expected = EfficientSamMaskGenerator(model, processor, **options).generate(small_image())
    generator = EfficientSamMaskGenerator(model, processor, points_per_batch=36, **options)
    predict = model.predict_confident

    def fail(embedding, points, *args, **kwargs):
        if points.shape[1] > 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return predict(embedding, points, *args, **kwargs)

    model.predict_confident = fail
    try:
        with pytest.warns(UserWarning, match="points_per_batch=9"):
            found = generator.generate(small_image())
        model.predict_confident = lambda *args, **kwargs: fail(torch.zeros(0), torch.zeros(1, 99))
        with pytest.raises(RuntimeError, match="out of memory"):
            generator.generate(small_image())
    finally:
        del model.predict_confident
    assert [record["area"] for record in found] == [record["area"] for record in expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points_per_side": 0}, "points_per_side must be at least 1"),
        ({"points_per_side": None}, "or give point_grids"),
        ({"points_per_batch": 0}, "points_per_batch must be at least 1"),
        ({"points_per_side": 10**400}, "points_per_side must be at most 1024"),
        ({"crop_n_layers": -1}, "crop_n_layers must be at least 0"),
        ({"crop_n_layers": 7}, "crop_n_layers must be at most 6"),
        ({"crop_n_points_downscale_factor": 0}, "crop_n_points_downscale_factor must be at least 1"),
        ({"min_mask_region_area": -1}, "min_mask_region_area"),
        ({"pred_iou_thresh": 88}, "pred_iou_thresh is compared with an IoU, so it must be at most 1"),
        ({"stability_score_thresh": float("nan")}, "stability_score_thresh"),
        ({"box_nms_thresh": 1.1}, "box_nms_thresh"),
        ({"output_mode": "png"}, "binary_mask, uncompressed_rle, coco_rle"),
        ({"point_grids": [np.zeros((3, 2))], "crop_n_layers": 1}, "must hold 2 grids"),
        ({"point_grids": [np.full((3, 2), 17.0)]}, "from 0 to 1"),
        ({"point_grids": [np.zeros(2)]}, "points \\[n, 2\\]"),
    ],
)
def test_options_out_of_range_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        EfficientSamMaskGenerator(model, tiny.image_processor(), **options)


def test_half_precision_and_a_compiled_encoder_work():
    model, processor = tiny.model_for_mask_generation(), tiny.image_processor()
    options = {"pred_iou_thresh": 0, "stability_score_thresh": 0, "points_per_side": 3}
    expected = EfficientSamMaskGenerator(model, processor, **options).generate(small_image())
    model.vision_encoder.compile(backend="eager")
    compiled = EfficientSamMaskGenerator(model, processor, **options).generate(small_image())
    assert [record["area"] for record in compiled] == [record["area"] for record in expected]
    half = tiny.model_for_mask_generation().to(torch.bfloat16)
    records = EfficientSamMaskGenerator(half, processor, **options).generate(small_image())
    assert len(records) > 0 and all(record["segmentation"].any() for record in records)


# ------------------------------------------------------------------------------------------------ adaptive search


def test_distinct_points_are_in_what_is_small_and_different(monkeypatch):
    """One kind of region, but for three cells of other kinds and a half that changes from cell to cell."""
    embedding = torch.zeros(1, 8, 16, 16)
    embedding[0, :, :, 8:] = tiny.random(8, 16, 8)
    odd = [(2, 3), (9, 1), (13, 6)]  # row, column
    for channel, (row, column) in enumerate(odd):
        embedding[0, channel, row, column] = 2
    points = 256 * torch.from_numpy(build_point_grid(16)).float()
    taken = distinct_points(embedding, points, 0.3)
    assert len(taken) == math.ceil(0.3 * 256) and (taken.diff() > 0).all()
    row, column = taken // 16, taken % 16
    assert {16 * row + column for row, column in odd} <= set(taken.tolist())
    assert (column >= 8).sum() > 2 * (column < 8).sum()

    alike = distinct_points(torch.ones(1, 8, 16, 16), points, 0.25)  # only places differ: points are all over
    assert all(((alike // 16 // 8 == y) & (alike % 16 // 8 == x)).sum() > 8 for y in (0, 1) for x in (0, 1))

    monkeypatch.setattr(point_grids, "POINTS_AT_ONCE", 100)
    parts = distinct_points(embedding, points, 0.3)
    assert [((parts >= start) & (parts < start + 100)).sum() for start in (0, 100, 200)] == [30, 30, 17]


def adaptive_records(model, image, **options) -> list[dict]:
    options = {"pred_iou_thresh": 0, "stability_score_thresh": 0, "box_nms_thresh": 1} | options
    return EfficientSamMaskGenerator(model, tiny.image_processor(), **options).generate(image)


def test_adaptive_search_finds_the_masks_of_the_distinct_points(model):
    image, grid = small_image(64, 64), build_point_grid(12)
    with torch.no_grad():
        embedding = model.get_image_embeddings(tiny.image_processor()(image)["pixel_values"])
    chosen = distinct_points(embedding, torch.from_numpy(64 * grid).float(), mask_generation.ADAPTIVE_SHARE)
    assert len(chosen) == 48
    exact = adaptive_records(model, image, point_grids=[grid[chosen.numpy()]])
    adaptive = adaptive_records(model, image, points_per_side=12, adaptive=True)
    assert len(adaptive) == len(exact) > 100
    prompt = {json.dumps([one["point_coords"], one["predicted_iou"]]): one["segmentation"] for one in exact}
    for one in adaptive:
        segmentation = prompt[json.dumps([one["point_coords"], one["predicted_iou"]])]
        assert np.array_equal(one["segmentation"], segmentation)


def test_adaptive_search_orders_masks_by_confidence_times_stability_in_every_crop(model, monkeypatch):
    whole = adaptive_records(model, small_image(), points_per_side=12, adaptive=True)
    products = np.array([record["predicted_iou"] * record["stability_score"] for record in whole])
    scores = np.array([record["predicted_iou"] for record in whole])
    # Their order is by the stability of the low-resolution masks, which is not quite that of the masks.
    assert (
        (np.diff(products) < 0.05 * np.ptp(products)).mean() > 0.9 > (np.diff(scores) < 0.05 * np.ptp(scores)).mean()
    )
    asked, predict = [], EfficientSamMaskGenerator.predict
    monkeypatch.setattr(
        EfficientSamMaskGenerator, "predict", lambda self, *given: asked.append(len(given[1])) or predict(self, *given)
    )
    adaptive_records(model, small_image(), points_per_side=6, crop_n_layers=1, adaptive=True)
    assert asked == 5 * [math.ceil(36 / 3)]


# ------------------------------------------------------------------------------------------------ memory
