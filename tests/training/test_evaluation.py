import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_codec

from hf_efficientsam import EfficientSamImageProcessor, EfficientSamProcessor
from hf_efficientsam.training import evaluation
from hf_efficientsam.training.data.coco import Sample
from hf_efficientsam.training.evaluation import (
    ImagePredictor,
    candidate_ious,
    evaluate_image,
    num_clicks,
    random_clicks,
)
from hf_efficientsam.training.metrics import filled_box
from hf_efficientsam.training.prompts import boxes_from_masks

HEIGHT, WIDTH = 20, 30
BOXES = torch.tensor([[2.0, 3, 12, 9], [14, 0, 30, 8], [20, 10, 21, 11]])
MASKS = filled_box(BOXES, HEIGHT, WIDTH)
AREAS = [60, 128, 1]
PROMPTS = ["box", "click1", "click3"]


def sample(*order):
    rles = [rle_codec.encode(MASKS[i].byte().numpy().copy("F")) for i in order]
    return Sample(Image.new("RGB", (WIDTH, HEIGHT)), rles, 1, [10 + i for i in order], "test")


class Answers:
    """
    Instead of a model: finds out which of MASKS is asked for and answers with `candidates(mask [H,W]) -> [M,H,W]`, of
    which the last is the most confident.
    """

    def __init__(self, candidates):
        self.candidates, self.asked = candidates, []

    def __call__(self, multimask_output=True, input_boxes=None, input_points=None):
        self.asked.append((multimask_output, input_boxes, input_points))
        points = (input_boxes[:, :2] + input_boxes[:, 2:]) / 2 if input_points is None else input_points[:, 0]
        masks = torch.stack([self.candidates(MASKS[MASKS[:, int(y), int(x)]].squeeze(0)) for x, y in points])
        masks = masks if multimask_output else masks[:, :1]
        return masks, torch.linspace(0, 1, masks.shape[1]).expand(masks.shape[:2])


def test_names_of_prompts():
    assert [num_clicks(name) for name in ("box", "click1", "click15")] == [0, 1, 15]
    for name in ("click", "click0", "click-1", "boxes", "point", ""):
        with pytest.raises(ValueError, match="use box, or click1"):
            num_clicks(name)


def test_candidates_by_hand():
    target = torch.zeros(2, 2, 4, dtype=torch.uint8)
    target[:, 0, :2] = 1
    candidates = torch.zeros(2, 3, 2, 4, dtype=torch.bool)
    candidates[0, 0, 0, :2] = True  # perfect
    candidates[0, 1, 0, :] = True  # twice as large: 1/2
    candidates[1, 1, 0, 1:3] = True  # 1 shared of 3; the others are empty
    scores = torch.tensor([[0.3, 0.8, 0.1], [0.9, 0.8, 0.1]])
    confident, best = candidate_ious(candidates, scores, target)
    assert confident.tolist() == pytest.approx([1 / 2, 0])
    assert best.tolist() == pytest.approx([1, 1 / 3])


def test_clicks_depend_on_seed_and_annotation_alone():
    clicks = random_clicks(MASKS[0], 5, seed=0, annotation_id=3)
    assert torch.equal(clicks[:3], random_clicks(MASKS[0], 3, 0, 3))
    assert not torch.equal(clicks, random_clicks(MASKS[0], 5, 1, 3))
    assert not torch.equal(clicks, random_clicks(MASKS[0], 5, 0, 4))
    assert len(clicks.unique(dim=0)) > 1
    x, y = clicks.long().T
    assert MASKS[0][y, x].all()


def test_perfect_and_empty_answers():
    ious, areas = evaluate_image(Answers(lambda mask: mask[None].repeat(3, 1, 1)), sample(0, 1, 2), PROMPTS, seed=0)
    assert areas.tolist() == AREAS
    assert set(ious) == {
        *(("box", answer) for answer in ("confident", "best", "single")),
        *((prompt, answer) for prompt in ("click1", "click3") for answer in ("confident", "best")),
        ("baseline", "filled_box"),
        ("baseline", "ellipse"),
    }
    assert all(values.tolist() == [1, 1, 1] for row, values in ious.items() if row[1] != "ellipse")
    nothing = Answers(lambda mask: torch.zeros(3, HEIGHT, WIDTH, dtype=torch.bool))
    ious, _ = evaluate_image(nothing, sample(0, 1, 2), PROMPTS, seed=0)
    assert all(values.tolist() == [0, 0, 0] for row, values in ious.items() if row[0] != "baseline")


