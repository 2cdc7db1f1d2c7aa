"""The README.md that `push_to_hub` gives a Hub repository without one. Travels with the model, as remote code too."""

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import cached_file

TEXT = """
# {title}

EfficientSAM ([paper](https://arxiv.org/abs/2312.00863)) segments what a prompt points at: {prompts}.
{millions:.1f} million parameters; images are resized to {side} pixels unless the processor is told otherwise.

## How to use it

```bash
pip install hf-efficientsam
```

```python
import torch
from hf_efficientsam import EfficientSamModel, EfficientSamProcessor

model = EfficientSamModel.from_pretrained("{repo_id}").eval()
processor = EfficientSamProcessor.from_pretrained("{repo_id}")

inputs = processor("photo.jpg", input_points=[[[580, 350]]])  # x, y in pixels of the photo
with torch.no_grad():
    outputs = model(**inputs)
masks = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])
best = masks[0][0, outputs.iou_scores[0, 0].argmax()]  # bool, height x width of the photo
```

Without that package, the code in this repository serves:

```python
from transformers import AutoModelForMaskGeneration, AutoProcessor

model = AutoModelForMaskGeneration.from_pretrained("{repo_id}", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
```

## Numbers

{numbers}

## Terms

The code in this repository is Apache-2.0. Nothing was recorded about the terms of the weights; they depend on the data
that they were trained on.
"""


def model_card(model, repo_id: str, tags: list[str]) -> ModelCard:
    """
    Says what the model is, how to use it, and the numbers of the `metrics.json` beside the weights it was loaded from.

    Args:
        model: an `EfficientSamModel`.
        repo_id: `"owner/name"` of the repository.
        tags: further tags for the front matter.
    """
    config = model.config
    prompts = ["points", "boxes"]
    if config.prompt_encoder_config.background_points:
        prompts.append("background points")
    if config.prompt_encoder_config.mask_prompts:
        prompts.append("masks")
    numbers = "None were recorded with these weights; measure before relying on them."
    if metrics := read_metrics(model.name_or_path):
        numbers = (
            "Measured on the weights that this model was loaded from; measure again if it was trained further.\n\n"
            + describe_report(metrics)
        )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="mask-generation",
        tags=list(dict.fromkeys(["efficientsam", "segment-anything", "image-segmentation", *tags])),
    )
    text = TEXT.format(
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        prompts=", ".join(prompts),
        millions=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        side=config.vision_config.image_size,
        numbers=numbers,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def describe_report(metrics: str) -> str:
    """The json that training/evaluate_masks.py writes, as Markdown; one of another form as it is."""
    try:
        report = json.loads(metrics)
        files = report["annotations"] if "annotations" in report else report["shards"]
        names = ["/".join(Path(file).parts[-2:]) for file in ([files] if isinstance(files, str) else files)]
        measured = f"{report['masks']} masks of {report['images']} images ({', '.join(names)}), seed {report['seed']}."
        return f"{measured} {report['protocol']}\n\n{table(report['results'])}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"```json\n{metrics.strip()}\n```"


def table(results: dict) -> str:
    """The numbers as Markdown, by size of the object."""
    groups = list(results["baseline"]["ellipse"])
    lines = ["| mIoU | " + " | ".join(groups) + " |", "|---" * (len(groups) + 1) + "|"]
    for prompt, answers in results.items():
        for answer, means in answers.items():
            lines.append(f"| {prompt}, {answer} | " + " | ".join(f"{means[g]['miou']:.3f}" for g in groups) + " |")
    return "\n".join(lines)


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


__all__ = ["model_card"]
