"""Peak memory of a large image, above that of the model and of the image's own pixels.

    python benchmarks/large_image_memory.py                          # 20 megapixels, the bundled checkpoint
    python benchmarks/large_image_memory.py --onnx runs/onnx         # with what `efficientsam export-onnx` wrote there

Each way runs in a process of its own, on one thread, after a small image has loaded what a first image loads. It ends
with a mask of the image's size: of one box, or of all objects that a grid of points finds. Linux only.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from hf_efficientsam import EfficientSamMaskGenerator, EfficientSamOnnxPredictor, EfficientSamPredictor
from hf_efficientsam.demo.service import Demo
from hf_efficientsam.export.onnx_export import export_onnx
from hf_efficientsam.inference.everything_files import EverythingSegmenter, plan_everything_jobs
from hf_efficientsam.inference.segment_files import Segmenter, segment_file

PHOTO = Path(__file__).parents[1] / "examples" / "bus.jpg"
WAYS = ("segment", "everything", "predictor", "onnx", "demo")
MIB = 2**20


def resident(kind: str) -> int:
    """Bytes of this process's memory now ("VmRSS") or at most since `forget_peak` ("VmHWM")."""
    return 1024 * int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def box_of(path: Path) -> list[float]:
    with Image.open(path) as image:
        return [0.1 * image.width, 0.2 * image.height, 0.9 * image.width, 0.8 * image.height]


def prepare(way: str, onnx: str, folder: Path, points_per_side: int) -> Callable[[Path], object]:
    """A function that answers about an image file, with everything loaded that it needs."""
    if way == "onnx":
        return ask(EfficientSamOnnxPredictor(onnx, num_threads=1))
    if way == "demo":
        demo = Demo()

        def visit(path: Path) -> tuple:
            session = demo.open(path, path.name)
            session.set_box(0.1, 0.2, 0.9, 0.8)
            return session.result().union(), demo.view(session)

        return visit
    predictor = EfficientSamPredictor.from_pretrained(device="cpu")
    if way == "predictor":
        return ask(predictor)
    if way == "segment":
        segmenter = Segmenter(predictor, all_masks=False)

        def segment(path: Path) -> dict:
            objects = [{"points": [], "labels": [], "box": box_of(path)}]
            return segment_file(segmenter, path, objects, folder / "mask.png", folder / "overlay.jpg")

        return segment
    options = {"points_per_side": points_per_side}
    generator = EfficientSamMaskGenerator(predictor.model, predictor.processor, output_mode="coco_rle", **options)
    segmenter = EverythingSegmenter(generator, options, crop_progress=False)
    return lambda path: [job.run(segmenter) for job in plan_everything_jobs(path, folder / "everything", True)]


def ask(predictor: EfficientSamPredictor | EfficientSamOnnxPredictor) -> Callable[[Path], object]:
    def predict(path: Path) -> object:
        predictor.set_image(path)
        return predictor.segment(boxes=[box_of(path)])

    return predict


def measure(way: str, onnx: str, photo: Path, points_per_side: int) -> int:
    """Bytes above those before the image was opened, at most."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        answer = prepare(way, onnx, Path(folder), points_per_side)
        answer(PHOTO)
        forget_peak()
        before = resident("VmRSS")
        answer(photo)
        return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(5000, 4000), help="width and height of the image")
    parser.add_argument("--points-per-side", type=int, default=8, help="of everything mode")
    parser.add_argument("--onnx", help="folder of an export; by default one is made")
    parser.add_argument("--only", nargs="*", choices=WAYS, default=WAYS, help="measure these alone")
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process (internal)")
    parser.add_argument("--photo", type=Path, help="on this file (internal)")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.onnx, args.photo, args.points_per_side)))
        return
    width, height = args.size
    with tempfile.TemporaryDirectory() as folder:
        photo, onnx = Path(folder) / "photo.jpg", args.onnx
        Image.open(PHOTO).resize((width, height)).save(photo)
        if onnx is None and "onnx" in args.only:
            onnx = Path(folder) / "onnx"
            export_onnx("bundled", onnx)
        # Large blocks go back to the system at once, so that the peak is what was in use and not what was kept.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
        print(f"{width} x {height} pixels; the image takes {3 * width * height / MIB:.0f} MiB")
        print(f"{'peak, MiB above':12}{'the model':>12}{'and the image':>15}{'bytes a pixel':>15}")
        for way in args.only:
            command = [sys.executable, __file__, "--way", way, "--photo", photo, "--onnx", onnx or ""]
            command += ["--points-per-side", args.points_per_side]
            done = subprocess.run([*map(str, command)], env=environment, stdout=subprocess.PIPE, check=True)
            peak = json.loads(done.stdout.splitlines()[-1])
            rest = peak - 3 * width * height
            print(f"{way:15}{peak / MIB:12.0f}{rest / MIB:15.0f}{rest / (width * height):15.1f}", flush=True)


if __name__ == "__main__":
    main()
