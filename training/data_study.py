"""What would more images buy? The same mask training on an eighth, a quarter, half and all of them.

    python training/data_study.py --jobs 2               # everything that is not there yet, then the table
    python training/data_study.py --arms all --seeds 0

All runs start from the bundled checkpoint's encoder, which stays as it is, and one new decoder that has seen ellipses
alone, and take the same number of steps. (The encoder has seen all the images and their masks; the decoder none of the
masks.) Stopping, going on and where the numbers go: see `hf_efficientsam.training.engine.study`.
"""

import json
from pathlib import Path

from hf_efficientsam import bundled_checkpoint
from hf_efficientsam.training.engine.config import parse_config
from hf_efficientsam.training.engine.run import run_script
from hf_efficientsam.training.engine.study import Study, StudyOptions

HERE = Path(__file__).parent
RECIPES = HERE / "recipes" / "studies"
EVERY = {"an eighth": 8, "a quarter": 4, "half": 2, "all": 1}  # so many-th image is taken


class DataStudy(Study):
    name, arms = "data_study", tuple(EVERY)
    scores = {"box": "box mIoU", "click1": "1 click mIoU", "loss": "training loss"}

    @property
    def train(self) -> list:
        return ["--train", *(self.data / name / "instances_train.json" for name in ("train-seg", "coco-train"))]

    @property
    def start(self) -> Path:
        return self.folder / "start" / "model"

    def prepare(self) -> None:
        recipe = ["--config", RECIPES / "data_start.yaml", "--encoder", bundled_checkpoint()]
        self.stage(self.start, "finetune_masks", *recipe, *self.train, "--output_dir", self.start.parent)

    def measure(self, arm: str, seed: int, folder: Path) -> dict[str, float]:
        recipe = ["--config", RECIPES / "data.yaml", "--every", EVERY[arm], "--seed", seed]
        arguments = [*recipe, *self.train, "--model", self.start, "--output_dir", folder / "masks"]
        model = self.stage(folder / "masks/model", "finetune_masks", *arguments)
        last = json.loads((folder / "masks/curve.jsonl").read_text().splitlines()[-1])

        annotations = self.data / "coco-val-dev" / "instances_val.json"
        arguments = ["--annotations", annotations, "--prompts", "box", "click1", "--model", model]
        metrics = folder / "metrics.json"
        results = json.loads(self.stage(metrics, "evaluate_masks", *arguments, "--output", metrics).read_text())
        ious = {name: results["results"][name]["confident"]["all"]["miou"] for name in ("box", "click1")}
        return ious | {"loss": last["loss"]}


if __name__ == "__main__":
    run_script("data_study", lambda: DataStudy(parse_config(StudyOptions, __doc__), HERE).run())
