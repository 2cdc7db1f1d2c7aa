"""What the demo changes of the process that runs it."""

import os
import signal
import subprocess
import sys

from hf_efficientsam.demo import page


def test_serving_leaves_signals_and_environment_as_they_were(monkeypatch):
    seen = []

    class Blocks:
        def queue(self, **options):
            return self

        def launch(self, **options):
            seen.append((os.environ["GRADIO_TEMP_DIR"], signal.getsignal(signal.SIGTERM)))
            return None, "http://127.0.0.1:7860", None  # the app, its address, its public link

        def block_thread(self):
            pass

    class Page:
        def __init__(self, demo):
            self.blocks = Blocks()

    monkeypatch.setattr(page, "Page", Page)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "mine")
    monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
    before = dict(os.environ), signal.getsignal(signal.SIGTERM)
    page.launch_demo(None)
    assert (dict(os.environ), signal.getsignal(signal.SIGTERM)) == before
    ((folder, handler),) = seen
    assert folder != "mine" and not os.path.exists(folder) and handler is signal.default_int_handler


def test_importing_the_demo_leaves_the_environment_as_it_was():
    code = "import os; before = dict(os.environ); import hf_efficientsam.demo.page; print(dict(os.environ) == before)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "True"
