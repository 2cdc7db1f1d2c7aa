"""Configurations of EfficientSAM: prompt encoder, mask decoder, whole model.

The defaults are EfficientSAM-Ti. EfficientSAM-S differs in the vision encoder alone: `hidden_size=384` and
`num_attention_heads=6`.
"""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .configuration_sami import EfficientSamSamiConfig
from .configuration_vision_efficientsam import EfficientSamAutoVisionConfig, EfficientSamVisionConfig


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
            log-spaced from 1/4 to 16 cycles per half side, with which small boxes are learnt much faster.
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
            Prompts of an image that the fast decoder (float32) decodes at a time, on a CPU at most 2. Bounds the
            memory of many prompts; does not change the numbers.
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


def around_backbone(vision_config: dict | PreTrainedConfig | str | None) -> dict | PreTrainedConfig | None:
    """The `vision_config` of [`EfficientSamConfig`], in which a backbone other than ours has its neck around it."""
    if isinstance(vision_config, str):
        # As EfficientViT-SAM (arXiv 2402.05008) does: the last three of a timm model's stages.
        vision_config = {"model_type": "timm_backbone", "backbone": vision_config, "out_indices": [-3, -2, -1]}
    is_dict = isinstance(vision_config, dict)
    model_type = vision_config.get("model_type") if is_dict else getattr(vision_config, "model_type", None)
    if is_dict and model_type == EfficientSamAutoVisionConfig.model_type:
        return EfficientSamAutoVisionConfig(**vision_config)
    if model_type is None or model_type.startswith(EfficientSamConfig.model_type):
        return vision_config
    return EfficientSamAutoVisionConfig(backbone_config=vision_config)


# Segment everything, as segment-anything does it where a checkpoint says nothing else.
MASK_GENERATION = {"pred_iou_thresh": 0.88, "stability_score_thresh": 0.95, "stability_score_offset": 1.0}


@strict
class EfficientSamConfig(PreTrainedConfig):
    r"""
    The whole model: [`EfficientSamModel`].

    Args:
        vision_config (`dict`, `PreTrainedConfig` or `str`, *optional*):
            Vision encoder: [`EfficientSamVisionConfig`], the plain ViT; or the configuration of any other backbone
            that `AutoBackbone` knows, or the name of a timm model, which become an [`EfficientSamAutoVisionConfig`].
        prompt_encoder_config (`dict` or [`EfficientSamPromptEncoderConfig`], *optional*): Prompt encoder.
        mask_decoder_config (`dict` or [`EfficientSamMaskDecoderConfig`], *optional*): Mask decoder.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.
        mask_generation (`dict`, *optional*):
            The thresholds that suit these weights when everything in an image is segmented: `pred_iou_thresh`,
            `stability_score_thresh` and `stability_score_offset`, each segment-anything's default (0.88, 0.95, 1.0) if
            not given. [`EfficientSamMaskGenerator`] starts from them; a pipeline is given them:
            `pipe(image, **pipe.model.config.mask_generation)`.

    Example:

    ```python
    >>> from hf_efficientsam import EfficientSamConfig, EfficientSamModel

    >>> config = EfficientSamConfig(vision_config={"hidden_size": 384, "num_attention_heads": 6})  # EfficientSAM-S
    >>> model = EfficientSamModel(config)

    >>> from transformers import ConvNextConfig

    >>> config = EfficientSamConfig(vision_config=ConvNextConfig(out_features=["stage2", "stage3", "stage4"]))
    >>> model = EfficientSamModel(config)
    ```
    """

    model_type = "efficientsam"
    _auto_class = "AutoConfig"
    sub_configs_defaults = {
        "vision_config": EfficientSamVisionConfig,
        "prompt_encoder_config": EfficientSamPromptEncoderConfig,
        "mask_decoder_config": EfficientSamMaskDecoderConfig,
    }

    vision_config: dict | PreTrainedConfig | str | None = None
    prompt_encoder_config: dict | PreTrainedConfig | None = None
    mask_decoder_config: dict | PreTrainedConfig | None = None
    initializer_range: float = 0.02
    mask_generation: dict | None = None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        # A SAMI directory gives its encoder; the rest of its config is that of the decoder it leaves behind.
        if config_dict.get("model_type") == EfficientSamSamiConfig.model_type:
            config_dict = {"vision_config": config_dict["vision_config"]}
        return config_dict, kwargs

    def __post_init__(self, **kwargs):
        self.vision_config = around_backbone(self.vision_config)
        super().__post_init__(**kwargs)
        given = self.mask_generation or {}
        if unknown := given.keys() - MASK_GENERATION:
            raise ValueError(
                f"mask_generation has {', '.join(MASK_GENERATION)}, and not {', '.join(sorted(unknown))}; correct it."
            )
        self.mask_generation = MASK_GENERATION | {name: float(value) for name, value in given.items()}
        widths = {
            "vision_config.output_channels": self.vision_config.output_channels,
            "prompt_encoder_config.hidden_size": self.prompt_encoder_config.hidden_size,
            "mask_decoder_config.hidden_size": self.mask_decoder_config.hidden_size,
        }
        if len(set(widths.values())) != 1:
            raise ValueError(f"The three parts must agree in width, set them to one value: {widths}.")


__all__ = ["EfficientSamConfig", "EfficientSamMaskDecoderConfig", "EfficientSamPromptEncoderConfig"]
