"""Official EfficientSAM checkpoints (`.pt`) -> a directory that `from_pretrained` loads.

The conversion is strict: every key must be known, present and of the shape that its neighbours imply.
"""

import math
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch

from hf_efficientsam.inference.image_files import errors_about
from hf_efficientsam.model.configuration_efficientsam import EfficientSamConfig
from hf_efficientsam.model.image_processing_efficientsam import EfficientSamImageProcessor
from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel
from hf_efficientsam.model.processing_efficientsam import EfficientSamProcessor


class ConversionError(ValueError):
    """The file is no EfficientSAM checkpoint, or one that does not fit; the message lists what."""


CONVERTED = (
    "{} is converted already: its weights have this package's names, not the authors'; use the directory that the "
    "conversion wrote, by from_pretrained or --model."
)

# Official name -> ours, as patterns of whole keys. `qkv` is split into three, the 1 x 1 convolution becomes linear.
RENAMES = [
    (r"image_encoder\.pos_embed", r"vision_encoder.embeddings.position_embeddings"),
    (r"image_encoder\.patch_embed\.proj\.(\w+)", r"vision_encoder.embeddings.projection.\1"),
    (r"image_encoder\.blocks\.(\d+)\.norm1\.(\w+)", r"vision_encoder.layers.\1.layernorm_before.\2"),
    (r"image_encoder\.blocks\.(\d+)\.attn\.qkv\.(\w+)", r"vision_encoder.layers.\1.attention.qkv.\2"),
    (r"image_encoder\.blocks\.(\d+)\.attn\.proj\.(\w+)", r"vision_encoder.layers.\1.attention.o_proj.\2"),
    (r"image_encoder\.blocks\.(\d+)\.norm2\.(\w+)", r"vision_encoder.layers.\1.layernorm_after.\2"),
    (r"image_encoder\.blocks\.(\d+)\.mlp\.(fc[12])\.(\w+)", r"vision_encoder.layers.\1.mlp.\2.\3"),
    (r"image_encoder\.neck\.0\.weight", r"vision_encoder.neck.projection.weight"),
    (r"image_encoder\.neck\.1\.(\w+)", r"vision_encoder.neck.layernorm1.\1"),
    (r"image_encoder\.neck\.2\.weight", r"vision_encoder.neck.conv.weight"),
    (r"image_encoder\.neck\.3\.(\w+)", r"vision_encoder.neck.layernorm2.\1"),
    (
        r"prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix",
        r"prompt_encoder.position_embedding.frequencies",
    ),
    (r"prompt_encoder\.invalid_points\.weight", r"prompt_encoder.padding_embed.weight"),
    (r"prompt_encoder\.point_embeddings\.weight", r"prompt_encoder.foreground_embed.weight"),
    (r"prompt_encoder\.bbox_top_left_embeddings\.weight", r"prompt_encoder.box_top_left_embed.weight"),
    (r"prompt_encoder\.bbox_bottom_right_embeddings\.weight", r"prompt_encoder.box_bottom_right_embed.weight"),
    (r"mask_decoder\.(iou_token|mask_tokens)\.weight", r"mask_decoder.\1.weight"),
    (r"mask_decoder\.transformer\.layers\.(\d+)\.norm(\d)\.(\w+)", r"mask_decoder.layers.\1.layernorm\2.\3"),
    (r"mask_decoder\.transformer\.layers\.(\d+)\.mlp\.layers\.0\.0\.(\w+)", r"mask_decoder.layers.\1.mlp.fc1.\2"),
    (r"mask_decoder\.transformer\.layers\.(\d+)\.mlp\.fc\.(\w+)", r"mask_decoder.layers.\1.mlp.fc2.\2"),
    (
        r"mask_decoder\.transformer\.layers\.(\d+)\.self_attn\.(\w+)\.(\w+)",
        r"mask_decoder.layers.\1.self_attention.\2.\3",
    ),
    (
        r"mask_decoder\.transformer\.layers\.(\d+)\.cross_attn_(token_to_image|image_to_token)\.(\w+)\.(\w+)",
        r"mask_decoder.layers.\1.\2_attention.\3.\4",
    ),
    (
        r"mask_decoder\.transformer\.final_attn_token_to_image\.(\w+)\.(\w+)",
        r"mask_decoder.final_token_to_image_attention.\1.\2",
    ),
    (r"mask_decoder\.transformer\.norm_final_attn\.(\w+)", r"mask_decoder.final_layernorm.\1"),
    (r"mask_decoder\.final_output_upscaling_layers\.(\d+)\.0\.(\w+)", r"mask_decoder.upscaling.convs.\1.\2"),
    (r"mask_decoder\.final_output_upscaling_layers\.(\d+)\.1\.(\w+)", r"mask_decoder.upscaling.norms.\1.\2"),
    (
        r"mask_decoder\.output_hypernetworks_mlps\.(\d+)\.layers\.(\d+)\.0\.(\w+)",
        r"mask_decoder.hypernetworks.\1.layers.\2.\3",
    ),
    (r"mask_decoder\.output_hypernetworks_mlps\.(\d+)\.fc\.(\w+)", r"mask_decoder.hypernetworks.\1.layers.2.\2"),
    (r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\.0\.(\w+)", r"mask_decoder.iou_head.layers.\1.\2"),
    (r"mask_decoder\.iou_prediction_head\.fc\.(\w+)", r"mask_decoder.iou_head.layers.LAST.\1"),
]


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """
    Reads the state dict of an official checkpoint, never running code from it (`weights_only`).

    Raises:
        FileNotFoundError: if there is no such file.
        ConversionError: if it is no torch checkpoint, holds no state dict, or is converted already.
    """
    path = Path(path)
    if (path / "config.json").is_file() or (path.is_file() and path.suffix == ".safetensors"):
        raise ConversionError(CONVERTED.format(path))
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint file at {path}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on files that are not its own
        raise ConversionError(
            f"{path} is no torch checkpoint of tensors alone, or it is cut off; nothing else is read (weights_only), "
            "as code could hide in it."
        ) from error
    state_dict = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state_dict.items()
    ):
        raise ConversionError(f"{path} holds no state dict: expected {{'model': {{name: tensor}}}}.")
    if any(name.startswith("vision_encoder.") for name in state_dict):
        raise ConversionError(CONVERTED.format(path))
    return state_dict


