"""How many images of SA-1B's size a CPU core prepares for mask training, and where its time goes.

    python benchmarks/mask_loading.py                # 64 masks of 2250 x 1500 pixels to 1024 x 1024

The photograph is smooth noise, and the masks have wavy outlines of 20 to 700 pixels across. "Planes" is the same with
masks decoded and resized whole, as pycocotools and torch do it. CPU time of one thread, medians of interleaved runs.
That of eight cores is computed from it.
"""

import argparse
import io
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from hf_efficientsam.training.data.augment import crop_image
from hf_efficientsam.training.data.coco import decode_rles, encode_mask
from hf_efficientsam.training.data.reading import decode_image
from hf_efficientsam.training.data.rle_resizing import resize_rles
from hf_efficientsam.training.data.sa1b import Sa1bShards

NAMES = ("sa_1.jpg", "sa_1.json")


def outline(height: int, width: int, chance: np.random.Generator) -> np.ndarray:
    """A mask [H,W] with a wavy outline, somewhere in the image."""
    radius = np.exp(chance.uniform(np.log(10), np.log(350)))
    x, y = np.arange(width) - chance.uniform(0, width), np.arange(height)[:, None] - chance.uniform(0, height)
    waves = 1 + 0.2 * np.sin(chance.integers(2, 9) * np.arctan2(y, x))
    return (x**2 * chance.uniform(0.5, 2) + y**2 < (radius * waves) ** 2).astype(np.uint8)


def record(height: int, width: int, count: int) -> dict:
    """A photograph with its json, as a shard has it."""
    chance, rles = np.random.default_rng(0), []
    while len(rles) < count:
        mask = outline(height, width, chance)
        if mask.any():
            rles.append(encode_mask(mask))
    coarse = chance.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=90)
    annotations = [{"id": n, "segmentation": rle | {"counts": rle["counts"].decode()}} for n, rle in enumerate(rles)]
    content = {"image": {"image_id": 1, "width": width, "height": height}, "annotations": annotations}
    members = zip(NAMES, (encoded.getvalue(), json.dumps(content).encode()), strict=True)
    return {"shard": "sa_000000.tar", "key": "sa_1", "members": list(members)}


def planes(rles: list[dict], box: tuple[int, int, int, int], size: int) -> torch.Tensor:
    left, top, right, bottom = box
    masks = torch.from_numpy(decode_rles(rles))[:, None, top:bottom, left:right] * 255
    return (F.interpolate(masks, (size, size), mode="bilinear", antialias=True)[:, 0] >= 128).byte()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=1500)
    parser.add_argument("--width", type=int, default=2250)
    parser.add_argument("--masks", type=int, default=64)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stored, source = record(options.height, options.width, options.masks), Sa1bShards([])
    box = (0, 0, options.width, options.height)
    seconds = defaultdict(list)

    def timed(name: str, function: Callable, *arguments: Any) -> Any:
        started = time.process_time()
        result = function(*arguments)
        seconds[name].append(time.process_time() - started)
        return result

    for _ in range(options.repeats + 1):
        sample = timed("decode image, check RLE", source.decode, stored)
        timed("of that: decode image", decode_image, io.BytesIO(stored["members"][0][1]), NAMES[0])
        timed("resize image", crop_image, sample.image, box, options.size)
        masks = timed("resize masks", resize_rles, sample.rles, box, options.size)
        timed("pack masks", np.packbits, masks.numpy(), -1)
        whole = timed("planes", planes, sample.rles, box, options.size)
    # The first run fills caches.
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    image = medians["decode image, check RLE"] + medians["resize image"]
    now, before = image + medians["resize masks"] + medians["pack masks"], image + medians["planes"]
    for name, value in medians.items():
        print(f"{name:28}{1000 * value:8.0f} ms{value / now:8.0%}")
    print(f"{'images a second and core':28}{1 / now:8.1f}{'with planes':>15}{1 / before:6.2f}")
    print(
        f"{'of eight cores, computed':28}{8 / now:8.0f}   with {options.masks} masks an image: one core's times eight"
    )
    areas = masks.sum().item(), whole.sum().item()
    print(f"areas differ by             {abs(areas[0] - areas[1]) / areas[1]:8.4%}")


if __name__ == "__main__":
    main()
