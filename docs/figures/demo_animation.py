"""Makes docs/demo.webp, the animated picture of the web demo in the main README.

    python docs/figures/demo_animation.py

Starts `efficientsam demo` with the bundled checkpoint, uses it in Debian's chromium through Playwright (in the extra
`dev`), and writes the frames as an animated WebP. Takes about a minute.
"""

import io
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

OUTPUT = Path(__file__).parents[1] / "demo.webp"
MAX_BYTES = 600_000
BROWSER = "/usr/bin/chromium"
VIEWPORT = {"width": 1280, "height": 720}
OUTPUT_WIDTH = 880
EXAMPLE, EXAMPLE_SIZE = "elephant", (426, 640)
ELEPHANT_BOX, RIDER_BOX = (34, 281, 300, 616), (92, 180, 160, 284)  # x1, y1, x2, y2 in pixels of the example

# Screenshots do not show the mouse pointer, so the page draws one.
POINTER = """
const pointer = document.createElement("div");
pointer.innerHTML = `<svg width="22" height="26" viewBox="0 0 22 26"><path d="M2 2v19l5-5 3 8 4-2-3-7h7z" fill="white"
  stroke="black" stroke-width="1.5"/></svg>`;
pointer.style = "position: fixed; left: -40px; top: 0; z-index: 9999; pointer-events: none";
document.body.append(pointer);
addEventListener("pointermove", (event) => {
  [pointer.style.left, pointer.style.top] = [event.clientX + "px", event.clientY + "px"];
}, true);
"""


class Recorder:
    """Uses the page as a visitor does and keeps frames with the time each is shown."""

    def __init__(self, page: Page):
        self.page = page
        self.frames: list[Image.Image] = []
        self.milliseconds: list[int] = []
        self.position = (VIEWPORT["width"] / 2, VIEWPORT["height"] * 0.8)
        page.evaluate(POINTER)
        page.mouse.move(*self.position)

    def shoot(self, milliseconds: int) -> None:
        frame = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        height = round(frame.height * OUTPUT_WIDTH / frame.width)
        self.frames.append(frame.resize((OUTPUT_WIDTH, height), Image.Resampling.LANCZOS))
        self.milliseconds.append(milliseconds)

    def move(self, x: float, y: float, steps: int = 5) -> None:
        """Moves the pointer to a place of the page, in steps that are each shown."""
        x0, y0 = self.position
        for step in range(1, steps + 1):
            ratio = step / steps
            self.position = (x0 + (x - x0) * ratio, y0 + (y - y0) * ratio)
            self.page.mouse.move(*self.position)
            self.shoot(60)

    def click(self, name: str, role: str = "button", version_changes: bool = True) -> None:
        target = self.page.get_by_role(role, name=name).first
        box = target.bounding_box()
        self.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        if version_changes:
            with self.answered():
                target.click()
        else:
            target.click()
        self.page.wait_for_timeout(500)  # for the page's transitions
        self.shoot(500)

    def drag_box(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """Drags a box on the image, in pixels of the image, and shows its mask."""
        self.move(*self.on_stage(x1, y1))
        with self.answered():
            self.page.mouse.down()
            self.move(*self.on_stage(x2, y2), steps=8)
            self.page.mouse.up()
        self.page.wait_for_timeout(500)
        self.shoot(1500)

    def name_object(self, name: str) -> None:
        field = self.page.get_by_label("Name of the selected object")
        box = field.bounding_box()
        self.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        field.fill(name)
        self.shoot(400)
        with self.answered():
            field.press("Enter")
        self.page.wait_for_timeout(500)
        self.shoot(3000)

    def on_stage(self, x: float, y: float) -> tuple[float, float]:
        stage = self.page.locator(".stage").bounding_box()
        width, height = EXAMPLE_SIZE
        return stage["x"] + x / width * stage["width"], stage["y"] + y / height * stage["height"]

    @contextmanager
    def answered(self) -> Iterator[None]:
        """Waits until the page shows the answer to what is done inside."""
        version = self.page.locator(".stage").get_attribute("data-version")
        yield
        changed = "old => document.querySelector('.stage').dataset.version !== old"
        self.page.wait_for_function(changed, arg=version)

    def save(self, path: Path) -> None:
        first, *others = self.frames
        options = {"save_all": True, "append_images": others, "duration": self.milliseconds, "loop": 0}
        first.save(path, **options, quality=60, method=6)


@contextmanager
def served_demo() -> Iterator[str]:
    """The address of the demo, which runs in a process of its own."""
    command = [sys.executable, "-u", "-c", "from hf_efficientsam.cli.app import app; app()", "demo"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield address[0]
                break
        else:
            raise SystemExit("the demo stopped before it served the page; run `efficientsam demo` to see why")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def main() -> None:
    with served_demo() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=VIEWPORT)
        page.goto(address)
        page.locator("#examples").get_by_role("button", name=EXAMPLE).click()
        page.locator(".stage img").wait_for()
        page.wait_for_timeout(500)

        recorder = Recorder(page)
        recorder.shoot(1000)
        recorder.click("Box", role="tab", version_changes=False)
        recorder.drag_box(*ELEPHANT_BOX)
        recorder.drag_box(*RIDER_BOX)
        recorder.name_object("rider")
        browser.close()
    recorder.save(OUTPUT)
    size = OUTPUT.stat().st_size
    print(f"{OUTPUT}: {len(recorder.frames)} frames, {size / 1000:.0f} kB")
    if size > MAX_BYTES:
        raise SystemExit(f"the animation is larger than {MAX_BYTES / 1000:.0f} kB; lower its quality or width")


if __name__ == "__main__":
    main()