def infer_config(
    shapes: dict[str, tuple[int, ...]],
    image_size: int = 1024,
    num_attention_heads: int | None = None,
    decoder_num_attention_heads: int = 8,
) -> EfficientSamConfig:
    """
    Reads every size from the shapes of an official state dict; what shapes cannot tell is an argument.

    Args:
        shapes: official parameter name -> shape.
        image_size: native input side in pixels.
        num_attention_heads: of the vision encoder; one for each 64 channels if not given, as published.
        decoder_num_attention_heads: of the mask decoder.

    Raises:
        ConversionError: if a name that a size is read from is missing, or the sizes contradict each other.
    """

    sizes = OfficialShapes(shapes)
    try:
        return EfficientSamConfig(
            vision_config=infer_vision_sizes(sizes, image_size, num_attention_heads),
            prompt_encoder_config={"hidden_size": sizes.of("prompt_encoder.point_embeddings.weight", 2)[1]},
            mask_decoder_config=infer_decoder_sizes(sizes, decoder_num_attention_heads),
        )
    except ConversionError:
        raise
    except ValueError as error:
        raise ConversionError(f"This checkpoint's shapes do not fit each other: {error}") from error


class OfficialShapes:
    """
    Reads sizes from the shapes of an official state dict.

    Args:
        shapes: official parameter name -> shape.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self.shapes = shapes

    def of(self, name: str, ndim: int) -> tuple[int, ...]:
        """The shape of a parameter. ConversionError: it is missing, or has not `ndim` dimensions above 0."""
        if len(self.shapes.get(name, ())) != ndim or 0 in self.shapes[name]:
            raise ConversionError(
                f"This is no EfficientSAM checkpoint: {name} is {self.shapes.get(name, 'missing')}, "
                f"expected a tensor of {ndim} dimensions, none of them 0."
            )
        return tuple(self.shapes[name])

    def count(self, pattern: str) -> int:
        """How many different numbers the group of a pattern matches in the names: that of layers."""
        return len({match.group(1) for name in self.shapes if (match := re.match(pattern, name))})


def infer_vision_sizes(sizes: OfficialShapes, image_size: int, num_attention_heads: int | None) -> dict:
    """The arguments of [`EfficientSamVisionConfig`]."""
    width, channels, patch_size, _ = sizes.of("image_encoder.patch_embed.proj.weight", 4)
    pretrain_grid = math.isqrt(sizes.of("image_encoder.pos_embed", 3)[1] - 1)
    heads = num_attention_heads or max(1, width // 64)
    if width % heads:
        raise ConversionError(
            f"{heads} attention heads do not divide the encoder's width {width}; give --num-attention-heads."
        )
    return {
        "hidden_size": width,
        "intermediate_size": sizes.of("image_encoder.blocks.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": sizes.count(r"image_encoder\.blocks\.(\d+)\."),
        "num_attention_heads": heads,
        "num_channels": channels,
        "image_size": image_size,
        "patch_size": patch_size,
        "pretrain_image_size": pretrain_grid * patch_size,
        "output_channels": sizes.of("image_encoder.neck.0.weight", 4)[0],
    }


def infer_decoder_sizes(sizes: OfficialShapes, heads: int) -> dict:
    """The arguments of [`EfficientSamMaskDecoderConfig`]."""
    width = sizes.of("mask_decoder.iou_token.weight", 2)[1]
    cross_width = sizes.of("mask_decoder.transformer.final_attn_token_to_image.q_proj.weight", 2)[0]
    if width % cross_width:
        raise ConversionError(f"Cross-attention of width {cross_width} does not divide the decoder's {width}.")
    if width % heads or cross_width % heads:
        raise ConversionError(
            f"{heads} attention heads do not divide the decoder's widths {width} and {cross_width}; give "
            "--decoder-num-attention-heads."
        )
    upscaling_layers = sizes.count(r"mask_decoder\.final_output_upscaling_layers\.(\d+)\.0\.weight")
    if not upscaling_layers:
        raise ConversionError("No EfficientSAM checkpoint: mask_decoder.final_output_upscaling_layers is missing.")
    return {
        "hidden_size": width,
        "mlp_dim": sizes.of("mask_decoder.transformer.layers.0.mlp.fc.weight", 2)[1],
        "num_hidden_layers": sizes.count(r"mask_decoder\.transformer\.layers\.(\d+)\."),
        "num_attention_heads": heads,
        "attention_downsample_rate": width // cross_width,
        "num_multimask_outputs": sizes.of("mask_decoder.mask_tokens.weight", 2)[0] - 1,
        "upscaling_channels": [
            sizes.of(f"mask_decoder.final_output_upscaling_layers.{i}.0.weight", 4)[1] for i in range(upscaling_layers)
        ],
        "iou_head_depth": 1 + sizes.count(r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\."),
        "iou_head_hidden_dim": sizes.of("mask_decoder.iou_prediction_head.fc.weight", 2)[1],
    }


def rename(name: str, config: EfficientSamConfig) -> str | None:
    """Our name of an official parameter, or `None` if it is unknown."""
    for pattern, ours in RENAMES:
        if match := re.fullmatch(pattern, name):
            ours = match.expand(ours).replace("LAST", str(config.mask_decoder_config.iou_head_depth - 1))
            return ours.replace(".out_proj.", ".o_proj.")
    return None


def convert_state_dict(
    state_dict: dict[str, torch.Tensor], config: EfficientSamConfig
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Renames and reshapes an official state dict; returns ours and the names that are unknown."""
    converted, unknown = {}, []
    for name, tensor in state_dict.items():
        ours = rename(name, config)
        if ours is None:
            unknown.append(name)
        elif ".qkv." in ours and tensor.ndim and tensor.shape[0] % 3 == 0:
            for part, chunk in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                converted[ours.replace("qkv", part)] = chunk
        elif ours == "vision_encoder.neck.projection.weight" and tuple(tensor.shape[2:]) == (1, 1):
            converted[ours] = tensor.flatten(1)
        else:
            converted[ours] = tensor
    return converted, unknown


