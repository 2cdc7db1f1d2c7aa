import numpy as np
import pytest

from hf_efficientsam.inference.formats.polygons import joined, mask_of_polygons, polygons_of_mask


def mask_of(text):
    return np.array([[character == "#" for character in line] for line in text.split()])


def disc(radius, x, y, size=200):
    rows, columns = np.mgrid[:size, :size] + 0.5
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


RING_IN_RING = disc(90, 100, 100) & ~disc(60, 100, 100) | disc(40, 100, 100) & ~disc(15, 100, 100)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("....  .##.  ....", [[[1, 1], [3, 1], [3, 2], [1, 2]]]),
        ("#.  .#", [[[0, 0], [1, 0], [1, 1], [0, 1]], [[1, 1], [2, 1], [2, 2], [1, 2]]]),  # a corner joins nothing
        ("##  #.", [[[0, 0], [2, 0], [2, 1], [1, 1], [1, 2], [0, 2]]]),
        ("..  ..", []),
    ],
)
def test_corners_are_those_of_the_pixels_clockwise(text, expected):
    polygons = polygons_of_mask(mask_of(text))
    assert len(polygons) == len(expected)
    for polygon, corners in zip(polygons, expected, strict=True):
        start = corners.index(polygon[0].tolist())
        assert polygon.tolist() == corners[start:] + corners[:start]


@pytest.mark.parametrize("density", [0.1, 0.5, 0.8, 0.97])
def test_filling_the_polygons_gives_any_mask_back(density):
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 40, (50, 2)).tolist():
        mask = rng.random((height, width)) < density
        assert np.array_equal(mask_of_polygons(polygons_of_mask(mask), height, width), mask)


def test_a_part_within_the_hole_of_another_is_a_polygon_with_its_own_hole():
    polygons = polygons_of_mask(RING_IN_RING)
    assert len(polygons) == 2
    assert np.array_equal(mask_of_polygons(polygons, 200, 200), RING_IN_RING)
    outer, inner = (mask_of_polygons([polygon], 200, 200) for polygon in polygons)
    assert not (outer & inner).any() and inner.sum() == (disc(40, 100, 100) & ~disc(15, 100, 100)).sum()


def test_a_tolerance_leaves_out_corners_and_keeps_holes():
    exact, simple = polygons_of_mask(RING_IN_RING), polygons_of_mask(RING_IN_RING, tolerance=1.5)
    assert sum(map(len, simple)) < 0.2 * sum(map(len, exact))
    filled = mask_of_polygons(simple, 200, 200)
    assert (filled & RING_IN_RING).sum() / (filled | RING_IN_RING).sum() > 0.95
    assert not filled[100, 100] and not filled[100, 150]


def test_joined_polygons_are_one_polygon_of_the_same_mask():
    mask = disc(30, 50, 50) | disc(20, 150, 60) | disc(25, 90, 150) & ~disc(10, 90, 150)
    polygons = polygons_of_mask(mask)
    assert len(polygons) == 3
    assert np.array_equal(mask_of_polygons([joined(polygons)], 200, 200), mask)
