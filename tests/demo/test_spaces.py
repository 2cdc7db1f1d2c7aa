"""
The web demo in a real browser and through its API, against the predictor's own masks.

EFFICIENTSAM_SCREENSHOTS=1 pytest tests/demo/test_spaces.py writes the pictures of spaces/README.md, too.
"""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from demo_visitor import (
    BUS,
    BUS_BOX,
    PHONE,
    answer,
    click,
    copy_code,
    download,
    drag,
    mode,
    pick_example,
    picture,
    press,
    same,
    screenshot,
    shown,
    spot,
)
from huggingface_hub import SpaceCard
from PIL import ExifTags, Image
from playwright.sync_api import expect
from pycocotools import mask as coco_mask
from scipy.ndimage import binary_dilation
from typer.testing import CliRunner

from hf_efficientsam.cli.app import app

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


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
    problem = page.locator("#problem")
    for path, sentence in (
        (broken, "broken.png cannot be read as an image"),
        (large, "large.png: 10001 x 10000 pixels are too many; up to 100 million are taken here."),
        (bytes_, "maximum allowed size"),
    ):
        page.locator('input[type="file"]').first.set_input_files(path)
        (page if path == bytes_ else problem).get_by_text(sentence).first.wait_for()
        expect(page.locator(".stage")).not_to_be_visible()
        page.get_by_text("Drop Image Here").wait_for()  # for another

    Image.open(BUS).resize((3200, 2000)).save(tmp_path / "reduced.jpg")
    page.locator('input[type="file"]').first.set_input_files(tmp_path / "reduced.jpg")
    page.get_by_text("2190 x 1369 pixels (reduced from 3200 x 2000)").wait_for()
    page.get_by_role("button", name="Other picture").click()
    page.get_by_text("Drop Image Here").wait_for()
    assert not problem.inner_text().strip()

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
