"""How good promptable masks are: mIoU for boxes and clicks beside trivial answers, or mask AP on a detector's boxes.

    python training/evaluate_masks.py --annotations ../shared/data/coco-val-dev/instances_val.json
    python training/evaluate_masks.py --model bundled runs/masks/model facebook/sam-vit-base \
        --annotations my/instances.json --count_clicks --output metrics.json --cases cases.png
    python training/evaluate_masks.py --annotations my/instances.json --prompts box click1 click10 --clicks error
    accelerate launch training/evaluate_masks.py --shards sa_000000.tar sa_000001.tar --limit 500
    python training/evaluate_masks.py --annotations ../shared/data/saliency/val --prompts box
    python training/evaluate_masks.py --annotations instances_val2017.json --images val2017 --detections vitdet_h.json

Several models are asked for the same masks and read the images once; a table at the end has them beside each other.
Without --detections a mask is asked for by its tight box or by clicks (the paper's, or one after the other on the
errors, as Segment Anything's) and compared with the truth; boundary IoU comes on top, and with --count_clicks NoC@85
and NoC@90. With --detections, a flat list of `{image_id, category_id, bbox [x, y, width, height], score}`, AP is
COCO's, or LVIS's for its annotations. The protocol is written into the json together with every number; `results` are
those of the model, or by model if there are several. Several processes give the numbers of one.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_efficientsam.inference.loading import checkpoint_fingerprint
from hf_efficientsam.training.data.coco import AnnotationConfig, decode_rles, with_folders
from hf_efficientsam.training.data.folder_masks import open_annotations
from hf_efficientsam.training.data.sa1b import Sa1bShards
from hf_efficientsam.training.engine.config import NotNegativeInt, OutputFile, PositiveInt, check_ranges, parse_config
from hf_efficientsam.training.engine.reports import end_without, replace_text, write_report
from hf_efficientsam.training.engine.run import accelerator_without_timeout, check_device, run_script
from hf_efficientsam.training.masks.coco_ap import CANDIDATES, Detections, RleEncoder, segment_detections
from hf_efficientsam.training.masks.evaluation import (
    PROTOCOLS,
    BrokenImage,
    ImageBatches,
    Item,
    Record,
    answers,
    boundary_ious,
    calibration_errors,
    evaluate_images,
    fixed_prompts,
    mean_ious,
    num_clicks,
    numbers_of_clicks,
    split_broken,
)
from hf_efficientsam.training.masks.evaluation_tables import model_table, peers_table
from hf_efficientsam.training.masks.predictors import Predictor, load_mask_predictor, prepare_image


@dataclass(frozen=True)
class EvaluateMasksConfig(AnnotationConfig):
    model: list[str] = field(
        default_factory=lambda: ["bundled"],
        metadata={
            "help": "one or several: path or Hub name of an EfficientSAM or another promptable model, or: bundled"
        },
    )
    # What it is asked.
    annotations: list[str] = field(
        default_factory=list,
        metadata={
            "help": "one or several json files, COCO's or LVIS's; or folders: images/ and masks/, YOLO's, labelme's"
        },
    )
    images: list[str] = field(
        default_factory=list,
        metadata={"help": "folder of their images, or one for each; by default `images` beside each"},
    )
    shards: list[str] = field(default_factory=list, metadata={"help": "SA-1B tars instead, {000..099} for a range"})
    limit: PositiveInt | None = field(default=None, metadata={"help": "only the first so many images of each file"})
    prompts: list[str] = field(
        default_factory=lambda: ["box", "click1", "click3", "click5"],
        metadata={"help": "box, and clickK for K clicks"},
    )
    clicks: str = field(
        default="random",
        metadata={"help": "random (the paper's) or error (on what is wrong)", "choices": list(PROTOCOLS)},
    )
    seed: NotNegativeInt = field(default=0, metadata={"help": "of random clicks"})
    count_clicks: bool = field(
        default=False,
        metadata={"help": "also NoC@85 and NoC@90: how many clicks on errors bring so much IoU, at most 20"},
    )
    detections: str | None = field(default=None, metadata={"help": "json of a detector's boxes, in place of prompts"})
    candidate: str = field(
        default="box_iou", metadata={"help": "which mask of a detection is scored", "choices": list(CANDIDATES)}
    )
    # What is written.
    output: OutputFile | None = field(default=None, metadata={"help": "json file for the numbers"})
    cases: OutputFile | None = field(
        default=None, metadata={"help": "image file for the first model's best, median and worst case by box"}
    )
    write_masks: OutputFile | None = field(
        default=None, metadata={"help": "json file for the detections' masks, as COCO's"}
    )
    # How it is done.
    batch_size: PositiveInt = field(default=8, metadata={"help": "images that are encoded together"})
    prompts_at_once: PositiveInt = field(
        default=64, metadata={"help": "masks of an image that are asked for together"}
    )
    num_workers: NotNegativeInt = field(
        default=2, metadata={"help": "processes that read images (and encode detections' masks)"}
    )
    device: str | None = field(default=None, metadata={"help": "by default a GPU if there is one"})


def check(config: EvaluateMasksConfig) -> None:
    check_ranges(config)
    check_device(config.device)
    if bool(config.annotations) == bool(config.shards):
        raise ValueError("Give --annotations a COCO-style json file or a folder, or --shards tar files of SA-1B.")
    if not config.model or len(set(config.model)) < len(config.model):
        raise ValueError("Give --model at least one model, and none twice.")
    if not config.prompts:
        raise ValueError("Give --prompts at least one of box, click1, click3, ...")
    for prompt in config.prompts:
        num_clicks(prompt)
    if config.detections is not None and len(config.annotations) != 1:
        raise ValueError("--detections belong to one json file; give --annotations that one.")
    if config.detections is not None and config.cases is not None:
        raise ValueError("--cases shows masks of --prompts; leave it or --detections out.")
    if config.write_masks is not None and (config.detections is None or len(config.model) > 1):
        raise ValueError("--write_masks writes the masks of one --model for --detections; give both.")


def open_sources(config: EvaluateMasksConfig) -> list[Any]:
    if config.shards:
        return [Sa1bShards(config.shards, reading=config)]
    pairs = with_folders(config.annotations, config.images, "--annotations")
    if config.detections is not None:
        sources = [Detections(pairs[0][0], config.detections, pairs[0][1], config.limit, config.crowds)]
    else:
        sources = [open_annotations(*pair, config, "val", check_images=False) for pair in pairs]
    for source, (annotations, _) in zip(sources, pairs, strict=True):
        if not len(source):
            raise ValueError(f"There is no mask to evaluate in {annotations}; check the file and --limit.")
    return sources


# ------------------------------------------------------------------------------------------ measuring


def with_progress(batches: Iterable[list[Item]], images: int | None, shown: bool) -> Iterator[list[Item]]:
    with tqdm(total=images, unit="image", mininterval=2, disable=not shown) as progress:
        for batch in batches:
            yield batch
            progress.update(len(batch))


def measure_masks(
    config: EvaluateMasksConfig, batches: Iterable[list[Item | BrokenImage]], predictors: list[Predictor]
) -> list[Record | BrokenImage]:
    """What was measured on each image of this process."""
    named = dict(zip(config.model, predictors, strict=True))
    asked = (config.prompts, config.clicks, config.seed, config.prompts_at_once, config.count_clicks)
    return evaluate_images(named, batches, *asked)


def measure_detections(
    config: EvaluateMasksConfig, batches: Iterable[list[Item | BrokenImage]], predictors: list[Predictor]
) -> list[tuple[str, int, dict] | BrokenImage]:
    """Model, number and RLE of each detection of this process."""
    promises, all_broken = [], []
    with RleEncoder(config.num_workers) as encode:
        for batch in batches:
            batch, broken = split_broken(batch)
            all_broken += broken
            for position, predictor in enumerate(predictors):
                images = predictor.encode([item.inputs[position] for item in batch])
                for item, predict in zip(batch, images, strict=True):
                    size = item.inputs[position].original_size
                    parts = segment_detections(predict, item.sample, size, config.candidate, config.prompts_at_once)
                    promises.append((config.model[position], item.sample.numbers, [encode(part) for part in parts]))
        return all_broken + [
            (model, number, rle)
            for model, numbers, parts in promises
            for number, rle in zip(numbers, (rle for part in parts for rle in part.result()), strict=True)
        ]


def summarize_masks(config: EvaluateMasksConfig, records: list[Record]) -> tuple[dict[str, dict], dict[str, dict]]:
    """Results by model, and by dataset and model where there are several datasets."""
    results = {model: mean_ious(records, model, config.prompts) for model in config.model}
    sources = dict.fromkeys(record.source for record in records if config.annotations)
    parts = {source: [record for record in records if record.source == source] for source in sources}
    return results, {
        source: {model: mean_ious(part, model, config.prompts) for model in config.model}
        for source, part in (parts.items() if len(parts) > 1 else ())
    }


# ------------------------------------------------------------------------------------------ showing


def print_aps(results: dict[str, dict[str, float | None]]) -> None:
    """A row for each model."""
    names = next(iter(results.values()))
    print(f"{'':24}" + "".join(f"{name:>8}" for name in names))
    for model, values in results.items():
        cells = (f"{'-':>8}" if value is None else f"{value:8.4f}" for value in values.values())
        print(f"{model[-23:]:24}" + "".join(cells))


def draw_cases(
    config: EvaluateMasksConfig, predictor: Predictor, batches: ImageBatches, records: list[Record]
) -> None:
    """The best, median and worst mask of the first prompt (box if it is one): prompt, true outline, confident mask."""
    prompt = "box" if "box" in config.prompts else config.prompts[0]
    ious = [
        (iou, record.place, number)
        for record in records
        for number, iou in enumerate(record.ious[config.model[0], prompt, "confident"])
    ]
    ious.sort(reverse=True)
    chosen = {"best": ious[0], "median": ious[len(ious) // 2], "worst": ious[-1]}
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    for axis, (name, (iou, place, number)) in zip(figure.subplots(1, 3), chosen.items(), strict=True):
        sample = batches.find(place)
        target = torch.from_numpy(decode_rles([sample.rles[number]])).contiguous()
        (predict,) = predictor.encode([prepare_image(predictor.processor, sample.image)])
        fixed = fixed_prompts(target, [sample.annotation_ids[number]], [prompt], config.clicks, config.seed)
        ((_, given, (candidates, scores, _)),) = answers(predict, target, fixed, [prompt])
        predicted = candidates[0, scores[0].argmax()].cpu().numpy()
        axis.imshow(sample.image)
        axis.imshow(np.ma.masked_equal(predicted, 0), cmap="spring", alpha=0.55, interpolation="nearest")
        axis.contour(target[0].numpy(), levels=[0.5], colors="white", linewidths=1.5)
        if prompt == "box":
            left, top, right, bottom = given["input_boxes"][0].tolist()
            corner = (left - 0.5, top - 0.5)
            axis.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, edgecolor="yellow"))
        else:
            points = given["input_points"][0]
            on_object = given.get("input_labels", torch.ones(1, len(points)))[0] == 1
            for shown, color in ((on_object, "lime"), (~on_object, "red")):
                axis.scatter(*points[shown].T, marker="*", s=120, color=color, edgecolors="white")
        axis.set(title=f"{name} of {len(ious)}, {prompt}: IoU {iou:.2f}", xticks=[], yticks=[])
    figure.savefig(config.cases, dpi=100)


def save_results(
    config: EvaluateMasksConfig, predictors: list[Predictor], numbers: dict[str, Any], by_model: dict
) -> None:
    """`numbers` as they are; of `by_model` the model's own if there is one only."""
    named = dict(zip(config.model, predictors, strict=True))
    weights = {
        # The processors of other models than ours are image processors.
        name: checkpoint_fingerprint(one.model, getattr(one.processor, "image_processor", one.processor))
        for name, one in named.items()
    }
    by_model |= {"input_size": {name: one.input_size() for name, one in named.items()}, "model_sha256": weights}
    asked = {"annotations": config.annotations, "shards": config.shards}
    report = {
        "model": config.model,
        **{name: files[0] if len(files) == 1 else files for name, files in asked.items() if files},
        **numbers,
        **by_model,
        "config": asdict(config),
        "device": str(predictors[0].model.device),
    }
    if len(config.model) == 1:
        report |= {name: values[config.model[0]] for name, values in by_model.items()} | {"model": config.model[0]}
    write_report(config.output, report, ("faster-coco-eval", "numpy", "pillow", "pycocotools", "scipy"))


