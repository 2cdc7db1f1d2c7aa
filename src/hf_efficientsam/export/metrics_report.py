"""The `metrics.json` that lies beside a checkpoint's weights: the report that training/evaluate_masks.py writes."""

import json
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import EvalResult, EvalResultEntry
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


def is_of_another(metrics: str, fingerprint: str) -> bool:
    """
    Whether a report says that it is of other weights, another configuration or another preprocessing than those of
    this `checkpoint_fingerprint`, in float32. Older reports do not say.
    """
    try:
        stated = json.loads(metrics).get("model_sha256", fingerprint)
    except (ValueError, AttributeError):
        return False
    return fingerprint not in (stated.values() if isinstance(stated, dict) else [stated])


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


def mean_ious(report: dict) -> Iterator[tuple[str, str, float]]:
    """Prompt, answer and mIoU over objects of all sizes, of the model and not of the baselines."""
    for prompt, answers in report["results"].items():
        if prompt != "baseline":
            for answer, groups in answers.items():
                yield prompt, answer, groups["all"]["miou"]


def measured_on(report: dict) -> list[str]:
    """The files that a report was measured on, each with its folder."""
    files = report["annotations"] if "annotations" in report else report["shards"]
    return ["/".join(Path(file).parts[-2:]) for file in ([files] if isinstance(files, str) else files)]


def metrics_as_model_index(metrics: str, dataset: str | None = None) -> list[EvalResult]:
    """
    For the front matter of a model card; empty for a report of another form.

    Args:
        metrics: text of a `metrics.json`.
        dataset: name on the Hub of what was measured on; by default the name of the files.
    """
    try:
        report = json.loads(metrics)
        name = dataset or measured_on(report)[0]
        task = {"task_type": "mask-generation", "task_name": "Mask generation"}
        on = {"dataset_type": dataset or name.split("/")[0], "dataset_name": name}
        return [
            EvalResult(
                **task,
                **on,
                metric_type="mean_iou",
                metric_name=f"mIoU, {prompt}, {answer}",
                metric_value=round(miou, 4),
            )
            for prompt, answer, miou in mean_ious(report)
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def metrics_as_entries(metrics: str, dataset: str) -> list[EvalResultEntry]:
    """For `.eval_results` of a repository, whose results stand on the page of a `dataset` of the Hub, too."""
    results = metrics_as_model_index(metrics, dataset)
    notes = "mean IoU of masks at the image's own size"
    return [
        EvalResultEntry(
            dataset_id=dataset,
            task_id=result.metric_name.removeprefix("mIoU, ").replace(", ", "_"),
            value=result.metric_value,
            notes=notes,
        )
        for result in results
    ]


def metrics_as_markdown(metrics: str) -> str:
    """For a model card: what was measured and the table of results; a report of another form as it is."""
    try:
        report = json.loads(metrics)
        names = ", ".join(measured_on(report))
        measured = f"{report['masks']} masks of {report['images']} images ({names}), seed {report['seed']}."
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
