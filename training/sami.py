"""SAMI: pretrains EfficientSAM's vision encoder by reconstructing a foundation model's features from a few patches.

    accelerate launch --num_processes 1 training/sami.py   # a miniature: example images, no network, a minute
    accelerate launch training/sami.py --config training/recipes/sami_ti_imagenet.yaml --images imagenet/train
    accelerate launch training/sami.py --teacher facebook/sam-vit-huge --images photos --output_dir runs/sami

A run that is started again in the same `--output_dir` goes on where it stopped. The result is `OUTPUT_DIR/model`, an
`EfficientSamForPreTraining` whose encoder `EfficientSamModel.from_pretrained` and `finetune_masks.py --encoder` take;
the curve and pictures of what is reconstructed are beside it. Several GPUs and machines: training/accelerate/*.yaml.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import send_to_device, set_seed
from PIL import Image
from transformers import AutoModel, get_cosine_schedule_with_warmup

from hf_efficientsam import EfficientSamForPreTraining, EfficientSamSamiConfig
from hf_efficientsam.inference.drawing import feature_picture
from hf_efficientsam.training.data.images import ImageOptions, ImageViews, StreamedViews, normalize, open_images
from hf_efficientsam.training.engine.runtime import (
    Checkpoints,
    Log,
    Optimization,
    check_ranges,
    check_same_run,
    epoch_loader,
    parameter_groups,
    parse_recipe,
    replaced_folder,
    run_script,
    start_accelerator,
    step_batches,
)
from hf_efficientsam.training.engine.warm_start import select_weights
from hf_efficientsam.training.sami.feature_cache import FeatureCache
from hf_efficientsam.training.sami.teachers import Teacher, load_teacher

MINIATURE = Path(__file__).parent / "recipes" / "sami_miniature.yaml"


@dataclass(frozen=True)
class Recipe(ImageOptions):
    epoch_images: int | None = field(
        default=None, metadata={"help": "images that count as an epoch; needed for shards, else all of them"}
    )
    shuffle_buffer: int = field(default=2000, metadata={"help": "images that a worker mixes while streaming"})
    size: int = field(default=224, metadata={"help": "side of the student's crop in pixels"})
    crop_scale: float = field(default=0.2, metadata={"help": "smallest part of an image's area that a crop keeps"})
    views: int | None = field(default=None, metadata={"help": "crops of an image; else new ones in each epoch"})
    view_seed: int = field(default=0, metadata={"help": "of the crops: that of the cache, if one is used"})
    num_workers: int = field(default=2, metadata={"help": "processes that read images"})
    # Target.
    teacher: str | None = field(default=None, metadata={"help": "vision model: Hub name, directory, or: bundled"})
    teacher_size: int | None = field(default=None, metadata={"help": "its input side; else its processor's"})
    cache: str | None = field(default=None, metadata={"help": "its features from cache_features.py"})
    target: str = field(default="features", metadata={"help": "features (SAMI), or pixels (MAE, without a teacher)"})
    target_normalization: str = field(default="layer_norm", metadata={"help": "layer_norm or none"})
    loss: str = field(default="mse", metadata={"help": "mse or cosine"})
    # Student; the defaults are EfficientSAM-Ti with the paper's decoder.
    hidden_size: int = field(default=192, metadata={"help": "the encoder's width: 192 (Ti), 384 (S), 768 (B)"})
    num_attention_heads: int = field(default=3, metadata={"help": "the encoder's heads: 3, 6, 12"})
    num_hidden_layers: int = field(default=12, metadata={"help": "the encoder's layers"})
    mask_ratio: float = field(default=0.75, metadata={"help": "share of patches that the encoder does not see"})
    decoder_type: str = field(default="cross_attention", metadata={"help": "cross_attention or all_token"})
    decoder_hidden_size: int = field(default=512, metadata={"help": "the decoder's width"})
    decoder_num_hidden_layers: int = field(default=8, metadata={"help": "the decoder's layers"})
    decoder_num_attention_heads: int = field(default=16, metadata={"help": "the decoder's heads"})
    select_weights: bool = field(
        default=False, metadata={"help": "start from evenly spaced weights of a Dinov2 teacher, not from scratch"}
    )
    # Optimisation.
    global_batch_size: int = field(default=4096, metadata={"help": "images a step, over all processes"})
    batch_size: int = field(
        default=64, metadata={"help": "images at a time and process; gradients are accumulated to the global batch"}
    )
    epochs: float = field(default=400, metadata={"help": "times over the data"})
    warmup_epochs: float = field(default=40, metadata={"help": "of linear warm-up; then a cosine to zero"})
    base_learning_rate: float = field(default=1.5e-4, metadata={"help": "for each 256 images of the global batch"})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW's"})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    ema_decay: float = field(
        default=0.0, metadata={"help": "the saved model averages the weights' past; 0: it does not"}
    )
    seed: int = field(default=0, metadata={"help": "of the start, the order and the masks"})
    # Output.
    output_dir: str = field(default="runs/sami", metadata={"help": "checkpoints, model, curve and pictures"})
    trackers: list[str] = field(default_factory=list, metadata={"help": "tensorboard, trackio, or both"})
    save_steps: int = field(default=1000, metadata={"help": "a checkpoint every so many steps"})
    log_steps: int = field(default=20, metadata={"help": "a point of the curve every so many steps"})
    picture_steps: int = field(default=1000, metadata={"help": "a picture every so many steps"})


def check(recipe: Recipe) -> None:
    positive = ("size", "global_batch_size", "batch_size", "save_steps", "log_steps", "picture_steps", "epochs")
    check_ranges(recipe, positive, ("seed", "view_seed", "num_workers"), below_one=("ema_decay",))
    if not 0 <= recipe.warmup_epochs < recipe.epochs:
        raise ValueError(f"--warmup_epochs {recipe.warmup_epochs} must be less than --epochs {recipe.epochs}.")


def build_teacher(recipe: Recipe, device: torch.device) -> Teacher | None:
    """None where its features are in a cache, or not needed."""
    if recipe.target == "pixels" and (recipe.teacher or recipe.cache):
        raise ValueError("Pixels are reconstructed without a teacher; leave --teacher and --cache out.")
    if recipe.target == "features" and not (recipe.teacher or recipe.cache):
        raise ValueError(
            "Give --teacher a vision model, or --cache its features, or --target pixels; the miniature is --config "
            f"{MINIATURE}."
        )
    return load_teacher(recipe.teacher, recipe.teacher_size, device) if recipe.teacher and not recipe.cache else None


def build_data(recipe: Recipe, teacher: Teacher | None) -> ImageViews | StreamedViews:
    source = open_images(recipe.images, recipe.dataset, recipe.split, recipe.image_column, recipe.shards)
    crop_scale = (recipe.crop_scale, 1.0)
    arguments = {"size": recipe.size, "crop_scale": crop_scale, "views": recipe.views, "seed": recipe.view_seed}
    if recipe.cache:
        expected = {name: getattr(recipe, name) for name in ("size", "crop_scale", "view_seed")} | {"patch_size": 16}
        expected["data"] = source.fingerprint()
        if recipe.teacher:  # is looked at and let go; without it a cache says itself whose it is
            expected["teacher"] = load_teacher(recipe.teacher, recipe.teacher_size).description()
        arguments["cache"] = FeatureCache(recipe.cache, expected)
        arguments["views"] = recipe.views or arguments["cache"].views
    elif teacher is not None:
        arguments["teacher_size"] = teacher.size
    if not recipe.shards:
        return ImageViews(source, noise_seed=recipe.seed, **arguments)
    state = PartialState()
    return StreamedViews(
        source,
        noise_seed=recipe.seed,
        process_index=state.process_index,
        num_processes=state.num_processes,
        shuffle_buffer=recipe.shuffle_buffer,
        **arguments,
    )


def build_model(recipe: Recipe, target_size: int | None) -> EfficientSamForPreTraining:
    vision = {
        "hidden_size": recipe.hidden_size,
        "num_attention_heads": recipe.num_attention_heads,
        "num_hidden_layers": recipe.num_hidden_layers,
        "pretrain_image_size": recipe.size,
    }
    config = EfficientSamSamiConfig(
        vision_config=vision,
        target=recipe.target,
        target_size=target_size,
        target_normalization=recipe.target_normalization,
        loss=recipe.loss,
        mask_ratio=recipe.mask_ratio,
        decoder_type=recipe.decoder_type,
        decoder_hidden_size=recipe.decoder_hidden_size,
        decoder_num_hidden_layers=recipe.decoder_num_hidden_layers,
        decoder_num_attention_heads=recipe.decoder_num_attention_heads,
    )
    set_seed(recipe.seed)  # the same start on every process, whatever was loaded before
    model = EfficientSamForPreTraining(config)
    if recipe.select_weights:
        if recipe.teacher is None:
            raise ValueError("--select_weights takes them from a teacher; give --teacher.")
        select_weights(AutoModel.from_pretrained(recipe.teacher, dtype=torch.float32), model.vision_encoder)
    return model


@torch.no_grad()
def draw(
    model: EfficientSamForPreTraining, batch: dict, target: torch.Tensor | None, grid: tuple[int, int]
) -> Image.Image:
    """Input, masked input, target and reconstruction of the first images, side by side."""
    model.eval()
    pixel_values, noise = normalize(batch["pixel_values"][:4]), batch["noise"][:4]
    target = None if target is None else target[:4]
    output = model(pixel_values, target, noise)
    target = model.target(pixel_values, target)
    model.train()
    images = [Image.fromarray(pixels) for pixels in batch["pixel_values"][:4].permute(0, 2, 3, 1).cpu().numpy()]
    arrays = (array.float().cpu().numpy() for array in (output.mask, target, output.reconstruction))
    return feature_picture(images, *arrays, grid=grid, pixels=model.config.target == "pixels")


def main() -> None:
    recipe = parse_recipe(Recipe, __doc__, None if sys.argv[1:] else ["--config", str(MINIATURE)])
    try:
        check(recipe)
        accelerator = start_accelerator(recipe)
        if recipe.ema_decay and accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("An average of the weights cannot be kept with FSDP; leave --ema_decay out, or use DDP.")
        teacher = build_teacher(recipe, accelerator.device)
        data = build_data(recipe, teacher)
        loader, epoch_steps = epoch_loader(accelerator, data, recipe)
        features = data.cache or teacher
        model = build_model(recipe, None if features is None else features.width)
        if accelerator.is_main_process:
            check_same_run(recipe, accelerator.num_processes)
    except (OSError, ValueError) as error:
        print(f"sami: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    steps = round(recipe.epochs * epoch_steps)
    learning_rate = recipe.base_learning_rate * recipe.global_batch_size / 256
    groups = parameter_groups(model, learning_rate, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, recipe.adam_beta2))
    schedule = get_cosine_schedule_with_warmup(optimizer, round(recipe.warmup_epochs * epoch_steps), steps)
    optimization = Optimization(
        accelerator, model, optimizer, schedule, recipe.max_grad_norm, ema_decay=recipe.ema_decay
    )
    model, student = optimization.model, optimization.current

    output, grid = Path(recipe.output_dir), (recipe.size // student.config.vision_config.patch_size,) * 2
    log = Log(accelerator, output, steps, recipe.log_steps)
    checkpoints = Checkpoints(accelerator, output / "checkpoints")
    step = checkpoints.resume()
    if step == steps:
        accelerator.print(f"{output} holds a finished run; choose another --output_dir for a new one, or delete it.")
    log.start(step, "sami", dataclasses.asdict(recipe))
    model.train()
    for batches in step_batches(accelerator, loader, data, step, steps, epoch_steps):
        losses, keys = [], []
        for batch in batches:
            batch = send_to_device(batch, accelerator.device)
            target = batch.get("features")
            if "teacher_pixels" in batch:
                target = teacher(batch["teacher_pixels"], grid)
            with accelerator.accumulate(model):
                loss = model(normalize(batch["pixel_values"]), target, batch["noise"]).loss
                optimization.add(loss)
            losses.append(loss.detach())
            keys += batch["key"]
        step, loss = step + 1, torch.stack(losses).mean()
        rate = optimization.finish(step, loss, keys)
        log.add(step, images=recipe.global_batch_size, loss=loss, lr=rate)
        if step % recipe.picture_steps == 0 or step == steps:
            log.picture(step, draw(student, batch, target, grid), "reconstruction")
        if step % recipe.save_steps == 0 or step == steps:
            # The model before the checkpoint: a finished run has its model.
            state_dict = accelerator.get_state_dict(optimization.result if recipe.ema_decay else model)
            if accelerator.is_main_process:
                with replaced_folder(output / "model") as folder:
                    student.save_pretrained(folder, state_dict=state_dict)
            log.plot()
            checkpoints.save(step)
    log.close()
    # The model must not outlive the processes' group: freeing both at once can hang (pytorch/pytorch issue 56297).
    del model, optimization
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    run_script("sami", main)
