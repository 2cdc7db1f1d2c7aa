"""What a promptable model makes of training images, drawn."""

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from hf_efficientsam.inference.drawing import draw_masks, image_table
from hf_efficientsam.model.mask_operations_efficientsam import boxes_from_masks

from .adapters import adapt
from .batch import Batch
from .input_formats import InputFormat
from .metrics import most_confident
from .validation import evaluation_mode

SHOWN = 4  # images in a drawing


@torch.no_grad()
def draw_answers(model: PreTrainedModel, input_format: InputFormat, batch: Batch, data: Dataset) -> Image.Image:
    """
    The first images of a batch, their masks, and the most confident masks for the boxes of these, side by side.

    Args:
        model: on the batch's device; it is left in the mode that it was in.
        input_format: of the batch's pixels.
        batch: of `data`.
        data: reads the images of a batch without pixels, which comes of a `MaskViews`.
    """
    boxes, adapter, pixel_values = boxes_from_masks(batch.masks[:SHOWN]), adapt(model), batch.pixel_values
    if pixel_values is None:
        shown = zip(batch.indices[:SHOWN], batch.views, strict=False)
        pixel_values = torch.stack([data.view_pixels(*place)[1] for place in shown]).to(boxes.device)
    with evaluation_mode(model):
        embeddings = adapter.embed(pixel_values[:SHOWN])
        output = adapter.decode(embeddings, {"input_boxes": boxes}, multimask_output=True)
    _, predicted = most_confident(output, batch.masks.shape[-2:])
    columns = {"images": [], "their masks": [], "by their boxes": []}
    for pixels, *rows in zip(pixel_values[:SHOWN], batch.valid, batch.masks, predicted, boxes, strict=False):
        valid, true, guess, box = (row.cpu() for row in rows)
        image = input_format.to_image(pixels)
        columns["images"].append(image)
        columns["their masks"].append(draw_masks(image, true[valid]))
        columns["by their boxes"].append(draw_masks(image, guess[valid], boxes=box[valid].tolist()))
    return image_table(columns)
