"""How many objects segment-everything finds: average recall of its masks, for grids of one or several sizes.

    python training/evaluate_everything.py --annotations ../shared/data/coco-val-dev/instances_val.json \
        --points_per_side 8 16 32 --output everything.json --masks runs/everything

The masks are class-agnostic, and ranked as `EfficientSamMaskGenerator` ranks them: by predicted IoU, with
`--adaptive true` by its product with their stability. Nothing is rejected by default, for recall loses by any
threshold. A large grid takes a while: with `--masks` what was found on an image is kept, and not searched again.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from hf_efficientsam import EfficientSamModel, EfficientSamProcessor, __version__
from hf_efficientsam.inference.image_files import describe_error
from hf_efficientsam.inference.loading import checkpoint_fingerprint, load_model
from hf_efficientsam.inference.mask_generation import EfficientSamMaskGenerator
from hf_efficientsam.training.data.coco import AnnotationConfig, CocoMasks
from hf_efficientsam.training.engine.config import PositiveInt, check_ranges, parse_config
from hf_efficientsam.training.engine.reports import end_without, replace_text, write_report
from hf_efficientsam.training.engine.run import check_device, run_script
from hf_efficientsam.training.masks.coco_ar import NAMES, PROTOCOL, average_recall


@dataclass(frozen=True)
class EvaluateEverythingConfig(AnnotationConfig):
    model: str = field(default="bundled", metadata={"help": "path or Hub name of an EfficientSAM, or: bundled"})
    annotations: str | None = field(default=None, metadata={"help": "COCO-style json file with the true masks"})
    images: str | None = field(default=None, metadata={"help": "folder of its images; by default beside it"})
    limit: PositiveInt | None = field(default=None, metadata={"help": "only the first so many images that have masks"})
    points_per_side: list[int] = field(default_factory=lambda: [32], metadata={"help": "one or several"})
    pred_iou_thresh: float = field(default=0.0, metadata={"help": "least predicted IoU, exclusive; 0 keeps all"})
    stability_score_thresh: float = field(default=0.0, metadata={"help": "least stability, likewise"})
    box_nms_thresh: float | None = field(
        default=None,
        metadata={
            "help": "of two masks whose boxes overlap by more, the worse is left out; by default the generator's"
        },
    )
    adaptive: bool = field(default=False, metadata={"help": "ask about a third of the points, as the generator does"})
    output: str | None = field(default=None, metadata={"help": "json file for the numbers"})
    masks: str | None = field(default=None, metadata={"help": "folder that keeps what was found, to go on from"})
    device: str | None = field(default=None, metadata={"help": "by default a GPU if there is one"})


def check(config: EvaluateEverythingConfig) -> None:
    check_ranges(config)
    check_device(config.device)
    if config.annotations is None:
        raise ValueError("Give --annotations a COCO-style json file.")
    if not config.points_per_side or len(set(config.points_per_side)) < len(config.points_per_side):
        raise ValueError("Give --points_per_side at least one number, and none twice.")


def check_same_masks(config: EvaluateEverythingConfig, dataset: CocoMasks, model, processor) -> None:
    """Notes in the folder of masks how they were found, and compares if it is noted already."""
    path = Path(config.masks) / "config.json"
    names = (
        "model",
        "annotations",
        "images",
        "pred_iou_thresh",
        "stability_score_thresh",
        "box_nms_thresh",
        "adaptive",
    )
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
    generator: EfficientSamMaskGenerator, dataset: CocoMasks, index: int, path: Path | None
) -> list[dict] | str:
    """
    `{segmentation, score}` of an image's masks, the most confident first, from the file if it is there; a sentence if
    the image cannot be read.
    """
    if path is not None and path.exists():
        return json.loads(path.read_text())
    try:
        records = generator.generate(dataset[index].image)
    except (ValueError, OSError) as error:
        return describe_error(error)
    masks = [
        {
            "segmentation": one["segmentation"],
            "score": one["predicted_iou"] * (one["stability_score"] if generator.adaptive else 1),
        }
        for one in records
    ]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(masks))
    return masks


def measure(
    config: EvaluateEverythingConfig, dataset: CocoMasks, count: int, points: int, model: EfficientSamModel, processor
) -> tuple[dict[str, float | None], list[str]]:
    """
    Average recall, and how many masks an image has, with a grid of `points` a side on the first `count` images; a
    sentence about each image that is left out, as it cannot be read.
    """
    generator = EfficientSamMaskGenerator(
        model,
        processor,
        points_per_side=points,
        pred_iou_thresh=config.pred_iou_thresh,
        stability_score_thresh=config.stability_score_thresh,
        box_nms_thresh=config.box_nms_thresh,
        adaptive=config.adaptive,
        output_mode="coco_rle",
    )
    found = []
    for index in tqdm(range(count), desc=f"{points} a side", unit="image", mininterval=2):
        name = f"{points}/{dataset.records[index]['id']}.json"
        found.append(find_masks(generator, dataset, index, config.masks and Path(config.masks) / name))
    broken = [one for one in found if isinstance(one, str)]
    if len(broken) == count:
        raise ValueError(f"{count} images cannot be evaluated; {broken[0]}")
    truth = [rles for rles, one in zip(dataset.rles, found, strict=False) if not isinstance(one, str)]
    found = [one for one in found if not isinstance(one, str)]
    return {**average_recall(truth, found), "masks": sum(map(len, found)) / len(found)}, broken


def print_row(points: int, result: dict[str, float | None]) -> None:
    cells = (f"{'-':>8}" if result[name] is None else f"{result[name]:8.4f}" for name in NAMES)
    print(f"{points:<8}" + "".join(cells) + f"{result['masks']:8.1f}", flush=True)


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
    print(f"{'points':8}" + "".join(f"{name:>8}" for name in NAMES) + f"{'masks':>8}")
    for points in config.points_per_side:
        results[str(points)], broken = measure(config, dataset, count, points, model, processor)
        print_row(points, results[str(points)])
        if config.output is not None:  # after each, for the next can take hours
            save_results(config, count, broken, results, time.perf_counter() - started, model, processor)
    end_without(broken)


def main(arguments: list[str] | None = None) -> None:
    evaluate(parse_config(EvaluateEverythingConfig, __doc__, arguments))


if __name__ == "__main__":
    run_script("evaluate_everything", main)
