"""Files for labelme and Label Studio, read by these tools' own code, which is installed into a folder of its own."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from installed import install
from PIL import Image

from hf_efficientsam import SegmentationResult
from hf_efficientsam.inference.results import boxes_from_masks_np

HEIGHT, WIDTH = 150, 200
LABELME = ["labelme==6.3.1", "tifffile", "loguru"]
LABEL_STUDIO = [
    "label-studio-sdk==2.1.2",
    "xmljson",
    "jsf",
    "faker",
    "smart_open",
    "wrapt",
    "rstr",
    "lxml",
    "PyJWT",
    "appdirs",
]
READ_BY_LABELME = """
import json, sys
from unittest.mock import MagicMock

for name in ("PyQt5", "PyQt5.QtCore", "PyQt5.QtGui", "PyQt5.QtWidgets", "imgviz", "imgviz.io"):
    sys.modules[name] = MagicMock()  # of its windows
from labelme import LabelFile

shapes = LabelFile(sys.argv[1]).shapes
print(json.dumps([{key: shape[key] for key in ("label", "points", "group_id", "shape_type")} for shape in shapes]))
"""
READ_BY_LABEL_STUDIO = """
import json, sys
from label_studio_sdk.label_interface import LabelInterface

task = json.load(open(sys.argv[1]))
interfaces = map(LabelInterface, sys.argv[2:])
print(json.dumps([interface.validate_prediction(task["predictions"][0]) for interface in interfaces]))
"""
INTERFACE = (
    '<View><Image name="image" value="$image"/><PolygonLabels name="label" toName="image">{}</PolygonLabels></View>'
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def result() -> SegmentationResult:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5

    def disc(radius, x, y):
        return (columns - x) ** 2 + (rows - y) ** 2 < radius**2

    ring, two_parts = disc(40, 60, 60) & ~disc(15, 60, 60), disc(20, 150, 40) | disc(18, 150, 110)
    masks, scores = np.stack([ring, two_parts]), np.float32([0.9, 0.8])
    return SegmentationResult(masks, scores, scores, boxes_from_masks_np(masks), ["dog", "cat"])


def read(code: str, packages: list[str], tmp_path, *arguments) -> list:
    """What `code` prints in a process that has these packages beside the tests' own."""
    site = tmp_path / "site"
    install(site, *packages)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_labelme_reads_labels_parts_and_polygons(result, tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.jpg")
    content = result.labelme("a.jpg")
    (tmp_path / "a.json").write_text(json.dumps(content))
    shapes = read(READ_BY_LABELME, LABELME, tmp_path, tmp_path / "a.json")
    assert [(one["label"], one["group_id"]) for one in shapes] == [("dog", None), ("cat", 2), ("cat", 2)]
    assert [one["points"] for one in shapes] == [one["points"] for one in content["shapes"]]
    assert {one["shape_type"] for one in shapes} == {"polygon"}


def test_label_studio_takes_the_prediction_of_an_interface_with_its_labels(result, tmp_path):
    (tmp_path / "task.json").write_text(json.dumps(result.label_studio("/data/a.jpg")))
    interfaces = [
        INTERFACE.format("".join(f'<Label value="{label}"/>' for label in labels))
        for labels in (["dog", "cat"], ["dog", "horse"])
    ]
    assert read(READ_BY_LABEL_STUDIO, LABEL_STUDIO, tmp_path, tmp_path / "task.json", *interfaces) == [True, False]
