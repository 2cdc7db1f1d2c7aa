"""Configuration of EfficientSAM: vision encoder, prompt encoder, mask decoder, and the whole.

The defaults are EfficientSAM-Ti. EfficientSAM-S differs in the vision encoder alone: `hidden_size=384` and
`num_attention_heads=6`.
"""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class EfficientSamVisionConfig(PreTrainedConfig):
    r"""
    The plain ViT that turns an image into an embedding grid.

    Args:
        hidden_size (`int`, defaults to 192): Width of the transformer; 384 in EfficientSAM-S.
        intermediate_size (`int`, *optional*): Width inside the MLPs; four times `hidden_size` if not given.
        num_hidden_layers (`int`, defaults to 12): Number of transformer layers.
        num_attention_heads (`int`, defaults to 3): Attention heads a layer; 6 in EfficientSAM-S.
        num_channels (`int`, defaults to 3): Colour channels of the image.
        image_size (`int`, defaults to 1024):
            Native input side in pixels: what converted processors resize to. The model itself takes any height and
            width that are multiples of `patch_size`.
        patch_size (`int`, defaults to 16): Side of a patch in pixels.
        pretrain_image_size (`int`, defaults to 224):
            Side in pixels of the pretraining images, which fixes the position table to
            `1 + (pretrain_image_size / patch_size)**2` rows, the first of them the pretraining class token's.
        output_channels (`int`, defaults to 256): Channels of the image embedding.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLPs.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of every layer normalisation.
        attention_dropout (`float`, defaults to 0.0): Dropout of the attention weights in training.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.
    """

    base_config_key = "vision_config"
    model_type = "efficientsam_vision_model"

    hidden_size: int = 192
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 3
    num_channels: int = 3
    image_size: int = 1024
    patch_size: int = 16
    pretrain_image_size: int = 224
    output_channels: int = 256
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} cannot be split over {self.num_attention_heads} attention heads; "
                "choose num_attention_heads so that it divides hidden_size."
            )
        for name in ("image_size", "pretrain_image_size"):
            if getattr(self, name) % self.patch_size:
                raise ValueError(f"{name} {getattr(self, name)} must be a multiple of patch_size {self.patch_size}.")
        super().__post_init__(**kwargs)


@strict
class EfficientSamPromptEncoderConfig(PreTrainedConfig):
    r"""
    Turns points, boxes and masks into embeddings.

    Args:
        hidden_size (`int`, defaults to 256): Width of the prompt tokens; equals the image embedding's channels.
        num_prompt_slots (`int`, defaults to 6):
            Prompts with fewer tokens than this (a point is one token, a box two) are filled up with padding tokens,
            which take part in attention as they do in the official model. Prompts with more keep all of theirs.
        background_points (`bool`, defaults to `False`):
            Adds an embedding for label 0 (background), which the official model lacks.
        mask_prompts (`bool`, defaults to `False`):
            Adds an encoder for mask prompts, which the official model lacks.
        mask_input_channels (`int`, defaults to 16): Channels inside the mask prompt encoder.
        position_init (`str`, defaults to `"gaussian"`):
            How a new model's Fourier frequencies start (checkpoints bring their own): `"gaussian"` as in Segment
            Anything, normal with one cycle per half image side; `"axes"`, half of them along x and half along y,
            log-spaced from 1/4 to 16 cycles per half side, from which small boxes are learnt much faster.
        hidden_act (`str`, defaults to `"gelu"`): Activation inside the mask prompt encoder.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of its layer normalisations.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.
    """

    base_config_key = "prompt_encoder_config"
    model_type = "efficientsam_prompt_encoder"

    hidden_size: int = 256
    num_prompt_slots: int = 6
    background_points: bool = False
    mask_prompts: bool = False
    mask_input_channels: int = 16
    position_init: str = "gaussian"
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.position_init not in ("gaussian", "axes"):
            raise ValueError(f"position_init is {self.position_init!r}; it must be 'gaussian' or 'axes'.")
        super().__post_init__(**kwargs)


