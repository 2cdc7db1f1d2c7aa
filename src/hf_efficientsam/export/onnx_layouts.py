"""EfficientSAM -> ONNX files with the names, shapes and coordinates that other tools call.

official: the authors' encoder and decoder, as osam and samexporter call them
    batched_images `[B, 3, H, W]`, RGB in [0, 1] at any size -> image_embeddings
    image_embeddings, batched_point_coords `[B, Q, P, 2]`, batched_point_labels `[B, Q, P]`, orig_im_size `[2]`
    -> output_masks `[B, Q, M, *orig_im_size]`, iou_predictions `[B, Q, M]`, low_res_masks `[B, Q, M, h, w]`;
    coordinates in pixels of the image; the M candidates best first, as some tools take the first
sam: segment-anything's decoder that returns one mask, as AnyLabeling, X-AnyLabeling and samexporter call it
    input_image `[H, W, 3]`, RGB in [0, 255] -> image_embeddings
    image_embeddings, point_coords `[B, P, 2]`, point_labels `[B, P]`, mask_input `[B, 1, 256, 256]`,
    has_mask_input `[B]`, orig_im_size `[2]`
    -> masks `[B, 1, *orig_im_size]`, iou_predictions `[B, 1]`, low_res_masks `[B, 1, 256, 256]`;
    coordinates in pixels of the image scaled until its longest side is 1024; low-resolution masks cover the square of
    1024 whose upper left part that image is
transformers.js: its SamModel
    pixel_values `[B, 3, H, W]` -> image_embeddings, image_positional_embeddings `[B, C, H / 16, W / 16]`
    both, input_points `[B, Q, P, 2]`, input_labels `[B, Q, P]` -> iou_scores `[B, Q, M]`, pred_masks `[B, Q, M, h, w]`

Labels are 1 (object), 0 (background), negative (padding), 2 and 3 (upper left and lower right corner of a box). Where
the model lacks them, label 0 and mask_input give NaN. Masks are logits.
"""

import inspect
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.export import Dim

from hf_efficientsam.inference.loading import find_checkpoint, load_model
from hf_efficientsam.inference.onnx_predictor import open_session
from hf_efficientsam.model.image_processing_efficientsam import EfficientSamImageProcessor
from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel

from .onnx_export import (
    check,
    describe,
    export,
    load_images,
    refuse_loss,
    save,
    write_export,
)
from .onnx_modules import ExportedDecoder, ExportedEncoder, best_first, enlarge, resample, sides
from .quantize import VARIANTS, grid_boxes, mask_iou

SAM_SIDE, SAM_MASK_SIDE = 1024, 256  # of segment-anything's input and of its masks
SAM_PREPROCESSING = (
    "do_convert_rgb",
    "do_resize",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)
MASK_CELLS_PER_PATCH = 4  # along a side, of the model's masks


# ------------------------------------------------------------------------------------------------ traced modules


class LayoutEncoder(nn.Module):
    """Preprocessing and vision encoder: RGB `[B, 3, H, W]` in [0, 1] of any size -> image embeddings."""

    def __init__(self, model: EfficientSamModel, image_processor: EfficientSamImageProcessor):
        super().__init__()
        self.encoder = ExportedEncoder(model)
        self.size = (image_processor.size.height, image_processor.size.width)
        scale = 255 * (image_processor.rescale_factor if image_processor.do_rescale else 1)
        mean, std = (
            torch.as_tensor(values if image_processor.do_normalize else default, dtype=torch.float32)
            for values, default in ((image_processor.image_mean, 0), (image_processor.image_std, 1))
        )
        self.register_buffer("factor", (scale / std).reshape(-1, 1, 1))
        self.register_buffer("offset", (mean / std).reshape(-1, 1, 1))

    def forward(self, batched_images: torch.Tensor) -> torch.Tensor:
        pixels = F.interpolate(batched_images, size=self.size, mode="bilinear", align_corners=False)
        return self.encoder(pixels * self.factor - self.offset)


class LayoutDecoder(nn.Module):
    """What the decoders here share: prompt encoder and mask decoder, whose first mask, the single one, they drop."""

    def __init__(self, model: EfficientSamModel, image_processor: EfficientSamImageProcessor):
        super().__init__()
        self.decoder = ExportedDecoder(model)
        self.patch_size = model.config.vision_config.patch_size
        self.mask_prompts = model.config.prompt_encoder_config.mask_prompts


