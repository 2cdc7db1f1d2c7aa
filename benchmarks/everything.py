"""Segment everything: the generator against the plain way and against transformers' pipeline, on one image.

    python benchmarks/everything.py                          # 1024 points on a 1024 x 1024 image
    python benchmarks/everything.py --points-per-side 16 --cpu-time

Decoder and post-processing, from the image's embedding on, in interleaved runs in one process:

- naive: what the official notebook does, written for this script. Each prompt has a copy of the image, projects it for
  itself and has all six prompt slots; all four masks are made by transposed convolutions; every candidate is brought
  to the size of the image; then come predicted IoU, stability on the large masks and non-maximum suppression. Some
  points at a time, because all of them together do not fit into memory. (The notebook also sorts the candidates and
  copies them; that is left out.)
- pipeline: transformers' `MaskGenerationPipeline` on a `SamModel` with a decoder of the same size. Its random masks
  would be noise, so after the model has done its work they are replaced by those that the others have. Its image
  processor is SAM's, except that its non-maximum suppression, which needs torchvision, and its way back from
  run-length code are ours. It is not exactly the others' answer: it enlarges masks in another way, so its masks match
  by their IoU only roughly.
- ours: `EfficientSamMaskGenerator`, what it does after the embedding.
- adaptive: the same with `adaptive=True`, which asks about fewer points and so finds other masks.

Thresholds are quantiles of the image's own scores, since what is a good score differs between models. Memory is
everything_naive_memory.py's.
"""

import argparse
import copy
import functools
import statistics
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import SamConfig, SamModel, pipeline
from transformers.image_utils import SizeDict
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from hf_efficientsam import EfficientSamModel
from hf_efficientsam.inference import mask_generation
from hf_efficientsam.inference.loading import load_model
from hf_efficientsam.inference.mask_generation import EfficientSamMaskGenerator
from hf_efficientsam.model import mask_decoder_shared_efficientsam, onednn_efficientsam
from hf_efficientsam.model.mask_operations_efficientsam import (
    batched_mask_to_box,
    build_point_grid,
    calculate_stability_score,
    non_maximum_suppression,
    resize_masks,
)

IMAGE = Path(__file__).parents[1] / "examples" / "bus.jpg"


@dataclass
class Scene:
    """A square image's embedding `[1, C, h, w]`, its side in pixels, and which masks are wanted."""

    model: EfficientSamModel
    image: Image.Image
    embedding: torch.Tensor
    size: int
    points_per_side: int
    pred_iou_thresh: float = 0.0
    stability_score_thresh: float = 0.0

    @property
    def points(self) -> torch.Tensor:
        """`[n, 2]`, x and y in pixels."""
        return (self.size * torch.from_numpy(build_point_grid(self.points_per_side))).float().to(self.model.device)

    def generator(self, processor, **options) -> EfficientSamMaskGenerator:
        return EfficientSamMaskGenerator(
            self.model,
            processor,
            points_per_side=self.points_per_side,
            pred_iou_thresh=self.pred_iou_thresh,
            stability_score_thresh=self.stability_score_thresh,
            **options,
        )


# ------------------------------------------------------------------------------------------------ three ways


@mock.patch.object(onednn_efficientsam, "LINEAR", None)  # torch's own products, as in the official code
def decode_plainly(model: EfficientSamModel, embedding: torch.Tensor, points: torch.Tensor) -> tuple:
    """
    Args:
        model: with eager attention, which writes the weights out as the official code does.
        embedding: `[1, C, h, w]`.
        points: `[P, 2]`.

    Returns:
        logits `[P, M, 4h, 4w]` and predicted IoU `[P, M]`.
    """
    decoder, grid_size = model.mask_decoder, embedding.shape[-2:]
    image_positions, prompts, token_multiplicity, dense = model.encode_prompts(embedding, points[None, :, None])
    image = decoder.embed_image(embedding, dense)
    slots = prompts.repeat_interleave(token_multiplicity[0, 0], dim=2)  # equal tokens are merged in `prompts`
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([outputs.expand(1, len(points), -1, -1), slots], dim=2)
    image = image.repeat(1, len(points), 1, 1)
    token_positions = tokens
    for layer in decoder.layers:
        tokens, image, _ = layer(tokens, image, token_positions, image_positions, None)
    update, _ = decoder.final_token_to_image_attention(tokens + token_positions, image + image_positions, image)
    tokens, image = decoder.final_layernorm(tokens + update)[0], image[0]

    upscaling, masks = decoder.upscaling, image.transpose(1, 2).unflatten(2, grid_size)
    for conv, norm in zip(upscaling.convs, [*upscaling.norms, torch.nn.Identity()], strict=True):
        masks = upscaling.activation(norm(conv(masks)))
    filters = torch.stack([net(tokens[:, 1 + i]) for i, net in enumerate(decoder.hypernetworks)], dim=1)
    logits = (filters @ masks.flatten(2)).unflatten(2, masks.shape[2:])
    return logits[:, 1:], decoder.iou_head(tokens[:, 0])[:, 1:]