@strict
class EfficientSamMaskDecoderConfig(PreTrainedConfig):
    r"""
    The two-way transformer that turns an image embedding and prompt tokens into masks and their predicted IoU.

    Args:
        hidden_size (`int`, defaults to 256): Width of the tokens on both sides.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLPs, the upscaling and both heads.
        mlp_dim (`int`, defaults to 2048): Width inside the MLPs.
        num_hidden_layers (`int`, defaults to 2): Number of two-way layers.
        num_attention_heads (`int`, defaults to 8): Heads of every attention.
        attention_downsample_rate (`int`, defaults to 2): Factor by which cross-attention narrows `hidden_size`.
        num_multimask_outputs (`int`, defaults to 3): Candidate masks with `multimask_output=True`.
        upscaling_channels (`list[int]`, defaults to `[64, 32]`): Channels after each doubling of the mask grid.
        iou_head_depth (`int`, defaults to 3): Linear layers in the IoU head.
        iou_head_hidden_dim (`int`, defaults to 256): Width inside the IoU head.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of every normalisation.
        prompts_per_chunk (`int`, defaults to 8):
            Prompts of an image that are decoded at a time where no gradients are needed. Bounds the memory of many
            prompts; does not change the numbers.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.
    """

    base_config_key = "mask_decoder_config"
    model_type = "efficientsam_mask_decoder"

    hidden_size: int = 256
    hidden_act: str = "gelu"
    mlp_dim: int = 2048
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    attention_downsample_rate: int = 2
    num_multimask_outputs: int = 3
    upscaling_channels: list[int] | tuple[int, ...] = (64, 32)
    iou_head_depth: int = 3
    iou_head_hidden_dim: int = 256
    layer_norm_eps: float = 1e-5
    prompts_per_chunk: int = 8
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        self.upscaling_channels = list(self.upscaling_channels)  # what JSON gives back
        super().__post_init__(**kwargs)


@strict
class EfficientSamConfig(PreTrainedConfig):
    r"""
    The whole model: [`EfficientSamModel`].

    Args:
        vision_config (`dict` or [`EfficientSamVisionConfig`], *optional*): Vision encoder.
        prompt_encoder_config (`dict` or [`EfficientSamPromptEncoderConfig`], *optional*): Prompt encoder.
        mask_decoder_config (`dict` or [`EfficientSamMaskDecoderConfig`], *optional*): Mask decoder.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.

    Example:

    ```python
    >>> from hf_efficientsam import EfficientSamConfig, EfficientSamModel

    >>> config = EfficientSamConfig(vision_config={"hidden_size": 384, "num_attention_heads": 6})  # EfficientSAM-S
    >>> model = EfficientSamModel(config)
    ```
    """

    model_type = "efficientsam"
    sub_configs_defaults = {
        "vision_config": EfficientSamVisionConfig,
        "prompt_encoder_config": EfficientSamPromptEncoderConfig,
        "mask_decoder_config": EfficientSamMaskDecoderConfig,
    }

    vision_config: dict | PreTrainedConfig | None = None
    prompt_encoder_config: dict | PreTrainedConfig | None = None
    mask_decoder_config: dict | PreTrainedConfig | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        widths = {
            "vision_config.output_channels": self.vision_config.output_channels,
            "prompt_encoder_config.hidden_size": self.prompt_encoder_config.hidden_size,
            "mask_decoder_config.hidden_size": self.mask_decoder_config.hidden_size,
        }
        if len(set(widths.values())) != 1:
            raise ValueError(f"The three parts must agree in width, set them to one value: {widths}.")


__all__ = [
    "EfficientSamConfig",
    "EfficientSamMaskDecoderConfig",
    "EfficientSamPromptEncoderConfig",
    "EfficientSamVisionConfig",
]
