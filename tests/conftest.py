import os
from pathlib import Path

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a network


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of goldens, data and teacher weights that lies beside the checkout; absent elsewhere."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared (golden numbers, images and weights) beside the checkout")
    return folder
