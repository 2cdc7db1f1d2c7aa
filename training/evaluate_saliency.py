"""How well salient objects are found: the map of each source of saliency, and the masks that it leads to.

    python training/evaluate_saliency.py --data ../shared/data/saliency/val --output saliency.json
    python training/evaluate_saliency.py --data ../shared/data/saliency/val --prior ../shared/data/saliency/train \
        --saliency own network.onnx whole prior --cases cases.png

Sources are: own, the head of the checkpoint; whatever `efficientsam salient --saliency` takes; and two that look at no
image: whole, all of the image, and prior, the mean of the masks of `--prior`, stretched over the image. The masks
are those of `SalientPrompter`, all objects of an image together. IoU and MAE are at the image's own size, mean over
images.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from hf_efficientsam import EfficientSamPredictor
from hf_efficientsam.inference.drawing import draw_masks, image_table
from hf_efficientsam.inference.image_files import describe_error
from hf_efficientsam.inference.loading import checkpoint_fingerprint, load_model
from hf_efficientsam.inference.prompters import SalientPrompter
from hf_efficientsam.training.data.coco import AnnotationConfig, decode_rles
from hf_efficientsam.training.data.folder_masks import UnitedMasks, open_annotations
from hf_efficientsam.training.engine.config import OutputFile, PositiveInt, RatioBelowOne, check_ranges, parse_config
from hf_efficientsam.training.engine.reports import end_without, write_report
from hf_efficientsam.training.engine.run import check_device, run_script
from hf_efficientsam.training.saliency.evaluation import mean_scores, score_map

PRIOR_SIDE = 128  # pixels of the mean mask, high and wide


@dataclass(frozen=True)
class EvaluateSaliencyConfig(AnnotationConfig):
    model: str = field(default="bundled", metadata={"help": "path or Hub name of an EfficientSAM, or: bundled"})
    data: str | None = field(default=None, metadata={"help": "folder with images/ and masks/, or a COCO-style json"})
    limit: PositiveInt | None = field(default=None, metadata={"help": "only the first so many images"})
    saliency: list[str] = field(default_factory=lambda: ["own"], metadata={"help": "sources, see above"})
    prior: str | None = field(default=None, metadata={"help": "such a folder or json, for the source of that name"})
    threshold: RatioBelowOne = field(default=0.5, metadata={"help": "objects are cut out of the map at this value"})
    output: OutputFile | None = field(default=None, metadata={"help": "json file for the numbers"})
    cases: OutputFile | None = field(default=None, metadata={"help": "png of the best, median and worst masks"})
    device: str | None = field(default=None, metadata={"help": "by default a GPU if there is one"})


def check(config: EvaluateSaliencyConfig) -> None:
    check_ranges(config)
    check_device(config.device)
    if config.data is None:
        raise ValueError("Give --data a folder with images/ and masks/, or a COCO-style json file.")
    if not config.saliency or len(set(config.saliency)) < len(config.saliency):
        raise ValueError("Give --saliency at least one source, and none twice.")
    if ("prior" in config.saliency) != (config.prior is not None):
        raise ValueError("--saliency prior is the mean of the masks of --prior; give both or neither.")


def mean_mask(source: UnitedMasks) -> np.ndarray:
    """The mean of all masks, each squashed to a square: float32 `[PRIOR_SIDE, PRIOR_SIDE]`, 0 to 1."""
    total = torch.zeros(PRIOR_SIDE, PRIOR_SIDE)
    for index in range(len(source)):
        mask = torch.from_numpy(decode_rles(source.without_image(index).rles)).float()
        total += F.interpolate(mask[None], (PRIOR_SIDE, PRIOR_SIDE), mode="area")[0, 0]
    return (total / len(source)).numpy()


def open_source(name: str, config: EvaluateSaliencyConfig) -> Callable | str | None:
    """What `SalientPrompter` is to be given for a source."""
    if name == "whole":
        return lambda image: np.ones((image.height, image.width), np.float32)
    if name == "prior":
        prior = mean_mask(UnitedMasks(open_annotations(config.prior, reading=config)))
        return lambda image: prior
    return None if name == "own" else name


def measure(prompter: SalientPrompter, truth: np.ndarray) -> dict:
    """The scores of one source's map and masks on the image that the predictor has."""
    saliency = prompter.map()
    found = prompter.segment_map(saliency)
    masks = score_map(found.masks.any(axis=0).astype(np.float32), truth)
    return {"map": score_map(saliency, truth), "masks": masks, "objects": len(found)}


