"""The command `efficientsam`: segment images, by prompts or whole; describe, convert, export and publish checkpoints.

Every wrong input ends in one sentence on stderr and exit code 2. Files appear whole or not at all. Each command is in
a module of this folder, which is imported when the command is called or helped with.
"""

from importlib import import_module
from typing import Annotated

import typer

from hf_efficientsam import __version__

MODULES = {
    "segment": "segment",
    "salient": "find",
    "text": "find",
    "everything": "everything",
    "info": "checkpoints",
    "convert": "checkpoints",
    "export-onnx": "checkpoints",
    "publish": "publish",
    "demo": "demo",
}


class Commands(typer.core.TyperGroup):
    """
    Finds each command in its module, and reports wrong input, and what the operating system refuses, in one sentence
    instead of a traceback.
    """

    def list_commands(self, ctx):
        return list(MODULES)

    def get_command(self, ctx, name):
        if name not in MODULES:
            return None
        commands = import_module(f"{__package__}.{MODULES[name]}").commands
        return typer.main.get_group(commands).commands[name]

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of our output has gone; typer knows what to do
            raise
        except (ValueError, OSError) as error:
            typer.echo(f"efficientsam: {' '.join(explain(error).splitlines())}", err=True)
            raise typer.Exit(2) from None


def explain(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return str(error)


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"efficientsam {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Cut objects out of pictures with EfficientSAM: point at them, or draw a box around them."""
    from transformers import logging as transformers_logging  # takes seconds, and --version does not need it

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
