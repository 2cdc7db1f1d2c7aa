"""Trains EfficientSAM for promptable masks on COCO-style json.

    accelerate launch training/finetune_masks.py --config training/recipes/bundled_3_masks.yaml --model bundled \
        --train my/instances.json --output_dir runs/mine
    accelerate launch training/finetune_masks.py --train my/instances.json --model bundled --output_dir runs/mine

A run that is started again in the same `--output_dir` goes on where it stopped. The result is `OUTPUT_DIR/model`,
which `from_pretrained`, `efficientsam segment --model` and `training/evaluate_masks.py` take; the curve is beside it.
"""

import math
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from hf_efficientsam import (
    EfficientSamConfig,
    EfficientSamImageProcessor,
    EfficientSamModel,
    EfficientSamProcessor,
    EfficientSamVisionConfig,
)
from hf_efficientsam.hub import find_checkpoint, load_model
from hf_efficientsam.training.batch import MaskTrainingSet, collate
from hf_efficientsam.training.data.coco import CocoMasks
from hf_efficientsam.training.data.synthetic import random_ellipses
from hf_efficientsam.training.interactive import InteractiveSegmentation
from hf_efficientsam.training.losses import MaskLoss
from hf_efficientsam.training.runtime import (
    Checkpoints,
    Curve,
    check_same_run,
    decaying_parameters,
    parse_recipe,
    replaced_folder,
)
from hf_efficientsam.training.warm_start import load_encoder


