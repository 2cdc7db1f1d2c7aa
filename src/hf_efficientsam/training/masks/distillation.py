"""What a small promptable model learns from a large one: its image embeddings, its decoder, its masks.

MobileSAM (arXiv 2306.14289) lets a new encoder give the teacher's image embeddings, so that the teacher's decoder
reads them. EdgeSAM (arXiv 2312.06660) goes on with the masks: student and teacher answer the same prompts, and new
clicks lie where they disagree; that loop is `InteractiveSegmentation`'s.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch import nn

from hf_efficientsam.model.modeling_efficientsam import MISSING_BOX, PADDING, EfficientSamModel
from hf_efficientsam.training.data.images import normalize

from .batch import MaskViews
from .feature_views import CachedViews, cache_encoded_views, weights_hash
from .input_formats import OUR_FORMAT
from .metrics import most_confident
from .predictors import load_mask_predictor


def embedding_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """
    The mean over cells and channels of (student - teacher)^2 (MobileSAM, arXiv 2306.14289, section 3.2; the first
    phase of EdgeSAM, arXiv 2312.06660, section 3.2), in float32.

    Args:
        student: image embeddings `[B, C, h, w]`.
        teacher: the teacher's on the same grid, row by row, `[B, h * w, C]`.
    """
    return F.mse_loss(student.flatten(2).transpose(1, 2).float(), teacher.float())


class FeatureReconstruction(nn.Module):
    """
    SAMI's task (arXiv 2312.00863, section 3.2) without masking, for encoders that cannot leave patches out: a linear
    layer on every cell of the image embedding gives the teacher's feature there. Called with pixels `[B, 3, H, W]` and
    features `[B, h * w, target_size]`, it returns the mean over cells and channels of (layer - normalised feature)^2,
    each feature being normalised to mean 0 and variance 1 as SAMI's are.

    Args:
        encoder: pixels -> an output with `last_hidden_state` `[B, channels, h, w]`.
        channels: of the image embedding.
        target_size: the teacher's width.
    """

    def __init__(self, encoder: nn.Module, channels: int, target_size: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(channels, target_size)

    def forward(self, pixel_values: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        embeddings = self.encoder(pixel_values).last_hidden_state
        reconstruction = self.head(embeddings.flatten(2).transpose(1, 2)).float()
        return F.mse_loss(reconstruction, F.layer_norm(features.float(), features.shape[-1:], eps=1e-6))


class EmbeddingDistillation(nn.Module):
    """`embedding_loss` of an encoder's embedding of pixels `[B, 3, H, W]` and the teacher's `[B, h * w, channels]`."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return embedding_loss(self.encoder(pixel_values).last_hidden_state, features)


@torch.no_grad()
def take_over_decoder(teacher: nn.Module, student: EfficientSamModel) -> list[str]:
    """
    Copies the weights of the teacher's prompt encoder and mask decoder into the student's, those of the same name and
    shape.

    Returns:
        the names of the student's weights that stay as they were.
    """
    kept = []
    for part in ("prompt_encoder", "mask_decoder"):
        theirs, ours = getattr(teacher, part).state_dict(), getattr(student, part).state_dict()
        fitting = {name: theirs[name] for name in ours if name in theirs and theirs[name].shape == ours[name].shape}
        getattr(student, part).load_state_dict(fitting, strict=False)
        kept += [f"{part}.{name}" for name in ours if name not in fitting]
    return kept


class MaskTeacher:
    """
    A frozen promptable model whose masks are targets. No part of the model that is trained, nor of its checkpoints.

    Args:
        name: directory or Hub name of an EfficientSAM, or of a promptable model of transformers; or: bundled.
        device: to run it on.

    Attributes: `model`, and `size`, the side of its square input in pixels.

    Raises:
        ValueError: if it cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device | str):
        predictor = load_mask_predictor(name, device)
        self.model, self.adapter = predictor.model.requires_grad_(False), predictor.adapter
        self.size = max(predictor.input_size().values())
        self.format = getattr(predictor.processor, "format", OUR_FORMAT)
        with torch.no_grad():  # of one image, for the shapes
            self.embeddings = self.adapter.embed(torch.zeros(1, 3, self.size, self.size, device=device))

    def cache_views(
        self, data: MaskViews, folder: Path, accelerator: Accelerator, num_workers: int = 0
    ) -> CachedViews:
        """Its features of the views of training images, each at its own input size, kept on disk; see
        `feature_views.cache_views`. An image of another shape is squashed to the square, as the student's."""
        options = dataclasses.replace(data.options, image_size=self.size)
        own = MaskViews(data.sources, options, data.noise_size, data.seed, data.views)
        width = sum(level.numel() for level in levels_of(self.embeddings))
        made_by = {"encoder": weights_hash([self.model]), "width": width}
        return cache_encoded_views(self.features, made_by, own, folder, accelerator, num_workers)

    @torch.no_grad()
    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels `[B, 3, size, size]`, normalised as our models take them -> image embeddings, those of all levels in
        one row, `[B, 1, N]`."""
        if (self.format.mean, self.format.std) != (OUR_FORMAT.mean, OUR_FORMAT.std):
            mean, std = (pixel_values.new_tensor(one)[:, None, None] for one in (OUR_FORMAT.mean, OUR_FORMAT.std))
            pixel_values = normalize(pixel_values * std + mean, self.format.mean, self.format.std)
        levels = levels_of(self.adapter.embed(pixel_values))
        return torch.cat([level.flatten(1) for level in levels], dim=1)[:, None]

    @torch.no_grad()
    def masks(
        self, features: torch.Tensor, prompt: dict[str, torch.Tensor], multimask_output: bool, size: int
    ) -> torch.Tensor:
        """
        Its most confident answers to prompts.

        Args:
            features: of the images, see `features`, `[B, 1, N]`.
            prompt: `input_points` `[B, Q, P, 2]`, `input_labels` `[B, Q, P]` and `input_boxes` `[B, Q, 4]` in pixels
                of a square of side `size`, with padding as our model takes it; mask prompts are not passed on, nor
                are background points to a model that takes none.
            multimask_output: choose of its candidates, or take its single mask.
            size: side S of the masks.

        Returns:
            bool `[B, Q, S, S]`.
        """
        scale, boxes, labels = self.size / size, prompt["input_boxes"], prompt["input_labels"]
        given = {
            "input_points": prompt["input_points"] * scale,
            "input_labels": labels if self.adapter.background_points else torch.where(labels == 0, PADDING, labels),
            "input_boxes": torch.where((boxes != MISSING_BOX).any(-1, keepdim=True), boxes * scale, MISSING_BOX),
        }
        levels = iter(features[:, 0].split([level.numel() for level in levels_of(self.embeddings)], dim=1))
        embeddings = recursively_apply(lambda level: next(levels).unflatten(1, level.shape[1:]), self.embeddings)
        return most_confident(self.adapter.decode(embeddings, given, multimask_output), (size, size))[1]


def levels_of(embeddings: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors in what an adapter's `embed` returns."""
    found = []
    recursively_apply(found.append, embeddings)
    return found
