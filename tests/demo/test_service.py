import warnings
from pathlib import Path
from unittest.mock import Mock

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from hf_efficientsam.demo import service
from hf_efficientsam.demo.outputs import python_code
from hf_efficientsam.demo.scene import Finding
from hf_efficientsam.demo.service import Demo
from hf_efficientsam.inference.prompters import Detector, SalientPrompter


def status_of(view: list) -> str:
    """Of what `Demo.view` returns, the line with what is to be said."""
    return next(one for one in view if isinstance(one, str) and 'role="status"' in one)


@pytest.fixture(scope="module")
def demo(tiny_model) -> Demo:
    return Demo(str(tiny_model), max_pixels=20_000)


@pytest.fixture(autouse=True)
def upload_folder(photo, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(photo.parent))


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(path)
    return path


def test_visitors_share_the_model_and_nothing_else(demo, photo):
    first, second = demo.open(photo, "first.png"), demo.open(photo, "second.png")
    assert first.predictor.model is second.predictor.model
    assert first.predictor is not second.predictor and first.lock is not second.lock
    demo.act(first, lambda session: session.add_point(0.5, 0.5))
    assert len(first.objects) == 1 and not second.objects


def test_sentences_about_files(demo, photo, tmp_path):
    Image.new("RGB", (201, 100)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"^large.png: 201 x 100 pixels are too many; up to 0.02 million are taken"):
        demo.open(tmp_path / "a.png", "../large.png")
    (tmp_path / "b.png").write_bytes(photo.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"^broken.png cannot be read as an image"):
        demo.open(tmp_path / "b.png", "C/broken.png")
    with pytest.raises(ValueError, match="there is no picture"):
        demo.open_upload(None)
    for other in ({"path": str(tmp_path / "a.png")}, {"path": None}, {}, "a.png"):  # of this computer, or nonsense
        with pytest.raises(ValueError, match=r"^(the picture must be uploaded first|there is no picture)"):
            demo.open_upload(other)


