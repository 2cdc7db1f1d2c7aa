"""Any promptable model behind one call, so that peers are measured by the same code."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import recursively_apply
from PIL import Image
from transformers import PreTrainedModel

from hf_efficientsam.inference.loading import load_model

from .adapters import adapt, is_peer, load_peer
from .input_formats import PlainImageProcessor

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
        model: in evaluation mode, of a kind that `adapt` knows.
        processor: of that model; of another than ours a `PlainImageProcessor`.
    """

    def __init__(self, name: str, model: PreTrainedModel, processor):
        self.name, self.model, self.processor, self.adapter = name, model, processor, adapt(model)

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
            embeddings = self.adapter.embed(pixel_values)
            for n, i in enumerate(group):
                own = recursively_apply(lambda level, n=n: level[n : n + 1], embeddings)
                predictors[i] = ImagePredictor(self, images[i], own)
        return [predictors[i] for i in range(len(images))]


class ImagePredictor:
    """Masks of one image, which is encoded once. Made by `Predictor.encode`."""

    def __init__(self, predictor: Predictor, image: PreparedImage, embeddings: dict[str, Any]):
        self.adapter, self.processor, self.embeddings = predictor.adapter, predictor.processor, embeddings
        self.background_points, self.mask_prompts = self.adapter.background_points, self.adapter.mask_prompts
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
        # Coordinates are scaled here and not by the processor, which goes through nested lists. A test compares them.
        inputs = {}
        if input_boxes is not None:
            inputs["input_boxes"] = (input_boxes.double() * self.scale.repeat(2)).float()[None]
        if input_points is not None:
            inputs["input_points"] = (input_points.double() * self.scale).float()[None]
            labels = torch.ones(input_points.shape[:2]) if input_labels is None else input_labels
            inputs["input_labels"] = labels.long()[None]
        if input_masks is not None:
            inputs["input_masks"] = input_masks[None]
        inputs = {name: values.to(self.adapter.model.device) for name, values in inputs.items()}
        answer = self.adapter.decode(self.embeddings, inputs, multimask_output)
        logits = answer.pred_masks[0]
        parts = [self.processor.post_process_masks([part], *self.sizes)[0] for part in logits.split(MASKS_AT_ONCE)]
        return torch.cat(parts), answer.iou_scores[0], logits


def load_mask_predictor(name: str, device: torch.device | str) -> Predictor:
    """
    A model and its processor for evaluation, in float32.

    Args:
        name: directory or Hub name of an EfficientSAM, or of a promptable model of transformers; or: bundled.
        device: to run it on.

    Raises:
        ValueError: with one sentence, if it cannot be loaded.
    """
    if is_peer(name):
        return Predictor(name, load_peer(name).to(device), PlainImageProcessor.from_pretrained(name))
    model, processor = load_model(name)
    return Predictor(name, model.to(device), processor)
