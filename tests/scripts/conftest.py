from pathlib import Path

import pytest

from hf_efficientsam.training.engine.metrics_log import MetricsLog


@pytest.fixture(scope="module")
def recipe(request, tmp_path_factory) -> Path:
    """The test file's `RECIPE` as a yaml file."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(request.module.RECIPE)
    return path


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Curves, which take most of a short run's time, are drawn by the runs of a module's fixtures alone."""
    monkeypatch.setattr(MetricsLog, "plot", lambda self: None)
