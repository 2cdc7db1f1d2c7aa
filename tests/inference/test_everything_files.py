"""Label maps of a folder run: masks that are decoded one at a time."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from hf_efficientsam.inference.results import RleMasks, draw_label_map


@pytest.mark.parametrize(("count", "dtype"), [(0, np.uint8), (255, np.uint8), (256, np.uint16)])
def test_label_map_takes_16_bits_where_needed(tmp_path, count, dtype):
    masks = np.zeros((20, 30, count), dtype=np.uint8, order="F")
    for i in range(count):
        masks[i // 30, i % 30, i] = 1
    rles = coco_mask.encode(masks) if count else []
    draw_label_map(RleMasks(rles, (20, 30)), [1] * count, (20, 30)).save(tmp_path / "labels.png")
    labels = np.asarray(Image.open(tmp_path / "labels.png"))
    assert labels.dtype == dtype and labels.shape == (20, 30)
    assert labels.ravel().tolist() == [*range(1, count + 1), *[0] * (600 - count)]
