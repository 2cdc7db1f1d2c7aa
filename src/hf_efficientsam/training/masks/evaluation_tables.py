"""What `training/evaluate_masks.py` prints: the numbers of one model, and models beside each other."""

from .metrics import COCO_AREAS


def model_table(
    results: dict, datasets: dict[str, dict], errors: dict[str, float], boundary: dict, clicks: dict
) -> str:
    """
    A row for each prompt and answer and below it one for each dataset, by size of the object.

    Args:
        results: `mean_ious` of a model.
        datasets: the same of each dataset, where there are several.
        errors: its `calibration_errors`.
        boundary: its `boundary_ious`.
        clicks: its `numbers_of_clicks`, or empty.
    """
    groups = list(results["baseline"]["ellipse"])

    def row(name: str, values: dict, key: str, form: str = "{:10.4f}") -> str:
        return f"{name:32}" + "".join(form.format(values[g][key]) if g in values else f"{'-':>10}" for g in groups)

    tables = {"": results, **datasets}
    lines = [f"{'mIoU':32}" + "".join(f"{group:>10}" for group in groups)]
    for prompt, answers in results.items():
        for answer in answers:
            for source, table in tables.items():
                lines.append(row(f"  {source}" if source else f"{prompt}, {answer}", table[prompt][answer], "miou"))
    lines += [row(f"boundary IoU, {name}", values, "mean") for name, values in boundary.items()]
    for target, values in clicks.items():
        lines.append(row(f"NoC@{target}", values, "mean", "{:10.2f}"))
        lines.append(row("  ratio not reached in 20 clicks", values, "failed"))
    for source, table in tables.items():
        lines.append(row(f"  {source}" if source else "masks", table["baseline"]["ellipse"], "count", "{:10}"))
    lines += [f"{f'calibration error, {prompt}':32}{error:10.4f}" for prompt, error in errors.items()]
    return "\n".join(lines)


def peers_table(by_model: dict[str, dict[str, dict]], sizes: dict[str, dict[str, int]]) -> str:
    """
    Models beside each other as Markdown: mIoU of the confident candidate, for the first prompt also by size of the
    object and at the boundary, and the numbers of clicks. The last rows are the baselines, which know the box alone.

    Args:
        by_model: `results`, `boundary_iou` and, if they were counted, `clicks` of each model, by name.
        sizes: height and width of each model's input.
    """
    (results, *_), (boundary, *_) = by_model["results"].values(), by_model["boundary_iou"].values()
    prompts, clicks = [prompt for prompt in results if prompt != "baseline"], by_model.get("clicks", {})
    first, groups = prompts[0], [group for group in COCO_AREAS if group in results["baseline"]["ellipse"]]
    targets = list(next(iter(clicks.values()), {}))
    names = ["model", "input", *prompts, *(f"{first}, {group}" for group in groups), f"{first}, boundary"]
    names += [f"NoC@{target}" for target in targets]
    rows = []
    for model, own in by_model["results"].items():
        cells = [own[prompt]["confident"]["all"]["miou"] for prompt in prompts]
        cells += [own[first]["confident"][group]["miou"] for group in groups]
        cells.append(by_model["boundary_iou"][model][first]["all"]["mean"])
        numbers = [f"{clicks[model][target]['all']['mean']:.2f}" for target in targets]
        size = f"{sizes[model]['height']} x {sizes[model]['width']}"
        rows.append([model, size, *(f"{cell:.3f}" for cell in cells), *numbers])
    for name, own in results["baseline"].items() if first == "box" else ():
        cells = [own["all"]["miou"], *("-" for _ in prompts[1:]), *(own[group]["miou"] for group in groups)]
        cells.append(boundary[name]["all"]["mean"])
        shown = [cell if isinstance(cell, str) else f"{cell:.3f}" for cell in cells]
        rows.append([name.replace("_", " "), "-", *shown, *("-" for _ in targets)])
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
