"""Configuration of SAMI, masked image pretraining."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .configuration_vision_efficientsam import EfficientSamAutoVisionConfig, EfficientSamVisionConfig


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


__all__ = ["EfficientSamSamiConfig"]
