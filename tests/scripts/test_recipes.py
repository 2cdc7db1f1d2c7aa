"""Every recipe fits the script that its header names."""

import re
import sys

import pytest
from script_runs import TRAINING, load_script

from hf_efficientsam.training.engine.config import parse_config

RECIPES = sorted((TRAINING / "recipes").glob("*/*.yaml"))
CONFIGS = {
    "sami": "SamiConfig",
    "distill": "DistillConfig",
    "finetune_masks": "MasksConfig",
    "finetune_classification": "ClassificationConfig",
    "finetune_semantic": "SemanticConfig",
    "finetune_detection": "DetectionConfig",
    "train_saliency": "SaliencyConfig",
    "train_in_memory": "InMemoryConfig",
}
# Scripts of recipes whose command is a study, which starts the script itself.
IN_STUDIES = {"data": "finetune_masks", "data_start": "finetune_masks", "sami": "sami", "sami_masks": "finetune_masks"}
IN_STUDIES |= {"distillation_encoder": "distill", "distillation_sami": "sami", "distillation_masks": "finetune_masks"}
NEEDED = {"finetune_detection": ["--train", "some.json"], "train_saliency": ["--train", "some_folder"]}
NEEDED["train_in_memory"] = ["--shards", "some.tar", "--val", "other.tar"]


def header(path) -> str:
    lines = path.read_text().splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def script_of(path) -> str:
    """The script or study that the recipe is for; its command may name others before, which prepare the data."""
    named = re.findall(r"training/(\w+)\.py", header(path))
    return next(script for script in named if script in CONFIGS or script.endswith("_study"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_says_how_it_is_run_and_fits_its_script(path, monkeypatch):
    text = header(path)
    script = script_of(path)
    keys = ("command", "expected") if script.endswith("_study") else ("command", "hardware", "time", "expected")
    assert all(f"\n# {key}:" in text for key in keys)
    script = IN_STUDIES[path.stem] if script.endswith("_study") else script
    module = load_script(script)
    arguments = ["--config", str(path), *NEEDED.get(script, [])]
    config = parse_config(getattr(module, CONFIGS[script]), "", arguments)
    if script == "finetune_detection":
        monkeypatch.setitem(sys.modules, "torchvision", None)
        with pytest.raises(ValueError, match="needs a torchvision"):  # what is checked last
            module.check(config)
    elif hasattr(module, "check"):
        module.check(config)


def test_there_are_recipes_of_every_script():
    assert {script_of(path) for path in RECIPES} >= CONFIGS.keys()
