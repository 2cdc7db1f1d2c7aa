"""Experiments of many runs: scripts as commands, finished runs kept, their scores as a table and a picture."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from tqdm.auto import tqdm

from .reports import fill_between, replace_text, write_report


@dataclass(frozen=True)
class StudyOptions:
    """The fields that the recipes of studies share."""

    data: str = field(default="../shared/data", metadata={"help": "folder with train-seg, coco-train and so on"})
    arms: list[str] | None = field(default=None, metadata={"help": "which of the arms; by default all"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "each arm is run with each"})
    jobs: int = field(default=1, metadata={"help": "runs at a time, each on one thread"})
    output_dir: str | None = field(
        default=None, metadata={"help": "where every stage keeps its result; by default runs/ and the study's name"}
    )


class Study:
    """
    Arms that are compared, each run with several seeds. A study gives `name`, `arms`, `scores` and `measure`.

    The scores go to `results/NAME.json` and .png beside the scripts and, as a table, between the marks of NAME into
    their README.md. A run whose scores are under `output_dir` or in that json is not run again, so a study can be
    stopped at any time and go on, on another machine too; to measure a run anew delete it there.

    Args:
        options: see [`StudyOptions`].
        scripts: the folder of the training scripts.

    Raises:
        ValueError: for an arm that there is not.
    """

    name: str
    arms: Sequence[str]
    scores: dict[str, str]  # and their titles

    def __init__(self, options: StudyOptions, scripts: Path):
        self.options, self.scripts, self.data = options, scripts, Path(options.data)
        self.folder = Path(options.output_dir or f"runs/{self.name}")
        self.kept = scripts / "results" / f"{self.name}.json"
        if unknown := set(options.arms or ()) - set(self.arms):
            raise ValueError(f"There is no arm {min(unknown)}; the arms are {', '.join(self.arms)}.")

    def prepare(self) -> None:
        """What all runs need, before the first."""

    def measure(self, arm: str, seed: int, folder: Path) -> dict[str, float]:
        """Runs the stages whose results are not in `folder` yet, and returns the scores."""
        raise NotImplementedError

    def stage(self, result: Path, script: str, *arguments) -> Path:
        """`result`, a file or folder that a script leaves. The script is run on one thread unless it has come to its
        end before; one that was stopped goes on."""
        log = self.folder / "logs" / f"{'_'.join(result.relative_to(self.folder).parts)}.log"
        done = log.with_suffix(".done")
        if not done.exists():
            log.parent.mkdir(parents=True, exist_ok=True)
            environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, str(self.scripts / f"{script}.py"), *map(str, arguments)]
            with log.open("a") as file:
                if subprocess.run(command, env=environment, stdout=file, stderr=file).returncode:
                    raise ChildProcessError(f"{script} failed; {log} says why. Mend it and start the study again.")
            done.touch()
        return result

    def results(self) -> dict[str, dict[str, dict[str, float]]]:
        """The scores of all finished runs, here or kept with the scripts, by arm and seed."""
        kept = json.loads(self.kept.read_text())["scores"] if self.kept.is_file() else {}
        here = {
            arm: {path.parent.name: json.loads(path.read_text()) for path in self.folder.glob(f"{arm}/*/scores.json")}
            for arm in self.arms
        }
        return {arm: dict(sorted((kept.get(arm, {}) | here[arm]).items())) for arm in self.arms}

    def run(self) -> None:
        """
        Everything that is not there yet, then the report.

        Raises:
            ChildProcessError: if a script fails; what is finished is kept.
        """
        finished = self.results()
        arms = [arm for arm in self.arms if arm in (self.options.arms or self.arms)]
        runs = [(arm, seed) for seed in self.options.seeds for arm in arms]  # a seed of all arms before the next
        runs = [(arm, seed) for arm, seed in runs if f"seed_{seed}" not in finished[arm]]
        if runs:
            self.prepare()
        with ThreadPoolExecutor(self.options.jobs) as pool:
            futures = [pool.submit(self._run_one, arm, seed) for arm, seed in runs]
            try:
                for future in tqdm(as_completed(futures), total=len(runs), desc="runs"):
                    future.result()
            finally:
                pool.shutdown(cancel_futures=True)  # after a failure, those that have not begun
        self.report(self.results())

    def _run_one(self, arm: str, seed: int) -> None:
        folder = self.folder / arm / f"seed_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "scores.json", json.dumps(self.measure(arm, seed, folder)) + "\n")

    def report(self, results: dict[str, dict[str, dict[str, float]]]) -> None:
        """Json, table and picture of scores by arm and seed."""
        content = {"command": f"python training/{self.name}.py", "scores": results}
        write_report(self.kept, content, ("scikit-learn", "pillow"))
        spread = {
            arm: {name: [run[name] for run in runs.values()] for name in self.scores}
            for arm, runs in results.items()
            if runs
        }
        lines = ["| arm | seeds | " + " | ".join(self.scores.values()) + " |", "|---" * (2 + len(self.scores)) + "|"]
        for arm, scores in spread.items():
            cells = [f"{mean(v):.3f} ± {stdev(v):.3f}" if len(v) > 1 else f"{v[0]:.3f}" for v in scores.values()]
            lines.append(f"| {arm} | {len(results[arm])} | " + " | ".join(cells) + " |")
        print("\n".join(lines))
        page, marks = self.scripts / "README.md", self.name.replace("_", " ")
        marks = (f"<!-- {marks}: begin -->", f"<!-- {marks}: end -->")
        replace_text(page, fill_between(page.read_text(encoding="utf-8"), *marks, "\n".join(lines)))

        figure = Figure(figsize=(3.2 * len(self.scores), 3.2), layout="constrained")
        axes = figure.subplots(1, len(self.scores), sharey=True, squeeze=False)[0]
        for axis, (name, title) in zip(axes, self.scores.items(), strict=True):
            for row, scores in enumerate(spread.values()):
                axis.plot(scores[name], [row] * len(scores[name]), "o", alpha=0.5, color="C0")
                axis.plot(mean(scores[name]), row, "|", markersize=16, color="C1")
            axis.set(title=title, yticks=range(len(spread)), yticklabels=list(spread))
            axis.grid(alpha=0.3)
        axes[0].invert_yaxis()
        figure.savefig(self.kept.with_suffix(".png"), dpi=100)
