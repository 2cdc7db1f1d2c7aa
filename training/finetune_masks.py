"""Trains EfficientSAM, or another promptable model of transformers, for masks: SA-1B shards, COCO or LVIS json, a
`datasets` dataset.

    accelerate launch --num_processes 1 training/finetune_masks.py   # a miniature: example images, no network
    accelerate launch training/finetune_masks.py --train my/instances.json --model bundled --output_dir runs/mine
    accelerate launch training/finetune_masks.py --config training/recipes/own_data/masks_one_gpu.yaml \
        --train my/instances.json
    accelerate launch training/finetune_masks.py --config training/recipes/paper/masks_ti_sa1b.yaml \
        --shards "sa1b/sa_{000000..000999}.tar" --encoder runs/sami/model --output_dir runs/sa1b
    accelerate launch training/finetune_masks.py --config training/recipes/own_data/masks_peer.yaml \
        --model facebook/sam-vit-base --train my/train.json --validation my/val.json

A run that is started again in the same `--output_dir` goes on where it stopped. The result is `OUTPUT_DIR/model`,
which `from_pretrained`, `efficientsam segment --model` (of ours) and `training/evaluate_masks.py` take; the training
curve and drawings are beside it, and with --validation the best model in `OUTPUT_DIR/best`. Several GPUs and machines:
training/accelerate/ddp.yaml and multi_node.yaml.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, get_scheduler

from hf_efficientsam import EfficientSamProcessor, EfficientSamSaliencyHead
from hf_efficientsam.training.engine.checkpoints import replaced_folder
from hf_efficientsam.training.engine.config import (
    LearningRateConfig,
    NotNegativeFloat,
    NotNegativeInt,
    OutputFolder,
    PositiveFloat,
    PositiveInt,
    Ratio,
    RunConfig,
    StepsConfig,
    StreamConfig,
    check_ranges,
    parse_config,
)
from hf_efficientsam.training.engine.loaders import epoch_loader, step_batches
from hf_efficientsam.training.engine.optimization import (
    adamw,
    clip_gradients,
    count_layers,
    layer_wise_groups,
    warmed_up,
    weight_average,
)
from hf_efficientsam.training.engine.reports import describe_model, write_report
from hf_efficientsam.training.engine.run import TrainingRun, run_script, start_accelerator
from hf_efficientsam.training.masks.adapters import adapt, is_peer
from hf_efficientsam.training.masks.batch import (
    Batch,
    MaskDataConfig,
    MaskTrainingSet,
    MaskViews,
    StreamedMasks,
    collate,
    open_masks,
)
from hf_efficientsam.training.masks.distillation import MaskTeacher
from hf_efficientsam.training.masks.drawing import draw_answers
from hf_efficientsam.training.masks.feature_views import CachedViews, cache_views
from hf_efficientsam.training.masks.input_formats import InputFormat, PlainImageProcessor
from hf_efficientsam.training.masks.interactive import InteractiveSegmentation, PromptConfig
from hf_efficientsam.training.masks.lora import merged, save_lora
from hf_efficientsam.training.masks.losses import MaskLoss, MaskLossConfig
from hf_efficientsam.training.masks.model_building import (
    MaskModelConfig,
    build_model,
    build_processor,
    kept_saliency_head,
)
from hf_efficientsam.training.masks.trained_parts import TrainedPartsConfig, choose_trained
from hf_efficientsam.training.masks.validation import Validation, ValidationConfig

MINIATURE = Path(__file__).parent / "recipes" / "miniature" / "masks.yaml"


@dataclass(frozen=True)
class MasksConfig(
    MaskModelConfig,
    TrainedPartsConfig,
    RunConfig,
    StepsConfig,
    LearningRateConfig,
    StreamConfig,
    PromptConfig,
    MaskDataConfig,
    MaskLossConfig,
    ValidationConfig,
):
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "learn this model's answers to the prompts (path or Hub name of any promptable model, or: "
            "bundled), not the data's masks"
        },
    )
    cache_embeddings: bool = field(
        default=False,
        metadata={"help": "run the frozen layers of the encoder once for each view of an image, and keep the result"},
    )
    cache_dir: OutputFolder | None = field(
        default=None,
        metadata={"help": "folder of the cached embeddings, the teacher's too; by default OUTPUT_DIR/embeddings"},
    )
    views: list[PositiveInt] = field(
        default_factory=lambda: [1],
        metadata={
            "help": "cached views of an image: 1 whole, 2 also mirrored, 3 and more zoomed; or a number for each file"
        },
    )
    cells: NotNegativeInt = field(
        default=0, metadata={"help": "decode each prompt on so many cells of the image grid, in one round; 0: on all"}
    )
    all_cells_ratio: Ratio = field(
        default=0.1, metadata={"help": "with --cells, this last part of the steps is on all cells all the same"}
    )
    # Steps on random ellipses instead of the images' masks, encoder frozen: where a new decoder learns what a box is.
    synthetic_steps: NotNegativeInt = field(default=0, metadata={"help": "so many steps on ellipses first"})
    synthetic_ratio: Ratio = field(default=0.0, metadata={"help": "and this ratio of the later ones"})
    # Optimisation.
    epochs: PositiveFloat | None = field(default=None, metadata={"help": "times over the data, in place of steps"})
    learning_rate: PositiveFloat = 5e-4
    schedule: Literal["cosine", "linear", "constant"] = field(
        default="cosine", metadata={"help": "how it falls to zero, unless it is constant"}
    )
    encoder_lr_scale: NotNegativeFloat = 0.5
    # Output.
    output_dir: OutputFolder = "runs/masks"
    num_workers: NotNegativeInt = 1
    shuffle_buffer: PositiveInt = 500
    save_steps: PositiveInt = 200
    image_steps: PositiveInt = 200
    eval_steps: PositiveInt = 200


def check(config: MasksConfig) -> None:
    check_ranges(config)
    for divisor in (16, config.loss_stride):
        if config.image_size is not None and config.image_size % divisor:
            raise ValueError(f"--image_size {config.image_size} must be a multiple of {divisor} (16, --loss_stride).")
    config.check_model()
    config.check_trained_parts()
    config.check_validation()
    if config.save_lora and (
        config.model is None or config.encoder or config.background_points or config.mask_prompts
    ):
        raise ValueError(
            "--save_lora saves what is added to --model; give that, and leave out --encoder, --background_points and "
            "--mask_prompts, which change it."
        )
    if config.cells and (config.focal_weight or config.bce_weight):
        raise ValueError(
            "--cells has no focal loss and no plain cross-entropy; leave --focal_weight and --bce_weight at 0."
        )
    check_cache(config)


def check_cache(config: MasksConfig) -> None:
    if not config.cache_embeddings and config.teacher is None:
        if max(config.views) > 1:
            raise ValueError("--views are views of cached images; give --cache_embeddings, too.")
        return
    varied = config.crop_scale < 1 or config.flip or config.color_jitter
    frozen = "vision_encoder" in config.freeze or config.train_last_layers is not None
    if config.cache_embeddings and not frozen:
        raise ValueError("--cache_embeddings needs --freeze vision_encoder or --train_last_layers.")
    if varied or config.shards:
        raise ValueError(
            "--cache_embeddings and --teacher need --crop_scale 1 --flip false --color_jitter 0 (--views vary the "
            "images instead), and no --shards, which are too many to cache."
        )
    if config.teacher is not None and (config.cells or config.synthetic_steps or config.synthetic_ratio):
        raise ValueError("--teacher answers on whole masks of the images; leave --cells and --synthetic_... out.")


def fit_to_model(config: MasksConfig, model: PreTrainedModel) -> MasksConfig:
    """With the model's image size, if none is given; says what another model than ours does not take."""
    size = adapt(model).image_size
    if is_peer(config.model):
        off = {"encoder": None, "select_weights": None, "background_points": None, "mask_prompts": None}
        off |= {"cache_embeddings": False, "cells": 0, "teacher": None}
        for name, value in off.items():
            if getattr(config, name) != value:
                raise ValueError(f"--{name} is for EfficientSAM alone; leave it out with {config.model}.")
        if config.image_size not in (None, size):
            raise ValueError(
                f"--image_size {config.image_size}: {config.model} takes {size} pixels alone; leave it out."
            )
    if config.image_size is None:
        config = dataclasses.replace(config, image_size=size)
        check(config)
    if not is_peer(config.model):
        model.config.vision_config.image_size = config.image_size
    return config


