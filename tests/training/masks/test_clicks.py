import math

import numpy as np
import torch
from model_answers import HEIGHT, MASKS, WIDTH, Answers

from hf_efficientsam.model.mask_operations_efficientsam import boxes_from_masks
from hf_efficientsam.training.masks.clicks import clicks_to_reach, error_rounds, next_click, random_clicks
from hf_efficientsam.training.masks.metrics import filled_box


def test_clicks_depend_on_seed_and_annotation_alone():
    clicks = random_clicks(MASKS[0], 5, seed=0, annotation_id=3)
    assert torch.equal(clicks[:3], random_clicks(MASKS[0], 3, 0, 3))
    assert not torch.equal(clicks, random_clicks(MASKS[0], 5, 1, 3))
    assert not torch.equal(clicks, random_clicks(MASKS[0], 5, 0, 4))
    assert len(clicks.unique(dim=0)) > 1
    x, y = clicks.long().T
    assert MASKS[0][y, x].all()


def mask(*rows):
    return np.array([[pixel == "#" for pixel in row] for row in rows])


NOTHING = mask(*["......."] * 5)
BLOCK = mask(".......", ".#####.", ".#####.", ".#####.", ".......")


def test_next_click_by_hand():
    # The only pixels two away from the background are the three in the middle row; the first of them is taken.
    assert next_click(NOTHING, BLOCK, [], True) == (2, 2, 1)
    assert next_click(NOTHING, BLOCK, [(2, 2)], True) == (3, 2, 1)
    # The image's edge is a boundary: of a full image it is the middle, not a corner.
    assert next_click(mask(*["....."] * 5), mask(*["#####"] * 5), [], True) == (2, 2, 1)


def test_the_deeper_error_is_clicked():
    # Missed: two pixels on the right. Too much: three rows above them.
    predicted = mask("#####..", "#####..", "#####..", ".......", ".......")
    target = mask(".......", ".......", ".......", "......#", "......#")
    assert next_click(predicted, target, [], True) == (1, 1, 0)
    assert next_click(predicted, target, [], False) == (6, 3, 1)  # no clicks beside the object
    # Equally deep: what is missed comes first.
    assert next_click(mask("#.."), mask("..#"), [], True) == (2, 0, 1)


def test_where_nothing_is_wrong_the_object_is_clicked():
    assert next_click(BLOCK, BLOCK, [], True) == (2, 2, 1)
    assert next_click(BLOCK, BLOCK, [(2, 2), (3, 2), (4, 2)], True) == (1, 1, 1)
    too_much = mask(*["#######"] * 5)
    assert next_click(too_much, BLOCK, [(2, 2)], False) == (3, 2, 1)
    dot = mask("..#")
    assert next_click(dot, dot, [(2, 0)], True) == (2, 0, 1)  # no other pixel is left


def test_error_rounds():
    """A model that gives the filled box's left half, as its most confident answer."""

    def candidates(mask):
        left, top, right, bottom = boxes_from_masks(mask).tolist()
        half = torch.tensor([left, top, (left + right) / 2, bottom])
        return torch.stack([torch.zeros_like(mask), filled_box(half, HEIGHT, WIDTH)])

    answers = Answers(candidates)
    rounds = list(error_rounds(answers, MASKS[:2].byte(), [1, 3]))
    assert [count for count, _, _ in rounds] == [1, 3]
    (_, first, _), (_, third, (_, _, logits)) = rounds
    assert first["input_points"].shape == (2, 1, 2) and third["input_points"].shape == (2, 3, 2)
    assert torch.equal(third["input_points"][:, :1], first["input_points"])
    assert "input_masks" not in first and torch.equal(third["input_masks"], logits[:, 1])
    assert (third["input_labels"] == 1).all()
    # MASKS[0] is 10 x 6 from (2, 3): three deep from (4, 5) on; its right half is 5 x 6 from (7, 3).
    assert third["input_points"][0, :2].tolist() == [[4, 5], [9, 5]]
    without = Answers(candidates, mask_prompts=False)
    assert all("input_masks" not in given for _, given, _ in error_rounds(without, MASKS[:2].byte(), [3]))


# ------------------------------------------------------------------------------------------ numbers of clicks


class Improving(Answers):
    """Answers to K clicks with a mask of which K tenths are shown, for masks ten pixels wide; the least of its two
    candidates is whole."""

    def __call__(self, multimask_output=True, input_points=None, input_labels=None, input_masks=None):
        self.asked.append(input_points)
        left, top, _, bottom = boxes_from_masks(MASKS[0]).tolist()
        part = filled_box(torch.tensor([left, top, left + input_points.shape[1], bottom]), HEIGHT, WIDTH) & MASKS[0]
        masks = torch.stack([MASKS[0], part]).expand(len(input_points), -1, -1, -1)
        return masks, torch.tensor([[0.0, 1.0]]).expand(len(input_points), -1), masks * 2.0 - 1


def test_clicks_to_reach_perfect_degenerate_and_by_hand():
    perfect = Answers(lambda mask: mask[None])
    assert clicks_to_reach(perfect, MASKS.byte(), [0.85, 0.9]).tolist() == [[1, 1]] * 3
    assert len(perfect.asked) == 1  # nobody goes on clicking
    nothing = Answers(lambda mask: torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool))
    assert clicks_to_reach(nothing, MASKS.byte(), [0.85, 0.9]).tolist() == [[math.inf] * 2] * 3
    assert len(nothing.asked) == 20
    # Eight clicks are IoU 0.8; nine are 0.9, which is enough for 0.9.
    improving = Improving(None)
    assert clicks_to_reach(improving, MASKS[:1].byte(), [0.85, 0.9, 1.0], 9).tolist() == [[9, 9, math.inf]]
    assert [points.shape[1] for points in improving.asked] == list(range(1, 10))