class OfficialDecoder(LayoutDecoder):
    def forward(self, image_embeddings, batched_point_coords, batched_point_labels, orig_im_size):
        scale = self.patch_size * sides(image_embeddings) / orig_im_size
        masks, scores = self.decoder(image_embeddings, batched_point_coords * scale.flip(0), batched_point_labels)
        masks, scores = best_first(masks[:, :, 1:], scores[:, :, 1:])
        return enlarge(masks, orig_im_size), scores, masks


class SamEncoder(LayoutEncoder):
    def forward(self, input_image: torch.Tensor) -> torch.Tensor:
        return super().forward(input_image.permute(2, 0, 1)[None] / 255)


class SamDecoder(LayoutDecoder):
    """For N images with one prompt each; segment-anything's own takes one image."""

    def forward(self, image_embeddings, point_coords, point_labels, mask_input, has_mask_input, orig_im_size):
        frame = (orig_im_size * (SAM_SIDE / orig_im_size.max()) + 0.5).floor()  # height, width
        grid = sides(image_embeddings)
        points = point_coords * (self.patch_size * grid / frame).flip(0)
        # One cell of the model's masks is this many cells of segment-anything's.
        step = frame * (SAM_MASK_SIDE / SAM_SIDE) / (MASK_CELLS_PER_PATCH * grid)
        has_mask = has_mask_input[:, None] > 0  # osam passes -1 for "none"
        prompts = ()
        if self.mask_prompts:
            rows, columns = (MASK_CELLS_PER_PATCH * n for n in image_embeddings.shape[-2:])
            prompts = (None, resample(mask_input, rows, columns, step), has_mask)
        masks, scores = self.decoder(image_embeddings, points[:, None], point_labels[:, None], *prompts)
        if not self.mask_prompts:
            masks = torch.where(has_mask[..., None, None, None], torch.nan, masks)
        masks, scores = best_first(masks[:, 0, 1:], scores[:, 0, 1:])
        masks = masks[:, :1]
        return (
            enlarge(masks, orig_im_size),
            scores[:, :1],
            resample(masks, SAM_MASK_SIDE, SAM_MASK_SIDE, 1 / step),
        )


class TransformersJsEncoder(nn.Module):
    def __init__(self, model: EfficientSamModel, image_processor: EfficientSamImageProcessor):
        super().__init__()
        self.encoder = ExportedEncoder(model)
        self.positions = model.prompt_encoder.position_embedding

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings = self.encoder(pixel_values)
        positions = self.positions.grid(*embeddings.shape[-2:]).T.unflatten(1, embeddings.shape[-2:])
        return embeddings, positions.expand_as(embeddings)


class TransformersJsDecoder(LayoutDecoder):
    def forward(self, image_embeddings, image_positional_embeddings, input_points, input_labels):
        positions = image_positional_embeddings[0].flatten(1).T
        masks, scores = self.decoder(image_embeddings, input_points, input_labels, positions=positions)
        return scores[:, :, 1:], masks[:, :, 1:]


# ------------------------------------------------------------------------------------------------ layouts


class Part(NamedTuple):
    """One file of a layout: its path, the module that is traced, the outputs' names."""

    file: str
    module: type[nn.Module]
    outputs: list[str]


LAYOUTS = {
    "official": (
        Part("efficient_sam_encoder.onnx", LayoutEncoder, ["image_embeddings"]),
        Part("efficient_sam_decoder.onnx", OfficialDecoder, ["output_masks", "iou_predictions", "low_res_masks"]),
    ),
    "sam": (
        Part("efficientsam.encoder.onnx", SamEncoder, ["image_embeddings"]),
        Part("efficientsam.decoder.onnx", SamDecoder, ["masks", "iou_predictions", "low_res_masks"]),
    ),
    "transformers.js": (
        Part("onnx/vision_encoder.onnx", TransformersJsEncoder, ["image_embeddings", "image_positional_embeddings"]),
        Part("onnx/prompt_encoder_mask_decoder.onnx", TransformersJsDecoder, ["iou_scores", "pred_masks"]),
    ),
}
BATCH, PROMPTS, POINTS, HEIGHT, WIDTH = map(Dim, ("batch", "prompts", "points", "height", "width"))
AXES: dict[str, dict | None] = {  # the inputs of all modules, and their dynamic axes
    "batched_images": {0: BATCH, 2: HEIGHT, 3: WIDTH},
    "batched_point_coords": {0: BATCH, 1: PROMPTS, 2: POINTS},
    "batched_point_labels": {0: BATCH, 1: PROMPTS, 2: POINTS},
    "has_mask_input": {0: BATCH},
    "image_embeddings": {0: BATCH},
    "image_positional_embeddings": {0: BATCH},
    "input_image": {0: HEIGHT, 1: WIDTH},
    "input_labels": {0: BATCH, 1: PROMPTS, 2: POINTS},
    "input_points": {0: BATCH, 1: PROMPTS, 2: POINTS},
    "mask_input": {0: BATCH},
    "orig_im_size": None,
    "pixel_values": {0: BATCH},
    "point_coords": {0: BATCH, 1: POINTS},
    "point_labels": {0: BATCH, 1: POINTS},
}


