"""How many objects segment-everything finds: average recall of its masks, for grids of one or several sizes.

    python training/evaluate_everything.py --annotations ../shared/data/coco-val-dev/instances_val.json \
        --points_per_side 8 16 32 --output everything.json --masks runs/everything
    python training/evaluate_everything.py --annotations ../shared/data/coco-val-dev/instances_val.json \
        --search exact adaptive --pred_iou_thresh 0.3 --stability_score_thresh 0.5

The masks are class-agnostic, and ranked as `EfficientSamMaskGenerator` ranks them: by predicted IoU, in adaptive
search by its product with their stability. Nothing is rejected by default, for recall loses by any threshold. Two
searches cost little more than the exact one: an image is encoded once, and each of its points is asked about once. A
large grid takes a while: with `--masks` what was found on an image is kept, and not searched again.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path

import torch
from tqdm.auto import tqdm

from hf_efficientsam import EfficientSamModel, EfficientSamProcessor, __version__
from hf_efficientsam.inference.image_files import describe_error
from hf_efficientsam.inference.loading import checkpoint_fingerprint, load_model
from hf_efficientsam.inference.mask_generation import EfficientSamMaskGenerator
from hf_efficientsam.training.data.coco import AnnotationConfig, CocoMasks
from hf_efficientsam.training.engine.config import (
    OutputFile,
    OutputFolder,
    PositiveInt,
    Ratio,
    check_ranges,
    parse_config,
)
from hf_efficientsam.training.engine.reports import end_without, replace_text, write_report
from hf_efficientsam.training.engine.run import check_device, run_script
from hf_efficientsam.training.masks.coco_ar import NAMES, PROTOCOL, average_recall


@dataclass(frozen=True)
class EvaluateEverythingConfig(AnnotationConfig):
    model: str = field(default="bundled", metadata={"help": "path or Hub name of an EfficientSAM, or: bundled"})
    annotations: str | None = field(default=None, metadata={"help": "COCO-style json file with the true masks"})
    images: str | None = field(default=None, metadata={"help": "folder of its images; by default beside it"})
    limit: PositiveInt | None = field(default=None, metadata={"help": "only the first so many images that have masks"})
    points_per_side: list[PositiveInt] = field(default_factory=lambda: [32], metadata={"help": "one or several"})
    pred_iou_thresh: Ratio = field(default=0.0, metadata={"help": "least predicted IoU, exclusive; 0 keeps all"})
    stability_score_thresh: Ratio = field(default=0.0, metadata={"help": "least stability, likewise"})
    box_nms_thresh: Ratio | None = field(
        default=None,
        metadata={
            "help": "of two masks whose boxes overlap by more, the worse is left out; by default the generator's"
        },
    )
    search: list[str] = field(
        default_factory=lambda: ["exact"],
        metadata={"help": "which points are asked about: one of the two, or both", "choices": ["exact", "adaptive"]},
    )
    output: OutputFile | None = field(default=None, metadata={"help": "json file for the numbers"})
    masks: OutputFolder | None = field(
        default=None, metadata={"help": "folder that keeps what was found, to go on from"}
    )
    device: str | None = field(default=None, metadata={"help": "by default a GPU if there is one"})


def check(config: EvaluateEverythingConfig) -> None:
    check_ranges(config)
    check_device(config.device)
    if config.annotations is None:
        raise ValueError("Give --annotations a COCO-style json file.")
    if len(set(config.points_per_side)) < len(config.points_per_side):
        raise ValueError("Give --points_per_side no number twice.")


@dataclass
class Answers:
    """
    What the model said of one image: `embeddings`, of its crops, and of each point that was asked about, (x, y) in
    pixels of the model input, which of its masks are confident `[M]`, with their scores `[K]` and logits `[K, h, w]`.
    """

    embeddings: list = field(default_factory=list)
    points: dict[tuple[float, float], tuple[torch.Tensor, ...]] = field(default_factory=dict)


class SharingMaskGenerator(EfficientSamMaskGenerator):
    """A mask generator that shares with others of the same model and thresholds what the model says of an image."""

    answers: Answers

    def embed(self, crops: list, batch_size: int) -> Iterator[tuple[torch.Tensor, tuple[int, int]]]:
        self.answers.embeddings = self.answers.embeddings or list(super().embed(crops, batch_size))
        yield from self.answers.embeddings

    def predict(self, embedding, points, shared) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        known = self.answers.points
        keys = list(map(tuple, points.tolist()))
        if new := list(takewhile(lambda key: key not in known, keys)):
            kept, scores, logits = super().predict(embedding, points[: len(new)], shared)
            counts = kept.sum(dim=1).tolist()
            known.update(zip(keys, zip(kept, scores.split(counts), logits.split(counts), strict=True), strict=False))
        answers = [known[key] for key in takewhile(known.__contains__, keys)]
        kept, scores, logits = zip(*answers, strict=True)
        return torch.stack(kept), torch.cat(scores), torch.cat(logits)


def check_same_masks(config: EvaluateEverythingConfig, dataset: CocoMasks, model, processor) -> None:
    """Notes in the folder of masks how they were found, and compares if it is noted already."""
    path = Path(config.masks) / "config.json"
    names = ("model", "annotations", "images", "pred_iou_thresh", "stability_score_thresh", "box_nms_thresh")
    now = {name: getattr(config, name) for name in names}
    # What lies under these names may change.
    weights = checkpoint_fingerprint(model, processor.image_processor)
    now |= {"weights": weights, "data": dataset.fingerprint(), "version": __version__}
    if path.exists() and (before := json.loads(path.read_text())) != now:
        different = [name for name in now if before.get(name) != now[name]]
        raise ValueError(
            f"The masks in {config.masks} were found with another {', '.join(different)}; give another --masks."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(now, indent=1) + "\n")


def find_masks(
    generators: dict[str, SharingMaskGenerator], dataset: CocoMasks, index: int, folder: Path | None
) -> dict[str, list[dict]] | str:
    """
    For each search `{segmentation, score}` of an image's masks, the best first, from the folder if they are there; a
    sentence if the image cannot be read.
    """
    answers, found = Answers(), {}
    for search, generator in generators.items():
        path = folder and folder / search / f"{dataset.records[index]['id']}.json"
        if path is not None and path.exists():
            found[search] = json.loads(path.read_text())
            continue
        generator.answers = answers
        try:
            records = generator.generate(dataset[index].image)
        except (ValueError, OSError) as error:
            return describe_error(error)
        found[search] = [
            {
                "segmentation": one["segmentation"],
                "score": one["predicted_iou"] * (one["stability_score"] if generator.adaptive else 1),
            }
            for one in records
        ]
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(found[search]))
    return found


def measure(
    config: EvaluateEverythingConfig, dataset: CocoMasks, count: int, points: int, model: EfficientSamModel, processor
) -> tuple[dict[str, dict[str, float | None]], list[str]]:
    """
    For each search average recall, and how many masks an image has, with a grid of `points` a side on the first
    `count` images; a sentence about each image that is left out, as it cannot be read.
    """
    generators = {
        search: SharingMaskGenerator(
            model,
            processor,
            points_per_side=points,
            pred_iou_thresh=config.pred_iou_thresh,
            stability_score_thresh=config.stability_score_thresh,
            box_nms_thresh=config.box_nms_thresh,
            adaptive=search == "adaptive",
            output_mode="coco_rle",
        )
        for search in config.search
    }
    folder = config.masks and Path(config.masks) / str(points)
    images = tqdm(range(count), desc=f"{points} a side", unit="image", mininterval=2)
    found = [find_masks(generators, dataset, index, folder) for index in images]
    broken = [one for one in found if isinstance(one, str)]
    if len(broken) == count:
        raise ValueError(f"{count} images cannot be evaluated; {broken[0]}")
    truth = [rles for rles, one in zip(dataset.rles, found, strict=False) if not isinstance(one, str)]
    results = {}
    for search in config.search:
        masks = [one[search] for one in found if not isinstance(one, str)]
        results[search] = {**average_recall(truth, masks), "masks": sum(map(len, masks)) / len(masks)}
    return results, broken


def print_rows(points: int, results: dict[str, dict[str, float | None]]) -> None:
    for search, result in results.items():
        cells = (f"{'-':>8}" if result[name] is None else f"{result[name]:8.4f}" for name in NAMES)
        print(f"{points:<8}{search:10}" + "".join(cells) + f"{result['masks']:8.1f}", flush=True)


def save_results(
    config: EvaluateEverythingConfig, count: int, broken: list[str], results: dict, seconds: float, model, processor
) -> None:
    size = processor.image_processor.size
    report = {
        "model": config.model,
        "model_sha256": checkpoint_fingerprint(model, processor.image_processor),
        "annotations": config.annotations,
        "images": count - len(broken),
        "input_size": {"height": size.height, "width": size.width},
        "protocol": PROTOCOL,
        "results": results,
        "seconds": round(seconds, 1),
        "config": asdict(config),
        "device": str(model.device),
        **({"broken": broken} if broken else {}),
    }
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    write_report(config.output, report, ("faster-coco-eval", "numpy", "pillow", "pycocotools"))


def load(config: EvaluateEverythingConfig) -> tuple[EfficientSamModel, EfficientSamProcessor]:
    model, processor = load_model(config.model)
    return model.to(config.device or model.device), processor


def evaluate(config: EvaluateEverythingConfig) -> None:
    check(config)
    dataset = CocoMasks(config.annotations, config.images, reading=config, split="val", check_images=False)
    if not len(dataset):
        raise ValueError(f"There is no mask to evaluate in {config.annotations}; check the file.")
    count = min(len(dataset), config.limit or len(dataset))
    model, processor = load(config)
    if config.masks is not None:
        check_same_masks(config, dataset, model, processor)
    started, results = time.perf_counter(), {}
    print(f"{count} images, {sum(map(len, dataset.rles[:count]))} masks")
    print(f"{'points':8}{'search':10}" + "".join(f"{name:>8}" for name in NAMES) + f"{'masks':>8}")
    for points in config.points_per_side:
        results[str(points)], broken = measure(config, dataset, count, points, model, processor)
        print_rows(points, results[str(points)])
        if config.output is not None:  # after each, for the next can take hours
            save_results(config, count, broken, results, time.perf_counter() - started, model, processor)
    end_without(broken)


def main(arguments: list[str] | None = None) -> None:
    evaluate(parse_config(EvaluateEverythingConfig, __doc__, arguments))


if __name__ == "__main__":
    run_script("evaluate_everything", main)