def test_answers_by_hand():
    def candidates(mask):
        box = boxes_from_masks(mask)
        left, top, right, bottom = box.tolist()
        left_half = torch.tensor([left, top, (left + right) / 2, bottom])
        doubled = torch.tensor([left, top, right, 2 * bottom - top])
        return torch.stack([filled_box(part, HEIGHT, WIDTH) for part in (left_half, box, doubled)])

    ious, _ = evaluate_image(Answers(candidates), sample(0, 1), PROMPTS, seed=0)
    for prompt in PROMPTS:
        assert ious[prompt, "confident"].tolist() == pytest.approx([1 / 2, 1 / 2])
        assert ious[prompt, "best"].tolist() == pytest.approx([1, 1])
    assert ious["box", "single"].tolist() == pytest.approx([1 / 2, 1 / 2])


def test_what_is_asked():
    answers = Answers(lambda mask: mask[None])
    evaluate_image(answers, sample(1, 0), PROMPTS, seed=3)
    kinds = [(multimask, boxes is None, points is None) for multimask, boxes, points in answers.asked]
    assert kinds == [(True, False, True), (False, False, True), (True, True, False), (True, True, False)]
    assert torch.equal(answers.asked[0][1], BOXES[[1, 0]])
    one, three = answers.asked[2][2], answers.asked[3][2]
    assert one.shape == (2, 1, 2) and three.shape == (2, 3, 2)
    assert torch.equal(three[:, :1], one)
    assert torch.equal(three[0], random_clicks(MASKS[1], 3, 3, 11))


def test_boxes_only():
    ious, _ = evaluate_image(Answers(lambda mask: mask[None]), sample(0), ["box"], seed=0)
    assert ("box", "confident") in ious and not any(row[0].startswith("click") for row in ious)


@pytest.mark.parametrize("pixels", [1, 2 * HEIGHT * WIDTH])
def test_masks_of_a_large_image_are_taken_a_few_at_a_time(monkeypatch, pixels):
    answers = Answers(lambda mask: mask[None])
    expected, areas = evaluate_image(answers, sample(2, 0, 1), PROMPTS, seed=0)
    calls = len(answers.asked)
    monkeypatch.setattr(evaluation, "PIXELS_AT_ONCE", pixels)
    ious, few_areas = evaluate_image(answers, sample(2, 0, 1), PROMPTS, seed=0)
    assert len(answers.asked) - calls > calls
    assert ious.keys() == expected.keys() and all(torch.equal(ious[row], expected[row]) for row in ious)
    assert torch.equal(few_areas, areas)


@torch.no_grad()
def test_predictor_gives_what_the_model_gives(make_model):
    model = make_model().eval()
    processor = EfficientSamProcessor(EfficientSamImageProcessor(size=64, keep_aspect_ratio=True))
    image = Image.effect_noise((WIDTH, HEIGHT), 90).convert("RGB")
    points = torch.tensor([[[3.0, 4], [9, 9]], [[20, 5], [1, 19]]])
    predict = ImagePredictor(model, processor, image)
    for prompts in ({"input_boxes": BOXES}, {"input_points": points}):
        for multimask in (True, False):
            inputs = processor(images=image, **{name: value[None] for name, value in prompts.items()})
            sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
            output = model(**inputs, multimask_output=multimask)
            masks, scores = predict(multimask_output=multimask, **prompts)
            assert torch.allclose(scores, output.iou_scores[0])
            assert masks.shape == (len(scores), 3 if multimask else 1, HEIGHT, WIDTH)
            assert torch.equal(masks, processor.post_process_masks(output.pred_masks, *sizes)[0])
