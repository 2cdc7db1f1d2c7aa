"""The command `efficientsam`: segment images, by prompts or whole; describe, convert, export and publish checkpoints.

Every wrong input ends in one sentence on stderr and exit code 2; a warning of this package is one sentence, too.
Files appear whole or not at all. Each command is in a module of this folder, which is imported when that command is
called or asked for its help: `--help` and `--version` of the whole do not wait for torch.
"""

import gc
import io
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from hf_efficientsam import __version__
from hf_efficientsam.inference.logs import log_shown

PACKAGE = Path(__file__).parents[1]
UsageError = typer.BadParameter.__base__  # in typer or in click, as typer's version has it

COMMANDS = {  # name: its module, and its line in the list that --help prints
    "segment": ("segment", "Cut out objects that you mark with points and boxes."),
    "salient": ("find", "Cut out what stands out, without a prompt."),
    "text": ("find", "Cut out objects by their names, with a detector of your choice."),
    "everything": ("everything", "Find all objects: images become a COCO dataset."),
    "train": ("scripts", "Train a model with one of the training scripts."),
    "evaluate": ("scripts", "Measure a model with one of the evaluation scripts."),
    "info": ("checkpoints", "Describe a checkpoint."),
    "convert": ("checkpoints", "Convert an official EfficientSAM checkpoint."),
    "export-onnx": ("checkpoints", "Export a checkpoint to ONNX."),
    "export-browser": ("checkpoints", "Make a web page that runs a checkpoint in the browser."),
    "publish": ("publish", "Make a checkpoint a repository of the Hugging Face Hub."),
    "demo": ("demo", "Serve a web page on which objects are cut out with the mouse."),
    "serve": ("serve", "Serve an HTTP API: send an image once, segment it many times."),
}


class Commands(typer.core.TyperGroup):
    """
    Finds each command in its module, and reports wrong input, and what the operating system refuses, in one sentence
    instead of a traceback.
    """

    def __init__(self, **options):
        super().__init__(**options)
        self.commands = dict.fromkeys(COMMANDS)  # typer suggests one of these names for one that is mistyped

    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        if name not in COMMANDS:
            return None
        with without_garbage_collection():
            commands = import_module(f"{__package__}.{COMMANDS[name][0]}").commands
        return typer.main.get_group(commands).commands[name]

    def format_commands(self, ctx, formatter):
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def make_context(self, *args, **kwargs):
        with wrong_usage_as_sentence():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx):
        try:
            with any_name_printed(), warnings_as_sentences(), wrong_usage_as_sentence(), log_shown():
                return super().invoke(ctx)
        except BrokenPipeError:  # the reader of our output has gone; typer knows what to do
            raise
        except (ValueError, OSError) as error:
            from hf_efficientsam.inference.image_files import describe_error  # loads numpy, which --help does without

            typer.echo(f"efficientsam: {describe_error(error)}", err=True)
            raise typer.Exit(2) from None


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For imports: what they make stays, and to look through all of it again and again takes a fifth of their time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def wrong_usage_as_sentence() -> Iterator[None]:
    """Says in one sentence what is wrong with the options of a call, in place of typer's lines about its usage."""
    try:
        yield
    except UsageError as error:
        if error.format_message().startswith("Usage: "):  # no error but the help
            raise
        help_command = f"; see {error.ctx.command_path} --help." if error.ctx else "."
        typer.echo(f"efficientsam: {describe_usage_error(error).removesuffix('.')}{help_command}", err=True)
        raise typer.Exit(2) from None


def describe_usage_error(error: UsageError) -> str:
    """The option, what was given, and what may be given."""
    message = " ".join(error.format_message().split())
    message = re.sub(r"\. (Did you mean .*\?)", lambda found: f" ({found[1].lower()})", message)  # one sentence
    if not hasattr(error.__cause__, "errors"):  # pydantic's, with which typer checks values
        return message[:1].lower() + message[1:]
    first = error.__cause__.errors()[0]
    kind, limits = first["type"], first.get("ctx", {})
    name = error.param.opts[0]
    if "error" in limits:  # of our own types, such as the devices
        return f"{name}: {limits['error']}"
    words = {
        "int": "a whole number",
        "float": "a number",
        "greater": f"at least {limits.get('ge')}",
        "less": f"at most {limits.get('le')}",
    }
    return f"{name} must be {words.get(kind.split('_')[0], 'something else')}, not {first['input']!r}"


@contextmanager
def any_name_printed() -> Iterator[None]:
    """Prints names of files that are no text with escapes, where Python would end with an error."""
    stdout = sys.stdout
    if not isinstance(stdout, io.TextIOWrapper):  # a notebook's, or one that collects text: these take any name
        yield
        return
    errors = stdout.errors
    stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stdout.reconfigure(errors=errors)


@contextmanager
def warnings_as_sentences() -> Iterator[None]:
    """Shows warnings of this package without the place in the code; others as before."""
    before = warnings.showwarning

    def show(message, category, filename, *place):
        if category is UserWarning and Path(filename).is_relative_to(PACKAGE):
            typer.echo(f"efficientsam: {message}", err=True)
        else:
            before(message, category, filename, *place)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


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
    """Cut objects out of images with EfficientSAM: point at them, or draw a box around them."""
    from transformers import logging as transformers_logging  # takes seconds, and --version does not need it

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
