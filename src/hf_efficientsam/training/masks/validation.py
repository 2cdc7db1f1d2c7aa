"""How good a model is while it is trained: the evaluation's own numbers on images that it does not train on."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from hf_efficientsam.training.data.coco import AnnotationConfig, with_folders
from hf_efficientsam.training.data.folder_masks import open_annotations
from hf_efficientsam.training.engine.config import EvaluationConfig, PositiveInt
from hf_efficientsam.training.engine.loaders import leave_signals_to_main

from .evaluation import (
    PROTOCOLS,
    BrokenImage,
    ImageBatches,
    Item,
    Record,
    calibration_errors,
    evaluate_images,
    mean_ious,
    split_broken,
)
from .predictors import Predictor

PROMPTS = ("box", "click1", "click3")
IMAGES_AT_ONCE = 4


@dataclass(frozen=True)
class ValidationConfig(EvaluationConfig, AnnotationConfig):
    """Which images a run is measured on, and when."""

    validation: list[str] = field(
        default_factory=list,
        metadata={"help": "json files or folders, as of --train, of images to measure on; the best model is kept"},
    )
    validation_images: list[str] = field(
        default_factory=list, metadata={"help": "folder of their images, or one for each"}
    )
    validation_limit: PositiveInt = field(default=100, metadata={"help": "only the first so many images of each"})

    def check_validation(self) -> None:
        """Raises ValueError for a folder of images without files that name them."""
        if self.validation_images and not self.validation:
            raise ValueError("--validation_images are of --validation; give that, too.")


class Validation:
    """
    Images with masks to measure models on, a share in each process.

    Args:
        config: where they are, and how masks are read, as for the training.
        processor: of the model.
        accelerator: of the run.
        num_workers: processes that read images.

    Raises:
        ValueError: if something cannot be opened, or there is no mask.
    """

    def __init__(
        self,
        config: ValidationConfig,
        processor: Any,
        accelerator: Accelerator,
        num_workers: int = 0,
    ):
        pairs = with_folders(config.validation, config.validation_images, "--validation")
        sources = [open_annotations(*pair, config, "val") for pair in pairs]
        if not any(map(len, sources)):
            raise ValueError("There is no image with masks in --validation; check the files.")
        self.files, self.accelerator, self.processor = config.validation, accelerator, processor
        place = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
        self.batches = ImageBatches(sources, [processor], IMAGES_AT_ONCE, config.validation_limit, **place)
        self.num_workers = num_workers

    def measure(self, model: PreTrainedModel) -> tuple[dict[str, float], dict]:
        """
        Called on every process, with the same result.

        Returns:
            `miou`, the mean over the `PROMPTS` of what `scores_of` gives for each, and all that it gives; and a report
            such as training/evaluate_masks.py writes.

        Raises:
            ValueError: for an image that cannot be read.
        """
        loader = DataLoader(
            self.batches,
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=leave_signals_to_main,
            generator=torch.Generator(),  # so that measuring draws no random number of the training's
        )
        records, broken = split_broken(gather_object(measure_model(model, self.processor, loader)))
        if broken:
            raise ValueError(broken[0].reason)
        records.sort(key=lambda record: record.place)  # so that sums do not depend on who measured what
        scores = scores_of(records)
        report = {
            "annotations": self.files,
            "images": len(records),
            "masks": sum(len(record.areas) for record in records),
            "seed": 0,
            "protocol": PROTOCOLS["random"],
            "results": mean_ious(records, "model", PROMPTS),
            "calibration_error": calibration_errors(records, "model", PROMPTS),
        }
        return {"miou": sum(scores[prompt] for prompt in PROMPTS) / len(PROMPTS), **scores}, report


def measure_model(
    model: PreTrainedModel, processor: Any, batches: Iterable[list[Item | BrokenImage]]
) -> list[Record | BrokenImage]:
    """What was measured of a model, which is left in the mode that it was in, on images for its processor."""
    with evaluation_mode(model):
        return evaluate_images({"model": Predictor("model", model, processor)}, batches, PROMPTS)


def scores_of(records: Sequence[Record]) -> dict[str, float]:
    """Of the most confident masks the mIoU of each of the `PROMPTS`, of boxes by the objects' sizes too, and how wrong
    the predicted IoU is."""
    results = mean_ious(records, "model", PROMPTS)
    scores = {prompt: results[prompt]["confident"]["all"]["miou"] for prompt in PROMPTS}
    scores |= {f"box_{size}": one["miou"] for size, one in results["box"]["confident"].items() if size != "all"}
    errors = calibration_errors(records, "model", PROMPTS)
    return {**scores, "calibration_error": sum(errors.values()) / len(errors)}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluates, and then trains those of its modules that were trained."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True
