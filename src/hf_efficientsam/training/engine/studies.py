"""Experiments of many runs: scripts started as commands, finished runs kept, their scores as json, table and plot."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from tqdm.auto import tqdm

from .config import NotNegativeInt, OutputFolder, PositiveInt, check_ranges
from .reports import fill_between, replace_text, versions_of

Scores = dict[str, dict[str, dict]]  # by arm and seed: numbers by their names, and the `versions` behind them
LIBRARIES = ("scikit-learn", "pillow")


@dataclass(frozen=True)
class StudyConfig:
    """The fields that studies share."""

    data: str = field(default="../shared/data", metadata={"help": "folder with train-seg, coco-train and so on"})
    arms: list[str] | None = field(default=None, metadata={"help": "which of the arms; by default all"})
    seeds: list[NotNegativeInt] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "each arm is run with each"}
    )
    jobs: PositiveInt = field(default=1, metadata={"help": "runs at a time, each on one thread"})
    output_dir: OutputFolder | None = field(
        default=None, metadata={"help": "where every stage keeps its result; by default runs/ and the study's name"}
    )


def run_stage(folder: Path, result: Path, script: Path, *arguments) -> Path:
    """
    Runs a script on one thread, unless it has come to its end before; one that was stopped goes on.

    Args:
        folder: the study's, whose `logs/` hold what the script says.
        result: file or folder under it that the script leaves; it is returned.
        script: path of the script.
        arguments: its arguments.

    Raises:
        ChildProcessError: if the script fails.
    """
    log = folder / "logs" / f"{'_'.join(result.relative_to(folder).parts)}.log"
    done = log.with_suffix(".done")
    if not done.exists():
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(script), *map(str, arguments)]
        with log.open("a") as file:
            if subprocess.run(command, env=environment, stdout=file, stderr=file).returncode:
                raise ChildProcessError(f"{script.stem} failed; {log} says why. Mend it and start the study again.")
        done.touch()
    return result


def run_study(
    name: str,
    config: StudyConfig,
    folder: Path,
    scripts: Path,
    arms: list[str],
    titles: dict[str, str],
    prepare: Callable[[], object],
    measure: Callable[[str, int, Path], dict[str, float]],
) -> None:
    """
    Runs every arm with every seed that has no scores under `folder` yet, then reports.

    The scores go to `results/NAME.json` and .png beside the scripts and, as a table, between the marks of NAME into
    their README.md. They take the place of those that the json has of the same arms and seeds; others stay, each with
    the versions that it was measured with. A study can be stopped at any time and go on; what is under `folder` was
    made from the same data, recipes and versions.

    Args:
        name: of the study's script.
        config: which arms and seeds, and how many at a time.
        folder: where runs keep their results.
        scripts: the folder of the training scripts.
        arms: all of them.
        titles: of the scores, by their names.
        prepare: makes what all runs need, before the first.
        measure: `(arm, seed, folder)` -> scores; runs the stages whose results are not in the folder yet.

    Raises:
        ValueError: for an option out of range and an arm that there is not, and if what is under `folder` was made
            from something else.
        ChildProcessError: if a script fails; what is finished is kept.
    """
    check_ranges(config)
    if unknown := set(config.arms or ()) - set(arms):
        raise ValueError(f"There is no arm {min(unknown)}; choose of {', '.join(arms)}.")
    check_same_study(config, folder, scripts)
    finished, chosen = finished_runs(folder, arms), [arm for arm in arms if arm in (config.arms or arms)]
    runs = [(arm, seed) for seed in config.seeds for arm in chosen]  # a seed of all arms before the next
    runs = [(arm, seed) for arm, seed in runs if f"seed_{seed}" not in finished[arm]]

    def run_one(arm: str, seed: int) -> None:
        own = folder / arm / f"seed_{seed}"
        own.mkdir(parents=True, exist_ok=True)
        scores = {**measure(arm, seed, own), "versions": versions_of(LIBRARIES)}
        replace_text(own / "scores.json", json.dumps(scores) + "\n")

    if runs:
        prepare()
    with ThreadPoolExecutor(config.jobs) as pool:
        futures = [pool.submit(run_one, arm, seed) for arm, seed in runs]
        try:
            for future in tqdm(as_completed(futures), total=len(runs), desc="runs"):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure, those that have not begun
    report(name, finished_runs(folder, arms), titles, scripts)


def check_same_study(config: StudyConfig, folder: Path, scripts: Path) -> None:
    """Notes in the folder what its runs are made from; ValueError if those that are there are of something else."""
    recipes = b"".join(path.read_bytes() for path in sorted(scripts.glob("recipes/studies/*.yaml")))
    now = {"data": config.data, "recipes_sha256": hashlib.sha256(recipes).hexdigest(), **versions_of(LIBRARIES)}
    path = folder / "made_from.json"
    before = json.loads(path.read_text()) if path.is_file() else {} if any(folder.glob("*")) else now
    if changed := [name for name in now if before.get(name) != now[name]]:
        raise ValueError(
            f"{folder} holds runs that were made from another {', '.join(changed)}; choose a new --output_dir, or "
            "delete that one."
        )
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(now, indent=1) + "\n")


def finished_runs(folder: Path, arms: list[str]) -> Scores:
    """The scores of all finished runs under the folder."""
    found = {arm: sorted(folder.glob(f"{arm}/*/scores.json")) for arm in arms}
    return {arm: {path.parent.name: json.loads(path.read_text()) for path in paths} for arm, paths in found.items()}


def report(name: str, scores: Scores, titles: dict[str, str], scripts: Path) -> None:
    """Json, table and plot of the scores, with those that the json had of other runs; the table is printed too."""
    kept = scripts / "results" / f"{name}.json"
    before = json.loads(kept.read_text())["scores"] if kept.is_file() else {}
    scores = {arm: dict(sorted((before.get(arm, {}) | runs).items())) for arm, runs in scores.items()}
    content = {"command": f"python training/{name}.py", "scores": scores}
    replace_text(kept, json.dumps(content, indent=1) + "\n")
    values = {
        arm: {one: [run[one] for run in runs.values()] for one in titles} for arm, runs in scores.items() if runs
    }
    lines = ["| arm | seeds | " + " | ".join(titles.values()) + " |", "|---" * (2 + len(titles)) + "|"]
    for arm, by_name in values.items():
        cells = [f"{mean(v):.3f} ± {stdev(v):.3f}" if len(v) > 1 else f"{v[0]:.3f}" for v in by_name.values()]
        lines.append(f"| {arm} | {len(scores[arm])} | " + " | ".join(cells) + " |")
    if len({json.dumps(run["versions"], sort_keys=True) for runs in scores.values() for run in runs.values()}) > 1:
        lines += ["", f"The runs are of different versions, which results/{name}.json has for each."]
    print("\n".join(lines))
    page, marks = scripts / "README.md", name.replace("_", " ")
    marks = (f"<!-- {marks}: begin -->", f"<!-- {marks}: end -->")
    replace_text(page, fill_between(page.read_text(encoding="utf-8"), *marks, "\n".join(lines)))
    plot(values, titles, kept.with_suffix(".png"))


def plot(values: dict[str, dict[str, list[float]]], titles: dict[str, str], path: Path) -> None:
    """A panel for each score, a row for each arm: all runs, and a bar at their mean."""
    figure = Figure(figsize=(3.2 * len(titles), 3.2), layout="constrained")
    axes = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for row, by_name in enumerate(values.values()):
            axis.plot(by_name[name], [row] * len(by_name[name]), "o", alpha=0.5, color="C0")
            axis.plot(mean(by_name[name]), row, "|", markersize=16, color="C1")
        axis.set(title=title, yticks=range(len(values)), yticklabels=list(values))
        axis.grid(alpha=0.3)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=100)
