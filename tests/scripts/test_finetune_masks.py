"""`training/finetune_masks.py`, run as a user does, on tiny models and a handful of images."""

import json
import shutil
import signal

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, Features, Sequence
from datasets import Image as ImageFeature
from PIL import Image
from script_runs import (
    ROOT,
    TRAINING,
    assert_close,
    assert_equal,
    card_of,
    curve,
    fork,
    kill_after_step_5,
    load_script,
    refuse,
    run,
    steps_saved,
    stop_all_after_step_5,
    stopped_after,
    weights,
)
from transformers import Dinov2Config, Dinov2Model

from hf_efficientsam import (
    EfficientSamForPreTraining,
    EfficientSamModel,
    EfficientSamProcessor,
    EfficientSamSamiConfig,
    EfficientSamVisionModel,
)
from hf_efficientsam.inference.loading import load_own_head
from hf_efficientsam.training.data import coco as coco_module
from hf_efficientsam.training.data.coco import CocoMasks, decode_rles
from hf_efficientsam.training.data.reading import decode_image
from hf_efficientsam.training.engine.config import parse_config
from hf_efficientsam.training.engine.encoder_weights import select_weights
from hf_efficientsam.training.masks.metrics import filled_box, mask_iou

SIZE = 64  # of the model input
STEPS = 7
# Epochs have 2 steps of 4 images: checkpoints lie within epochs and between them. Images have 1 to 3 masks, so that
# a batch's share of the masks is not its share of the images.
RECIPE = f"""
image_size: {SIZE}
max_masks: 3
global_batch_size: 4
steps: {STEPS}
warmup_steps: 2
learning_rate: 1e-3
layer_decay: 0.9
synthetic_steps: 1
synthetic_ratio: 0.2
mask_only_rounds: 1
ema_decay: 0.5
log_steps: 1
save_steps: 3
image_steps: 5
num_workers: 0
"""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def arguments(recipe, coco, tiny_model) -> list:
    masks = coco / "masks.json"  # twice, so that there are 10 images
    return ["--config", recipe, "--train", masks, masks, "--model", tiny_model]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The output folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run("finetune_masks", *arguments, "--output_dir", folder)
    return folder


# -------------------------------------------------------------------------------------------- what it leaves