@dataclass(frozen=True)
class Recipe:
    train: list[str] = field(
        default_factory=list,
        metadata={"help": "COCO-style json files, images beside each; one named twice weighs double"},
    )
    output_dir: str = field(default="runs/masks", metadata={"help": "checkpoints, curve and the trained model"})
    model: str | None = field(
        default=None, metadata={"help": "start from this model (path or Hub name, or: bundled); else from a new Ti"}
    )
    encoder: str | None = field(
        default=None, metadata={"help": "with the encoder that sami.py has pretrained: its model directory"}
    )
    background_points: bool = field(default=True, metadata={"help": "a new model takes background points (label 0)"})
    mask_prompts: bool = field(default=True, metadata={"help": "a new model takes mask prompts"})
    position_init: str = field(
        default="axes", metadata={"help": "a new model's Fourier frequencies: gaussian or axes"}
    )
    # Data.
    image_size: int = field(default=512, metadata={"help": "side of the model input in pixels"})
    crop_scale: float = field(default=0.3, metadata={"help": "smallest part of an image's area that a crop keeps"})
    color_jitter: float = field(default=0.2, metadata={"help": "strength of brightness, contrast, saturation changes"})
    max_masks: int = field(default=12, metadata={"help": "masks an image and step"})
    batch_size: int = field(default=8, metadata={"help": "images a step and process"})
    num_workers: int = field(default=1, metadata={"help": "processes that read images"})
    # Prompts; see hf_efficientsam/training/interactive.py.
    box_probability: float = field(default=0.5, metadata={"help": "share of first prompts that are a box alone"})
    both_probability: float = field(default=0.1, metadata={"help": "share that are a box with clicks"})
    corrections: int = field(default=1, metadata={"help": "rounds of correcting clicks"})
    correction_probability: float = field(default=0.5, metadata={"help": "share of steps that have them"})
    # Steps on random ellipses instead of the images' masks, encoder frozen: where a new decoder learns what a box is.
    geometry_steps: int = field(default=0, metadata={"help": "so many steps on ellipses first"})
    geometry_share: float = field(default=0.0, metadata={"help": "and this share of the later ones"})
    # Loss. SAM's is 20 : 1 : 1 without cross-entropy; a new decoder then stays at the empty mask for very long.
    focal_weight: float = field(default=0.0, metadata={"help": "weight of the focal loss"})
    dice_weight: float = field(default=1.0, metadata={"help": "weight of the dice loss"})
    iou_weight: float = field(default=1.0, metadata={"help": "weight of the IoU head's squared error"})
    balanced_bce_weight: float = field(default=2.0, metadata={"help": "weight of the balanced cross-entropy"})
    loss_stride: int = field(default=2, metadata={"help": "masks are compared at this fraction of the input's side"})
    # Optimisation.
    steps: int = field(default=2000, metadata={"help": "optimiser steps"})
    learning_rate: float = field(default=5e-4, metadata={"help": "peak of the cosine schedule"})
    encoder_rate: float = field(default=0.5, metadata={"help": "the encoder's learning rate as a share of it"})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW's"})
    warmup_steps: int = field(default=100, metadata={"help": "linear warm-up"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    seed: int = field(default=0, metadata={"help": "of everything random"})
    save_steps: int = field(default=200, metadata={"help": "a checkpoint every so many steps"})
    log_steps: int = field(default=20, metadata={"help": "a point of the curve every so many steps"})


def build_model(recipe: Recipe) -> EfficientSamModel:
    if recipe.model is not None:
        model, _ = load_model(find_checkpoint(None if recipe.model == "bundled" else recipe.model))
    else:
        vision = {} if recipe.encoder is None else EfficientSamVisionConfig.from_pretrained(recipe.encoder).to_dict()
        prompt_encoder = {
            "background_points": recipe.background_points,
            "mask_prompts": recipe.mask_prompts,
            "position_init": recipe.position_init,
        }
        model = EfficientSamModel(EfficientSamConfig(vision_config=vision, prompt_encoder_config=prompt_encoder))
    if recipe.encoder is not None:
        encoder, has_neck = load_encoder(recipe.encoder)
        if not has_neck:  # pretraining (sami.py) leaves it out: the model keeps its own
            theirs, ours = encoder.config.hidden_size, model.config.vision_config.hidden_size
            if theirs != ours:
                raise ValueError(f"--encoder is {theirs} wide and --model {ours}; choose two of one size.")
            encoder.vision_encoder.neck = model.vision_encoder.neck
            encoder.config.output_channels = model.config.vision_config.output_channels
        model.vision_encoder, model.config.vision_config = encoder.vision_encoder, encoder.config
    return model


def parameter_groups(model: EfficientSamModel, recipe: Recipe) -> list[dict]:
    """Encoder and the rest, each with and without weight decay (none for biases, norms and embeddings)."""
    groups, decaying = {}, decaying_parameters(model)
    for name, parameter in model.named_parameters():
        in_encoder = name.startswith("vision_encoder.") and ".neck." not in name
        groups.setdefault((in_encoder, name in decaying), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": recipe.learning_rate * (recipe.encoder_rate if in_encoder else 1),
            "weight_decay": recipe.weight_decay if decays else 0,
        }
        for (in_encoder, decays), parameters in groups.items()
    ]


def build_data(recipe: Recipe, num_processes: int) -> MaskTrainingSet:
    if not recipe.train:
        raise ValueError("Give --train at least one COCO-style json file.")
    sources = {path: CocoMasks(path) for path in dict.fromkeys(recipe.train)}
    data = MaskTrainingSet(
        [sources[path] for path in recipe.train],
        recipe.image_size,
        max_masks=recipe.max_masks,
        scale=(recipe.crop_scale, 1.0),
        color_jitter=recipe.color_jitter,
        seed=recipe.seed,
    )
    if len(data) < recipe.batch_size * num_processes:
        raise ValueError(
            f"{len(data)} images are fewer than a batch of {recipe.batch_size} on {num_processes} process(es); lower "
            "--batch_size."
        )
    return data


def save_model(model: EfficientSamModel, recipe: Recipe) -> None:
    model.config.vision_config.image_size = recipe.image_size
    size = {"height": recipe.image_size, "width": recipe.image_size}
    with replaced_folder(Path(recipe.output_dir) / "model") as folder:
        model.save_pretrained(folder)
        EfficientSamProcessor(EfficientSamImageProcessor(size=size)).save_pretrained(folder)


def main() -> None:
    recipe = parse_recipe(Recipe, __doc__)
    accelerator = Accelerator(
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        # Which parts a step uses (mask token 0 or the other three, the mask prompts) is drawn by chance.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    set_seed(recipe.seed)
    try:
        data = build_data(recipe, accelerator.num_processes)
        model = build_model(recipe)
        if recipe.image_size % model.config.vision_config.patch_size:
            raise ValueError(f"--image_size {recipe.image_size} must be a multiple of 16.")
        if accelerator.is_main_process:
            check_same_run(recipe, Path(recipe.output_dir))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"finetune_masks: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    task = InteractiveSegmentation(
        model,
        MaskLoss(recipe.focal_weight, recipe.dice_weight, recipe.iou_weight, recipe.balanced_bce_weight),
        recipe.box_probability,
        recipe.both_probability,
        corrections=recipe.corrections,
        correction_probability=recipe.correction_probability,
        loss_stride=recipe.loss_stride,
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), betas=(0.9, 0.999))
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    loader = DataLoader(
        data,
        recipe.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=collate,
        num_workers=recipe.num_workers,
        persistent_workers=recipe.num_workers > 0,
    )
    task, optimizer, loader = accelerator.prepare(task, optimizer, loader)
    accelerator.register_for_checkpointing(schedule)  # a prepared one would step once for every process

    output = Path(recipe.output_dir)
    checkpoints = Checkpoints(accelerator, output / "checkpoints")
    step = checkpoints.resume()
    curve = Curve(output / "curve.jsonl", step) if accelerator.is_main_process else None
    progress = tqdm(total=recipe.steps, initial=step, disable=not accelerator.is_main_process, mininterval=5)
    started, sums, summed = time.perf_counter(), Counter(), 0
    task.train()
    while step < recipe.steps:
        epoch, position = divmod(step, len(loader))
        data.set_epoch(epoch)
        batches = accelerator.skip_first_batches(loader, position) if position else loader
        batches.set_epoch(epoch)
        for batch in batches:
            generator = torch.Generator().manual_seed((recipe.seed + step) * 1009 + accelerator.process_index)
            chance = torch.rand((), generator=torch.Generator().manual_seed(recipe.seed + step)).item()
            geometry = step < recipe.geometry_steps or chance < recipe.geometry_share
            masks = batch.masks
            if geometry:
                masks = random_ellipses(batch.valid.shape, recipe.image_size, generator).to(masks.device)
            # A mean over the masks of all processes: DDP averages over the processes, so each divides by its share.
            num_prompts = accelerator.reduce(batch.valid.sum()) / accelerator.num_processes
            losses = task(batch.pixel_values, masks, batch.valid, generator, num_prompts, train_encoder=not geometry)
            accelerator.backward(losses["loss"])
            accelerator.clip_grad_norm_(task.parameters(), recipe.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            progress.update()

            losses = accelerator.reduce({name: value.detach() for name, value in losses.items()}, "mean")
            losses = {name: value.item() for name, value in losses.items()}
            if not math.isfinite(losses["loss"]):
                raise FloatingPointError(
                    f"The loss is {losses['loss']} at step {step}, images {batch.image_ids}; the newest checkpoint is "
                    f"step {max(checkpoints.steps(), default=0)}. Lower --learning_rate and start again."
                )
            sums.update(losses)
            summed += 1
            if step % recipe.log_steps == 0 or step == recipe.steps:
                means = {name: round(value / summed, 5) for name, value in sums.items()}
                sums, summed = Counter(), 0
                seconds = round(time.perf_counter() - started)
                progress.set_postfix(means)
                if curve is not None:
                    curve.add(step=step, **means, lr=max(schedule.get_last_lr()), seconds=seconds)
            if step % recipe.save_steps == 0 or step == recipe.steps:
                if accelerator.is_main_process:  # before the checkpoint: a finished run has its model
                    save_model(accelerator.unwrap_model(task).model, recipe)
                    curve.plot(["loss", "dice", "iou", "lr"])
                checkpoints.save(step)
            if step == recipe.steps:
                break
    progress.close()
    del task  # DDP must go before its process group, or the exit can hang
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main()
