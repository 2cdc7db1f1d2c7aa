"""Does SAMI help, and which of its choices? The paper's ablations at a size that two CPU cores finish in hours.

    python training/sami_study.py --jobs 2        # everything that is not there yet, then the table
    python training/sami_study.py --arms scratch mae sami --seeds 0

Each arm is pretrained by `sami.py` on the same images for the same number of steps, then scored twice: frozen, by
`probe_encoder.py`, and as the start of the same short mask fine-tuning (`finetune_masks.py`, `evaluate_masks.py`).
Every stage is a command whose result is kept under `--output_dir`; what is there is not run again, so the study can be
stopped at any time. The numbers go to `results/sami_study.json` and .png, the table into `training/README.md`. Runs
whose numbers are in that json are not run again either, so another machine can go on: delete them to measure anew.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from PIL import Image
from tqdm.auto import tqdm

from hf_efficientsam.training.data.images import FolderImages
from hf_efficientsam.training.runtime import fill_between, parse_recipe, replace_text, replaced_folder

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sami_study.json"
PRETRAINING, FINETUNING = HERE / "recipes" / "sami_study.yaml", HERE / "recipes" / "sami_study_masks.yaml"
# What each arm changes in the recipe of pretraining; all but the pixels' have the cached teacher.
ARMS = {
    "scratch": {"base_learning_rate": 0, "epochs": 1, "epoch_images": 64},  # the start that all arms share
    "mae": {"target": "pixels", "decoder_type": "all_token"},
    "sami": {},
    "sami_cosine": {"loss": "cosine"},
    "sami_all_token": {"decoder_type": "all_token"},
    "sami_masked_50": {"mask_ratio": 0.5},
    "sami_masked_85": {"mask_ratio": 0.85},
    "sami_short": {"epochs": 1, "warmup_epochs": 0.1},
}
SCORES = {"nearest_neighbors": "10-NN", "linear_probe": "linear probe", "box": "box mIoU", "click1": "1 click mIoU"}
BEGIN, END = "<!-- sami study: begin -->", "<!-- sami study: end -->"


@dataclass(frozen=True)
class Recipe:
    data: str = field(default="../shared/data", metadata={"help": "folder with train-seg, coco-train and so on"})
    teacher: str = field(default="../shared/weights/vit-small-patch14-teacher", metadata={"help": "vision model"})
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": "which of the arms"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "each arm is run with each"})
    jobs: int = field(default=1, metadata={"help": "runs at a time, each on one thread"})
    output_dir: str = field(default="runs/sami_study", metadata={"help": "where every stage keeps its result"})


class Study:
    """The stages; each makes its result if it is not there."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.data, self.folder = recipe, Path(recipe.data), Path(recipe.output_dir)
        self.cache = self.folder / "cache"

    def run(self, script: str, *arguments, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(HERE / f"{script}.py"), *map(str, arguments)]
        with log.open("a") as file:
            if subprocess.run(command, env=environment, stdout=file, stderr=file).returncode:
                raise RuntimeError(f"{script} failed; {log} says why. Mend it and start the study again.")

    def images(self) -> Path:
        """Photographs without those to evaluate on, made small once, because decoding them takes as long as a step."""
        folder = self.folder / "images"
        if not folder.is_dir():
            names = ["train-seg/images", "coco-train/images", "unlabelled/images", "saliency/train/images"]
            source = FolderImages([self.data / name for name in [*names, "classification/train"]])
            with replaced_folder(folder) as writing:
                for key, image in tqdm(source, desc="small images", mininterval=2):
                    scale = min(1, 160 / min(image.size))
                    small = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
                    path = (writing / key).with_suffix(".jpg")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    small.save(path, quality=92)
        return folder

    def make_cache(self) -> None:
        """The teacher's features; run again each time, as it knows itself what is missing."""
        arguments = ["--images", self.images(), "--teacher", self.recipe.teacher, "--teacher_size", 112, "--size", 128]
        self.run(
            "cache_features", *arguments, "--views", 2, "--output_dir", self.cache, log=self.folder / "cache.log"
        )  # fmt: skip

    def pretrained(self, arm: str, seed: int) -> Path:
        folder = self.folder / arm / f"seed_{seed}" / "pretraining"
        changes = ARMS[arm] | ({} if arm == "mae" else {"cache": self.cache})
        arguments = ["--config", PRETRAINING, "--images", self.folder / "images", "--seed", seed]
        arguments += [word for name, value in changes.items() for word in (f"--{name}", value)]
        if not (folder / "model").is_dir():
            self.run("sami", *arguments, "--output_dir", folder, log=folder.with_suffix(".log"))
        return folder / "model"

    def masks(self) -> list:
        names = ("train-seg", "coco-train", "coco-train")
        return ["--train", *(self.data / name / "instances_train.json" for name in names)]

    def score(self, arm: str, seed: int) -> None:
        folder = self.folder / arm / f"seed_{seed}"
        encoder, masks = self.pretrained(arm, seed), folder / "masks"
        probe, metrics = folder / "probe.json", folder / "metrics.json"
        if not probe.is_file():
            arguments = ["--encoder", encoder, "--data", self.data / "classification", "--size", 96]
            arguments += ["--train_limit", 1500, "--test_limit", 1000]
            self.run("probe_encoder", *arguments, "--output", probe, log=folder / "probe.log")
        if not (masks / "model").is_dir():
            arguments = ["--config", FINETUNING, *self.masks(), "--encoder", encoder, "--seed", seed]
            self.run("finetune_masks", *arguments, "--output_dir", masks, log=folder / "masks.log")
        if not metrics.is_file():
            annotations = self.data / "coco-val-dev" / "instances_val.json"
            arguments = ["--annotations", annotations, "--prompts", "box", "click1", "--model", masks / "model"]
            self.run("evaluate_masks", *arguments, "--output", metrics, log=folder / "metrics.log")

    def results(self) -> dict[str, dict[str, dict[str, float]]]:
        """The scores of all runs that are finished, here or in the results kept with the scripts, by arm and seed."""
        kept = json.loads(RESULTS.read_text())["scores"] if RESULTS.is_file() else {}
        runs = {arm: sorted((self.folder / arm).glob("seed_*/metrics.json")) for arm in ARMS}
        here = {arm: {path.parent.name: self.read(path.parent) for path in paths} for arm, paths in runs.items()}
        return {arm: dict(sorted((kept.get(arm, {}) | here[arm]).items())) for arm in ARMS}

    def read(self, folder: Path) -> dict[str, float]:
        probe, metrics = (json.loads((folder / f"{name}.json").read_text()) for name in ("probe", "metrics"))
        scores = {name: probe[name] for name in ("nearest_neighbors", "linear_probe")}
        return scores | {name: metrics["results"][name]["confident"]["all"]["miou"] for name in ("box", "click1")}


