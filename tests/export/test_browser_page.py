"""
The page that `export-browser` makes, in a real browser, against the predictor's own masks.

`make browser` builds the page of the bundled checkpoint before, because no test reaches npm's registry.
EFFICIENTSAM_SCREENSHOTS=1 pytest tests/export/test_browser_page.py writes the pictures of spaces/browser, too.
"""

import functools
import http.server
import io
import os
import shutil
import tarfile
import threading
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import pytest
import tiny
from chromium import chromium
from commands import all_files, assert_refused, run
from huggingface_hub import SpaceCard
from onnx import TensorProto, helper, numpy_helper
from PIL import ExifTags, Image

from hf_efficientsam import EfficientSamPredictor
from hf_efficientsam.export import browser_page
from hf_efficientsam.export.browser_page import RUNTIME, export_browser, fetch_runtime
from hf_efficientsam.export.quantize import grid_boxes, mask_iou, store_float16

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / "browser"
EXAMPLES = ROOT / "examples"
BUS_BOX = (192, 127, 477, 293)
SOFTWARE_GPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]
DESK = {"viewport": {"width": 1280, "height": 820}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
# Which lets WebAssembly use threads; the front matter of spaces/browser/README.md asks the Hub for them.
ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


# ------------------------------------------------------------------------------------------------ files and browser


@pytest.fixture(scope="module")
def built() -> Path:
    if not (BUILT / "index.html").is_file():
        pytest.skip("needs the page in build/browser; `make browser` builds it")
    for page in browser_page.PAGE.iterdir():  # as it is now
        if page.is_file():
            assert (BUILT / page.name).read_bytes() == page.read_bytes(), "build/browser is old; run `make browser`"
    return BUILT


@pytest.fixture(scope="module")
def tiny_page(built, tmp_path_factory) -> tuple[Path, Path]:
    """A tiny checkpoint for points and boxes only with masks that differ, and the page of it."""
    model = tiny.one_layer_model()
    tiny.enlarge_weights(model.mask_decoder, std=0.2)
    checkpoint = tiny.save(tmp_path_factory.mktemp("checkpoint"), model.half(), tiny.processor())
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(built / "ort", folder / "ort")
    export_browser(str(checkpoint), folder)
    return checkpoint, folder


@contextmanager
def served(folder: Path, headers: dict[str, str] = {}):  # noqa: B006
    """The address of a plain server of the folder's files."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self):
            for name, value in headers.items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()


@contextmanager
def visit(browser, address: str, **options):
    """The page of a new visitor; nobody may have been asked but its server, and nothing may have gone wrong."""
    context = browser.new_context(**{**DESK, **options})
    context.set_default_timeout(120_000)
    page = context.new_page()
    requests, errors = [], []
    page.on("request", lambda request: requests.append((request.method, request.url)))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(address)
    yield page
    context.close()
    assert not [one for one in requests if one[0] != "GET" or not one[1].startswith((address, "data:", "blob:"))]
    assert not errors


@pytest.fixture(scope="module")
def start():
    with chromium() as start:
        yield start


@pytest.fixture(scope="module")
def browser(start):
    return start("--disable-gpu")


@pytest.fixture(scope="module")
def address(built):
    with served(built, ISOLATED) as address:
        yield address


@pytest.fixture(scope="module")
def predictors() -> dict[str, EfficientSamPredictor]:
    """Of the bundled checkpoint, for each example."""
    predictors = {}
    for name in ("bus", "elephant", "clock"):
        predictors[name] = EfficientSamPredictor.from_pretrained()
        predictors[name].set_image(EXAMPLES / f"{name}.jpg")
    return predictors


# ------------------------------------------------------------------------------------------------ what a visitor does


def wait_until_encoded(page, name: str) -> str:
    """What the page says of the picture of this name then."""
    page.locator(f"#stage[aria-busy=false] img[alt='{name}']").wait_for()
    return page.locator("#status").inner_text()


def pick_example(page, name: str = "bus") -> str:
    page.get_by_role("button", name=name).click()
    return wait_until_encoded(page, f"{name}.jpg")


def spot(page, x: float, y: float) -> dict:
    """A place of the picture, in its pixels, on the stage."""
    frame = page.locator("#stage").bounding_box()
    width, height = page.evaluate("[picture.naturalWidth, picture.naturalHeight]")
    return {"x": x / width * frame["width"], "y": y / height * frame["height"]}


def click(page, x: int, y: int, **options) -> None:
    page.locator("#stage").click(position=spot(page, x + 0.5, y + 0.5), **options)


def drag(page, x1, y1, x2, y2) -> None:
    page.locator("#stage").scroll_into_view_if_needed()
    frame = page.locator("#stage").bounding_box()
    from_, to = spot(page, x1, y1), spot(page, x2, y2)
    page.mouse.move(frame["x"] + from_["x"], frame["y"] + from_["y"])
    page.mouse.down()
    page.mouse.move(frame["x"] + to["x"], frame["y"] + to["y"], steps=3)
    page.mouse.up()


def cutout(page) -> np.ndarray:
    """What is downloaded, `[height, width, 4]`, once there is an answer."""
    with page.expect_download() as found:
        page.get_by_role("button", name="Download cut-out").click()
    return np.asarray(Image.open(io.BytesIO(Path(found.value.path()).read_bytes())))


def mask_of(page) -> np.ndarray:
    return cutout(page)[..., 3] == 255


# The number of pixels that are drawn over the picture.
SHOWN = """() => {
  const { data } = overlay.getContext("2d").getImageData(0, 0, overlay.width, overlay.height);
  return data.filter((value, i) => i % 4 === 3 && value).length;
}"""


def best(predictor, *arguments, **prompt) -> np.ndarray:
    masks, scores, _ = predictor.predict(*arguments, **prompt)
    return masks[scores.argmax()]


def screenshot(page, name: str) -> None:
    if os.environ.get("EFFICIENTSAM_SCREENSHOTS"):
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(300)
        page.screenshot(path=browser_page.PAGE / "screenshots" / f"{name}.jpg", type="jpeg", quality=80)


# ------------------------------------------------------------------------------------------------ the page


@pytest.mark.slow
def test_masks_are_those_of_torch(browser, address, predictors, capsys):
    """Five boxes laid over each photograph, and five clicks in their middles."""
    ious = {}
    with visit(browser, address, viewport={"width": 1280, "height": 1000}) as page:
        for name, predictor in predictors.items():
            status = pick_example(page, name)
            for box in list(grid_boxes(*predictor.image.size))[:9:2]:
                box = (
                    box.clip(20, np.subtract(predictor.image.size, 20).tolist() * 2).round().astype(int)
                )  # corners are round
                drag(page, *box)
                ious[name, "box", *box] = mask_iou(mask_of(page), best(predictor, box=box))
                page.get_by_role("button", name="Clear").click()
                x, y = map(int, (box[:2] + box[2:]) / 2)
                click(page, x, y)
                ious[name, "click", x, y] = mask_iou(mask_of(page), best(predictor, [[x, y]], [1]))
                page.get_by_role("button", name="Clear").click()
            page.get_by_role("button", name="Other picture").click()
    values = np.array(list(ious.values()))
    with capsys.disabled():
        print(f"\n{len(values)} masks: mean IoU with torch {values.mean():.5f}, least {values.min():.5f}; {status}")
    assert values.min() > 0.98, min(ious, key=ious.get)  # of a mask of 600 pixels that is a dozen


@pytest.mark.slow
def test_a_visit(browser, address, predictors):
    """Preview under the mouse, points on object and background, box, undo, candidates, cut-out."""
    predictor = predictors["bus"]
    with visit(browser, address) as page:
        assert "640 x 427 pixels · encoded in" in pick_example(page)
        assert not page.evaluate(SHOWN)
        place = spot(page, 400, 220)
        page.locator("#stage").hover(position=place)
        page.wait_for_function("document.querySelector('#status').innerText.includes('mask in')")
        assert page.evaluate(SHOWN) and page.get_by_role("button", name="Download cut-out").is_disabled()
        page.mouse.move(0, 0)
        page.wait_for_function(f"!({SHOWN})()")

        click(page, 400, 220)
        assert mask_iou(mask_of(page), best(predictor, [[400, 220]], [1])) > 0.98
        click(page, 60, 40, button="right")
        page.locator("[value=background] + span").click()
        click(page, 600, 400)
        points = [[400, 220], [60, 40], [600, 400]]
        picture = cutout(page)
        assert mask_iou(picture[..., 3] == 255, best(predictor, points, [1, 0, 0])) > 0.98
        inside = picture[..., 3] == 255
        assert np.abs(picture[inside][:, :3].astype(int) - np.asarray(predictor.image)[inside]).mean() < 1

        page.get_by_role("button", name="Undo").click()
        assert mask_iou(mask_of(page), best(predictor, points[:2], [1, 0])) > 0.98
        page.get_by_role("button", name="Clear").click()
        drag(page, *BUS_BOX)
        boxed = mask_of(page)
        assert mask_iou(boxed, best(predictor, box=np.array(BUS_BOX))) > 0.98
        page.mouse.move(0, 0)
        page.locator("[value=object] + span").click()
        screenshot(page, "wide")
        masks, scores, _ = predictor.predict(box=np.array(BUS_BOX))
        worst = int(scores.argmin())
        page.locator("#candidates button").nth(worst).click()
        assert mask_iou(mask_of(page), masks[worst]) > 0.98
        status = page.locator("#status").inner_text()
        assert "mask in" in status and "WebAssembly, " in status


@pytest.mark.slow
def test_a_phone(browser, tiny_page):
    with served(tiny_page[1]) as address, visit(browser, address, **PHONE) as page:
        fits = "document.documentElement.scrollWidth <= 390"
        assert page.evaluate(fits)
        pick_example(page)
        page.locator("#stage").tap(position=spot(page, 300, 200))
        page.locator("#candidates canvas").first.wait_for()
        assert page.evaluate(fits) and page.locator("#stage").bounding_box()["width"] > 340


@pytest.mark.slow
@pytest.mark.parametrize(("screen", "width"), [(DESK, 700), (PHONE, 340)], ids=["desk", "phone"])
def test_a_small_picture_fills_its_space(browser, tiny_page, tmp_path, screen, width):
    Image.new("RGB", (60, 40)).save(tmp_path / "small.png")
    with served(tiny_page[1]) as address, visit(browser, address, **screen) as page:
        page.set_input_files("#file input", tmp_path / "small.png")
        wait_until_encoded(page, "small.png")
        stage, picture = (page.locator(name).bounding_box() for name in ("#stage", "#picture"))
        assert stage == picture and stage["width"] > width
        assert stage["height"] == pytest.approx(stage["width"] / 1.5, abs=1)


@pytest.mark.slow
def test_without_a_mouse_and_without_background_points(browser, tiny_page):
    checkpoint, folder = tiny_page
    predictor = EfficientSamPredictor.from_pretrained(checkpoint)
    predictor.set_image(EXAMPLES / "bus.jpg")
    with served(folder) as address, visit(browser, address) as page:
        pick_example(page)
        assert page.locator("[value=background]").is_disabled()
        page.locator("#stage").focus()
        for key in ("ArrowRight", "ArrowDown", "b", "Enter"):
            page.keyboard.press(key)
        expected = best(predictor, [[int(0.53 * 640), int(0.53 * 427)]], [1])
        assert mask_iou(mask_of(page), expected) > 0.98


@pytest.mark.slow
def test_webgpu_gives_the_same_masks(start, tiny_page):
    checkpoint, folder = tiny_page
    predictor = EfficientSamPredictor.from_pretrained(checkpoint)
    predictor.set_image(EXAMPLES / "bus.jpg")
    with served(folder) as address, visit(start(*SOFTWARE_GPU), address) as page:
        assert "WebGPU" in pick_example(page)
        click(page, 400, 220)
        assert mask_iou(mask_of(page), best(predictor, [[400, 220]], [1])) > 0.98


# In place of onnxruntime-web with WebGPU: its encoder answers, and its decoder fails, as on a device that is lost.
LOST_DEVICE = """
export const env = { wasm: {} };
export class Tensor {}
let created = 0;
export const InferenceSession = {
  create: async () => ({ number: created++, async run() { if (this.number) throw new Error("lost"); return {}; } }),
};
"""


@pytest.mark.slow
@pytest.mark.parametrize("fails_at", ["start", "the first mask"])
def test_a_broken_webgpu_is_replaced_by_webassembly(start, tiny_page, tmp_path, fails_at):
    checkpoint, folder = tiny_page
    shutil.copytree(folder, tmp_path / "page")
    runtime = tmp_path / "page" / "ort"
    if fails_at == "start":
        (runtime / "ort-wasm-simd-threaded.asyncify.wasm").write_bytes(b"broken")
    else:
        (runtime / "ort.webgpu.min.mjs").write_text(LOST_DEVICE)
    predictor = EfficientSamPredictor.from_pretrained(checkpoint)
    predictor.set_image(EXAMPLES / "bus.jpg")
    with served(tmp_path / "page") as address:
        page = start(*SOFTWARE_GPU).new_page()  # not `visit`, as the console has the error
        page.set_default_timeout(120_000)
        page.goto(address)
        assert ("WebAssembly" if fails_at == "start" else "WebGPU") in pick_example(page)
        click(page, 400, 220)
        assert mask_iou(mask_of(page), best(predictor, [[400, 220]], [1])) > 0.98
        assert "WebAssembly" in page.locator("#status").inner_text()


@pytest.mark.slow
@pytest.mark.parametrize(("headers", "threads"), [(ISOLATED, "2 threads"), ({}, "1 thread")])
def test_threads_are_used_where_the_host_allows_them(browser, tiny_page, tmp_path, headers, threads):
    """On a computer with four cores, of which onnxruntime-web takes half."""
    checkpoint, folder = tiny_page
    shutil.copytree(folder, tmp_path / "page")
    worker = tmp_path / "page" / "worker.js"
    worker.write_text(f'Object.defineProperty(navigator, "hardwareConcurrency", {{ value: 4 }});{worker.read_text()}')
    predictor = EfficientSamPredictor.from_pretrained(checkpoint)
    predictor.set_image(EXAMPLES / "bus.jpg")
    with served(tmp_path / "page", headers) as address, visit(browser, address) as page:
        assert f"WebAssembly, {threads}" in pick_example(page)
        click(page, 400, 220)
        assert mask_iou(mask_of(page), best(predictor, [[400, 220]], [1])) > 0.98


@pytest.mark.slow
def test_files_good_broken_turned_and_transparent(browser, tiny_page, tmp_path):
    checkpoint, folder = tiny_page
    broken, large, turned, clear = (tmp_path / name for name in ("broken.png", "large.png", "turned.jpg", "clear.png"))
    broken.write_bytes((EXAMPLES / "bus.jpg").read_bytes()[:300])
    Image.new("L", (6001, 4000)).save(large)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # lies on its side
    Image.open(EXAMPLES / "bus.jpg").rotate(90, expand=True).save(turned, exif=exif, quality=95)
    Image.new("RGBA", (80, 60), (255, 0, 0, 0)).save(clear)
    predictor = EfficientSamPredictor.from_pretrained(checkpoint)
    predictor.set_image(turned)
    with served(folder) as address, visit(browser, address) as page:
        for path, sentence in (
            (broken, "This file cannot be read as a picture."),
            (large, "6001 x 4000 pixels are too many; up to 24 million are taken here."),
        ):
            page.locator("input[type=file]").set_input_files(path)
            page.get_by_text(sentence).wait_for()
        page.locator("input[type=file]").set_input_files(turned)
        assert "640 x 427" in wait_until_encoded(page, "turned.jpg")
        click(page, 400, 220)
        assert mask_iou(mask_of(page), best(predictor, [[400, 220]], [1])) > 0.98

        page.get_by_role("button", name="Other picture").click()
        page.evaluate(
            """async (content) => {
              const files = new DataTransfer();
              files.items.add(new File([Uint8Array.from(content)], "clear.png"));
              document.dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true }));
            }""",
            list(clear.read_bytes()),
        )
        assert "80 x 60" in wait_until_encoded(page, "clear.png")


# ------------------------------------------------------------------------------------------------ the command


def test_the_folder_is_a_static_space(tiny_page):
    _, folder = tiny_page
    card = SpaceCard.load(folder / "README.md").data
    assert card.sdk == "static" and (folder / card.app_file).is_file()
    assert {f"ort/{name}" for name in RUNTIME} < all_files(folder)


def archive(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"package/dist/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    return content.getvalue()


def test_the_runtime_is_fetched_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(browser_page, "RUNTIME", {"a": browser_page.hashlib.sha256(b"right").hexdigest()})
    answers = [archive({"a": b"wrong"}), archive({"b": b""}), archive({"a": b"right", "b": b"not needed"})]
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(answers.pop(0)))
    with pytest.raises(ValueError, match="holds another a than expected"):
        fetch_runtime(tmp_path)
    with pytest.raises(ValueError, match="could not be fetched"):
        fetch_runtime(tmp_path)
    assert fetch_runtime(tmp_path) == {"a": b"right"}
    (tmp_path / "a").write_bytes(b"right")
    assert fetch_runtime(tmp_path) == {"a": b"right"} and not answers


def test_without_a_network_nothing_is_written(tmp_path, monkeypatch):
    def refuse(url, timeout):
        raise OSError("no route to the host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    result = run("export-browser", "bundled", tmp_path / "page")
    assert_refused(result, "onnxruntime-web could not be fetched", "no route to the host")
    assert not list(tmp_path.iterdir())


def test_weights_in_half_precision_are_exact_where_they_can_be():
    values = {
        "half": np.linspace(-3, 3, 2048).astype(np.float16).astype(np.float32),
        "large": np.full(2048, 1e6, np.float32),
        "small": np.linspace(0, 1, 7).astype(np.float32),
    }
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in values]
    outputs = [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, ["n"]) for name in values]
    tensors = [numpy_helper.from_array(value, name) for name, value in values.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", [], outputs, tensors), ir_version=10)
    smaller = store_float16(model)
    onnx.checker.check_model(smaller)
    for found, value in zip(onnx.reference.ReferenceEvaluator(smaller).run(None, {}), values.values(), strict=True):
        assert found.dtype == np.float32 and (found == value).all()
    assert smaller.ByteSize() < model.ByteSize() - 2 * 2000
