"""EfficientSAM -> ONNX: encoder and decoder in files of their own, checked against torch; also as smaller variants.

encoder: pixel_values `[B, 3, H, W]` -> image_embeddings `[B, C, H / 16, W / 16]`
decoder: image_embeddings, input_points `[B, Q, P, 2]`, input_labels `[B, Q, P]`, input_boxes `[B, Q, 4]` and, where
    the model takes them, input_masks `[B, Q, H / 4, W / 4]` with has_input_masks `[B, Q]`, bool
    -> pred_masks `[B, Q, 1 + M, H / 4, W / 4]` and iou_scores `[B, Q, 1 + M]`, the single mask before the M candidates

B, Q, P, H and W are dynamic. Coordinates, labels and padding are those of [`EfficientSamModel`]; -10 pads missing
labels and boxes. Both files describe the model's prompts and preprocessing, as JSON in `metadata_props`.
"""

import json
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from PIL import Image
from torch import nn
from torch.export import Dim

from hf_efficientsam import __version__
from hf_efficientsam.inference.image_files import find_images, read_image, upright_image, write_files
from hf_efficientsam.inference.loading import checkpoint_fingerprint, find_checkpoint, load_model
from hf_efficientsam.inference.onnx_predictor import METADATA_KEY, EfficientSamOnnxPredictor, file_name, open_session
from hf_efficientsam.model.image_processing_efficientsam import EfficientSamImageProcessor
from hf_efficientsam.model.modeling_auto_vision_efficientsam import EfficientSamAutoVisionEncoder
from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel
from hf_efficientsam.model.processing_efficientsam import EfficientSamProcessor

from .onnx_modules import ExportedDecoder, ExportedEncoder, decoder_inputs, encoder_inputs
from .quantize import VARIANTS, measure_variant

OPSET = 18
TOLERANCE = 1e-4  # of the largest value, where that is above 1
LARGEST_LOSS = 0.005  # of a variant's mask IoU
PREPROCESSING = (
    "do_convert_rgb",
    "do_resize",
    "keep_aspect_ratio",
    "size_divisor",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "max_image_pixels",
)

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------ export and check


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter warns of torchvision, which is not needed, and of names of axes that are the same."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def export(module: nn.Module, inputs: dict[str, torch.Tensor], outputs: list[str], axes: dict) -> onnx.ModelProto:
    """
    Args:
        inputs: an example.
        outputs: their names.
        axes: name of an input -> its dynamic axes.
    """
    logger.info("Exporting the part that makes %s ...", " and ".join(outputs))
    with quiet():
        program = torch.onnx.export(
            module.eval(),
            kwargs=inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes={name: axes[name] for name in inputs},
            verbose=False,
        )
    return without_notes(program.model_proto)


def without_notes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the exporter's notes on each node: most of a small file, with paths of this machine, in random order."""
    graph = model.graph
    for part in (graph, *graph.input, *graph.output, *graph.node, *graph.initializer, *graph.value_info):
        part.ClearField("metadata_props")
    return model


def export_encoder(model: EfficientSamModel) -> onnx.ModelProto:
    """
    Raises:
        ValueError: if torch cannot export the backbone, which the plain ViT's never is.
    """
    vision, axes, window = model.config.vision_config, {0: Dim("batch")}, 2
    if vision.fixed_size is None:
        axes |= {2: vision.size_divisor * Dim("rows"), 3: vision.size_divisor * Dim("columns")}
    if isinstance(model.vision_encoder, EfficientSamAutoVisionEncoder):
        # The exporter's decomposition of sdpa leaves layouts that a backbone's `reshape` cannot view: Swin's.
        model.vision_encoder.backbone.set_attn_implementation("eager")
        window = max(window, getattr(vision.backbone_config, "window_size", 0))
    # A single window would be traced as a constant, and a map that needs no padding as one that never does.
    inputs, outputs = encoder_inputs(model, 2, (window + 1, window + 2)), ["image_embeddings"]
    try:
        return export(ExportedEncoder(model), inputs, outputs, {"pixel_values": axes})
    except torch.onnx.OnnxExporterError as error:
        if not isinstance(model.vision_encoder, EfficientSamAutoVisionEncoder):
            raise
        raise ValueError(
            f"torch {torch.__version__} cannot export a {vision.backbone_config.model_type} backbone to ONNX; take a "
            "convolutional one, such as ConvNeXt, or a plain ViT, such as DINOv2."
        ) from error


