"""Does distillation help a small student, and which stage of it? The same number of steps in every arm.

    python training/distillation_study.py               # everything that is not there yet, then the table
    python training/distillation_study.py --arms vit_scratch vit_embeddings --seeds 0

The teacher is the bundled checkpoint at its 512 pixels, its outputs cached once; students read 256 pixels. Every arm
takes 120 steps of 4 of the same 96 images of coco-train: `scratch` on their masks; `features` and `embeddings` half of
them on what the teacher's encoder says and then half on the masks; `prompts` as `embeddings`, but with the teacher's
masks in place of the data's. `vit` is a plain vision transformer, `convnext` a small ConvNeXt, both with random
weights; `teacher` is the teacher itself. Stopping, going on and where the numbers go: see
`hf_efficientsam.training.engine.studies`.
"""

import json
from functools import partial
from pathlib import Path

import torch
from transformers import ConvNextBackbone, ConvNextConfig

from hf_efficientsam.training.engine.checkpoints import replaced_folder
from hf_efficientsam.training.engine.config import parse_config
from hf_efficientsam.training.engine.run import run_script
from hf_efficientsam.training.engine.studies import StudyConfig, run_stage, run_study

HERE = Path(__file__).parent
RECIPES = HERE / "recipes" / "studies"
TEACHER, IMAGES, VAL_IMAGES = "bundled", 96, 40
STEPS = 120  # of an arm
STUDENTS = ("vit", "convnext")
CONVNEXT = {"depths": [2, 2, 4, 2], "hidden_sizes": [24, 48, 96, 192]}
STAGES = ("scratch", "features", "embeddings", "prompts")
ARMS = ["teacher", *(f"{student}_{stage}" for student in STUDENTS for stage in STAGES)]
TITLES = {"box": "box mIoU", "click1": "1 click mIoU"}


def new_student(root: Path, student: str, seed: int) -> list:
    """Options that make a student with random weights."""
    if student == "vit":
        return ["--hidden_size", 96, "--num_attention_heads", 3]
    folder = root / "convnext" / f"seed_{seed}"
    if not folder.is_dir():
        torch.manual_seed(seed)
        backbone = ConvNextBackbone(ConvNextConfig(**CONVNEXT, out_features=["stage2", "stage3", "stage4"]))
        with replaced_folder(folder) as writing:
            backbone.save_pretrained(writing)
    return ["--encoder", folder]


def mask_options(root: Path) -> list:
    return ["--config", RECIPES / "distillation_masks.yaml", "--train", root / "train" / "instances.json"]


def teacher_options(root: Path) -> list:
    """For masks of the teacher: it answers on two fixed views of an image, whole and mirrored."""
    return ["--teacher", TEACHER, "--cache_dir", root / "answers", "--flip", "false", "--views", 2]


def prepare(config: StudyConfig, root: Path) -> None:
    """The images, and the teacher's outputs."""
    source, train = Path(config.data) / "coco-train" / "instances_train.json", root / "train" / "instances.json"
    chosen = ["--annotations", source, "--limit", IMAGES, "--output", train]
    run_stage(root, train, HERE / "filter_annotations.py", *chosen)
    photographs = root / "photographs"
    photographs.mkdir(exist_ok=True)
    for record in json.loads(train.read_text())["images"]:
        link = photographs / record["file_name"]
        if not link.is_symlink():
            link.symlink_to((train.parent / "images" / record["file_name"]).resolve())
    cached = ["--teacher", TEACHER, "--images", photographs, "--size", 256, "--crop_scale", 0.5, "--views", 2]
    cached += ["--part_size", 32, "--batch_size", 4, "--num_workers", 1, "--output_dir", root / "cache"]
    run_stage(root, root / "cache" / "index.safetensors", HERE / "cache_features.py", *cached)
    one_step = [*mask_options(root), *teacher_options(root), *new_student(root, "vit", 0), "--steps", 1]
    run_stage(root, root / "answers", HERE / "finetune_masks.py", *one_step, "--output_dir", root / "first_step")


def train_encoder(root: Path, student: str, stage: str, seed: int, folder: Path) -> list:
    """The first half of an arm's steps; how `finetune_masks.py` goes on from there."""
    output = folder / "encoder"
    given = ["--images", root / "photographs", "--cache", root / "cache", "--seed", seed, "--output_dir", output]
    if stage == "features" and student == "vit":
        recipe = ["--config", RECIPES / "distillation_sami.yaml"]
        return ["--encoder", run_stage(root, output / "model", HERE / "sami.py", *recipe, *given)]
    recipe = ["--config", RECIPES / "distillation_encoder.yaml", "--steps", STEPS // 2]
    target = ["--target", "features" if stage == "features" else "embeddings", *new_student(root, student, seed)]
    return ["--model", run_stage(root, output / "model", HERE / "distill.py", *recipe, *target, *given)]


def train(root: Path, arm: str, seed: int, folder: Path) -> Path:
    """The arm's model."""
    student, stage = arm.split("_")
    if stage == "scratch":
        start, steps = new_student(root, student, seed), STEPS
    else:
        start, steps = train_encoder(root, student, stage, seed, folder), STEPS - STEPS // 2
    options = [*mask_options(root), *start, "--steps", steps, "--seed", seed]
    if stage == "prompts":
        options += teacher_options(root)
    output = folder / "masks"
    return run_stage(root, output / "model", HERE / "finetune_masks.py", *options, "--output_dir", output)


def measure(config: StudyConfig, root: Path, arm: str, seed: int, folder: Path) -> dict[str, float]:
    if arm == "teacher":
        model, metrics = TEACHER, root / "teacher.json"
    else:
        model, metrics = train(root, arm, seed, folder), folder / "metrics.json"
    annotations = Path(config.data) / "coco-val-dev" / "instances_val.json"
    arguments = ["--annotations", annotations, "--limit", VAL_IMAGES, "--prompts", *TITLES, "--model", model]
    run_stage(root, metrics, HERE / "evaluate_masks.py", *arguments, "--output", metrics)
    results = json.loads(metrics.read_text())["results"]
    return {name: results[name]["confident"]["all"]["miou"] for name in TITLES}


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(StudyConfig, __doc__, arguments)
    root = Path(config.output_dir or "runs/distillation_study")
    functions = (partial(prepare, config, root), partial(measure, config, root))
    run_study("distillation_study", config, root, HERE, ARMS, TITLES, *functions)


if __name__ == "__main__":
    run_script("distillation_study", main)
