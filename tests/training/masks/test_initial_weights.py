"""What an untrained model answers, on random hidden states of the encoder: its neck makes the image embedding."""

import math

import pytest
import tiny
import torch

from hf_efficientsam import EfficientSamConfig, EfficientSamModel
from hf_efficientsam.training.masks.initial_weights import DISC_RADIUS, set_geometric_weights
from hf_efficientsam.training.masks.metrics import mask_iou

PATCH = 16
BOXES = {16: 200, 32: 200, 64: 50}  # by grid: 200 at the largest take long
OTHERS = 40  # clicks and masks


def build(grid, decoder=None, width=256, prompts=None):
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "output_channels": width}
    kinds = {"background_points": True, "mask_prompts": True, "hidden_size": width} if prompts is None else prompts
    config = EfficientSamConfig(
        vision_config={**vision, "image_size": PATCH * grid},
        prompt_encoder_config=kinds,
        mask_decoder_config={"hidden_size": width, **(decoder or {})},
    )
    return EfficientSamModel(config).eval()


class Answers:
    """The masks `[Q, M, 4 grid, 4 grid]` of an untrained model by prompt, and their IoU with what they should be."""

    def __init__(self, grid, **config):
        self.grid, self.model = grid, build(grid, **config)
        set_geometric_weights(self.model)
        generator = torch.Generator().manual_seed(0)
        hidden_states = torch.randn(1, grid * grid, 32, generator=generator)
        with torch.no_grad():
            self.embedding = self.model.vision_encoder.neck(hidden_states, grid, grid)

        count = BOXES[grid]
        sides = torch.empty(count, 2).uniform_(math.log(0.03), math.log(0.9), generator=generator).exp()
        centers = sides / 2 + (1 - sides) * torch.rand(count, 2, generator=generator)
        self.boxes = torch.cat([centers - sides / 2, centers + sides / 2], dim=1)  # as fractions of the side
        self.is_small = sides.prod(dim=1).sqrt() < 0.08
        self.clicks = torch.rand(OTHERS, 2, generator=generator)

    def pixels(self, places):
        """Fractions of the side -> the model frame, whose 0 is the first pixel's centre."""
        return (places * PATCH * self.grid - 0.5)[None]

    @torch.no_grad()
    def masks(self, **prompt):
        return self.model(image_embeddings=self.embedding, **prompt).pred_masks[0] > 0

    def inside_boxes(self):
        at = (torch.arange(4 * self.grid) + 0.5) / (4 * self.grid)
        left, top, right, bottom = self.boxes[..., None].unbind(1)
        return ((at > left) & (at < right))[:, None] & ((at > top) & (at < bottom))[:, :, None]

    def inside_discs(self, clicks):
        at = (torch.arange(4 * self.grid) + 0.5) / (4 * self.grid)
        x, y = (at - clicks[..., None]).unbind(1)
        return (x[:, None] ** 2 + y[:, :, None] ** 2).sqrt() < DISC_RADIUS


@pytest.fixture(scope="module", params=[16, 32, 64])
def answers(request):
    return Answers(request.param)


def test_a_box_is_answered_with_that_box_by_every_mask(answers):
    boxes = answers.inside_boxes()
    candidates = answers.masks(input_boxes=answers.pixels(answers.boxes))
    single = answers.masks(input_boxes=answers.pixels(answers.boxes), multimask_output=False)
    iou = mask_iou(torch.cat([candidates, single], dim=1), boxes[:, None])
    assert iou.shape[1] == 4
    assert iou.mean(0).min() > 0.85
    assert iou[answers.is_small].mean(0).min() > 0.65


def test_a_click_is_answered_with_a_disc(answers):
    masks = answers.masks(input_points=answers.pixels(answers.clicks)[:, :, None])
    assert mask_iou(masks, answers.inside_discs(answers.clicks)[:, None]).mean(0).min() > 0.6


def test_a_mask_prompt_is_answered_with_that_mask(answers):
    wanted = answers.inside_boxes()[:OTHERS] | answers.inside_discs(answers.clicks)
    for logits in (wanted * 20.0 - 10, wanted * 2.0 - 1):
        masks = answers.masks(input_masks=logits[None])
        assert mask_iou(masks, wanted[:, None]).mean(0).min() > 0.6


def test_clicks_answer_with_the_union_of_their_discs_and_background_clicks_cut_into_it():
    answers = Answers(32)
    left, right, between = ([0.3, 0.5], [0.7, 0.5], [0.42, 0.5])
    clicks = answers.pixels(torch.tensor([[left, right, between]]))
    both, cut, nothing = (
        answers.masks(input_points=clicks, input_labels=torch.tensor([[labels]]))[0, 0]
        for labels in ([1, 1, -1], [1, 1, 0], [-1, -1, 0])
    )
    discs = answers.inside_discs(torch.tensor([left, right])).any(0)
    assert mask_iou(both, discs) > 0.8
    assert not nothing.any()
    assert not cut[64, 53] and both[64, 48] and cut[64, 38]  # at the background click; on both sides of the middle
    assert cut.sum() < 0.95 * both.sum()


def test_a_click_corrects_a_mask_prompt():
    answers = Answers(32)
    prompt = torch.full((1, 1, 128, 128), -10.0)
    prompt[..., :64] = 10
    points = answers.pixels(torch.tensor([[[0.8, 0.5], [0.2, 0.5]]]))
    masks = answers.masks(input_points=points, input_labels=torch.tensor([[[1, 0]]]), input_masks=prompt)[0]
    assert masks[:, 64, 102].all()  # a click where the mask was not
    assert not masks[:, 64, 25].any()  # a background click where it was
    assert masks[:, 10, 25].all()


def test_other_widths_and_the_official_kinds_of_prompts_do():
    decoder = {"num_attention_heads": 6, "attention_downsample_rate": 1, "num_hidden_layers": 3}
    answers = Answers(16, width=192, decoder=decoder, prompts={"hidden_size": 192})
    masks = answers.masks(input_boxes=answers.pixels(answers.boxes))
    assert mask_iou(masks, answers.inside_boxes()[:, None]).mean(0).min() > 0.85


def test_the_layout_of_the_checkpoint_stays():
    model, plain = build(16), build(16)
    set_geometric_weights(model)
    layout = {name: (tensor.shape, tensor.dtype) for name, tensor in plain.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()} == layout
    for name, weights in plain.vision_encoder.layers.state_dict().items():
        assert torch.equal(model.vision_encoder.layers.state_dict()[name], weights)


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads"),
        ({"num_attention_heads": 16}, "attention_downsample_rate"),
        ({"upscaling_channels": [8, 4]}, "upscaling_channels"),
        ({"upscaling_channels": [64, 32, 16]}, "upscaling_channels"),
        ({"hidden_act": "tanh"}, "hidden_act"),
    ],
)
def test_a_decoder_that_cannot_is_refused_and_left_as_it_was(decoder, name):
    model = build(16, decoder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=name):
        set_geometric_weights(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_tiny_width_is_refused():
    with pytest.raises(ValueError, match="hidden_size of at least"):
        set_geometric_weights(tiny.one_layer_model())
