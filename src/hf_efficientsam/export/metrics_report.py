"""The `metrics.json` that lies beside a checkpoint's weights: the report that training/evaluate_masks.py writes."""

import json
from pathlib import Path

from transformers.utils import cached_file


def read_metrics(name_or_path: str) -> str | None:
    """Text of the `metrics.json` in a model's folder or Hub repository, if there is one."""
    if not name_or_path:
        return None
    path = cached_file(
        name_or_path,
        "metrics.json",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return path and Path(path).read_text(encoding="utf-8")


def metrics_as_text(metrics: str) -> str:
    """For a terminal: one line for each kind of prompt, over objects of all sizes."""
    try:
        report = json.loads(metrics)
        lines = [f"measured    mIoU of {report['masks']} masks in {report['images']} images"]
        for prompt, answers in report["results"].items():
            for answer, groups in answers.items():
                lines.append(f"  {prompt + ', ' + answer:24} {groups['all']['miou']:.4f}")
    except (ValueError, KeyError, TypeError, AttributeError):
        return "measured    see metrics.json, whose form is not known here"
    return "\n".join(lines)


def metrics_as_markdown(metrics: str) -> str:
    """For a model card: what was measured and the table of results; a report of another form as it is."""
    try:
        report = json.loads(metrics)
        files = report["annotations"] if "annotations" in report else report["shards"]
        names = ["/".join(Path(file).parts[-2:]) for file in ([files] if isinstance(files, str) else files)]
        measured = f"{report['masks']} masks of {report['images']} images ({', '.join(names)}), seed {report['seed']}."
        return f"{measured} {report['protocol']}\n\n{results_table(report['results'])}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"```json\n{metrics.strip()}\n```"


def results_table(results: dict) -> str:
    """The `results` of a report as a Markdown table, by size of the object."""
    groups = list(results["baseline"]["ellipse"])
    lines = ["| mIoU | " + " | ".join(groups) + " |", "|---" * (len(groups) + 1) + "|"]
    for prompt, answers in results.items():
        for answer, means in answers.items():
            lines.append(f"| {prompt}, {answer} | " + " | ".join(f"{means[g]['miou']:.3f}" for g in groups) + " |")
    return "\n".join(lines)
