"""The command itself: version, help, and a process of its own."""

import contextlib
import gc
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import POINT, assert_refused, run, run_segment

from hf_efficientsam import __version__
from hf_efficientsam.cli import main
from hf_efficientsam.cli.app import app


def test_version_and_help_are_printed():
    assert run("--version").stdout == f"efficientsam {__version__}\n"
    text = run("segment", "--help").stdout
    for option in ("--point", "--box", "--background", "--all-masks", "--json", "--prompts", "--separate-points"):
        assert option in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["segment", "a.png", "--device", "gpu"], "--device: 'gpu' is not one of 'auto', 'cpu', 'cuda', 'mps'"),
        (["segment", "a.png", "--max-pixels", "0"], "--max-pixels must be at least 1, not '0'"),
        (["demo", "--port", "65536"], "--port must be at most 65535, not '65536'"),
        (["everything", "a", "--output", "o", "--crop-n-layers", "1.5"], "--crop-n-layers must be a whole number"),
        (["everything", "a", "--output", "o", "--box-nms-thresh", "x"], "--box-nms-thresh must be a number, not 'x'"),
        (["segment", "a.png", "--pont", "3,4"], "no such option: --pont (Possible options: "),
        (["segment", "a.png", "b\n.png"], "got unexpected extra argument(s) (b"),
        (["segment", "a.png", "--point"], "option '--point' requires an argument"),
        (["text", "a.png", "a dog"], "missing option '--detector'; see root text --help."),
        (["segmnt", "a.png"], "no such command 'segmnt' (did you mean 'segment'"),
        (["exportonnx"], "no such command 'exportonnx' (did you mean 'export-onnx'?); see root --help."),
        (["xyz"], "no such command 'xyz'; see root --help."),
        (["--verson"], "no such option: --verson (Possible options: --version"),
    ],
)
def test_wrong_options_are_named_in_one_sentence_that_says_what_may_be_given(arguments, sentence):
    assert_refused(run(*arguments), f"efficientsam: {sentence}")


@pytest.mark.slow
def test_a_process_prints_the_document_and_nothing_else(photo, model):
    """In a process of its own: stdout holds the document and nothing else, stderr nothing."""
    command = [Path(sys.executable).with_name("efficientsam"), "segment", photo, "--point", POINT, "--model", model]
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stderr == ""
    assert json.loads(result.stdout)["objects"] == run_segment(photo, "--point", POINT, model=model)["objects"]
    result = subprocess.run([*command, "--point", "nan,1"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1


# Ends in C code that does not look at signals, as torch's does not, or in the middle of an import.
STUBS = {
    "computing": "def app():\n    import ctypes; print('ready', flush=True); ctypes.CDLL(None).sleep(600)",
    "importing": "print('ready', flush=True); import time; time.sleep(600)",
}


def start_stub(tmp_path: Path, app: str) -> subprocess.Popen:
    """The command with a module `app` of this source."""
    package = tmp_path / "hf_efficientsam"
    (package / "cli").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cli" / "__init__.py").touch()
    (package / "cli" / "app.py").write_text(app)
    (package / "cli" / "main.py").write_bytes(Path(main.__file__).read_bytes())
    command = [sys.executable, "-m", "hf_efficientsam.cli.main"]
    return subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("moment", STUBS)
def test_ctrl_c_ends_a_command_at_once_with_one_line(tmp_path, moment):
    process = start_stub(tmp_path, STUBS[moment])
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)  # half of what the stub would take
    assert process.returncode == 130 and said == "efficientsam: stopped by Ctrl+C\n"


def test_a_command_that_ends_says_nothing_more(tmp_path):
    """Also where Python takes its time to end, as after torch was used."""
    process = start_stub(tmp_path, "def app():\n    import atexit, time; atexit.register(time.sleep, 0.5)")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0 and said == ""


@pytest.mark.slow
def test_ctrl_c_while_the_command_starts(photo):
    started = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "hf_efficientsam.cli.main",
    ]  # a line of stderr for each import
    command = [*started, "everything", photo, "--output", photo.parent / "out"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert any("torch." in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130 and said.splitlines()[-1] == "efficientsam: stopped by Ctrl+C"
    assert "Traceback" not in said


def test_what_a_command_prints_can_be_collected():
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        app(["info"], standalone_mode=False)
    assert output.getvalue().startswith("checkpoint ")


def test_a_process_without_garbage_collection_stays_without_it():
    gc.disable()
    try:
        run("info", "--help")
        assert not gc.isenabled()
    finally:
        gc.enable()
    run("info", "--help")
    assert gc.isenabled()
