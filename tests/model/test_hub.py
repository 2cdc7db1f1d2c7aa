import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from fake_hub import FakeHub
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForMaskGeneration,
    AutoModelForPreTraining,
    AutoProcessor,
    pipeline,
)
from without_package import run_without_package

from hf_efficientsam import (
    EfficientSamConfig,
    EfficientSamForImageClassification,
    EfficientSamForPreTraining,
    EfficientSamImageProcessor,
    EfficientSamModel,
    EfficientSamProcessor,
    EfficientSamSamiConfig,
    EfficientSamVisionConfig,
    EfficientSamVisionModel,
    bundled_checkpoint,
)

CONFIGURATIONS = {
    "configuration_efficientsam.py",
    "configuration_sami.py",
    "configuration_vision_efficientsam.py",
}
CODE = CONFIGURATIONS | {
    "image_processing_efficientsam.py",
    "image_reading_efficientsam.py",
    "mask_decoder_fast_efficientsam.py",
    "mask_decoder_shared_efficientsam.py",
    "mask_operations_efficientsam.py",
    "modeling_auto_vision_efficientsam.py",
    "modeling_efficientsam.py",
    "modeling_vision_efficientsam.py",
    "onednn_efficientsam.py",
    "processing_efficientsam.py",
    "prompts_efficientsam.py",
    "run_lengths_efficientsam.py",
}
SAMI_CODE = CONFIGURATIONS | {
    "modeling_sami.py",
    "modeling_vision_efficientsam.py",
    "onednn_efficientsam.py",
}

# Loads a folder through every Auto class, checks that all of them give the same numbers, saves them, and writes the
# masks.
STRANGER = """
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForMaskGeneration, AutoProcessor

folder, resaved, output = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
names = [type(x).__name__ for x in (config, processor, image_processor)]
assert names == ["EfficientSamConfig", "EfficientSamProcessor", "EfficientSamImageProcessor"], names
image = np.arange(50 * 70 * 3, dtype=np.uint8).reshape(50, 70, 3)
inputs = processor(image, input_points=[[[[10, 20]], [[30, 5], [60, 45]]]], input_boxes=[[[1, 2, 30, 40], None]])
assert torch.equal(image_processor(image)["pixel_values"], inputs["pixel_values"])
results = []
for auto_class in (AutoModel, AutoModelForMaskGeneration):
    model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    with torch.no_grad():
        results.append(model(**inputs).pred_masks)
assert torch.equal(*results)
model.save_pretrained(resaved)
processor.save_pretrained(resaved)
assert not any(name.startswith("hf_efficientsam") for name in sys.modules)
save_file({"masks": results[0]}, output)
"""

SAMI_STRANGER = """
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForPreTraining

folder, resaved, output = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForPreTraining.from_pretrained(folder, trust_remote_code=True).eval()
assert type(config).__name__ == "EfficientSamSamiConfig" and type(model).__name__ == "EfficientSamForPreTraining"
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
with torch.no_grad():
    result = model(torch.arange(3 * 32 * 48).reshape(1, 3, 32, 48) / 3000, noise=torch.arange(6)[None] / 6)
model.save_pretrained(resaved)
assert not any(name.startswith("hf_efficientsam") for name in sys.modules)
save_file({"reconstruction": result.reconstruction}, output)
"""

CLASSIFIER_STRANGER = """
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

folder, resaved, output = sys.argv[1:]
image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__name__ == "EfficientSamForImageClassification"
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
image = Image.fromarray(np.arange(50 * 70 * 3, dtype=np.uint8).reshape(50, 70, 3))
with torch.no_grad():
    logits = model(**image_processor(image)).logits
best = pipeline("image-classification", model=folder, trust_remote_code=True)(image)[0]
assert best["label"] == model.config.id2label[logits.argmax().item()]
model.save_pretrained(resaved)
image_processor.save_pretrained(resaved)
assert not any(name.startswith("hf_efficientsam") for name in sys.modules)
save_file({"logits": logits}, output)
"""


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def as_a_stranger(folder: Path, resaved: Path, tmp_path: Path, script: str = STRANGER) -> dict[str, torch.Tensor]:
    """What a process without the package gets from `folder`."""
    output = tmp_path / f"{folder.name}.safetensors"
    run_without_package(script, folder, resaved, output, modules_cache=tmp_path / "modules" / folder.name)
    return load_file(output)


