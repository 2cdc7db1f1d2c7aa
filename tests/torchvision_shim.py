"""Makes a torchvision work whose operators do not load, as beside a torch without CUDA. For tests; slow.

A plugin of pytest, `-p torchvision_shim`, or `python torchvision_shim.py SCRIPT ...`, which runs the script with it.
The environment sets TORCHDYNAMO_DISABLE=1, so that torchvision's own RoIAlign in Python is not compiled.
"""

import pathlib
import sys
from functools import partial

import numpy as np
import torch

OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
OPERATORS.define("qnms(Tensor dets, Tensor scores, float a, int b, float c, int d, float iou_threshold) -> Tensor")


@torch.library.impl(OPERATORS, "nms", "CPU")
def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Places of the boxes `[N, 4]` to keep, the best first: each drops all later ones that overlap it too much."""
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    corner = torch.maximum(boxes[:, None, :2], boxes[:, :2])
    overlap = (torch.minimum(boxes[:, None, 2:], boxes[:, 2:]) - corner).clamp(min=0).prod(2)
    apart = (overlap <= iou_threshold * (areas[:, None] + areas - overlap)).numpy()
    kept, alive = [], np.ones(len(boxes), dtype=bool)
    for place in range(len(boxes)):
        if alive[place]:
            kept.append(place)
            alive &= apart[place]
    return order[kept]


import torchvision  # noqa: E402
from torchvision.models.detection import roi_heads  # noqa: E402

torchvision.ops.boxes._assert_has_ops = lambda: None
# Where the number of samples follows from a box's size, RoIAlign in Python takes as many as the map has pixels.
roi_heads.roi_align = partial(roi_heads.roi_align, sampling_ratio=2)

if __name__ == "__main__":
    from script_runs import load_script

    load_script(pathlib.Path(sys.argv[1]).stem).main(sys.argv[2:])
