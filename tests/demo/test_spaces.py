"""
The web demo in a real browser and through its API, against the predictor's own masks.

EFFICIENTSAM_SCREENSHOTS=1 pytest tests/demo/test_spaces.py writes the pictures of spaces/README.md, too.
"""

import base64
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from chromium import chromium
from huggingface_hub import SpaceCard
from PIL import ExifTags, Image
from playwright.sync_api import expect
from pycocotools import mask as coco_mask
from scipy.ndimage import binary_dilation
from typer.testing import CliRunner

from hf_efficientsam import EfficientSamPredictor
from hf_efficientsam.cli.app import app

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SWITCHES = ["--disable-gpu", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
BUS, BUS_BOX = ROOT / "examples" / "bus.jpg", (192, 127, 477, 293)
DESK = {"viewport": {"width": 1280, "height": 820}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
expect.set_options(timeout=30_000)


# ------------------------------------------------------------------------------------------------ server and browser


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Where `efficientsam demo` serves, on a free port; at the end no temporary file of its is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("gradio")
    command = [sys.executable, "-c", "from hf_efficientsam.cli.app import app; app()", "demo"]
    log = (folder.parent / "server.log").open("w+")
    process = subprocess.Popen(
        [*command, "--port", str(port), "--max-pixels", "3000000"],
        env={**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    url = f"http://127.0.0.1:{port}/"
    deadline = time.monotonic() + 180
    while url.rstrip("/") not in Path(log.name).read_text():
        assert process.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
        time.sleep(0.2)
    yield url
    said = Path(log.name).read_text()
    assert "--share" in said and "share=True" not in said and "gradio.live" not in said  # no public link unless asked
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert not [path for path in folder.rglob("*") if path.is_file() or "efficientsam" in path.name]
    assert "Traceback" not in Path(log.name).read_text()


@pytest.fixture(scope="module")
def browser():
    with chromium() as start:
        yield start(*SWITCHES)


@pytest.fixture
def visit(browser, server):
    """A function that opens the page as another visitor; at the end nobody must have asked a foreign server."""
    contexts, requests, errors = [], [], []

    def visit(**options):
        context = browser.new_context(**{**DESK, **options})
        context.set_default_timeout(30_000)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not [url for url in requests if not url.startswith((server, "data:", "blob:"))]
    assert not errors


@pytest.fixture(scope="module")
def predictor() -> EfficientSamPredictor:
    predictor = EfficientSamPredictor.from_pretrained()
    predictor.set_image(BUS)
    return predictor


# ------------------------------------------------------------------------------------------------ what a visitor does


def pick_example(page, name: str = "bus"):
    page.locator("#examples").get_by_role("button", name=name).click()
    return page.locator(".stage img")


def spot(page, x: float, y: float) -> dict:
    """A place of bus.jpg, in its pixels, on the stage."""
    frame = page.locator(".stage").bounding_box()
    return {"x": (x + 0.5) / 640 * frame["width"], "y": (y + 0.5) / 427 * frame["height"]}


@contextmanager
def answer(page):
    """Waits until the picture shows the answer to what is done inside. Other parts may follow a moment later."""
    version = page.locator(".stage").get_attribute("data-version")
    yield
    page.wait_for_function("old => document.querySelector('.stage').dataset.version !== old", arg=version)


def click(page, x: float, y: float, **options) -> None:
    with answer(page):
        page.locator(".stage").click(position=spot(page, x, y), **options)


def press(page, button: str) -> None:
    with answer(page):
        page.get_by_role("button", name=button, exact=True).click()


def mode(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def drag(page, x1, y1, x2, y2) -> None:
    frame = page.locator(".stage").bounding_box()
    from_, to = spot(page, x1, y1), spot(page, x2, y2)
    with answer(page):
        page.mouse.move(frame["x"] + from_["x"], frame["y"] + from_["y"])
        page.mouse.down()
        page.mouse.move(frame["x"] + to["x"], frame["y"] + to["y"], steps=3)
        page.mouse.up()


def download(page, button: str) -> tuple[str, bytes]:
    with page.expect_download() as found:
        page.get_by_role("button", name=button, exact=True).click()
    return found.value.suggested_filename, Path(found.value.path()).read_bytes()


def picture(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def shown(page) -> np.ndarray:
    source = page.locator(".stage img").get_attribute("src")
    return picture(base64.b64decode(source.split(",")[1]))


def copy_code(page, *parts: str) -> str:
    """The code from the clipboard, as soon as `parts` are in it."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    if not page.locator(".cm-content").is_visible():
        page.get_by_text("Python for this result").click()
    deadline = time.monotonic() + 60
    while True:
        page.get_by_role("button", name="Copy").first.click()
        code = page.evaluate("navigator.clipboard.readText()")
        if all(part in code for part in parts):
            return code
        assert time.monotonic() < deadline, code
        page.wait_for_timeout(100)


def screenshot(page, name: str) -> None:
    if os.environ.get("EFFICIENTSAM_SCREENSHOTS"):
        page.evaluate("scrollTo(0, 0)")
        page.mouse.move(0, 0)
        page.wait_for_timeout(700)  # for transitions
        page.screenshot(path=ROOT / "spaces" / "screenshots" / f"{name}.jpg", type="jpeg", quality=80)


def same(mask: np.ndarray, other: np.ndarray) -> bool:
    """But for pixels on the edge, which rounding may turn: the server has another number of threads."""
    return mask.shape == other.shape and (mask != other).mean() < 1e-3


# ------------------------------------------------------------------------------------------------ tests


def test_a_click_shows_the_models_mask_where_it_is(visit, predictor):
    page = visit()
    page.get_by_text("boxes work best, and single clicks often miss").wait_for()
    pick_example(page).wait_for()
    click(page, 400, 220)
    masks, scores, _ = predictor.predict([[400, 220]], [1])
    mask = masks[scores.argmax()]

    name, content = download(page, "Mask")
    assert name == "bus_mask.png" and same(picture(content) == 255, mask)
    change = np.abs(shown(page).astype(float) - np.asarray(predictor.image)).mean(axis=2)
    marks = np.zeros_like(mask)
    marks[205:235, 385:415] = True  # the point itself
    assert np.median(change[mask & ~marks]) > 25
    assert np.median(change[~binary_dilation(mask, iterations=8)]) < 4
    expect(page.locator("#candidates small")).to_have_text([f"score {max(0, score):.2f}" for score in scores])
    expect(page.locator("#status")).to_contain_text("640 x 427 pixels · read in", use_inner_text=True)
    screenshot(page, "points")


def test_background_points(visit, predictor):
    page = visit()
    pick_example(page).wait_for()
    click(page, 330, 210)
    click(page, 60, 40, button="right")
    page.get_by_role("radio", name="on the background").check()
    click(page, 600, 400)
    page.get_by_role("radio", name="on the object").check()
    click(page, 450, 220, modifiers=["Shift"])
    copy_code(page, "point_coords=[[330, 210], [60, 40], [600, 400], [450, 220]], point_labels=[1, 0, 0, 0]")


def test_boxes_undo_redo_and_candidates(visit, predictor):
    page = visit()
    pick_example(page).wait_for()
    mode(page, "Box")
    click(page, *BUS_BOX[:2])
    expect(page.locator("#candidates img")).to_have_count(0)
    click(page, *BUS_BOX[2:])
    boxed = picture(download(page, "Mask")[1]) == 255
    screenshot(page, "box")
    masks, scores, _ = predictor.predict(box=np.add(BUS_BOX, (0, 0, 1, 1)))
    assert min((boxed != mask).mean() for mask in masks) < 5e-3  # corners are a pixel or so apart

    drag(page, 200, 140, 470, 280)  # another object, which changes nothing of the first
    expect(page.locator("#objects button")).to_have_count(2)
    both = picture(download(page, "Label map")[1])
    assert both.max() == 2 and (both > 0)[boxed].all()
    press(page, "Undo")
    expect(page.locator("#objects button")).to_have_count(1)
    assert ((picture(download(page, "Mask")[1]) == 255) == boxed).all()
    press(page, "Redo")
    expect(page.get_by_role("button", name="Redo", exact=True)).to_be_disabled()
    press(page, "Undo")
    worst = int(np.argmin(scores))
    with answer(page):
        page.locator("#candidates button").nth(worst).click()
    expect(page.locator("#candidates button").nth(worst)).to_have_attribute("aria-pressed", "true")
    chosen = picture(download(page, "Mask")[1]) == 255
    assert (chosen != boxed).any() and (chosen != masks[worst]).mean() < 5e-3
    press(page, "Clear")
    expect(page.locator("#objects")).to_contain_text("Click on the object that you want", use_inner_text=True)
    press(page, "Undo")
    assert ((picture(download(page, "Mask")[1]) == 255) == chosen).all()


def test_several_named_objects_in_every_format_and_the_code(visit, tmp_path_factory, monkeypatch):
    page = visit()
    pick_example(page).wait_for()
    drag(page, *BUS_BOX)
    name = page.get_by_label("Name of the selected object")
    name.fill("bus")
    with answer(page):
        name.press("Enter")
    press(page, "New object")
    click(page, 100, 80)
    expect(page.locator("#objects button")).to_have_count(2)
    name.fill("door")
    press(page, "New object")  # ends the naming, too
    expect(page.locator("#objects")).to_contain_text("door")

    files = {button: download(page, button)[1] for button in ("Mask", "Cut-out", "Label map", "COCO", "RLE")}
    assert list(tmp_path_factory.getbasetemp().glob("gradio*/efficientsam_*/*/bus_mask.png"))  # as long as it runs
    coco, rle = json.loads(files["COCO"]), json.loads(files["RLE"])
    masks = np.stack([coco_mask.decode(one["segmentation"]) for one in rle["objects"]]).astype(bool)
    assert [one["label"] for one in rle["objects"]] == ["bus", "door"]
    assert [one["name"] for one in coco["categories"]] == ["bus", "door"]
    assert [one["segmentation"] for one in coco["annotations"]] == [one["segmentation"] for one in rle["objects"]]
    assert ((picture(files["Mask"]) == 255) == masks.any(axis=0)).all()
    assert ((picture(files["Cut-out"])[..., 3] == 255) == masks.any(axis=0)).all()
    assert ((picture(files["Label map"]) > 0) == masks.any(axis=0)).all()

    monkeypatch.chdir(BUS.parent)
    scope = {}
    exec(copy_code(page, "[100, 80]"), scope)
    assert all(same(mask, other) for mask, other in zip(scope["masks"], masks, strict=True))
    with answer(page):
        page.locator("#objects button").first.click()
    expect(name).to_have_value("bus")
    press(page, "Remove")
    expect(page.locator("#objects button")).to_have_count(1)


def test_everything_and_salient_objects(visit):
    page = visit()
    pick_example(page).wait_for()
    mode(page, "Everything")
    press(page, "Find everything")
    labels = picture(download(page, "Label map")[1])
    assert 0 < labels.max() <= page.locator("#objects button").count()
    rows, columns = np.nonzero(labels == labels.max())
    middle = len(rows) // 2
    click(page, columns[middle], rows[middle])  # marks that object
    expect(page.locator("#objects button").nth(labels.max() - 1)).to_have_attribute("aria-pressed", "true")
    screenshot(page, "everything")
    copy_code(page, "EfficientSamMaskGenerator")

    mode(page, "Main objects")
    press(page, "Find what stands out")
    copy_code(page, "SalientPrompter")
    expect(page.locator("#objects")).to_contain_text("salient object", use_inner_text=True)
    screenshot(page, "salient")
    assert page.get_by_role("tab", name="Text").count() == 0  # it needs a detector


def test_a_search_shows_how_far_it_is_runs_once_and_can_be_stopped(visit):
    page = visit()
    pick_example(page).wait_for()
    click(page, 400, 220)
    mode(page, "Everything")
    page.get_by_label("How closely to look").first.fill("32")
    version = page.locator(".stage").get_attribute("data-version")
    find, stop = (page.get_by_role("button", name=name, exact=True) for name in ("Find everything", "Stop"))
    assert stop.is_disabled()
    find.evaluate("(button) => { button.click(); button.click(); }")  # the second before gradio has seen the first
    page.get_by_role("progressbar", name="Find everything").wait_for()
    for name in ("Find everything", "Mask", "Other picture"):
        expect(page.get_by_role("button", name=name, exact=True)).to_be_disabled()
    stop.click()
    page.locator("#status").get_by_text("Stopped; nothing was changed.").wait_for()
    page.wait_for_function("[...document.querySelectorAll('button')].find((b) => b.innerText === 'Stop').disabled")
    expect(find).to_be_enabled()
    expect(page.locator("#objects button")).to_have_count(1)
    page.wait_for_timeout(1500)  # a second search would still run
    assert int(page.locator(".stage").get_attribute("data-version")) == int(version) + 1
    expect(page.get_by_role("progressbar")).not_to_be_visible()


def test_nothing_moves_and_nothing_can_be_pressed_that_has_no_effect(visit):
    page = visit()
    pick_example(page).wait_for()
    page.wait_for_timeout(500)
    frame = page.locator(".stage").bounding_box()
    assert frame["width"] > 700  # the photograph has 640 pixels
    names = ("Undo", "Redo", "Clear", "Stop", "New object", "Remove", "Mask", "Cut-out", "Label map", "COCO", "RLE")
    buttons = {name: page.get_by_role("button", name=name, exact=True) for name in names}
    assert all(button.is_disabled() for button in buttons.values())
    places = []
    for name in ("Points", "Box", "Everything", "Main objects"):
        mode(page, name)
        page.wait_for_timeout(300)
        places.append(page.locator(".stage").bounding_box())
    drag(page, *BUS_BOX)
    places.append(page.locator(".stage").bounding_box())
    assert all(place == frame for place in places)
    for name, button in buttons.items():
        expect(button).to_be_enabled(enabled=name not in ("Redo", "Stop"))


def test_the_mask_under_the_mouse_is_shown_before_a_click(visit, predictor):
    page = visit()
    pick_example(page).wait_for()
    frame, place = page.locator(".stage").bounding_box(), spot(page, 400, 220)
    page.mouse.move(frame["x"] + 5, frame["y"] + 5)
    page.mouse.move(frame["x"] + place["x"], frame["y"] + place["y"])
    preview = page.locator(".stage .preview")
    masks, scores, _ = predictor.predict([[400, 220]], [1], mask_size=(342, 512))
    deadline = time.monotonic() + 30
    while True:  # the last place counts, though a preview of the first may come before
        style = preview.get_attribute("style") or ""
        if "base64," in style:
            drawn = picture(base64.b64decode(style.split("base64,")[1].split('"')[0])) > 0
            if same(drawn, masks[scores.argmax()]):
                break
        assert time.monotonic() < deadline
        page.wait_for_timeout(100)
    assert preview.is_visible() and page.locator("#objects button").count() == 0
    mode(page, "Box")
    page.locator(".stage").hover(position=spot(page, 300, 200))
    page.wait_for_timeout(500)
    expect(preview).not_to_be_visible()


def test_no_click_is_lost_while_something_else_is_computed(visit):
    """Clicks in quick succession are requests of their own, which may overtake each other on a busy computer."""
    page = visit()
    pick_example(page).wait_for()
    mode(page, "Everything")
    page.get_by_role("button", name="Find everything").click()
    mode(page, "Points")
    places = [[300 + 20 * i, 200] for i in range(4)]
    for place in places:
        page.locator(".stage").click(position=spot(page, *place))
    copy_code(page, "point_labels=[1, 1, 1, 1]", *map(str, places))


def test_without_a_mouse(visit):
    page = visit()
    page.locator("#examples button").nth(1).press("Enter")
    stage = page.locator(".stage")
    stage.wait_for()
    stage.focus()
    for key in ("ArrowRight", "ArrowDown", "Shift+ArrowLeft"):
        page.keyboard.press(key)
    with answer(page):
        page.keyboard.press("Enter")
    with answer(page):
        page.keyboard.press("b")
    copy_code(page, "point_coords=[[336, 226], [336, 226]], point_labels=[1, 0]")
    page.get_by_role("button", name="Undo", exact=True).focus()
    with answer(page):
        page.keyboard.press("Enter")
    copy_code(page, "point_labels=[1])")


def test_uploads_good_broken_and_too_large(visit, tmp_path):
    broken, large, bytes_ = (tmp_path / name for name in ("broken.png", "large.png", "bytes.png"))
    broken.write_bytes(BUS.read_bytes()[:3000])
    Image.new("L", (10001, 10000)).save(large)
    bytes_.write_bytes(b"\x89PNG" + bytes(21 * 2**20))
    page = visit()
    for path, sentence in (
        (broken, "broken.png cannot be read as an image"),
        (large, "10001 x 10000 pixels are too many; up to 100 million are taken here."),
        (bytes_, "maximum allowed size"),
    ):
        page.locator('input[type="file"]').first.set_input_files(path)
        page.get_by_text(sentence).first.wait_for()
        expect(page.locator(".stage")).not_to_be_visible()
        page.get_by_text("Drop Image Here").wait_for()  # for another

    Image.open(BUS).resize((3200, 2000)).save(tmp_path / "reduced.jpg")
    page.locator('input[type="file"]').first.set_input_files(tmp_path / "reduced.jpg")
    page.get_by_text("2190 x 1369 pixels (reduced from 3200 x 2000)").wait_for()
    page.get_by_role("button", name="Other picture").click()

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # lies on its side
    turned = tmp_path / "it's turned.jpg"
    Image.open(BUS).rotate(90, expand=True).save(turned, exif=exif, quality=95)
    page.locator('input[type="file"]').first.set_input_files(turned)
    page.locator(".stage").wait_for()
    expect(page.locator("#status")).to_contain_text("640 x 427", use_inner_text=True)
    assert np.abs(shown(page).astype(float) - np.asarray(Image.open(BUS))).mean() < 6
    page.get_by_role("button", name="Other picture").click()
    page.locator("#examples").wait_for()
    expect(page.locator(".stage")).not_to_be_visible()


def test_camera_and_clipboard(visit):
    page = visit(permissions=["camera", "clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function(
        "[...document.querySelectorAll('video')].some((video) => video.videoWidth && !video.paused)"
    )
    page.get_by_role("button", name="capture photo").click()
    page.locator(".stage").wait_for()
    with answer(page):
        page.locator(".stage").click()
    expect(page.locator("#candidates img")).to_have_count(3)

    page.get_by_role("button", name="Other picture").click()
    page.evaluate(
        """async () => {
          const canvas = Object.assign(document.createElement("canvas"), { width: 77, height: 55 });
          canvas.getContext("2d").fillRect(0, 0, 30, 30);
          const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
          await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }"""
    )
    page.get_by_role("button", name="Paste from clipboard").click()
    page.get_by_text("77 x 55 pixels").wait_for()


def test_two_visitors_do_not_see_each_other(visit):
    first, second = visit(), visit()
    pick_example(first, "bus").wait_for()
    pick_example(second, "elephant").wait_for()
    click(first, 330, 210)
    expect(first.locator("#objects button")).to_have_count(1)
    expect(second.locator("#objects")).to_contain_text("Click on the object that you want", use_inner_text=True)
    expect(first.locator("#status")).to_contain_text("640 x 427", use_inner_text=True)
    expect(second.locator("#status")).to_contain_text("426 x 640", use_inner_text=True)
    assert picture(download(first, "Mask")[1]).shape == (427, 640)
    expect(second.get_by_role("button", name="Mask", exact=True)).to_be_disabled()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(visit, scheme):
    page = visit(**PHONE, color_scheme=scheme)

    def fits():
        return page.evaluate("document.documentElement.scrollWidth") <= 390

    def hints():
        return page.locator("#desk").inner_text()

    page.locator("#examples button").first.wait_for()
    assert fits() and "tap them" in page.locator(".hint").first.inner_text()
    assert not page.locator("footer .divider").first.is_visible()
    pick_example(page).wait_for()
    frame = page.locator(".stage").bounding_box()
    assert frame["width"] > 300
    for name in ("Points", "Everything", "Main objects", "Box"):
        page.get_by_role("tab", name=name).tap()
        assert fits() and page.locator(".stage").bounding_box() == frame
    assert "Tap two opposite corners, or drag a finger" in hints() and "lick" not in hints() and "mouse" not in hints()
    for corner in (BUS_BOX[:2], BUS_BOX[2:]):
        with answer(page):
            page.locator(".stage").tap(position=spot(page, *corner))
    assert fits() and page.locator(".stage").bounding_box() == frame
    thumbnails = [one.bounding_box() for one in page.locator("#candidates button").all()]
    assert len(thumbnails) == 3 and len({one["y"] for one in thumbnails}) == 1

    client = page.context.new_cdp_session(page)  # Playwright taps, but does not drag fingers
    with answer(page):
        for kind, place in (("touchStart", (520, 160)), ("touchMove", (600, 200)), ("touchEnd", None)):
            at = place and spot(page, *place)
            points = [{"x": frame["x"] + at["x"], "y": frame["y"] + at["y"]}] if at else []
            client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    expect(page.locator("#objects button")).to_have_count(2)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(float, background[4:-1].split(",")[:3])) < 200) == (scheme == "dark")
    if scheme == "light":
        screenshot(page, "phone")


def test_dark(visit):
    page = visit(color_scheme="dark")
    pick_example(page).wait_for()
    drag(page, *BUS_BOX)
    screenshot(page, "dark")


def test_api(server, predictor):
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client = Client(server, verbose=False)
    image = handle_file(str(BUS))
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    names = {
        name: {one["parameter_name"]: one["parameter_has_default"] for one in about["parameters"]}
        for name, about in endpoints.items()
    }
    thresholds = {"points_per_side": True, "pred_iou_thresh": True, "stability_score_thresh": True}
    assert names == {
        "/segment": {"image": False, "points": True, "labels": True, "boxes": True},
        "/everything": {"image": False, **thresholds},
        "/salient": {"image": False, "threshold": True},
        "/text": {"image": False, "text": False, "threshold": True},
    }

    found = client.predict(image, [[400, 220], [10, 10]], [1, 0], None, api_name="/segment")
    (annotation,) = found["annotations"]
    masks, scores, _ = predictor.predict([[400, 220], [10, 10]], [1, 0])
    assert same(coco_mask.decode(annotation["segmentation"]).astype(bool), masks[scores.argmax()])
    assert found["images"][0] == {"id": 1, "file_name": "bus.jpg", "height": 427, "width": 640}

    boxes = client.predict(image, boxes=[list(BUS_BOX), [0, 0, 100, 100]], api_name="/segment")
    assert len(boxes["annotations"]) == 2
    assert client.predict(image, 4, 0.99, 0.99, api_name="/everything")["annotations"] == []
    assert client.predict(image, api_name="/salient")["annotations"]
    with pytest.raises(AppError, match="Nothing to segment"):
        client.predict(image, [], [], [], api_name="/segment")
    with pytest.raises(AppError, match="needs a detector"):
        client.predict(image, "a dog", 0.5, api_name="/text")


def test_the_space_starts_what_its_variables_name(tiny_model, monkeypatch):
    started = []
    monkeypatch.setattr(
        "hf_efficientsam.demo.page.launch_demo", lambda demo, **options: started.append((demo, options))
    )
    monkeypatch.setenv("EFFICIENTSAM_MODEL", str(tiny_model))
    card = SpaceCard.load(ROOT / "spaces" / "README.md").data
    runpy.run_path(str(ROOT / "spaces" / card.app_file), run_name="__main__")
    ((demo, options),) = started
    assert demo.checkpoint == str(tiny_model) and options == {"host": "0.0.0.0", "port": 7860}
    assert f"gradio=={card.sdk_version}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert "hf-efficientsam[demo]" in (ROOT / "spaces" / "requirements.txt").read_text()


def test_command_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("page", "service"):
        monkeypatch.delitem(sys.modules, f"hf_efficientsam.demo.{name}", raising=False)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 2 and 'pip install "hf-efficientsam[demo]"' in result.stderr
