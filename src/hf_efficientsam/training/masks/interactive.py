"""The task of promptable masks: prompt, decode, loss, correct, decode, loss - on one encoding of each image."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from hf_efficientsam.model.mask_operations_efficientsam import boxes_from_masks
from hf_efficientsam.model.modeling_efficientsam import MISSING_BOX, PADDING
from hf_efficientsam.training.data.synthetic import random_ellipses
from hf_efficientsam.training.engine.config import NotNegativeFloat, NotNegativeInt, PositiveInt, PositiveRatio, Ratio

from .adapters import Answer, SamAdapter, adapt, freeze_batch_norm
from .cell_sampling import (
    cell_losses,
    choose_cells,
    decode_cells,
    noise_of_cells,
    split_into_cells,
    total_cell_loss,
)
from .distillation import MaskTeacher
from .feature_views import encode_rest
from .losses import MaskLoss
from .metrics import most_confident
from .prompts import jitter_boxes, sample_error_points, sample_points


@dataclass(frozen=True)
class PromptConfig:
    """Which prompts a mask gets, and in how many rounds."""

    box_probability: Ratio = field(default=0.5, metadata={"help": "ratio of first prompts that are a box alone"})
    both_probability: Ratio = field(default=0.1, metadata={"help": "ratio that are a box with clicks"})
    tight_probability: Ratio = field(default=0.5, metadata={"help": "ratio of boxes without noise"})
    box_noise: NotNegativeFloat = field(
        default=0.1, metadata={"help": "standard deviation, as a ratio of the box's side"}
    )
    box_noise_pixels: NotNegativeFloat = field(default=20, metadata={"help": "the noise is cut off at so many pixels"})
    max_clicks: PositiveInt = field(
        default=4, metadata={"help": "half of the clicked first prompts have one click, the others 2 to this many"}
    )
    single_mask_probability: Ratio = field(
        default=0.25, metadata={"help": "ratio of steps whose first round predicts one mask, not candidates"}
    )
    corrections: NotNegativeInt = field(
        default=1, metadata={"help": "rounds with a click more, where the last mask was wrong"}
    )
    mask_only_rounds: NotNegativeInt = field(
        default=0, metadata={"help": "rounds without a new click: one is the last, the others anywhere between"}
    )
    correction_probability: Ratio = field(default=0.5, metadata={"help": "ratio of steps that have these rounds"})
    smallest_ellipse: PositiveRatio = field(
        default=0.04, metadata={"help": "of steps on ellipses: their least side, as a ratio of the input's"}
    )
    loss_stride: PositiveInt = field(
        default=2, metadata={"help": "masks are compared at this fraction of the input's side: 4 is the decoder's own"}
    )

    @property
    def noise_columns(self) -> list[int]:
        """How many random numbers decide about a mask's kind of prompt, box, clicks, corrections and ellipse."""
        return [3, 4, self.max_clicks, self.corrections, 4]

    @property
    def noise_size(self) -> int:
        """How many random numbers K a mask needs."""
        return sum(self.noise_columns)


