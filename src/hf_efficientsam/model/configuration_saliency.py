"""Configuration of the saliency head."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class EfficientSamSaliencyConfig(PreTrainedConfig):
    r"""
    A small head that finds the salient objects in an image embedding: [`EfficientSamSaliencyHead`].

    Args:
        input_channels (`int`, defaults to 256): Channels of the image embedding.
        hidden_size (`int`, defaults to 96): Width of its transformer layers.
        intermediate_size (`int`, *optional*): Width inside their MLPs; twice `hidden_size` if not given.
        num_hidden_layers (`int`, defaults to 2): Number of layers.
        num_attention_heads (`int`, defaults to 4): Attention heads a layer.
        upscaling_channels (`int`, defaults to 8): Channels of the map at four times the embedding's resolution.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLPs and of the upscaling.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of every layer normalisation.
        hidden_dropout (`float`, defaults to 0.0): Dropout of the narrowed embedding in training.
        attention_dropout (`float`, defaults to 0.0): Dropout of the attention weights in training.
        drop_path_rate (`float`, defaults to 0.0): Stochastic depth in training, as the encoder's.
        initializer_range (`float`, defaults to 0.05): Standard deviation of the initial weights.
    """

    model_type = "efficientsam_saliency"
    _auto_class = "AutoConfig"

    input_channels: int = 256
    hidden_size: int = 96
    intermediate_size: int | None = None
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    upscaling_channels: int = 8
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.05

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 2 * self.hidden_size
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} cannot be split over {self.num_attention_heads} attention heads; "
                "choose num_attention_heads so that it divides hidden_size."
            )
        super().__post_init__(**kwargs)


__all__ = ["EfficientSamSaliencyConfig"]
