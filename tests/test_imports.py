"""What importing the package, and asking the command for help, does and does not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_efficientsam

LOADED = "import sys; assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
REGISTERED = """
names = {"efficientsam": AutoModel, "efficientsam_vision_model": AutoModelForImageClassification,
    "efficientsam_backbone": AutoBackbone, "efficientsam_sami": AutoModelForPreTraining}
for name, auto in names.items():
    config = AutoConfig.for_model(name)
    assert auto._model_mapping[type(config)].config_class is type(config)
assert type(AutoProcessor.from_pretrained(hf_efficientsam.bundled_checkpoint())).__name__ == "EfficientSamProcessor"
assert AutoImageProcessor.from_pretrained(hf_efficientsam.bundled_checkpoint()).size.height == 512
"""
IMPORT_AUTO_CLASSES = (
    "from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, "
    "AutoModelForImageClassification, AutoModelForPreTraining, AutoProcessor"
)


def run_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_import_loads_neither_torch_nor_transformers():
    run_python(f"import hf_efficientsam; dir(hf_efficientsam); {LOADED}")


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_neither_torch_nor_transformers(option):
    run_python(f"""
import sys
from hf_efficientsam.cli.app import app
sys.argv = ["efficientsam", {option!r}]
try:
    app()
except SystemExit as exit:
    assert not exit.code
{LOADED}
""")


@pytest.mark.parametrize(
    "first",
    ["", "from hf_efficientsam import EfficientSamModel", "from transformers import SamModel", IMPORT_AUTO_CLASSES],
)
def test_the_auto_classes_know_the_family_whatever_is_imported_first(first):
    after = "" if first == IMPORT_AUTO_CLASSES else IMPORT_AUTO_CLASSES
    run_python(f"{first}\nimport hf_efficientsam\n{after}\n{REGISTERED}")


def test_the_auto_classes_know_the_family_when_a_model_of_transformers_brings_them():
    run_python(f"import hf_efficientsam\nfrom transformers import SamModel\n{IMPORT_AUTO_CLASSES}\n{REGISTERED}")


def test_editors_and_python_find_the_same_public_names():
    tree = ast.parse(Path(hf_efficientsam.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    declared = {alias.name: imported.module for imported in block.body for alias in imported.names}
    assert declared == hf_efficientsam.MODULES
    assert sorted(declared) == hf_efficientsam.__all__
    assert set(hf_efficientsam.__all__) <= set(dir(hf_efficientsam))
    with pytest.raises(AttributeError, match="EfficientSamNothing"):
        _ = hf_efficientsam.EfficientSamNothing
