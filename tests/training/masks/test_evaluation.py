import pytest
import torch
from model_answers import BOXES, HEIGHT, MASKS, WIDTH, Answers
from PIL import Image
from pycocotools import mask as rle_codec

from hf_efficientsam import EfficientSamImageProcessor, EfficientSamProcessor
from hf_efficientsam.model.mask_operations_efficientsam import boxes_from_masks
from hf_efficientsam.training.data.coco import Sample
from hf_efficientsam.training.masks import evaluation
from hf_efficientsam.training.masks.clicks import MAX_CLICKS, random_clicks
from hf_efficientsam.training.masks.evaluation import (
    BOUNDARY,
    CLICKS,
    PREDICTED_IOU,
    ImageBatches,
    Record,
    boundary_ious,
    calibration_errors,
    candidate_ious,
    evaluate_image,
    mean_ious,
    num_clicks,
    numbers_of_clicks,
)
from hf_efficientsam.training.masks.metrics import filled_box

AREAS = [60, 128, 1]
PROMPTS = ["box", "click1", "click3"]


def sample(*order):
    rles = [rle_codec.encode(MASKS[i].byte().numpy().copy("F")) for i in order]
    return Sample(Image.new("RGB", (WIDTH, HEIGHT)), rles, 1, [10 + i for i in order], "test")


def evaluate(answers, sample, prompts, seed=0, **options):
    ious, areas = evaluate_image({"model": answers}, sample, prompts, seed=seed, **options)
    trivial = ("baseline", "filled_box", "ellipse")
    assert all(model == (None if prompt in trivial else "model") for model, prompt, _ in ious)
    return {row[1:]: values for row, values in ious.items()}, areas


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


def test_perfect_and_empty_answers():
    ious, areas = evaluate(Answers(lambda mask: mask[None].repeat(3, 1, 1)), sample(0, 1, 2), PROMPTS, seed=0)
    assert areas.tolist() == AREAS
    assert set(ious) == {
        *(("box", answer) for answer in ("confident", "best", "single", PREDICTED_IOU)),
        *((prompt, answer) for prompt in ("click1", "click3") for answer in ("confident", "best", PREDICTED_IOU)),
        *((row, BOUNDARY) for row in (*PROMPTS, "filled_box", "ellipse")),
        ("baseline", "filled_box"),
        ("baseline", "ellipse"),
    }
    trivial = ("ellipse", PREDICTED_IOU)
    assert all(values.tolist() == [1, 1, 1] for row, values in ious.items() if not set(row) & set(trivial))
    nothing = Answers(lambda mask: torch.zeros(3, HEIGHT, WIDTH, dtype=torch.bool))
    ious, _ = evaluate(nothing, sample(0, 1, 2), PROMPTS, seed=0)
    shown = ("confident", "best", "single")
    assert all(values.tolist() == [0, 0, 0] for row, values in ious.items() if row[1] in shown)
    assert all(ious[prompt, BOUNDARY].tolist() == [0, 0, 0] for prompt in PROMPTS)


def test_answers_by_hand():
    def candidates(mask):
        box = boxes_from_masks(mask)
        left, top, right, bottom = box.tolist()
        left_half = torch.tensor([left, top, (left + right) / 2, bottom])
        doubled = torch.tensor([left, top, right, 2 * bottom - top])
        return torch.stack([filled_box(part, HEIGHT, WIDTH) for part in (left_half, box, doubled)])

    ious, _ = evaluate(Answers(candidates), sample(0, 1), PROMPTS, seed=0)
    for prompt in PROMPTS:
        assert ious[prompt, "confident"].tolist() == pytest.approx([1 / 2, 1 / 2])
        assert ious[prompt, "best"].tolist() == pytest.approx([1, 1])
    assert ious["box", "single"].tolist() == pytest.approx([1 / 2, 1 / 2])


