"""A start for the mask model's vision encoder: regress a trained ViT's patch features, every patch visible.

    accelerate launch training/distill_encoder.py --teacher ../shared/weights/vit-small-patch14-teacher \
        --images ../shared/data/train-seg/images ../shared/data/coco-train/images --output_dir runs/distill

The student starts from a selection of the teacher's own weights (`hf_efficientsam/training/warm_start.py`). A run that
is started again in the same `--output_dir` goes on where it stopped. The result is `OUTPUT_DIR/encoder`, an
`EfficientSamVisionModel` that `finetune_masks.py --encoder` takes.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm
from transformers import AutoModel, get_cosine_schedule_with_warmup
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hf_efficientsam import EfficientSamVisionConfig, EfficientSamVisionModel
from hf_efficientsam.training.runtime import Checkpoints, Curve, check_same_run, parse_recipe, replaced_folder
from hf_efficientsam.training.warm_start import select_weights


@dataclass(frozen=True)
class Recipe:
    images: list[str] = field(default_factory=list, metadata={"help": "folders of .jpg photographs"})
    teacher: str | None = field(default=None, metadata={"help": "Dinov2 model: a directory or a Hub name"})
    output_dir: str = field(default="runs/distill", metadata={"help": "checkpoints, the encoder and its curve"})
    steps: int = field(default=1500, metadata={"help": "optimiser steps"})
    batch_size: int = field(default=16, metadata={"help": "images a step and process"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak of the cosine schedule"})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW's"})
    warmup_steps: int = field(default=50, metadata={"help": "linear warm-up"})
    crop_scale: float = field(default=0.3, metadata={"help": "smallest part of the image's area that a crop keeps"})
    seed: int = field(default=0, metadata={"help": "of crops, order and head"})
    save_steps: int = field(default=250, metadata={"help": "a checkpoint every so many steps"})
    log_steps: int = field(default=25, metadata={"help": "a point of the curve every so many steps"})


class Crops(Dataset):
    """Random crop and flip of each photograph, as `[3, 224, 224]` normalised pixels; step i is view i of the run."""

    def __init__(self, folders: list[str], side: int, crop_scale: float, seed: int, length: int):
        self.paths = sorted(path for folder in folders for path in Path(folder).rglob("*.jpg"))
        if not self.paths:
            raise ValueError(f"There are no .jpg images under {folders}; give --images folders of photographs.")
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
        mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
        return (pixels - mean[:, None, None]) / std[:, None, None]


class FeatureRegression(nn.Module):
    """Student encoder and a throwaway head to the teacher's width."""

    def __init__(self, student: EfficientSamVisionModel, width: int):
        super().__init__()
        self.student = student
        hidden_size = student.config.hidden_size
        self.head = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width))

    def forward(self, pixel_values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        tokens = self.student.vision_encoder.embeddings(pixel_values)  # [B, N, C]
        for layer in self.student.vision_encoder.layers:
            tokens = layer(tokens)
        return F.mse_loss(self.head(tokens).float(), target)


def teacher_features(teacher: nn.Module, pixel_values: torch.Tensor, grid: int) -> torch.Tensor:
    """Patch features `[B, grid * grid, C]` of the same view at the size where the teacher's grid is the student's."""
    side = grid * teacher.config.patch_size
    pixel_values = F.interpolate(pixel_values, size=(side, side), mode="bilinear", antialias=True)
    features = teacher(pixel_values).last_hidden_state[:, 1:]
    return F.layer_norm(features.float(), features.shape[-1:])  # each patch to mean 0, variance 1


def load(recipe: Recipe, accelerator: Accelerator) -> tuple[nn.Module, FeatureRegression, Crops]:
    """Teacher, student with its head, and the views of the whole run."""
    if recipe.teacher is None:
        raise ValueError("Give --teacher a Dinov2 model.")
    views = recipe.steps * recipe.batch_size * accelerator.num_processes
    config = EfficientSamVisionConfig()
    data = Crops(recipe.images, config.pretrain_image_size, recipe.crop_scale, recipe.seed, views)
    teacher = AutoModel.from_pretrained(recipe.teacher, dtype=torch.float32).eval().requires_grad_(False)
    student = EfficientSamVisionModel(config)
    select_weights(teacher, student.vision_encoder)
    student.vision_encoder.neck.requires_grad_(False)  # no part of the features; the mask model trains it
    return teacher, FeatureRegression(student, teacher.config.hidden_size), data


def main() -> None:
    recipe = parse_recipe(Recipe, __doc__)
    accelerator = Accelerator()
    set_seed(recipe.seed)
    try:
        teacher, model, data = load(recipe, accelerator)
        if accelerator.is_main_process:
            check_same_run(recipe, Path(recipe.output_dir))
    except (OSError, ValueError) as error:
        print(f"distill_encoder: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    grid = model.student.vision_encoder.embeddings.pretrain_grid
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule)  # a prepared one would step once for every process
    teacher.to(accelerator.device)

    output = Path(recipe.output_dir)
    checkpoints = Checkpoints(accelerator, output / "checkpoints")
    step = checkpoints.resume()
    remaining = Subset(data, range(step * recipe.batch_size * accelerator.num_processes, len(data)))
    loader = accelerator.prepare(DataLoader(remaining, recipe.batch_size, num_workers=1))
    curve = Curve(output / "curve.jsonl", step) if accelerator.is_main_process else None
    progress = tqdm(total=recipe.steps, initial=step, disable=not accelerator.is_main_process, mininterval=5)
    started = time.perf_counter()
    for pixel_values in loader:
        with torch.no_grad():
            target = teacher_features(teacher, pixel_values, grid)
        loss = model(pixel_values, target)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step += 1
        progress.update()
        if step % recipe.log_steps == 0 or step == recipe.steps:
            mean = round(accelerator.reduce(loss.detach(), "mean").item(), 5)
            progress.set_postfix(loss=mean)
            if curve is not None:
                curve.add(step=step, loss=mean, seconds=round(time.perf_counter() - started))
        if step % recipe.save_steps == 0 or step == recipe.steps:
            if accelerator.is_main_process:  # before the checkpoint: a finished run has its encoder
                with replaced_folder(output / "encoder") as folder:
                    accelerator.unwrap_model(model).student.save_pretrained(folder)
                curve.plot(["loss"])
            checkpoints.save(step)
    progress.close()
    accelerator.end_training()


if __name__ == "__main__":
    main()
