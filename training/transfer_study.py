"""Does SAMI help other tasks? Classification and semantic segmentation at a size that two CPU cores finish in an hour.

    python training/transfer_study.py --jobs 2           # everything that is not there yet, then the table
    python training/transfer_study.py --arms sami --seeds 0

One encoder is pretrained as the arm `sami` of sami_study.py, and then fine-tuned with each seed by the same recipes as
one from scratch: on the CIFAR-10 subset (recipes/studies/transfer_classification.yaml) and on the CamVid subset
(recipes/studies/transfer_semantic.yaml). Stopping, going on and where the numbers go: see
`hf_efficientsam.training.engine.studies`.
"""

import json
from functools import partial
from pathlib import Path

from sami_study import SamiStudyConfig, cache_teacher, pretrain

from hf_efficientsam.training.engine.config import parse_config
from hf_efficientsam.training.engine.run import run_script
from hf_efficientsam.training.engine.studies import run_stage, run_study

HERE = Path(__file__).parent
RECIPES = HERE / "recipes" / "studies"
TITLES = {"top1": "CIFAR-10 top-1", "miou": "CamVid mIoU"}


def prepare(config: SamiStudyConfig, root: Path) -> None:
    cache_teacher(config, root)
    pretrain(root, "sami", 0, root)


def measure(config: SamiStudyConfig, root: Path, arm: str, seed: int, folder: Path) -> dict[str, float]:
    data, start = Path(config.data), ["--seed", seed]
    if arm == "sami":
        start += ["--encoder", pretrain(root, "sami", 0, root)]  # made by `prepare`
    images, classification = data / "classification", folder / "classification"
    arguments = ["--config", RECIPES / "transfer_classification.yaml", *start, "--output_dir", classification]
    arguments += ["--train", images / "train", "--test", images / "test"]
    run_stage(root, classification / "model", HERE / "finetune_classification.py", *arguments)

    images, semantic = data / "semantic", folder / "semantic"
    arguments = ["--config", RECIPES / "transfer_semantic.yaml", *start, "--output_dir", semantic]
    arguments += ["--train", images / "train", "--test", images / "val", "--ignore_label", 11]
    run_stage(root, semantic / "model", HERE / "finetune_semantic.py", *arguments)
    top1 = json.loads((classification / "metrics.json").read_text())["top1"]
    return {"top1": top1, "miou": json.loads((semantic / "metrics.json").read_text())["mean_iou"]}


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(SamiStudyConfig, __doc__, arguments)
    root = Path(config.output_dir or "runs/transfer_study")
    functions = (partial(prepare, config, root), partial(measure, config, root))
    run_study("transfer_study", config, root, HERE, ["scratch", "sami"], TITLES, *functions)


if __name__ == "__main__":
    run_script("transfer_study", main)
