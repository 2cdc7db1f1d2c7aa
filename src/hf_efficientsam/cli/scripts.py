"""`efficientsam train` and `efficientsam evaluate`: start the training scripts through accelerate's launcher."""

from typing import Annotated, NoReturn

import typer

from hf_efficientsam.inference.project_files import project_files

from .options import new_commands

commands = new_commands()

TRAIN = {
    "masks": "finetune_masks",
    "sami": "sami",
    "features": "cache_features",
    "distill": "distill",
    "classification": "finetune_classification",
    "semantic": "finetune_semantic",
    "detection": "finetune_detection",
    "saliency": "train_saliency",
}
EVALUATE = {
    "masks": "evaluate_masks",
    "everything": "evaluate_everything",
    "saliency": "evaluate_saliency",
    "encoder": "probe_encoder",
}

# What comes before the task is accelerate's, --help aside; all that comes after it is the script's.
PASS_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}
Arguments = Annotated[list[str] | None, typer.Argument(metavar="[LAUNCH_OPTIONS] TASK [OPTIONS]", show_default=False)]


@commands.command("train", no_args_is_help=True, context_settings=PASS_ON)
def train_command(arguments: Arguments = None) -> None:
    """
    Train a model: masks, sami (pretraining), features (of a teacher), distill, classification, semantic, detection,
    saliency.

    `efficientsam train masks --help` lists the options of a task. Without options a task trains a miniature. Options
    before the task are those of `accelerate launch`:

    efficientsam train --num_processes 2 masks --model bundled --train my/instances.json --output_dir runs/mine
    """
    launch("train", TRAIN, arguments or [])


@commands.command("evaluate", no_args_is_help=True, context_settings=PASS_ON)
def evaluate_command(arguments: Arguments = None) -> None:
    """
    Measure a model: masks, everything, saliency, encoder.

    `efficientsam evaluate masks --help` lists the options of a task. Options before the task are those of
    `accelerate launch`.
    """
    launch("evaluate", EVALUATE, arguments or [])


def launch(command: str, tasks: dict[str, str], arguments: list[str]) -> None:
    """Runs the script of a task as `accelerate launch` does; `arguments` are its own, the task, the script's."""
    try:
        from accelerate.commands.launch import launch_command, launch_command_parser
    except ImportError:
        raise ValueError('training needs more packages; pip install "hf-efficientsam[train]".') from None

    def refuse(message: str) -> NoReturn:
        message = message.replace(", training_script_args", "").replace("training_script", "TASK")
        raise ValueError(f"{command}: {message}; TASK is one of {', '.join(tasks)}.")

    parser = launch_command_parser()
    parser.error = refuse
    launched = parser.parse_args(arguments)
    if launched.training_script not in tasks:
        refuse(f"there is no task {launched.training_script!r}")
    launched.training_script = str(project_files("training") / f"{tasks[launched.training_script]}.py")
    launched.quiet = True  # the script has said what is wrong
    launch_command(launched)
