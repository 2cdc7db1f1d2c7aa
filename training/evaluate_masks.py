"""mIoU of promptable masks on COCO-style json: box, 1, 3 and 5 clicks, beside what trivial answers would score.

    python training/evaluate_masks.py --annotations ../shared/data/coco-val-dev/instances_val.json
    python training/evaluate_masks.py --model runs/masks/model --annotations my/instances.json \
        --output metrics.json --picture cases.png

The protocol is that of the paper's zero-shot tables; it is written into the json together with every number.
"""

import json
import platform
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tqdm.auto import tqdm

from hf_efficientsam import EfficientSamModel, EfficientSamProcessor
from hf_efficientsam.hub import find_checkpoint, load_model
from hf_efficientsam.training.data.coco import CocoMasks, decode
from hf_efficientsam.training.evaluation import PROTOCOL, ImagePredictor, evaluate_image, num_clicks
from hf_efficientsam.training.metrics import MeanIoU
from hf_efficientsam.training.prompts import boxes_from_masks
from hf_efficientsam.training.runtime import parse_recipe


@dataclass(frozen=True)
class Recipe:
    annotations: str | None = field(default=None, metadata={"help": "COCO-style json with the true masks"})
    images: str | None = field(default=None, metadata={"help": "folder of its images; by default `images` beside it"})
    model: str = field(default="bundled", metadata={"help": "path or Hub name, or: bundled"})
    prompts: list[str] = field(
        default_factory=lambda: ["box", "click1", "click3", "click5"],
        metadata={"help": "box, and clickK for K clicks"},
    )
    limit: int | None = field(default=None, metadata={"help": "only the first so many images"})
    output: str | None = field(default=None, metadata={"help": "json file for the numbers"})
    picture: str | None = field(default=None, metadata={"help": "image file for the best, median and worst box case"})
    seed: int = field(default=0, metadata={"help": "of the clicks"})
    device: str | None = field(default=None, metadata={"help": "by default a GPU if there is one"})


def load(recipe: Recipe) -> tuple[EfficientSamModel, EfficientSamProcessor, CocoMasks]:
    if recipe.annotations is None:
        raise ValueError("Give --annotations a COCO-style json file.")
    for prompt in recipe.prompts:
        num_clicks(prompt)
    if recipe.picture and "box" not in recipe.prompts:
        raise ValueError("--picture shows box cases; add box to --prompts.")
    dataset = CocoMasks(recipe.annotations, recipe.images)
    if not len(dataset) or (recipe.limit is not None and recipe.limit < 1):
        raise ValueError(f"There is no mask to evaluate in {recipe.annotations} with --limit {recipe.limit}.")
    model, processor = load_model(find_checkpoint(None if recipe.model == "bundled" else recipe.model))
    return model if recipe.device is None else model.to(recipe.device), processor, dataset


def print_table(results: dict) -> None:
    counts = {group: numbers["count"] for group, numbers in results["baseline", "ellipse"].items()}
    print(f"{'mIoU':24}" + "".join(f"{group:>10}" for group in counts))
    for (prompt, answer), means in results.items():
        print(f"{prompt + ', ' + answer:24}" + "".join(f"{means[group]['miou']:10.4f}" for group in counts))
    print(f"{'masks':24}" + "".join(f"{count:10}" for count in counts.values()))


def draw_cases(path: str, model, processor, dataset: CocoMasks, cases: dict[str, tuple[int, int]]) -> None:
    """A panel for each case (image, mask): the box, the true outline and the most confident mask."""
    figure = Figure(figsize=(5 * len(cases), 4.5), layout="constrained")
    for axis, (name, (index, number)) in zip(figure.subplots(1, len(cases)), cases.items(), strict=True):
        sample = dataset[index]
        target = torch.from_numpy(decode([sample.rles[number]]))
        box = boxes_from_masks(target)
        candidates, scores = ImagePredictor(model, processor, sample.image)(input_boxes=box)
        predicted = candidates[0, scores[0].argmax()].cpu().numpy()
        left, top, right, bottom = box[0].tolist()
        axis.imshow(sample.image)
        axis.imshow(np.ma.masked_equal(predicted, 0), cmap="spring", alpha=0.55, interpolation="nearest")
        axis.contour(target[0].numpy(), levels=[0.5], colors="white", linewidths=1.5)
        axis.add_patch(
            Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor="yellow", linewidth=1)
        )
        axis.set(title=name, xticks=[], yticks=[])
    figure.savefig(path, dpi=100)


def main() -> None:
    recipe = parse_recipe(Recipe, __doc__)
    try:
        model, processor, dataset = load(recipe)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"evaluate_masks: {error}", file=sys.stderr)
        raise SystemExit(2) from None

    started = time.perf_counter()
    count = min(len(dataset), recipe.limit or len(dataset))
    means, box_ious = defaultdict(MeanIoU), []
    for index in tqdm(range(count), unit="image", mininterval=2):
        sample = dataset[index]
        ious, areas = evaluate_image(
            ImagePredictor(model, processor, sample.image), sample, recipe.prompts, recipe.seed
        )
        for row, values in ious.items():
            means[row].update(values, areas)
        if "box" in recipe.prompts:
            box_ious += [(iou, (index, number)) for number, iou in enumerate(ious["box", "confident"].tolist())]
    seconds = round(time.perf_counter() - started, 1)
    results = {row: mean.compute() for row, mean in means.items()}
    print_table(results)

    if recipe.output is not None:
        nested = defaultdict(dict)
        for (prompt, answer), numbers in results.items():
            nested[prompt][answer] = numbers
        report = {
            "model": recipe.model,
            "annotations": recipe.annotations,
            "images": count,
            "masks": results["baseline", "ellipse"]["all"]["count"],
            "input_size": {
                "height": processor.image_processor.size.height,
                "width": processor.image_processor.size.width,
            },
            "seed": recipe.seed,
            "protocol": PROTOCOL,
            "results": nested,
            "seconds": seconds,
            "device": str(model.device),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("hf-efficientsam", "torch", "transformers", "numpy", "pillow")},
            },
        }
        Path(recipe.output).parent.mkdir(parents=True, exist_ok=True)
        Path(recipe.output).write_text(json.dumps(report, indent=1) + "\n")
    if recipe.picture is not None:
        box_ious.sort(reverse=True)
        chosen = {"best": box_ious[0], "median": box_ious[len(box_ious) // 2], "worst": box_ious[-1]}
        cases = {f"{name} of {len(box_ious)}: IoU {iou:.2f}": case for name, (iou, case) in chosen.items()}
        draw_cases(recipe.picture, model, processor, dataset, cases)


if __name__ == "__main__":
    main()