def test_what_is_asked():
    answers = Answers(lambda mask: mask[None])
    evaluate(answers, sample(1, 0), PROMPTS, seed=3)
    kinds = [(multimask, boxes is None, points is None) for multimask, boxes, points, _, _ in answers.asked]
    assert kinds == [(True, False, True), (False, False, True), (True, True, False), (True, True, False)]
    assert torch.equal(answers.asked[0][1], BOXES[[1, 0]])
    one, three = answers.asked[2][2], answers.asked[3][2]
    assert one.shape == (2, 1, 2) and three.shape == (2, 3, 2)
    assert torch.equal(three[:, :1], one)
    assert torch.equal(three[0], random_clicks(MASKS[1], 3, 3, 11))


def test_boxes_only():
    ious, _ = evaluate(Answers(lambda mask: mask[None]), sample(0), ["box"], seed=0)
    assert ("box", "confident") in ious and not any(row[0].startswith("click") for row in ious)


@pytest.mark.parametrize("pixels", [1, 2 * HEIGHT * WIDTH])
def test_masks_of_a_large_image_are_taken_a_few_at_a_time(monkeypatch, pixels):
    answers = Answers(lambda mask: mask[None])
    expected, areas = evaluate(answers, sample(2, 0, 1), PROMPTS, seed=0)
    calls = len(answers.asked)
    monkeypatch.setattr(evaluation, "PIXELS_AT_ONCE", pixels)
    ious, few_areas = evaluate(answers, sample(2, 0, 1), PROMPTS, seed=0)
    assert len(answers.asked) - calls > calls
    assert ious.keys() == expected.keys() and all(torch.equal(ious[row], expected[row]) for row in ious)
    assert torch.equal(few_areas, areas)


def test_each_model_is_asked_for_the_same():
    one, other = Answers(lambda mask: mask[None]), Answers(lambda mask: ~mask[None])
    ious, _ = evaluate_image({"one": one, "other": other}, sample(0, 1), PROMPTS)
    for (multimask, *first), (_, *second) in zip(one.asked, other.asked, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None), multimask
    assert ious["one", "box", "confident"].tolist() == [1, 1]
    assert ious["other", "box", "confident"].tolist() == [0, 0]


def test_answers_to_clicks_on_errors():
    perfect = Answers(lambda mask: mask[None].repeat(3, 1, 1))
    ious, _ = evaluate(perfect, sample(0, 1, 2), PROMPTS, clicks="error")
    assert set(ious) >= {("click1", "confident"), ("click3", "best"), ("box", "single")}
    trivial = ("ellipse", PREDICTED_IOU)
    assert all(values.tolist() == [1, 1, 1] for row, values in ious.items() if not set(row) & set(trivial))


def test_clicks_are_counted_if_asked_for():
    perfect = Answers(lambda mask: mask[None])
    assert not any(row[1] == CLICKS for row in evaluate(perfect, sample(0, 1), ["box"])[0])
    ious, _ = evaluate(perfect, sample(0, 1), ["box"], count_clicks=True, prompts_at_once=1)
    assert ious["85", CLICKS].tolist() == ious["90", CLICKS].tolist() == [1, 1]


# ------------------------------------------------------------------------------------------ reading and averaging


class Dataset:
    def __len__(self):
        return 5

    def __getitem__(self, index):
        if not 0 <= index < 5:
            raise IndexError(index)
        return Sample(Image.new("RGB", (8, 8 + index)), [], index, [], "dataset")


class Shards:
    shards = ["a", "b"]

    def read(self, shard):
        for index in range(3):
            yield "key", Sample(Image.new("RGB", (8, 8)), [], 10 * (shard + 1) + index, [], "shard")


def image_ids(batches):
    return [[item.sample.image_id for item in batch] for batch in batches]


def test_batches():
    processors = [EfficientSamProcessor(EfficientSamImageProcessor(size=size)) for size in (16, 32)]
    batches = ImageBatches([Dataset(), Shards()], processors, batch_size=2)
    everything = list(batches)
    assert image_ids(everything) == [[0, 1], [2, 3], [4], [10, 11], [12], [20, 21], [22]]
    item = everything[1][1]
    assert item.sample.image is None
    assert [image.pixel_values.shape for image in item.inputs] == [(3, 16, 16), (3, 32, 32)]
    assert item.inputs[0].original_size == (11, 8)
    assert batches.find(item.place).image_id == 3 and batches.find(item.place).image.size == (8, 11)
    assert batches.find(everything[-1][0].place).image_id == 22
    assert batches.num_images is None and ImageBatches([Dataset()], [], 2).num_images == 5