def build_data(config: MasksConfig, input_format: InputFormat) -> MaskTrainingSet | MaskViews | StreamedMasks:
    sources = open_masks(config)
    if config.cache_embeddings or config.teacher is not None:
        # The step reads cached embeddings in place of pixels.
        with_pixels = not config.cache_embeddings
        return MaskViews(sources, config, config.noise_size, config.seed, config.views, with_pixels)
    if not config.shards:
        return MaskTrainingSet(sources, config, config.noise_size, config.seed, input_format)
    state = PartialState()
    processes = {"process_index": state.process_index, "num_processes": state.num_processes}
    return StreamedMasks(
        sources,
        config,
        config.noise_size,
        config.seed,
        input_format,
        shuffle_buffer=config.shuffle_buffer,
        **processes,
    )


def get_loader(
    config: MasksConfig, input_format: InputFormat, accelerator: Accelerator
) -> tuple[DataLoader, int, int]:
    """Batches, optimiser steps an epoch, and in all."""
    data = build_data(config, input_format)
    loading = (config.global_batch_size, config.num_workers, config.epoch_images)
    loader, epoch_steps = epoch_loader(accelerator, data, *loading, collate_fn=collate)
    steps = config.steps if config.epochs is None else round(config.epochs * epoch_steps)
    if steps == 0:
        raise ValueError(f"--epochs {config.epochs} is less than one step of {epoch_steps} an epoch; give more.")
    return loader, epoch_steps, steps


