"""Trains EfficientSAM for promptable masks: SA-1B shards, COCO or LVIS json, a `datasets` dataset.

    accelerate launch --num_processes 1 training/finetune_masks.py   # a miniature: example images, no network
    accelerate launch training/finetune_masks.py --train my/instances.json --model bundled --output_dir runs/mine
    accelerate launch training/finetune_masks.py --config training/recipes/masks_one_gpu.yaml --train my/instances.json
    accelerate launch training/finetune_masks.py --config training/recipes/masks_ti_sa1b.yaml \
        --shards "sa1b/sa_{000000..000999}.tar" --encoder runs/sami/model --output_dir runs/sa1b

A run that is started again in the same `--output_dir` goes on where it stopped. The result is `OUTPUT_DIR/model`,
which `from_pretrained`, `efficientsam segment --model` and `training/evaluate_masks.py` take; the curve and pictures
are beside it. Several GPUs and machines: training/accelerate/ddp.yaml and multi_node.yaml.
"""

import copy
import dataclasses
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from PIL import Image
from transformers import get_scheduler

from hf_efficientsam import (
    EfficientSamConfig,
    EfficientSamImageProcessor,
    EfficientSamModel,
    EfficientSamProcessor,
    EfficientSamVisionConfig,
)
from hf_efficientsam.inference.drawing import draw_masks, picture_table
from hf_efficientsam.inference.loading import find_checkpoint, load_model
from hf_efficientsam.training.data.images import to_image
from hf_efficientsam.training.engine.runtime import (
    Checkpoints,
    Log,
    Optimization,
    check_ranges,
    check_same_run,
    epoch_loader,
    layer_decay,
    parameter_groups,
    parse_recipe,
    replaced_folder,
    run_script,
    start_accelerator,
    step_batches,
)
from hf_efficientsam.training.engine.warm_start import load_encoder
from hf_efficientsam.training.masks.batch import (
    Batch,
    MaskOptions,
    MaskTrainingSet,
    StreamedMasks,
    collate,
    open_masks,
)
from hf_efficientsam.training.masks.interactive import (
    EmbeddingMemory,
    InteractiveSegmentation,
    PromptOptions,
    most_confident,
)
from hf_efficientsam.training.masks.losses import MaskLoss
from hf_efficientsam.training.masks.prompts import boxes_from_masks

MINIATURE = Path(__file__).parent / "recipes" / "masks_miniature.yaml"
PARTS = ("vision_encoder", "prompt_encoder", "mask_decoder")


@dataclass(frozen=True)
class Recipe(PromptOptions, MaskOptions):
    output_dir: str = field(default="runs/masks", metadata={"help": "checkpoints, model, curve and pictures"})
    # Model.
    model: str | None = field(
        default=None, metadata={"help": "start from this model (path or Hub name, or: bundled); else from a new Ti"}
    )
    encoder: str | None = field(
        default=None, metadata={"help": "with the encoder that sami.py has pretrained: its model directory"}
    )
    hidden_size: int = field(default=192, metadata={"help": "width of a new encoder: 192 (Ti), 384 (S), 768 (B)"})
    num_attention_heads: int = field(default=3, metadata={"help": "its heads: 3, 6, 12"})
    background_points: bool | None = field(
        default=None, metadata={"help": "takes background points (label 0); by default as --model, and a new one does"}
    )
    mask_prompts: bool | None = field(default=None, metadata={"help": "takes mask prompts; by default likewise"})
    position_init: str = field(
        default="axes", metadata={"help": "a new model's Fourier frequencies: gaussian or axes"}
    )
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "parts that are not trained: vision_encoder, prompt_encoder, ..."}
    )
    remember_embeddings: bool = field(
        default=False,
        metadata={"help": "encode each image once: for a frozen encoder and images that are always shown whole"},
    )
    lora: int = field(
        default=0, metadata={"help": "rank of LoRA updates of the encoder's queries and values, its weights frozen"}
    )
    # Data.
    epoch_images: int | None = field(
        default=None, metadata={"help": "images that count as an epoch; needed for shards, else all of them"}
    )
    shuffle_buffer: int = field(default=500, metadata={"help": "images that a worker mixes while streaming"})
    num_workers: int = field(default=1, metadata={"help": "processes that read images"})
    # Steps on random ellipses instead of the images' masks, encoder frozen: where a new decoder learns what a box is.
    geometry_steps: int = field(default=0, metadata={"help": "so many steps on ellipses first"})
    geometry_share: float = field(default=0.0, metadata={"help": "and this share of the later ones"})
    # Loss. SAM's is 20 : 1 : 1 without cross-entropy; a new decoder then stays at the empty mask for very long.
    focal_weight: float = field(default=0.0, metadata={"help": "weight of the focal loss"})
    dice_weight: float = field(default=1.0, metadata={"help": "weight of the dice loss"})
    iou_weight: float = field(default=1.0, metadata={"help": "weight of the IoU head's squared error"})
    balanced_bce_weight: float = field(default=2.0, metadata={"help": "weight of the balanced cross-entropy"})
    # Optimisation.
    steps: int = field(default=2000, metadata={"help": "optimiser steps"})
    epochs: float | None = field(default=None, metadata={"help": "times over the data, in place of steps"})
    global_batch_size: int = field(default=8, metadata={"help": "images a step, over all processes"})
    batch_size: int | None = field(
        default=None,
        metadata={"help": "images at a time and process (all by default); gradients are accumulated"},
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "its peak"})
    schedule: str = field(default="cosine", metadata={"help": "how it falls to zero: cosine, linear or constant"})
    warmup_steps: int = field(default=100, metadata={"help": "linear warm-up; at most a third of all steps"})
    encoder_rate: float = field(default=0.5, metadata={"help": "the encoder's learning rate as a share of it"})
    layer_decay: float = field(default=1.0, metadata={"help": "and each layer's as a share of the next one's"})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW's"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    ema_decay: float = field(
        default=0.0, metadata={"help": "the saved model averages the weights' past; 0: it does not"}
    )
    seed: int = field(default=0, metadata={"help": "of everything random"})
    # Output.
    trackers: list[str] = field(default_factory=list, metadata={"help": "tensorboard, trackio, or both"})
    save_steps: int = field(default=200, metadata={"help": "a checkpoint every so many steps"})
    log_steps: int = field(default=20, metadata={"help": "a point of the curve every so many steps"})
    picture_steps: int = field(default=200, metadata={"help": "a picture every so many steps"})


