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


def pytest_sessionfinish(session):
    """Where EFFICIENTSAM_NO_SKIP is set (in CI, which has ../shared) a skipped test fails the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("EFFICIENTSAM_NO_SKIP") and reporter.stats.get("skipped"):
        reporter.write_line("EFFICIENTSAM_NO_SKIP is set, and tests were skipped.", red=True)
        session.exitstatus = 1
