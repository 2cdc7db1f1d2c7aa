"""`efficientsam info` and `convert`, and what every command says of a checkpoint's name."""

import errno
import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny
import torch
from commands import POINT, assert_refused, assert_segment_refused, run, run_segment
from safetensors import SafetensorError
from transformers import ViTConfig, ViTModel

from hf_efficientsam import EfficientSamModel
from hf_efficientsam.inference import loading
from hf_efficientsam.inference.loading import checkpoint_fingerprint


def bad_checkpoints(folder: Path, model: Path) -> dict[str, tuple[str, ...]]:
    """Makes directories that are no checkpoint, and says what must be said about each."""

    def copy(name: str, *left_out: str) -> Path:
        (folder / name).mkdir()
        for path in model.iterdir():
            if path.name not in left_out:
                (folder / name / path.name).write_bytes(path.read_bytes())
        return folder / name

    copy("no_weights", "model.safetensors")
    copy("no_config", "config.json")
    copy("no_processor", "processor_config.json", "preprocessor_config.json")
    (copy("bad_config") / "config.json").write_text("{")
    damaged = copy("damaged") / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    (folder / "file").write_bytes(b"weights")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**sizes, image_size=32)).save_pretrained(folder / "vit")

    other = tiny.config()
    other.vision_config.num_hidden_layers = 3
    other.save_pretrained(copy("lacks_a_layer"))
    other.vision_config.num_hidden_layers, other.mask_decoder_config.mlp_dim = 2, 32
    other.save_pretrained(copy("other_sizes"))
    return {
        "no_weights": ("no weights", "model.safetensors"),
        "no_config": ("no config.json",),
        "no_processor": ("cannot be loaded",),
        "bad_config": ("valid config.json",),
        "damaged": ("cannot be loaded",),
        "file": ("is a file", "efficientsam convert"),
        "vit": ("'vit'", "'efficientsam'"),
        "lacks_a_layer": ("lacks", "layers.2"),
        "other_sizes": ("cannot be loaded",),
        "nowhere": ("no such directory",),
    }


def test_directories_that_are_no_checkpoint_are_refused(photo, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name, words in bad_checkpoints(folder, model).items():
        assert_segment_refused(photo.parent, photo, "--point", POINT, model=folder / name, words=(name, *words))
        assert_refused(run("info", folder / name), name, *words)


def test_a_hub_name_out_of_reach_is_refused(photo):
    assert_segment_refused(
        photo.parent, photo, "--point", POINT, model="someone/no-such-model", words=("someone/no-such-model", "Hub")
    )


def test_bundled_checkpoint_is_the_default(photo, model, monkeypatch):
    monkeypatch.setattr(loading, "bundled_checkpoint", lambda: str(model))
    for arguments in ([], ["--model", "bundled"]):
        record = json.loads(run("segment", photo, "--point", POINT, "--json", *arguments).stdout)
        assert record["model"] == str(model)
    assert run("info").stdout == run("info", "bundled").stdout == run("info", model).stdout


def test_a_missing_bundled_checkpoint_is_said_to_be_missing(photo, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "bundled_checkpoint", lambda: str(tmp_path / "gone"))
    assert_segment_refused(photo.parent, photo, "--point", POINT, words=("bundled checkpoint is missing", "--model"))
    assert_refused(run("info"), "bundled checkpoint is missing")


# ------------------------------------------------------------------------------------------------ info, convert


def test_info_describes_sizes_and_prompts(model, model_without_background, tmp_path):
    text = run("info", model).stdout
    count = tiny.model().num_parameters() / 1e6
    assert f"parameters  {count:.2f} M" in text and "64 x 64 pixels" in text and "2 layers of 24" in text
    assert "points, boxes, background points, masks\n" in text
    assert "points, boxes, masks\n" in run("info", model_without_background).stdout
    assert "measured" not in text


def test_info_tells_the_measured_numbers(tmp_path):
    tiny.save(tmp_path, tiny.model(), tiny.processor())
    results = {"box": {"confident": {"all": {"miou": 0.71234}}}, "baseline": {"ellipse": {"all": {"miou": 0.637}}}}
    (tmp_path / "metrics.json").write_text(json.dumps({"masks": 911, "images": 100, "results": results}))
    lines = run("info", tmp_path).stdout.splitlines()
    assert lines[-3:] == [
        "measured    mIoU of 911 masks in 100 images",
        "  box, confident           0.7123",
        "  baseline, ellipse        0.6370",
    ]
    (tmp_path / "metrics.json").write_text('{"f1": 3}')
    assert "not known" in run("info", tmp_path).stdout


def test_info_does_not_tell_numbers_of_another_checkpoint(tmp_path):
    tiny.save(tmp_path, tiny.model(), tiny.processor())
    report = {"masks": 9, "images": 1, "results": {"box": {"confident": {"all": {"miou": 0.7}}}}}
    for fingerprint, said in (
        (checkpoint_fingerprint(tiny.model(), tiny.image_processor()), "mIoU of 9 masks"),
        ("0" * 64, "metrics.json is of another checkpoint; measure this one"),
    ):
        (tmp_path / "metrics.json").write_text(json.dumps(report | {"model_sha256": fingerprint}))
        measured = run("info", tmp_path).stdout.partition("measured ")[2]
        assert said in measured and ("0.7000" in measured) == ("mIoU" in said)


def test_a_converted_checkpoint_is_as_the_options_say_and_segments(shared, tmp_path, photo):
    official = shared / "golden" / "official_layout_checkpoint.pt"
    options = ["--image-size", 128, "--num-attention-heads", 3, "--decoder-num-attention-heads", 4]
    result = run("convert", official, tmp_path / "out", *options)
    assert result.exit_code == 0 and "128 x 128" in result.stdout
    config = EfficientSamModel.from_pretrained(tmp_path / "out").config
    assert config.vision_config.num_attention_heads == 3 and config.mask_decoder_config.num_attention_heads == 4
    run_segment(photo, "--point", POINT, model=tmp_path / "out")

    assert_refused(run("convert", official, tmp_path / "out", *options), "not empty", "--overwrite")
    (tmp_path / "out" / "model.safetensors").unlink()
    assert run("convert", official, tmp_path / "out", *options, "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_convert_says_of_a_converted_checkpoint_that_it_is_one(model, tmp_path):
    torch.save(EfficientSamModel.from_pretrained(model).state_dict(), tmp_path / "ours.pt")
    for given in (model, model / "model.safetensors", tmp_path / "ours.pt"):
        assert_refused(run("convert", given, tmp_path / "out"), str(given), "converted already", "--model")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("(os error 28)")])
