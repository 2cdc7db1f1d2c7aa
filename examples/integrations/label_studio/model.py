"""A Label Studio ML backend that asks `efficientsam serve`: a smart keypoint or rectangle becomes polygons."""

import os
from pathlib import Path
from uuid import uuid4

import requests
from label_studio_ml.model import LabelStudioMLBase

SERVER = os.environ.get("EFFICIENTSAM_URL", "http://127.0.0.1:8000")
TOLERANCE = 1.0  # pixels that a polygon may differ from the mask's edge


def ask(answer: requests.Response) -> dict:
    """What the server answered. Raises RuntimeError with the server's sentence where it refused."""
    if answer.status_code >= 400:
        raise RuntimeError(f"efficientsam serve: {answer.text}")
    return answer.json()


def read_prompts(regions: list[dict], width: int, height: int) -> dict:
    """Label Studio's smart regions, in percent of the image, as the points and boxes that the server takes."""
    points, labels, boxes = [], [], []
    for region in regions:
        value = region["value"]
        x, y = value["x"] * width / 100, value["y"] * height / 100
        if region["type"] == "keypointlabels":
            points.append([x, y])
            labels.append(int(region.get("is_positive", 1)))
        elif region["type"] == "rectanglelabels":
            boxes.append([x, y, x + value["width"] * width / 100, y + value["height"] * height / 100])
    return {"points": points, "labels": labels, "boxes": boxes}


class EfficientSam(LabelStudioMLBase):
    def predict(self, tasks: list[dict], context: dict | None = None, **kwargs) -> list[dict]:
        """The polygons of what is marked in the image of the first task; without a mark there are none."""
        marks = (context or {}).get("result")
        if not marks:
            return []
        name, control = next(
            (name, one) for name, one in self.parsed_label_config.items() if one["type"] == "PolygonLabels"
        )
        url = tasks[0]["data"][control["inputs"][0]["value"]]
        path = Path(self.get_local_path(url, task_id=tasks[0].get("id")))
        image = ask(requests.post(f"{SERVER}/images", files={"file": (path.name, path.read_bytes())}))
        size = image["width"], image["height"]
        prompts = read_prompts(marks, *size)
        if not prompts["boxes"] and 1 not in prompts["labels"]:  # the background alone shows no object
            return []
        asked = {**prompts, "format": "polygons", "tolerance": TOLERANCE}
        found = ask(requests.post(f"{SERVER}/images/{image['id']}/masks", json=asked))
        masks = [one["masks"][0] for one in found["objects"]]
        label = marks[-1]["value"][marks[-1]["type"]]
        common = {"from_name": name, "to_name": control["to_name"][0], "type": "polygonlabels", "image_rotation": 0}
        common |= {"original_width": size[0], "original_height": size[1]}
        regions = [one for mask in masks for one in regions_of(mask, label, size, common)]
        score = min((mask["score"] for mask in masks), default=0)
        return [{"result": regions, "score": score, "model_version": "efficientsam"}]


def regions_of(mask: dict, label: list[str], size: tuple[int, int], common: dict) -> list[dict]:
    """A region for each part of a mask; further parts name the first as their parent."""
    regions = []
    for flat in mask["segmentation"]:
        points = [[100 * x / size[0], 100 * y / size[1]] for x, y in zip(flat[::2], flat[1::2], strict=True)]
        region = {**common, "id": uuid4().hex[:10], "score": mask["score"]}
        region["value"] = {"points": points, "closed": True, "polygonlabels": label}
        regions.append({**region, "parentID": regions[0]["id"]} if regions else region)
    return regions
