"""Objects of an image in the file formats of annotation tools and trainers: COCO, YOLO, labelme, Label Studio.

COCO has run-length codes. The others have polygons, see polygons.py; holes survive by bridges. An object of several
parts is a group of shapes in labelme and regions with one parent in Label Studio. A YOLO line has one polygon, so
bridges join its parts, too.
"""

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask

from .polygons import joined


def coco_annotations(
    rles: Sequence[dict], categories: Sequence[int], scores: Sequence[float], iou_scores: Sequence[float]
) -> list[dict]:
    """
    COCO annotations, without their ids and image's, of the objects that are not empty; `bbox` is tight, `[x, y, width,
    height]`.

    Args:
        rles: of each object its mask as compressed COCO RLE.
        categories: of each object the id of its category.
        scores, iou_scores: of each object, see [`SegmentationResult`].
    """
    return [
        {
            "category_id": category,
            "segmentation": rle,
            "area": area,
            "bbox": coco_mask.toBbox(rle).tolist(),
            "iscrowd": 0,
            "score": round(float(score), 4),
            "predicted_iou": round(float(iou), 4),
        }
        for rle, category, score, iou in zip(rles, categories, scores, iou_scores, strict=True)
        if (area := int(coco_mask.area(rle)))
    ]


def yolo_file(polygons: Sequence[list[np.ndarray]], classes: Sequence[int], width: int, height: int) -> str:
    """
    A YOLO segmentation label file: lines `class x1 y1 x2 y2 ...` with coordinates from 0 to 1, one for each object
    that has a part.

    Args:
        polygons: of each object its parts, `[n, 2]` in pixels.
        classes: of each object the number of its class, from 0.
        width, height: of the image.
    """
    lines = []
    for parts, number in zip(polygons, classes, strict=True):
        if parts:
            corners = joined(parts) / np.float32([width, height])
            lines.append(" ".join([str(number), *(f"{value:.6g}" for value in corners.ravel())]) + "\n")
    return "".join(lines)


def labelme_file(
    polygons: Sequence[list[np.ndarray]], labels: Sequence[str], file_name: str, width: int, height: int
) -> dict:
    """
    What labelme's json file holds for an image, its pixels left out: labelme reads them from `file_name`, which is
    relative to the json file.

    Args:
        polygons: of each object its parts, `[n, 2]` in pixels; an object of several parts is a group.
        labels: of each object its name.
        file_name: of the image.
        width, height: of the image.
    """
    shapes = []
    for number, (parts, label) in enumerate(zip(polygons, labels, strict=True), start=1):
        for part in parts:
            group = number if len(parts) > 1 else None
            shape = {"label": label, "points": part.tolist(), "group_id": group, "description": ""}
            shapes.append({**shape, "shape_type": "polygon", "flags": {}, "mask": None})
    image = {"imagePath": file_name, "imageData": None, "imageHeight": height, "imageWidth": width}
    return {"version": "5.5.0", "flags": {}, "shapes": shapes, **image}


def label_studio_task(
    polygons: Sequence[list[np.ndarray]],
    labels: Sequence[str],
    scores: Sequence[float],
    image: str,
    width: int,
    height: int,
) -> dict:
    """
    A Label Studio task with one prediction, for a labelling interface of `<Image name="image">` and
    `<PolygonLabels name="label" toName="image">`.

    Args:
        polygons: of each object its parts, `[n, 2]` in pixels; further parts name the first one as their parent.
        labels, scores: of each object.
        image: URL or path of the image as Label Studio finds it.
        width, height: of the image.
    """
    regions = []
    for number, (parts, label, score) in enumerate(zip(polygons, labels, scores, strict=True), start=1):
        for which, part in enumerate(parts, start=1):
            percent = part * np.float32([100 / width, 100 / height])
            region = {
                "id": f"object{number}_part{which}",
                "type": "polygonlabels",
                "from_name": "label",
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "score": round(float(score), 4),
                "value": {"points": percent.tolist(), "closed": True, "polygonlabels": [label]},
            }
            regions.append(region if which == 1 else {**region, "parentID": f"object{number}_part1"})
    prediction = {"model_version": "efficientsam", "result": regions}
    if len(scores):
        prediction["score"] = round(float(np.mean(scores)), 4)
    return {"data": {"image": image}, "predictions": [prediction]}
