import math
from dataclasses import replace

import pytest
import tiny
import tiny_peers
import torch

from hf_efficientsam.training.data.images import normalize
from hf_efficientsam.training.masks.distillation import (
    FeatureReconstruction,
    MaskTeacher,
    embedding_loss,
    take_over_decoder,
)
from hf_efficientsam.training.masks.interactive import InteractiveSegmentation, PromptConfig
from hf_efficientsam.training.masks.losses import SAM_LOSS, MaskLoss, dice_loss, focal_loss
from hf_efficientsam.training.masks.metrics import most_confident

SIZE = tiny.SIZE

# ------------------------------------------------------------------------------------------------- losses


def test_the_embedding_loss_is_the_mean_squared_error_cell_by_cell():
    student = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])  # one channel on a grid of 2 x 2
    teacher = torch.tensor([[[1.0], [2.0], [3.0], [0.0]]])  # row by row
    assert embedding_loss(student, teacher).item() == 4.0
    assert embedding_loss(student.half(), teacher).dtype == torch.float32


def test_features_are_reconstructed_from_each_cell_and_normalised():
    class Encoder(torch.nn.Module):
        def forward(self, pixel_values):
            return type("Output", (), {"last_hidden_state": pixel_values})

    task = FeatureReconstruction(Encoder(), 3, 2)
    with torch.no_grad():
        task.head.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]))
        task.head.bias.zero_()
    pixels = torch.zeros(1, 3, 1, 2)
    pixels[0, :, 0, 1] = torch.tensor([3.0, 0, 9.0])
    features = torch.tensor([[[5.0, 1.0], [2.0, 4.0]]])  # normalised: (1, -1) and (-1, 1)
    # Cell 1: (0, 0) against (1, -1); cell 2: (3, 0) against (-1, 1).
    assert task(pixels, features).item() == pytest.approx((1 + 1 + 16 + 1) / 4, rel=1e-5)


def test_dice_and_focal_loss_of_two_pixels_by_hand():
    probability, target = torch.tensor([[0.8, 0.4]]), torch.tensor([[1.0, 0.0]])
    assert dice_loss(probability, target).item() == pytest.approx(1 - (1.6 + 1) / (1.2 + 1 + 1))
    cross_entropy = torch.tensor([[-math.log(0.8), -math.log(0.6)]])
    expected = (0.25 * 0.2**2 * -math.log(0.8) + 0.75 * 0.4**2 * -math.log(0.6)) / 2
    assert focal_loss(probability, cross_entropy, target, 0.25, 2.0).item() == pytest.approx(expected)


def test_edgesams_loss_is_dice_and_plain_cross_entropy():
    logits, target = torch.tensor([[[[[2.0, -1.0]]]]]), torch.tensor([[[[1.0, 0.0]]]])
    loss = MaskLoss(replace(SAM_LOSS, focal_weight=0, dice_weight=5, iou_weight=0, bce_weight=5))
    result = loss(logits, torch.zeros(1, 1, 1), target, torch.tensor([[True]]))
    p = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))]
    bce = -(math.log(p[0]) + math.log(1 - p[1])) / 2
    dice = 1 - (2 * p[0] + 1) / (sum(p) + 1 + 1)
    assert result["bce"].item() == pytest.approx(bce, rel=1e-5)
    assert result["loss"].item() == pytest.approx(5 * dice + 5 * bce, rel=1e-5)


# ------------------------------------------------------------------------------------------------- decoder


def test_a_decoder_is_taken_over_as_far_as_it_fits():
    teacher = tiny.model(mask_decoder={"iou_head_hidden_dim": 16})
    tiny.enlarge_weights(teacher)
    student = tiny.model(vision={"hidden_size": 12})
    encoder = student.vision_encoder.state_dict()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    kept = take_over_decoder(teacher, student)
    assert kept and all(name.startswith("mask_decoder.iou_head.") for name in kept)
    theirs = teacher.state_dict()
    for name, value in student.state_dict().items():
        expected = before if name in kept or name.startswith("vision_encoder.") else theirs
        assert torch.equal(value, expected[name]), name
    assert all(torch.equal(student.vision_encoder.state_dict()[name], value) for name, value in encoder.items())


# ------------------------------------------------------------------------------------------------- teacher


@pytest.fixture
def teacher(tmp_path) -> MaskTeacher:
    """A model at twice the student's size, which answers a box with something."""
    model = tiny.model(vision={"image_size": 2 * SIZE})
    return MaskTeacher(str(tiny.save(tmp_path, model, tiny.processor(2 * SIZE))), "cpu")


def prompts(boxes) -> dict:
    """One prompt a box, without clicks; None: a click at (20, 30)."""
    missing = torch.full((4,), -10.0)
    return {
        "input_boxes": torch.stack([missing if box is None else torch.tensor(box) for box in boxes])[None].float(),
        "input_points": torch.tensor([20.0, 30.0]).expand(1, len(boxes), 1, 2),
        "input_labels": torch.tensor([[[1 if box is None else -1] for box in boxes]]),
    }