def report(results: dict[str, dict[str, dict[str, float]]]) -> None:
    """Json, table and picture of scores by arm and seed."""
    versions = {name: version(name) for name in ("hf-efficientsam", "torch", "transformers", "scikit-learn", "pillow")}
    content = {"command": "python training/sami_study.py", "versions": versions, "scores": results}
    replace_text(RESULTS, json.dumps(content, indent=1) + "\n")
    spread = {
        arm: {name: [run[name] for run in runs.values()] for name in SCORES} for arm, runs in results.items() if runs
    }
    lines = ["| arm | seeds | " + " | ".join(SCORES.values()) + " |", "|---" * (2 + len(SCORES)) + "|"]
    for arm, scores in spread.items():
        cells = [f"{mean(v):.3f} ± {stdev(v):.3f}" if len(v) > 1 else f"{v[0]:.3f}" for v in scores.values()]
        lines.append(f"| {arm} | {len(results[arm])} | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    page = HERE / "README.md"
    replace_text(page, fill_between(page.read_text(encoding="utf-8"), BEGIN, END, "\n".join(lines)))

    figure = Figure(figsize=(3.2 * len(SCORES), 3.2), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(1, len(SCORES), sharey=True), SCORES.items(), strict=True):
        for row, scores in enumerate(spread.values()):
            axis.plot(scores[name], [row] * len(scores[name]), "o", alpha=0.5, color="C0")
            axis.plot(mean(scores[name]), row, "|", markersize=16, color="C1")
        axis.set(title=title, yticks=range(len(spread)), yticklabels=list(spread))
        axis.grid(alpha=0.3)
    axis.invert_yaxis()
    figure.savefig(HERE / "results" / "sami_study.png", dpi=100)


def main() -> None:
    recipe = parse_recipe(Recipe, __doc__)
    if unknown := set(recipe.arms) - set(ARMS):
        print(f"sami_study: there is no arm {min(unknown)}; the arms are {', '.join(ARMS)}.", file=sys.stderr)
        raise SystemExit(2)
    study = Study(recipe)
    finished = study.results()
    runs = [(seed, arm) for seed in recipe.seeds for arm in recipe.arms]  # a seed of all arms before the next
    runs = [(seed, arm) for seed, arm in runs if f"seed_{seed}" not in finished[arm]]
    try:
        if runs:
            study.make_cache()
        with ThreadPoolExecutor(recipe.jobs) as pool:
            futures = [pool.submit(study.score, arm, seed) for seed, arm in runs]
            try:
                for future in tqdm(as_completed(futures), total=len(runs), desc="runs"):
                    future.result()
            finally:
                pool.shutdown(cancel_futures=True)  # after a failure, those that have not begun
    except RuntimeError as error:
        print(f"sami_study: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    report(study.results())


if __name__ == "__main__":
    main()
