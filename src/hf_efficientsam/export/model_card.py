"""The model card, README.md of a Hub repository: what the model is, how to use it, and its measured numbers."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from transformers import PreTrainedModel

from hf_efficientsam.export.metrics_report import metrics_as_markdown, metrics_as_model_index, read_metrics
from hf_efficientsam.export.package_wheel import WHEEL_NAME, build_wheel
from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel

EMPTY_FORM = "[More Information Needed]"  # stands wherever transformers' form is to be filled in
GENERATED = "<!-- Written by hf_efficientsam; `efficientsam publish` writes it anew. -->"
PIPELINE_TAG = "mask-generation"

TEXT = """
{generated}

# {title}

EfficientSAM ([paper](https://arxiv.org/abs/2312.00863)) segments what a prompt points at: {prompts}.
{millions:.1f} million parameters; images are resized to {side} pixels unless the processor is told otherwise.

{usage}

## Numbers

{numbers}

## Terms

The code in this repository is Apache-2.0. {terms}
"""

USAGE = """## How to use it

```bash
pip install {package}
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

Without that package, the code in this repository serves, with torch, pillow and {transformers}:

```python
import torch
from transformers import AutoModelForMaskGeneration, AutoProcessor

name = "{repo_id}"
model = AutoModelForMaskGeneration.from_pretrained(name, trust_remote_code=True, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
```"""

# Of what other training scripts make: the Hub's pipeline, what it is, how it is loaded.
TRAINED = {
    "finetune_masks": (  # of another promptable model than ours
        "mask-generation",
        "A promptable segmenter, fine-tuned",
        "from transformers import AutoProcessor, {architecture}\n\n"
        'model = {architecture}.from_pretrained(".")\n'
        'processor = AutoProcessor.from_pretrained(".")',
    ),
    "finetune_classification": (
        "image-classification",
        "EfficientSAM's image encoder as a classifier",
        "from hf_efficientsam import EfficientSamForImageClassification\n\n"
        'model = EfficientSamForImageClassification.from_pretrained(".")',
    ),
    "finetune_semantic": (
        "image-segmentation",
        "A head for semantic segmentation on EfficientSAM's image encoder",
        "import hf_efficientsam  # makes the encoder known to transformers\n"
        "from transformers import {architecture}\n\n"
        'model = {architecture}.from_pretrained(".")',
    ),
    "finetune_detection": (
        "object-detection",
        "Mask R-CNN on EfficientSAM's image encoder",
        "from hf_efficientsam.training.detection.mask_rcnn import load_detector\n\n"
        'detector = load_detector(".")  # needs torchvision',
    ),
    "sami": (
        "image-feature-extraction",
        "EfficientSAM's image encoder, pretrained by SAMI",
        "from hf_efficientsam import EfficientSamModel\n\n"
        'model = EfficientSamModel.from_pretrained(".")  # prompt encoder and mask decoder are new',
    ),
    "train_saliency": (
        "image-segmentation",
        "A head that finds salient objects in the image embedding of an EfficientSAM",
        'from hf_efficientsam import EfficientSamSaliencyHead\n\nhead = EfficientSamSaliencyHead.from_pretrained(".")',
    ),
}
TRAINED_TEXT = """
# {title}

Trained by `training/{script}.py` of hf_efficientsam ([paper](https://arxiv.org/abs/2312.00863)); its options and
numbers are in `config.json` and `metrics.json` of the run. In this folder, with {transformers}:

```python
{code}
```
"""


@dataclass(frozen=True)
class Provenance:
    """
    What only a model's trainer can say of it.

    Attributes:
        license: as the Hub abbreviates it, such as "apache-2.0".
        base_model: name on the Hub of the model that it was made from.
        datasets: names on the Hub of what it was trained on.
        evaluated_on: name on the Hub of what its `metrics.json` was measured on.
    """

    license: str | None = None
    base_model: str | None = None
    datasets: Sequence[str] = ()
    evaluated_on: str | None = None

    def or_else(self, data: ModelCardData) -> "Provenance":
        """With what an earlier card says where this says nothing."""
        known = data.license if data.license != "unknown" else None
        return Provenance(
            self.license or known,
            self.base_model or data.base_model,
            self.datasets or data.datasets or (),
            self.evaluated_on,
        )


def needed_transformers() -> str:
    """As pip takes it, such as `"transformers>=5.21"`."""
    return f'"{next(one for one in metadata.requires("hf-efficientsam") if one.startswith("transformers"))}"'


def describe(
    data: ModelCardData,
    model_name: str,
    metrics: str | None,
    provenance: Provenance,
    tags: Sequence[str] = ("efficientsam", "segment-anything", "image-segmentation"),
) -> None:
    """Fills in the fields of a card's front matter. What `provenance` states takes the place of what is there."""
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or PIPELINE_TAG
    data.license = provenance.license or data.license or "unknown"
    data.base_model = provenance.base_model or data.base_model
    data.datasets = list(provenance.datasets) or data.datasets
    data.tags = list(dict.fromkeys([*(data.tags or []), *tags]))
    if results := metrics_as_model_index(metrics or "", provenance.evaluated_on):
        others = (one for one in data.eval_results or [] if not any(map(one.is_equal_except_value, results)))
        data.model_name = data.model_name or model_name
        data.eval_results = [*others, *results]


def usage(repo_id: str) -> str:
    package = f"https://huggingface.co/{repo_id}/resolve/main/{WHEEL_NAME}"
    return USAGE.format(repo_id=repo_id, package=package, transformers=needed_transformers())


def model_card(
    model: EfficientSamModel,
    repo_id: str,
    tags: Sequence[str] = (),
    metrics: str | None = None,
    provenance: Provenance = Provenance(),
) -> ModelCard:
    """
    Says what the model is, how to use it, and its numbers.

    Args:
        repo_id: `"owner/name"` of the repository.
        tags: further tags for the front matter.
        metrics: text of the `metrics.json` of these weights, if they were measured.
        provenance: what is known of its making.
    """
    config = model.config
    prompts = ["points", "boxes"]
    if config.prompt_encoder_config.background_points:
        prompts.append("background points")
    if config.prompt_encoder_config.mask_prompts:
        prompts.append("masks")
    numbers = "None were recorded with these weights; measure before relying on them."
    if metrics:
        numbers = (
            "Measured on the weights that this model was loaded from; measure again if it was trained further.\n\n"
            + metrics_as_markdown(metrics)
        )
    terms = (
        "Nothing was recorded about the terms of the weights; they depend on the data\nthat they were trained on."
        if provenance.license is None
        else f"The weights are under {provenance.license}."
    )
    title = repo_id.split("/")[-1]
    data = ModelCardData(tags=list(tags))
    describe(data, title, metrics, provenance)
    text = TEXT.format(
        generated=GENERATED,
        title=title,
        usage=usage(repo_id),
        prompts=", ".join(prompts),
        millions=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        side=config.vision_config.image_size,
        numbers=numbers,
        terms=terms,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def complete_card(card: ModelCard, repo_id: str, metrics: str | None, provenance: Provenance) -> ModelCard:
    """A card that someone wrote, with what the Hub wants to know and, if there is no code in it, how to use it."""
    describe(card.data, repo_id.split("/")[-1], metrics, provenance)
    if "from_pretrained(" not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{usage(repo_id)}\n"
    return card


def training_card(script: str, model: PreTrainedModel, provenance: Provenance) -> ModelCard:
    """
    The card that a training script writes beside its weights.

    Args:
        script: its name, without `.py`.
        model: what it has trained.
    """
    if isinstance(model, EfficientSamModel):
        return model_card(model, "OWNER/NAME", provenance=provenance)
    pipeline_tag, title, code = TRAINED[script]
    data = ModelCardData(pipeline_tag=pipeline_tag)
    tags = {"tags": ("segment-anything", "image-segmentation")} if script == "finetune_masks" else {}
    describe(data, title, None, provenance, **tags)
    code = code.format(architecture=type(model).__name__)
    text = TRAINED_TEXT.format(title=title, script=script, code=code, transformers=needed_transformers())
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def push_model_card(model: EfficientSamModel, repo_id: str, token: str | None = None) -> None:
    """
    Gives a Hub repository the card of [`model_card`] and the wheel that it names, after `model.push_to_hub(repo_id)`:
    transformers leaves an empty form there, whose tags are kept. The numbers are those of the `metrics.json` beside
    the weights that the model was loaded from.

    Args:
        model: its `name_or_path` says where it was loaded from.
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
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(Path(folder)).read_bytes()
    files = {
        "README.md": str(model_card(model, repo_id, tags, read_metrics(model.name_or_path))).encode(),
        WHEEL_NAME: wheel,
    }
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    hub.create_commit(repo_id, operations, commit_message="Model card")
