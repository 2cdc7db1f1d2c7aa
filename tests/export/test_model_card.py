import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from fake_hub import FakeHub
from huggingface_hub import ModelCard
from PIL import Image

from hf_efficientsam import EfficientSamModel
from hf_efficientsam.export.model_card import Provenance, model_card, push_model_card, training_card
from hf_efficientsam.export.package_wheel import WHEEL_NAME
from hf_efficientsam.inference.loading import find_checkpoint

WRITTEN_BY_HAND = "---\nlicense: mit\n---\n# Written by hand\n"


def test_card_says_what_the_model_is():
    card = model_card(tiny.model(prompt_encoder={"mask_prompts": False}), "someone/tiny", tags=["potatoes"])
    assert card.data.license == "unknown"  # the weights' terms are their trainer's to state; the code's would be wrong
    assert "Nothing was recorded about the terms" in card.text
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "mask-generation"
    assert {"efficientsam", "potatoes"} <= set(card.data.tags)
    assert 'EfficientSamModel.from_pretrained("someone/tiny")' in card.text
    assert "points, boxes, background points." in card.text
    assert "None were recorded" in card.text
    assert "{" not in card.text.replace("{title}", "{")  # every blank is filled in


def test_the_hub_finds_the_bundled_checkpoint_by_its_card():
    data = ModelCard.load(Path(find_checkpoint("bundled"), "README.md")).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "mask-generation")
    assert data.datasets == ["detection-datasets/coco", "timm/oxford-iiit-pet"]
    assert data.base_model is None  # its backbone is not on the Hub


def test_code_in_the_card_runs(monkeypatch, tmp_path):
    model = tiny.model()
    tiny.save(tmp_path / "model", model, tiny.processor())
    Image.new("RGB", (600, 400)).save(tmp_path / "photo.jpg")
    text = model_card(model, "someone/tiny", tags=[]).text
    first, second = [part.split("```")[0] for part in text.split("```python")[1:]]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(first.replace("someone/tiny", str(tmp_path / "model")), names)
    assert names["best"].shape == (400, 600) and names["best"].dtype == torch.bool
    exec(second.replace("someone/tiny", str(tmp_path / "model")), names)
    assert type(names["model"]) is EfficientSamModel


def test_card_states_recorded_numbers():
    text = model_card(tiny.model(), "someone/tiny", metrics=json.dumps({"box": {"miou": 0.6543}})).text
    assert "0.6543" in text
    assert "None were recorded" not in text


def test_card_states_what_the_trainer_says():
    provenance = Provenance("cc-by-4.0", "someone/base", ["someone/images"])
    card = ModelCard(str(model_card(tiny.model(), "someone/tiny", provenance=provenance)))
    assert (card.data.license, card.data.base_model, card.data.datasets) == (
        "cc-by-4.0",
        "someone/base",
        ["someone/images"],
    )
    assert "The weights are under cc-by-4.0." in card.text


def test_card_says_what_to_install():
    text = model_card(tiny.model(), "someone/tiny").text
    assert f"pip install https://huggingface.co/someone/tiny/resolve/main/{WHEEL_NAME}\n" in text
    assert re.search(r'with torch, pillow and "transformers.*>=5', text)


@pytest.mark.parametrize(
    ("script", "model", "pipeline_tag"),
    [
        ("finetune_masks", tiny.model, "mask-generation"),
        ("finetune_classification", tiny.classifier, "image-classification"),
        ("finetune_detection", tiny.backbone, "object-detection"),
        ("sami", tiny.sami_model, "image-feature-extraction"),
        ("train_saliency", tiny.saliency_head, "image-segmentation"),
    ],
)
def test_card_of_a_training(script, model, pipeline_tag, tmp_path, monkeypatch):
    model = model()
    card = ModelCard(str(training_card(script, model, Provenance(datasets=["someone/images"]))))
    assert card.data.pipeline_tag == pipeline_tag and card.data.license == "unknown"
    assert card.data.library_name == "transformers" and card.data.datasets == ["someone/images"]
    if script not in ("finetune_masks", "finetune_detection"):  # their code needs a processor, and torchvision
        model.save_pretrained(tmp_path)
        monkeypatch.chdir(tmp_path)
        exec(card.text.split("```python")[1].split("```")[0], {})


def test_card_takes_the_place_of_the_empty_form_of_a_push(monkeypatch):
    hub, model = FakeHub(monkeypatch), tiny.model()
    model.push_to_hub("someone/tiny", tags=["potatoes"])
    assert "More Information Needed" in hub.files["README.md"].decode()
    push_model_card(model, "someone/tiny")
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.pipeline_tag == "mask-generation" and {"efficientsam", "potatoes"} <= set(card.data.tags)
    assert 'EfficientSamModel.from_pretrained("someone/tiny")' in card.text


def test_card_of_a_repository_without_one(monkeypatch):
    hub = FakeHub(monkeypatch)
    push_model_card(tiny.model(), "someone/tiny")
    assert hub.files.keys() == {"README.md", WHEEL_NAME} and "mask-generation" in hub.files["README.md"].decode()


def test_card_that_someone_wrote_is_kept(monkeypatch):
    hub = FakeHub(monkeypatch, readme=WRITTEN_BY_HAND)
    with pytest.raises(ValueError, match="someone/tiny has a model card already; edit it there"):
        push_model_card(tiny.model(), "someone/tiny")
    assert hub.files["README.md"].decode() == WRITTEN_BY_HAND
    tiny.model().push_to_hub("someone/tiny")  # transformers adds no more than tags
    assert ModelCard(hub.files["README.md"].decode()).text == ModelCard(WRITTEN_BY_HAND).text
