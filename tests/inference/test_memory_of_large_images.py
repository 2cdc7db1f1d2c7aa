"""Large images are worked on in parts."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from hf_efficientsam.inference import drawing, mask_bounds
from hf_efficientsam.model import image_processing_efficientsam

CODE = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import numpy as np, tiny
processor = tiny.processor(256)
image = np.zeros((4000, 5000, 3), dtype=np.uint8)
image[1000:3000, 1000:4000] = 200
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
processor(image)
print(peak() - before)
"""


@pytest.mark.slow
def test_an_image_of_twenty_megapixels_is_never_in_float32_as_a_whole():
    """That alone would take 229 MiB."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    command = [sys.executable, "-c", CODE, str(Path(__file__).parents[1])]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
    assert float(output) < 200


def test_in_parts_results_are_those_in_one(monkeypatch):
    logits = 10 * tiny.random(2, 3, 16, 20) - 5
    mask = np.hypot(*np.mgrid[-40:60, -50:60]) < 30
    image = Image.fromarray(np.uint8(tiny.random(100, 110, 3, scale=255).numpy()))

    def answers() -> list[np.ndarray]:
        enlarged = tiny.image_processor().post_process_masks([logits], [(300, 200)], [(60, 75)])[0]
        measured = mask_bounds.measure_masks(logits.flatten(0, 1), (300, 200), (64, 80), 0.0, 1.0, 0.1)
        return [np.asarray(one) for one in (enlarged, *measured, drawing.draw_masks(image, [mask]))]

    expected = answers()
    for module in (drawing, mask_bounds, image_processing_efficientsam):
        monkeypatch.setattr(module, "PIXELS_AT_ONCE", 500)
    for ours, theirs in zip(answers(), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert expected[1].any() and torch.equal(torch.from_numpy(expected[0]).any(), torch.tensor(True))
