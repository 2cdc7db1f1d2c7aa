"""How good a detector is: COCO AP of its boxes and masks."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageOps

from hf_efficientsam.inference.drawing import draw_masks, image_table
from hf_efficientsam.training.masks.coco_ap import Truth, encode_masks

from .mask_rcnn import MaskDetector

PROTOCOL = (
    "COCO AP of boxes and of masks through faster-coco-eval; images are resized to {size} pixels on the longer side "
    "and padded to a square, and the 100 detections of an image with the best score, at least {score}, are counted."
)


def match_categories(categories: list[dict], truth: Truth) -> dict[int, int]:
    """
    Labels of a detector's categories to the ids that a json has for them: of the same name, as two files may number
    them differently. Those that the json lacks are left out.

    Raises:
        ValueError: if it has none of them.
    """
    ids = {str(one.get("name", one["id"])): one["id"] for one in truth.truth["categories"]}
    matched = {label: ids[one["name"]] for label, one in enumerate(categories, start=1) if one["name"] in ids}
    if not matched:
        theirs = ", ".join(sorted(ids)[:3])
        raise ValueError(f"{truth.annotations} has none of the detector's categories, but {theirs}; choose another.")
    return matched


def results_of(found: dict[str, torch.Tensor], image_id: int, ids: dict[int, int]) -> list[dict]:
    """Of an image, what `MaskDetector.detect` gives -> `{image_id, category_id, bbox, score, segmentation}` for each
    detection whose label is among `ids`."""
    boxes = torch.cat([found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]], 1).tolist()
    rles = encode_masks(found["masks"].transpose(1, 2).byte().contiguous().numpy())
    return [
        {"image_id": image_id, "category_id": ids[label], "bbox": box, "score": score, "segmentation": rle}
        for label, box, score, rle in zip(found["labels"].tolist(), boxes, found["scores"].tolist(), rles, strict=True)
        if label in ids
    ]


def average_precision(results: list[dict], truth: Truth) -> dict[str, dict[str, float | None]]:
    """`box` and `mask`: AP and AR of what `results_of` gives for the images of `truth`, by their usual names."""
    # A result with `bbox` would have the box's area where masks are measured.
    masks = [{name: value for name, value in one.items() if name != "bbox"} for one in results]
    return {"box": truth.box_ap(boxes_alone(results)), "mask": truth.mask_ap(masks)}


def boxes_alone(results: list[dict]) -> list[dict]:
    """What `evaluate_masks.py --detections` reads."""
    return [{name: value for name, value in one.items() if name != "segmentation"} for one in results]


def draw_detections(detector: MaskDetector, images: Sequence[Image.Image], masks: Sequence) -> Image.Image:
    """A row for each image: itself, its objects (masks `[N, height, width]`), and of what the detector finds the best,
    as many as there are objects, with boxes and scores."""
    columns = {"images": [], "objects": [], "detections": []}
    for image, true, found in zip(images, masks, detector.detect(list(images)), strict=True):
        best = slice(max(1, len(true)))
        boxes, scores = found["boxes"][best].tolist(), found["scores"][best].tolist()
        shown = draw_masks(image, found["masks"][best], boxes=boxes, scores=scores)
        for cells, cell in zip(columns.values(), (image, draw_masks(image, true), shown), strict=True):
            cells.append(ImageOps.pad(cell, (320, 320), Image.Resampling.BICUBIC, "white"))
    return image_table(columns)