@pytest.mark.slow
def test_saved_folder_needs_no_package(tmp_path):
    model, processor = tiny.model(), tiny.processor()
    folder, resaved = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    assert {path.name for path in folder.glob("*.py")} == CODE

    image = np.arange(50 * 70 * 3, dtype=np.uint8).reshape(50, 70, 3)
    points, boxes = [[[[10, 20]], [[30, 5], [60, 45]]]], [[[1, 2, 30, 40], None]]
    inputs = processor(image, input_points=points, input_boxes=boxes)
    with torch.no_grad():
        expected = model(**inputs).pred_masks
    masks = as_a_stranger(folder, resaved, tmp_path)["masks"]
    torch.testing.assert_close(masks, expected, atol=1e-6, rtol=0)

    # What the stranger saved is as complete, and its files are those that a next stranger would run.
    assert {path.name for path in resaved.iterdir()} == {path.name for path in folder.iterdir()}
    assert all((resaved / name).read_bytes() == (folder / name).read_bytes() for name in CODE)
    assert read_json(resaved / "config.json")["auto_map"] == read_json(folder / "config.json")["auto_map"]
    assert read_json(resaved / "processor_config.json") == read_json(folder / "processor_config.json")
    with torch.no_grad():
        masks = EfficientSamModel.from_pretrained(resaved)(**inputs).pred_masks
    torch.testing.assert_close(masks, expected, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_saved_sami_folder_needs_no_package(tmp_path):
    model = tiny.sami_model()
    folder, resaved = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(folder)
    assert {path.name for path in folder.glob("*.py")} == SAMI_CODE
    pixel_values = torch.arange(3 * 32 * 48).reshape(1, 3, 32, 48) / 3000
    with torch.no_grad():
        expected = model(pixel_values, noise=torch.arange(6)[None] / 6).reconstruction
    result = as_a_stranger(folder, resaved, tmp_path, SAMI_STRANGER)["reconstruction"]
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)
    assert {path.name for path in resaved.iterdir()} == {path.name for path in folder.iterdir()}
    assert read_json(resaved / "config.json")["auto_map"] == read_json(folder / "config.json")["auto_map"]
    # An encoder that a stranger pretrained is one here.
    _, info = EfficientSamVisionModel.from_pretrained(resaved, output_loading_info=True)
    assert all(name.startswith("vision_encoder.neck.") for name in info["missing_keys"])


@pytest.mark.slow
def test_saved_classifier_needs_no_package(tmp_path):
    torch.manual_seed(0)
    config = EfficientSamVisionConfig(hidden_size=24, num_hidden_layers=2, pretrain_image_size=64, num_labels=3)
    model, processor = EfficientSamForImageClassification(config).eval(), EfficientSamImageProcessor(size=64)
    folder, resaved = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    own = {"modeling_classification_efficientsam.py"}
    decoder = {one for one in CODE if one.startswith("mask_decoder")} | {
        "modeling_auto_vision_efficientsam.py",
        "modeling_efficientsam.py",
    }
    unused = {"processing_efficientsam.py", "prompts_efficientsam.py"} | decoder
    assert {path.name for path in folder.glob("*.py")} == CODE - unused | own
    image = np.arange(50 * 70 * 3, dtype=np.uint8).reshape(50, 70, 3)
    with torch.no_grad():
        expected = model(**processor(image)).logits
    logits = as_a_stranger(folder, resaved, tmp_path, CLASSIFIER_STRANGER)["logits"]
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)
    assert {path.name for path in resaved.iterdir()} == {path.name for path in folder.iterdir()}
    assert read_json(resaved / "config.json")["auto_map"] == read_json(folder / "config.json")["auto_map"]