POSITIVE = ("steps", "epochs", "epoch_images", "global_batch_size", "batch_size", "image_size", "max_masks", "every")
POSITIVE += ("max_clicks", "loss_stride", "save_steps", "log_steps", "picture_steps", "crop_scale", "smallest_ellipse")
NOT_NEGATIVE = ("corrections", "mask_only_rounds", "geometry_steps", "warmup_steps", "lora", "num_workers", "seed")
SHARES = ("box_probability", "both_probability", "tight_probability", "single_mask_probability")
SHARES += ("correction_probability", "geometry_share", "crop_scale", "smallest_ellipse")
BELOW_ONE = ("ema_decay",)


def check(recipe: Recipe) -> None:
    check_ranges(recipe, POSITIVE, NOT_NEGATIVE, SHARES, BELOW_ONE)
    for divisor in (16, recipe.loss_stride):
        if recipe.image_size is not None and recipe.image_size % divisor:
            raise ValueError(f"--image_size {recipe.image_size} must be a multiple of {divisor} (16, --loss_stride).")
    if recipe.schedule not in ("cosine", "linear", "constant"):
        raise ValueError(f"--schedule {recipe.schedule} is not known; choose cosine, linear or constant.")
    if unknown := set(recipe.freeze) - set(PARTS):
        raise ValueError(f"--freeze {min(unknown)}: there is no such part; choose of {', '.join(PARTS)}.")
    if recipe.lora and "vision_encoder" in recipe.freeze:
        raise ValueError("--lora updates the encoder and --freeze vision_encoder forbids it; leave one of them out.")
    varied = recipe.crop_scale < 1 or recipe.flip or recipe.color_jitter
    if recipe.remember_embeddings and (varied or recipe.shards or "vision_encoder" not in recipe.freeze):
        raise ValueError(
            "--remember_embeddings needs --freeze vision_encoder --crop_scale 1 --flip false --color_jitter 0, and no "
            "--shards, whose images would not fit into memory."
        )