def summarize(scores: list[dict]) -> dict:
    """The means over the images; masks have no threshold, so IoU and MAE are all that can be said of them."""
    masks = mean_scores([one["masks"] for one in scores])
    return {
        "map": mean_scores([one["map"] for one in scores]),
        "masks": {name: masks[name] for name in ("iou", "mae")},
        "objects": float(np.mean([one["objects"] for one in scores])),
    }


def draw(source: UnitedMasks, measured: list[int], prompters: dict, scores: list[dict]) -> Image.Image:
    """
    Of the images `measured` those whose masks by the first source are best, median and worst: truth, and maps and
    masks by each.
    """
    order = np.argsort([-one["masks"]["iou"] for one in scores], kind="stable")
    columns = {"image": [], "truth": []}
    for index in order[[0, len(order) // 2, -1]]:
        sample = source[measured[index]]
        columns["image"].append(sample.image)
        columns["truth"].append(draw_masks(sample.image, decode_rles(sample.rles)))
        for name, prompter in prompters.items():
            saliency, short = prompter.map(sample.image), Path(name).name
            found = prompter.segment_map(saliency)
            columns.setdefault(f"{short}: map", []).append(Image.fromarray(np.uint8(255 * saliency)))
            columns.setdefault(f"{short}: masks", []).append(draw_masks(sample.image, found.masks))
    return image_table({name: [fit(image) for image in cells] for name, cells in columns.items()})


def fit(image: Image.Image, side: int = 256) -> Image.Image:
    """An image inside a white square."""
    square, image = Image.new("RGB", (side, side), "white"), image.convert("RGB")
    image.thumbnail((side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def print_table(results: dict[str, dict]) -> None:
    print(f"{'':24}{'map: IoU':>10}{'best IoU':>10}{'at':>6}{'MAE':>8}{'max F':>8}{'masks: IoU':>12}{'MAE':>8}")
    for name, result in results.items():
        numbers, masks = result["map"], result["masks"]
        print(
            f"{Path(name).name[:23]:24}{numbers['iou']:10.4f}{numbers['best_iou']:10.4f}"
            f"{numbers['best_threshold']:6.2f}{numbers['mae']:8.4f}{numbers['max_f']:8.4f}"
            f"{masks['iou']:12.4f}{masks['mae']:8.4f}"
        )


def evaluate(config: EvaluateSaliencyConfig) -> None:
    check(config)
    source = UnitedMasks(open_annotations(config.data, reading=config, split="val", check_images=False))
    count = min(len(source), config.limit or len(source))
    model, processor = load_model(config.model)
    predictor = EfficientSamPredictor(model.to(config.device or model.device), processor)
    prompters = {
        name: SalientPrompter(predictor, open_source(name, config), config.threshold) for name in config.saliency
    }
    scores, measured, broken = {name: [] for name in prompters}, [], []
    for index in tqdm(range(count), unit="image", mininterval=2):
        try:
            sample = source[index]
            predictor.set_image(sample.image)  # once for all sources
        except (ValueError, OSError) as error:
            broken.append(describe_error(error))
            continue
        measured.append(index)
        truth = decode_rles(sample.rles)[0].astype(bool)
        for name, prompter in prompters.items():
            scores[name].append(measure(prompter, truth))
    if not measured:
        raise ValueError(f"{len(broken)} images cannot be evaluated; {broken[0]}")
    results = {name: summarize(of_source) for name, of_source in scores.items()}
    print_table(results)
    if config.output is not None:
        report = {"images": len(measured), "results": results, "config": asdict(config)}
        report["model_sha256"] = checkpoint_fingerprint(predictor.model, processor.image_processor)
        report |= {"device": str(predictor.device)} | ({"broken": broken} if broken else {})
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        write_report(config.output, report, ("numpy", "pillow", "scipy"))
    if config.cases is not None:
        Path(config.cases).parent.mkdir(parents=True, exist_ok=True)
        draw(source, measured, prompters, scores[config.saliency[0]]).save(config.cases)
    end_without(broken)


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(EvaluateSaliencyConfig, __doc__, arguments)
    evaluate(config)


if __name__ == "__main__":
    run_script("evaluate_saliency", main)
