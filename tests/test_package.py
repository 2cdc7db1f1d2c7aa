"""What is installed from a wheel, used outside the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
# pip fetches hatchling from the registry; without this path, tests/offline does not keep it from the network.
REACHES_REGISTRY = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
COMMAND = [sys.executable, "-c", "from hf_efficientsam.cli.app import app; app()"]


def build_wheel(project: Path, folder: Path) -> Path:
    command = [*PIP, "wheel", "--no-deps", "--wheel-dir", folder, project]
    subprocess.run(command, env=REACHES_REGISTRY, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder into which the package was installed, without what it depends on."""
    folder = tmp_path_factory.mktemp("site")
    wheel = build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder)
    return folder


def run_installed(site: Path, folder: Path, *arguments) -> subprocess.CompletedProcess:
    """The installed command in a folder outside the checkout."""
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_an_installed_package_trains_and_evaluates_its_miniature(site, tmp_path):
    miniature = site / "hf_efficientsam" / "project" / "training" / "recipes" / "miniature" / "masks.yaml"
    options = ["--config", miniature, "--steps", "2", "--output_dir", "run"]
    done = run_installed(site, tmp_path, "train", "--num_processes", "1", "masks", *options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    annotations = site / "hf_efficientsam" / "project" / "examples" / "miniature" / "instances.json"
    options = ["--model", "run/model", "--annotations", annotations, "--prompts", "box", "--limit", "1"]
    done = run_installed(site, tmp_path, "evaluate", "--cpu", "masks", *options)
    assert done.returncode == 0, done.stderr
    assert "box" in done.stdout


@pytest.mark.slow
def test_an_installed_package_has_the_files_of_the_space(site, tmp_path):
    code = "from hf_efficientsam.export.publish import check_space_files; check_space_files()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)}, check=True)


@pytest.mark.slow
def test_the_metadata_says_what_the_package_is(site):
    (metadata,) = site.glob("hf_efficientsam-*.dist-info/METADATA")
    text = metadata.read_text()
    for line in ("License-Expression: Apache-2.0", "License-File: LICENSE", "Requires-Python: >=3.11"):
        assert f"\n{line}\n" in text
    assert (site / "hf_efficientsam" / "py.typed").is_file()
    assert not list(site.rglob("results")) and not list(site.rglob("*_study.py"))


@pytest.mark.slow
def test_the_small_distribution_segments_without_torch(tmp_path):
    wheel = build_wheel(ROOT / "packaging" / "onnx", tmp_path)
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "site")
    code = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = sys.modules["hf_efficientsam"] = None
from hf_efficientsam_onnx import EfficientSamOnnxPredictor, SegmentationResult
try:
    EfficientSamOnnxPredictor("nothing")
except ValueError as error:
    assert "no such file" in str(error)
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(tmp_path / "site")}, check=True)
