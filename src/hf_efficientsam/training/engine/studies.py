"""Experiments of many runs: scripts started as commands, finished runs kept, their scores as json, table and plot."""

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

from .config import PositiveInt
from .reports import fill_between, replace_text, write_report

Scores = dict[str, dict[str, dict[str, float]]]  # by arm, seed and name


@dataclass(frozen=True)
class StudyConfig:
    """The fields that studies share."""

    data: str = field(default="../shared/data", metadata={"help": "folder with train-seg, coco-train and so on"})
    arms: list[str] | None = field(default=None, metadata={"help": "which of the arms; by default all"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "each arm is run with each"})
    jobs: PositiveInt = field(default=1, metadata={"help": "runs at a time, each on one thread"})
    output_dir: str | None = field(
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
    Runs every arm with every seed that has no scores yet, then reports.

    The scores go to `results/NAME.json` and .png beside the scripts and, as a table, between the marks of NAME into
    their README.md. A run whose scores are under `folder` or in that json is not run again, so a study can be stopped
    at any time and go on, on another machine too; to measure a run anew delete its scores there.

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
        ValueError: for an arm that there is not.
        ChildProcessError: if a script fails; what is finished is kept.
    """
    if unknown := set(config.arms or ()) - set(arms):
        raise ValueError(f"There is no arm {min(unknown)}; the arms are {', '.join(arms)}.")
    kept = scripts / "results" / f"{name}.json"
    finished, chosen = finished_runs(kept, folder, arms), [arm for arm in arms if arm in (config.arms or arms)]
    runs = [(arm, seed) for seed in config.seeds for arm in chosen]  # a seed of all arms before the next
    runs = [(arm, seed) for arm, seed in runs if f"seed_{seed}" not in finished[arm]]

    def run_one(arm: str, seed: int) -> None:
        own = folder / arm / f"seed_{seed}"
        own.mkdir(parents=True, exist_ok=True)
        replace_text(own / "scores.json", json.dumps(measure(arm, seed, own)) + "\n")

    if runs:
        prepare()
    with ThreadPoolExecutor(config.jobs) as pool:
        futures = [pool.submit(run_one, arm, seed) for arm, seed in runs]
        try:
            for future in tqdm(as_completed(futures), total=len(runs), desc="runs"):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure, those that have not begun
    report(name, finished_runs(kept, folder, arms), titles, scripts)


def finished_runs(kept: Path, folder: Path, arms: list[str]) -> Scores:
    """The scores of all finished runs, kept in the json or under the folder."""
    before = json.loads(kept.read_text())["scores"] if kept.is_file() else {}
    here = {
        arm: {path.parent.name: json.loads(path.read_text()) for path in folder.glob(f"{arm}/*/scores.json")}
        for arm in arms
    }
    return {arm: dict(sorted((before.get(arm, {}) | here[arm]).items())) for arm in arms}


def report(name: str, scores: Scores, titles: dict[str, str], scripts: Path) -> None:
    """Json, table and plot of the scores; the table is printed too."""
    content, kept = {"command": f"python training/{name}.py", "scores": scores}, scripts / "results" / f"{name}.json"
    write_report(kept, content, ("scikit-learn", "pillow"))
    values = {
        arm: {one: [run[one] for run in runs.values()] for one in titles} for arm, runs in scores.items() if runs
    }
    lines = ["| arm | seeds | " + " | ".join(titles.values()) + " |", "|---" * (2 + len(titles)) + "|"]
    for arm, by_name in values.items():
        cells = [f"{mean(v):.3f} ± {stdev(v):.3f}" if len(v) > 1 else f"{v[0]:.3f}" for v in by_name.values()]
        lines.append(f"| {arm} | {len(scores[arm])} | " + " | ".join(cells) + " |")
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