def test_a_run_leaves_a_model_a_processor_a_curve_and_pictures(whole, tiny_model):
    model, info = EfficientSamModel.from_pretrained(whole / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.float32 and model.config.vision_config.image_size == SIZE
    before = EfficientSamModel.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "vision_encoder.layers.0.mlp.fc1.weight" in changed
    assert "prompt_encoder.box_top_left_embed.weight" in changed
    assert "prompt_encoder.position_embedding.frequencies" not in changed
    name = "vision_encoder.layers.0.mlp.fc1.weight"
    averaged, last = weights(whole)[name], weights(whole)[f"checkpoint.model.{name}"]
    assert 0 < (averaged - last).abs().max() < 0.01

    size = EfficientSamProcessor.from_pretrained(whole / "model").image_processor.size
    assert (size.height, size.width) == (SIZE, SIZE)
    rows = curve(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["loss"] > 0 for row in rows) and rows[2]["lr"] == 1e-3 > rows[-1]["lr"]
    assert (whole / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (whole / "images").iterdir()) == [f"masks_{n:08}.png" for n in (5, 7)]
    assert Image.open(whole / "images" / "masks_00000007.png").size > (3 * SIZE, 4 * SIZE)
    assert steps_saved(whole) == ["step_00000006", "step_00000007"]
    assert card_of(whole).data.pipeline_tag == "mask-generation"


def test_a_finished_run_has_nothing_left_to_do(arguments, whole):
    before, rows = (whole / "model" / "model.safetensors").read_bytes(), curve(whole)
    assert "holds a finished run" in run("finetune_masks", *arguments, "--output_dir", whole)
    assert (whole / "model" / "model.safetensors").read_bytes() == before and curve(whole) == rows


# ------------------------------------------------------------------------------------------------- exactness


def test_a_killed_and_resumed_run_ends_as_one_that_was_not(arguments, whole, tmp_path):
    """With a worker; without one a run on cells and cached views is, below."""
    output = tmp_path / "run"
    given = [*arguments, "--output_dir", output, "--num_workers", 1]
    killed = fork("finetune_masks", *given, before=kill_after_step_5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert steps_saved(output) == ["step_00000003"] and [row["step"] for row in curve(output)] == [1, 2, 3, 4, 5]
    # Half a checkpoint, as if the kill had struck while the next one was written.
    (output / "checkpoints" / "writing").mkdir()
    (output / "checkpoints" / "writing" / "model.safetensors").write_bytes(b"half of")
    run("finetune_masks", *given)
    assert_equal(output, whole)
    assert steps_saved(output) == ["step_00000006", "step_00000007"]


def test_a_run_that_is_told_to_stop_saves_its_step_and_ends_as_one_that_was_not(arguments, whole, tmp_path):
    """Its worker gets the signal too."""
    output = tmp_path / "run"
    given = [*arguments, "--output_dir", output, "--num_workers", 1]
    stopped = fork("finetune_masks", *given, before=stop_all_after_step_5)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "Stopped by SIGTERM after step 5, which is saved" in stopped.stderr.splitlines()[-1]
    assert "Traceback" not in stopped.stderr and steps_saved(output) == ["step_00000003", "step_00000005"]
    run("finetune_masks", *given)
    assert_equal(output, whole)


def test_a_folder_of_images_and_masks_is_trained_on(recipe, tiny_model, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / "own" / kind).mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (40, 30), (30 * i, 0, 0)).save(tmp_path / "own" / "images" / f"{i}.jpg")
        mask = np.zeros((30, 40), np.uint8)
        mask[3:12, 4:20], mask[15:28, 20:38] = 1, 2
        Image.fromarray(mask).save(tmp_path / "own" / "masks" / f"{i}.png")
    options = ["--config", recipe, "--train", tmp_path / "own", "--model", tiny_model, "--steps", 2]
    said = run("finetune_masks", *options, "--output_dir", tmp_path / "run")
    assert "8 images with 16 masks" in said and (tmp_path / "run" / "model").is_dir()


@pytest.mark.parametrize("batch_size", [2, 1])
def test_accumulated_gradients_are_those_of_the_whole_batch(arguments, whole, tmp_path, batch_size):
    run("finetune_masks", *arguments, "--output_dir", tmp_path / "run", "--batch_size", batch_size)
    assert_close(tmp_path / "run", whole, curves=1e-4, values=1e-4)


def test_two_processes_agree_with_one_even_if_one_of_them_is_killed(arguments, whole, tmp_path):
    output = tmp_path / "run"
    given = [*arguments, "--output_dir", output]
    killed = fork("finetune_masks", *given, before=kill_after_step_5, processes=2)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert steps_saved(output) == ["step_00000003"]
    done = fork("finetune_masks", *given, "--batch_size", 1, processes=2)
    assert done.returncode == 0, done.stderr
    assert_close(output, whole, curves=1e-4, values=1e-4)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streamed_shards_resume_where_they_were(recipe, shards, tiny_model, tmp_path, num_workers):
    given = ["--config", recipe, "--shards", *shards, "--model", tiny_model, "--shuffle_buffer", 2, "--save_steps", 5]
    given += ["--epoch_images", 12, "--num_workers", num_workers]  # 3 steps an epoch: step 5 is the second of its own
    run("finetune_masks", *given, "--output_dir", tmp_path / "whole")
    stopped_after(5, tmp_path / "whole", tmp_path / "resumed")
    run("finetune_masks", *given, "--output_dir", tmp_path / "resumed")
    assert_equal(tmp_path / "resumed", tmp_path / "whole")


# ----------------------------------------------------------------------------------------------- what it takes


def test_every_kind_of_data(recipe, coco, shards, tiny_model, tmp_path):
    masks = CocoMasks(coco / "masks.json")
    features = Features({"image": ImageFeature(), "masks": Sequence(ImageFeature())})
    rows = [
        {"image": masks[i].image, "masks": [Image.fromarray(255 * mask) for mask in decode_rles(masks[i].rles)]}
        for i in range(5)
    ]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "dataset")
    kinds = {
        "dataset": ["--dataset", tmp_path / "dataset"],
        "shards": ["--shards", *shards, "--epoch_images", 4],
        "part": ["--train", coco / "masks.json", "--every", 2, "--global_batch_size", 3],
    }
    for name, given in kinds.items():
        given = ["--config", recipe, "--model", tiny_model, *given, "--steps", 1, "--output_dir", tmp_path / name]
        run("finetune_masks", *given)
        assert curve(tmp_path / name)[0]["loss"] > 0


