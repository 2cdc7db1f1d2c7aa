"""What a vision encoder starts from: pretraining, or a trained ViT's weights (weight selection, arXiv 2311.18823)."""

import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from hf_efficientsam.inference.loading import read_config, resolve_name
from hf_efficientsam.model.configuration_efficientsam import EfficientSamConfig, around_backbone
from hf_efficientsam.model.configuration_vision_efficientsam import (
    EfficientSamAutoVisionConfig,
    EfficientSamVisionConfig,
)
from hf_efficientsam.model.modeling_auto_vision_efficientsam import EfficientSamAutoVisionEncoder
from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel
from hf_efficientsam.model.modeling_vision_efficientsam import EfficientSamVisionEncoder, EfficientSamVisionModel

from .config import PositiveInt, RatioBelowOne


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder that is fine-tuned; the defaults are EfficientSAM-Ti."""

    encoder: str | None = field(
        default=None,
        metadata={"help": "start from this encoder: of sami.py, an EfficientSAM, or: bundled"},
    )
    hidden_size: PositiveInt = field(
        default=192, metadata={"help": "width of a new encoder: 192 (Ti), 384 (S), 768 (B)"}
    )
    num_attention_heads: PositiveInt = field(default=3, metadata={"help": "its heads: 3, 6, 12"})
    num_hidden_layers: PositiveInt = field(default=12, metadata={"help": "its layers"})
    drop_path: RatioBelowOne = field(
        default=0.0, metadata={"help": "ratio of the images that skip the last layer; less in earlier ones"}
    )


def load_around_encoder(model_class: type[PreTrainedModel], name: str, **options) -> tuple[PreTrainedModel, list[str]]:
    """
    A model of a class such as `EfficientSamBackbone` around the encoder of a directory or Hub repository, which may
    be a pretraining (`sami.py`) or any EfficientSAM model. In float32.

    Args:
        model_class: a model with a `vision_encoder`.
        name: the directory or repository; or "bundled", the checkpoint that comes with the package.
        options: for the config, as `from_pretrained` takes them.

    Returns:
        the model, and the names of its weights that are new: what the directory lacks, or has in another size, such
        as the classifier of other classes.

    Raises:
        ValueError: if it cannot be loaded, or weights of the encoder's embeddings or layers would be new.
    """
    options |= {"dtype": torch.float32, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, loading = model_class.from_pretrained(resolve_name(name), **options)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"The encoder {name} cannot be loaded: {' '.join(str(error).split())}") from None
    new = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
    if lacking := [key for key in new if re.match(r"vision_encoder\.(embeddings|layers)\.", key)]:
        raise ValueError(
            f"{name} lacks weights of the encoder, such as {lacking[0]}, or has them in another size; choose another "
            "directory."
        )
    return model, new


def load_encoder(name: str) -> tuple[EfficientSamVisionModel, bool]:
    """
    The encoder of a directory or Hub repository, in float32 and without drop path (a classifier's training may have
    left one), and whether it has a trained neck: pretraining has none.

    Raises:
        ValueError: see `load_around_encoder`.
    """
    encoder, new = load_around_encoder(EfficientSamVisionModel, name, drop_path_rate=0.0)
    return encoder, not new


def read_vision_config(name: str, **options) -> EfficientSamVisionConfig | EfficientSamAutoVisionConfig:
    """
    The configuration of the encoder that a directory or Hub repository holds, for [`EfficientSamConfig`]: of
    `load_encoder` for EfficientSAM's plain ViT, of `load_auto_encoder` for any other backbone.

    Args:
        name: as of these two.
        options: of [`EfficientSamAutoVisionConfig`], for a backbone.

    Raises:
        ValueError: if there is no configuration, or none of an encoder.
    """
    try:
        if name.startswith("timm/"):
            return EfficientSamAutoVisionConfig(**around_backbone(name.removeprefix("timm/")).to_dict() | options)
        stored = read_config(resolve_name(name))
        if not str(stored.get("model_type")).startswith(EfficientSamConfig.model_type):
            return _around_stages(AutoConfig.from_pretrained(name), options)
        if stored.get("vision_config", {}).get("model_type") == EfficientSamAutoVisionConfig.model_type:
            return EfficientSamConfig.from_pretrained(name).vision_config
        return EfficientSamVisionConfig.from_pretrained(resolve_name(name))
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"The encoder {name} cannot be loaded: {' '.join(str(error).split())}") from None


def _around_stages(backbone: PreTrainedConfig, options: dict) -> EfficientSamAutoVisionConfig:
    """Of a pyramid the last three stages, as in EfficientViT-SAM (arXiv 2402.05008), unless some are chosen."""
    if hasattr(backbone, "drop_path_rate"):
        backbone.drop_path_rate = 0.0
    config = EfficientSamAutoVisionConfig(backbone_config=backbone, **options)
    if config.is_pyramid and backbone.out_features == backbone.stage_names[-1:]:
        backbone.out_features = backbone.stage_names[-3:]
    return config


def load_auto_encoder(name: str, **options) -> tuple[EfficientSamAutoVisionEncoder, bool]:
    """
    A backbone other than our plain ViT with a neck around it, in float32, and whether that neck is trained.

    Args:
        name: directory or Hub name of a backbone that transformers knows, without drop path; or "timm/" and the name
            of a timm model, with its weights; or an EfficientSAM with such an encoder, whose neck comes with it.
        options: of [`EfficientSamAutoVisionConfig`].

    Raises:
        ValueError: if it cannot be loaded, or lacks weights.
    """
    config = read_vision_config(name, **options)
    try:
        if not name.startswith("timm/") and read_config(name).get("model_type") == EfficientSamConfig.model_type:
            return EfficientSamModel.from_pretrained(name, dtype=torch.float32).vision_encoder, True
        encoder = EfficientSamAutoVisionEncoder(config)
        kind = type(encoder.backbone)  # AutoBackbone.from_pretrained takes no directories
        if name.startswith("timm/"):
            out_indices = config.backbone_config.out_indices
            loaded, lacking = kind.from_pretrained(name.removeprefix("timm/"), out_indices=out_indices), []
        else:
            loaded, loading = kind.from_pretrained(
                name, config=config.backbone_config, dtype=torch.float32, output_loading_info=True
            )
            # Normalisations of the maps are new where the weights are a classifier's.
            lacking = [key for key in loading["missing_keys"] if "hidden_states_norms" not in key]
        encoder.backbone.load_state_dict(loaded.state_dict())
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"The encoder {name} cannot be loaded: {' '.join(str(error).split())}") from None
    if lacking:
        raise ValueError(f"{name} lacks weights of the encoder, such as {min(lacking)}; choose another directory.")
    return encoder, False


def load_vit(name: str) -> PreTrainedModel:
    """
    The trained ViT of a directory or Hub repository, in float32, for `select_weights`.

    Raises:
        ValueError: if it cannot be loaded.
    """
    try:
        return AutoModel.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"The trained ViT {name} cannot be loaded: {' '.join(str(error).split())}") from None


@torch.no_grad()
def select_weights(teacher: nn.Module, student: EfficientSamVisionEncoder) -> None:
    """
    Copies evenly spaced channels, heads and MLP units of a transformers `Dinov2Model` into `student`.

    The teacher must have as many layers, heads of the same width, and a width that is a multiple of the student's;
    with equal widths this copies everything. Layer scale is folded into the output projections, the patch kernel is
    resampled to the student's patch size (and scaled by the ratio of areas, so that its responses keep their size),
    the position table to the student's pretraining grid. The neck has no counterpart and is left as it is.

    Raises:
        ValueError: if the two do not fit.
    """
    theirs = teacher.config
    if theirs.model_type != "dinov2" or theirs.use_swiglu_ffn or not theirs.qkv_bias:
        raise ValueError(
            f"The teacher is not built like the student (model type {theirs.model_type}); choose a teacher that is a "
            "Dinov2Model with plain MLPs and biases."
        )
    chosen = _Chosen(theirs, theirs.hidden_size * theirs.mlp_ratio, student.config)
    _select_embeddings(teacher, student, chosen.channels)
    for target, source in zip(student.layers, teacher.encoder.layer, strict=True):
        _select_layer(target, source, (source.norm1, source.norm2), chosen)
        _fold_scale(target.attention.o_proj, source.layer_scale1.lambda1[chosen.channels])
        _fold_scale(target.mlp.fc2, source.layer_scale2.lambda1[chosen.channels])


@torch.no_grad()
def select_encoder(teacher: EfficientSamVisionEncoder, student: EfficientSamVisionEncoder) -> None:
    """
    As `select_weights`, from an encoder of ours for the same image size, such as an S for a Ti; its neck too.

    Raises:
        ValueError: if the two do not fit.
    """
    theirs = teacher.config
    chosen = _Chosen(theirs, theirs.intermediate_size, student.config)
    channels = chosen.channels
    _select(student.embeddings.projection, teacher.embeddings.projection, channels)
    student.embeddings.position_embeddings.copy_(teacher.embeddings.position_embeddings[..., channels])
    for target, source in zip(student.layers, teacher.layers, strict=True):
        _select_layer(target, source, (source.layernorm_before, source.layernorm_after), chosen)
    neck = teacher.neck.state_dict()
    student.neck.load_state_dict(neck | {"projection.weight": neck["projection.weight"][:, channels]})


class _Chosen:
    """Which channels, heads' channels and MLP units of the teacher the student has: evenly spaced ones."""

    def __init__(self, theirs: PreTrainedConfig, intermediate_size: int, ours: PreTrainedConfig):
        step = _width_ratio(theirs, intermediate_size, ours)
        head_dim = ours.hidden_size // ours.num_attention_heads
        self.channels = torch.arange(0, theirs.hidden_size, step)
        self.units = torch.arange(0, intermediate_size, step)
        self.heads = torch.arange(theirs.hidden_size).unflatten(0, (-1, head_dim))[::step].flatten()


