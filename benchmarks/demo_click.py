"""
CPU seconds that the web demo takes for a click on a photograph of 12 megapixels, beside masks of its full size.

    python benchmarks/demo_click.py [--repeats 9]

A click is everything from the point to the HTML of the page: decoder, masks, drawing, JPEG. The peer is what a click
would need at least if its masks had the size of the photograph: `EfficientSamPredictor.predict` and the RLE of its
three masks. Medians of calls in turn, in one thread, with the bundled checkpoint.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from hf_efficientsam.demo.service import Demo
from hf_efficientsam.inference.results import mask_rles

PHOTOGRAPH = Path(__file__).parents[1] / "examples" / "bus.jpg"
SIZE = (4000, 3000)
POINT = (0.625, 0.515)  # on the bus, as ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    demo = Demo()
    with TemporaryDirectory() as folder:
        path = Path(folder, "photograph.jpg")
        Image.open(PHOTOGRAPH).resize(SIZE, Image.Resampling.BICUBIC).save(path, quality=90)
        session = demo.open(path, path.name)

    def full_size() -> None:
        masks, _, _ = session.predictor.predict([[x * side for x, side in zip(POINT, SIZE, strict=True)]], [1])
        mask_rles(masks)

    def click() -> None:
        session.clear()
        demo.act(session, lambda session: session.add_point(*POINT))

    def download() -> None:
        session.result().union()

    measured = {
        "full-size masks of a point": full_size,
        "a click": click,
        "a preview under the mouse": lambda: demo.preview(session, *POINT),
        "the masks of one object for a download": download,
    }
    seconds = {name: [] for name in measured}
    for _ in range(repeats):
        for name, call in measured.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    peer = median(seconds["full-size masks of a point"])
    for name, times in seconds.items():
        print(f"{name:40} {median(times):6.3f} CPU-s  {median(times) / peer:5.2f}")


if __name__ == "__main__":
    main()
