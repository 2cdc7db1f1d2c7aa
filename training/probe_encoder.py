"""What a frozen encoder knows about classes: accuracy of 10 nearest neighbours and of a linear probe on its features.

    python training/probe_encoder.py --encoder runs/sami/model --data ../shared/data/classification --output probe.json
    python training/probe_encoder.py --encoder pixels --data ../shared/data/classification --size 32

An image is resized to a square and described by the mean over the patches of the last transformer layer, before the
neck. The linear probe is a logistic regression on standardised features; nothing is tuned on the test images.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from hf_efficientsam.training.data.classification import ClassFolders
from hf_efficientsam.training.data.images import normalize
from hf_efficientsam.training.engine.config import (
    NotNegativeInt,
    OutputFile,
    PositiveFloat,
    PositiveInt,
    check_ranges,
    parse_config,
)
from hf_efficientsam.training.engine.encoder_weights import load_encoder
from hf_efficientsam.training.engine.reports import write_report
from hf_efficientsam.training.engine.run import check_device, run_script


@dataclass(frozen=True)
class ProbeConfig:
    encoder: str | None = field(
        default=None,
        metadata={"help": "path or Hub name that EfficientSamVisionModel.from_pretrained takes, or: pixels"},
    )
    data: str | None = field(default=None, metadata={"help": "with train/CLASS/* and test/CLASS/* images"})
    size: PositiveInt = field(default=96, metadata={"help": "images are resized to this side"})
    train_limit: PositiveInt | None = field(
        default=None, metadata={"help": "so many training images, the same of each class"}
    )
    test_limit: PositiveInt | None = field(
        default=None, metadata={"help": "so many test images, the same of each class"}
    )
    seed: NotNegativeInt = field(default=0, metadata={"help": "of which images the limits choose"})
    neighbors: PositiveInt = field(default=10, metadata={"help": "that vote, by cosine similarity"})
    probe_c: PositiveFloat = field(
        default=0.1, metadata={"help": "C of the logistic regression on standardised features"}
    )
    probe_iterations: PositiveInt = field(default=1000, metadata={"help": "of the logistic regression at most"})
    batch_size: PositiveInt = field(default=64, metadata={"help": "images at a time"})
    num_workers: NotNegativeInt = field(default=0, metadata={"help": "processes that read images"})
    device: str | None = field(default=None, metadata={"help": "by default a GPU if there is one"})
    output: OutputFile | None = field(default=None, metadata={"help": "json file for the numbers"})


class Squares(Dataset):
    """The images of a source as RGB uint8 [3, size, size]."""

    def __init__(self, source: ClassFolders, size: int):
        self.source, self.size = source, size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> torch.Tensor:
        _, image, _ = self.source[index]
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class MeanPatch(nn.Module):
    """Normalised pixels [B, 3, H, W] -> mean over the patches of the last transformer layer [B, C]."""

    def __init__(self, path: str):
        super().__init__()
        self.model, _ = load_encoder(path)  # a neck is not needed

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values, output_hidden_states=True).hidden_states[-1].mean(1)


@torch.inference_mode()
def features_of(encoder: nn.Module, images: ClassFolders, config: ProbeConfig, device: torch.device) -> np.ndarray:
    """[number of images, C]"""
    batches = DataLoader(Squares(images, config.size), config.batch_size, num_workers=config.num_workers)
    features = [encoder(normalize(batch.to(device))).cpu() for batch in tqdm(batches, unit="batch", mininterval=2)]
    features = torch.cat(features).numpy()
    if not np.isfinite(features).all():
        raise ValueError(
            f"The features of --encoder {config.encoder} are not finite; its training has diverged; choose another."
        )
    return features


def open_all(config: ProbeConfig) -> tuple[nn.Module, ClassFolders, ClassFolders]:
    if config.encoder is None or config.data is None:
        raise ValueError(
            "Give --encoder a model with EfficientSAM's encoder, or pixels, and --data a folder with train/CLASS/ and "
            "test/CLASS/."
        )
    folders = [Path(config.data) / name for name in ("train", "test")]
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise ValueError(f"There is no folder {' and no '.join(missing)}; --data needs train/CLASS/ and test/CLASS/.")
    train = ClassFolders(folders[0], config.train_limit, config.seed)
    test = ClassFolders(folders[1], config.test_limit, config.seed)
    if train.classes != test.classes:
        raise ValueError(f"The classes differ: {train.classes} in {folders[0]}, {test.classes} in {folders[1]}.")
    if config.neighbors > len(train):
        raise ValueError(f"--neighbors {config.neighbors} are more than the {len(train)} training images.")
    if config.encoder == "pixels":
        return nn.Flatten(), train, test
    encoder = MeanPatch(config.encoder)
    if config.size % (patch := encoder.model.config.patch_size):
        raise ValueError(f"--size {config.size} must be a multiple of the patch size, {patch}.")
    return encoder.eval(), train, test


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(ProbeConfig, __doc__, arguments)
    check_ranges(config)
    check_device(config.device)
    started = time.perf_counter()
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    encoder, train, test = open_all(config)
    encoder.to(device)
    train_features, test_features = (features_of(encoder, images, config, device) for images in (train, test))
    encoded = time.perf_counter()

    neighbors = KNeighborsClassifier(config.neighbors, metric="cosine")
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=config.probe_c, max_iter=config.probe_iterations))
    accuracy = {}
    for name, classifier in {"nearest_neighbors": neighbors, "linear_probe": probe}.items():
        classifier.fit(train_features, train.labels)
        accuracy[name] = round(float(classifier.score(test_features, test.labels)), 4)
        print(f"{name}: {accuracy[name]:.4f}")
    if config.output is None:
        return
    report = {
        **accuracy,
        "config": asdict(config),
        "classes": train.classes,
        "train_images": len(train),
        "test_images": len(test),
        "width": train_features.shape[1],
        "probe_iterations": int(probe[-1].n_iter_.max()),
        "seconds": {"features": round(encoded - started, 1), "all": round(time.perf_counter() - started, 1)},
        "device": str(device),
    }
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    write_report(config.output, report, ("scikit-learn", "pillow"))


if __name__ == "__main__":
    run_script("probe_encoder", main)