def build_model(recipe: Recipe) -> EfficientSamModel:
    set_seed(recipe.seed)  # the same start on every process, whatever was loaded before
    kinds = {name: getattr(recipe, name) for name in ("background_points", "mask_prompts")}
    if recipe.model is not None:
        model, _ = load_model(find_checkpoint(None if recipe.model == "bundled" else recipe.model))
        model = model.cpu().train()
        config = copy.deepcopy(model.config)
        asked = {name: wanted for name, wanted in kinds.items() if wanted is not None}
        if any(getattr(config.prompt_encoder_config, name) != wanted for name, wanted in asked.items()):
            for name, wanted in asked.items():
                setattr(config.prompt_encoder_config, name, wanted)
            weights, model = model.state_dict(), EfficientSamModel(config)
            model.load_state_dict(weights, strict=False)  # all but the kinds of prompts that come or go
    else:
        vision = {"hidden_size": recipe.hidden_size, "num_attention_heads": recipe.num_attention_heads}
        if recipe.encoder is not None:
            vision = EfficientSamVisionConfig.from_pretrained(recipe.encoder).to_dict()
        prompt_encoder = {name: wanted is not False for name, wanted in kinds.items()}
        prompt_encoder["position_init"] = recipe.position_init
        model = EfficientSamModel(EfficientSamConfig(vision_config=vision, prompt_encoder_config=prompt_encoder))
    if recipe.encoder is not None:
        replace_encoder(model, recipe.encoder)
    return model


def replace_encoder(model: EfficientSamModel, name: str) -> None:
    """The model's decoder goes on with another encoder; of another width, such as S and Ti, its neck is that one's."""
    encoder, has_neck = load_encoder(name)
    if not has_neck and encoder.config.hidden_size == model.config.vision_config.hidden_size:
        encoder.vision_encoder.neck = model.vision_encoder.neck  # pretraining (sami.py) leaves it out
        encoder.config.output_channels = model.config.vision_config.output_channels
    theirs, ours = encoder.config.output_channels, model.config.vision_config.output_channels
    if theirs != ours:
        raise ValueError(f"--encoder {name} gives {theirs} channels and --model takes {ours}; choose another.")
    model.vision_encoder, model.config.vision_config = encoder.vision_encoder, encoder.config


def in_encoder(name: str) -> bool:
    """Whether a parameter is of the encoder proper: its neck is trained as the decoder is."""
    return name.startswith("vision_encoder.") and ".neck." not in name