# ------------------------------------------------------------------------------------------ all together


def measure(
    config: EvaluateMasksConfig, accelerator: Accelerator, batches: ImageBatches, predictors: list[Predictor]
) -> list:
    """What the processes measured, all of it on each."""
    loader = DataLoader(batches, batch_size=None, num_workers=config.num_workers)
    progress = with_progress(loader, batches.num_images, accelerator.is_main_process)
    return gather_object((measure_detections if config.detections else measure_masks)(config, progress, predictors))


def report_masks(
    config: EvaluateMasksConfig, records: list[Record], batches: ImageBatches, predictors: list[Predictor]
) -> tuple:
    """Numbers that all models share, and those by model."""
    records = sorted(records, key=lambda record: record.place)  # so that sums do not depend on who measured what
    if not records:
        raise ValueError(f"There is no mask to evaluate in {', '.join(config.shards)}; check the files.")
    results, datasets = summarize_masks(config, records)
    errors = {model: calibration_errors(records, model, config.prompts) for model in config.model}
    boundary = {model: boundary_ious(records, model, config.prompts) for model in config.model}
    clicks = {model: numbers_of_clicks(records, model) for model in config.model if config.count_clicks}
    for model in config.model:
        own = {source: by_model[model] for source, by_model in datasets.items()}
        table = model_table(results[model], own, errors[model], boundary[model], clicks.get(model, {}))
        print(f"\n{model}\n{table}")
    by_model = {"results": results, "boundary_iou": boundary, "calibration_error": errors}
    by_model |= {"clicks": clicks} if clicks else {}
    if len(config.model) > 1:
        named = zip(config.model, predictors, strict=True)
        print("\n" + peers_table(by_model, {name: predictor.input_size() for name, predictor in named}))
    if config.cases is not None:
        draw_cases(config, predictors[0], batches, records)
    shared = {"images": len(records), "masks": sum(len(record.areas) for record in records), "seed": config.seed}
    if datasets:
        by_model["datasets"] = {
            model: {source: by_model[model] for source, by_model in datasets.items()} for model in config.model
        }
    return {**shared, "protocol": PROTOCOLS[config.clicks]}, by_model


