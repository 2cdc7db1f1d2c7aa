"""What a visitor of the web demo does, in a page of Playwright. Places are pixels of examples/bus.jpg."""

import base64
import io
import os
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
BUS, BUS_BOX = ROOT / "examples" / "bus.jpg", (192, 127, 477, 293)


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
