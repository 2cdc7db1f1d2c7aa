"""The web demo while it computes, in a real browser: what takes long is held where a test needs it."""

import base64
import re
import time

import pytest
from demo_visitor import BUS_BOX, PHONE, click, copy_code, download, drag, mode, pick_example, picture, same, spot
from playwright.sync_api import expect

pytestmark = pytest.mark.slow


def wait_for_progress(page, what: str) -> None:
    """Waits until the page shows that `what` is under way, and a part of it done."""
    page.locator("#progress").get_by_text(re.compile(rf"{what}.*[1-9]\d?\.\d%")).wait_for()
    page.get_by_role("progressbar", name=what).wait_for()


def computations_of(page) -> list[str]:
    """The requests to compute something that the page sends from now on."""
    sent = []
    page.on("request", lambda request: sent.append(request.url) if "/queue/join" in request.url else None)
    return sent


def press_stop(page) -> None:
    with page.expect_response("**/run/**"):
        page.get_by_role("button", name="Stop", exact=True).click()


def test_a_search_shows_how_far_it_is_runs_once_and_can_be_stopped(visit, hold):
    page = visit()
    pick_example(page).wait_for()
    click(page, 400, 220)
    mode(page, "Everything")
    version = page.locator(".stage").get_attribute("data-version")
    find, stop = (page.get_by_role("button", name=name, exact=True) for name in ("Find everything", "Stop"))
    expect(stop).not_to_be_visible()
    asked = computations_of(page)
    with hold():
        find.evaluate("(button) => { button.click(); button.click(); }")  # the second before gradio has seen the first
        wait_for_progress(page, "Find everything")
        for name in ("Find everything", "Mask", "Other picture"):
            expect(page.get_by_role("button", name=name, exact=True)).to_be_disabled()
        press_stop(page)
    page.locator("#status").get_by_text("Stopped; nothing was changed.").wait_for()
    expect(stop).not_to_be_visible()
    expect(find).to_be_enabled()
    expect(page.locator("#objects button")).to_have_count(1)
    expect(page.get_by_role("progressbar")).not_to_be_visible()
    assert len(asked) == 1 and int(page.locator(".stage").get_attribute("data-version")) == int(version) + 1


def test_a_download_shows_how_far_it_is_is_made_once_and_can_be_stopped(visit, hold):
    page = visit()
    pick_example(page).wait_for()
    drag(page, *BUS_BOX)
    drag(page, 20, 20, 200, 200)
    files = []
    page.on("download", lambda file: files.append(file))
    cut = page.get_by_role("button", name="Cut-out", exact=True)
    asked = computations_of(page)
    with hold():
        cut.evaluate("(button) => { button.click(); button.click(); }")
        wait_for_progress(page, "Making the download: Cut-out")
        expect(cut).to_be_disabled()
        press_stop(page)
    expect(cut).to_be_enabled()
    assert len(asked) == 1 and not files
    assert download(page, "Mask")[0] == "bus_mask.png"


def test_on_a_phone_progress_and_stop_are_in_sight_where_the_picture_is_not(visit, hold):
    page = visit(**PHONE)
    pick_example(page).wait_for()
    mode(page, "Everything")
    with hold():
        page.get_by_role("button", name="Find everything").tap()
        wait_for_progress(page, "Find everything")
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        expect(page.locator(".stage")).not_to_be_in_viewport()
        expect(page.get_by_role("progressbar")).to_be_in_viewport(ratio=1)
        expect(page.get_by_role("button", name="Stop", exact=True)).to_be_in_viewport(ratio=1)
        press_stop(page)
    expect(page.locator("#status")).to_contain_text("Stopped")


def test_nothing_moves_and_nothing_can_be_pressed_that_has_no_effect(visit):
    page = visit()
    pick_example(page).wait_for()
    page.wait_for_timeout(500)
    frame = page.locator(".stage").bounding_box()
    assert frame["width"] > 700  # the photograph has 640 pixels
    names = ("Undo", "Redo", "Clear", "New object", "Remove", "Mask", "Cut-out", "Label map", "COCO", "RLE")
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
        expect(button).to_be_enabled(enabled=name != "Redo")


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


def test_no_click_is_lost_while_something_else_is_computed(visit, hold):
    """Clicks in quick succession are requests of their own, which may overtake each other on a busy computer."""
    page = visit()
    pick_example(page).wait_for()
    mode(page, "Everything")
    with hold():
        page.get_by_role("button", name="Find everything").click()
        wait_for_progress(page, "Find everything")
        mode(page, "Points")
        places = [[300 + 20 * i, 200] for i in range(4)]
        for place in places:
            page.locator(".stage").click(position=spot(page, *place))
    copy_code(page, "point_labels=[1, 1, 1, 1]", *map(str, places))
