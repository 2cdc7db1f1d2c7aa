"""The record of an image: what commands print as JSON and folder runs keep beside the masks."""

from pathlib import Path

import numpy as np

from .results import boxes_from_masks_np, mask_rles


def image_record(image: str, size: tuple[int, int], model: str, **content) -> dict:
    """
    Args:
        image: path of the image as it was given.
        size: height and width of the upright image.
        model: directory or Hub name of the checkpoint.
        content: what was found, for example `objects=[...]`.
    """
    height, width = (int(n) for n in size)
    return {"image": image, "width": width, "height": height, "model": model, **content}


def mask_record(mask: np.ndarray, score: float) -> dict:
    """
    Score, area in pixels, tight box (`None` if it is empty) and compressed COCO RLE of a mask `[height, width]`, bool.
    """
    box = boxes_from_masks_np(mask[None])[0].astype(int).tolist() if mask.any() else None
    (rle,) = mask_rles(mask[None])
    return {"score": round(float(score), 4), "area": int(mask.sum()), "box": box, "segmentation": rle}


def recorded_file(record: dict) -> Path:
    """The image that a record is of."""
    return Path(record["folder"], record["file_name"]) if "folder" in record else Path(record["image"])


__all__ = ["image_record", "mask_record", "recorded_file"]