def report_detections(config: EvaluateMasksConfig, measured: list, source: Detections) -> tuple:
    """Numbers that all models share, and those by model."""
    rles = defaultdict(dict)
    for model, number, rle in measured:
        rles[model][number] = rle
    found = {model: source.results(rles[model]) for model in config.model}
    results = {model: source.mask_ap(found[model]) for model in config.model}
    print_aps(results)
    if config.write_masks is not None:
        replace_text(Path(config.write_masks), json.dumps(found[config.model[0]]) + "\n")
    shared = {"images": len(source.evaluated), "detections": len(found[config.model[0]])}
    return {**shared, "protocol": source.protocol(config.candidate)}, {"results": results}


def evaluate(config: EvaluateMasksConfig, accelerator: Accelerator) -> None:
    check(config)
    sources = open_sources(config)
    predictors = [load_mask_predictor(name, config.device or accelerator.device) for name in config.model]
    batches = ImageBatches(
        sources,
        [predictor.processor for predictor in predictors],
        config.batch_size,
        None if config.detections else config.limit,  # detections count the images without any too
        accelerator.process_index,
        accelerator.num_processes,
    )
    for path in filter(None, (config.output, config.cases, config.write_masks)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    measured, broken = split_broken(measure(config, accelerator, batches, predictors))
    seconds = round(time.perf_counter() - started, 1)
    if not accelerator.is_main_process:
        return
    reasons = [one.reason for one in sorted(broken, key=lambda one: one.place)]
    if broken and (config.detections or not measured):  # AP counts the detections of all images
        raise ValueError(f"{len(broken)} images cannot be evaluated; {reasons[0]}")
    if config.detections:
        numbers, by_model = report_detections(config, measured, sources[0])
    else:
        numbers, by_model = report_masks(config, measured, batches, predictors)
    if config.output is not None:
        numbers |= {"seconds": seconds} | ({"broken": reasons} if reasons else {})
        save_results(config, predictors, numbers, by_model)
    end_without(reasons)


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(EvaluateMasksConfig, __doc__, arguments)
    accelerator = accelerator_without_timeout()
    evaluate(config, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    run_script("evaluate_masks", main)
