"""What commands print about images: records as text or JSON, and those images that could not be read."""

import json
from pathlib import Path

import typer

from hf_efficientsam.inference.record_datasets import write_datasets


def describe_objects(record: dict) -> str:
    """The record of `segment` as text: a line for the image and for each mask."""
    lines = [f"{record['image']}: {record['width']} x {record['height']} pixels"]
    for i, one in enumerate(record["objects"], start=1):
        for k, mask in enumerate(one["masks"], start=1):
            name = f"object {i}, candidate {k}" if len(one["masks"]) > 1 else f"object {i}"
            name += f", {one['label']}" if "label" in one else ""
            box = ",".join(map(str, mask["box"])) if mask["box"] else "none (the mask is empty)"
            file = f", file {mask['file']}" if "file" in mask else ""
            lines.append(f"  {name}: score {mask['score']:.3f}, area {mask['area']} pixels, box {box}{file}")
    return "\n".join(lines)


def report_folder(records: list[dict], failures: list[dict], as_json: bool) -> None:
    """At the end of a run over a folder: which images are done, and which could not be read or written."""
    if as_json:
        typer.echo(json.dumps({"images": records, "failed": failures}))
    else:
        typer.echo(f"{len(records)} of {len(records) + len(failures)} images are done")
    for failure in failures:
        typer.echo(f"efficientsam: {failure['error']}", err=True)


def write_formats(formats: list[str], records: Path, output: Path) -> None:
    """Writes the datasets that --format asks for, and says on stderr which images they lack."""
    if not formats:
        return
    gone = write_datasets(formats, records, output)
    if gone:
        names = f"{gone[0]}" if len(gone) == 1 else f"{len(gone)} images, such as {gone[0]},"
        typer.echo(f"efficientsam: {names} is left out of {', '.join(formats)}: there is no such file now.", err=True)
