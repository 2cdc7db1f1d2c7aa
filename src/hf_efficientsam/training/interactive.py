"""The task of promptable masks: prompt, decode, loss, correct, decode, loss - on one encoding of each image."""

import torch
import torch.nn.functional as F
from torch import nn

from hf_efficientsam.modeling_efficientsam import MISSING_BOX, PADDING, EfficientSamModel

from .losses import MaskLoss
from .prompts import boxes_from_masks, jitter_boxes, sample_error_points, sample_points


class InteractiveSegmentation(nn.Module):
    """
    A model with its training procedure; the forward returns the losses of a batch.

    The first prompt of each mask is a box (tight half of the time, else jittered as SAM's), or 1 to `max_clicks`
    clicks uniformly inside the mask, or both. A correction adds a click from the error region of the most confident
    mask, and that mask's logits as mask prompt where the model takes them.

    Args:
        model: trained in place.
        loss: applied to each round; the rounds' losses are averaged.
        box_probability, both_probability: shares of prompts that are a box alone, and a box with clicks.
        max_clicks: half of the clicked prompts have one click, the others 2 to this many.
        single_mask_probability: share of steps whose first round asks for one mask, which trains mask token 0.
        corrections: rounds after the first; they ask for one mask, as SAM does for prompts that are hardly ambiguous.
        correction_probability: share of steps that have these rounds.
        loss_stride: masks are compared at this fraction of the input's side. At full size (1) the loss takes longer
            than encoder and decoder together on a CPU; at the decoder's own size (4) small objects lose their shape.
    """

    def __init__(
        self,
        model: EfficientSamModel,
        loss: MaskLoss,
        box_probability: float = 0.5,
        both_probability: float = 0.1,
        max_clicks: int = 4,
        single_mask_probability: float = 0.25,
        corrections: int = 1,
        correction_probability: float = 0.5,
        loss_stride: int = 2,
    ):
        super().__init__()
        self.model, self.loss = model, loss
        self.box_probability, self.both_probability = box_probability, both_probability
        self.max_clicks = max_clicks
        self.single_mask_probability = single_mask_probability
        self.corrections, self.correction_probability = corrections, correction_probability
        self.loss_stride = loss_stride

    def forward(
        self,
        pixel_values: torch.Tensor,
        masks: torch.Tensor,
        valid: torch.Tensor,
        generator: torch.Generator,
        num_prompts: torch.Tensor | float | None = None,
        train_encoder: bool = True,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values: `[B, 3, S, S]`.
            masks: the objects, `[B, Q, S, S]` of 0 and 1.
            valid: `[B, Q]` bool, false for padding.
            generator: CPU source of every random choice.
            num_prompts: what the loss is normalised by; see [`MaskLoss`].
            train_encoder: false leaves the encoder without gradients.

        Returns:
            `loss` to be differentiated, and its parts averaged over the rounds.
        """
        with torch.set_grad_enabled(train_encoder and torch.is_grad_enabled()):
            embeddings = self.model.get_image_embeddings(pixel_values)
        targets = F.avg_pool2d(masks.float(), self.loss_stride) >= 0.5
        valid = valid & targets.flatten(2).any(-1)
        prompt = self.first_prompt(masks, generator)
        single_mask, correct = torch.rand(2, generator=generator).tolist()
        multimask = single_mask >= self.single_mask_probability
        rounds = 1 + (self.corrections if correct < self.correction_probability else 0)
        parts = []
        for number in range(rounds):
            output = self.model(image_embeddings=embeddings, multimask_output=multimask, **prompt)
            result = self.loss(output.pred_masks, output.iou_scores, targets, valid, num_prompts)
            result.pop("best")
            parts.append(result)
            if number + 1 < rounds:
                prompt, multimask = self.corrected(prompt, output, masks, generator), False
        return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}

    def first_prompt(self, masks: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Boxes and clicks in pixels of the masks, with padding where a prompt has none."""
        shape, device = masks.shape[:2], masks.device
        tight = boxes_from_masks(masks)
        jittered = jitter_boxes(tight, masks.shape[-1], generator)
        kind, is_tight, more = torch.rand(3, *shape, generator=generator).to(device)
        boxes = torch.where((is_tight < 0.5)[..., None], tight, jittered)
        boxes = torch.where((kind < self.box_probability + self.both_probability)[..., None], boxes, MISSING_BOX)
        count = torch.where(more < 0.5, 1, 2 + ((2 * more - 1) * (self.max_clicks - 1)).long())
        count = torch.where(kind < self.box_probability, 0, count)
        points = torch.stack([sample_points(masks, generator) for _ in range(self.max_clicks)], dim=2)
        labels = torch.where(torch.arange(self.max_clicks, device=device) < count[..., None], 1, PADDING)
        return {"input_points": points, "input_labels": labels, "input_boxes": boxes}

    @torch.no_grad()
    def corrected(self, prompt: dict, output, masks: torch.Tensor, generator: torch.Generator) -> dict:
        """The prompt with one more click, chosen where the most confident mask is wrong."""
        best = output.iou_scores.argmax(-1)[..., None, None, None]
        logits = output.pred_masks.take_along_dim(best, dim=2)[:, :, 0].float()
        predicted = F.interpolate(logits, size=masks.shape[-2:], mode="bilinear", align_corners=False) > 0
        point, label = sample_error_points(predicted, masks, generator)
        if not self.model.config.prompt_encoder_config.background_points:
            label = torch.where(label == 0, PADDING, label)
        corrected = {
            "input_points": torch.cat([prompt["input_points"], point[:, :, None]], dim=2),
            "input_labels": torch.cat([prompt["input_labels"], label[..., None]], dim=2),
            "input_boxes": prompt["input_boxes"],
        }
        if self.model.config.prompt_encoder_config.mask_prompts:
            corrected["input_masks"] = logits.clamp(-20, 20)  # keeps an overconfident mask from drowning the click
        return corrected