@pytest.fixture
def pretrained(tmp_path):
    """An encoder as wide as the tiny model's, without a neck, from a configuration that knows nothing of that neck."""
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pretrain_image_size": SIZE}
    EfficientSamForPreTraining(EfficientSamSamiConfig(vision_config=vision)).save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


def test_a_pretrained_encoder(arguments, pretrained, tmp_path):
    run("finetune_masks", *arguments, "--encoder", pretrained, "--steps", 1, "--output_dir", tmp_path / "run")
    model, info = EfficientSamModel.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.vision_config.output_channels == 32


@pytest.fixture
def vit(tmp_path):
    """A trained ViT of twice the width and heads that the test asks for, with a patch and a grid of its own."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=64, num_attention_heads=4, num_hidden_layers=12, patch_size=14, image_size=70)
    Dinov2Model(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_the_encoder_of_a_new_model_is_selected_from_a_trained_vit(recipe, coco, vit, tmp_path):
    given = ["--config", recipe, "--train", coco / "masks.json", "--select_weights", vit, "--hidden_size", 32]
    given += ["--num_attention_heads", 2, "--freeze", "vision_encoder", "--steps", 1, "--max_masks", 1]
    run("finetune_masks", *given, "--output_dir", tmp_path / "run")
    encoder = EfficientSamModel.from_pretrained(tmp_path / "run" / "model").vision_encoder
    assert encoder.config.pretrain_image_size == encoder.config.image_size == SIZE
    selected = EfficientSamVisionModel(encoder.config).vision_encoder
    select_weights(Dinov2Model.from_pretrained(vit), selected)
    ours, expected = encoder.state_dict(), selected.state_dict()
    names = [name for name in expected if not name.startswith("neck.")]
    assert names and all(torch.equal(ours[name], expected[name]) for name in names)


def build(**options):
    """The model that a recipe starts from, and the script."""
    script = load_script("finetune_masks")
    recipe = script.MasksConfig(
        **{name: str(value) if name != "mask_prompts" else value for name, value in options.items()}
    )
    return script.build_model(recipe)


def test_a_decoder_is_handed_over_to_an_encoder_of_another_width(pretrained):
    """As from S to Ti: all but the encoder and its neck."""
    bundled, model = build(model="bundled"), build(model="bundled", encoder=pretrained)
    assert model.vision_encoder.embeddings.projection.out_channels == 16
    assert model.get_image_embeddings(torch.zeros(1, 3, SIZE, SIZE)).shape == (1, 256, 4, 4)
    for part in ("prompt_encoder", "mask_decoder"):
        ours, theirs = getattr(model, part).state_dict(), getattr(bundled, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_kinds_of_prompts_come_and_go(tiny_model, tmp_path):
    without = build(model=tiny_model, mask_prompts=False)
    assert without.prompt_encoder.mask_embed is None and without.prompt_encoder.background_embed is not None
    without.save_pretrained(tmp_path)
    EfficientSamProcessor.from_pretrained(tiny_model).save_pretrained(tmp_path)
    model, before = build(model=tmp_path, mask_prompts=True), build(model=tiny_model)
    assert model.config.prompt_encoder_config.mask_prompts
    assert not model.prompt_encoder.no_mask_embed.weight.any()  # so that numbers without a mask stay
    ours, theirs = model.state_dict(), before.state_dict()
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} <= {
        name for name in ours if "mask_embed" in name
    }
    assert build(model=tmp_path).prompt_encoder.mask_embed is None


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [1 / 3, 2 / 3, 1, 0.8, 0.6, 0.4, 0.2]), ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1])],
)
def test_schedules(arguments, tmp_path, schedule, expected):
    given = [*arguments, "--schedule", schedule, "--max_masks", 1, "--output_dir", tmp_path / "run"]
    run("finetune_masks", *given)
    assert [row["lr"] for row in curve(tmp_path / "run")] == pytest.approx([1e-3 * share for share in expected])


def test_the_encoder_learns_more_slowly_and_its_first_layers_most(tiny_model):
    script = load_script("finetune_masks")
    config = script.MasksConfig(encoder_lr_scale=0.5, layer_decay=0.8, learning_rate=1.0)
    model = build(model=tiny_model)
    optimizer, _ = script.get_optimizer(config, model, steps=10)
    rates = {id(parameter): group["initial_lr"] for group in optimizer.param_groups for parameter in group["params"]}
    encoder = model.vision_encoder
    parts = (
        encoder.layers[0].mlp.fc1,
        encoder.embeddings.projection,
        encoder.neck.conv,
        model.mask_decoder.iou_token,
    )
    assert [rates[id(part.weight)] for part in parts] == pytest.approx([0.4, 0.32, 1, 1])


def test_half_precision_keeps_the_masks(arguments, whole, tmp_path):
    half = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    done = fork("finetune_masks", *arguments, "--steps", 1, "--output_dir", tmp_path / "run", environment=half)
    assert done.returncode == 0, done.stderr
    # Later steps start from other weights, and the IoU's loss is of masks after the threshold.
    first = (curve(folder)[0] for folder in (tmp_path / "run", whole))
    ours, theirs = ({name: row[name] for name in ("focal", "dice", "bce")} for row in first)
    assert ours == pytest.approx(theirs, abs=1e-3) and ours != theirs


def changed(folder, tiny_model) -> set[str]:
    """Parts of the model that training has changed, the encoder's neck and layers apart."""
    after = EfficientSamModel.from_pretrained(folder / "model").state_dict()
    before = EfficientSamModel.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    assert after.keys() == before.keys()
    names = {name for name, value in after.items() if not torch.equal(value, before[name])}
    return {".".join(name.split(".")[: 2 if name.startswith("vision") else 1]) for name in names}


