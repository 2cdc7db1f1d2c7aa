"""The command itself: version, help, and a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import POINT, run, run_segment

from hf_efficientsam import __version__


def test_version_and_help_are_printed():
    assert run("--version").stdout == f"efficientsam {__version__}\n"
    text = run("segment", "--help").stdout
    for option in ("--point", "--box", "--background", "--all-masks", "--json", "--prompts", "--separate-points"):
        assert option in text
    assert run("segment", "photo.png", "--pont", "3,4").exit_code == 2


@pytest.mark.slow
def test_a_process_prints_the_document_and_nothing_else(photo, model):
    """In a process of its own: stdout holds the document and nothing else, stderr nothing."""
    command = [Path(sys.executable).with_name("efficientsam"), "segment", photo, "--point", POINT, "--model", model]
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stderr == ""
    assert json.loads(result.stdout)["objects"] == run_segment(photo, "--point", POINT, model=model)["objects"]
    result = subprocess.run([*command, "--point", "nan,1"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