@torch.no_grad()
def naive(plain: EfficientSamModel, scene: Scene, points_per_batch: int) -> list[np.ndarray]:
    """Masks bool `[size, size]`."""
    size = (scene.size, scene.size)
    masks, scores = [], []
    for points in scene.points.split(points_per_batch):
        logits, iou = decode_plainly(plain, scene.embedding, points)
        logits, iou = resize_masks(logits, size, size).flatten(0, 1), iou.flatten()
        confident = iou > scene.pred_iou_thresh
        logits, iou = logits[confident], iou[confident]
        stable = calculate_stability_score(logits, 0.0, 1.0) > scene.stability_score_thresh
        masks.append(logits[stable] > 0)
        scores.append(iou[stable])
    masks, scores = torch.cat(masks), torch.cat(scores)
    return list(masks[non_maximum_suppression(batched_mask_to_box(masks), scores, 0.7)].cpu().numpy())


@torch.no_grad()
def ours(generator: EfficientSamMaskGenerator, scene: Scene) -> list[np.ndarray]:
    size = (scene.size, scene.size)
    found = generator.search(scene.embedding, size, [0, 0, *size], size, generator.point_grids[0])
    return [record["segmentation"] for record in generator.finish(found, size)]


class SamPipeline:
    """The pipeline without the encoder's time: what comes before the decoder is done once, here."""

    def __init__(self, scene: Scene, processor, logits: torch.Tensor, scores: torch.Tensor):
        decoder = scene.model.config.mask_decoder_config
        width = decoder.hidden_size
        shared = ("hidden_size", "mlp_dim", "num_hidden_layers", "num_attention_heads", "attention_downsample_rate")
        shared += ("iou_head_depth", "iou_head_hidden_dim", "num_multimask_outputs", "hidden_act")
        encoder = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "window_size": 2}
        encoder |= {"output_channels": width, "num_pos_feats": width // 2, "global_attn_indexes": []}
        config = SamConfig(
            vision_config={**encoder, "image_size": scene.size},
            prompt_encoder_config={"hidden_size": width, "image_size": scene.size},
            mask_decoder_config={name: getattr(decoder, name) for name in shared},
        )
        sam = SamModel(config).to(scene.model.device).eval()
        sam.get_image_embeddings = lambda pixel_values: scene.embedding
        side = scene.points_per_side

        def replace(model, inputs, given, output):
            x, y = (given["input_points"][0, :, 0] / scene.size * side).long().unbind(dim=1)
            output.pred_masks, output.iou_scores = logits[None, y * side + x], scores[None, y * side + x]
            return output

        sam.register_forward_hook(replace, with_kwargs=True)
        image_processor = SamImageProcessorPil(
            size={"longest_edge": scene.size}, pad_size={"height": scene.size, "width": scene.size}
        )
        image_processor.post_process_for_mask_generation = processor.post_process_for_mask_generation
        self.pipeline = pipeline(
            "mask-generation", model=sam, image_processor=image_processor, device=scene.model.device
        )
        self.inputs = list(self.pipeline.preprocess(scene.image, points_per_crop=side))
        self.thresholds = {name: getattr(scene, name) for name in ("pred_iou_thresh", "stability_score_thresh")}

    def __call__(self) -> list[np.ndarray]:
        outputs = [self.pipeline.forward(dict(inputs), **self.thresholds) for inputs in self.inputs]
        return self.pipeline.postprocess(outputs)["masks"]


# ------------------------------------------------------------------------------------------------ the setting


def load(name: str | None, size: int):
    """Model and image processor for images of `size` x `size` pixels."""
    model, processor = load_model(name)
    processor.image_processor.size = SizeDict(height=size, width=size)
    return model, processor.image_processor


@torch.no_grad()
def all_candidates(scene: Scene) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[n, M, h, w]` and scores `[n, M]` of all points."""
    outputs = [
        scene.model(image_embeddings=scene.embedding, input_points=points[None, :, None])
        for points in tqdm(scene.points.split(16), desc="scores")
    ]
    return torch.cat([one.pred_masks[0] for one in outputs]), torch.cat([one.iou_scores[0] for one in outputs])


def between(values: torch.Tensor, quantile: float) -> float:
    """A number between two of the values, so that rounding decides nothing; so large a share of them is below."""
    values = values.flatten().sort().values.double()
    above = max(1, min(len(values) - 1, round(quantile * len(values))))
    return values[above - 1 : above + 1].mean().item()


def choose_thresholds(scene: Scene, logits: torch.Tensor, scores: torch.Tensor, prompts: float, stable: float) -> None:
    """So that of the prompts the share `prompts` has a confident candidate, and of those candidates `stable` is so."""
    scene.pred_iou_thresh = between(scores.amax(dim=1), 1 - prompts)
    size, confident = (scene.size, scene.size), logits[scores > scene.pred_iou_thresh]
    resized = (resize_masks(one[None, None], size, size)[0] for one in confident)
    stability = [calculate_stability_score(one, 0.0, 1.0) for one in resized]
    scene.stability_score_thresh = between(torch.cat(stability), 1 - stable)


def open_scene(args: argparse.Namespace) -> tuple:
    """The scene of the options, its image processor, and logits and scores as of `all_candidates`."""
    model, processor = load(args.model, args.image_size)
    image = Image.open(args.image).convert("RGB").resize((args.image_size, args.image_size))
    with torch.no_grad():
        embedding = model.get_image_embeddings(processor(image)["pixel_values"].to(model.device))
    scene = Scene(model, image, embedding, args.image_size, args.points_per_side)
    logits, scores = all_candidates(scene)
    choose_thresholds(scene, logits, scores, args.prompts, args.stable)
    return scene, processor, logits, scores


def matched(masks: list[np.ndarray], reference: list[np.ndarray]) -> tuple[float, float]:
    """
    The share of the reference's masks that are among `masks`, IoU at least 0.999, and the median of the reference's
    best IoUs with them.
    """
    masks, reference = (torch.from_numpy(np.stack(x)).flatten(1).float() for x in (masks, reference))
    intersection = reference @ masks.T
    ious = intersection / (reference.sum(dim=1)[:, None] + masks.sum(dim=1) - intersection)
    best = ious.amax(dim=1)
    return (best >= 0.999).double().mean().item(), best.median().item()


# ------------------------------------------------------------------------------------------------ measuring


class Stopwatch:
    """Seconds of functions, each without those that it calls and that are watched too."""

    def __init__(self, clock, device: torch.device):
        self.clock, self.device = clock, device
        self.seconds = defaultdict(float)
        self.called = [0.0]

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def run(self, name: str, function, *args, **kwargs):
        started = self.now()
        self.called.append(0.0)
        result = function(*args, **kwargs)
        spent = self.now() - started
        self.seconds[name] += spent - self.called.pop()
        self.called[-1] += spent
        return result

    def watch(self, name: str, owner, attribute: str):
        """Until the end of the context."""
        original = getattr(owner, attribute)

        def watched(*args, **kwargs):
            return self.run(name, original, *args, **kwargs)

        return mock.patch.object(owner, attribute, watched)


def stages(scene: Scene, processor, clock) -> dict[str, float]:
    """Seconds in each stage of the generator, encoder included."""
    generator = scene.generator(processor)
    watch = Stopwatch(clock, scene.model.device)
    with ExitStack() as watched:
        for name, owner, attribute in (
            ("encode", generator.model, "get_image_embeddings"),
            ("decode: tokens and IoU", generator.model, "predict_confident"),
            ("decode: masks", mask_decoder_shared_efficientsam, "upscale_doubled"),
            ("decode: masks", mask_decoder_shared_efficientsam.SharedImageDecoder, "double"),
            ("decode: the image", generator.model, "share_image"),
            ("measure", mask_generation, "measure_masks"),
            ("NMS", mask_generation, "non_maximum_suppression"),
            ("NMS", mask_generation, "suppress_duplicates"),
            ("enlarge", generator, "enlarge"),
        ):
            watched.enter_context(watch.watch(name, owner, attribute))
        watch.run("the rest", generator.generate, scene.image)
    return dict(watch.seconds)


def compare(args: argparse.Namespace) -> dict:
    """The numbers of each way."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    scene, processor, logits, scores = open_scene(args)
    model, plain = scene.model, copy.deepcopy(scene.model)
    plain.set_attn_implementation("eager")
    ways = {
        "naive": functools.partial(naive, plain, scene, args.naive_batch),
        "pipeline": SamPipeline(scene, processor, logits, scores),
        "ours": functools.partial(ours, scene.generator(processor), scene),
        "adaptive": functools.partial(ours, scene.generator(processor, adaptive=True), scene),
    }
    watch, seconds = Stopwatch(clock, model.device), defaultdict(list)
    for _ in tqdm(range(args.repeats), desc="runs"):
        masks = {}
        for name, way in ways.items():
            masks[name] = watch.run(name, way)
            seconds[name].append(watch.seconds.pop(name))
            tqdm.write(f"{name}: {seconds[name][-1]:.2f}", file=sys.stderr)  # a run can take minutes
    return {
        "thresholds": (scene.pred_iou_thresh, scene.stability_score_thresh),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "masks": {name: len(found) for name, found in masks.items()},
        "matched": {name: matched(found, masks["naive"]) for name, found in masks.items()},
        "stages": stages(scene, processor, clock),
    }


def show(args: argparse.Namespace, result: dict) -> None:
    seconds, unit = result["seconds"], "CPU seconds" if args.cpu_time else "seconds"
    iou, stability = result["thresholds"]
    print(f"{args.points_per_side**2} points, {Path(args.image).name} at {args.image_size} x {args.image_size} pixels")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, medians of {args.repeats}")
    print(f"predicted IoU above {iou:.4f}, which {args.prompts:.0%} of the prompts have a candidate for")
    print(f"stability above {stability:.4f}, which {args.stable:.0%} of those candidates have\n")

    print(f"{'':10}{unit:>12}{'of naive':>10}{'of pipeline':>13}{'masks':>7}{'matched':>9}{'IoU':>7}")
    for name, value in seconds.items():
        print(
            f"{name:10}{value:12.2f}{value / seconds['naive']:10.3f}{value / seconds['pipeline']:13.3f}"
            f"{result['masks'][name]:7}{result['matched'][name][0]:9.3f}{result['matched'][name][1]:7.3f}"
        )
    total = sum(result["stages"].values())
    print(f"\nstages of one image with the generator, {total:.2f} {unit}, {1 / total:.3f} images/s")
    for name, value in result["stages"].items():
        print(f"  {name:24}{value:8.2f}{value / total:8.1%}")


def scene_parser(description: str) -> argparse.ArgumentParser:
    """The options of `open_scene`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points-per-side", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=1024, help="side of the image and of the model input")
    parser.add_argument("--image", default=str(IMAGE), help="file; it is made square")
    parser.add_argument("--model", help="path or Hub name; the bundled one by default")
    parser.add_argument("--prompts", type=float, default=0.5, help="share of the prompts with a confident mask")
    parser.add_argument("--stable", type=float, default=0.5, help="share of the confident masks that are stable")
    parser.add_argument("--threads", type=int)
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = scene_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--naive-batch", type=int, default=16, help="points that the naive way decodes together")
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that others use: count CPU seconds")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    show(args, compare(args))


if __name__ == "__main__":
    main()