class InteractiveSegmentation(nn.Module):
    """
    A model with its training procedure; the forward returns the losses of a batch.

    The first prompt of each mask is a box, or clicks uniformly inside the mask, or both. Each later round adds a click
    from the error region of the most confident mask (or, without a new click, only goes on), and gives that mask's
    logits back as mask prompt where the model takes them. Later rounds ask for one mask, as SAM does for prompts that
    are hardly ambiguous. SAM's own numbers (arXiv 2304.02643, appendix A): box 0.5, tight 0, 1 click, 8 corrections,
    2 rounds without a click, always.

    Args:
        model: trained in place; ours, or another that `adapt` knows.
        loss: applied to each round; the rounds' losses are averaged.
        options: see [`PromptConfig`]. `loss_stride` 1, the input's size, takes longer than encoder and decoder
            together on a CPU; at the decoder's own size (4) objects below a few pixels lose their shape.
        last_layers: how many layers of our encoder come after the hidden states that `forward` may be given.
        teacher: its answers to the same prompts are the targets, in every round, and new clicks lie where model and
            teacher disagree (EdgeSAM, arXiv 2312.06660); the masks that are given say only where the first prompts
            are. It gets no mask prompts. Where its answer is empty the prompt teaches nothing.

    Raises:
        ValueError: for rounds that only give a mask back, where the model takes none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        loss: MaskLoss,
        options: PromptConfig | None = None,
        last_layers: int = 0,
        teacher: MaskTeacher | None = None,
    ):
        super().__init__()
        self.model, self.loss, self.options = model, loss, options or PromptConfig()
        self.adapter, self.last_layers, self.teacher = adapt(model), last_layers, teacher
        if self.options.mask_only_rounds and not self.adapter.mask_prompts:
            raise ValueError("The model takes no mask prompts; set mask_only_rounds to 0.")

    def train(self, mode: bool = True) -> "InteractiveSegmentation":
        super().train(mode)
        if isinstance(self.adapter, SamAdapter):
            freeze_batch_norm(self.model)
        return self

    def forward(
        self,
        pixel_values: torch.Tensor | None,
        masks: torch.Tensor,
        valid: torch.Tensor,
        noise: torch.Tensor,
        generator: torch.Generator,
        num_prompts: torch.Tensor | float | None = None,
        synthetic: bool = False,
        hidden_states: torch.Tensor | None = None,
        num_cells: int = 0,
        teacher_features: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values: `[B, 3, S, S]`; not used, and may be None, where there are `hidden_states`.
            masks: the objects, `[B, Q, S, S]` of 0 and 1.
            valid: `[B, Q]` bool, false for padding.
            noise: uniform random numbers `[B, Q, K]`, K being the options' `noise_size`: all that is random about a
                mask's prompts.
            generator: CPU source of what the whole step shares; give every process one of the same seed.
            num_prompts: what the loss is normalised by; see [`MaskLoss`].
            synthetic: ask for random ellipses instead of the masks, and leave the encoder without gradients.
            hidden_states: what the frozen layers of the encoder make of the pixels, `[B, N, C]`, if that is known.
            num_cells: one round in which each prompt is decoded on so many cells of the image; 0: on all of them.
                This and `hidden_states` are for our model alone.
            teacher_features: of the teacher, if there is one: its features of the images, `[B, 1, N]`.

        Returns:
            `loss` to be differentiated, and its parts averaged over the rounds.
        """
        single_mask, correct = torch.rand(2, generator=generator).tolist()
        kind, box, clicks, corrections, ellipse = noise.split(self.options.noise_columns, dim=-1)
        if synthetic:
            masks = random_ellipses(ellipse, masks.shape[-1], self.options.smallest_ellipse)
        with torch.set_grad_enabled(not synthetic and torch.is_grad_enabled()):
            embeddings = self.embed(pixel_values, hidden_states)
        prompt = self.first_prompt(masks, kind, box, clicks)
        if num_cells:
            return self.sampled_round(embeddings, prompt, masks, valid, noise, num_prompts, num_cells)
        targets, answered = loss_targets(masks, self.options.loss_stride), valid
        multimask = single_mask >= self.options.single_mask_probability
        later = self.later_rounds(corrections, generator) if correct < self.options.correction_probability else []
        parts, output = [], None
        for click in [None, *later]:
            if output is not None:
                prompt, multimask = self.corrected(prompt, output, masks, click), False
            output = self.adapter.decode(embeddings, prompt, multimask)
            if self.teacher is not None:
                masks = self.teacher.masks(teacher_features, prompt, multimask, masks.shape[-1])
                targets, answered = loss_targets(masks, self.options.loss_stride), valid & masks.flatten(2).any(-1)
            result = self.loss(output.pred_masks, output.iou_scores, targets, answered, num_prompts)
            result.pop("best")
            parts.append(result)
        return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}

    def embed(self, pixel_values: torch.Tensor | None, hidden_states: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The image embeddings that the decoder takes, from the pixels or from what the frozen layers made of them."""
        if hidden_states is None:
            return self.adapter.embed(pixel_values)
        return {"image_embeddings": encode_rest(self.model.vision_encoder, hidden_states, self.last_layers)}

    def sampled_round(
        self,
        embeddings: dict[str, torch.Tensor],
        prompt: dict[str, torch.Tensor],
        masks: torch.Tensor,
        valid: torch.Tensor,
        noise: torch.Tensor,
        num_prompts: torch.Tensor | float | None,
        num_cells: int,
    ) -> dict[str, torch.Tensor]:
        """The losses of a round in which each prompt is decoded on some cells; see `forward`."""
        image_embeddings = embeddings["image_embeddings"]
        grid_size = image_embeddings.shape[-2:]
        decoder = self.model.mask_decoder
        doublings = len(decoder.upscaling.convs)
        stride = masks.shape[-1] // (grid_size[1] * 2**doublings)
        targets = split_into_cells(F.avg_pool2d(masks.float(), stride), grid_size, doublings)
        cells = choose_cells(
            targets.amax(-1).unflatten(-1, grid_size) > 0, num_cells, noise_of_cells(noise, grid_size)
        )
        positions, tokens, multiplicity, dense = self.model.encode_prompts(image_embeddings, **prompt)
        image = decoder.embed_image(image_embeddings, dense)
        logits, scores = decode_cells(decoder, image, positions, tokens, multiplicity, cells)
        areas, threshold = targets.sum((-2, -1)), self.loss.weights.bce_threshold
        parts = cell_losses(logits, cells.gather(targets), cells.weight, areas, threshold)
        is_box = (prompt["input_boxes"] != MISSING_BOX).any(-1)
        return total_cell_loss(parts, scores, is_box, valid, num_prompts, self.loss.weights)

    def later_rounds(self, clicks: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor | None]:
        """For each round after the first the random numbers `[B, Q]` of its click, or None for one without."""
        rounds = list(clicks.unbind(-1))
        if self.options.mask_only_rounds:
            for place in torch.rand(self.options.mask_only_rounds - 1, generator=generator).tolist():
                rounds.insert(int(place * (len(rounds) + 1)), None)
            rounds.append(None)
        return rounds

    def first_prompt(
        self, masks: torch.Tensor, kind: torch.Tensor, box: torch.Tensor, clicks: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Boxes and clicks in pixels of the masks `[B, Q, S, S]`, with padding where a prompt has none. The others
        are uniform random numbers `[B, Q, ...]`, see `PromptConfig.noise_columns`."""
        options, (kind, is_tight, more) = self.options, kind.unbind(-1)
        tight = boxes_from_masks(masks)
        jittered = jitter_boxes(tight, masks.shape[-1], box, options.box_noise, options.box_noise_pixels)
        boxes = torch.where((is_tight < options.tight_probability)[..., None], tight, jittered)
        boxes = torch.where((kind < options.box_probability + options.both_probability)[..., None], boxes, MISSING_BOX)
        count = torch.where(more < 0.5, 1, 2 + ((2 * more - 1) * (options.max_clicks - 1)).long())
        count = torch.where(kind < options.box_probability, 0, count)
        points = [sample_points(masks, one) for one in clicks.unbind(-1)]
        labels = torch.where(torch.arange(options.max_clicks, device=masks.device) < count[..., None], 1, PADDING)
        return {"input_points": torch.stack(points, dim=2), "input_labels": labels, "input_boxes": boxes}

    @torch.no_grad()
    def corrected(self, prompt: dict, output: Answer, masks: torch.Tensor, click: torch.Tensor | None) -> dict:
        """The prompt with the most confident mask, and one more click where that is wrong, chosen by the uniform
        random numbers `click` `[B, Q]`; None: without a click."""
        logits, predicted = most_confident(output, masks.shape[-2:])
        corrected = dict(prompt)
        if click is not None:
            point, label = sample_error_points(predicted, masks, click)
            if not self.adapter.background_points:
                label = torch.where(label == 0, PADDING, label)
            corrected["input_points"] = torch.cat([prompt["input_points"], point[:, :, None]], dim=2)
            corrected["input_labels"] = torch.cat([prompt["input_labels"], label[..., None]], dim=2)
        if self.adapter.mask_prompts:
            corrected["input_masks"] = logits.clamp(-20, 20)  # keeps an overconfident mask from drowning the click
        return corrected


def loss_targets(masks: torch.Tensor, stride: int) -> torch.Tensor:
    """Masks `[B, Q, S, S]` -> bool `[B, Q, S / stride, S / stride]`. Of an object too small to fill half a cell, the
    cells that it fills most: none is lost."""
    filled = F.avg_pool2d(masks.float(), stride)
    return filled >= filled.amax((-2, -1), keepdim=True).clamp(max=0.5)