def choose_trained(model: EfficientSamModel, recipe: Recipe) -> None:
    """Freezes what is not to be trained, and inserts the low-rank updates if they are asked for."""
    if recipe.lora:
        layers = r"vision_encoder\.layers\.\d+\.attention\.(q|v)_proj"
        inject_adapter_in_model(LoraConfig(r=recipe.lora, lora_alpha=2 * recipe.lora, target_modules=layers), model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "lora_" in name or not in_encoder(name)
    for part in recipe.freeze:
        getattr(model, part).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("--freeze leaves nothing to train; name fewer parts.")


def merged(model: EfficientSamModel) -> EfficientSamModel:
    """A copy whose low-rank updates have become part of the weights."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    return model


def build_data(recipe: Recipe) -> MaskTrainingSet | StreamedMasks:
    sources = open_masks(recipe)
    if not recipe.shards:
        return MaskTrainingSet(sources, recipe, recipe.noise_size, recipe.seed)
    state = PartialState()
    processes = {"process_index": state.process_index, "num_processes": state.num_processes}
    return StreamedMasks(
        sources, recipe, recipe.noise_size, recipe.seed, shuffle_buffer=recipe.shuffle_buffer, **processes
    )


def learning_rate_share(name: str, num_layers: int, recipe: Recipe) -> float:
    """Of a parameter: less than 1 in the encoder, if the recipe says so."""
    share = layer_decay(name, num_layers, recipe.layer_decay)
    return share * recipe.encoder_rate if in_encoder(name) else share


def step_chance(recipe: Recipe, step: int) -> tuple[bool, torch.Generator]:
    """What a step's batches share, on all processes: whether it asks for ellipses, and the source of the rest."""
    seed = int(np.random.SeedSequence([recipe.seed, step]).generate_state(1)[0])
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand((), generator=generator).item()
    return step < recipe.geometry_steps or chance < recipe.geometry_share, generator


def save_model(model: EfficientSamModel, recipe: Recipe) -> None:
    model = merged(model) if recipe.lora else model
    model.config.vision_config.image_size = recipe.image_size
    size = {"height": recipe.image_size, "width": recipe.image_size}
    with replaced_folder(Path(recipe.output_dir) / "model") as folder:
        model.save_pretrained(folder)
        EfficientSamProcessor(EfficientSamImageProcessor(size=size)).save_pretrained(folder)


@torch.no_grad()
def draw(model: EfficientSamModel, batch: Batch) -> Image.Image:
    """The first images' masks, and what the model makes of their boxes, side by side."""
    model.eval()
    boxes = boxes_from_masks(batch.masks[:4])
    output = model(batch.pixel_values[:4], input_boxes=boxes)
    model.train()
    _, predicted = most_confident(output, batch.masks.shape[-2:])
    columns = {"images": [], "their masks": [], "by their boxes": []}
    for pixels, *rows in zip(batch.pixel_values[:4], batch.valid, batch.masks, predicted, boxes, strict=False):
        valid, true, guess, box = (row.cpu() for row in rows)
        image = to_image(pixels)
        columns["images"].append(image)
        columns["their masks"].append(draw_masks(image, true[valid]))
        columns["by their boxes"].append(draw_masks(image, guess[valid], boxes=box[valid].tolist()))
    return picture_table(columns)


def main() -> None:
    recipe = parse_recipe(Recipe, __doc__, None if sys.argv[1:] else ["--config", str(MINIATURE)])
    try:
        check(recipe)
        # Which parts a step uses (mask token 0 or the other three, the mask prompts) is drawn by chance.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        accelerator = start_accelerator(recipe, kwargs_handlers=[unused])
        if accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("A model this small gains nothing from FSDP; launch with training/accelerate/ddp.yaml.")
        model = build_model(recipe)
        if recipe.image_size is None:
            recipe = dataclasses.replace(recipe, image_size=model.config.vision_config.image_size)
            check(recipe)
        data = build_data(recipe)
        loader, epoch_steps = epoch_loader(accelerator, data, recipe, collate_fn=collate)
        steps = recipe.steps if recipe.epochs is None else round(recipe.epochs * epoch_steps)
        if steps == 0:
            raise ValueError(f"--epochs {recipe.epochs} is less than one step of {epoch_steps} an epoch; give more.")
        choose_trained(model, recipe)
        weights = (recipe.focal_weight, recipe.dice_weight, recipe.iou_weight, recipe.balanced_bce_weight)
        task = InteractiveSegmentation(model, MaskLoss(*weights), recipe)
        if accelerator.is_main_process:
            check_same_run(recipe, accelerator.num_processes)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"finetune_masks: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    share = partial(learning_rate_share, num_layers=model.config.vision_config.num_hidden_layers, recipe=recipe)
    groups = parameter_groups(model, recipe.learning_rate, recipe.weight_decay, share)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    kind, warmup = recipe.schedule, min(recipe.warmup_steps, steps // 3)
    schedule = get_scheduler("constant_with_warmup" if kind == "constant" else kind, optimizer, warmup, steps)
    optimization = Optimization(accelerator, task, optimizer, schedule, recipe.max_grad_norm, model, recipe.ema_decay)
    task = optimization.model

    output = Path(recipe.output_dir)
    log = Log(accelerator, output, steps, recipe.log_steps)
    checkpoints = Checkpoints(accelerator, output / "checkpoints")
    step = checkpoints.resume()
    if step == steps:
        accelerator.print(f"{output} holds a finished run; choose another --output_dir for a new one, or delete it.")
    log.start(step, "masks", dataclasses.asdict(recipe))
    memory = EmbeddingMemory() if recipe.remember_embeddings else None
    task.train()
    for batches in step_batches(accelerator, loader, data, step, steps, epoch_steps):
        batches, losses = list(batches), []
        # A mean over the masks of all batches and processes: accelerate divides by the number of both.
        num_prompts = torch.stack([batch.valid.sum() for batch in batches]).sum().to(accelerator.device)
        num_prompts = accelerator.reduce(num_prompts) / (len(batches) * accelerator.num_processes)
        for batch in batches:
            batch = batch.to(accelerator.device, non_blocking=True)
            geometry, generator = step_chance(recipe, step)
            known = memory and memory.recall(model, batch.pixel_values, batch.keys)
            with accelerator.accumulate(task):
                inputs = (batch.pixel_values, batch.masks, batch.valid, batch.noise)
                parts = task(*inputs, generator, num_prompts, geometry, known)
                optimization.add(parts["loss"])
            losses.append({name: part.detach() for name, part in parts.items()})
        means = {name: torch.stack([parts[name] for parts in losses]).mean() for name in losses[0]}
        step += 1
        rate = optimization.finish(step, means["loss"], [key for batch in batches for key in batch.keys])
        log.add(step, images=recipe.global_batch_size, **means, lr=rate)
        if step % recipe.picture_steps == 0 or step == steps:
            log.picture(step, draw(model, batch), "masks")
        if step % recipe.save_steps == 0 or step == steps:
            # The model before the checkpoint: a finished run has its model.
            if accelerator.is_main_process:
                save_model(optimization.result, recipe)
            log.plot()
            checkpoints.save(step)
    log.close()
    # The model must not outlive the processes' group: freeing both at once can hang (pytorch/pytorch issue 56297).
    del task, model, optimization
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    run_script("finetune_masks", main)
