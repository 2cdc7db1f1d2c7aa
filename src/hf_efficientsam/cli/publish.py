"""`efficientsam publish`: a checkpoint becomes a repository of the Hugging Face Hub, and a Space if wanted."""

from pathlib import Path
from typing import Annotated

import typer

from hf_efficientsam.export.model_card import Provenance
from hf_efficientsam.export.publish import (
    Repository,
    check_hub_in_reach,
    check_model_is_public,
    check_repository_name,
    made_repositories,
    upload,
)
from hf_efficientsam.inference.loading import resolve_name

from .options import LOCAL, local_path, new_commands

commands = new_commands()


@commands.command("publish", no_args_is_help=True)
def publish_command(
    directory: Annotated[Path, typer.Argument(parser=local_path, metavar="DIR", help="Directory of a checkpoint.")],
    name: Annotated[str, typer.Argument(metavar="REPO", help="Name of the repository on the Hub, such as org/name.")],
    push: Annotated[bool, typer.Option("--push", help="Upload; without it nothing leaves this machine.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make new repositories private.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="Export the model to ONNX into the folder onnx.")] = False,
    demo: Annotated[bool, typer.Option("--demo", help="Make a Space with the web demo, named REPO-demo.")] = False,
    space: Annotated[str | None, typer.Option(metavar="NAME", help="Make that Space under another name.")] = None,
    license: Annotated[
        str | None, typer.Option(help="Terms of the weights, as the Hub names them: apache-2.0, cc-by-4.0, other...")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Model of the Hub that this one was made from.")] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Dataset of the Hub that it was trained on; may be given several times.")
    ] = None,
    evaluated_on: Annotated[
        str | None, typer.Option(help="Dataset of the Hub whose masks metrics.json was measured on.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(**LOCAL, help="New folder to keep what would be uploaded, as OUTPUT/model and OUTPUT/space."),
    ] = None,
) -> None:
    """
    Make a checkpoint a repository of the Hugging Face Hub that works with transformers alone.

    It has the weights in the precision that they are stored in, the code (for trust_remote_code), a wheel of this
    package, the saliency head and metrics.json if the checkpoint has them, and a model card: the checkpoint's
    README.md with the fields that the Hub asks for, or one with the numbers of metrics.json. First it is loaded in a
    process without this package, where it must give the same masks. The same checkpoint makes the same files.

    Without --push this only lists the files. With it each repository is uploaded in one commit: files of the same
    name are replaced, others stay. The token is that of `hf auth login` or HF_TOKEN.
    """
    if private and not push:
        raise ValueError("--private is for new repositories that --push makes; give both, or neither.")
    if private and (demo or space is not None):
        raise ValueError(
            "a private Space cannot be built, because it installs the package from the model repository, without a "
            "token; leave out --private, or the Space."
        )
    if push:
        check_hub_in_reach()
    directory = Path(resolve_name(str(directory)))
    if demo and space is None:
        space = f"{name}-demo"
    provenance = Provenance(license, base_model, tuple(dataset or ()), evaluated_on)
    if push and space is not None:
        check_repository_name(name)
        check_model_is_public(name)
    with made_repositories(directory, name, space, onnx, output, provenance) as repositories:
        for repository in repositories:
            typer.echo(describe_repository(repository))
        there, made = ({path.name for path in folder.iterdir()} for folder in (directory, repositories[0].folder))
        if there - made:
            typer.echo(f"left out of {directory}: {', '.join(sorted(there - made))}")
        if not push:
            typer.echo("nothing was uploaded; the same command with --push uploads these files")
        for repository in repositories if push else []:
            typer.echo(f"uploaded to {upload(repository, private)}")


def describe_repository(repository: Repository) -> str:
    files = repository.files()
    lines = [f"{repository.kind} {repository.name}: {len(files)} files, {sum(files.values()) / 1e6:.1f} MB"]
    return "\n".join(lines + [f"  {size:>12,} {file}" for file, size in files.items()])
