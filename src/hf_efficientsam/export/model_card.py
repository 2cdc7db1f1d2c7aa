"""The model card, README.md of a Hub repository: what the model is, how to use it, and its measured numbers."""

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData

from hf_efficientsam.export.metrics_report import metrics_as_markdown, read_metrics
from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel

EMPTY_FORM = "[More Information Needed]"  # stands wherever transformers' form is to be filled in

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


def model_card(model: EfficientSamModel, repo_id: str, tags: list[str]) -> ModelCard:
    """
    Says what the model is, how to use it, and the numbers of the `metrics.json` beside the weights it was loaded from.

    Args:
        model: the model; its `name_or_path` says where it was loaded from.
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
            + metrics_as_markdown(metrics)
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


def push_model_card(model: EfficientSamModel, repo_id: str, token: str | None = None) -> None:
    """
    Gives a Hub repository the card of [`model_card`], after `model.push_to_hub(repo_id)`: transformers leaves an empty
    form there, whose tags are kept.

    Args:
        model: as in [`model_card`].
        repo_id: `"owner/name"` of the repository.
        token: a Hub token; the one that is stored on this machine by default.

    Raises:
        ValueError: if the repository has a card that someone wrote.
    """
    hub, tags = HfApi(token=token), []
    if hub.file_exists(repo_id, "README.md"):
        card = ModelCard.load(repo_id, token=token)
        if EMPTY_FORM not in card.text:
            raise ValueError(f"{repo_id} has a model card already; edit it there, or delete it first.")
        tags = card.data.tags or []
    card = CommitOperationAdd("README.md", str(model_card(model, repo_id, tags)).encode())
    hub.create_commit(repo_id, [card], commit_message="Model card")
