"""Peak memory of segment everything on large images, with and without the files that `efficientsam everything` writes.

    python benchmarks/everything_memory.py                        # bus.jpg enlarged to 20 megapixels
    python benchmarks/everything_memory.py --megapixels 20 48 100 --points-per-side 16

Each size runs in a process of its own, on one thread: first `EfficientSamMaskGenerator.generate` with masks as RLE,
then the command's work, which writes a label map and an overlay, too. What counts is the peak of resident memory in
MiB; of `generate` also in bytes a pixel above a process that has loaded the model and the image.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from decoder_memory import peak_bytes
from PIL import Image

from hf_efficientsam.inference.everything_files import EverythingSegmenter, plan_everything_jobs
from hf_efficientsam.inference.folder_runs import run_jobs
from hf_efficientsam.inference.image_files import read_image
from hf_efficientsam.inference.loading import load_model
from hf_efficientsam.inference.mask_generation import EfficientSamMaskGenerator

IMAGE = Path(__file__).parents[1] / "examples" / "bus.jpg"


def forget_peak() -> int:
    """From here on the peak is counted anew, on Linux; returns what is in use."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    return peak_bytes()


def measure(path: Path, points_per_side: int, adaptive: bool) -> dict[str, int]:
    """Bytes of memory, and numbers of pixels and masks, of one image in this process."""
    torch.set_num_threads(1)
    generator = EfficientSamMaskGenerator(
        *load_model("bundled", max_pixels=10**9),
        points_per_side=points_per_side,
        adaptive=adaptive,
        output_mode="coco_rle",
    )
    image = read_image(path, 10**9, lambda image: image.convert("RGB"))
    before = forget_peak()
    masks = generator.generate(image)
    found = peak_bytes()
    pixels = image.width * image.height
    del image
    forget_peak()
    with tempfile.TemporaryDirectory() as folder:
        jobs = plan_everything_jobs(path, Path(folder) / "out", True)
        run_jobs(jobs, EverythingSegmenter(generator, {}, False), lambda record: None)
    return {"pixels": pixels, "masks": len(masks), "before": before, "generate": found, "files": peak_bytes()}


def measure_apart(megapixels: float, args: argparse.Namespace) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.jpg"
        image = Image.open(IMAGE)
        scale = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
        image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.BICUBIC).save(path)
        command = [sys.executable, __file__, "--measure", str(path), "--points-per-side", str(args.points_per_side)]
        command += ["--adaptive"] * args.adaptive
        # Large blocks go back to the system at once, so that the peak is what was in use and not what was kept.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
        return json.loads(subprocess.run(command, env=environment, stdout=-1, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megapixels", type=float, nargs="+", default=[20])
    parser.add_argument("--points-per-side", type=int, default=16)
    parser.add_argument("--adaptive", action="store_true")
    parser.add_argument("--measure", type=Path, help="an image to measure in this process (internal)")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.points_per_side, args.adaptive)))
        return
    print(f"{'megapixels':>10}{'masks':>7}{'model, image':>14}{'masks as RLE':>14}{'bytes/px':>10}{'with files':>12}")
    for megapixels in args.megapixels:
        one = measure_apart(megapixels, args)
        before, generate, files = (one[name] / 2**20 for name in ("before", "generate", "files"))
        per_pixel = (one["generate"] - one["before"]) / one["pixels"]
        print(
            f"{megapixels:10g}{one['masks']:7}{before:14.0f}{generate:14.0f}{per_pixel:10.1f}{files:12.0f}", flush=True
        )


if __name__ == "__main__":
    main()