def load_official(path: str | Path, **options) -> EfficientSamModel:
    """
    Loads an official checkpoint into our model, strictly both ways.

    Args:
        path: an official `.pt` file.
        options: what shapes cannot tell; see [`infer_config`].

    Raises:
        ConversionError: listing every name that is unknown, missing or of the wrong shape.
    """
    state_dict = read_checkpoint(path)
    config = infer_config({name: tuple(tensor.shape) for name, tensor in state_dict.items()}, **options)
    converted, unknown = convert_state_dict(state_dict, config)
    with torch.device("meta"):
        wanted = EfficientSamModel(config).state_dict()
    problems = [f"unknown: {name}" for name in unknown]
    problems += [f"missing: {name}" for name in wanted.keys() - converted.keys()]
    problems += [f"left over: {name}" for name in converted.keys() - wanted.keys()]
    problems += [
        f"wrong shape: {name} is {tuple(converted[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted.keys() & converted.keys()
        if converted[name].shape != wanted[name].shape
    ]
    if problems:
        raise ConversionError(f"{path} does not fit EfficientSAM:\n  " + "\n  ".join(sorted(problems)))
    model = EfficientSamModel(config)
    model.load_state_dict({name: tensor.contiguous() for name, tensor in converted.items()}, strict=True)
    return model.eval()


def convert(path: str | Path, output: str | Path, **options) -> EfficientSamModel:
    """
    Converts an official checkpoint into a directory with model (safetensors) and processor.

    Args:
        path: an official `.pt` file.
        output: the directory to write, which is created if it is not there. Files in it are replaced only after all
            new ones are complete.
        options: what shapes cannot tell; see [`infer_config`].

    Raises:
        ConversionError: as [`load_official`]; nothing is written then.
    """
    model = load_official(path, **options)
    side = model.config.vision_config.image_size
    image_processor = EfficientSamImageProcessor(size={"height": side, "width": side})
    output = Path(output)
    with errors_about(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    with errors_about(output), tempfile.TemporaryDirectory(dir=output.parent, prefix=".") as folder:
        model.save_pretrained(folder)
        EfficientSamProcessor(image_processor).save_pretrained(folder)
        output.mkdir(exist_ok=True)
        shutil.rmtree(output / "saliency", ignore_errors=True)  # a head of the encoder that was there
        for stale in (*output.glob("*.safetensors*"), output / "metrics.json"):
            stale.unlink(missing_ok=True)  # of the model that was there
        for file in Path(folder).iterdir():
            os.replace(file, output / file.name)
    return model
