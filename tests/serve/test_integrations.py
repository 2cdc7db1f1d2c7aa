"""The backends in examples/integrations, with the server in this process and a stand-in for Label Studio's package."""

import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import tiny
from commands import HEIGHT, WIDTH, noise
from cvat_sdk.auto_annotation import InteractionFunctionSpec, InteractionResultShape
from cvat_sdk.masks import decode_mask
from fastapi.testclient import TestClient

from hf_efficientsam import EfficientSamPredictor
from hf_efficientsam.inference.formats.polygons import mask_of_polygons, polygons_of_mask
from hf_efficientsam.serve.api import create_app
from hf_efficientsam.serve.service import Service

INTEGRATIONS = Path(__file__).parents[2] / "examples" / "integrations"
PERCENT = np.array([100 / WIDTH, 100 / HEIGHT])
POINT, BACKGROUND, BOX = [20.0, 20.0], [50.0, 35.0], [10.0, 5.0, 50.0, 35.0]


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Service:
    model = tiny.model()
    model.config.mask_generation["stability_score_thresh"] = 0.0  # the masks of random weights are not stable
    return Service(str(tiny.save(tmp_path_factory.mktemp("model"), model, tiny.processor())))


@pytest.fixture
def load(service, monkeypatch):
    """Runs a file of examples/integrations, beside stand-ins for packages; its `requests` are to the server here."""

    def load(file: str, **packages) -> SimpleNamespace:
        client = TestClient(create_app(service))
        packages["requests"] = SimpleNamespace(get=client.get, post=client.post, Response=None)
        for name, package in packages.items():
            monkeypatch.setitem(sys.modules, name.replace("__", "."), package)
        return SimpleNamespace(**runpy.run_path(str(INTEGRATIONS / file)))

    return load


def best_mask(service: Service, **prompts) -> np.ndarray:
    predictor = EfficientSamPredictor(service.model, service.processor)
    predictor.set_image(noise())
    masks, scores, _ = predictor.predict(**prompts)
    return masks[scores.argmax()]


# ------------------------------------------------------------------------------------------------------ Label Studio


class MLBase:
    """In place of `LabelStudioMLBase`, what the backend uses of it."""

    parsed_label_config = {
        "point": {"type": "KeyPointLabels", "to_name": ["image"], "inputs": [{"type": "Image", "value": "photo"}]},
        "label": {"type": "PolygonLabels", "to_name": ["image"], "inputs": [{"type": "Image", "value": "photo"}]},
    }

    def get_local_path(self, url: str, task_id=None) -> str:
        assert task_id == 7
        return url


@pytest.fixture
def label_studio(load, tmp_path):
    noise().save(tmp_path / "photo.png")
    package = SimpleNamespace(LabelStudioMLBase=MLBase)
    backend = load("label_studio/model.py", label_studio_ml=ModuleType("x"), label_studio_ml__model=package)
    tasks = [{"id": 7, "data": {"photo": str(tmp_path / "photo.png")}}]
    return lambda *marks: backend.EfficientSam().predict(tasks, {"result": list(marks)} if marks else None)


def keypoint(point: list[float], positive: int) -> dict:
    x, y = (point * PERCENT).tolist()
    return {"type": "keypointlabels", "is_positive": positive, "value": {"x": x, "y": y, "keypointlabels": ["Cat"]}}


def rectangle(box: list[float]) -> dict:
    (x, y), (width, height) = (box[:2] * PERCENT).tolist(), ((np.array(box[2:]) - box[:2]) * PERCENT).tolist()
    value = {"x": x, "y": y, "width": width, "height": height, "rectanglelabels": ["Cat"]}
    return {"type": "rectanglelabels", "value": value}


