"""Runs over the images of a folder that can be stopped at any time and go on where they stopped.

Each image is a [`FolderJob`]. Its record, a JSON file, is written after all other results, so a record means that the
image is done. A job whose record answers the same question is not run again.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .image_files import ImageError, write_files


@dataclass(frozen=True)
class FolderJob(ABC):
    """
    One image and where its results go. `segmenter` is what all jobs of a run share: a model, its `name`, and options.

    Attributes:
        image: the file.
    """

    image: Path

    @property
    @abstractmethod
    def record_file(self) -> Path:
        """Where the record goes."""

    @abstractmethod
    def result_files(self, segmenter: Any) -> list[Path]:
        """Where everything else goes."""

    @abstractmethod
    def is_answered_by(self, record: dict, segmenter: Any) -> bool:
        """Whether a record of an earlier run is of the same question; a record of another form may raise."""

    @abstractmethod
    def compute(self, segmenter: Any) -> tuple[dict, dict[Path, bytes]]:
        """The record, and the contents of `result_files`."""

    def finished(self, segmenter: Any) -> dict | None:
        """The record of an earlier run, if it answers the same question, is up to date, and all files are there."""
        try:
            record = json.loads(self.record_file.read_bytes())
            same = record["model"] == segmenter.name and self.is_answered_by(record, segmenter)
            same = same and is_newer(self.record_file, self.image, segmenter.name)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if same and all(file.is_file() for file in self.result_files(segmenter)) else None

    def run(self, segmenter: Any) -> dict:
        """Computes and writes the results, the record last; returns the record."""
        record, files = self.compute(segmenter)
        # An image is done once its record is there, so an outdated one goes first. The folder of records comes before
        # any result, as it marks a folder of results as our own.
        self.record_file.parent.mkdir(parents=True, exist_ok=True)
        self.record_file.unlink(missing_ok=True)
        write_files({**files, self.record_file: json.dumps(record).encode()})
        return record


def is_newer(record_file: Path, image: Path, model: str) -> bool:
    """Whether a record was written after its image and, where the model is a directory, after the weights."""
    sources = [image, *Path(model).glob("*.safetensors")]
    return record_file.stat().st_mtime >= max(path.stat().st_mtime for path in sources)


def check_results_folder(results: Path, images: Path) -> None:
    """Raises a ValueError if the folder for results is a file, or holds the images."""
    if results.is_file() or images.resolve().is_relative_to(results.resolve()):
        raise ValueError(f"{results} must be a folder for results that does not hold the images.")


def find_shared_file(jobs: Sequence[FolderJob], segmenter: Any) -> tuple[FolderJob, FolderJob, Path] | None:
    """Two jobs (or one job, twice) that would write the same file, and that file; `None` if there are none."""
    owners: dict[Path, FolderJob] = {}
    for job in jobs:
        for file in [*job.result_files(segmenter), job.record_file]:
            if file in owners:
                return owners[file], job, file
            owners[file] = job
    return None


def run_jobs(
    jobs: Sequence[FolderJob], segmenter: Any, report: Callable[[dict], None]
) -> tuple[list[dict], list[dict]]:
    """
    Runs the jobs that are not finished yet, with a progress bar on stderr; each new record goes to `report`.

    Returns:
        the records of all images in the order of `jobs`, without those that cannot be read; these, as `image` and
        `error`.
    """
    records = [job.finished(segmenter) for job in jobs]
    failures = []
    done = len(jobs) - records.count(None)
    with tqdm(total=len(jobs), initial=done, unit="image", disable=len(jobs) == 1) as progress:
        for i, job in enumerate(jobs):
            if records[i] is not None:
                continue
            try:
                records[i] = job.run(segmenter)
                report(records[i])
            except ImageError as error:
                failures.append({"image": str(job.image), "error": str(error)})
            progress.update()
    return [record for record in records if record is not None], failures


__all__ = ["FolderJob", "check_results_folder", "find_shared_file", "run_jobs"]