def test_the_teacher_answers_in_its_own_pixels_with_its_most_confident_mask(teacher):
    pixel_values = tiny.random(1, 3, 2 * SIZE, 2 * SIZE, scale=4)
    features = teacher.features(pixel_values)
    assert features.shape == (1, 1, 64 * tiny.CHANNELS) and not features.requires_grad
    masks = teacher.masks(features, prompts([(4, 6, 30, 40), None]), True, SIZE)
    given = {
        "input_boxes": torch.tensor([[[8.0, 12, 60, 80], [-10.0] * 4]]),
        "input_points": torch.tensor([[[[40.0, 60.0]], [[40.0, 60.0]]]]),
        "input_labels": torch.tensor([[[-1], [1]]]),
    }
    with torch.no_grad():
        output = teacher.model(pixel_values, **given)
    assert torch.equal(masks, most_confident(output, (SIZE, SIZE))[1]) and masks.dtype == torch.bool


def test_a_teacher_without_background_points_is_not_given_any(tmp_path):
    folder = tiny.save(tmp_path, tiny.official_model(), tiny.processor())
    teacher = MaskTeacher(str(folder), "cpu")
    features = teacher.features(tiny.random(1, 3, SIZE, SIZE))
    given = prompts([None, None])
    two = {**given, "input_points": given["input_points"].repeat(1, 1, 2, 1)}
    with_background = two | {"input_labels": torch.tensor([[[1, 0], [1, 0]]])}
    without = two | {"input_labels": torch.tensor([[[1, -1], [1, -1]]])}
    assert torch.equal(*(teacher.masks(features, one, True, SIZE) for one in (with_background, without)))


@pytest.mark.parametrize("name", list(tiny_peers.PEERS))
def test_peers_are_teachers(name, tmp_path):
    """Prompts of both kinds in one batch are answered as each alone, from pixels in the peer's own normalisation."""
    folder = tiny_peers.save(tmp_path, name)
    teacher = MaskTeacher(str(folder), "cpu")
    pixels = tiny.random(2, 3, teacher.size, teacher.size)
    features = teacher.features(normalize(pixels))
    boxes = [(2, 2, 20, 20), None]
    given = {key: torch.cat([values, values]) for key, values in prompts(boxes).items()}
    answers = teacher.masks(features, given, True, 32)
    with torch.no_grad():
        own = teacher.adapter.embed(normalize(pixels[1:], teacher.format.mean, teacher.format.std))
        for place, box in enumerate(boxes):
            scale = teacher.size / 32
            alone = (
                {"input_boxes": torch.tensor([[box]]) * scale}
                if box
                else {
                    "input_points": torch.tensor([[[[20.0, 30]]]]) * scale,
                    "input_labels": torch.ones(1, 1, 1).long(),
                }
            )
            _, expected = most_confident(teacher.adapter.decode(own, alone, True), (32, 32))
            assert (answers[1, place] != expected[0, 0]).float().mean() < 0.01


# ---------------------------------------------------------------------------------------- prompts in the loop


class Answers:
    """A teacher whose answers are given: one mask `[B, Q, S, S]` a round."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def masks(self, features, prompt, multimask_output, size):
        self.asked.append(prompt)
        return self.answers[len(self.asked) - 1]


def square(start: int, stop: int) -> torch.Tensor:
    mask = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.bool)
    mask[..., start:stop, start:stop] = True
    return mask


def losses(teacher, masks, valid=True, **options) -> tuple[dict, InteractiveSegmentation]:
    model = tiny.one_layer_model(**tiny.EVERY_PROMPT)
    options = PromptConfig(box_probability=1, tight_probability=1, single_mask_probability=0, **options)
    task = InteractiveSegmentation(model, MaskLoss(), options, teacher=teacher)
    noise = tiny.random(1, 1, options.noise_size)
    generator = torch.Generator().manual_seed(0)
    pixel_values = tiny.random(1, 3, SIZE, SIZE)
    return task(pixel_values, masks, torch.tensor([[valid]]), noise, generator), task


def test_targets_are_the_teachers_masks_and_prompts_the_datas():
    data, answer = square(4, 40).byte(), square(20, 60)
    teacher = Answers(answer)
    taught, task = losses(teacher, data, correction_probability=0)
    assert teacher.asked[0]["input_boxes"].flatten().tolist() == [4, 4, 40, 40]
    output = task.model(tiny.random(1, 3, SIZE, SIZE), **teacher.asked[0])
    target = torch.nn.functional.avg_pool2d(answer.float(), 2) >= 0.5
    expected = MaskLoss()(output.pred_masks, output.iou_scores, target, torch.tensor([[True]]))["loss"]
    torch.testing.assert_close(taught["loss"], expected)
    assert taught["loss"].item() != losses(None, data, correction_probability=0)[0]["loss"].item()


def test_new_clicks_lie_where_student_and_teacher_disagree():
    data, answer = square(4, 40).byte(), square(50, 60)
    teacher = Answers(answer, answer)
    _, task = losses(teacher, data, correction_probability=1, corrections=1)
    output = task.model(tiny.random(1, 3, SIZE, SIZE), **teacher.asked[0])
    disagree = most_confident(output, (SIZE, SIZE))[1] ^ answer
    x, y = teacher.asked[1]["input_points"][0, 0, -1].int().tolist()
    label = teacher.asked[1]["input_labels"][0, 0, -1].item()
    assert disagree[0, 0, y, x] and label == int(answer[0, 0, y, x])


def test_a_prompt_that_the_teacher_leaves_empty_teaches_nothing():
    taught, task = losses(Answers(square(0, 0)), square(4, 40).byte(), correction_probability=0)
    assert taught["loss"].item() == 0
    taught["loss"].backward()
    assert all(one.grad is None or not one.grad.any() for one in task.parameters())
