import json
from types import SimpleNamespace

import tiny
from huggingface_hub import ModelCard

from hf_efficientsam.training.engine.reports import describe_model, fill_between, replace_text, write_report


def test_text_between_marks_is_replaced():
    page = "before\n<!-- a -->\nold\n<!-- b -->\nafter\n"
    for text in ("new", "newer"):
        page = fill_between(page, "<!-- a -->", "<!-- b -->", text)
        assert page == f"before\n<!-- a -->\n{text}\n<!-- b -->\nafter\n"


def test_a_report_names_the_versions_behind_its_numbers(tmp_path):
    write_report(tmp_path / "metrics.json", {"miou": 0.5}, ["numpy"])
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["miou"] == 0.5
    assert list(report["versions"]) == ["python", "hf-efficientsam", "torch", "transformers", "numpy"]


def test_a_text_is_replaced_and_nothing_else_is_left(tmp_path):
    for text in ("old", "new"):
        replace_text(tmp_path / "text", text)
    assert [path.name for path in tmp_path.iterdir()] == ["text"] and (tmp_path / "text").read_text() == "new"


def test_a_model_is_described_by_a_card_and_the_numbers_of_its_run(tmp_path):
    writing = tmp_path / "model"
    writing.mkdir()
    for name, known in (("someone/base", "someone/base"), ("bundled", None), (str(tmp_path), None), (None, None)):
        config = SimpleNamespace(model=name, dataset="someone/images", output_dir=str(tmp_path))
        describe_model(writing, "finetune_masks", tiny.model(), config)
        data = ModelCard.load(writing / "README.md").data
        assert data.base_model == known and data.datasets == ["someone/images"]
    assert not (writing / "metrics.json").exists()
    (tmp_path / "metrics.json").write_text("{}")
    describe_model(writing, "train_saliency", tiny.saliency_head(), SimpleNamespace(output_dir=str(tmp_path)))
    assert (writing / "metrics.json").read_text() == "{}"
