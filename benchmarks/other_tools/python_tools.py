"""The calls of the tools in Python: reads and writes what `ask_tools` of table.py says, without this package."""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import osam
from samexporter.efficient_sam_onnx import EfficientSAMONNX
from samexporter.sam_onnx import SegmentAnythingONNX

folder = Path(sys.argv[1])
official = [folder / "official" / f"efficient_sam_{part}.onnx" for part in ("encoder", "decoder")]
sam = [folder / "sam" / f"efficientsam.{part}.onnx" for part in ("encoder", "decoder")]


def blob(file: Path) -> osam.types.Blob:
    """A file where osam looks for what it has downloaded."""
    content = file.read_bytes()
    found = osam.types.Blob(url=file.as_uri(), hash="sha256:" + hashlib.sha256(content).hexdigest())
    Path(found.path).parent.mkdir(parents=True, exist_ok=True)
    Path(found.path).write_bytes(content)
    return found


class Mine(osam._models.EfficientSam30m):
    name = "efficientsam:mine"
    _blobs = dict(zip(("encoder", "decoder"), map(blob, official), strict=True))


osam.apis.registered_model_types.append(Mine)


def ask_osam(path: str, boxes: list) -> list[np.ndarray]:
    image = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)
    embedding, masks = None, []
    for box in boxes:
        prompt = osam.types.Prompt(points=np.reshape(box, (2, 2)), point_labels=np.array([2, 3]))
        request = osam.types.GenerateRequest(model=Mine.name, image=image, image_embedding=embedding, prompt=prompt)
        answer = osam.apis.generate(request)
        embedding, (found,) = answer.image_embedding, answer.annotations
        mask, frame = np.zeros(image.shape[:2], bool), found.bounding_box
        mask[frame.ymin : frame.ymax + 1, frame.xmin : frame.xmax + 1] = found.mask
        masks.append(mask)
    return masks


def x_anylabeling():
    """Its class for SAM, without the package around it, which needs Qt."""
    package = Path(importlib.util.find_spec("anylabeling").origin).parent
    spec = importlib.util.spec_from_file_location("x", package / "services/auto_labeling/sam_onnx.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SegmentAnythingONNX


def caller(kind, files: list[Path], swap_colours: bool):
    """samexporter's classes take BGR; X-AnyLabeling's takes the RGB that it makes of a Qt image. Masks are logits."""

    def ask(path: str, boxes: list) -> list[np.ndarray]:
        image = cv2.imread(path)
        model = kind(*map(str, files))
        embedding = model.encode(cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if swap_colours else image)
        marks = ({"type": "rectangle", "data": box} for box in boxes)
        return [model.predict_masks(embedding, [mark])[0, 0] > 0 for mark in marks]

    return ask


TOOLS = {
    "osam": ask_osam,
    "samexporter-efficient_sam": caller(EfficientSAMONNX, official, swap_colours=False),
    "samexporter-sam": caller(SegmentAnythingONNX, sam, swap_colours=False),
    "x-anylabeling": caller(x_anylabeling(), sam, swap_colours=True),
}

for image in json.loads((folder / "prompts.json").read_bytes()):
    for tool, ask in TOOLS.items():
        masks = np.stack(ask(image["path"], image["boxes"]))
        masks.astype(np.uint8).tofile(folder / "answers" / f"{tool}-{image['name']}")
