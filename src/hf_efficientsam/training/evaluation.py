"""How good promptable masks are, by the protocol of the paper's zero-shot tables (arXiv 2312.00863)."""

import re

import numpy as np
import torch
from PIL import Image

from hf_efficientsam.modeling_efficientsam import EfficientSamModel
from hf_efficientsam.processing_efficientsam import EfficientSamProcessor

from .data.coco import Sample, decode
from .metrics import filled_box, inscribed_ellipse, mask_iou
from .prompts import boxes_from_masks, sample_points

PROTOCOL = (
    "Every mask is asked for by its tight ground-truth box, or by clicks that are uniformly random inside it, all on "
    "the object. Masks are compared at the image's own size and the mean is over masks. 'confident': of the "
    "candidates the one with the highest predicted IoU; 'best': the one with the highest true IoU; 'single': the one "
    "mask that the model gives without candidates."
)
PIXELS_AT_ONCE = 2**23  # of masks at image size; bounds the memory of large images with many masks


def num_clicks(prompt: str) -> int:
    """0 for `"box"`, K for `"clickK"`; anything else is a ValueError."""
    match = re.fullmatch(r"box|click([1-9]\d*)", prompt)
    if match is None:
        raise ValueError(f"The prompt {prompt!r} is unknown; use box, or click1, click3, ... for so many clicks.")
    return int(match[1] or 0)


class ImagePredictor:
    """
    Masks of one image, which is encoded once.

    Args:
        model: in evaluation mode.
        processor: of that model.
        image: RGB.
    """

    @torch.inference_mode()
    def __init__(self, model: EfficientSamModel, processor: EfficientSamProcessor, image: Image.Image):
        self.model, self.processor = model, processor
        encoding = processor(images=image)
        self.sizes = encoding["original_sizes"], encoding["reshaped_input_sizes"]
        self.embeddings = model.get_image_embeddings(encoding["pixel_values"].to(model.device))

    @torch.inference_mode()
    def __call__(self, multimask_output: bool = True, **prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            multimask_output: M candidates, or one mask.
            prompts: `input_boxes` [Q,4] or `input_points` [Q,P,2] in pixels of the image.

        Returns:
            masks bool [Q,M,height,width] at the image's size and predicted IoU float [Q,M].
        """
        prompts = {name: values[None] for name, values in prompts.items()}
        inputs = self.processor(original_sizes=self.sizes[0], **prompts).to(self.model.device)
        output = self.model(image_embeddings=self.embeddings, multimask_output=multimask_output, **inputs)
        return self.processor.post_process_masks(output.pred_masks, *self.sizes)[0], output.iou_scores[0]


def random_clicks(mask: torch.Tensor, count: int, seed: int, annotation_id: int) -> torch.Tensor:
    """`count` pixels (x, y) of mask [H,W], float32 [count,2]; they depend on nothing but the arguments, and the first
    ones not on `count`."""
    state = np.random.SeedSequence([seed, annotation_id]).generate_state(1)
    generator = torch.Generator().manual_seed(int(state[0]))
    return torch.stack([sample_points(mask, generator) for _ in range(count)])


def candidate_ious(
    candidates: torch.Tensor, iou_scores: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """True IoUs [N] of the most confident and of the best of M candidates [N,M,H,W], for scores [N,M] and target
    [N,H,W]."""
    ious = mask_iou(candidates, target[:, None])
    return ious.gather(1, iou_scores.argmax(1, keepdim=True))[:, 0], ious.amax(1)


def evaluate_image(predict, sample: Sample, prompts: list[str], seed: int) -> tuple[dict, torch.Tensor]:
    """
    IoUs of all masks of an image.

    Args:
        predict: an `ImagePredictor`, or what behaves like one.
        sample: the image's true masks.
        prompts: see `num_clicks`.
        seed: of the clicks, together with each annotation's id.

    Returns:
        {(prompt, answer): float [N]}, see `PROTOCOL`; trivial answers to the box are ("baseline", "filled_box") and
        ("baseline", "ellipse"). And the masks' areas [N] in pixels.
    """
    height, width = sample.rles[0]["size"]
    step = max(1, PIXELS_AT_ONCE // (height * width))
    parts = []
    for start in range(0, len(sample.rles), step):
        part = slice(start, start + step)
        masks = torch.from_numpy(decode(sample.rles[part])).contiguous()
        parts.append(_evaluate_masks(predict, masks, sample.annotation_ids[part], prompts, seed))
    ious, areas = zip(*parts, strict=True)
    return {row: torch.cat([part[row] for part in ious]) for row in ious[0]}, torch.cat(areas)


def _evaluate_masks(predict, masks: torch.Tensor, annotation_ids: list[int], prompts: list[str], seed: int) -> tuple:
    boxes = boxes_from_masks(masks)
    clicks = [
        random_clicks(mask, max(map(num_clicks, prompts)), seed, annotation_id)
        for mask, annotation_id in zip(masks, annotation_ids, strict=True)
        if prompts != ["box"]
    ]
    ious = {}
    for prompt in prompts:
        count = num_clicks(prompt)
        given = {"input_points": torch.stack(clicks)[:, :count]} if count else {"input_boxes": boxes}
        candidates, scores = predict(**given)
        target = masks.to(candidates.device)
        ious[prompt, "confident"], ious[prompt, "best"] = candidate_ious(candidates, scores, target)
        if not count:
            single, _ = predict(multimask_output=False, **given)
            ious[prompt, "single"] = mask_iou(single[:, 0], target)
    for name, guess in (("filled_box", filled_box), ("ellipse", inscribed_ellipse)):
        ious["baseline", name] = mask_iou(guess(boxes, *masks.shape[-2:]), masks)
    return {row: values.cpu() for row, values in ious.items()}, masks.sum((1, 2), dtype=torch.int64)
