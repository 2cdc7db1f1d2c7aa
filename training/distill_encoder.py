"""A start for the mask model's vision encoder: regress a trained ViT's patch features, every patch visible.

    accelerate launch training/distill_encoder.py --teacher ../shared/weights/vit-small-patch14-teacher \
        --images ../shared/data/train-seg/images ../shared/data/coco-train/images --output_dir runs/distill

The student starts from a selection of the teacher's own weights (`training/warm_start.py`). The result is an
`EfficientSamVisionModel` directory, which `finetune_masks.py --encoder` takes.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoModel, HfArgumentParser, get_cosine_schedule_with_warmup

from hf_efficientsam import EfficientSamVisionConfig, EfficientSamVisionModel
from hf_efficientsam.training.warm_start import select_weights


@dataclass(frozen=True)
class Recipe:
    images: list[str] = field(metadata={"help": "folders of photographs"})
    teacher: str = field(metadata={"help": "Dinov2 model: a directory or a Hub name"})
    output_dir: str = field(default="runs/distill", metadata={"help": "where the encoder and its curve go"})
    steps: int = field(default=1500, metadata={"help": "optimiser steps"})
    batch_size: int = field(default=16, metadata={"help": "images a step and process"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak of the cosine schedule"})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW's"})
    warmup_steps: int = field(default=50, metadata={"help": "linear warm-up"})
    crop_scale: float = field(default=0.3, metadata={"help": "smallest part of the image's area that a crop keeps"})
    seed: int = field(default=0, metadata={"help": "of crops, order and head"})


class Crops(Dataset):
    """Random crop and flip of each photograph, as `[3, 224, 224]` normalised pixels; step i is view i of the run."""

    def __init__(self, folders: list[str], side: int, crop_scale: float, seed: int, length: int):
        self.paths = sorted(path for folder in folders for path in Path(folder).rglob("*.jpg"))
        if not self.paths:
            raise ValueError(f"No .jpg images under {folders}.")
        self.side, self.crop_scale, self.seed, self.length = side, crop_scale, seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        epoch, position = divmod(index, len(self.paths))
        order = torch.randperm(len(self.paths), generator=torch.Generator().manual_seed(self.seed + epoch))
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * index)
        image = Image.open(self.paths[order[position]]).convert("RGB")
        area, x, y, flip = torch.rand(4, generator=generator).tolist()
        share = (self.crop_scale + (1 - self.crop_scale) * area) ** 0.5
        width, height = share * image.width, share * image.height
        left, top = x * (image.width - width), y * (image.height - height)
        crop = image.resize((self.side, self.side), Image.BILINEAR, box=(left, top, left + width, top + height))
        pixels = torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8).view(self.side, self.side, 3)
        pixels = pixels.permute(2, 0, 1) / 255
        pixels = pixels.flip(-1) if flip < 0.5 else pixels
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return (pixels - mean[:, None, None]) / std[:, None, None]


class FeatureRegression(nn.Module):
    """Student encoder and a throwaway head to the teacher's width."""

    def __init__(self, student: EfficientSamVisionModel, width: int):
        super().__init__()
        self.student = student
        hidden_size = student.config.hidden_size
        self.head = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width))

    def forward(self, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        tokens = self.student.vision_encoder.embeddings(pixel_values)  # [B, N, C]; the neck is not trained here
        for layer in self.student.vision_encoder.layers:
            tokens = layer(tokens)
        return F.mse_loss(self.head(tokens).float(), target)


def teacher_features(teacher: nn.Module, pixel_values: torch.Tensor, grid: int) -> torch.Tensor:
    """Patch features `[B, grid * grid, C]` of the same view at the size where the teacher's grid is the student's."""
    side = grid * teacher.config.patch_size
    pixel_values = F.interpolate(pixel_values, size=(side, side), mode="bilinear", antialias=True)
    features = teacher(pixel_values).last_hidden_state[:, 1:]
    return F.layer_norm(features.float(), features.shape[-1:])  # each patch to mean 0, variance 1


def main() -> None:
    (recipe,) = HfArgumentParser(Recipe).parse_args_into_dataclasses()
    accelerator = Accelerator()
    set_seed(recipe.seed)
    teacher = AutoModel.from_pretrained(recipe.teacher, dtype=torch.float32).eval().requires_grad_(False)
    student = EfficientSamVisionModel(EfficientSamVisionConfig())
    select_weights(teacher, student.vision_encoder)
    grid = student.vision_encoder.embeddings.pretrain_grid
    model = FeatureRegression(student, teacher.config.hidden_size)
    trained = [p for name, p in model.named_parameters() if "neck" not in name]
    optimizer = torch.optim.AdamW(trained, recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    views = recipe.steps * recipe.batch_size * accelerator.num_processes
    data = Crops(recipe.images, student.config.pretrain_image_size, recipe.crop_scale, recipe.seed, views)
    loader = DataLoader(data, recipe.batch_size, num_workers=1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    teacher.to(accelerator.device)

    output, curve, started = Path(recipe.output_dir), [], time.perf_counter()
    progress = tqdm(loader, disable=not accelerator.is_main_process, mininterval=10)
    for step, pixel_values in enumerate(progress, start=1):
        with torch.no_grad():
            target = teacher_features(teacher, pixel_values, grid)
        loss = model(pixel_values, target)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step == 1 or step % 25 == 0 or step == recipe.steps:
            curve.append(
                {"step": step, "loss": round(loss.item(), 4), "seconds": round(time.perf_counter() - started)}
            )
            progress.set_postfix(loss=curve[-1]["loss"])
        if accelerator.is_main_process and (step % 250 == 0 or step == recipe.steps):
            accelerator.unwrap_model(model).student.save_pretrained(output)
            (output / "curve.json").write_text(json.dumps(curve, indent=1))
    accelerator.end_training()


if __name__ == "__main__":
    main()
