"""Packages that the tests' own environment must not have, installed from the registry into a folder for one test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def install(folder: Path, *packages: str) -> None:
    """Installs them without what they need; skips the test where the registry cannot be had."""
    # -E leaves out PYTHONPATH and with it `offline`: this alone needs a network.
    command = [sys.executable, "-E", "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *packages]
    installed = subprocess.run(command, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"{packages[-1]} cannot be had from the registry: {installed.stderr.strip().splitlines()[-1]}")


def run_beside_torchvision(file: str, folder: Path, *packages: str) -> None:
    """
    Runs a file of tests beside torchvision and these packages. Where torchvision's operators do not load, as beside a
    torch without CUDA, `torchvision_shim.py` stands in for them.
    """
    minor = int(torch.__version__.split(".")[1])  # torch 2.13 belongs to torchvision 0.28, and so on
    install(folder, f"torchvision==0.{minor + 15}.*", *packages)
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (folder, ROOT / "tests")))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "torchvision_shim", f"tests/{file}"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