def random_inputs(
    module: nn.Module, model: EfficientSamModel, grid: tuple[int, int], shape: tuple[int, int, int], size: tuple
) -> dict[str, torch.Tensor]:
    """
    For a module here: B images of a size with Q prompts of P points each, where `shape` is (B, Q, P). Labels are of
    every kind that the model takes but 2 and 3, which a model outside of an exported file takes as boxes.
    """
    config, (batch, *_) = model.config, shape
    patch_size, channels = config.vision_config.patch_size, config.vision_config.output_channels
    kinds = torch.tensor([1, 0, -1] if config.prompt_encoder_config.background_points else [1, -1])
    labels = kinds[torch.randint(len(kinds), shape)]
    coords = torch.rand(*shape, 2) * torch.tensor([size[1], size[0]])
    positions = model.prompt_encoder.position_embedding.grid(*grid).T.unflatten(1, grid)
    every = {
        "batched_images": torch.rand(batch, 3, *size),
        "batched_point_coords": coords,
        "batched_point_labels": labels.float(),
        "has_mask_input": torch.arange(batch) * float(config.prompt_encoder_config.mask_prompts),
        "image_embeddings": torch.randn(batch, channels, *grid),
        "image_positional_embeddings": positions.expand(batch, -1, -1, -1).contiguous(),
        "input_image": 255 * torch.rand(*size, 3),
        "input_labels": labels,
        "input_points": coords,
        "mask_input": 10 * torch.randn(batch, 1, SAM_MASK_SIDE, SAM_MASK_SIDE),
        "orig_im_size": torch.tensor(size, dtype=torch.float32 if isinstance(module, SamDecoder) else torch.int64),
        "pixel_values": torch.randn(batch, 3, *(patch_size * cells for cells in grid)),
        "point_coords": coords[:, 0],
        "point_labels": labels[:, 0].float(),
    }
    return {name: every[name] for name in inspect.signature(module.forward).parameters}


def extra_files(layout: str, description: dict) -> dict[str, str]:
    """The configuration that a layout has beside its ONNX files: name -> text."""
    if layout == "sam":
        config = {
            "type": "segment_anything",
            "name": "efficientsam",
            "display_name": f"EfficientSAM ({description['model']})",
            "encoder_model_path": "efficientsam.encoder.onnx",
            "decoder_model_path": "efficientsam.decoder.onnx",
            "input_size": SAM_SIDE,
            "max_width": SAM_SIDE,
            "max_height": 682,
        }
        return {"config.yaml": "".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items())}
    if layout == "transformers.js":
        # Where a browser has no WebGPU transformers.js would take the 8-bit files, which may not be there.
        config = {"model_type": "sam", "architectures": ["SamModel"], "transformers.js_config": {"dtype": "fp32"}}
        options = description["preprocessing"]
        preprocessor = {
            "image_processor_type": "SamImageProcessor",
            "processor_class": "SamProcessor",
            "resample": 2,  # bilinear
            "size": dict(zip(("height", "width"), options["size"], strict=True)),
            **{name: options[name] for name in SAM_PREPROCESSING},
        }
        files = {"config.json": config, "preprocessor_config.json": preprocessor}
        return {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}
    return {}


# ------------------------------------------------------------------------------------------------ export_layout


