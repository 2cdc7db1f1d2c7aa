"""Configuration of EfficientSAM: vision encoder, prompt encoder, mask decoder, the whole, and its pretraining.

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
        prompts_per_chunk (`int`, defaults to 32):
            Prompts of an image that are decoded at a time where no gradients are needed, on a CPU at most 2. Bounds
            the memory of many prompts; does not change the numbers.
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
    prompts_per_chunk: int = 32
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

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        # A SAMI directory gives its encoder; the rest of its config is that of the decoder it leaves behind.
        if config_dict.get("model_type") == EfficientSamSamiConfig.model_type:
            config_dict = {"vision_config": config_dict["vision_config"]}
        return config_dict, kwargs

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        widths = {
            "vision_config.output_channels": self.vision_config.output_channels,
            "prompt_encoder_config.hidden_size": self.prompt_encoder_config.hidden_size,
            "mask_decoder_config.hidden_size": self.mask_decoder_config.hidden_size,
        }
        if len(set(widths.values())) != 1:
            raise ValueError(f"The three parts must agree in width, set them to one value: {widths}.")


@strict
class EfficientSamSamiConfig(PreTrainedConfig):
    r"""
    Masked image pretraining: [`EfficientSamForPreTraining`]. The defaults are the paper's SAMI with EfficientSAM-Ti;
    each ablation of the paper is an option.

    Args:
        vision_config (`dict` or [`EfficientSamVisionConfig`], *optional*): The encoder that is pretrained.
        target (`str`, defaults to `"features"`):
            What is reconstructed: `"features"` of a teacher, with a loss over all patches (SAMI), or the image's own
            `"pixels"`, with a loss over the removed patches alone (the baseline MAE, with `decoder_type="all_token"`).
        target_size (`int`, *optional*):
            Channels of the target: the teacher's width, 256 (that of SAM's image embedding) if not given. For pixels
            it is always `num_channels * patch_size**2`.
        target_normalization (`str`, defaults to `"layer_norm"`):
            `"layer_norm"` brings each patch's target to mean 0 and variance 1, so that the loss means the same for
            every teacher (and for pixels, what MAE found best); `"none"` leaves it. The paper does not say.
        loss (`str`, defaults to `"mse"`): `"mse"`, or `"cosine"` for one minus the cosine similarity.
        mask_ratio (`float`, defaults to 0.75): Share of the patches that the encoder does not see, 0 included.
        decoder_type (`str`, defaults to `"cross_attention"`):
            `"cross_attention"` decodes the removed patches alone, which look at the encoder's tokens and at each
            other; `"all_token"` decodes all of them by self-attention, as MAE does.
        decoder_hidden_size (`int`, defaults to 512): Width of the decoder, a multiple of 4 and of the heads.
        decoder_num_hidden_layers (`int`, defaults to 8): Layers of the decoder.
        decoder_num_attention_heads (`int`, defaults to 16): Attention heads a layer.
        decoder_intermediate_size (`int`, *optional*): Width inside its MLPs; four times `decoder_hidden_size` if not
            given.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the initial mask token; `vision_config` has the class token's.
    """

    model_type = "efficientsam_sami"
    sub_configs_defaults = {"vision_config": EfficientSamVisionConfig}

    vision_config: dict | PreTrainedConfig | None = None
    target: str = "features"
    target_size: int | None = None
    target_normalization: str = "layer_norm"
    loss: str = "mse"
    mask_ratio: float | int = 0.75
    decoder_type: str = "cross_attention"
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name, choices in {
            "target": ("features", "pixels"),
            "target_normalization": ("layer_norm", "none"),
            "loss": ("mse", "cosine"),
            "decoder_type": ("cross_attention", "all_token"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {' or '.join(map(repr, choices))}.")
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"mask_ratio is {self.mask_ratio}; it must be at least 0 and less than 1.")
        if self.target == "pixels" and self.mask_ratio == 0:
            raise ValueError("With mask_ratio 0 no pixel is left to reconstruct; raise it, or set target='features'.")
        if self.decoder_hidden_size % 4 or self.decoder_hidden_size % self.decoder_num_attention_heads:
            raise ValueError(
                f"decoder_hidden_size {self.decoder_hidden_size} must be a multiple of 4 and of "
                f"decoder_num_attention_heads {self.decoder_num_attention_heads}."
            )
        if self.vision_config.hidden_size % 4:
            raise ValueError(f"The encoder's hidden_size {self.vision_config.hidden_size} must be a multiple of 4.")
        if self.target == "pixels":
            self.target_size = self.vision_config.num_channels * self.vision_config.patch_size**2
        elif self.target_size is None:
            self.target_size = 256
        if self.decoder_intermediate_size is None:
            self.decoder_intermediate_size = 4 * self.decoder_hidden_size


__all__ = [
    "EfficientSamConfig",
    "EfficientSamMaskDecoderConfig",
    "EfficientSamPromptEncoderConfig",
    "EfficientSamSamiConfig",
    "EfficientSamVisionConfig",
]
