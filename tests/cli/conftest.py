from pathlib import Path

import pytest
import tiny
from commands import noise
from PIL import Image
from transformers import logging as transformers_logging


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A checkpoint that takes every kind of prompt."""
    return tiny.save(tmp_path_factory.mktemp("tiny"), tiny.model(), tiny.processor())


@pytest.fixture(scope="session")
def model_without_background(tmp_path_factory) -> Path:
    model = tiny.model(prompt_encoder={"background_points": False})
    return tiny.save(tmp_path_factory.mktemp("without_background"), model, tiny.processor())


@pytest.fixture(autouse=True)
def library_settings():
    """The command silences transformers for its process; here the process goes on."""
    verbosity, limit = transformers_logging.get_verbosity(), Image.MAX_IMAGE_PIXELS
    yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.fixture
def photo(tmp_path) -> Path:
    noise().save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of three images, one of them in a subfolder."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b.jpg", "sub/c.png"]):
        noise(seed=i).save(folder / name)
    return folder