OPTIONS = {
    "all": ([], {"vision_encoder.embeddings", "vision_encoder.layers"}),
    "frozen": (["--freeze", "vision_encoder"], set()),
    "lora": (["--lora", 2], {"vision_encoder.layers"}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_trained(arguments, tiny_model, tmp_path, name):
    options, expected = OPTIONS[name]
    given = [*arguments, *options, "--steps", 3, "--synthetic_steps", 0, "--synthetic_ratio", 0]
    run("finetune_masks", *given, "--output_dir", tmp_path / "run")
    found = changed(tmp_path / "run", tiny_model)
    neck = set() if name == "frozen" else {"vision_encoder.neck"}
    assert found == expected | neck | {"prompt_encoder", "mask_decoder"}


def test_the_iou_head_alone_is_calibrated(arguments, tiny_model, tmp_path):
    parts = ["--freeze", "vision_encoder", "prompt_encoder", "mask_decoder", "--unfreeze", "mask_decoder.iou_head"]
    given = [*arguments, *parts, "--dice_weight", 0, "--balanced_bce_weight", 0, "--steps", 3]
    run("finetune_masks", *given, "--output_dir", tmp_path / "run")
    after = EfficientSamModel.from_pretrained(tmp_path / "run" / "model").state_dict()
    before = EfficientSamModel.from_pretrained(tiny_model).state_dict()
    trained = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert trained and all(name.startswith("mask_decoder.iou_head.") for name in trained)


def test_a_saliency_head_stays_with_its_encoder_and_is_left_out_aloud_with_another(arguments, tiny_model, tmp_path):
    start = shutil.copytree(tiny_model, tmp_path / "start")
    head = tiny.saliency_head()
    head.save_pretrained(start / "saliency")
    given = [*arguments, "--model", start, "--steps", 1]
    said = run("finetune_masks", *given, "--freeze", "vision_encoder", "--output_dir", tmp_path / "frozen")
    kept = load_own_head(str(tmp_path / "frozen" / "model")).state_dict()
    assert "saliency head" not in said and all(torch.equal(kept[name], one) for name, one in head.state_dict().items())
    said = run("finetune_masks", *given, "--output_dir", tmp_path / "trained")
    assert f"train_saliency.py --model {tmp_path / 'trained'}/model" in said
    assert load_own_head(str(tmp_path / "trained" / "model")) is None


ALIKE = ["--crop_scale", 1, "--flip", "false", "--color_jitter", 0]


def test_a_run_on_cells_and_cached_views_resumes_exactly_and_encodes_each_view_once(arguments, tiny_model, tmp_path):
    sampled = ["--train_last_layers", 1, "--cache_embeddings", "true", "--views", 3, "--cells", 6]
    given = [*arguments, *ALIKE, *sampled, "--all_cells_ratio", 0.3]
    run("finetune_masks", *given, "--output_dir", tmp_path / "whole")
    parts = sorted(path.parent.name for path in (tmp_path / "whole" / "embeddings").glob("file_1/view_*/part_*"))
    assert parts == ["view_0000", "view_0001", "view_0002"]
    names = changed(tmp_path / "whole", tiny_model)
    assert names == {"vision_encoder.layers", "vision_encoder.neck", "prompt_encoder", "mask_decoder"}
    assert all(row["loss"] > 0 for row in curve(tmp_path / "whole"))

    resumed = [*given, "--output_dir", tmp_path / "resumed"]
    killed = fork("finetune_masks", *resumed, before=kill_after_step_5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "encoding" in killed.stderr
    run("finetune_masks", *resumed)
    assert_equal(tmp_path / "resumed", tmp_path / "whole")
    run("finetune_masks", *given, "--batch_size", 2, "--output_dir", tmp_path / "accumulated")
    assert_close(tmp_path / "accumulated", tmp_path / "whole", curves=1e-4, values=1e-4)


def test_a_run_from_a_complete_cache_reads_images_to_draw_them_alone(arguments, tmp_path, monkeypatch):
    cached = ["--freeze", "vision_encoder", "--cache_embeddings", "true", "--views", 2, "--image_steps", 100]
    given = [*arguments, *ALIKE, *cached, "--cache_dir", tmp_path / "cache"]
    run("finetune_masks", *given, "--output_dir", tmp_path / "encodes")
    read = []
    monkeypatch.setattr(coco_module, "decode_image", lambda path, name: read.append(path) or decode_image(path, name))
    run("finetune_masks", *given, "--output_dir", tmp_path / "reads_the_cache")
    assert len(read) == 4, "of the last step's batch, which is drawn"
    assert_equal(tmp_path / "reads_the_cache", tmp_path / "encodes")


def test_a_new_decoder_starts_with_geometric_weights(recipe, coco, tmp_path):
    given = ["--config", recipe, "--train", coco / "masks.json", "--hidden_size", 32, "--num_attention_heads", 2]
    given += ["--steps", 1, "--max_masks", 1, "--learning_rate", 1e-9, "--global_batch_size", 1, "--image_size", 128]
    for name in ("geometric", "random"):
        run("finetune_masks", *given, "--initial_weights", name, "--output_dir", tmp_path / name)
    models = (EfficientSamModel.from_pretrained(tmp_path / name / "model") for name in ("geometric", "random"))
    boxes = torch.tensor([[[16.0, 24.0, 80.0, 104.0]]])
    pixels = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    geometric, random = ((model.eval()(pixels, input_boxes=boxes).pred_masks > 0)[0, 0] for model in models)
    box = filled_box(boxes / 4, 32, 32)[0]
    assert mask_iou(geometric, box).min() > 0.7 > mask_iou(random, box).max()


def test_low_rank_updates_are_merged_and_resume(arguments, tiny_model, tmp_path):
    given = [*arguments, "--lora", 2, "--ema_decay", 0, "--learning_rate", 0.05]
    run("finetune_masks", *given, "--output_dir", tmp_path / "whole")
    after = EfficientSamModel.from_pretrained(tmp_path / "whole/model").state_dict()
    before = EfficientSamModel.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    for kind, rank in (("q", 2), ("v", 2), ("k", 0), ("o", 0)):
        name = f"vision_encoder.layers.0.attention.{kind}_proj.weight"
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-5) == rank, name
    stopped_after(6, tmp_path / "whole", tmp_path / "resumed")
    run("finetune_masks", *given, "--output_dir", tmp_path / "resumed")
    assert_equal(tmp_path / "resumed", tmp_path / "whole")


# ------------------------------------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stepz: 3\n", "there is no option stepz (did you mean steps?)"),
        ("steps: [1\n", "is not YAML"),
        ("steps: many\n", "invalid int value: 'many'"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_config_is_refused(tmp_path, text, sentence):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    assert sentence in refuse("finetune_masks", "--config", path, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--global_batch_size", 64], "10 images are less than one step; lower --global_batch_size 64."),
        (["--batch_size", 3], "--global_batch_size 4 must be a multiple of --batch_size 3"),
        (["--image_size", 100], "--image_size 100 must be a multiple of 16"),
        (["--loss_stride", 3], "must be a multiple of 3 (16, --loss_stride)."),
        (["--steps", 0], "--steps is 0; it must be more than 0."),
        (["--corrections", -1], "--corrections is -1; it must be 0 or more."),
        (["--schedule", "steep"], "--schedule: invalid choice: 'steep'"),
        (["--mask_frame", "up"], "--mask_frame: invalid choice: 'up'"),
        (["--views", 2, 0], "--views is 0; it must be more than 0."),
        (["--freeze", "neck"], "--freeze: invalid choice: 'neck'"),
        (["--freeze", "vision_encoder", "prompt_encoder", "mask_decoder"], "leaves nothing to train"),
        (
            ["--freeze", "mask_decoder", "--unfreeze", "mask_decoder.iou"],
            "--unfreeze mask_decoder.iou: the model has no",
        ),
        (["--unfreeze", "vision_encoder.neck"], "of the encoder choose what is trained by --train_last_layers"),
        (["--freeze", "vision_encoder", "--lora", 2], "leave one of them out"),
        (["--cache_embeddings", "true"], "--cache_embeddings needs --freeze vision_encoder or --train_last_layers"),
        (["--views", 3], "give --cache_embeddings, too"),
        (["--train_last_layers", 1, "--lora", 2], "exclude each other"),
        (["--train_last_layers", 99], "--train_last_layers 99: the encoder has"),
        (["--initial_weights", "good"], "--initial_weights: invalid choice: 'good'"),
        (["--ema_decay", 1], "--ema_decay is 1.0"),
        (["--crop_scale", 1.5], "--crop_scale is 1.5; it must be between 0 and 1."),
        (["--epochs", 0.1], "--epochs 0.1 is less than one step of 2 an epoch"),
        (["--every", 5], "2 images are less than one step"),
        (["--images", "a", "b", "c"], "Give --images one folder, or one for each of the 2 files of --train."),
        (["--images", "elsewhere"], "give the folder of the images (`--images`)"),
        (["--shards", "absent.tar"], "Give --train COCO-style json files or folders, or --dataset, or --shards."),
        (["--trackers", "paper"], "There is no tracker paper here"),
        (["--cells", 6, "--focal_weight", 20], "--cells has no focal loss and no plain cross-entropy"),
    ],
)
def test_what_cannot_train_is_refused(arguments, tmp_path, options, sentence):
    assert sentence in refuse("finetune_masks", *arguments, *options, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "bundled"], "--select_weights starts a new encoder; leave out --model and --encoder."),
        (["--encoder", "runs/sami/model"], "--select_weights starts a new encoder; leave out --model and --encoder."),
        (["--hidden_size", 48, "--num_attention_heads", 3], "has no evenly spaced part of width 48, 3 heads"),
        (["--select_weights", "absent"], "The trained ViT absent cannot be loaded"),
    ],
)
def test_an_encoder_that_cannot_be_selected_is_refused(recipe, coco, vit, tmp_path, options, sentence):
    given = ["--config", recipe, "--train", coco / "masks.json", "--select_weights", vit, *options]
    assert sentence in refuse("finetune_masks", *given, "--output_dir", tmp_path / "run")


