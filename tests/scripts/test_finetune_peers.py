"""`training/finetune_masks.py` on tiny promptable models of transformers, and evaluations of what it leaves."""

import json

import pytest
import tiny_peers
import torch
from peft import PeftModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from script_runs import assert_close, assert_equal, card_of, curve, fork, refuse, run, stopped_after
from transformers import AutoModelForMaskGeneration, AutoProcessor

from hf_efficientsam.training.masks.predictors import load_mask_predictor

RECIPE = """
max_masks: 3
global_batch_size: 4
steps: 2
warmup_steps: 0
learning_rate: 1e-3
correction_probability: 1
log_steps: 1
save_steps: 1
image_steps: 2
num_workers: 0
"""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    return {name: tiny_peers.save(folder / name, name) for name in tiny_peers.PEERS}


@pytest.fixture(scope="module")
def arguments(recipe, coco):
    return ["--config", recipe, "--train", coco / "masks.json"]


@pytest.mark.parametrize("name", tiny_peers.PEERS)
def test_a_run_resumes_exactly_and_leaves_that_models_own_directory(arguments, peers, tmp_path, name):
    given = [*arguments, "--model", peers[name]]
    said = run("finetune_masks", *given, "--output_dir", tmp_path / "whole")
    assert said.splitlines()[-1].startswith(f"  efficientsam evaluate masks --model {tmp_path / 'whole' / 'model'}")
    stopped_after(1, tmp_path / "whole", tmp_path / "resumed")
    run("finetune_masks", *given, "--output_dir", tmp_path / "resumed")
    assert_equal(tmp_path / "resumed", tmp_path / "whole")

    saved = tmp_path / "whole" / "model"
    model, info = AutoModelForMaskGeneration.from_pretrained(saved, output_loading_info=True)
    before = tiny_peers.PEERS[name]()
    assert type(model) is type(before) and not info["missing_keys"] and not info["unexpected_keys"]
    old = before.state_dict()
    changed = {one.split(".")[0] for one, value in model.state_dict().items() if not torch.equal(value, old[one])}
    assert {"vision_encoder", "prompt_encoder", "mask_decoder"} <= changed
    file = "preprocessor_config.json"
    assert (saved / file).read_bytes() == (peers[name] / file).read_bytes()
    card = card_of(tmp_path / "whole")
    assert card.data.pipeline_tag == "mask-generation" and f"AutoProcessor, {type(model).__name__}\n" in card.text
    assert "efficientsam" not in card.data.tags
    scores = load_mask_predictor(str(saved), "cpu").input_size()
    assert scores == {"height": 64, "width": 64}


@pytest.mark.parametrize("name", ["sam", "sam_hq"])
def test_the_processor_that_is_saved_is_loaded_by_transformers(arguments, peers, tmp_path, name):
    run("finetune_masks", *arguments, "--model", peers[name], "--steps", 1, "--output_dir", tmp_path / "run")
    processor = AutoProcessor.from_pretrained(tmp_path / "run" / "model")
    assert processor(Image.new("RGB", (40, 30)), return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)


@pytest.fixture(scope="module")
def one_image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    (folder / "images").mkdir()
    image = Image.new("RGB", (64, 48), (20, 30, 40))
    ImageDraw.Draw(image).ellipse((10, 8, 40, 36), fill=(250, 220, 90))
    image.save(folder / "images" / "0.png")
    polygon = [10, 22, 16, 12, 25, 8, 34, 12, 40, 22, 34, 32, 25, 36, 16, 32]
    annotation = {"id": 1, "image_id": 0, "segmentation": [polygon], "iscrowd": 0, "category_id": 1}
    record = {"id": 0, "file_name": "0.png", "width": 64, "height": 48}
    (folder / "one.json").write_text(json.dumps({"images": [record], "annotations": [annotation]}))
    return folder / "one.json"


@pytest.mark.parametrize("name", tiny_peers.PEERS)
def test_the_loss_falls_on_one_image(recipe, one_image, peers, tmp_path, name):
    given = ["--config", recipe, "--train", one_image, "--model", peers[name], "--global_batch_size", 1]
    given += ["--steps", 20, "--save_steps", 20, "--image_steps", 20, "--learning_rate", 2e-2, "--crop_scale", 1]
    given += ["--box_probability", 1, "--corrections", 0, "--single_mask_probability", 0, "--flip", "false"]
    run("finetune_masks", *given, "--output_dir", tmp_path / "run")
    losses = [row["loss"] for row in curve(tmp_path / "run")]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_accumulated_batches_agree_with_one_though_there_is_batch_normalisation(arguments, peers, tmp_path):
    given = [*arguments, "--model", peers["edgetam"]]
    run("finetune_masks", *given, "--output_dir", tmp_path / "one")
    run("finetune_masks", *given, "--output_dir", tmp_path / "accumulated", "--batch_size", 2)
    assert_close(tmp_path / "accumulated", tmp_path / "one", curves=1e-4, values=1e-4)


