"""Averages the weights of EfficientSAM models of one architecture, such as several trainings from one start.

    python training/average_models.py --models runs/first/model runs/second/model --output_dir runs/average

Models that were fine-tuned from the same weights, with another order of images or one after the other, are often close
enough that their average is better than each of them and costs nothing more (model soups, arXiv 2203.05482; averages
along a training, arXiv 1803.05407). Nothing guarantees it: measure the average before you use it. Configuration and
processor are those of the first model. A saliency head is not averaged, because it belongs to one encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hf_efficientsam import EfficientSamModel
from hf_efficientsam.inference.loading import load_model
from hf_efficientsam.training.engine.checkpoints import replaced_folder
from hf_efficientsam.training.engine.config import OutputFolder, check_ranges, parse_config
from hf_efficientsam.training.engine.run import run_script


@dataclass(frozen=True)
class AverageConfig:
    models: list[str] = field(
        default_factory=list, metadata={"help": "two or more checkpoints (directories, Hub names, or: bundled)"}
    )
    output_dir: OutputFolder = field(default="", metadata={"help": "folder for the averaged model"})


def average_weights(models: Sequence[EfficientSamModel], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """
    The mean of each weight, in the precision of the first model. A weight that all models share keeps its bits.

    Args:
        models: of one architecture.
        names: of the models, for the message.

    Raises:
        ValueError: models whose weights have other names or shapes than those of the first.
    """
    states = [model.state_dict() for model in models]
    shapes = [{name: weight.shape for name, weight in state.items()} for state in states]
    for name, other in zip(names[1:], shapes[1:], strict=True):
        if other != shapes[0]:
            different = min(key for key in shapes[0].keys() | other.keys() if shapes[0].get(key) != other.get(key))
            raise ValueError(f"{name} is not of the same architecture as {names[0]}: {different} differs.")
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(weight.dtype)
        for name, weight in states[0].items()
    }


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(AverageConfig, __doc__, arguments)
    check_ranges(config)
    if len(config.models) < 2 or not config.output_dir:
        raise ValueError("Give --models two or more checkpoints and --output_dir a folder for their average.")
    models, processors = zip(*(load_model(name, device="cpu") for name in config.models), strict=True)
    models[0].load_state_dict(average_weights(models, config.models))
    with replaced_folder(Path(config.output_dir)) as writing:
        models[0].save_pretrained(writing)
        processors[0].save_pretrained(writing)
    print(f"{config.output_dir}: the average of {len(models)} models")


if __name__ == "__main__":
    run_script("average_models", main)
