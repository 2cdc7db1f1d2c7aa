"""Makes a trained model the bundled checkpoint: half precision, measured as it will ship, numbers in its model card.

    python training/bundle_checkpoint.py --model runs/masks/model --saliency runs/saliency/model \
        --pred_iou_thresh 0.6 --stability_score_thresh 0.8 --curves runs/masks
    python training/bundle_checkpoint.py --saliency runs/saliency/model   # only another saliency head

Everything is made in a folder beside the old checkpoint and then takes its place; the prose of the model card stays. A
saliency head knows the encoder that it was trained with: a new model comes with a new head.

The weights are two files. What the recipes leave as select_weights made it, the patch embeddings and all but the last
encoder layers, is the first, and everything that they train the second: a new edition replaces that one alone.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_efficientsam import EfficientSamModel, EfficientSamProcessor, EfficientSamSaliencyHead, bundled_checkpoint
from hf_efficientsam.export.metrics_report import results_table
from hf_efficientsam.inference.loading import resolve_name
from hf_efficientsam.training.engine.checkpoints import replaced_folder
from hf_efficientsam.training.engine.config import parse_config
from hf_efficientsam.training.engine.reports import fill_between
from hf_efficientsam.training.engine.run import run_script

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SALIENCY_BEGIN, SALIENCY_END = "<!-- saliency: begin -->", "<!-- saliency: end -->"
RESULTS = Path(__file__).parent / "results"
TRAINED_LAYERS = 6  # the last ones of the encoder, as in recipes/bundled/


@dataclass(frozen=True)
class BundleConfig:
    model: str | None = field(default=None, metadata={"help": "the trained model; by default the present one stays"})
    saliency: str | None = field(
        default=None, metadata={"help": "the saliency head trained on its embeddings; none: it gets no head"}
    )
    # Thresholds of mask generation that suit the model. By default the trained model's own.
    pred_iou_thresh: float | None = field(default=None, metadata={"help": "least predicted IoU"})
    stability_score_thresh: float | None = field(default=None, metadata={"help": "least stability"})
    stability_score_offset: float | None = field(default=None, metadata={"help": "of the logits, for stability"})
    annotations: str = field(
        default="../shared/data/coco-val-dev/instances_val.json", metadata={"help": "COCO-style json to measure on"}
    )
    salient: str = field(
        default="../shared/data/saliency", metadata={"help": "folder whose val/ the head is measured on"}
    )
    curves: list[str] = field(
        default_factory=list, metadata={"help": "output_dirs of the runs, whose curves are kept"}
    )


def fill_card(card: str, report: dict) -> str:
    measured = f"{report['masks']} masks of {report['images']} images, seed {report['seed']}.\n\n"
    errors = ", ".join(f"{prompt} {error:.3f}" for prompt, error in report["calibration_error"].items())
    calibration = f"\n\nMean absolute error of the predicted IoU of the most confident mask: {errors}."
    return fill_between(card, BEGIN, END, measured + results_table(report["results"]) + calibration)


def saliency_table(results: dict[str, dict]) -> str:
    """The numbers of `evaluate_saliency.py` as Markdown."""
    names = {
        "own": "the head",
        "whole": "baseline: all of the image",
        "prior": "baseline: mean of the training masks",
    }
    lines = ["| | map: IoU | best IoU, at | MAE | max F | masks: IoU | MAE |", "|---" * 7 + "|"]
    for name, result in results.items():
        numbers, masks = result["map"], result["masks"]
        best = f"{numbers['best_iou']:.3f}, {numbers['best_threshold']:.2f}"
        cells = (f"{value:.3f}" for value in (numbers["mae"], numbers["max_f"], masks["iou"], masks["mae"]))
        lines.append(f"| {names[name]} | {numbers['iou']:.3f} | {best} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(BundleConfig, __doc__, arguments)
    if config.saliency is None:
        raise ValueError("Give --saliency a head that train_saliency.py made for the model, or none.")
    target = Path(bundled_checkpoint())
    RESULTS.mkdir(exist_ok=True)
    for run in map(Path, config.curves):
        for kind in ("jsonl", "png"):
            shutil.copy(run / f"curve.{kind}", RESULTS / f"bundled_{run.name}.{kind}")
    with replaced_folder(target) as making:
        if config.model is None:
            shutil.copytree(target, making, dirs_exist_ok=True)
        else:
            make(config, making, (target / "README.md").read_text())
        if config.saliency != "none":
            add_saliency(config, making)


def make(config: BundleConfig, making: Path, card: str) -> None:
    """Everything of the checkpoint but its head into the folder `making`, with the prose of the model card `card`."""
    save_half_precision(config, making)
    EfficientSamProcessor.from_pretrained(resolve_name(config.model)).save_pretrained(making)
    remove_code(making)
    evaluate = ["evaluate_masks", "--model", making, "--annotations", config.annotations]
    report = measure(making / "metrics.json", *evaluate, "--cases", making / "cases.png") | {"model": "bundled"}
    (making / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")
    (making / "README.md").write_text(fill_card(card, report))


def save_half_precision(config: BundleConfig, folder: Path) -> None:
    """The model in half precision, its weights in two files."""
    model = EfficientSamModel.from_pretrained(resolve_name(config.model), dtype=torch.float16)
    names = ("pred_iou_thresh", "stability_score_thresh", "stability_score_offset")
    thresholds = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    model.config.mask_generation = model.config.mask_generation | thresholds
    model.save_pretrained(folder)
    (folder / SAFE_WEIGHTS_NAME).unlink()
    write_weights(model, folder)
    # To be computed in float32: what pipelines and dtype="auto" go by. Half precision is ten times slower on a CPU.
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"dtype": "float16"', '"dtype": "float32"'))


def write_weights(model: EfficientSamModel, folder: Path) -> None:
    """
    The weights as two files and their index, as `from_pretrained` reads them. The bytes of a file depend on nothing
    but the weights in it.
    """
    weights = model.state_dict()
    untrained = tuple(
        f"vision_encoder.layers.{layer}." for layer in range(model.config.vision_config.num_hidden_layers)
    )[:-TRAINED_LAYERS]
    untrained += ("vision_encoder.embeddings.",)
    files = {name: f"model-0000{1 if name.startswith(untrained) else 2}-of-00002.safetensors" for name in weights}
    for file in sorted(set(files.values())):
        part = {name: weight.contiguous() for name, weight in weights.items() if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    size = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def add_saliency(config: BundleConfig, making: Path) -> None:
    """The head into the folder `saliency` of the checkpoint `making`, and its numbers into the model card."""
    folder, card = making / "saliency", making / "README.md"
    EfficientSamSaliencyHead.from_pretrained(config.saliency, dtype=torch.float16).save_pretrained(folder)
    remove_code(folder)
    evaluate = ["evaluate_saliency", "--model", making, "--data", f"{config.salient}/val"]
    evaluate += ["--saliency", "own", "whole", "prior", "--prior", f"{config.salient}/train"]
    report = measure(folder / "metrics.json", *evaluate)
    (folder / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")
    measured = f"{report['images']} images.\n\n" + saliency_table(report["results"])
    card.write_text(fill_between(card.read_text(), SALIENCY_BEGIN, SALIENCY_END, measured))


def remove_code(folder: Path) -> None:
    for source in folder.glob("*.py"):
        source.unlink()  # the package that it is installed with has them


def measure(output: Path, script: str, *arguments) -> dict:
    """What a script of evaluation reports, without its config: all of that but paths of this machine is elsewhere in
    the report, or the default."""
    command = [sys.executable, Path(__file__).with_name(f"{script}.py"), *arguments, "--output", output]
    subprocess.run([*map(str, command)], check=True)
    report = json.loads(output.read_text())
    del report["config"]
    return report


if __name__ == "__main__":
    run_script("bundle_checkpoint", main)
