"""`efficientsam info`, `convert`, `export-onnx`, `export-browser`: describe, make and export checkpoints."""

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from torch import nn
from transformers import PreTrainedConfig

from hf_efficientsam.export.convert import convert
from hf_efficientsam.export.metrics_report import is_of_another, metrics_as_text, read_metrics
from hf_efficientsam.inference.image_files import check_folder
from hf_efficientsam.inference.loading import checkpoint_fingerprint, find_checkpoint, load_model
from hf_efficientsam.model.configuration_vision_efficientsam import EfficientSamAutoVisionConfig
from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel
from hf_efficientsam.model.processing_efficientsam import EfficientSamProcessor

from .options import LOCAL, local_path, new_commands

commands = new_commands()


@commands.command("info")
def info_command(
    model: Annotated[str | None, typer.Argument(help="Directory or Hub name; the bundled one if not given.")] = None,
) -> None:
    """Describe a checkpoint: its size, the prompts it takes, and its measured numbers if they come with it."""
    loaded, processor = load_model(model)
    for key, value in describe_checkpoint(loaded, processor).items():
        typer.echo(f"{key:11} {value}")
    if metrics := read_metrics(loaded.name_or_path):
        stale = is_of_another(metrics, checkpoint_fingerprint(loaded, processor.image_processor))
        typer.echo(
            "measured    metrics.json is of another checkpoint; measure this one (efficientsam evaluate masks)"
            if stale
            else metrics_as_text(metrics)
        )


def describe_checkpoint(model: EfficientSamModel, processor: EfficientSamProcessor) -> dict[str, str]:
    """What `info` says of a model, by name."""

    def millions(module: nn.Module) -> str:
        return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M"

    config, size = model.config, processor.image_processor.size
    vision, prompt_encoder = config.vision_config, config.prompt_encoder_config
    kinds = ["points", "boxes"]
    kinds += ["background points"] if prompt_encoder.background_points else []
    kinds += ["masks"] if prompt_encoder.mask_prompts else []
    aspect = "kept" if processor.image_processor.keep_aspect_ratio else "ignored"
    return {
        "checkpoint": model.name_or_path,
        "parameters": millions(model),
        "  encoder": f"{millions(model.vision_encoder)}, {describe_encoder(vision)}",
        "  prompts": millions(model.prompt_encoder),
        "  decoder": millions(model.mask_decoder),
        "input": f"{size.width} x {size.height} pixels, aspect ratio {aspect}",
        "prompts": ", ".join(kinds),
        "candidates": f"{config.mask_decoder_config.num_multimask_outputs} masks for each object",
    }


def describe_encoder(vision: PreTrainedConfig) -> str:
    if isinstance(vision, EfficientSamAutoVisionConfig):
        return f"{vision.backbone_config.model_type} backbone"
    return f"{vision.num_hidden_layers} layers of {vision.hidden_size}"


@commands.command("convert", no_args_is_help=True)
def convert_command(
    checkpoint: Annotated[
        Path, typer.Argument(parser=local_path, help="Official file, such as efficient_sam_vitt.pt.")
    ],
    output: Annotated[Path, typer.Argument(parser=local_path, help="Directory to write model and processor to.")],
    image_size: Annotated[int, typer.Option(min=16, help="Input side in pixels.")] = 1024,
    num_attention_heads: Annotated[
        int | None, typer.Option(min=1, help="Heads of the encoder; by default its width / 64.")
    ] = None,
    decoder_num_attention_heads: Annotated[int, typer.Option(min=1, help="Heads of the mask decoder.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a directory that is not empty.")] = False,
) -> None:
    """Convert an official EfficientSAM checkpoint for from_pretrained and --model."""
    check_folder(output)
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"{output} is not empty; choose another directory, or pass --overwrite.")
    model = convert(
        checkpoint,
        output,
        image_size=image_size,
        num_attention_heads=num_attention_heads,
        decoder_num_attention_heads=decoder_num_attention_heads,
    )
    typer.echo(f"{output}: {model.num_parameters() / 1e6:.2f} M parameters, input {image_size} x {image_size} pixels")


class Variant(StrEnum):
    """Of an exported model."""

    float16 = "float16"
    int8 = "int8"


