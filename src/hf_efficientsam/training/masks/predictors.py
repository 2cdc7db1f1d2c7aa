"""Any promptable model with `SamModel`'s interface behind one call, so that peers are measured by the same code."""

from dataclasses import dataclass

import torch
from PIL import Image
from transformers import AutoModelForMaskGeneration, AutoProcessor
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASK_GENERATION_MAPPING_NAMES

from hf_efficientsam.inference.loading import is_bundled, load_model

MASKS_AT_ONCE = 8  # of a prompt's candidates each, brought to image size: some enlarge them to the model input before


@dataclass(frozen=True)
class PreparedImage:
    """An image as a model takes it: `pixel_values` [3,H,W], its own (height, width), and that without padding."""

    pixel_values: torch.Tensor
    original_size: tuple[int, int]
    reshaped_size: tuple[int, int] | None  # None where the processor pads nothing


def prepare_image(processor, image: Image.Image) -> PreparedImage:
    """What a model's processor makes of an RGB image; done where images are read, in a worker."""
    encoding = processor(images=image, return_tensors="pt")
    sizes = [tuple(map(int, encoding[k][0])) for k in ("original_sizes", "reshaped_input_sizes") if k in encoding]
    return PreparedImage(encoding["pixel_values"][0], sizes[0], sizes[1] if len(sizes) > 1 else None)


class Predictor:
    """
    A model and its processor.

    Args:
        name: what it is called in messages.
        model: in evaluation mode, with the interface of `SamModel` (or `Sam2Model`).
        processor: of that model.

    `background_points` and `mask_prompts` say what it takes; models other than ours always take both.
    """

    def __init__(self, name: str, model: torch.nn.Module, processor):
        self.name, self.model, self.processor = name, model, processor
        prompt_encoder = model.config.prompt_encoder_config
        self.background_points = getattr(prompt_encoder, "background_points", True)
        self.mask_prompts = getattr(prompt_encoder, "mask_prompts", True)

    def input_size(self) -> dict[str, int]:
        """Height and width in pixels that a square image is given."""
        height, width = prepare_image(self.processor, Image.new("RGB", (64, 64))).pixel_values.shape[1:]
        return {"height": height, "width": width}

    @torch.no_grad()
    def encode(self, images: list[PreparedImage]) -> list["ImagePredictor"]:
        """One predictor for each image; images that the processor made equally large are encoded together."""
        shapes = dict.fromkeys(image.pixel_values.shape for image in images)
        predictors = {}
        for shape in shapes:
            group = [i for i, image in enumerate(images) if image.pixel_values.shape == shape]
            pixel_values = torch.stack([images[i].pixel_values for i in group]).to(self.model.device)
            embeddings = self.model.get_image_embeddings(pixel_values)
            levels = [embeddings] if isinstance(embeddings, torch.Tensor) else embeddings
            if not all(isinstance(level, torch.Tensor) for level in levels):
                kind = self.model.config.model_type
                raise ValueError(f"{self.name} cannot be evaluated: a model of type {kind!r} has other embeddings.")
            for n, i in enumerate(group):
                own = [level[n : n + 1] for level in levels]
                predictors[i] = ImagePredictor(self, images[i], own if embeddings is levels else own[0])
        return [predictors[i] for i in range(len(images))]


class ImagePredictor:
    """Masks of one image, which is encoded once. Made by `Predictor.encode`."""

    def __init__(self, predictor: Predictor, image: PreparedImage, embeddings: torch.Tensor | list[torch.Tensor]):
        self.model, self.processor = predictor.model, predictor.processor
        self.background_points, self.mask_prompts = predictor.background_points, predictor.mask_prompts
        self.embeddings = embeddings
        self.sizes = [[image.original_size]] + ([[image.reshaped_size]] if image.reshaped_size else [])
        height, width = image.reshaped_size or image.pixel_values.shape[1:]
        scale = [width / image.original_size[1], height / image.original_size[0]]
        self.scale = torch.tensor(scale, dtype=torch.float64)  # from the image's pixels to the model's

    @torch.no_grad()
    def __call__(
        self,
        multimask_output: bool = True,
        input_boxes: torch.Tensor | None = None,
        input_points: torch.Tensor | None = None,
        input_labels: torch.Tensor | None = None,
        input_masks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            multimask_output: M candidates, or one mask.
            input_boxes: [Q,4] in pixels of the image.
            input_points: [Q,P,2] in pixels of the image.
            input_labels: [Q,P], 1 on the object and 0 beside it; by default all on the object.
            input_masks: [Q,h,w], logits of an earlier answer.

        Returns:
            masks bool [Q,M,height,width] at the image's size, predicted IoU float [Q,M] and logits [Q,M,h,w].
        """
        # Coordinates are scaled here and not by the processor: SAM's wants the image again, and ours goes through
        # nested lists. A test compares them.
        inputs = {}
        if input_boxes is not None:
            inputs["input_boxes"] = (input_boxes.double() * self.scale.repeat(2)).float()[None]
        if input_points is not None:
            inputs["input_points"] = (input_points.double() * self.scale).float()[None]
            labels = torch.ones(input_points.shape[:2]) if input_labels is None else input_labels
            inputs["input_labels"] = labels.long()[None]
        embeddings = self.embeddings
        if input_masks is not None:
            # SAM takes one mask an image, so here each prompt has an image of its own.
            inputs = {name: values.transpose(0, 1) for name, values in inputs.items()}
            inputs["input_masks"] = input_masks[:, None]
            embeddings = _repeat(embeddings, len(input_masks))
        inputs = {name: values.to(self.model.device) for name, values in inputs.items()}
        output = self.model(image_embeddings=embeddings, multimask_output=multimask_output, **inputs)
        logits = output.pred_masks.flatten(0, 1)
        parts = [self.processor.post_process_masks([part], *self.sizes)[0] for part in logits.split(MASKS_AT_ONCE)]
        return torch.cat(parts), output.iou_scores.flatten(0, 1), logits


def _repeat(embeddings: torch.Tensor | list[torch.Tensor], times: int):
    if isinstance(embeddings, torch.Tensor):
        return embeddings.expand(times, -1, -1, -1)
    return [_repeat(level, times) for level in embeddings]


def load_mask_predictor(name: str, device: torch.device | str) -> Predictor:
    """
    A model and its processor for evaluation, in float32.

    Args:
        name: directory or Hub name of an EfficientSAM, or of a SAM-like model of transformers; or: bundled.
        device: to run it on.

    Raises:
        ValueError: with one sentence, if it cannot be loaded.
    """
    if is_bundled(name) or _model_type(name) not in MODEL_FOR_MASK_GENERATION_MAPPING_NAMES:
        model, processor = load_model(name)
        return Predictor(name, model.to(device), processor)
    try:
        processor = AutoProcessor.from_pretrained(name)
        model, loading = AutoModelForMaskGeneration.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # files of others: transformers, safetensors and json raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        if "torchvision" in reason:
            reason = "its processor needs torchvision, which is not installed."
        raise ValueError(f"{name} cannot be loaded: {reason}") from error
    if missing := loading["missing_keys"]:
        raise ValueError(f"{name} lacks {len(missing)} of the model's weights, such as {min(missing)}.")
    return Predictor(name, model.to(device).eval(), processor)


def _model_type(name: str) -> str | None:
    """None if there is no configuration in reach."""
    try:
        return PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    except (OSError, ValueError):
        return None