def test_batches_are_dealt_whole():
    sources = [Dataset(), Shards()]
    everything = sorted(image_ids(ImageBatches(sources, [], 2)))
    parts = [ImageBatches(sources, [], 2, process_index=process, num_processes=3) for process in range(3)]
    assert sorted(batch for part in parts for batch in image_ids(part)) == everything
    assert all(image_ids(part) for part in parts)
    workers = torch.utils.data.DataLoader(ImageBatches(sources, [], 2), batch_size=None, num_workers=2)
    assert sorted(image_ids(workers)) == everything


def test_limit_is_of_each_source():
    batches = ImageBatches([Dataset(), Shards()], [], 2, limit=1)
    assert image_ids(batches) == [[0], [10], [20]]


def test_calibration_errors_are_those_of_the_most_confident_candidate():
    rows = {("a", "box", "confident"): [0.5, 1.0], ("a", "box", PREDICTED_IOU): [0.75, 1.0]}
    other = {("a", "box", "confident"): [0.0], ("a", "box", PREDICTED_IOU): [0.5]}
    records = [Record((0, 0), "s", [10, 2000], rows), Record((0, 1), "s", [20], other)]
    assert calibration_errors(records, "a", ["box"]) == {"box": 0.25}
    rows[None, "baseline", "ellipse"] = [0.5, 0.5]
    assert list(mean_ious(records[:1], "a", ["box"])["box"]) == ["confident"]  # a score is no mask's IoU


def test_numbers_of_clicks_by_hand():
    rows = {("a", "85", CLICKS): [1.0, 20.0], ("a", "90", CLICKS): [3.0, float("inf")]}
    other = {("a", "85", CLICKS): [3.0], ("a", "90", CLICKS): [float("inf")]}
    records = [Record((0, 0), "s", [10, 2000], rows), Record((0, 1), "s", [20], other)]
    numbers = numbers_of_clicks(records, "a")
    assert numbers["85"]["all"] == {"mean": 8.0, "count": 3, "failed": 0.0}
    assert numbers["90"]["all"] == {"mean": pytest.approx(43 / 3), "count": 3, "failed": pytest.approx(2 / 3)}
    assert numbers["90"]["medium"] == {"mean": MAX_CLICKS, "count": 1, "failed": 1.0}


def test_boundary_ious_of_prompts_and_baselines():
    rows = {("a", "box", BOUNDARY): [0.5], (None, "filled_box", BOUNDARY): [0.25], (None, "ellipse", BOUNDARY): [0.75]}
    means = boundary_ious([Record((0, 0), "s", [10], rows)], "a", ["box"])
    assert {name: one["all"]["mean"] for name, one in means.items()} == {
        "box": 0.5, "filled_box": 0.25, "ellipse": 0.75
    }  # fmt: skip


def test_mean_ious():
    rows = {
        ("a", "box", "best"): [0.5, 1.0],
        ("b", "box", "best"): [0, 0],
        (None, "baseline", "ellipse"): [0.25, 0.75],
    }
    other = {("a", "box", "best"): [0.0], ("b", "box", "best"): [1.0], (None, "baseline", "ellipse"): [0.5]}
    records = [Record((0, 0), "s", [10, 2000], rows), Record((0, 1), "s", [20], other)]
    results = mean_ious(records, "a", ["box"])
    assert list(results) == ["box", "baseline"]
    assert results["box"]["best"] == {
        "all": {"miou": 0.5, "count": 3},
        "small": {"miou": 0.25, "count": 2},
        "medium": {"miou": 1.0, "count": 1},
    }
    assert results["baseline"]["ellipse"]["all"] == {"miou": 0.5, "count": 3}
