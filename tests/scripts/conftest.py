from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def recipe(request, tmp_path_factory) -> Path:
    """The test file's `RECIPE` as a yaml file."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(request.module.RECIPE)
    return path