def test_saved_folder_uses_the_package_where_installed(tmp_path, monkeypatch):
    tiny.model().save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether to trust remote code"))
    for extra in ({}, {"trust_remote_code": True}):
        loaded = {
            EfficientSamConfig: AutoConfig.from_pretrained(tmp_path, **extra),
            EfficientSamProcessor: AutoProcessor.from_pretrained(tmp_path, **extra),
            EfficientSamImageProcessor: AutoImageProcessor.from_pretrained(tmp_path, **extra),
        }
        assert all(type(value) is wanted for wanted, value in loaded.items())
        for auto_class in (AutoModel, AutoModelForMaskGeneration):
            model = auto_class.from_pretrained(tmp_path, **extra)
            assert type(model) is EfficientSamModel
            assert type(model.config) is EfficientSamConfig


def test_sami_model_is_saved_with_its_own_entry(tmp_path, monkeypatch):
    tiny.sami_model().save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["auto_map"] == {
        "AutoConfig": "configuration_sami.EfficientSamSamiConfig",
        "AutoModelForPreTraining": "modeling_sami.EfficientSamForPreTraining",
    }
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether to trust remote code"))
    for extra in ({}, {"trust_remote_code": True}):
        assert type(AutoConfig.from_pretrained(tmp_path, **extra)) is EfficientSamSamiConfig
        assert type(AutoModelForPreTraining.from_pretrained(tmp_path, **extra)) is EfficientSamForPreTraining


def test_vision_model_is_saved_with_its_own_entry(tmp_path):
    vision = EfficientSamVisionModel(tiny.model().config.vision_config)
    vision.save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["auto_map"] == {
        "AutoConfig": "configuration_vision_efficientsam.EfficientSamVisionConfig",
        "AutoModel": "modeling_vision_efficientsam.EfficientSamVisionModel",
    }
    assert type(AutoModel.from_pretrained(tmp_path)) is EfficientSamVisionModel


def test_resaving_forgets_the_repository_it_came_from(tmp_path):
    model = tiny.model()
    model.config.auto_map = {"AutoModelForMaskGeneration": "someone/else--modeling_efficientsam.EfficientSamModel"}
    model.save_pretrained(tmp_path)
    assert "someone/else" not in (tmp_path / "config.json").read_text()


def test_copied_code_imports_its_neighbours_one_by_one():
    """transformers copies no more than the files named in `from .x import Y`."""
    import hf_efficientsam

    package = Path(hf_efficientsam.__file__).parent / "model"
    for name in CODE | SAMI_CODE:
        for line in (package / name).read_text().splitlines():
            words = line.split()
            if words[:1] == ["from"] and words[1].startswith("."):
                assert f"{words[1][1:]}.py" in (SAMI_CODE if name == "modeling_sami.py" else CODE), f"{name}: {line}"
            assert words[:2] not in (["from", "."], ["import", "hf_efficientsam"]), f"{name}: {line}"


def test_bundled_checkpoint_lies_in_the_package():
    assert Path(bundled_checkpoint()).parent.parent.name == "hf_efficientsam"


# ----------------------------------------------------------------------------------------------- push_to_hub


def test_push_to_hub_uploads_a_complete_repository(monkeypatch, tmp_path):
    hub = FakeHub(monkeypatch)
    model = tiny.model()
    model.push_to_hub("someone/tiny", tags=["potatoes"])
    tiny.processor().push_to_hub("someone/tiny")
    assert hub.commits == 2 * ["someone/tiny"]
    others = {"README.md", "config.json", "model.safetensors", "processor_config.json"}
    assert hub.files.keys() == CODE | others

    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    loaded = EfficientSamModel.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, atol=0, rtol=0, msg=name)


