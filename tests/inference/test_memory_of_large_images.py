"""Large images, and many points, are worked on in parts."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from hf_efficientsam import SegmentationResult
from hf_efficientsam.inference import amg, drawing, mask_bounds, results
from hf_efficientsam.inference.results import RleMasks, mask_rles
from hf_efficientsam.model import image_reading_efficientsam, mask_operations_efficientsam

# One process for all, as its imports take longer than the rest. Its peak counts from what it holds as the work begins.
GROWTH = """
import json, re, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np, tiny, torch
from PIL import Image
from hf_efficientsam import EfficientSamImageProcessor, EfficientSamMaskGenerator, EfficientSamPredictor
from hf_efficientsam.inference.segment_files import Segmenter
from hf_efficientsam.model.mask_operations_efficientsam import calculate_stability_score, resize_masks
torch.set_num_threads(1)

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

def growth(call):
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    call()
    return peak() - before

image = np.zeros((4000, 5000, 3), dtype=np.uint8)
image[1000:3000, 1000:4000] = 200
process = growth(lambda: tiny.processor(256)(image))

segmenter, path = Segmenter(EfficientSamPredictor(tiny.model(), tiny.processor()), True), Path(sys.argv[2])
Image.new("RGB", (2500, 2000)).save(path)
boxes = [{"points": [], "labels": [], "box": [100.0, 100.0, 1500.0, 1500.0 - i]} for i in range(13)]
segmenter(path, boxes[:1], None, None)
one, all_boxes = (growth(lambda: segmenter(path, boxes[:count], None, None)) for count in (1, 13))

logits = tiny.random(1, 1, 16, 16) - 0.5
calculate_stability_score(resize_masks(logits, (100, 100), None)[0], 0.0, 0.1)
masks = resize_masks(logits, (4000, 5000), None)[0]
stability = growth(lambda: calculate_stability_score(masks, 0.0, 0.1))

def search(points_per_side):
    options = {"pred_iou_thresh": 0, "stability_score_thresh": 0}
    processor, model = EfficientSamImageProcessor(size=256), tiny.model_for_mask_generation()
    generator = EfficientSamMaskGenerator(model, processor, points_per_side, 256, **options)
    assert generator.generate(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))

few, many = (growth(lambda: search(points_per_side)) for points_per_side in (16, 40))
options = {"pred_iou_thresh": 0, "stability_score_thresh": 0.01, "output_mode": "coco_rle"}
everything = EfficientSamMaskGenerator(tiny.model_for_mask_generation(), tiny.image_processor(), 2, **options)
coarse = Image.fromarray(np.random.default_rng(0).integers(0, 255, (7, 9, 3), dtype=np.uint8))
everything.generate(coarse.resize((90, 70)))
photograph = coarse.resize((8000, 6000))
whole = growth(lambda: everything.generate(photograph)[0])
found = {"stability": stability, "search": many - few, "everything": whole}
print(json.dumps({"process": process, "segment": all_boxes - one, **found}))
"""


@pytest.fixture(scope="module")
def growth(tmp_path_factory) -> dict[str, float]:
    """MiB by which a process grows at most as it processes, segments, measures stability, and finds everything."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    command = [sys.executable, "-c", GROWTH, Path(__file__).parents[1], tmp_path_factory.mktemp("large") / "image.png"]
    return json.loads(subprocess.run([*map(str, command)], env=environment, stdout=subprocess.PIPE, check=True).stdout)


@pytest.mark.slow
def test_an_image_of_twenty_megapixels_is_never_in_float32_as_a_whole(growth):
    """That alone would take 229 MiB."""
    assert growth["process"] < 200


@pytest.mark.slow
def test_masks_of_many_objects_are_not_kept_as_pixels(growth):
    """The masks of 12 objects more, with three candidates each, would take 172 MiB."""
    assert growth["segment"] < 100