def test_two_processes_agree_with_one(arguments, peers, tmp_path):
    given = [*arguments, "--model", peers["sam2"]]
    run("finetune_masks", *given, "--output_dir", tmp_path / "one")
    done = fork("finetune_masks", *given, "--output_dir", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "two", tmp_path / "one", curves=1e-4, values=1e-4)


def test_low_rank_updates_are_saved_by_themselves_too(arguments, peers, tmp_path):
    given = [*arguments, "--model", peers["sam"], "--lora", 2, "--save_lora", "true", "--freeze", "prompt_encoder"]
    run("finetune_masks", *given, "--output_dir", tmp_path / "run")
    saved = tmp_path / "run" / "model"
    base = AutoModelForMaskGeneration.from_pretrained(peers["sam"])
    ours = PeftModel.from_pretrained(base, saved / "lora").merge_and_unload().state_dict()
    theirs = AutoModelForMaskGeneration.from_pretrained(saved).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    names = load_file(saved / "lora" / "adapter_model.safetensors")
    assert not any("prompt_encoder" in name for name in names)
    config = json.loads((saved / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(peers["sam"])


def test_a_peer_is_evaluated_as_it_was_trained(arguments, peers, coco, tmp_path):
    """By the same input and the same decoding: what was learnt shows."""
    given = [*arguments, "--model", peers["sam3_tracker"], "--steps", 60, "--save_steps", 60, "--image_steps", 60]
    given += ["--learning_rate", 3e-3, "--box_probability", 1, "--corrections", 0, "--crop_scale", 1]
    run("finetune_masks", *given, "--output_dir", tmp_path / "run")
    models = [peers["sam3_tracker"], tmp_path / "run" / "model"]
    data = ["--annotations", coco / "masks.json", "--prompts", "box", "click2", "--clicks", "error"]
    run("evaluate_masks", "--model", *models, *data, "--num_workers", 0, "--output", tmp_path / "scores.json")
    results = json.loads((tmp_path / "scores.json").read_text())["results"]
    before, after = (results[str(one)]["box"]["confident"]["all"]["miou"] for one in models)
    assert after > before + 0.1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--cache_embeddings", "true", "--freeze", "vision_encoder", "--crop_scale", 1, "--flip", "false",
          "--color_jitter", 0], "--cache_embeddings is for EfficientSAM alone; leave it out with"),
        (["--cells", 6], "--cells is for EfficientSAM alone"),
        (["--encoder", "runs/sami/model"], "--encoder is for EfficientSAM alone"),
        (["--mask_prompts", "true"], "--mask_prompts is for EfficientSAM alone"),
        (["--background_points", "false"], "--background_points is for EfficientSAM alone"),
        (["--image_size", 128], "takes 64 pixels alone"),
        (["--save_lora", "true"], "--save_lora saves what --lora trains; give its rank."),
        (["--lora", 2, "--save_lora", "true", "--encoder", "runs/sami/model"], "--save_lora saves what is added to"),
    ],
)  # fmt: skip
def test_what_is_for_ours_alone_is_refused(arguments, peers, tmp_path, options, sentence):
    given = [*arguments, "--model", peers["sam"], *options, "--output_dir", tmp_path / "run"]
    assert sentence in refuse("finetune_masks", *given)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--layer_decay", 0.8], "--layer_decay: the encoder has no numbered layers; leave it out."),
        (["--lora", 2], "which the encoder of EdgeTamModel lacks; leave it out."),
        (["--train_last_layers", 1], "the encoder has no numbered layers"),
    ],
)
def test_what_a_convolutional_encoder_lacks_is_refused(arguments, peers, tmp_path, options, sentence):
    given = [*arguments, "--model", peers["edgetam"], *options, "--output_dir", tmp_path / "run"]
    assert sentence in refuse("finetune_masks", *given)


def test_a_processor_for_another_size_is_refused(arguments, tmp_path):
    folder = tiny_peers.save(tmp_path / "sam2", "sam2")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"height": 96, "width": 96}}))
    said = refuse("finetune_masks", *arguments, "--model", folder, "--output_dir", tmp_path / "run")
    assert "makes 96 pixels and the model takes 64; correct its" in said
