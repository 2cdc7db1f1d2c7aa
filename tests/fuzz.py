"""
What hypothesis makes for the test_robustness.py of each folder: images, prompts and whatever else may come in.

Whatever it is, there must be a result of the right form or a clear error. It is the same in every run;
`FUZZ_EXAMPLES=2000 pytest -k robustness` makes so many new ones for each test, to look for more.
"""

import math
import os

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image

FUZZ_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))


def examples(number: int):
    return settings(
        max_examples=FUZZ_EXAMPLES or number,
        derandomize=not FUZZ_EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


NUMBERS = st.one_of(
    st.integers(-12, 40),
    st.floats(-12, 40, width=32),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 1e300, -1e300, 10**400, 2**63, 1e-300, True, -0.0]),
)
NOTHING = st.sampled_from([None, "", "here", b"bytes", {}, {"x": 1}, object(), 1j, range(2)])
DTYPES = "bool uint8 int8 uint16 int16 uint32 int64 uint64 float16 float32 float64 longdouble complex64 U3 object"
MODES = "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I F I;16 I;16B"
ANYTHING = st.recursive(st.one_of(NUMBERS, NOTHING), lambda inner: st.lists(inner, max_size=4), max_leaves=12)


@st.composite
def arrays(draw, shapes):
    """NumPy's and torch's."""
    pixels = st.sampled_from([0, 1, 0.5, 100, 255, -1, 256, 65535, 7e4, 1e30, math.nan, math.inf])
    values = np.array(draw(st.lists(pixels, min_size=1, max_size=2)))
    with np.errstate(all="ignore"):
        array = np.resize(values, draw(shapes)).astype(draw(st.sampled_from(DTYPES.split())))
    is_torch = array.dtype.kind in "buifc" and array.dtype != np.longdouble and draw(st.booleans())
    return torch.from_numpy(array) if is_torch else array


@st.composite
def pictures(draw):
    size = draw(st.sampled_from([(1, 1), (1, 9), (300, 2), (17, 23), (99, 99)]))
    return Image.new(draw(st.sampled_from(MODES.split())), size, draw(st.sampled_from([0, 1])))


SHAPES = st.one_of(
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 9, 20]), max_size=5),
    st.sampled_from([(9, 7), (9, 7, 3), (3, 9, 7), (1, 9, 7), (9, 7, 4), (2, 9, 7, 3), (20, 40, 3)]),
)
ONE_IMAGE = st.one_of(arrays(SHAPES), pictures(), NOTHING, NUMBERS)
IMAGES = st.one_of(ONE_IMAGE, st.lists(ONE_IMAGE, max_size=3))


def nested(leaf, depth: int):
    for _ in range(depth):
        leaf = st.lists(leaf, max_size=4)
    return leaf


COORDINATE = st.one_of(st.integers(0, 9), NUMBERS)
POINT = st.one_of(st.just([3, 4]), st.lists(COORDINATE, min_size=2, max_size=2))
BOX = st.one_of(st.just([1, 1, 6, 5]), st.lists(COORDINATE, min_size=4, max_size=4), st.none(), st.just([]))
LABEL = st.sampled_from([1, 0, -1, -10])
KINDS = {
    "points": [nested(POINT, 2), nested(POINT, 1), arrays(st.sampled_from([(1, 1, 2), (2, 3, 2)])), ANYTHING],
    "labels": [nested(LABEL, 2), nested(NUMBERS, 2), nested(NUMBERS, 1), arrays(SHAPES), ANYTHING],
    "boxes": [nested(BOX, 1), BOX, arrays(st.sampled_from([(1, 4), (2, 4)])), ANYTHING],
    "masks": [arrays(st.sampled_from([(1, 16, 16), (2, 16, 16), (1, 3, 5), (1, 0, 0)])), ANYTHING],
}
KINDS = {name: st.one_of(kinds) for name, kinds in KINDS.items()}


@st.composite
def prompts(draw):
    """Of one image: points, labels, boxes and masks, some of them."""
    chosen = draw(st.sets(st.sampled_from(list(KINDS)), min_size=1))
    return {name: draw(KINDS[name]) for name in KINDS if name in chosen}
