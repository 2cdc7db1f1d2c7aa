"""Does SAMI help, and which of its choices? The paper's ablations at a size that two CPU cores finish in hours.

    python training/sami_study.py --jobs 2        # everything that is not there yet, then the table
    python training/sami_study.py --arms scratch mae sami --seeds 0

Each arm is pretrained by `sami.py` on the same images for the same number of steps, then scored twice: frozen, by
`probe_encoder.py`, and as the start of the same short mask fine-tuning (`finetune_masks.py`, `evaluate_masks.py`).
What is done is kept under `--output_dir`, the numbers in `results/sami_study.json` and .png, the table goes into
`training/README.md`; see `hf_efficientsam.training.engine.study` for how to stop, go on and measure anew.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from hf_efficientsam.training.data.images import FolderImages
from hf_efficientsam.training.engine.checkpoints import replaced_folder
from hf_efficientsam.training.engine.config import parse_config
from hf_efficientsam.training.engine.run import run_script
from hf_efficientsam.training.engine.study import Study, StudyOptions

HERE = Path(__file__).parent
PRETRAINING, FINETUNING = HERE / "recipes" / "studies" / "sami.yaml", HERE / "recipes" / "studies" / "sami_masks.yaml"
# What each arm changes in the recipe of pretraining; all but the pixels' have the cached teacher.
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


@dataclass(frozen=True)
class Recipe(StudyOptions):
    teacher: str = field(default="../shared/weights/vit-small-patch14-teacher", metadata={"help": "vision model"})


class SamiStudy(Study):
    """The stages; each makes its result if it is not there."""

    name, arms = "sami_study", tuple(ARMS)
    scores = {
        "nearest_neighbors": "10-NN",
        "linear_probe": "linear probe",
        "box": "box mIoU",
        "click1": "1 click mIoU",
    }

    def images(self) -> Path:
        """Photographs without those to evaluate on, made small once, because decoding them takes as long as a step."""
        folder = self.folder / "images"
        if not folder.is_dir():
            names = ["train-seg/images", "coco-train/images", "unlabelled/images", "saliency/train/images"]
            source = FolderImages([self.data / name for name in [*names, "classification/train"]])
            with replaced_folder(folder) as writing:
                for key, image in tqdm(source, desc="small images", mininterval=2):
                    scale = min(1, 160 / min(image.size))
                    small = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
                    path = (writing / key).with_suffix(".jpg")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    small.save(path, quality=92)
        return folder

    def prepare(self) -> None:
        """The teacher's features."""
        sizes = ["--teacher_size", 112, "--size", 128, "--views", 2]
        arguments = ["--images", self.images(), "--teacher", self.options.teacher, *sizes]
        cache = self.folder / "cache"
        self.stage(cache / "index.safetensors", "cache_features", *arguments, "--output_dir", cache)

    def pretrain(self, arm: str, seed: int, folder: Path) -> Path:
        """The arm's encoder."""
        changes = ARMS[arm] | ({} if arm == "mae" else {"cache": self.folder / "cache"})
        arguments = ["--config", PRETRAINING, "--images", self.folder / "images", "--seed", seed]
        arguments += [word for name, value in changes.items() for word in (f"--{name}", value)]
        return self.stage(folder / "pretraining/model", "sami", *arguments, "--output_dir", folder / "pretraining")

    def measure(self, arm: str, seed: int, folder: Path) -> dict[str, float]:
        encoder = self.pretrain(arm, seed, folder)
        arguments = ["--encoder", encoder, "--data", self.data / "classification", "--size", 96]
        arguments += ["--train_limit", 1500, "--test_limit", 1000, "--output", folder / "probe.json"]
        probe = json.loads(self.stage(folder / "probe.json", "probe_encoder", *arguments).read_text())

        names = ("train-seg", "coco-train", "coco-train")
        train = [self.data / name / "instances_train.json" for name in names]
        arguments = ["--config", FINETUNING, "--train", *train, "--encoder", encoder, "--seed", seed]
        model = self.stage(folder / "masks/model", "finetune_masks", *arguments, "--output_dir", folder / "masks")

        annotations = self.data / "coco-val-dev" / "instances_val.json"
        arguments = ["--annotations", annotations, "--prompts", "box", "click1", "--model", model]
        metrics = self.stage(
            folder / "metrics.json", "evaluate_masks", *arguments, "--output", folder / "metrics.json"
        )
        results = json.loads(metrics.read_text())["results"]
        return {
            **{name: probe[name] for name in ("nearest_neighbors", "linear_probe")},
            **{name: results[name]["confident"]["all"]["miou"] for name in ("box", "click1")},
        }


if __name__ == "__main__":
    run_script("sami_study", lambda: SamiStudy(parse_config(Recipe, __doc__), HERE).run())