def _select_layer(target: nn.Module, source: nn.Module, norms: tuple[nn.Module, nn.Module], chosen: _Chosen) -> None:
    channels = chosen.channels
    _select(target.layernorm_before, norms[0], channels)
    for name in ("q_proj", "k_proj", "v_proj"):
        _select(getattr(target.attention, name), getattr(source.attention, name), chosen.heads, channels)
    _select(target.attention.o_proj, source.attention.o_proj, channels, chosen.heads)
    _select(target.layernorm_after, norms[1], channels)
    _select(target.mlp.fc1, source.mlp.fc1, chosen.units, channels)
    _select(target.mlp.fc2, source.mlp.fc2, channels, chosen.units)


def _width_ratio(theirs: PreTrainedConfig, intermediate_size: int, ours: PreTrainedConfig) -> int:
    """How many times as wide the teacher is; ValueError if the two do not fit."""
    step = theirs.hidden_size // ours.hidden_size
    if (
        theirs.hidden_size != step * ours.hidden_size
        or theirs.num_attention_heads != step * ours.num_attention_heads
        or intermediate_size != step * ours.intermediate_size
        or theirs.num_hidden_layers != ours.num_hidden_layers
    ):
        raise ValueError(
            f"A teacher of width {theirs.hidden_size}, {theirs.num_attention_heads} heads and "
            f"{theirs.num_hidden_layers} layers has no evenly spaced part of width {ours.hidden_size}, "
            f"{ours.num_attention_heads} heads and {ours.num_hidden_layers} layers; choose a teacher whose width and "
            "heads are the same multiple of the student's and whose depth is equal."
        )
    return step


