"""Python processes in which hf_efficientsam cannot be imported, as on a machine that has transformers alone."""

import os
import subprocess
import sys
from pathlib import Path

from hf_efficientsam.export.standalone import NOT_INSTALLED  # publishing makes the same check


def run_without_package(script: str, *arguments, modules_cache: Path) -> None:
    """
    Runs Python code with `arguments` as `sys.argv[1:]` and fails with what it wrote to stderr if it fails.

    `sys` is imported; `modules_cache` is where transformers copies the code of repositories to.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules_cache), "PYTHONPATH": ""}
    command = [sys.executable, "-c", NOT_INSTALLED + script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