def transformers_js_file(file: str, variant: str) -> str:
    """Name of a variant's file, with transformers.js' suffix."""
    return file.replace(".onnx", {"float16": "_fp16.onnx", "int8": "_quantized.onnx"}[variant])


def measure_masks(folder: Path, exact: list[str], smaller: list[str], pixels: list[torch.Tensor]) -> float:
    """Mean IoU of the masks of two pairs of transformers.js' files, all candidates, for `grid_boxes` of each image."""
    pairs = [
        [open_session(folder / file, ["CPUExecutionProvider"], torch.get_num_threads()) for file in files]
        for files in (exact, smaller)
    ]
    ious = []
    for values in pixels:
        height, width = values.shape[-2:]
        corners = np.stack(list(grid_boxes(width, height))).reshape(1, -1, 2, 2).astype(np.float32)
        labels = np.broadcast_to(np.array([2, 3]), corners.shape[:-1])
        masks = []
        for encoder, decoder in pairs:
            embeddings, positions = encoder({"pixel_values": values.numpy()})
            prompts = {"input_points": corners, "input_labels": labels}
            features = {"image_embeddings": embeddings, "image_positional_embeddings": positions}
            masks.append(decoder(prompts | features)[1] > 0)
        ious.append(mask_iou(*masks))
    return float(np.mean(ious))


def export_layout(
    layout: str,
    name: str,
    output: Path,
    variants: Sequence[str] = (),
    images: Path | None = None,
    allow_loss: bool = False,
) -> dict[str, dict]:
    """
    [`export_onnx`] in the layout of other tools: one of `LAYOUTS`. Other arguments and the result are the same.
    `variants` are for "transformers.js".

    Raises:
        ValueError: as `export_onnx`; or the checkpoint does not squash images to a fixed size, as these layouts do.
    """
    test_images: list[Image.Image] = load_images(images) if variants else []
    name = find_checkpoint(name)
    model, processor = load_model(name)
    image_processor = processor.image_processor
    if image_processor.keep_aspect_ratio or not image_processor.do_resize:
        raise ValueError(
            f"layout {layout} is for checkpoints that squash images to a fixed size, and the processor of {name} does "
            "not; export it with --layout native."
        )
    model = model.cpu()
    model.set_attn_implementation("sdpa")
    description = describe(name, model, processor)
    report, graphs = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for part in LAYOUTS[layout]:
            (folder / part.file).parent.mkdir(exist_ok=True)
            graphs[part.file], difference = write_part(part, model, image_processor, folder, description)
            report[part.file] = {"difference": difference}
        for variant in variants:
            files = {file: transformers_js_file(file, variant) for file in graphs}
            for file, graph in graphs.items():
                save(VARIANTS[variant](graph), folder / files[file], description)
            pixels = [image_processor(image)["pixel_values"] for image in test_images]
            iou = measure_masks(folder, list(files), list(files.values()), pixels)
            refuse_loss(variant, iou, allow_loss)
            report |= {file: {"mask_iou": iou} for file in files.values()}
        contents = {output / file: (folder / file).read_bytes() for file in report}
    contents |= {output / file: text.encode() for file, text in extra_files(layout, description).items()}
    variant_files = {transformers_js_file(file, one) for file in graphs for one in VARIANTS}
    return write_export(output, contents, report, variant_files)


@torch.no_grad()
def write_part(
    part: Part,
    model: EfficientSamModel,
    image_processor: EfficientSamImageProcessor,
    folder: Path,
    description: dict,
) -> tuple[onnx.ModelProto, float]:
    """Exports a part into a folder and checks it: its graph, and its largest difference from torch."""
    patch_size = model.config.vision_config.patch_size
    grid = (image_processor.size.height // patch_size, image_processor.size.width // patch_size)
    module = part.module(model, image_processor).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, *_ = cases = [
            random_inputs(module, model, grid, shape, size)
            for shape, size in (((2, 3, 4), (60, 70)), ((1, 1, 1), (90, 50)))
        ]
        graph = export(module, first, part.outputs, AXES)
    save(graph, folder / part.file, description)
    return graph, check(folder / part.file, answers_of(module), cases)


def answers_of(module: nn.Module):
    """What `check` compares with: the module's outputs as a list."""

    def expect(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        found = module(**inputs)
        return [found] if isinstance(found, torch.Tensor) else list(found)

    return expect


__all__ = ["LAYOUTS", "export_layout"]