def _select_embeddings(teacher: nn.Module, student: EfficientSamVisionEncoder, channels: torch.Tensor) -> None:
    patches = teacher.embeddings.patch_embeddings.projection
    patch_size = student.config.patch_size
    kernel = F.interpolate(patches.weight[channels], size=patch_size, mode="bicubic", antialias=True)
    student.embeddings.projection.weight.copy_(kernel * (teacher.config.patch_size / patch_size) ** 2)
    student.embeddings.projection.bias.copy_(patches.bias[channels])
    positions = teacher.embeddings.position_embeddings[:, :, channels]
    grid = round((positions.shape[1] - 1) ** 0.5)
    table = positions[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))
    table = F.interpolate(table, size=student.embeddings.pretrain_grid, mode="bicubic", antialias=True)
    table = torch.cat([positions[:, :1], table.flatten(2).transpose(1, 2)], dim=1)
    student.embeddings.position_embeddings.copy_(table)


def _select(target: nn.Module, source: nn.Module, rows: torch.Tensor, columns: torch.Tensor | None = None) -> None:
    weight = source.weight[rows]
    target.weight.copy_(weight if columns is None else weight[:, columns])
    target.bias.copy_(source.bias[rows])


def _fold_scale(target: nn.Module, scale: torch.Tensor) -> None:
    target.weight.mul_(scale[:, None])
    target.bias.mul_(scale)
