"""Does SAMI help, and which of its choices? The paper's ablations at a size that two CPU cores finish in hours.

    python training/sami_study.py --jobs 2        # everything that is not there yet, then the table
    python training/sami_study.py --arms scratch mae sami --seeds 0

Each arm is pretrained by `sami.py` on the same images for the same number of steps, then scored twice: frozen, by
`probe_encoder.py`, and as the start of the same short mask fine-tuning (`finetune_masks.py`, `evaluate_masks.py`).
What is done is kept under `--output_dir`, the numbers in `results/sami_study.json` and .png, the table goes into
`training/README.md`; see `hf_efficientsam.training.engine.studies` for how to stop and go on.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from hf_efficientsam.training.data.images import FolderImages
from hf_efficientsam.training.engine.checkpoints import replaced_folder
from hf_efficientsam.training.engine.config import parse_config
from hf_efficientsam.training.engine.run import run_script
from hf_efficientsam.training.engine.studies import StudyConfig, run_stage, run_study

HERE = Path(__file__).parent
PRETRAINING, FINETUNING = HERE / "recipes" / "studies" / "sami.yaml", HERE / "recipes" / "studies" / "sami_masks.yaml"
# What each arm changes in the pretraining's recipe; all but the pixels' have the cached teacher.
ARMS = {
    "scratch": {"base_learning_rate": 0, "epochs": 1, "epoch_images": 64},  # the start that all arms share
    "mae": {"target": "pixels", "decoder_type": "all_token"},
    "sami": {},
    "sami_cosine": {"loss": "cosine"},
    "sami_all_token": {"decoder_type": "all_token"},
    "sami_masked_50": {"mask_ratio": 0.5},
    "sami_masked_85": {"mask_ratio": 0.85},
    "sami_short": {"epochs": 1, "warmup_epochs": 0.1},
}


TITLES = {
    "nearest_neighbors": "10-NN",
    "linear_probe": "linear probe",
    "box": "box mIoU",
    "click1": "1 click mIoU",
}


@dataclass(frozen=True)
class SamiStudyConfig(StudyConfig):
    teacher: str = field(default="../shared/weights/vit-small-patch14-teacher", metadata={"help": "vision model"})


def small_images(config: SamiStudyConfig, root: Path) -> Path:
    """Photographs without those to evaluate on, made small once, because decoding them takes as long as a step."""
    folder, data = root / "images", Path(config.data)
    if not folder.is_dir():
        names = ["train-seg/images", "coco-train/images", "unlabelled/images", "saliency/train/images"]
        source = FolderImages([data / name for name in [*names, "classification/train"]])
        with replaced_folder(folder) as writing:
            for key, image in tqdm(source, desc="small images", mininterval=2):
                scale = min(1, 160 / min(image.size))
                small = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
                path = (writing / key).with_suffix(".jpg")
                path.parent.mkdir(parents=True, exist_ok=True)
                small.save(path, quality=92)
    return folder


def cache_teacher(config: SamiStudyConfig, root: Path) -> None:
    """The teacher's features, which all arms but one reconstruct."""
    sizes = ["--teacher_size", 112, "--size", 128, "--views", 2]
    arguments = ["--images", small_images(config, root), "--teacher", config.teacher, *sizes]
    cache = root / "cache"
    script = HERE / "cache_features.py"
    run_stage(root, cache / "index.safetensors", script, *arguments, "--output_dir", cache)


def pretrain(root: Path, arm: str, seed: int, folder: Path) -> Path:
    """The arm's encoder."""
    changes = ARMS[arm] | ({} if arm == "mae" else {"cache": root / "cache"})
    arguments = ["--config", PRETRAINING, "--images", root / "images", "--seed", seed]
    arguments += [word for name, value in changes.items() for word in (f"--{name}", value)]
    output = folder / "pretraining"
    return run_stage(root, output / "model", HERE / "sami.py", *arguments, "--output_dir", output)


def measure(config: SamiStudyConfig, root: Path, arm: str, seed: int, folder: Path) -> dict[str, float]:
    data, encoder = Path(config.data), pretrain(root, arm, seed, folder)
    probe, masks, metrics = folder / "probe.json", folder / "masks", folder / "metrics.json"
    arguments = ["--encoder", encoder, "--data", data / "classification", "--size", 96]
    arguments += ["--train_limit", 1500, "--test_limit", 1000, "--output", probe]
    run_stage(root, probe, HERE / "probe_encoder.py", *arguments)

    train = [data / name / "instances_train.json" for name in ("train-seg", "coco-train", "coco-train")]
    arguments = ["--config", FINETUNING, "--train", *train, "--encoder", encoder, "--seed", seed]
    run_stage(root, masks / "model", HERE / "finetune_masks.py", *arguments, "--output_dir", masks)

    annotations = data / "coco-val-dev" / "instances_val.json"
    arguments = ["--annotations", annotations, "--prompts", "box", "click1", "--model", masks / "model"]
    run_stage(root, metrics, HERE / "evaluate_masks.py", *arguments, "--output", metrics)
    accuracy, results = json.loads(probe.read_text()), json.loads(metrics.read_text())["results"]
    return {
        **{name: accuracy[name] for name in ("nearest_neighbors", "linear_probe")},
        **{name: results[name]["confident"]["all"]["miou"] for name in ("box", "click1")},
    }


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(SamiStudyConfig, __doc__, arguments)
    root = Path(config.output_dir or "runs/sami_study")
    prepare = partial(cache_teacher, config, root)
    run_study("sami_study", config, root, HERE, list(ARMS), TITLES, prepare, partial(measure, config, root))


if __name__ == "__main__":
    run_script("sami_study", main)