def test_save_and_push_in_one(monkeypatch, tmp_path):
    hub = FakeHub(monkeypatch)
    tiny.model().save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/tiny")
    assert {name for name in hub.files if "." in name and not name.endswith((".py", ".json", ".md"))} == {
        "model.safetensors"
    }


def test_half_precision_stays_half(tmp_path):
    tiny.model().to(torch.float16).save_pretrained(tmp_path)
    assert {x.dtype for x in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    assert EfficientSamModel.from_pretrained(tmp_path, dtype="auto").dtype == torch.float16
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, info = EfficientSamModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] and info["unexpected_keys"]


@pytest.fixture
def half_precision(tmp_path):
    """The folder of a checkpoint that is stored in float16."""
    return tiny.save(tmp_path, tiny.model().half(), tiny.processor())


@pytest.mark.parametrize("auto_class", [EfficientSamModel, AutoModel, AutoModelForMaskGeneration])
def test_half_precision_is_loaded_as_float32_unless_asked_otherwise(half_precision, auto_class):
    def dtypes(**options):
        return {weights.dtype for weights in auto_class.from_pretrained(half_precision, **options).parameters()}

    assert dtypes() == dtypes(dtype=None) == {torch.float32}
    assert dtypes(dtype="auto") == dtypes(dtype="float16") == dtypes(dtype=torch.float16) == {torch.float16}
    assert dtypes(dtype=torch.bfloat16) == dtypes(torch_dtype=torch.bfloat16) == {torch.bfloat16}
    assert dtypes(device_map="cpu") == {torch.float32}
    assert dtypes(device_map={"": "cpu"}, dtype=torch.float16) == {torch.float16}


def test_a_pipeline_runs_half_precision_as_float32_where_the_config_or_its_user_says_so(half_precision):
    def dtype(**options):
        return pipeline("mask-generation", model=str(half_precision), **options).model.dtype

    assert dtype() == dtype(dtype=torch.float16) == torch.float16  # of itself it asks for dtype="auto"
    assert dtype(dtype=None) == torch.float32
    config = AutoConfig.from_pretrained(half_precision)
    config.dtype = "float32"  # as the bundled checkpoint's
    config.save_pretrained(half_precision)
    assert dtype() == torch.float32


# --------------------------------------------------------------------------------------------- the bundled checkpoint


def test_only_s_comes_with_the_package():
    assert bundled_checkpoint() == bundled_checkpoint("s")
    with pytest.raises(ValueError, match=r"only EfficientSAM-S .*, not 'ti'; .* efficientsam convert"):
        bundled_checkpoint("ti")


def test_bundled_checkpoint_is_whole_half_precision_and_small():
    folder = Path(bundled_checkpoint())
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weights = load_file(files[0]) | load_file(files[1])
    assert {tensor.dtype for name, tensor in weights.items() if "frequencies" not in name} == {torch.float16}
    assert sum(file.stat().st_size for file in files) < 54e6
    model, info = EfficientSamModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.prompt_encoder_config.background_points and model.config.prompt_encoder_config.mask_prompts


@torch.no_grad()
def test_bundled_checkpoint_finds_the_elephant():
    """The README's example, which has no part in training: the box's mask covers what was drawn by hand."""
    folder = bundled_checkpoint()
    model = EfficientSamModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = EfficientSamProcessor.from_pretrained(folder)
    image = Path(__file__).parents[2] / "examples" / "elephant.jpg"
    inputs = processor(str(image), input_boxes=[[[34, 281, 300, 616]]])
    outputs = model(**inputs)
    masks = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])
    best = masks[0][0, outputs.iou_scores[0, 0].argmax()]
    body, street = best[330:450, 100:230], best[100:200, 300:400]
    assert body.float().mean() > 0.9 and not street.any()
