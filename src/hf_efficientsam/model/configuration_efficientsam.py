"""Configurations of EfficientSAM: vision encoder, backbone, prompt encoder, mask decoder, whole model, pretraining.

The defaults are EfficientSAM-Ti. EfficientSAM-S differs in the vision encoder alone: `hidden_size=384` and
`num_attention_heads=6`.
"""

import math
from dataclasses import fields
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig


@strict
class EfficientSamVisionConfig(PreTrainedConfig):
    r"""
    The plain ViT that turns an image into an embedding grid, or with `num_labels` classes into scores:
    [`EfficientSamVisionModel`], [`EfficientSamForImageClassification`].

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
        drop_path_rate (`float`, defaults to 0.0):
            Stochastic depth in training: the probability that a residual branch of the last layer is left out. It
            grows linearly over the layers, from 0 in the first.
        classifier_pooling (`str`, defaults to `"mean"`):
            What [`EfficientSamForImageClassification`] classifies: the `"mean"` of the patch tokens, or the class
            token (`"cls"`).
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.
    """

    base_config_key = "vision_config"
    model_type = "efficientsam_vision_model"
    _auto_class = "AutoConfig"

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
    drop_path_rate: float | int = 0.0
    classifier_pooling: Literal["mean", "cls"] = "mean"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} cannot be split over {self.num_attention_heads} attention heads; "
                "choose num_attention_heads so that it divides hidden_size."
            )
        for name in ("image_size", "pretrain_image_size"):
            if getattr(self, name) % self.patch_size:
                raise ValueError(f"{name} {getattr(self, name)} must be a multiple of patch_size {self.patch_size}.")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate is {self.drop_path_rate}; it must be at least 0 and less than 1.")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if config_dict.get("model_type") == EfficientSamAutoVisionConfig.model_type:
            backbone = config_dict["backbone_config"]["model_type"]
            raise ValueError(
                f"Its vision encoder is not EfficientSAM's plain ViT but a {backbone} backbone; load the whole model "
                "with EfficientSamModel, or the backbone where it came from."
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def size_divisor(self) -> int:
        """What height and width of images must be multiples of."""
        return self.patch_size

    fixed_size = None  # as of [`EfficientSamAutoVisionConfig`]: the plain ViT takes all sizes


@strict
class EfficientSamBackboneConfig(BackboneConfigMixin, EfficientSamVisionConfig):
    r"""
    The vision encoder as a backbone for dense tasks: [`EfficientSamBackbone`]. Options that are not listed here are
    those of [`EfficientSamVisionConfig`]; `from_pretrained` takes them from the directory of any EfficientSAM model,
    a pretraining model included.

    Args:
        window_size (`int`, defaults to 0):
            Side in patches of the windows that most layers attend within; 14 in ViTDet. With 0 every layer has global
            attention.
        global_attention_layers (`list[int]`, *optional*):
            The layers, counted from 0, that have global attention in spite of `window_size`. If not given, ViTDet's:
            the last one of each quarter, so 2, 5, 8 and 11 of 12.
        pyramid_strides (`list[int]`, *optional*):
            Strides in pixels of a simple feature pyramid on the last layer, ascending, out of 4, 8, 16, 32 and 64.
            If not given, the features are the layers' own maps of stride 16.
        pyramid_channels (`int`, defaults to 256): Channels of each level of the pyramid.
        apply_layernorm (`bool`, defaults to `False`):
            Whether each feature map that is taken from a layer passes through a layer normalisation of its own. Not
            so in ViTDet's pyramid.
        out_features (`list[str]`, *optional*):
            Names of the feature maps to return. With a pyramid they are `"stage1"`, `"stage2"`, ..., one for each
            stride; all of them if not given. Without one they are `"stem"` (the first layer's input) and `"stage1"`
            to `"stage12"` (the output of each layer); the last one if not given.
        out_indices (`list[int]`, *optional*): The same as positions in the list of names.

    Example:

    ```python
    >>> from transformers import Mask2FormerConfig
    >>> from hf_efficientsam import EfficientSamBackboneConfig

    >>> backbone_config = EfficientSamBackboneConfig(window_size=16, pyramid_strides=[4, 8, 16, 32])
    >>> config = Mask2FormerConfig(backbone_config=backbone_config)
    ```
    """

    model_type = "efficientsam_backbone"
    _auto_class = "AutoConfig"

    window_size: int = 0
    global_attention_layers: list[int] | tuple[int, ...] | None = None
    pyramid_strides: list[int] | tuple[int, ...] | None = None
    pyramid_channels: int = 256
    apply_layernorm: bool = False
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        # The encoder of a whole model or a SAMI model is a part of its config; a classifier's config is the encoder's.
        config_dict = config_dict.get(cls.base_config_key, config_dict)
        if config_dict.get("model_type") == EfficientSamVisionConfig.model_type:
            config_dict = config_dict | {"model_type": cls.model_type}
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # transformers sets the options of from_pretrained one by one on the finished config, unchecked. So they go in
        # first, and saved names of features are forgotten where other ones follow.
        names = {one.name for one in fields(cls) if not one.name.startswith("_")} | {"out_features", "out_indices"}
        options = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        if options.keys() & {"pyramid_strides", "num_hidden_layers", "out_features", "out_indices"}:
            saved = config_dict.items()
            config_dict = {key: value for key, value in saved if key not in ("out_features", "out_indices")}
        return super().from_dict(config_dict | options, **kwargs)

    def __post_init__(self, **kwargs):
        for name in ("global_attention_layers", "pyramid_strides"):
            if getattr(self, name) is not None:
                setattr(self, name, list(getattr(self, name)))  # what JSON gives back
        if self.pyramid_strides is not None:
            strides = self.pyramid_strides
            if not strides or strides != sorted({4, 8, 16, 32, 64} & set(strides)):
                raise ValueError(f"pyramid_strides is {strides}; choose from 4, 8, 16, 32 and 64, in ascending order.")
            if self.patch_size != 16:
                raise ValueError(f"patch_size is {self.patch_size}; the strides of a pyramid need 16.")
        layers = self.global_attention_layers or []
        if any(not 0 <= layer < self.num_hidden_layers for layer in layers):
            raise ValueError(
                f"global_attention_layers is {layers}; there are layers 0 to {self.num_hidden_layers - 1}."
            )
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if self.pyramid_strides is not None and out_features is None and out_indices is None:
            out_features = self.stage_names
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        super().__post_init__(**kwargs)

    @property
    def stage_names(self) -> list[str]:
        """Of all feature maps that there are to choose from."""
        if self.pyramid_strides is not None:
            return [f"stage{number + 1}" for number in range(len(self.pyramid_strides))]
        return ["stem"] + [f"stage{number + 1}" for number in range(self.num_hidden_layers)]

    @property
    def window_sizes(self) -> list[int]:
        """Of each layer, in patches; 0 where it attends everywhere."""
        depth, everywhere = self.num_hidden_layers, self.global_attention_layers
        if everywhere is None:
            everywhere = [quarter * depth // 4 - 1 for quarter in range(1, 5)]
        return [0 if layer in everywhere else self.window_size for layer in range(depth)]


@strict
class EfficientSamAutoVisionConfig(PreTrainedConfig):
    r"""
    Any backbone of transformers or timm as the vision encoder of [`EfficientSamModel`], in place of the plain ViT.
    [`EfficientSamConfig`] makes it of a backbone's configuration.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of a model that `AutoBackbone` knows; its `out_features` are the maps that the neck fuses.
            The last three stages of ConvNeXt-T if not given.
        image_size (`int`, *optional*):
            Native input side in pixels, a multiple of `size_divisor`; the largest up to 1024 if not given. Hiera takes
            images of its own size alone, which then is this one.
        patch_size (`int`, defaults to 16): Side in pixels of a cell of the image embedding.
        size_divisor (`int`, *optional*):
            Height and width of images must be multiples of this, so that the maps cover the whole image: of
            `patch_size` and of the backbone's largest stride. If not given, that is 32, or a plain ViT's patch size.
        output_channels (`int`, defaults to 256): Channels of the image embedding.
        layer_norm_eps (`float`, defaults to 1e-6): Epsilon of the neck's layer normalisations.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the neck's initial weights.
    """

    base_config_key = "vision_config"
    model_type = "efficientsam_auto_vision_model"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="convnext",
            init_kwargs={"out_features": ["stage2", "stage3", "stage4"]},
        )
    }

    backbone_config: dict | PreTrainedConfig | None = None
    image_size: int | None = None
    patch_size: int = 16
    size_divisor: int | None = None
    output_channels: int = 256
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if isinstance(self.backbone_config, dict) and self.backbone_config.get("model_type") not in CONFIG_MAPPING:
            raise ValueError(
                f"The backbone has the model type {self.backbone_config.get('model_type')!r}, which transformers does "
                "not know; give the configuration of one of its backbones, such as ConvNextConfig, or a timm name."
            )
        super().__post_init__(**kwargs)
        if not isinstance(self.backbone_config, BackboneConfigMixin):
            raise ValueError(
                f"{type(self.backbone_config).__name__} is not the configuration of a backbone; give one whose model "
                "AutoBackbone knows, such as ConvNextConfig or Dinov2Config, or a timm name."
            )
        if self.size_divisor is None:
            self.size_divisor = math.lcm(self.patch_size, 32 if self.is_pyramid else self.backbone_config.patch_size)
        if self.image_size is None:
            self.image_size = self.fixed_size or 1024 // self.size_divisor * self.size_divisor
        if self.fixed_size not in (None, self.image_size):
            raise ValueError(
                f"The backbone takes images of {self.fixed_size} x {self.fixed_size} pixels alone, and image_size is "
                f"{self.image_size}; set image_size and that of the backbone to one value."
            )
        if self.size_divisor % self.patch_size or self.image_size % self.size_divisor:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of size_divisor {self.size_divisor}, and that one "
                f"of patch_size {self.patch_size}."
            )

    @property
    def is_pyramid(self) -> bool:
        """Whether the stages of the backbone have different strides; those of a plain ViT have one."""
        config = self.backbone_config
        return hasattr(config, "depths") or not isinstance(getattr(config, "patch_size", None), int)

    @property
    def fixed_size(self) -> int | None:
        """The only side in pixels that the backbone takes; None where it takes any multiple of `size_divisor`."""
        if self.backbone_config.model_type != "hiera":
            return None
        height, width = self.backbone_config.image_size
        if height != width:
            raise ValueError(f"The backbone takes images of {height} x {width} pixels; give one for square images.")
        return height

    @property
    def num_channels(self) -> int:
        """Colour channels of the image."""
        return self.backbone_config.num_channels


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
            every teacher (for pixels this is what MAE found best); `"none"` leaves the target as it is. The paper
            does not say which.
        loss (`str`, defaults to `"mse"`): `"mse"`, or `"cosine"` for one minus the cosine similarity.
        mask_ratio (`float`, defaults to 0.75): Ratio of patches that the encoder does not see; may be 0.
        decoder_type (`str`, defaults to `"cross_attention"`):
            With `"cross_attention"` only the removed patches are decoded; they attend to the encoder's tokens and to
            each other. With `"all_token"` all patches are decoded by self-attention, as in MAE.
        decoder_hidden_size (`int`, defaults to 512): Width of the decoder, a multiple of 4 and of the heads.
        decoder_num_hidden_layers (`int`, defaults to 8): Layers of the decoder.
        decoder_num_attention_heads (`int`, defaults to 16): Attention heads a layer.
        decoder_intermediate_size (`int`, *optional*): Width inside its MLPs; four times `decoder_hidden_size` if not
            given.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the initial mask token; `vision_config` has the class token's.
    """

    model_type = "efficientsam_sami"
    _auto_class = "AutoConfig"
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
        if self.vision_config.model_type == EfficientSamAutoVisionConfig.model_type:
            raise ValueError(
                "SAMI leaves patches out, which only EfficientSAM's plain ViT can, and vision_config is that of a "
                f"{self.vision_config.backbone_config.model_type} backbone; let it learn the teacher's embeddings or "
                "features without masking, with training/distill.py."
            )
        if self.vision_config.hidden_size % 4:
            raise ValueError(f"The encoder's hidden_size {self.vision_config.hidden_size} must be a multiple of 4.")
        if self.target == "pixels":
            self.target_size = self.vision_config.num_channels * self.vision_config.patch_size**2
        elif self.target_size is None:
            self.target_size = 256
        if self.decoder_intermediate_size is None:
            self.decoder_intermediate_size = 4 * self.decoder_hidden_size


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


__all__ = [
    "EfficientSamAutoVisionConfig",
    "EfficientSamBackboneConfig",
    "EfficientSamConfig",
    "EfficientSamMaskDecoderConfig",
    "EfficientSamPromptEncoderConfig",
    "EfficientSamSaliencyConfig",
    "EfficientSamSamiConfig",
    "EfficientSamVisionConfig",
]
