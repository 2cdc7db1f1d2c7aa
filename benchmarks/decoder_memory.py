"""Peak memory of decoding many prompts of one image, against copying the image's embedding once a prompt.

    python benchmarks/decoder_memory.py                      # 64 prompts on a 1024 x 1024 image
    python benchmarks/decoder_memory.py --num-prompts 256

Each way runs in a process of its own, on one thread and with random weights of EfficientSAM-Ti's shape. What counts is
the peak of resident memory during the forward above what was resident before it.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from hf_efficientsam import EfficientSamConfig, EfficientSamModel


def peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, for what getrusage says there can be the peak of the process that started this one
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(way: str, image_size: int, num_prompts: int, output: str) -> int:
    """Extra bytes that one forward takes; its masks go to the file `output`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # The image side is given as an embedding, so the encoder's depth does not matter.
    model = EfficientSamModel(EfficientSamConfig(vision_config={"num_hidden_layers": 1})).eval()
    image_embeddings = torch.randn(1, 256, image_size // 16, image_size // 16)
    points = image_size * torch.rand(1, num_prompts, 1, 2)
    with torch.no_grad():
        model(image_embeddings=image_embeddings[..., :4, :4], input_points=points[:, :1])  # loads the kernels
        before = peak_bytes()
        if way == "copied":  # as many images as prompts, each with a prompt of its own
            copies = image_embeddings.expand(num_prompts, -1, -1, -1).contiguous()
            masks = model(image_embeddings=copies, input_points=points.transpose(0, 1)).pred_masks.transpose(0, 1)
        else:
            masks = model(image_embeddings=image_embeddings, input_points=points).pred_masks
        extra = peak_bytes() - before
    torch.save(masks.clone(), output)
    return extra


def compare(image_size: int = 1024, num_prompts: int = 64) -> dict[str, float]:
    """Extra bytes of both ways, their ratio, and the largest difference between their masks."""
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {way: str(Path(folder) / f"{way}.pt") for way in ("shared", "copied")}
        for way, file in files.items():
            command = [sys.executable, __file__, "--way", way, "--output", file]
            command += ["--image-size", str(image_size), "--num-prompts", str(num_prompts)]
            # Large blocks go back to the system at once, so that the peak is what was in use and not what was kept.
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
            result[way] = json.loads(subprocess.run(command, env=environment, stdout=-1, check=True).stdout)
        shared, copied = (torch.load(file, mmap=True, weights_only=True) for file in files.values())
        result["largest_difference"] = (shared - copied).abs().max().item()
    result["ratio"] = result["shared"] / result["copied"]
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=int, default=1024, help="side of the model input in pixels")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--way", choices=("shared", "copied"), help="measure one way in this process (internal)")
    parser.add_argument("--output", help="where that way's masks go (internal)")
    arguments = parser.parse_args()
    if arguments.way:
        print(measure(arguments.way, arguments.image_size, arguments.num_prompts, arguments.output))
        return
    result = compare(arguments.image_size, arguments.num_prompts)
    print(f"{arguments.num_prompts} prompts on one {arguments.image_size} x {arguments.image_size} image")
    print(f"image copied once a prompt: {result['copied'] / 2**20:8.0f} MiB")
    print(f"this model:                 {result['shared'] / 2**20:8.0f} MiB, {result['ratio']:.3f} of it")
    print(f"largest difference of the mask logits: {result['largest_difference']:.1e}")


if __name__ == "__main__":
    main()
