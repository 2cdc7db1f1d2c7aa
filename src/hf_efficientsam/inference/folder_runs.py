"""Runs over the images of a folder that can be stopped at any time and go on where they stopped.

Each image is a [`FolderJob`]. Its record, a JSON file, is written after all other results, so a record means that the
image is done. It says what the results were made from, and which they are: a job whose record says the same is not run
again, and one that is takes away those of before that it does not make any more.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from hf_efficientsam import __version__
from hf_efficientsam.model.image_processing_efficientsam import EfficientSamImageProcessor
from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel

from .image_files import check_folder, describe_error, write_files
from .loading import checkpoint_fingerprint
from .records import recorded_file


class JobSegmenter(ABC):
    """What all jobs of a run share: a loaded checkpoint, and options."""

    @property
    @abstractmethod
    def model(self) -> EfficientSamModel: ...

    @property
    @abstractmethod
    def image_processor(self) -> EfficientSamImageProcessor: ...

    @property
    def name(self) -> str:
        """Of the checkpoint."""
        return self.model.name_or_path

    @property
    def max_pixels(self) -> int:
        """Larger images are refused."""
        return self.image_processor.max_image_pixels

    @cached_property
    def fingerprint(self) -> str:
        return checkpoint_fingerprint(self.model, self.image_processor)


@dataclass(frozen=True)
class FolderJob(ABC):
    """
    One image and where its results go.

    Attributes:
        image: the file.
    """

    image: Path

    @property
    @abstractmethod
    def record_file(self) -> Path:
        """Where the record goes."""

    @abstractmethod
    def result_files(self, segmenter: JobSegmenter) -> list[Path]:
        """Where everything else goes."""

    @abstractmethod
    def is_answered_by(self, record: dict, segmenter: JobSegmenter) -> bool:
        """Whether a record of an earlier run is of the same question; a record of another form may raise."""

    @abstractmethod
    def compute(self, segmenter: JobSegmenter) -> tuple[dict, dict[Path, bytes]]:
        """The record, and the contents of `result_files`."""

    def restate(self, record: dict, segmenter: JobSegmenter) -> dict:
        """The record of an earlier run with the names of files as this run was given them."""
        return record | {"image": str(self.image), "model": segmenter.name}

    def made_from(self, segmenter: JobSegmenter) -> dict[str, str]:
        """What the results depend on beside the question: the bytes of the image and the model, and the version."""
        digest = hashlib.sha256()
        with self.image.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return {"image_sha256": digest.hexdigest(), "model_sha256": segmenter.fingerprint, "version": __version__}

    def finished(self, segmenter: JobSegmenter) -> dict | None:
        """The record of an earlier run, if it answers the same question from the same, and all files are there."""
        try:
            record = json.loads(self.record_file.read_bytes())
            files = {self._name_of(file): file for file in self.result_files(segmenter)}
            is_whole = files.keys() <= record["files"].keys() and all(map(Path.is_file, files.values()))
            same = is_whole and self.is_answered_by(record, segmenter)
            if same and record["made_from"] == self.made_from(segmenter):
                return self.restate(record, segmenter)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def run(self, segmenter: JobSegmenter) -> dict:
        """Computes and writes the results, the record last; returns the record."""
        made_from = self.made_from(segmenter)  # an image that is replaced from now on does not match the record
        record, files = self.compute(segmenter)
        record["made_from"] = made_from
        record["files"] = {self._name_of(file): hashlib.sha256(content).hexdigest() for file, content in files.items()}
        outdated = self._outdated(files)
        # An image is done once its record is there, so an outdated one goes first. The folder of records comes before
        # any result, as it marks a folder of results as our own.
        self.record_file.parent.mkdir(parents=True, exist_ok=True)
        self.record_file.unlink(missing_ok=True)
        for file in outdated:
            file.unlink()
        write_files({**files, self.record_file: json.dumps(record).encode()})
        return record

    def _name_of(self, file: Path) -> str:
        """Of a result, relative to the record."""
        return Path(os.path.relpath(file, self.record_file.parent)).as_posix()

    def _outdated(self, files: Iterable[Path]) -> list[Path]:
        """Results of an earlier run that are not among these, if they are as it left them."""
        kept = set(map(self._name_of, files))
        try:
            before = json.loads(self.record_file.read_bytes())["files"].items()
            paths = {self.record_file.parent / name: digest for name, digest in before if name not in kept}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []
        return [
            path
            for path, digest in paths.items()
            if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest
        ]


def check_results_folder(results: Path, images: Path) -> None:
    """Raises a ValueError if the folder for results cannot be one, or holds the images."""
    check_folder(results)
    if images.resolve().is_relative_to(results.resolve()):
        raise ValueError(f"{results} must be a folder for results that does not hold the images.")


def check_not_of_another(record_file: Path, image: Path) -> None:
    """Raises a ValueError if the results of another image, which is still there, have this record."""
    try:
        other = recorded_file(json.loads(record_file.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return
    if other.is_file() and not other.samefile(image):
        raise ValueError(
            f"{record_file} is of another image, {other}; choose another --output, or delete that record."
        )


def name_results(images: Sequence[Path], files: Callable[[int, Path], list[Path]]) -> list[Path]:
    """
    A name for the results of each image, without an ending: the image's without its ending, or the whole of it where
    results would share a file otherwise, as those of `a.gif` and `a.webp` would.

    Args:
        images: their names.
        files: `(i, name)` -> the files of image i if its results have this name.

    Raises:
        ValueError: results that share a file all the same.
    """
    names = [image.with_suffix("") for image in images]
    while True:
        owners = defaultdict(list)
        for i, name in enumerate(names):
            for file in files(i, name):
                owners[str(file).casefold()].append(i)  # some file systems take A.png and a.png for one file
        shared = {file: those for file, those in owners.items() if len(those) > 1}
        longer = {i for those in shared.values() for i in those if names[i] != images[i]}
        if not longer:
            break
        for i in longer:
            names[i] = images[i]
    if shared:
        file, those = min(shared.items())
        first, last = images[those[0]], images[those[-1]]
        raise ValueError(f"{file} would be written twice, for {first} and for {last}; choose other folders.")
    return names


def run_jobs(
    jobs: Sequence[FolderJob], segmenter: JobSegmenter, report: Callable[[dict], None]
) -> tuple[list[dict], list[dict]]:
    """
    Runs the jobs that are not finished yet, with a progress bar on stderr; each new record goes to `report`.

    Returns:
        the records of all images in the order of `jobs`, without those that cannot be read, or whose results cannot be
        written; these, as `image` and `error`.
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
            except (ValueError, OSError, MemoryError, RuntimeError) as error:  # torch has a RuntimeError for memory
                reason, image = describe_error(error), str(job.image)
                failures.append({"image": image, "error": reason if image in reason else f"{image}: {reason}"})
            else:
                report(records[i])
            progress.update()
    return [record for record in records if record is not None], failures


__all__ = ["FolderJob", "check_not_of_another", "check_results_folder", "name_results", "run_jobs"]
