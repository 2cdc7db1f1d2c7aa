"""Salient object segmentation: a small head on EfficientSAM's image embedding, which is computed anyway.

image embedding -> projection and convolution -> transformer layers on a grid of half the size, for what is salient
depends on the whole image -> convolution on the full grid -> four times the resolution -> logits

Shape letters: B images, C channels, N cells of a grid.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput
from transformers.utils.generic import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .configuration_saliency import EfficientSamSaliencyConfig
from .modeling_vision_efficientsam import (
    EfficientSamMLP,
    EfficientSamPreTrainedModel,
    EfficientSamVisionAttention,
    EfficientSamVisionLayer,
    at_least_float32,
    check_kwargs,
)


@dataclass
class EfficientSamSaliencyOutput(ModelOutput):
    """
    Output of [`EfficientSamSaliencyHead`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): Mean over the images, where labels were given.
        logits (`torch.FloatTensor` of shape `(B, 1, 4 * h, 4 * w)`):
            Over the model input, above 0 where it is more likely salient than not;
            `processor.post_process_masks(..., binarize=False)` brings them to the image.
        hidden_states (`tuple` of `torch.FloatTensor` of shape `(B, N, hidden_size)`, *optional*):
            The input of the first layer and the output of each, with `output_hidden_states=True`. The N cells are
            those of the embedding at half its resolution.
        attentions (`tuple` of `torch.FloatTensor` of shape `(B, heads, N, N)`, *optional*):
            Attention weights of each layer, with `output_attentions=True` and eager attention.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class EfficientSamSaliencyNeighbours(nn.Module):
    """A residual block over a map `[B, C, h, w]`: a 3 x 3 convolution of each channel, normalisation, MLP."""

    def __init__(self, config: EfficientSamSaliencyConfig):
        super().__init__()
        width = config.hidden_size
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = EfficientSamMLP(width, config.intermediate_size, config.hidden_act)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        return grid + self.mlp(self.layernorm(self.conv(grid).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class EfficientSamSaliencyHead(EfficientSamPreTrainedModel):
    """
    Predicts the salient objects of images from their embeddings, of any size. A head fits the encoder that it was
    trained with and is stored in the folder `saliency` of that checkpoint.

    Example:

    ```python
    >>> head = EfficientSamSaliencyHead.from_pretrained(bundled_checkpoint(), subfolder="saliency")
    >>> logits = head(model.get_image_embeddings(pixel_values)).logits
    ```
    """

    config_class = EfficientSamSaliencyConfig
    config: EfficientSamSaliencyConfig
    base_model_prefix = ""
    main_input_name = "image_embeddings"
    _no_split_modules = ["EfficientSamVisionLayer", "EfficientSamSaliencyNeighbours"]
    _can_record_outputs = {"hidden_states": EfficientSamVisionLayer, "attentions": EfficientSamVisionAttention}

    def __init__(self, config: EfficientSamSaliencyConfig):
        super().__init__(config)
        width = config.hidden_size
        self.projection = nn.Linear(config.input_channels, width)
        self.neighbours_before = EfficientSamSaliencyNeighbours(config)
        self.layers = nn.ModuleList([EfficientSamVisionLayer(config, i) for i in range(config.num_hidden_layers)])
        self.neighbours_after = EfficientSamSaliencyNeighbours(config)
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.upscaling = nn.Linear(width, 16 * config.upscaling_channels)
        self.activation = ACT2FN[config.hidden_act]
        self.classifier = nn.Conv2d(config.upscaling_channels, 1, kernel_size=3, padding=1)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.projection

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        image_embeddings: torch.Tensor,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EfficientSamSaliencyOutput:
        """
        Args:
            image_embeddings (`torch.FloatTensor` of shape `(B, input_channels, h, w)`):
                [`EfficientSamModel.get_image_embeddings`].
            labels (`torch.FloatTensor` of shape `(B, H, W)`, *optional*):
                The salient objects over the model input at any resolution, 0 to 1; averaged to that of the logits.

        Returns:
            [`EfficientSamSaliencyOutput`]

        Raises:
            ValueError: if a shape does not fit.
        """
        check_kwargs(kwargs)
        channels = self.config.input_channels
        if image_embeddings.ndim != 4 or image_embeddings.shape[1] != channels:
            raise ValueError(
                f"image_embeddings has shape {tuple(image_embeddings.shape)}; it must be (B, {channels}, h, w), from "
                "the encoder that the head was trained with."
            )
        size = image_embeddings.shape[-2:]
        cells = self.projection(image_embeddings.to(self.projection.weight.dtype).permute(0, 2, 3, 1))
        cells = F.dropout(cells, self.config.hidden_dropout, self.training)
        grid = self.neighbours_before(cells.permute(0, 3, 1, 2))  # [B, C, h, w]
        half = F.avg_pool2d(grid, kernel_size=2, ceil_mode=True)
        tokens = half.flatten(2).transpose(1, 2)  # [B, N, C]
        for layer in self.layers:
            tokens = layer(tokens, **kwargs)
        half = tokens.transpose(1, 2).unflatten(2, half.shape[-2:])
        grid = grid + F.interpolate(half, size, mode="bilinear", align_corners=False)
        cells = self.layernorm(self.neighbours_after(grid).permute(0, 2, 3, 1))
        fine = F.pixel_shuffle(self.upscaling(cells).permute(0, 3, 1, 2), 4)  # [B, upscaling_channels, 4h, 4w]
        logits = self.classifier(self.activation(fine))
        loss = None if labels is None else saliency_loss(logits, labels)
        return EfficientSamSaliencyOutput(loss=loss, logits=logits)


def saliency_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Binary cross-entropy plus one minus the IoU of the probabilities, of each image, then their mean `()`.

    Args:
        logits: `[B, 1, h, w]`.
        labels: `[B, H, W]` from 0 to 1; averaged to h x w.

    Raises:
        ValueError: if the labels are not B maps.
    """
    if labels.ndim != 3 or len(labels) != len(logits):
        raise ValueError(f"labels has shape {tuple(labels.shape)}; it must be ({len(logits)}, H, W).")
    logits = at_least_float32(logits[:, 0])  # sums over a map lose digits in half precision
    labels = F.adaptive_avg_pool2d(labels.to(logits.dtype), logits.shape[-2:])
    probabilities = logits.sigmoid()
    overlap = (probabilities * labels).sum((1, 2))
    union = (probabilities + labels).sum((1, 2)) - overlap
    return F.binary_cross_entropy_with_logits(logits, labels) + (1 - (overlap + 1) / (union + 1)).mean()


__all__ = ["EfficientSamSaliencyHead", "EfficientSamSaliencyOutput"]
