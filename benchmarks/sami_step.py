"""What masking and caching save in a step of SAMI pretraining: forward, backward and optimiser, interleaved medians.

    python benchmarks/sami_step.py                                   # EfficientSAM-Ti at 224, the paper's decoder
    python benchmarks/sami_step.py --small                           # the decoder of recipes/studies/sami.yaml
    python benchmarks/sami_step.py --teacher facebook/sam-vit-base   # a teacher of 1024 pixels

Prints ratios: the step against the same step whose encoder sees all patches (its peer in the first row), and reading
the teacher's features from a cache against running the teacher. On a GPU also the ratio to its peak in FLOP/s.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from hf_efficientsam import EfficientSamForPreTraining, EfficientSamSamiConfig
from hf_efficientsam.training.data.feature_cache import FeatureCache, open_manifest, write_index, write_part
from hf_efficientsam.training.sami.teachers import load_teacher

SAMI_STEP = "SAMI step, cached teacher"


class EncodesAllPatches(EfficientSamForPreTraining):
    """The same model, but the encoder works on all patches and the decoder is given the kept ones among them."""

    def __init__(self, config: EfficientSamSamiConfig):
        super().__init__(config)
        encode = self.vision_encoder.forward

        def encode_all(pixel_values, noise, num_kept, **kwargs):
            encoded = encode(pixel_values, noise=noise, num_kept=noise.shape[1], **kwargs)
            encoded.last_hidden_state = encoded.last_hidden_state[:, : 1 + num_kept]
            encoded.mask = (encoded.ids_restore >= num_kept).to(encoded.mask.dtype)
            return encoded

        self.vision_encoder.forward = encode_all


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="side of the student's crop in pixels")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--small", action="store_true", help="decoder of 2 layers of 192, not 8 of 512")
    parser.add_argument("--teacher", default="../shared/weights/vit-small-patch14-teacher")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peak", type=float, default=989, help="the GPU's peak in TFLOP/s (bfloat16, dense)")
    return parser.parse_args()


def make_runs(args: argparse.Namespace, device: torch.device, folder: str) -> dict[str, Callable]:
    """A step of each kind, by its name in the table; the cache of the teacher's features lies in `folder`."""
    teacher = load_teacher(args.teacher, device=device)
    grid = (args.size // 16,) * 2
    small = {"decoder_hidden_size": 192, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 6}
    config = EfficientSamSamiConfig(
        vision_config={"pretrain_image_size": args.size}, target_size=teacher.width, **(small if args.small else {})
    )
    models = {"kept": EfficientSamForPreTraining(config), "all": EncodesAllPatches(config)}
    optimizers = {name: torch.optim.AdamW(model.to(device).parameters()) for name, model in models.items()}
    pixels = torch.randint(0, 256, (args.batch_size, 3, teacher.size, teacher.size), dtype=torch.uint8, device=device)
    pixel_values = torch.randn(args.batch_size, 3, args.size, args.size, device=device)
    noise = torch.rand(args.batch_size, grid[0] * grid[1], device=device)
    keys = [str(i) for i in range(args.batch_size)]
    open_manifest(folder, {"views": 1, "width": teacher.width})
    write_part(folder, 0, 0, keys, teacher(pixels, grid))
    write_index(folder, 1, 1)
    cache = FeatureCache(folder, {})

    def cached() -> torch.Tensor:
        return torch.stack([cache.read(key, 0) for key in keys]).to(device)

    def step(name: str, target: Callable) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = models[name](pixel_values, target(), noise).loss
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    return {
        SAMI_STEP: lambda: step("kept", cached),
        "all patches encoded, cached teacher": lambda: step("all", cached),
        "SAMI step, teacher online": lambda: step("kept", lambda: teacher(pixels, grid)),
    }


def time_runs(runs: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of each run, the median of interleaved repeats after one to warm up."""
    seconds = {name: [] for name in runs}
    for repeat in tqdm(range(repeats + 1)):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        runs = make_runs(args, device, folder)
        median = time_runs(runs, args.repeats, device)
        with FlopCounterMode(display=False) as counter:
            runs[SAMI_STEP]()
    first = median[SAMI_STEP]
    print(f"{args.size} pixels, batch {args.batch_size}, {torch.get_num_threads()} threads, {device}")
    for name, value in median.items():
        print(f"{name:36}{args.batch_size / value:9.1f} images/s   the SAMI step takes {first / value:.3f} of it")
    rate = counter.get_total_flops() / first
    print(f"{counter.get_total_flops() / 1e9:.0f} GFLOP a step, {rate / 1e9:.0f} GFLOP/s", end="")
    print(f", {rate / args.peak / 1e12:.1%} of the peak" if device.type == "cuda" else "")


if __name__ == "__main__":
    main()