@pytest.mark.parametrize(
    ("marks", "prompts"),
    [
        (
            [keypoint(POINT, 1), keypoint(BACKGROUND, 0)],
            {"point_coords": [POINT, BACKGROUND], "point_labels": [1, 0]},
        ),
        ([rectangle(BOX)], {"box": BOX}),
    ],
)
def test_label_studio_gets_the_polygons_of_what_is_marked(label_studio, service, marks, prompts):
    (prediction,) = label_studio(*marks)
    regions = prediction["result"]
    expected = polygons_of_mask(best_mask(service, **prompts), tolerance=1)
    assert len(regions) == len(expected) > 0
    for region, polygon in zip(regions, expected, strict=True):
        assert region["value"]["polygonlabels"] == ["Cat"] and region["type"] == "polygonlabels"
        assert (region["from_name"], region["to_name"]) == ("label", "image")
        assert (region["original_width"], region["original_height"]) == (WIDTH, HEIGHT)
        assert np.array(region["value"]["points"]) == pytest.approx(polygon * PERCENT, abs=1e-3)
    assert {region["parentID"] for region in regions[1:]} <= {regions[0]["id"]}
    assert len({region["id"] for region in regions}) == len(regions)


def test_label_studio_gets_nothing_where_no_object_is_marked(label_studio):
    assert label_studio() == [] and label_studio(keypoint(BACKGROUND, 0)) == []


# -------------------------------------------------------------------------------------------------------------- CVAT


@pytest.fixture
def cvat(load):
    return load("cvat/function.py").create


def mask_of(shape) -> np.ndarray:
    return decode_mask(shape.points, image_width=WIDTH, image_height=HEIGHT)


def test_cvat_gets_the_mask_of_clicks_and_boxes(cvat, service):
    interactor = cvat()
    assert interactor.spec == InteractionFunctionSpec(min_pos_points=0, min_neg_points=0, min_bounding_boxes=0)
    image = interactor.preprocess_image(None, noise())
    for clicks, prompts in (
        ({"pos_points": [POINT], "neg_points": [BACKGROUND], "bounding_box": None}, [POINT, BACKGROUND]),
        ({"pos_points": [], "neg_points": [], "bounding_box": (BOX[:2], BOX[2:])}, None),
    ):
        (found,) = interactor.detect(None, image, SimpleNamespace(**clicks))
        expected = {"point_coords": prompts, "point_labels": [1, 0]} if prompts else {"box": BOX}
        assert isinstance(found, InteractionResultShape) and found.type == "mask"
        assert np.array_equal(mask_of(found), best_mask(service, **expected))
        (attribute,) = found.attributes
        assert attribute.spec_id == 0 and 0 <= float(attribute.value) <= 1
    background_alone = SimpleNamespace(pos_points=[], neg_points=[BACKGROUND], bounding_box=None)
    assert interactor.detect(None, image, background_alone) == []


@pytest.mark.slow
def test_cvat_gets_everything_as_masks_or_polygons(cvat):
    detector = cvat("detector", label="thing")
    (label,) = detector.spec.labels
    assert (label.name, label.id, label.type) == ("thing", 0, "mask")
    context = SimpleNamespace(conf_threshold=0.0, conv_mask_to_poly=False)
    masks = detector.detect(context, noise())
    context.conv_mask_to_poly = True
    polygons = detector.detect(context, noise())
    assert masks and {(one.type.value, one.label_id) for one in masks} == {("mask", 0)}
    assert polygons and {(one.type.value, one.label_id) for one in polygons} == {("polygon", 0)}
    covered = mask_of_polygons([np.reshape(one.points, (-1, 2)) for one in polygons], HEIGHT, WIDTH)
    whole = np.any([mask_of(one) for one in masks], axis=0)
    assert (covered & whole).sum() > 0.8 * (covered | whole).sum()


def test_what_the_server_refuses_is_said(cvat):
    outside = SimpleNamespace(pos_points=[[500, 5]], neg_points=[], bounding_box=None)
    interactor = cvat()
    with pytest.raises(RuntimeError, match=r"^efficientsam serve: .*outside"):
        interactor.detect(None, interactor.preprocess_image(None, noise()), outside)
