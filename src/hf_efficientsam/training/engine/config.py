"""Configurations: dataclasses filled from a yaml file and the command line, and the fields that scripts share."""

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from hf_efficientsam.inference.image_files import blocking_file
from hf_efficientsam.inference.project_files import project_files

Config = TypeVar("Config")


@dataclass(frozen=True)
class Range:
    """What a field may hold, and the words that say so; checked by [`check_ranges`]."""

    words: str
    contains: Callable[[Any], bool]


POSITIVE = Range("more than 0", lambda value: value > 0)
NOT_NEGATIVE = Range("0 or more", lambda value: value >= 0)
UP_TO_ONE = Range("between 0 and 1", lambda value: 0 <= value <= 1)
BELOW_ONE = Range("at least 0 and less than 1", lambda value: 0 <= value < 1)
FOLDER = Range("a folder, or a name for one that lies below no file", lambda name: blocking_file(Path(name)) is None)
FILE = Range(
    "a file, or a name for one, in a folder that is there or can be made",
    lambda name: not Path(name).is_dir() and blocking_file(Path(name).parent) is None,
)
PositiveInt = Annotated[int, POSITIVE]
PositiveFloat = Annotated[float, POSITIVE]
NotNegativeInt = Annotated[int, NOT_NEGATIVE]
NotNegativeFloat = Annotated[float, NOT_NEGATIVE]
Ratio = Annotated[float, UP_TO_ONE]
PositiveRatio = Annotated[float, POSITIVE, UP_TO_ONE]
RatioBelowOne = Annotated[float, BELOW_ONE]
InnerRatio = Annotated[float, POSITIVE, BELOW_ONE]
OutputFolder = Annotated[str, FOLDER]
OutputFile = Annotated[str, FILE]


@dataclass(frozen=True)
class OptimizationConfig:
    """How every training optimises. A script that wants another default declares the field again, without help."""

    seed: NotNegativeInt = field(default=0, metadata={"help": "of everything random"})
    weight_decay: NotNegativeFloat = field(default=0.05, metadata={"help": "AdamW's"})
    max_grad_norm: PositiveFloat = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    ema_decay: RatioBelowOne = field(
        default=0.0, metadata={"help": "save an exponential moving average of the weights (0: off)"}
    )


@dataclass(frozen=True)
class RunConfig(OptimizationConfig):
    """The fields of every training run that can be resumed."""

    output_dir: OutputFolder = field(
        default="runs/training", metadata={"help": "checkpoints, model, numbers and images"}
    )
    global_batch_size: PositiveInt = field(default=8, metadata={"help": "images a step, over all processes"})
    batch_size: PositiveInt | None = field(
        default=None,
        metadata={"help": "images at a time and process (all by default); gradients are accumulated"},
    )
    timeout_minutes: PositiveFloat = field(
        default=60, metadata={"help": "how long processes wait for one another before the run ends"}
    )
    # Output.
    trackers: list[str] = field(default_factory=list, metadata={"help": "tensorboard, trackio, or both"})
    save_steps: PositiveInt = field(default=1000, metadata={"help": "a checkpoint every so many steps"})
    save_minutes: NotNegativeFloat = field(
        default=10, metadata={"help": "and every so many minutes, and when the run is stopped (0: at steps only)"}
    )
    log_steps: PositiveInt = field(default=20, metadata={"help": "a row of the log every so many steps"})
    image_steps: PositiveInt = field(default=1000, metadata={"help": "an image of results every so many steps"})