class Layout(StrEnum):
    """Of exported files: names, shapes and coordinates of inputs and outputs."""

    native = "native"
    official = "official"
    sam = "sam"
    transformers_js = "transformers.js"


@commands.command("export-onnx", no_args_is_help=True)
def export_command(
    model: Annotated[str, typer.Argument(metavar="DIR_OR_HUB_ID", help="Checkpoint to export.")],
    output: Annotated[Path, typer.Argument(parser=local_path, help="Directory to write an encoder and a decoder to.")],
    layout: Annotated[
        Layout, typer.Option(help="Tools that call the files: this package, osam, AnyLabeling or transformers.js.")
    ] = Layout.native,
    variants: Annotated[
        list[Variant], typer.Option("--variant", help="Write a smaller variant, too. May be given several times.")
    ] = [],  # noqa: B006
    images: Annotated[
        Path | None, typer.Option(**LOCAL, help="Folder of images on which variants are measured.")
    ] = None,
    allow_loss: Annotated[
        bool, typer.Option("--allow-loss", help="Write variants that lose more than 0.5 % of mask IoU, too.")
    ] = False,
) -> None:
    """
    Export a checkpoint to ONNX, for EfficientSamOnnxPredictor and other runtimes.

    The numbers of images, prompts and points are free, and for the encoder height and width. The files are compared
    with torch on inputs of random shapes; if they differ by more than 0.0001 of the largest value, none is written.

    A variant (encoder_float16.onnx, decoder_float16.onnx, ...) has weights in 16-bit floats or 8-bit integers. Its
    masks are compared with those of the whole files, for boxes laid over the images.

    --layout writes files that other tools call: official as the authors' (osam, samexporter), sam as
    segment-anything's with a config.yaml (AnyLabeling, X-AnyLabeling), or transformers.js.
    """
    check_folder(output)
    if not variants and (images is not None or allow_loss):
        raise ValueError("--images and --allow-loss are for variants; add --variant float16 or --variant int8.")
    if variants and images is None:
        raise ValueError("variants are measured on images; pass a folder of them with --images.")
    if variants and layout in (Layout.official, Layout.sam):
        raise ValueError(f"--variant is for the layouts native and transformers.js; leave it out for {layout.value}.")
    name = find_checkpoint(model)
    try:
        from hf_efficientsam.export.onnx_export import export_onnx
        from hf_efficientsam.export.onnx_layouts import export_layout
    except ImportError as error:
        raise ValueError(f"the export needs {error.name}; install hf-efficientsam[onnx].") from None
    export = export_onnx if layout is Layout.native else partial(export_layout, layout.value)
    written = export(name, output, [one.value for one in variants], images, allow_loss)
    for file, report in written.items():
        typer.echo(f"{output / file}: {describe_export(report)}")
    if layout is Layout.native:
        typer.echo(f"run them with EfficientSamOnnxPredictor({str(output)!r})")


def describe_export(report: dict) -> str:
    """Size and exactness of an exported file."""
    if "mask_iou" in report:
        quality = f"mask IoU {report['mask_iou']:.4f} with float32"
    else:
        quality = f"within {report['difference']:.1e} of torch"
    return f"{report['bytes'] / 1e6:.1f} MB, {quality}"


@commands.command("export-browser", no_args_is_help=True)
def export_browser_command(
    model: Annotated[str, typer.Argument(metavar="DIR_OR_HUB_ID", help="Checkpoint to export.")],
    output: Annotated[Path, typer.Argument(parser=local_path, help="Directory to write the page to.")],
) -> None:
    """
    Make a web page that runs a checkpoint in the visitor's browser, for any static host.

    The page needs no server of its own and sends nothing: an image is opened, encoded and cut out in the browser, with
    WebGPU or WebAssembly. The command fetches onnxruntime-web (33 MB) from npm's registry, unless OUTPUT has it.
    """
    check_folder(output)
    name = find_checkpoint(model)
    try:
        from hf_efficientsam.export.browser_page import export_browser
    except ImportError as error:
        raise ValueError(f"the export needs {error.name}; install hf-efficientsam[onnx].") from None
    for file, size in export_browser(name, output).items():
        typer.echo(f"{size:>12,} {output / file}")
