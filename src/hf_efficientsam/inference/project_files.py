"""Folders of the repository that are installed with the package: training scripts, their examples, the Space."""

from pathlib import Path


def project_files(name: str) -> Path:
    """
    A folder of the repository, "training", "examples" or "spaces": the checkout's if the package is installed from
    one with `pip install -e`, else what the wheel holds of it.
    """
    package = Path(__file__).parents[1]
    installed = package / "project"
    return (installed if installed.is_dir() else package.parents[1]) / name
