"""What would more images buy? The same mask training on an eighth, a quarter, half and all of them.

    python training/data_study.py --jobs 2               # everything that is not there yet, then the table
    python training/data_study.py --arms all --seeds 0

All runs start from the bundled checkpoint's encoder, which stays as it is, and one new decoder that has seen ellipses
alone, and take the same number of steps. (The encoder has seen all the images and their masks; the decoder none of the
masks.) Stopping, going on and where the numbers go: see `hf_efficientsam.training.engine.studies`.
"""

import json
from functools import partial
from pathlib import Path

from hf_efficientsam import bundled_checkpoint
from hf_efficientsam.training.engine.config import parse_config
from hf_efficientsam.training.engine.run import run_script
from hf_efficientsam.training.engine.studies import StudyConfig, run_stage, run_study

HERE = Path(__file__).parent
RECIPES = HERE / "recipes" / "studies"
EVERY = {"an eighth": 8, "a quarter": 4, "half": 2, "all": 1}  # so many-th image is taken
TITLES = {"box": "box mIoU", "click1": "1 click mIoU", "loss": "training loss"}


def train_files(config: StudyConfig) -> list:
    return ["--train", *(Path(config.data) / name / "instances_train.json" for name in ("train-seg", "coco-train"))]


def start_model(config: StudyConfig, root: Path) -> Path:
    """The model that all arms start from; it is trained the first time."""
    arguments = ["--config", RECIPES / "data_start.yaml", "--encoder", bundled_checkpoint(), *train_files(config)]
    output = root / "start"
    return run_stage(root, output / "model", HERE / "finetune_masks.py", *arguments, "--output_dir", output)


def measure(config: StudyConfig, root: Path, arm: str, seed: int, folder: Path) -> dict[str, float]:
    masks, metrics = folder / "masks", folder / "metrics.json"
    arguments = ["--config", RECIPES / "data.yaml", "--every", EVERY[arm], "--seed", seed, *train_files(config)]
    arguments += ["--model", start_model(config, root), "--output_dir", masks]
    run_stage(root, masks / "model", HERE / "finetune_masks.py", *arguments)
    last = json.loads((masks / "curve.jsonl").read_text().splitlines()[-1])

    annotations = Path(config.data) / "coco-val-dev" / "instances_val.json"
    arguments = ["--annotations", annotations, "--prompts", "box", "click1", "--model", masks / "model"]
    run_stage(root, metrics, HERE / "evaluate_masks.py", *arguments, "--output", metrics)
    results = json.loads(metrics.read_text())["results"]
    return {name: results[name]["confident"]["all"]["miou"] for name in ("box", "click1")} | {"loss": last["loss"]}


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(StudyConfig, __doc__, arguments)
    root = Path(config.output_dir or "runs/data_study")
    functions = (partial(start_model, config, root), partial(measure, config, root))
    run_study("data_study", config, root, HERE, list(EVERY), TITLES, *functions)


if __name__ == "__main__":
    run_script("data_study", main)