def test_the_page_reduces_large_images_and_the_api_refuses_them(demo, tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.linear_gradient("L").resize((400, 200)).save(path)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    upload = {"path": str(path), "orig_name": "large.png"}
    session = demo.open_upload(upload, reduce=True)
    assert (session.width, session.height) == (200, 100) and session.reduced_from == (400, 200)
    view = demo.act(session, lambda session: session.set_box(0.1, 0.1, 0.7, 0.9))
    assert "200 x 100 pixels (reduced from 400 x 200)" in status_of(view)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(python_code(session), scope)
    assert (scope["masks"][0] == session.result().masks[0]).all()
    with pytest.raises(ValueError, match="are too many"):
        demo.segment(upload, boxes=[[0, 0, 9, 9]])
    monkeypatch.setattr(service, "MAX_PIXELS_READ", 70_000)
    with pytest.raises(ValueError, match=r"400 x 200 pixels are too many; up to 0.07 million"):
        demo.open_upload(upload, reduce=True)


def test_what_takes_long_reports_how_far_it_is_and_is_stopped_without_a_change(demo, photo):
    session, progress = demo.open(photo, "photo.png"), Mock()
    session.set_box(0.1, 0.1, 0.9, 0.9)
    before = session.scene

    def find(session):
        demo.find_everything(session, 12, 0.0, 0.0, demo.reporter(session, progress, "Find everything"))

    demo.act(session, find)
    ratios = [call.args[0] for call in progress.call_args_list]
    assert ratios == sorted(ratios) and session.scene != before
    assert ratios[0] == 0 and 0 < ratios[1] < 0.5  # before batches of points,
    assert 0.5 in ratios and ratios[-1] == 1  # before the first mask, and after the last
    assert "min_mask_region_area=3" in python_code(session)  # of 90 x 60 pixels
    session.undo()
    progress.side_effect = lambda ratio, desc: session.stopping.set()  # the visitor presses Stop
    with warnings.catch_warnings(action="error", category=UserWarning):  # who presses Stop is not warned of it
        status = status_of(demo.act(session, find))
    assert "<b>Stopped; nothing was changed." in status and session.scene == before
    session.stopping.clear()
    progress.side_effect = lambda ratio, desc: session.stopping.set() if ratio == 0.9 else None  # after the last mask
    assert demo.save(session, "mask", progress) == gr.skip()


def test_a_preview_never_waits(demo, photo):
    session = demo.open(photo, "photo.png")
    assert demo.preview(session, 0.5, 0.5)["url"].startswith("data:image/png;base64,")
    with session.lock:
        assert demo.preview(session, 0.5, 0.5)["url"] == ""
    assert demo.preview(None, 0.5, 0.5)["url"] == "" and session.lock.acquire(blocking=False)


def test_files_that_other_programs_would_read(demo, photo, tmp_path):
    Image.open(photo).save(tmp_path / "a.eps")
    with pytest.raises(ValueError, match=r"^a\.png: EPS is not taken here; AVIF, BMP"):
        demo.open(tmp_path / "a.eps", "a.png")


def test_what_is_wrong_is_said_and_changes_nothing(demo, photo):
    session = demo.open(photo, "photo.png")
    demo.act(session, lambda session: session.add_point(0.5, 0.5))
    before = session.scene
    status = status_of(demo.act(session, lambda session: session.set_box(0.5, 0.5, 0.5, 0.5)))
    assert "A box needs two corners" in status and session.scene == before
    for call in (lambda: demo.act(None, print), lambda: demo.save(None, "mask", Mock())):
        with pytest.raises(gr.Error, match=r"choose|Choose"):
            call()


def test_a_box_beyond_the_picture_is_clipped_and_visitors_and_programs_are_told(demo, photo):
    session = demo.open(photo, "photo.png")
    sentence = "A box reaches beyond the image; such boxes are clipped to their image."
    status = status_of(demo.act(session, lambda session: session.set_box(0.2, 0.2, 0.8, 1.1)))
    assert sentence in status
    status = status_of(demo.act(session, lambda session: session.set_box(0.2, 0.2, 0.8, 1)))
    assert sentence not in status
    upload = {"path": str(photo), "orig_name": "photo.png"}
    with pytest.warns(UserWarning) as said:  # what gr.Warning is outside of a request
        demo.segment(upload, None, None, [[5, 5, 91, 50]])
    assert sentence in [str(one.message) for one in said]


def test_a_download_has_a_name_that_files_can_have_and_a_full_disk_is_said(demo, photo, monkeypatch):
    session = demo.open(photo, "\U00020000" * 100 + ".png")
    session.add_point(0.5, 0.5)
    assert Path(demo.save(session, "labels", Mock())["file"]["path"]).is_file()
    monkeypatch.setattr(service, "save_bytes_to_cache", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(gr.Error, match=r"_labels\.png cannot be made: No space left on device"):
        demo.save(session, "labels", Mock())


def test_modes_that_lack_their_model_say_so(demo, photo, tiny_model):
    session = demo.open(photo, "photo.png")
    with pytest.raises(ValueError, match="--saliency NAME"):  # the tiny model has no head
        demo.find_salient(session, 0.5)
    with pytest.raises(ValueError, match="--detector NAME"):
        demo.find_text(session, "a dog", 0.5)
    with pytest.raises(ValueError, match="no such directory"):
        Demo(str(tiny_model), detector="./nowhere")


def test_programs_get_sentences(demo, photo):
    upload = {"path": str(photo), "orig_name": "photo.png"}
    for points, labels, boxes, sentence in (
        (None, None, None, "nothing to segment"),
        ("everywhere", None, None, "points must be a list"),
        ([[5, 5]], [1, 0], None, "one label for each of the 1 points"),
        (None, None, [[1, 2, 3]], "boxes must be a list"),
        ([[500, 5]], None, None, "outside"),
    ):
        with pytest.raises(ValueError, match=sentence):
            demo.segment(upload, points, labels, boxes)
    with pytest.raises(ValueError, match="up to 32 points"):
        demo.everything(upload, 1000, 0.5, 0.5)
    assert len(demo.segment(upload, [[5, 5], [80, 50]], [1, 0], None)["categories"]) == 1


class FindsHalves(Detector):
    """In place of a detector: the first name is on the left, the second on the right."""

    def __init__(self):
        pass

    def __call__(self, image, names, threshold=None):
        boxes = [[0, 0, image.width / 2, image.height], [image.width / 2, 0, image.width, image.height]]
        return torch.tensor(boxes)[: len(names)], torch.tensor([0.9, 0.8])[: len(names)], names


def test_text(demo, photo, monkeypatch):
    session = demo.open(photo, "photo.png")
    monkeypatch.setattr(demo, "no_detector", "")
    monkeypatch.setattr(demo, "detector", "some/detector")
    monkeypatch.setattr(demo, "detector_model", FindsHalves())
    demo.find_text(session, "a dog, a cat", 0.3)
    assert [one.name for one in session.objects] == ["a dog", "a cat"]
    assert [one.score for one in session.objects] == pytest.approx([0.9, 0.8])
    assert session.objects[0].finding == Finding(
        "text", {"detector": "some/detector", "threshold": 0.3}, "a dog, a cat"
    )
    assert "TextPrompter(predictor, detector='some/detector', threshold=0.3)('a dog, a cat')" in python_code(session)
    found = demo.text({"path": str(photo), "orig_name": "photo.png"}, "a cat", 0.3)
    assert [one["name"] for one in found["categories"]] == ["a cat"]


def test_a_saliency_map_from_elsewhere(tiny_model, photo, monkeypatch):
    left = np.zeros((60, 90), dtype=np.uint8)
    left[:, :45] = 255
    demo = Demo(str(tiny_model))
    session = demo.open(photo, "photo.png")
    monkeypatch.setattr(demo, "no_saliency", "")
    monkeypatch.setattr(demo, "saliency_source", lambda image: left)
    demo.find_salient(session, 0.5)
    assert [one.name for one in session.objects] == ["salient object"]
    found, expected = session.result(), SalientPrompter(session.predictor, lambda image: left)()
    assert found.scores == pytest.approx(expected.scores) and found.iou_scores == pytest.approx(expected.iou_scores)
