import re
from pathlib import Path

import pytest

import hf_efficientsam

ROOT = Path(__file__).parents[1]
REFERENCE = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
DOCUMENTED = set(re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE))


@pytest.mark.parametrize("name", hf_efficientsam.__all__)
def test_the_reference_has_every_public_name(name):
    module = getattr(hf_efficientsam, name).__module__
    assert {f"hf_efficientsam.{name}", module} & DOCUMENTED, f"give {name} an entry in docs/api"


@pytest.mark.slow
def test_the_examples_of_the_python_guide_run(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL):
        exec(code, names)
    assert names["result"].masks.shape == (2, 427, 640)
    assert names["logits"].shape == (3, 128, 128)
    assert len(names["masks"])
