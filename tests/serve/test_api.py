import io
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tiny
from commands import assert_refused, noise, run
from fastapi.testclient import TestClient
from pycocotools import mask as coco_mask
from script_runs import free_port

from hf_efficientsam import EfficientSamMaskGenerator, EfficientSamPredictor
from hf_efficientsam.inference.formats.polygons import mask_of_polygons
from hf_efficientsam.inference.uploads import MAX_FILE_BYTES, MAX_OBJECTS, MAX_POINTS
from hf_efficientsam.serve.api import create_app
from hf_efficientsam.serve.service import EncodedImages, Service, UnknownImage

PROMPTS = {"points": [[20, 20], [50, 35]], "labels": [1, 0]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("checkpoint"), tiny.model(), tiny.processor())


@pytest.fixture
def service(checkpoint) -> Service:
    return Service(str(checkpoint), max_pixels=10_000)


@pytest.fixture
def client(service) -> TestClient:
    return TestClient(create_app(service))


def photo(kind: str = "PNG", **options) -> bytes:
    """The file of an image of 60 x 40 pixels; other `options` of `noise` make another one."""
    content = io.BytesIO()
    noise(**options).save(content, kind)
    return content.getvalue()


def send(client: TestClient, content: bytes | None = None) -> str:
    answer = client.post("/images", files={"file": ("photo.png", content or photo())})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def assert_problem(answer, status: int, words: str) -> None:
    """One sentence that matches `words`, and nothing else."""
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"detail"} and re.search(words, answer.json()["detail"]), answer.text
    assert "\n" not in answer.json()["detail"]


def test_masks_are_those_of_the_predictor(client, checkpoint):
    answer = client.post("/images", files={"file": ("photo.png", photo())}).json()
    assert (answer["width"], answer["height"]) == (60, 40)
    predictor = EfficientSamPredictor.from_pretrained(str(checkpoint))
    predictor.set_image(noise())
    masks, scores = predictor.segment_candidates([PROMPTS["points"]], [PROMPTS["labels"]])
    for candidates, count in ((False, 1), (True, 3)):
        found = client.post(f"/images/{answer['id']}/masks", json=PROMPTS | {"candidates": candidates}).json()
        (one,) = found["objects"]
        assert [mask["score"] for mask in one["masks"]] == pytest.approx(scores[0, :count].clip(0, 1), abs=1e-4)
        for mask, expected in zip(one["masks"], masks[0], strict=False):
            assert (coco_mask.decode(mask["segmentation"]) == expected).all() and mask["area"] == expected.sum()
            assert mask["bbox"] == coco_mask.toBbox(mask["segmentation"]).tolist()


def test_a_box_beyond_the_image_is_clipped_and_the_answer_says_so(client):
    path = f"/images/{send(client)}/masks"
    beyond, clipped = (client.post(path, json={"boxes": [box]}).json() for box in ([-3, 5, 61, 30], [0, 5, 60, 30]))
    assert beyond["objects"] == clipped["objects"] and not clipped["warnings"]
    assert beyond["warnings"] == ["a box reaches beyond the image; such boxes are clipped to their image."]


def test_polygons_enclose_the_same_pixels_as_rle(client):
    path = f"/images/{send(client)}/masks"
    prompts = {"boxes": [[10, 5, 50, 35], [0, 0, 30, 30]]}
    rles, polygons = (
        [one["masks"][0]["segmentation"] for one in client.post(path, json=prompts | form).json()["objects"]]
        for form in ({}, {"format": "polygons"})
    )
    assert len(rles) == len(polygons) == 2
    for rle, parts in zip(rles, polygons, strict=True):
        filled = mask_of_polygons([np.reshape(part, (-1, 2)) for part in parts], 40, 60)
        assert filled.any() and (filled == coco_mask.decode(rle)).all()
    coarse = client.post(path, json=prompts | {"format": "polygons", "tolerance": 2}).json()["objects"]
    assert len(json.dumps(coarse)) < len(json.dumps(polygons))


def test_separate_points_are_objects_of_their_own(client):
    points = {"points": [[20, 20], [50, 35]], "separate_points": True}
    assert len(client.post(f"/images/{send(client)}/masks", json=points).json()["objects"]) == 2


def test_everything_is_what_the_mask_generator_finds(client, service):
    options = {"points_per_side": 3, "pred_iou_thresh": 0, "stability_score_thresh": 0}
    found = client.post(f"/images/{send(client)}/everything", json=options).json()["objects"]
    expected = EfficientSamMaskGenerator(service.model, service.processor, output_mode="coco_rle", **options)
    records = expected.generate(noise())
    assert records and [one["masks"][0]["segmentation"] for one in found] == [one["segmentation"] for one in records]


def test_an_image_is_encoded_once(client, service, monkeypatch):
    encoded = []
    encode = EfficientSamPredictor._encode
    monkeypatch.setattr(EfficientSamPredictor, "_encode", lambda *args: encoded.append(1) or encode(*args))
    first = send(client)
    client.post(f"/images/{first}/masks", json=PROMPTS)
    assert send(client) == first and len(encoded) == 1
    assert send(client, photo(seed=1)) != first and len(encoded) == 2
    assert len(service.images) == 2


def test_images_asked_about_last_are_kept(service):
    images = EncodedImages(max_images=2, max_bytes=10**9)
    _, predictor = service.encode(photo(), "photo.png")
    for name in ("a", "b"):
        images.add(name, predictor)
    images.get("a")
    images.add("c", predictor)
    assert len(images) == 2 and images.get("a") and images.get("c")
    with pytest.raises(UnknownImage, match="no image b here"):
        images.get("b")


