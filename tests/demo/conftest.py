"""The web demo's server and a browser."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from chromium import chromium
from playwright.sync_api import expect

from hf_efficientsam import EfficientSamPredictor

ROOT = Path(__file__).resolve().parents[2]
SWITCHES = ["--disable-gpu", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
DESK = {"viewport": {"width": 1280, "height": 820}}
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def gate(tmp_path_factory) -> Path:
    """The file that demo_server.py looks for."""
    return tmp_path_factory.mktemp("gate") / "closed"


@pytest.fixture
def hold(gate):
    """A context in which what takes long stays at the place where it has shown how far it is."""

    @contextmanager
    def hold():
        gate.touch()
        try:
            yield
        finally:
            gate.unlink()

    return hold


@pytest.fixture(scope="module")
def server(gate, tmp_path_factory):
    """Where `efficientsam demo` serves, on a free port; at the end no temporary file of its is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("gradio")
    command = [sys.executable, ROOT / "tests" / "demo_server.py", "demo", "--port", str(port)]
    log = (folder.parent / "server.log").open("w+")
    process = subprocess.Popen(
        [*command, "--max-pixels", "3000000"],
        env={**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1", "GATE": str(gate)},
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
    predictor.set_image(ROOT / "examples" / "bus.jpg")
    return predictor