def test_shards_without_a_length_of_an_epoch_are_refused(recipe, shards, tmp_path):
    said = refuse("finetune_masks", "--config", recipe, "--shards", *shards, "--output_dir", tmp_path / "run")
    assert said.endswith("give --epoch_images.")


def test_rounds_that_only_give_a_mask_back_need_mask_prompts(recipe, coco, tmp_path):
    given = ["--config", recipe, "--train", coco / "masks.json", "--mask_prompts", "false"]
    assert "set mask_only_rounds to 0" in refuse("finetune_masks", *given, "--output_dir", tmp_path / "run")


def test_an_encoder_for_other_channels_is_refused(arguments, pretrained, tmp_path):
    given = [*arguments, "--model", "bundled", "--encoder", pretrained, "--output_dir", tmp_path / "run"]
    config = json.loads((pretrained / "config.json").read_text())
    config["vision_config"]["output_channels"] = 64
    (pretrained / "config.json").write_text(json.dumps(config))
    assert "gives 64 channels and --model takes 256; choose another." in refuse("finetune_masks", *given)


def test_another_run_in_the_folder_is_refused(arguments, whole):
    said = refuse("finetune_masks", *arguments, "--output_dir", whole, "--weight_decay", 0.3)
    assert "another weight_decay; choose a new --output_dir" in said


