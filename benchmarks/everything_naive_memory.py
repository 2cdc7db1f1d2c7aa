"""Peak memory of segment everything against the naive way of everything.py with all points together, on one image.

    python benchmarks/everything_naive_memory.py             # 64 and 1024 points on a 1024 x 1024 image

Both run in processes of their own, from the image's embedding on. The naive way is measured at few points; at all of
them it is computed as what it holds at least, which is more than most machines have.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from decoder_memory import peak_bytes
from everything import Scene, load, naive, open_scene, ours, scene_parser
from everything_memory import forget_peak


def naive_bytes(scene: Scene, num_points: int) -> int:
    """What the naive way holds at least where it brings all candidates to the size of the image: these and those."""
    num_candidates = num_points * scene.model.config.mask_decoder_config.num_multimask_outputs
    return 4 * num_candidates * (scene.size**2 + (scene.size // 4) ** 2)


def extra_bytes(way: str, scene: Scene, model: str | None, points_per_side: int) -> int:
    """Peak of resident memory that one way takes above what was there before, on a CPU, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "scene.pt")
        options = {"size": scene.size, "points_per_side": points_per_side, "embedding": scene.embedding.cpu()}
        options |= {name: getattr(scene, name) for name in ("pred_iou_thresh", "stability_score_thresh")}
        torch.save(options, path)
        command = [sys.executable, __file__, "--way", way, "--scene", path, "--threads", str(torch.get_num_threads())]
        # Large blocks go back to the system at once, so that the peak is what was in use and not what was kept.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
        command += [] if model is None else ["--model", model]
        return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def measure_bytes(way: str, path: str, model_name: str | None) -> int:
    """The other end of `extra_bytes`."""
    options = torch.load(path, weights_only=True)
    model, processor = load(model_name, options["size"])
    scene = Scene(model, None, **options)
    if way == "naive":
        model.set_attn_implementation("eager")
        run = functools.partial(naive, model, scene, len(scene.points))
    else:
        run = functools.partial(ours, scene.generator(processor), scene)
    with torch.no_grad():
        model(image_embeddings=scene.embedding[..., :4, :4], input_points=torch.ones(1, 1, 1, 2))  # loads the kernels
    before = forget_peak()
    run()
    return peak_bytes() - before


def compare_memory(args: argparse.Namespace) -> list[tuple[int, int, str, int]]:
    """Of few points and of all: their number, the generator's bytes, how the naive way's are known, and those."""
    scene, *_ = open_scene(args)
    few, rows = min(args.memory_points, args.points_per_side), []
    measured = extra_bytes("naive", scene, args.model, few)
    for side, how, value in (
        (few, "measured", measured),
        (args.points_per_side, "at least, computed", naive_bytes(scene, args.points_per_side**2)),
    ):
        rows.append((side**2, extra_bytes("ours", scene, args.model, side), how, value))
    return rows


def show_memory(rows: list[tuple[int, int, str, int]]) -> None:
    print("peak of memory, and that of the naive way with all points together")
    for num_points, own, how, value in rows:
        print(f"  {num_points:5} points{own / 2**20:8.0f} MiB, {own / value:.3f} of {value / 2**20:.0f} MiB {how}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = scene_parser(__doc__)
    parser.add_argument("--memory-points", type=int, default=8, help="points a side where the naive way is measured")
    parser.add_argument("--way", choices=("naive", "ours"), help="measure it in this process (internal)")
    parser.add_argument("--scene", help="what it is measured on (internal)")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.way:
        print(measure_bytes(args.way, args.scene, args.model))
    else:
        show_memory(compare_memory(args))


if __name__ == "__main__":
    main()
