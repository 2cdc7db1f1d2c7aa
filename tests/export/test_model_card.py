import json

import pytest
import tiny
import torch
from fake_hub import FakeHub
from huggingface_hub import ModelCard
from PIL import Image

from hf_efficientsam import EfficientSamModel
from hf_efficientsam.export.model_card import model_card, push_model_card

WRITTEN_BY_HAND = "---\nlicense: mit\n---\n# Written by hand\n"


def test_card_says_what_the_model_is():
    card = model_card(tiny.model(prompt_encoder={"mask_prompts": False}), "someone/tiny", tags=["potatoes"])
    assert card.data.license is None  # the weights' terms are their trainer's to state; the code's would be wrong
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "mask-generation"
    assert {"efficientsam", "potatoes"} <= set(card.data.tags)
    assert 'EfficientSamModel.from_pretrained("someone/tiny")' in card.text
    assert "points, boxes, background points." in card.text
    assert "None were recorded" in card.text
    assert "{" not in card.text.replace("{title}", "{")  # every blank is filled in


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


def test_card_states_recorded_numbers(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps({"box": {"miou": 0.6543}}))
    text = model_card(EfficientSamModel.from_pretrained(tmp_path), "someone/tiny", tags=[]).text
    assert "0.6543" in text
    assert "None were recorded" not in text


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
    assert hub.files.keys() == {"README.md"} and "mask-generation" in hub.files["README.md"].decode()


def test_card_that_someone_wrote_is_kept(monkeypatch):
    hub = FakeHub(monkeypatch, readme=WRITTEN_BY_HAND)
    with pytest.raises(ValueError, match="someone/tiny has a model card already; edit it there"):
        push_model_card(tiny.model(), "someone/tiny")
    assert hub.files["README.md"].decode() == WRITTEN_BY_HAND
    tiny.model().push_to_hub("someone/tiny")  # transformers adds no more than tags
    assert ModelCard(hub.files["README.md"].decode()).text == ModelCard(WRITTEN_BY_HAND).text
