"""Does SAMI help other tasks? Classification and semantic segmentation at a size that two CPU cores finish in an hour.

    python training/transfer_study.py --jobs 2           # everything that is not there yet, then the table
    python training/transfer_study.py --arms sami --seeds 0

One encoder is pretrained as the arm `sami` of sami_study.py, and then fine-tuned with each seed by the same recipes as
one from scratch: on the CIFAR-10 subset (recipes/studies/transfer_classification.yaml) and on the CamVid subset
(recipes/studies/transfer_semantic.yaml). Stopping, going on and where the numbers go: see
`hf_efficientsam.training.engine.study`.
"""

import json
from pathlib import Path

from sami_study import Recipe, SamiStudy

from hf_efficientsam.training.engine.config import parse_config
from hf_efficientsam.training.engine.run import run_script

HERE = Path(__file__).parent


class TransferStudy(SamiStudy):
    name, arms = "transfer_study", ("scratch", "sami")
    scores = {"top1": "CIFAR-10 top-1", "miou": "CamVid mIoU"}

    def prepare(self) -> None:
        super().prepare()
        self.encoder = self.pretrain("sami", 0, self.folder)

    def measure(self, arm: str, seed: int, folder: Path) -> dict[str, float]:
        start = ["--seed", seed] + (["--encoder", self.encoder] if arm == "sami" else [])
        images, output = self.data / "classification", folder / "classification"
        arguments = ["--config", HERE / "recipes/studies/transfer_classification.yaml", *start, "--output_dir", output]
        arguments += ["--train", images / "train", "--test", images / "test"]
        self.stage(output / "model", "finetune_classification", *arguments)
        top1 = json.loads((output / "metrics.json").read_text())["top1"]

        images, output = self.data / "semantic", folder / "semantic"
        arguments = ["--config", HERE / "recipes/studies/transfer_semantic.yaml", *start, "--output_dir", output]
        arguments += ["--train", images / "train", "--test", images / "val", "--ignore_label", 11]
        self.stage(output / "model", "finetune_semantic", *arguments)
        return {"top1": top1, "miou": json.loads((output / "metrics.json").read_text())["mean_iou"]}


if __name__ == "__main__":
    run_script("transfer_study", lambda: TransferStudy(parse_config(Recipe, __doc__), HERE).run())
