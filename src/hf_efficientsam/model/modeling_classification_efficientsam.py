"""EfficientSAM's encoder as a classifier of images: pixels -> class token and patches -> layers -> class scores."""

import torch
from torch import nn
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from .configuration_vision_efficientsam import EfficientSamVisionConfig
from .modeling_vision_efficientsam import EfficientSamPreTrainedModel, EfficientSamTokenEncoder


class EfficientSamForImageClassification(EfficientSamPreTrainedModel):
    """
    The vision encoder with a class token, pooling, normalisation and a linear layer.

    The class token goes through the layers whatever the pooling, as in pretraining. `config.classifier_pooling` says
    what is normalised and classified: the mean of the patches (`"mean"`, as MAE fine-tunes) or the class token
    (`"cls"`). A directory of [`EfficientSamForPreTraining`] gives the encoder and its class token to
    `from_pretrained`; one of [`EfficientSamModel`], which has none, the encoder alone, and the class token is new.
    """

    config_class = EfficientSamVisionConfig
    config: EfficientSamVisionConfig
    _auto_class = "AutoModelForImageClassification"
    _auto_classes = ("AutoModelForImageClassification",)
    accepts_loss_kwargs = True

    def __init__(self, config: EfficientSamVisionConfig):
        super().__init__(config)
        self.vision_encoder = EfficientSamTokenEncoder(config, True)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_encoder.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): Normalised pixels, H and W multiples of 16.
            labels (*optional*):
                Class indices `(B,)`, or the probability of each class `(B, num_labels)` as floats, such as mixup
                makes; for both the loss is cross-entropy. With another `config.problem_type` as in transformers.

        Returns:
            `ImageClassifierOutput` with `loss` (if there are labels) and `logits` `(B, num_labels)`.

        Raises:
            ValueError: if the channels or the sides of `pixel_values` do not fit, or the shape of `labels`.
        """
        for name in ("original_sizes", "reshaped_input_sizes"):  # of the processor, for masks alone
            kwargs.pop(name, None)
        loss_kwargs = {name: kwargs.pop(name) for name in ("num_items_in_batch",) if name in kwargs}
        output = self.vision_encoder(pixel_values, **kwargs)
        tokens = output.last_hidden_state
        pooled = tokens[:, 1:].mean(dim=1) if self.config.classifier_pooling == "mean" else tokens[:, 0]
        logits = self.classifier(self.layernorm(pooled))
        return ImageClassifierOutput(
            loss=None if labels is None else self.loss(logits, labels, **loss_kwargs),
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, **kwargs) -> torch.Tensor:
        one_of_many = self.config.problem_type in (None, "single_label_classification") and self.config.num_labels > 1
        if not (one_of_many and labels.is_floating_point()):
            return self.loss_function(labels, logits, self.config, **kwargs)
        if labels.shape != logits.shape:
            raise ValueError(f"labels has shape {tuple(labels.shape)}; probabilities must be {tuple(logits.shape)}.")
        # transformers would take floats for classes of which several may hold at once, and its Trainer counts each
        # number as a label.
        if kwargs.get("num_items_in_batch") is not None:
            kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"] / labels.shape[1]
        return fixed_cross_entropy(logits, labels.to(logits), **kwargs)


__all__ = ["EfficientSamForImageClassification"]