@pytest.mark.slow
def test_the_pixels_of_a_stable_mask_are_counted_without_eight_bytes_each(growth):
    """These would take 153 MiB."""
    assert growth["stability"] < 80


@pytest.mark.slow
def test_memory_does_not_grow_with_points(growth):
    """The 4800 candidates of 1600 points have 75 MiB of logits, those of 256 points 12 MiB."""
    assert growth["search"] < 20


@pytest.mark.slow
def test_everything_has_neither_image_nor_mask_as_a_whole(growth):
    """At 48 megapixels the image as an array would take 137 MiB, a mask in float32 183 and as bool 46."""
    assert growth["everything"] < 120


def peak_bytes(call) -> int:
    """What numpy held at most during a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_downloads_decode_one_mask_at_a_time():
    masks = np.zeros((40, 500, 600), dtype=bool)
    masks[:, 100:300, 50:400] = True
    numbers = np.ones(40, np.float32)
    rles = RleMasks(mask_rles(masks), masks.shape[1:])
    result, plain = (
        SegmentationResult(one, numbers, numbers, np.zeros((40, 4), np.float32), ["object"] * 40)
        for one in (rles, masks)
    )
    image = Image.new("RGB", (600, 500))
    for outputs in (
        lambda of: of.coco("a.jpg"),
        lambda of: of.label_map().tobytes(),
        lambda of: of.union().tobytes(),
        lambda of: of.cut_out(image).tobytes(),
        lambda of: drawing.draw_masks(image, of.masks).tobytes(),
        lambda of: results.boxes_from_masks_np(of.masks).tolist(),
    ):
        assert outputs(result) == outputs(plain)
    # A drawing needs floats of a million pixels at a time, whatever the number of masks.
    assert peak_bytes(lambda: (result.coco("a.jpg"), result.label_map(), result.union())) < masks.nbytes / 4
    np.testing.assert_array_equal(np.asarray(rles), masks)
    np.testing.assert_array_equal(np.asarray(rles[1:3]), masks[1:3])


def test_small_regions_are_removed_with_less_than_eight_bytes_a_pixel(monkeypatch):
    mask = np.zeros((1000, 2000), dtype=bool)
    mask[100:900, 100:1900] = True
    mask[500, 500] = mask[500, 1700] = False
    mask[950:952, 3:6] = True
    monkeypatch.setattr(amg, "PIXELS_AT_ONCE", 2**14)
    assert peak_bytes(lambda: amg.remove_small_regions(mask, 5, "holes")) < 8 * mask.size
    filled, changed = amg.remove_small_regions(mask, 5, "holes")
    removed, changed = amg.remove_small_regions(filled, 7, "islands")
    assert changed and removed.sum() == 800 * 1800 and filled.sum() == 800 * 1800 + 6
    assert amg.remove_small_regions(removed, 7, "islands") == (removed, False)


def test_in_parts_results_are_those_in_one(monkeypatch):
    logits = 10 * tiny.random(2, 3, 16, 20) - 5
    mask = np.hypot(*np.mgrid[-40:60, -50:60]) < 30
    image = Image.fromarray(np.uint8(tiny.random(100, 110, 3, scale=255).numpy()))

    def answers() -> list[np.ndarray]:
        enlarged = tiny.image_processor().post_process_masks([logits], [(300, 200)], [(60, 75)])[0]
        seen = tiny.image_processor()(image)["pixel_values"]
        measured = mask_bounds.measure_masks(logits.flatten(0, 1), (300, 200), (64, 80), 0.0, 1.0, 0.1)
        return [np.asarray(one) for one in (enlarged, *measured, seen, drawing.draw_masks(image, [mask]))]

    expected = answers()
    for module in (drawing, mask_bounds, image_reading_efficientsam, mask_operations_efficientsam):
        monkeypatch.setattr(module, "PIXELS_AT_ONCE", 500)
    for ours, theirs in zip(answers(), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert expected[1].any() and torch.equal(torch.from_numpy(expected[0]).any(), torch.tensor(True))