def get_optimizer(
    config: MasksConfig, model: PreTrainedModel, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    layers = count_layers(model)
    if config.layer_decay != 1 and not layers:
        raise ValueError("--layer_decay: the encoder has no numbered layers; leave it out.")
    groups = layer_wise_groups(model, config, layers, config.weight_decay)
    optimizer = adamw(groups)
    kind, warmup_steps = config.schedule, config.warmup_of(steps)
    kind = "constant_with_warmup" if kind == "constant" else kind
    return optimizer, warmed_up(get_scheduler(kind, optimizer, warmup_steps, steps), warmup_steps)


def step_chance(seed: int, step: int) -> tuple[float, torch.Generator]:
    """What a step's batches share, on all processes: a uniform random number, and the source of others."""
    seed = int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((), generator=generator).item(), generator


def save_model(
    model: PreTrainedModel,
    processor: EfficientSamProcessor | PlainImageProcessor,
    config: MasksConfig,
    folder: Path,
    saliency_head: EfficientSamSaliencyHead | None,
) -> None:
    whole = merged(model)
    with replaced_folder(folder) as writing:
        whole.save_pretrained(writing)
        processor.save_pretrained(writing)
        if saliency_head is not None:
            saliency_head.save_pretrained(writing / "saliency")
        if config.save_lora:
            save_lora(model, config.model, writing / "lora")
        describe_model(writing, "finetune_masks", whole, config)


def validate(validation: Validation, model: PreTrainedModel, config: MasksConfig, run: TrainingRun, step: int) -> bool:
    """Logs a model's scores, writes them into metrics.json, and says if they are the best so far: on the main process
    alone, which keeps that model."""
    scores, report = validation.measure(model)
    is_best = run.accelerator.is_main_process and all(scores["miou"] > row["miou"] for row in run.log.evaluations)
    run.log.add_evaluation(step, **scores)
    if run.accelerator.is_main_process:
        report |= {"step": step, "config": dataclasses.asdict(config)}
        write_report(run.output_dir / "metrics.json", report, ("accelerate", "numpy", "pillow", "scipy"))
    return is_best


def open_caches(
    config: MasksConfig,
    model: PreTrainedModel,
    teacher: MaskTeacher | None,
    data: MaskTrainingSet | MaskViews | StreamedMasks,
    run: TrainingRun,
) -> tuple[CachedViews | None, CachedViews | None]:
    """What the encoder's frozen layers and the teacher make of the images, each if the options ask for it."""
    folder = Path(config.cache_dir or run.output_dir / "embeddings")
    embeddings = teacher_features = None
    if config.cache_embeddings:
        last_layers = config.train_last_layers or 0
        embeddings = cache_views(model, data, folder, last_layers, run.accelerator, config.num_workers)
    if teacher is not None:
        teacher_features = teacher.cache_views(data, folder / "teacher", run.accelerator, config.num_workers)
    return embeddings, teacher_features


def count_prompts(batches: list[Batch], accelerator: Accelerator) -> torch.Tensor:
    """What a batch's sum over prompts is divided by, so that a step's loss is the mean over the prompts of all batches
    and processes: accelerate divides by the number of both."""
    num_prompts = torch.stack([batch.valid.sum() for batch in batches]).sum().to(accelerator.device)
    return accelerator.reduce(num_prompts) / (len(batches) * accelerator.num_processes)


def batch_losses(
    config: MasksConfig,
    task: nn.Module,
    batch: Batch,
    step: int,
    num_prompts: torch.Tensor,
    num_cells: int,
    caches: tuple[CachedViews | None, CachedViews | None],
) -> dict[str, torch.Tensor]:
    """What `InteractiveSegmentation` returns for a batch of a step, on the batch's device; see its `forward`."""
    chance, generator = step_chance(config.seed, step - 1)
    synthetic = step <= config.synthetic_steps or chance < config.synthetic_ratio
    hidden_states, teacher_features = (
        None if cache is None else cache.read(batch.keys, batch.views).to(batch.valid.device) for cache in caches
    )
    inputs = (batch.pixel_values, batch.masks, batch.valid, batch.noise)
    return task(*inputs, generator, num_prompts, synthetic, hidden_states, num_cells, teacher_features)


def training_function(config: MasksConfig, run: TrainingRun) -> None:
    accelerator = run.accelerator
    segmenter = build_model(config, config.image_size, config.seed)
    config = fit_to_model(config, segmenter)
    size_divisor = getattr(segmenter.config.vision_config, "size_divisor", 16)
    processor, input_format = build_processor(config.model, config.image_size, size_divisor)
    loader, epoch_steps, steps = get_loader(config, input_format, accelerator)
    validation = Validation(config, processor, accelerator, config.num_workers) if config.validation else None
    choose_trained(segmenter, config)
    saliency_head = kept_saliency_head(config, segmenter, config.output_dir)
    last_layers = config.train_last_layers or 0
    teacher = None if config.teacher is None else MaskTeacher(config.teacher, accelerator.device)
    task = InteractiveSegmentation(segmenter, MaskLoss(config), config, last_layers, teacher)
    optimizer, scheduler = get_optimizer(config, task.model, steps)
    task, optimizer = accelerator.prepare(task, optimizer)
    average = weight_average(segmenter, config.ema_decay)
    averaged = segmenter if average is None else average.module
    done = run.resume(steps, [scheduler, average])

    def save(name: str) -> None:
        if accelerator.is_main_process:
            save_model(averaged, processor, config, run.output_dir / name, saliency_head)

    caches = open_caches(config, segmenter, teacher, loader.dataset, run) if done < steps else ()
    sampled_steps = steps - round(config.all_cells_ratio * steps) if config.cells else 0
    task.train()
    for step, batches in step_batches(accelerator, loader, done, steps, epoch_steps):
        batches, losses = list(batches), []
        num_prompts = count_prompts(batches, accelerator)
        num_cells = config.cells if step <= sampled_steps else 0
        for batch in batches:
            batch = batch.to(accelerator.device, non_blocking=True)
            with accelerator.accumulate(task):
                parts = batch_losses(config, task, batch, step, num_prompts, num_cells, caches)
                accelerator.backward(parts["loss"])
                if accelerator.sync_gradients:
                    grad_norm = clip_gradients(accelerator, task.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            losses.append({name: part.detach() for name, part in parts.items()})
        means = {name: torch.stack([parts[name] for parts in losses]).mean() for name in losses[0]}
        lr = max(scheduler.get_last_lr())
        run.check_finite(step, means["loss"], grad_norm, [key for one in batches for key in one.keys])
        if not accelerator.optimizer_step_was_skipped:  # as in float16, for an infinite gradient
            scheduler.step()
        if average is not None:
            average.update_parameters(segmenter)
        run.log.add(step, images=config.global_batch_size, **means, lr=lr)
        if run.is_due(step, config.image_steps):
            run.log.add_image(step, draw_answers(segmenter, input_format, batch, loader.dataset), "masks")
        is_measured = validation is not None and run.is_due(step, config.eval_steps)
        if is_measured and validate(validation, averaged, config, run, step):
            save("best")
        if run.is_save_due(step):
            save("model")
            run.save(step)


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(MasksConfig, __doc__, arguments, default=MINIATURE)
    check(config)
    # Which parts a step uses (mask token 0 or the other three, the mask prompts) is drawn by chance.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = start_accelerator(config, kwargs_handlers=[unused])
    project = "peer_masks" if is_peer(config.model) else "masks"  # the demo and other commands are for ours
    with TrainingRun(accelerator, config, project, streamed=bool(config.shards)) as run:
        training_function(config, run)


if __name__ == "__main__":
    run_script("finetune_masks", main)
