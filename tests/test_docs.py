import re
from pathlib import Path

import pytest

import hf_efficientsam

REFERENCE = "\n".join(page.read_text() for page in (Path(__file__).parents[1] / "docs" / "api").glob("*.md"))
DOCUMENTED = set(re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE))


@pytest.mark.parametrize("name", hf_efficientsam.__all__)
def test_the_reference_has_every_public_name(name):
    module = getattr(hf_efficientsam, name).__module__
    assert {f"hf_efficientsam.{name}", module} & DOCUMENTED, f"give {name} an entry in docs/api"