@dataclass(frozen=True)
class StepsConfig:
    """The length of a run in optimiser steps."""

    steps: PositiveInt = field(default=2000, metadata={"help": "optimiser steps"})
    warmup_steps: NotNegativeInt = field(default=100, metadata={"help": "linear warm-up; at most a third of all"})

    def warmup_of(self, steps: int) -> int:
        """The steps of the warm-up of a run of so many steps."""
        return min(self.warmup_steps, steps // 3)


@dataclass(frozen=True)
class EpochsConfig:
    """The length of a run in epochs."""

    epochs: PositiveFloat = field(default=100, metadata={"help": "times over the data"})
    warmup_epochs: NotNegativeFloat = field(default=5, metadata={"help": "linear warm-up; then a cosine to zero"})

    def in_steps(self, epoch_steps: int) -> tuple[int, int]:
        """
        Optimiser steps of the run and of its warm-up.

        Raises:
            ValueError: if there are none.
        """
        if (steps := round(self.epochs * epoch_steps)) == 0:
            raise ValueError(f"--epochs {self.epochs} is less than one step of {epoch_steps} an epoch; give more.")
        return steps, round(self.warmup_epochs * epoch_steps)


@dataclass(frozen=True)
class LearningRateConfig:
    """Learning rates of a model with our encoder."""

    learning_rate: PositiveFloat = field(default=1e-3, metadata={"help": "peak of the learning rate"})
    encoder_lr_scale: NotNegativeFloat = field(
        default=1.0, metadata={"help": "the encoder's learning rate is this times the others'"}
    )
    layer_decay: PositiveFloat = field(
        default=1.0, metadata={"help": "layer-wise learning-rate decay of the encoder: each layer's to the next one's"}
    )


@dataclass(frozen=True)
class EvaluationConfig:
    """When a run is measured on images that it does not train on."""

    eval_steps: PositiveInt = field(
        default=5000, metadata={"help": "an evaluation every so many steps, and at the end"}
    )


@dataclass(frozen=True)
class LoaderConfig:
    """How images are read."""

    epoch_images: PositiveInt | None = field(
        default=None, metadata={"help": "images that count as an epoch; needed for shards, else all of them"}
    )
    num_workers: NotNegativeInt = field(default=2, metadata={"help": "processes that read images"})


@dataclass(frozen=True)
class StreamConfig(LoaderConfig):
    """How images are read, perhaps from a stream."""

    shuffle_buffer: PositiveInt = field(default=2000, metadata={"help": "images that a worker mixes while streaming"})


def parse_config(
    config_class: type[Config], description: str, arguments: list[str] | None = None, default: Path | None = None
) -> Config:
    """
    A configuration from `--config FILE.yaml` and the command line, which has the last word.

    Args:
        config_class: a dataclass whose fields all have defaults.
        description: of the script, for `--help`.
        arguments: by default those of the process.
        default: the file that is read if there are no arguments at all.

    Raises:
        ValueError: one sentence if the file or an argument does not fit.
        SystemExit: after `--help`.
    """
    arguments = [str(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    if not arguments and default is not None:
        arguments = ["--config", str(default)]
    parser = HfArgumentParser(
        config_class, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for action in parser._actions:  # a field that is declared again for its default keeps its help
        action.help = action.help or _inherited_help(config_class, action.dest)
    config_parser = argparse.ArgumentParser(add_help=False)
    config_parser.add_argument("--config", type=Path)
    parser.add_argument("--config", metavar="FILE.yaml", help="values for the options above")
    parser.error = config_parser.error = _refuse
    config, given = config_parser.parse_known_args(arguments)
    names = [one.name for one in dataclasses.fields(config_class)]
    try:
        from_file = [] if config.config is None else _read_yaml(config.config, names)
        _parse(parser, from_file, names)
    except ValueError as error:
        raise ValueError(f"{config.config}: {error}") from None
    values = _parse(parser, from_file + given, names)
    return config_class(**{name: values[name] for name in names})


def _refuse(message: str) -> NoReturn:
    """In place of argparse's way, which prints all options first."""
    message = re.sub(r"^argument (--\w+)(/--[\w-]+)?", r"\1", message)  # without the option's other spelling
    raise ValueError(f"{message}.")


def _parse(parser: argparse.ArgumentParser, arguments: list[str], names: list[str]) -> dict[str, Any]:
    values, unknown = parser.parse_known_args(arguments)
    if options := [one.partition("=")[0] for one in unknown if one.startswith("--")]:
        _refuse_unknown(options, names)
    if unknown:
        raise ValueError(f"{' '.join(unknown)} belongs to no option; --help lists the options.")
    return vars(values)


def _refuse_unknown(options: list[str], names: list[str]) -> NoReturn:
    """Names each option that there is none of, with the nearest that there is."""
    named = []
    for option in options:
        near = difflib.get_close_matches(option.lstrip("-").replace("-", "_"), names, n=1)
        named.append(f"{option} (did you mean {'--' * option.startswith('--')}{near[0]}?)" if near else option)
    raise ValueError(f"there is no option {', '.join(named)}; --help lists the options.")


def _inherited_help(config_class: type, name: str) -> str | None:
    for base in config_class.__mro__:
        declared = getattr(base, "__dataclass_fields__", {}).get(name)
        if declared is not None and "help" in declared.metadata:
            return declared.metadata["help"]
    return None


def _read_yaml(path: Path, names: list[str]) -> list[str]:
    """The file as command-line arguments, so that argparse converts and checks both alike; null is the default."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"it is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError("it has no `name: value` lines.")
    if unknown := sorted(map(str, values.keys() - set(names))):
        _refuse_unknown(unknown, names)
    arguments = []
    for name, value in values.items():
        if value is not None:
            given = [str(one) for one in (value if isinstance(value, list) else [value])]
            arguments += [f"--{name}", *(_example_file(one) or one for one in given)]
    return arguments


def _example_file(value: str) -> str | None:
    """Where `examples/...` is that a miniature names, if the script is started elsewhere than in a checkout."""
    installed = project_files("examples").parent / value
    is_elsewhere = value.startswith("examples/") and not Path(value).exists() and installed.exists()
    return str(installed) if is_elsewhere else None


def check_ranges(config: Any) -> None:
    """
    Checks the fields whose type says what they may hold, such as `PositiveInt`, or each value of a list; None always
    fits. And that a run in epochs is not all warm-up.

    Raises:
        ValueError: for the first one out of range.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        given = getattr(config, name)
        for value in given if isinstance(given, list) else [given]:
            for allowed in _ranges(hint):
                if value is not None and not allowed.contains(value):
                    raise ValueError(f"--{name} is {value}; it must be {allowed.words}.")
    if isinstance(config, EpochsConfig) and config.warmup_epochs >= config.epochs:
        raise ValueError(f"--warmup_epochs {config.warmup_epochs} must be less than --epochs {config.epochs}.")


def _ranges(hint: Any) -> Iterator[Range]:
    for argument in (*get_args(hint), *getattr(hint, "__metadata__", ())):
        if isinstance(argument, Range):
            yield argument
        else:
            yield from _ranges(argument)
