"""
Promptable models behind one interface for training and evaluation: pixels to embeddings, embeddings and prompts to
masks.

B images, Q prompts an image, P points a prompt, M candidate masks. A prompt is what the model of this package takes:
`input_points` `[B, Q, P, 2]` with `input_labels` `[B, Q, P]` (1 object, 0 background, `PADDING` none), `input_boxes`
`[B, Q, 4]` (`MISSING_BOX` none) and `input_masks` `[B, Q, h, w]`, logits of an earlier answer. Coordinates are in
pixels of the model's input.
"""

from typing import Any, NamedTuple

import torch
from accelerate.utils import recursively_apply
from torch import nn
from transformers import AutoModelForMaskGeneration, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASK_GENERATION_MAPPING_NAMES

from hf_efficientsam.inference.loading import is_bundled
from hf_efficientsam.model.modeling_efficientsam import MISSING_BOX, PADDING, EfficientSamModel


class Answer(NamedTuple):
    """Logits `pred_masks` `[B, Q, M, h, w]` and predicted IoUs `iou_scores` `[B, Q, M]`."""

    pred_masks: torch.Tensor
    iou_scores: torch.Tensor


class EfficientSamAdapter:
    """The model of this package, which takes prompts of different kinds in one batch."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    @property
    def image_size(self) -> int:
        """Side of the model's input in pixels."""
        return self.model.config.vision_config.image_size

    @property
    def background_points(self) -> bool:
        """Whether it takes points beside the object."""
        return self.model.config.prompt_encoder_config.background_points

    @property
    def mask_prompts(self) -> bool:
        """Whether it takes mask prompts."""
        return self.model.config.prompt_encoder_config.mask_prompts

    def embed(self, pixel_values: torch.Tensor) -> dict[str, Any]:
        """`[B, 3, H, W]` -> what `forward` takes in their place, tensors or lists of them with B rows."""
        return {"image_embeddings": self.model.get_image_embeddings(pixel_values)}

    def decode(self, embeddings: dict[str, Any], prompt: dict[str, torch.Tensor], multimask_output: bool) -> Answer:
        """Each prompt's masks: candidates, or one."""
        output = self.model(**embeddings, **prompt, multimask_output=multimask_output)
        return Answer(output.pred_masks, output.iou_scores)


class SamAdapter(EfficientSamAdapter):
    """SAM, SAM 2, SAM 3's tracker, EdgeTAM.

    They take one mask prompt an image, and prompts of one kind in a batch: a point that is padding changes the answer.
    So each prompt goes with an image of its own, together with the others that have a box, or none, and as many
    points.
    """

    background_points = mask_prompts = True

    @property
    def image_size(self) -> int:
        return self.model.config.prompt_encoder_config.image_size

    def embed(self, pixel_values: torch.Tensor) -> dict[str, Any]:
        return {"image_embeddings": self._image_embeddings(pixel_values)}

    def _image_embeddings(self, pixel_values: torch.Tensor) -> Any:
        """With gradients: `get_image_embeddings` without its `torch.no_grad`."""
        return type(self.model).get_image_embeddings.__wrapped__(self.model, pixel_values)

    def decode(self, embeddings: dict[str, Any], prompt: dict[str, torch.Tensor], multimask_output: bool) -> Answer:
        places, answers = [], []
        for place, images, given in alike_prompts(prompt):
            own = recursively_apply(lambda tensor, rows=images: tensor[rows], embeddings)
            output = self.model(**own, **given, multimask_output=multimask_output)
            places.append(place)
            answers.append((output.pred_masks[:, 0], output.iou_scores[:, 0]))
        back = torch.cat(places).argsort()
        shape = next(iter(prompt.values())).shape[:2]
        return Answer(*(torch.cat(one)[back].unflatten(0, shape) for one in zip(*answers, strict=True)))


class SamHQAdapter(SamAdapter):
    """SAM-HQ, whose decoder also reads the encoder's first features."""

    def embed(self, pixel_values: torch.Tensor) -> dict[str, Any]:
        image_embeddings, intermediate_embeddings = self._image_embeddings(pixel_values)
        return {"image_embeddings": image_embeddings, "intermediate_embeddings": intermediate_embeddings}


def alike_prompts(prompt: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]:
    """
    Prompts sorted by kind. Of each kind: the places [N] of its prompts in the batch `[B * Q]`, their images [N], and
    the prompts themselves as N images with one each, without padding.
    """
    shape = next(iter(prompt.values())).shape[:2]
    flat = {name: values.flatten(0, 1) for name, values in prompt.items()}
    kinds = torch.zeros(shape.numel(), dtype=torch.long, device=next(iter(prompt.values())).device)
    if "input_points" in flat:
        is_real = flat["input_labels"] != PADDING
        order = is_real.int().argsort(dim=1, descending=True, stable=True)
        flat["input_points"] = flat["input_points"].take_along_dim(order[..., None], dim=1)
        flat["input_labels"] = flat["input_labels"].take_along_dim(order, dim=1)
        kinds += 2 * is_real.sum(1)
    if "input_boxes" in flat:
        kinds += (flat["input_boxes"] != MISSING_BOX).any(1)
    groups = []
    for kind in kinds.unique().tolist():
        (places,) = (kinds == kind).nonzero(as_tuple=True)
        num_points, has_box = divmod(kind, 2)
        absent = (() if num_points else ("input_points", "input_labels")) + (() if has_box else ("input_boxes",))
        given = {name: values[places].unsqueeze(1) for name, values in flat.items() if name not in absent}
        for name in given.keys() & {"input_points", "input_labels"}:
            given[name] = given[name][:, :, :num_points]
        groups.append((places, places // shape[1], given))
    return groups


def adapt(model: PreTrainedModel) -> EfficientSamAdapter:
    """The adapter of a model."""
    if isinstance(model, EfficientSamModel):
        return EfficientSamAdapter(model)
    return SamHQAdapter(model) if model.config.model_type == "sam_hq" else SamAdapter(model)


def is_peer(name: str | None) -> bool:
    """Whether a directory or Hub name is a promptable model of transformers, not one of ours."""
    if name is None or is_bundled(name):
        return False
    try:
        kind = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    except (OSError, ValueError):  # there is no configuration in reach
        return False
    return kind in MODEL_FOR_MASK_GENERATION_MAPPING_NAMES


def load_peer(name: str) -> PreTrainedModel:
    """
    A promptable model of transformers, in float32 and evaluation mode.

    Raises:
        ValueError: with one sentence, if it cannot be loaded.
    """
    try:
        model, loading = AutoModelForMaskGeneration.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # files of others: transformers, safetensors and json raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        for library in ("torchvision", "timm"):
            if f"requires the {library}" in reason or f"No module named '{library}" in reason:
                reason = f"it needs {library}, which is not installed; install it beside torch."
        raise ValueError(f"{name} cannot be loaded: {reason}") from error
    if missing := loading["missing_keys"]:
        raise ValueError(f"{name} lacks {len(missing)} of the model's weights, such as {min(missing)}.")
    return model.eval()


def freeze_batch_norm(model: nn.Module) -> None:
    """Leaves batch normalisation in evaluation mode: a few crops are no sample of what the statistics were taken of,
    and results would depend on how batches are split."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
