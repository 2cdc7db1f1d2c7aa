"""Makes a trained model the bundled checkpoint: half precision, measured as it will ship, numbers in its model card.

    python training/bundle_checkpoint.py --model runs/masks/model --curves runs/encoder runs/geometry runs/masks

Everything is made in a folder beside the old checkpoint and then takes its place; the prose of the model card stays.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hf_efficientsam import EfficientSamModel, EfficientSamProcessor, bundled_checkpoint
from hf_efficientsam.training.runtime import fill_between, parse_recipe, replaced_folder

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Recipe:
    model: str = field(default="runs/masks/model", metadata={"help": "the trained model"})
    annotations: str = field(
        default="../shared/data/coco-val-dev/instances_val.json", metadata={"help": "COCO-style json to measure on"}
    )
    curves: list[str] = field(
        default_factory=list, metadata={"help": "output_dirs of the runs, whose curves are kept"}
    )


def table(results: dict) -> str:
    """The numbers as Markdown, by size of the object."""
    groups = list(results["baseline"]["ellipse"])
    lines = ["| mIoU | " + " | ".join(groups) + " |", "|---" * (len(groups) + 1) + "|"]
    for prompt, answers in results.items():
        for answer, means in answers.items():
            lines.append(f"| {prompt}, {answer} | " + " | ".join(f"{means[g]['miou']:.3f}" for g in groups) + " |")
    return "\n".join(lines)


def fill_card(card: str, report: dict) -> str:
    measured = f"{report['masks']} masks of {report['images']} images, seed {report['seed']}.\n\n"
    return fill_between(card, BEGIN, END, measured + table(report["results"]))


def main() -> None:
    recipe = parse_recipe(Recipe, __doc__)
    target = Path(bundled_checkpoint())
    RESULTS.mkdir(exist_ok=True)
    for run in map(Path, recipe.curves):
        for kind in ("jsonl", "png"):
            shutil.copy(run / f"curve.{kind}", RESULTS / f"bundled_{run.name}.{kind}")
    with replaced_folder(target) as making:
        make(recipe, making, (target / "README.md").read_text())


def make(recipe: Recipe, making: Path, card: str) -> None:
    """Everything of the checkpoint into the folder `making`, with the prose of the model card `card`."""
    EfficientSamModel.from_pretrained(recipe.model, dtype=torch.float16).save_pretrained(making)
    EfficientSamProcessor.from_pretrained(recipe.model).save_pretrained(making)
    for source in making.glob("*.py"):
        source.unlink()  # the package that it is installed with has them

    evaluate = [sys.executable, Path(__file__).with_name("evaluate_masks.py"), "--model", making]
    evaluate += ["--annotations", recipe.annotations, "--output", making / "metrics.json"]
    subprocess.run(map(str, [*evaluate, "--picture", making / "cases.png"]), check=True)
    report = json.loads((making / "metrics.json").read_text()) | {"model": "bundled"}
    del report["recipe"]  # all of it but paths of this machine is elsewhere in the report, or the default
    (making / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")
    (making / "README.md").write_text(fill_card(card, report))


if __name__ == "__main__":
    main()
