"""One table of what costs how much, each row a ratio against a named peer in one interleaved run.

    python benchmarks/table.py                                  # EfficientSAM-Ti at 1024 pixels, all rows
    python benchmarks/table.py --only encoder decoder --size 512 --repeats 3 --cpu-time

Weights are random (times do not depend on them), but for everything mode, which is `everything.py` at few points.
Peers:

- plain: the same weights with softmax attention written out, as the official code does; for the decoder each prompt
  with an image of its own, all six prompt slots, transposed convolutions (`everything.decode_plainly`).
- SAM (ViT-B), SAM 2 (Hiera-tiny), EdgeTAM (RepViT): transformers' own, with random weights. EdgeTAM needs timm.
- full: a training step of the mask decoder with 16 prompts and a frozen encoder, which is run each time, and one round
  on all cells of the image; ours has the encoder's output at hand and decodes `CELLS` cells a prompt.
- onnxruntime, OpenVINO: the exported encoder, in the same number of threads.

On a GPU the encoder in bfloat16 for 1, 8 and 64 images, and compiled, comes on top, with its share of the peak.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import torch
from decoder_memory import compare as compare_decoder_memory
from everything import compare as compare_everything
from everything import decode_plainly
from everything import parse as parse_everything
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import EdgeTamVisionConfig, EdgeTamVisionModel, Sam2VisionConfig, Sam2VisionModel, SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionModel

from hf_efficientsam import EfficientSamConfig, EfficientSamModel
from hf_efficientsam.export.onnx_export import export_encoder
from hf_efficientsam.inference.onnx_predictor import open_session, open_with_openvino
from hf_efficientsam.model import onednn_efficientsam
from hf_efficientsam.training.data.synthetic import random_ellipses
from hf_efficientsam.training.masks.feature_views import encode_frozen
from hf_efficientsam.training.masks.interactive import InteractiveSegmentation, PromptConfig
from hf_efficientsam.training.masks.losses import MaskLoss

CELLS = 96  # a prompt in training steps, as in the recipes of the bundled checkpoint
WIDTHS = {"ti": (192, 3), "s": (384, 6)}  # of the encoder, and its heads


def medians(ways: dict[str, Callable], repeats: int, clock: Callable, device: torch.device, title: str) -> dict:
    """Seconds of each way, the median of `repeats` runs in turn after one that is not counted."""
    seconds = defaultdict(list)
    for turn in tqdm(range(repeats + 1), desc=title):
        for name, way in ways.items():
            synchronize(device)
            started = clock()
            way()
            synchronize(device)
            if turn:
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def new_model(shape: str, size: int, attention: str) -> EfficientSamModel:
    torch.manual_seed(0)
    width, heads = WIDTHS[shape]
    vision = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width, "image_size": size}
    return EfficientSamModel._from_config(
        EfficientSamConfig(vision_config=vision), attn_implementation=attention
    ).eval()


@mock.patch.object(onednn_efficientsam, "LINEAR", None)  # torch's own products, as in the official code
def encode_plainly(model: EfficientSamModel, pixel_values: torch.Tensor) -> torch.Tensor:
    return model.get_image_embeddings(pixel_values)


def print_rows(title: str, seconds: dict[str, float], ours: str, notes: dict[str, str]) -> None:
    print(f"\n{title}")
    for name, value in seconds.items():
        ratio = "" if name == ours else f"  {ours} is {seconds[ours] / value:.3f} of it"
        print(f"  {name:36}{1000 * value:10.0f} ms{ratio}{notes.get(name, '')}")


# ------------------------------------------------------------------------------------------------ the rows


def encoder(args: argparse.Namespace) -> None:
    model, plain = new_model(args.shape, args.size, "sdpa"), new_model(args.shape, args.size, "eager")
    pixel_values = torch.randn(1, 3, args.size, args.size)
    ways = {"ours": functools.partial(model.get_image_embeddings, pixel_values)}
    ways["plain"] = functools.partial(encode_plainly, plain, pixel_values)
    difference = (ways["ours"]() - ways["plain"]()).abs().max().item()
    notes = {"plain": f", largest difference {difference:.1e}"}
    if args.size % 64 == 0:
        sam = SamVisionModel(SamVisionConfig(image_size=args.size)).eval()
        ways["SAM ViT-B"] = functools.partial(sam, pixel_values)
        ways["SAM 2 Hiera-tiny"] = functools.partial(new_sam2(args.size), pixel_values)
        try:
            edge = EdgeTamVisionModel(EdgeTamVisionConfig()).eval()
            ways["EdgeTAM RepViT"] = functools.partial(edge, pixel_values)
        except ImportError as error:
            print(f"no row for EdgeTAM: {str(error).strip().splitlines()[0]}")
    print_rows(f"encoder, {args.size} x {args.size}", args.measure(ways, "encoder"), "ours", notes)


def new_sam2(size: int) -> torch.nn.Module:
    config = Sam2VisionConfig(backbone_feature_sizes=[[size // stride] * 2 for stride in (4, 8, 16)])
    config.backbone_config.image_size = [size, size]
    return Sam2VisionModel(config).eval()


def decoder(args: argparse.Namespace) -> None:
    model, plain = new_model(args.shape, args.size, "sdpa"), new_model(args.shape, args.size, "eager")
    embedding = torch.randn(1, 256, args.size // 16, args.size // 16)
    for count in args.prompts:
        points = args.size * torch.rand(count, 2)

        def ours(points=points):
            for part in points.split(64):  # what comes back is let go, as masks of 1024 prompts fill a gigabyte
                result = model(image_embeddings=embedding, input_points=part[None, :, None])
            return result.pred_masks[0]

        def plainly(points=points):
            for part in points.split(16):  # the plain way fits into no memory otherwise
                result = decode_plainly(plain, embedding, part)
            return result[0]

        few = points[:8]
        difference = (ours(few) - plainly(few)).abs().max().item()
        seconds = args.measure({"ours": ours, "plain": plainly}, f"{count} prompts")
        notes = {"plain": f", largest difference {difference:.1e}"}
        print_rows(f"mask decoder, {count} prompt{'s' * (count > 1)}", seconds, "ours", notes)


def exported(args: argparse.Namespace) -> None:
    model, plain = new_model(args.shape, args.size, "sdpa"), new_model(args.shape, args.size, "eager")
    pixel_values = torch.randn(1, 3, args.size, args.size)
    threads, inputs = torch.get_num_threads(), {"pixel_values": pixel_values.numpy()}
    ways = {
        "torch": functools.partial(model.get_image_embeddings, pixel_values),
        "plain": functools.partial(encode_plainly, plain, pixel_values),
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "encoder.onnx")
        onnx.save(export_encoder(model), file)
        ways["onnxruntime"] = functools.partial(open_session(file, ["CPUExecutionProvider"], threads), inputs)
        try:
            ways["OpenVINO"] = functools.partial(open_with_openvino(file, threads), inputs)
        except ImportError as error:
            print(f"no row for OpenVINO: {error}")
        truth = ways["torch"]().numpy()
        notes = {name: f", largest difference {np.abs(ways[name]()[0] - truth).max():.1e}" for name in list(ways)[2:]}
        seconds = args.measure(ways, "exported encoder")
    for name in ["torch", *list(ways)[2:]]:
        row = {name: seconds[name], "plain": seconds["plain"]}
        print_rows(f"encoder in {name}, {args.size} x {args.size}", row, name, notes)


def training(args: argparse.Namespace) -> None:
    model = new_model(args.shape, args.size, "sdpa").train()
    model.vision_encoder.embeddings.requires_grad_(False)
    model.vision_encoder.layers.requires_grad_(False)
    options = PromptConfig(correction_probability=0)  # one round, as on some cells
    task, shared = InteractiveSegmentation(model, MaskLoss(), options), torch.Generator().manual_seed(0)
    pixel_values = torch.randn(1, 3, args.size, args.size)
    masks = random_ellipses(torch.rand(1, 16, 4), args.size, options.smallest_ellipse)
    batch = (pixel_values, masks, torch.ones(1, 16, dtype=torch.bool), torch.rand(1, 16, options.noise_size), shared)
    hidden_states = encode_frozen(model.vision_encoder, pixel_values, last_layers=0)

    @torch.enable_grad()
    def step(**known) -> None:
        task(*batch, **known)["loss"].backward()
        model.zero_grad()

    ways = {
        "ours": functools.partial(step, hidden_states=hidden_states, num_cells=CELLS),
        "ours on all cells": functools.partial(step, hidden_states=hidden_states),
        "full": step,
    }
    seconds = args.measure(ways, "training step")
    print_rows(f"training step of the mask decoder, 16 prompts, {args.size} x {args.size}", seconds, "ours", {})


def everything(args: argparse.Namespace) -> None:
    options = ["--points-per-side", "8", "--repeats", str(args.repeats), "--image-size", str(args.size)]
    result = compare_everything(parse_everything([*options, *["--cpu-time"] * args.cpu_time]))
    notes = {
        name: f", {result['masks'][name]} masks, {share:.3f} matched" for name, (share, _) in result["matched"].items()
    }
    print_rows("segment everything, 64 points, without the encoder", result["seconds"], "ours", notes)


def memory(args: argparse.Namespace) -> None:
    result = compare_decoder_memory(args.size, 64)
    print("\npeak memory of the mask decoder, 64 prompts")
    for name in ("shared", "copied"):
        print(f"  {'ours' if name == 'shared' else 'image copied':36}{result[name] / 2**20:10.0f} MiB")
    print(f"  ours is {result['ratio']:.3f} of it")


def gpu(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        print("\nno rows for a GPU: there is none")
        return
    device = torch.device("cuda")
    model = new_model(args.shape, args.size, "sdpa").to(device, torch.bfloat16)
    plain = new_model(args.shape, args.size, "eager").to(device, torch.bfloat16)
    compiled = torch.compile(model.get_image_embeddings, mode="max-autotune")  # with CUDA graphs
    for count in (1, 8, 64):
        pixel_values = torch.randn(count, 3, args.size, args.size, device=device, dtype=torch.bfloat16)
        with FlopCounterMode(display=False) as counter:
            model.get_image_embeddings(pixel_values)
        ways = {"ours": functools.partial(model.get_image_embeddings, pixel_values)}
        ways["ours, compiled"] = functools.partial(compiled, pixel_values)
        if count < 64:  # the weights of all heads would fill the memory
            ways["plain"] = functools.partial(plain.get_image_embeddings, pixel_values)
        seconds = args.measure(ways, f"{count} images", device)
        flops = counter.get_total_flops() / 1e12
        notes = {
            name: f", {count / value:.1f} images/s, {flops / value / args.peak:.1%} of the peak"
            for name, value in seconds.items()
        }
        print_rows(f"encoder on {torch.cuda.get_device_name()}, bfloat16, {count} images", seconds, "ours", notes)


ROWS = {
    "encoder": encoder,
    "exported": exported,
    "decoder": decoder,
    "training": training,
    "everything": everything,
    "memory": memory,
    "gpu": gpu,
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--shape", choices=WIDTHS, default="ti")
    parser.add_argument("--size", type=int, default=1024, help="side of the model input in pixels")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 32, 1024])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that others use: count CPU seconds")
    parser.add_argument("--peak", type=float, default=989, help="the GPU's peak in TFLOP/s (bfloat16, dense)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    cpu = torch.device("cpu")
    args.measure = lambda ways, title, device=cpu: medians(ways, args.repeats, clock, device, title)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, medians of {args.repeats}")
    for name in args.only:
        ROWS[name](args)


if __name__ == "__main__":
    main()
