"""Configuration of the vision encoder as a backbone for dense tasks."""

from dataclasses import fields

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin

from .configuration_vision_efficientsam import EfficientSamVisionConfig


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


__all__ = ["EfficientSamBackboneConfig"]