def test_images_have_a_limit_of_bytes_that_the_last_one_may_exceed(service):
    _, predictor = service.encode(photo(), "photo.png")
    size = predictor.features.nbytes + 60 * 40 * 3
    images = EncodedImages(max_images=100, max_bytes=2 * size)
    for name in "abc":
        images.add(name, predictor)
    assert len(images) == 2 and images.num_bytes == 2 * size
    images = EncodedImages(max_images=100, max_bytes=1)
    images.add("a", predictor)
    assert len(images) == 1


def test_an_image_that_is_deleted_is_gone(client):
    image = send(client)
    assert client.delete(f"/images/{image}").status_code == 204
    for answer in (client.post(f"/images/{image}/masks", json=PROMPTS), client.delete(f"/images/{image}")):
        assert_problem(answer, 404, rf"no image {image} here .*POST /images")


def test_wrong_files_get_a_sentence(client):
    for content, words in (
        (b"", r"^photo\.png: the file is empty"),
        (photo()[:200], r"^photo\.png cannot be read as an image"),
        (photo("EPS"), r"^photo\.png: EPS is not taken here"),
        (photo(width=101, height=100), r"^photo\.png: 101 x 100 pixels are too many; up to 0\.01 million"),
    ):
        assert_problem(client.post("/images", files={"file": ("photo.png", content)}), 422, words)
    assert_problem(client.post("/images", data={"other": "1"}), 422, r"^body\.file: Field required\.$")


def test_requests_that_are_too_large_get_a_sentence(client):
    content = bytes(MAX_FILE_BYTES + 1)
    assert_problem(client.post("/images", files={"file": ("photo.png", content)}), 413, "may have 20 MB")
    chunks = (bytes(2**20) for _ in range(21))  # whose length is not known before
    header = {"content-type": "multipart/form-data; boundary=x"}
    assert_problem(client.post("/images", content=chunks, headers=header), 413, "may have 20 MB")


def test_wrong_prompts_get_a_sentence(client):
    path = f"/images/{send(client)}/masks"
    for prompts, words in (
        ({}, "nothing to segment"),
        ({"points": [[5, 5]], "labels": [0]}, "nothing to segment"),
        ({"points": "everywhere"}, r"^body\.points: Input should be a valid list\.$"),
        ({"points": [[5]]}, r"body\.points\.0: "),
        ({"points": [[5, 5]], "labels": [1, 0]}, "one label for each of the 1 points"),
        ({"points": [[5, 5]], "labels": [2]}, r"body\.labels\.0: "),
        ({"points": [[500, 5]]}, "outside"),
        ({"boxes": [[0, 0, 9, 9]] * (MAX_OBJECTS + 1)}, "up to 64 objects"),
        ({"points": [[5, 5]] * (MAX_OBJECTS + 1), "separate_points": True}, "up to 64 objects"),
        ({"points": [[5, 5]] * (MAX_POINTS + 1)}, "up to 1024 points"),
        ({"points": [[5, 5]], "tolerance": -1}, r"body\.tolerance: "),
        ({"point": [[5, 5]]}, r"body\.point: Extra inputs are not permitted"),
    ):
        assert_problem(client.post(path, json=prompts), 422, words)
    header = {"content-type": "application/json"}
    assert_problem(client.post(path, content=b'{"points": [[NaN, 5]]}', headers=header), 422, "finite numbers")
    assert_problem(client.post(path, content=b"{", headers=header), 422, "JSON decode error")


def test_wrong_options_of_everything_get_a_sentence(client):
    path = f"/images/{send(client)}/everything"
    assert_problem(client.post(path, json={"points_per_side": 33}), 422, "less than or equal to 32")
    assert_problem(client.post(path, json={"pred_iou_thresh": 2}), 422, "pred_iou_thresh")


def test_a_model_without_background_points_says_so(tmp_path):
    tiny.save(tmp_path, tiny.official_model(), tiny.processor())
    client = TestClient(create_app(Service(str(tmp_path))))
    assert client.get("/model").json()["background_points"] is False
    assert_problem(client.post(f"/images/{send(client)}/masks", json=PROMPTS), 422, "takes no background points")


def test_the_model_is_described(client, checkpoint):
    assert client.get("/health").json()["status"] == "ok"
    answer = client.get("/model").json()
    assert answer["name"] == str(checkpoint) and answer["dtype"] == "float32" and answer["max_pixels"] == 10_000


def test_openapi_documents_paths_problems_and_fields(client):
    document = client.get("/openapi.json").json()
    assert {(path, method) for path, methods in document["paths"].items() for method in methods} == {
        ("/health", "get"),
        ("/model", "get"),
        ("/images", "post"),
        ("/images/{image_id}", "delete"),
        ("/images/{image_id}/masks", "post"),
        ("/images/{image_id}/everything", "post"),
    }
    responses = document["paths"]["/images/{image_id}/masks"]["post"]["responses"]
    for status in ("404", "413", "422"):
        schema = responses[status]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/Problem"}
    assert document["components"]["schemas"]["Prompts"]["properties"].keys() >= {"points", "labels", "boxes"}


@pytest.mark.slow
def test_the_command_serves_and_stops(checkpoint):
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        assert_refused(run("serve", "--model", checkpoint, "--port", port), f"port {port} of 127.0.0.1", "--port")
    command = [sys.executable, "-m", "hf_efficientsam.cli.main", "serve", "--model", checkpoint, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == f"Serving {checkpoint} at http://127.0.0.1:{port}\n"
            assert json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=300))["status"] == "ok"
            process.send_signal(signal.SIGINT)
            assert process.wait(300) == 130 and process.stderr.read() == "efficientsam: stopped by Ctrl+C\n"
        finally:
            process.kill()
