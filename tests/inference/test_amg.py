"""Helpers of the mask generator under segment-anything's names."""

import numpy as np

from hf_efficientsam.inference.amg import build_all_layer_point_grids, remove_small_regions


def test_grids_are_cell_centres_and_thin_out_with_the_layer():
    grids = build_all_layer_point_grids(4, 3, 2)
    assert [len(grid) for grid in grids] == [16, 4, 1, 1]
    assert grids[1].tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]


def test_small_holes_and_islands_are_removed():
    mask = np.zeros((20, 30), dtype=bool)
    mask[2:15, 2:15] = True
    mask[5:7, 5:7] = False  # a hole of 4
    mask[18, 28] = mask[19, 29] = True  # an island of 2, by a corner
    filled, changed = remove_small_regions(mask, 5, "holes")
    assert changed and filled[5:7, 5:7].all() and filled.sum() == mask.sum() + 4
    assert not remove_small_regions(mask, 4, "holes")[1]
    cleaned, changed = remove_small_regions(mask, 3, "islands")
    assert changed and not cleaned[18:].any() and cleaned.sum() == mask.sum() - 2
    assert not remove_small_regions(mask, 2, "islands")[1]
    largest, changed = remove_small_regions(mask, 10_000, "islands")
    assert changed and np.array_equal(largest, cleaned)