def export_decoder(model: EfficientSamModel) -> onnx.ModelProto:
    batch, prompts, points, rows, columns = map(Dim, ("batch", "prompts", "points", "rows", "columns"))
    axes = {
        "image_embeddings": {0: batch, 2: rows, 3: columns},
        "input_points": {0: batch, 1: prompts, 2: points},
        "input_labels": {0: batch, 1: prompts, 2: points},
        "input_boxes": {0: batch, 1: prompts},
        "input_masks": {0: batch, 1: prompts, 2: 4 * rows, 3: 4 * columns},
        "has_input_masks": {0: batch, 1: prompts},
    }
    inputs = decoder_inputs(model, 2, 3, 4, (5, 6))
    return export(ExportedDecoder(model), inputs, ["pred_masks", "iou_scores"], axes)


@torch.no_grad()
def encode(model: EfficientSamModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [model.get_image_embeddings(**inputs)]


@torch.no_grad()
def decode(model: EfficientSamModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What the exported decoder must give, by the model's own forward."""
    inputs = dict(inputs)
    masks, has_masks = inputs.pop("input_masks", None), inputs.pop("has_input_masks", None)

    def all_masks(**more) -> list[torch.Tensor]:
        answers = [model(**inputs, **more, multimask_output=many) for many in (False, True)]
        return [torch.cat([answer[name] for answer in answers], dim=2) for name in ("pred_masks", "iou_scores")]

    expected = all_masks()
    if masks is None:
        return expected
    asked = all_masks(input_masks=masks)
    return [
        torch.where(has_masks.view(*has_masks.shape, *[1] * (a.ndim - 2)), a, b)
        for a, b in zip(asked, expected, strict=True)
    ]


def check(file: Path, expect, cases: Iterable[dict[str, torch.Tensor]]) -> float:
    """
    The largest difference between an exported file and `expect(inputs)`, as `TOLERANCE` measures it.

    Raises:
        ValueError: if it is above `TOLERANCE`.
    """
    logger.info("Comparing %s with torch ...", file.name)
    run, largest = open_session(file, ["CPUExecutionProvider"], num_threads=torch.get_num_threads()), 0.0
    for inputs in cases:
        found = run({name: tensor.numpy() for name, tensor in inputs.items()})
        for ours, theirs in zip(found, expect(inputs), strict=True):
            theirs = theirs.numpy()
            difference = float(np.abs(ours - theirs).max() / max(1, np.abs(theirs).max()))
            if not difference <= TOLERANCE:  # NaN is no number to pass
                shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
                raise ValueError(
                    f"{file.name} differs from torch by {difference:.1e} for {shapes}, more than {TOLERANCE:g}; "
                    "nothing was written."
                )
            largest = max(largest, difference)
    return largest


def random_cases(model: EfficientSamModel, size: tuple[int, int]) -> tuple[list[dict], list[dict]]:
    """Inputs of encoder and decoder: of random shapes, and of the model's own `size` in pixels."""
    vision = model.config.vision_config
    own, steps = (tuple(n // one for n in size) for one in (vision.patch_size, vision.size_divisor))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        grids = [tuple(grid) for grid in torch.randint(1, 12, (4, 2)).tolist()]
        counts = torch.randint(1, 6, (4, 3)).tolist()
        encoder = [encoder_inputs(model, batch, grid) for (batch, *_), grid in zip(counts, grids, strict=True)]
        decoder = [decoder_inputs(model, *count, grid) for count, grid in zip(counts, grids, strict=True)]
        return [*encoder, encoder_inputs(model, 1, steps)], [*decoder, decoder_inputs(model, 1, 1, 1, own)]


# ------------------------------------------------------------------------------------------------ export_onnx


def describe(name: str, model: EfficientSamModel, processor: EfficientSamProcessor) -> dict:
    """The metadata of both files: all that is needed to run them."""
    image_processor, prompts = processor.image_processor, model.config.prompt_encoder_config
    options = {key: getattr(image_processor, key) for key in PREPROCESSING}
    return {
        "model": Path(name).name,
        "model_sha256": checkpoint_fingerprint(model, image_processor),
        "background_points": prompts.background_points,
        "mask_prompts": prompts.mask_prompts,
        "preprocessing": {"size": [image_processor.size.height, image_processor.size.width], **options},
        "opset": OPSET,
        "versions": {"hf_efficientsam": __version__, "torch": torch.__version__, "onnx": onnx.__version__},
    }


def save(model: onnx.ModelProto, file: Path, description: dict) -> None:
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(description)})
    onnx.save(model, file)


def load_images(folder: Path) -> list[Image.Image]:
    images = [
        read_image(folder / name, EfficientSamImageProcessor.max_image_pixels, upright_image)
        for name in find_images(folder, [])
    ]
    if not images:
        raise ValueError(f"{folder} holds no images to measure variants on.")
    return images


def export_onnx(
    name: str,
    output: Path,
    variants: Sequence[str] = (),
    images: Path | None = None,
    allow_loss: bool = False,
) -> dict[str, dict]:
    """
    Writes `encoder.onnx` and `decoder.onnx` of a checkpoint, and both in each of `variants`, once all are checked.
    Other variants from an earlier export are removed.

    Args:
        name: directory or Hub name, or "bundled".
        output: folder, which is created.
        variants: keys of `VARIANTS`: "float16", "int8".
        images: folder of images on which variants are measured.
        allow_loss: write variants even if they lose more than `LARGEST_LOSS`.

    Returns:
        file name -> `bytes`, and `difference` from torch, or `mask_iou` with float32. The files' metadata have the
        latter two as well.

    Raises:
        ValueError: a file differs from torch by more than `TOLERANCE`, or a variant loses too much.
    """
    test_images = load_images(images) if variants else []
    name = find_checkpoint(name)
    model, processor = load_model(name)
    model = model.cpu()
    model.set_attn_implementation("sdpa")
    description = describe(name, model, processor)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        graphs, report = write_parts(model, folder, description)
        for variant in variants:
            report |= write_variant(variant, graphs, folder, description, test_images, allow_loss)
        contents = {output / file: (folder / file).read_bytes() for file in report}
    return write_export(output, contents, report, {file_name(part, one) for part in graphs for one in VARIANTS})


def write_export(
    output: Path, contents: dict[Path, bytes], report: dict[str, dict], variant_files: set[str]
) -> dict[str, dict]:
    """
    Writes the files of an export and removes those of `variant_files` that are of an earlier one: of another model, or
    another state of this one. Returns the report with each file's number of bytes.
    """
    write_files(contents)
    for stale in {output / file for file in variant_files} - contents.keys():
        stale.unlink(missing_ok=True)
    return {file: {"bytes": len(contents[output / file]), **found} for file, found in report.items()}


def write_parts(
    model: EfficientSamModel, folder: Path, description: dict
) -> tuple[dict[str, onnx.ModelProto], dict[str, dict]]:
    """Exports encoder and decoder into a folder and checks them; their graphs, and a report as of `export_onnx`."""
    encoder_cases, decoder_cases = random_cases(model, description["preprocessing"]["size"])
    parts = {
        "encoder": (export_encoder(model), lambda inputs: encode(model, inputs), encoder_cases),
        "decoder": (export_decoder(model), lambda inputs: decode(model, inputs), decoder_cases),
    }
    report = {}
    for part, (graph, expect, cases) in parts.items():
        file = folder / file_name(part, "float32")
        save(graph, file, description)
        difference = check(file, expect, cases)
        report[file.name] = {"difference": difference}
        save(graph, file, {**description, "difference": difference})
    return {part: graph for part, (graph, *_) in parts.items()}, report


def refuse_loss(variant: str, iou: float, allow_loss: bool) -> None:
    """Raises a ValueError if the masks of a variant lose too much."""
    if not allow_loss and not iou >= 1 - LARGEST_LOSS:
        raise ValueError(
            f"{variant} gives masks of IoU {iou:.4f} with those of float32, a loss of more than "
            f"{LARGEST_LOSS:.1%}; leave it out, or pass --allow-loss. Nothing was written."
        )


def write_variant(
    variant: str, graphs: dict, folder: Path, description: dict, images: list[Image.Image], allow_loss: bool
) -> dict[str, dict]:
    """Writes a variant beside the float32 files in a folder and measures it; a report as of `export_onnx`."""
    files = {folder / file_name(part, variant): VARIANTS[variant](graph) for part, graph in graphs.items()}
    for file, graph in files.items():
        save(graph, file, description)
    exact, smaller = (
        EfficientSamOnnxPredictor(folder, one, num_threads=torch.get_num_threads()) for one in ("float32", variant)
    )
    logger.info("Measuring %s on %d images ...", variant, len(images))
    iou = measure_variant(exact, smaller, images)
    refuse_loss(variant, iou, allow_loss)
    for file, graph in files.items():
        save(graph, file, {**description, "mask_iou": iou, "images": len(images)})
    return {file.name: {"mask_iou": iou} for file in files}


__all__ = ["export_onnx"]