def test_it_asks_for_data(tmp_path):
    said = refuse("finetune_masks", "--output_dir", tmp_path / "run")
    assert said == "finetune_masks: Give --train COCO-style json files or folders, or --dataset, or --shards."
    assert not list(tmp_path.iterdir())


def test_an_unreadable_image_ends_the_run_with_its_name(arguments, coco, tiny_model, recipe, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for path in (coco / "images").iterdir():
        (images / path.name).write_bytes(b"no image" if path.name == "3.jpg" else path.read_bytes())
    (tmp_path / "masks.json").write_text((coco / "masks.json").read_text())
    given = ["--config", recipe, "--train", tmp_path / "masks.json", "--model", tiny_model]
    said = run("finetune_masks", *given, "--num_workers", 1, "--output_dir", tmp_path / "run", code=2)
    assert f"finetune_masks: Images of {tmp_path / 'masks.json'} are broken; replace or remove (1):" in said
    assert "3.jpg cannot be read as an image" in said.splitlines()[-1]


@pytest.mark.parametrize(("size", "width"), [("ti", 192), ("s", 384)])
def test_the_papers_recipes_are_the_papers(size, width):
    """arXiv 2312.00863 for the schedule, arXiv 2304.02643 for prompts, rounds and loss."""
    script = load_script("finetune_masks")
    path = TRAINING / "recipes" / "paper" / f"masks_{size}_sa1b.yaml"
    recipe = parse_config(script.MasksConfig, "", ["--config", str(path)])
    assert (recipe.hidden_size, recipe.image_size, recipe.epochs, recipe.global_batch_size) == (width, 1024, 5, 128)
    assert (recipe.learning_rate, recipe.schedule, recipe.weight_decay) == (4e-4, "linear", 0.1)
    assert (recipe.crop_scale, recipe.flip, recipe.color_jitter, recipe.freeze) == (1, False, 0, [])
    assert (recipe.focal_weight, recipe.dice_weight, recipe.iou_weight, recipe.balanced_bce_weight) == (20, 1, 1, 0)
    assert (recipe.corrections, recipe.mask_only_rounds, recipe.correction_probability) == (8, 2, 1)
    assert (recipe.box_probability, recipe.both_probability, recipe.max_clicks, recipe.max_masks) == (0.5, 0, 1, 64)
    assert (recipe.tight_probability, recipe.box_noise, recipe.box_noise_pixels) == (0, 0.1, 20)


def test_the_miniature_learns(tmp_path, monkeypatch):
    """In half of its steps; .ci/run starts the whole without arguments."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # where its recipe looks, as in the repository
    recipe = TRAINING / "recipes" / "miniature" / "masks.yaml"
    run("finetune_masks", "--config", recipe, "--steps", 20, "--log_steps", 1)
    rows = curve(tmp_path / "runs/masks_miniature")
    first, last = (sum(row["loss"] for row in part) for part in (rows[:6], rows[-6:]))
    assert last < 0.95 * first  # single rows are noisy
    EfficientSamProcessor.from_pretrained(tmp_path / "runs/masks_miniature/model")