def test_a_full_disk_is_said_of_the_directory_that_convert_was_to_write(shared, tmp_path, monkeypatch, error):
    official = shared / "golden" / "official_layout_checkpoint.pt"
    monkeypatch.setattr(EfficientSamModel, "save_pretrained", Mock(side_effect=error))
    options = ["--image-size", 128, "--num-attention-heads", 3, "--decoder-num-attention-heads", 4]
    result = run("convert", official, tmp_path / "out", *options)
    assert_refused(result, f"efficientsam: {tmp_path / 'out'}: No space left on device.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["segment", "ADDRESS", "--point", POINT],
        ["salient", "ADDRESS"],
        ["everything", "ADDRESS", "--output", "out"],
        ["convert", "ADDRESS", "out"],
        ["publish", "ADDRESS", "org/name"],
        ["segment", "a.png", "--point", POINT, "--output", "ADDRESS"],
        ["segment", "a.png", "--point", POINT, "--overlay", "ADDRESS"],
        ["segment", "a", "--prompts", "ADDRESS", "--output", "out"],
        ["salient", "a.png", "--output", "ADDRESS"],
        ["text", "a.png", "a dog", "--detector", "a", "--overlay", "ADDRESS"],
        ["everything", "a.png", "--output", "ADDRESS"],
        ["convert", "a.pt", "ADDRESS"],
        ["export-onnx", "a", "ADDRESS"],
        ["export-onnx", "a", "b", "--images", "ADDRESS"],
        ["export-browser", "a", "ADDRESS"],
        ["publish", "a", "org/name", "--output", "ADDRESS"],
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[arguments.index('ADDRESS') - 1]}",
)
def test_an_address_is_refused_and_printed_as_it_was_given(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    address = "https://example.org/some//photo.jpg"
    result = run(*(address if argument == "ADDRESS" else argument for argument in arguments))
    assert_refused(result, f"{address}: an address is neither read nor written; download it")
    assert not list(tmp_path.iterdir())


def test_convert_refuses_wrong_files_and_options(shared, tmp_path):
    official, out = shared / "golden" / "official_layout_checkpoint.pt", tmp_path / "out"
    (tmp_path / "words.pt").write_text("These are words.")
    (tmp_path / "file").touch()
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pt")
    for arguments, words in [
        ([tmp_path / "none.pt", out], ("none.pt",)),
        ([tmp_path / "words.pt", out], ("words.pt",)),
        ([tmp_path / "other.pt", out], ("no EfficientSAM checkpoint",)),
        ([official, tmp_path / "file"], ("is a file",)),
        ([official, out, "--image-size", 100, "--decoder-num-attention-heads", 4], ("100", "multiple")),
        ([official, out, "--decoder-num-attention-heads", 7], ("attention heads",)),
    ]:
        assert_refused(run("convert", *arguments), *words)
        assert not out.exists()
