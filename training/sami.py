"""SAMI: pretrains EfficientSAM's vision encoder by reconstructing a foundation model's features from a few patches.

    accelerate launch --num_processes 1 training/sami.py   # a miniature: example images, no network, a minute
    accelerate launch training/sami.py --config training/recipes/paper/sami_ti_imagenet.yaml --images imagenet/train
    accelerate launch training/sami.py --teacher facebook/sam-vit-huge --images photos --output_dir runs/sami

A run that is started again in the same `--output_dir` goes on where it stopped. The result is `OUTPUT_DIR/model`, an
`EfficientSamForPreTraining` whose encoder `EfficientSamModel.from_pretrained` and `finetune_masks.py --encoder` take;
the training curve and drawings of what is reconstructed are beside it. Several GPUs and machines:
training/accelerate/*.yaml.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import send_to_device, set_seed
from PIL import Image
from transformers import get_cosine_schedule_with_warmup

from hf_efficientsam import EfficientSamForPreTraining, EfficientSamSamiConfig
from hf_efficientsam.inference.drawing import draw_features
from hf_efficientsam.training.data.images import normalize
from hf_efficientsam.training.engine.checkpoints import replaced_folder
from hf_efficientsam.training.engine.config import (
    EpochsConfig,
    NotNegativeFloat,
    OutputFolder,
    PositiveFloat,
    PositiveInt,
    RatioBelowOne,
    RunConfig,
    StreamConfig,
    check_ranges,
    parse_config,
)
from hf_efficientsam.training.engine.encoder_weights import load_vit, select_weights
from hf_efficientsam.training.engine.loaders import epoch_loader, step_batches
from hf_efficientsam.training.engine.optimization import (
    adamw,
    clip_gradients,
    parameter_groups,
    warmed_up,
    weight_average,
)
from hf_efficientsam.training.engine.reports import describe_model
from hf_efficientsam.training.engine.run import TrainingRun, run_script, start_accelerator
from hf_efficientsam.training.sami.teacher_views import TeacherViewsConfig, needed_teacher, open_views
from hf_efficientsam.training.sami.teachers import Teacher

MINIATURE = Path(__file__).parent / "recipes" / "miniature" / "sami.yaml"


@dataclass(frozen=True)
class SamiConfig(RunConfig, EpochsConfig, StreamConfig, TeacherViewsConfig):
    # Target.
    target: Literal["features", "pixels"] = field(
        default="features", metadata={"help": "features are SAMI's; pixels are MAE's, without a teacher"}
    )
    target_normalization: Literal["layer_norm", "none"] = field(
        default="layer_norm", metadata={"help": "of each feature"}
    )
    loss: Literal["mse", "cosine"] = field(default="mse", metadata={"help": "between target and reconstruction"})
    # Student; the defaults are EfficientSAM-Ti with the paper's decoder.
    hidden_size: PositiveInt = field(default=192, metadata={"help": "the encoder's width: 192 (Ti), 384 (S), 768 (B)"})
    num_attention_heads: PositiveInt = field(default=3, metadata={"help": "the encoder's heads: 3, 6, 12"})
    num_hidden_layers: PositiveInt = field(default=12, metadata={"help": "the encoder's layers"})
    mask_ratio: RatioBelowOne = field(
        default=0.75, metadata={"help": "ratio of patches that the encoder does not see"}
    )
    decoder_type: Literal["cross_attention", "all_token"] = field(
        default="cross_attention", metadata={"help": "what the decoder's layers work on: hidden patches, or all"}
    )
    decoder_hidden_size: PositiveInt = field(default=512, metadata={"help": "the decoder's width"})
    decoder_num_hidden_layers: PositiveInt = field(default=8, metadata={"help": "the decoder's layers"})
    decoder_num_attention_heads: PositiveInt = field(default=16, metadata={"help": "the decoder's heads"})
    select_weights: bool = field(
        default=False, metadata={"help": "start from evenly spaced weights of a Dinov2 teacher, not from scratch"}
    )
    # Optimisation.
    global_batch_size: PositiveInt = 4096
    batch_size: PositiveInt | None = 64
    epochs: PositiveFloat = 400
    warmup_epochs: NotNegativeFloat = 40
    base_learning_rate: NotNegativeFloat = field(
        default=1.5e-4, metadata={"help": "for each 256 images of the global batch"}
    )
    adam_beta2: RatioBelowOne = field(default=0.95, metadata={"help": "AdamW's"})
    output_dir: OutputFolder = "runs/sami"


def build_teacher(config: SamiConfig, device: torch.device) -> Teacher | None:
    """None where its features are in a cache, or not needed."""
    if config.target == "pixels" and (config.teacher or config.cache):
        raise ValueError("Pixels are reconstructed without a teacher; leave --teacher and --cache out.")
    if config.target == "features" and not (config.teacher or config.cache):
        raise ValueError(
            "Give --teacher a vision model, or --cache its features, or --target pixels; the miniature is --config "
            f"{MINIATURE}."
        )
    return needed_teacher(config, device)


def build_model(config: SamiConfig, target_size: int | None) -> EfficientSamForPreTraining:
    vision = {
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "pretrain_image_size": config.size,
    }
    model_config = EfficientSamSamiConfig(
        vision_config=vision,
        target=config.target,
        target_size=target_size,
        target_normalization=config.target_normalization,
        loss=config.loss,
        mask_ratio=config.mask_ratio,
        decoder_type=config.decoder_type,
        decoder_hidden_size=config.decoder_hidden_size,
        decoder_num_hidden_layers=config.decoder_num_hidden_layers,
        decoder_num_attention_heads=config.decoder_num_attention_heads,
    )
    set_seed(config.seed)  # the same start on every process, whatever was loaded before
    model = EfficientSamForPreTraining(model_config)
    if config.select_weights:
        if config.teacher is None:
            raise ValueError("--select_weights takes them from a teacher; give --teacher.")
        select_weights(load_vit(config.teacher), model.vision_encoder)
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
    return draw_features(images, *arrays, grid=grid, pixels=model.config.target == "pixels")


def get_optimizer(
    config: SamiConfig, model: EfficientSamForPreTraining, steps: int, warmup_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    learning_rate = config.base_learning_rate * config.global_batch_size / 256
    groups = parameter_groups(model, learning_rate, config.weight_decay)
    optimizer = adamw(groups, betas=(0.9, config.adam_beta2))
    return optimizer, warmed_up(get_cosine_schedule_with_warmup(optimizer, warmup_steps, steps), warmup_steps)


def save_model(student: EfficientSamForPreTraining, state_dict: dict, config: SamiConfig, folder: Path) -> None:
    with replaced_folder(folder) as writing:
        student.save_pretrained(writing, state_dict=state_dict)
        describe_model(writing, "sami", student, config)


def training_function(config: SamiConfig, run: TrainingRun) -> None:
    accelerator = run.accelerator
    teacher = build_teacher(config, accelerator.device)
    data = open_views(config, teacher)
    loader, epoch_steps = epoch_loader(
        accelerator, data, config.global_batch_size, config.num_workers, config.epoch_images
    )
    steps, warmup_steps = config.in_steps(epoch_steps)
    features = data.cache or teacher
    student = build_model(config, None if features is None else features.width)
    optimizer, scheduler = get_optimizer(config, student, steps, warmup_steps)
    model, optimizer = accelerator.prepare(student, optimizer)
    student = accelerator.unwrap_model(model)
    average = weight_average(student, config.ema_decay)
    done = run.resume(steps, [scheduler, average])

    grid = (config.size // student.config.vision_config.patch_size,) * 2
    model.train()
    for step, batches in step_batches(accelerator, loader, done, steps, epoch_steps):
        losses, keys = [], []
        for batch in batches:
            batch = send_to_device(batch, accelerator.device)
            target = batch.get("features")
            if "teacher_pixels" in batch:
                target = teacher(batch["teacher_pixels"], grid)
            with accelerator.accumulate(model):
                loss = model(normalize(batch["pixel_values"]), target, batch["noise"]).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = clip_gradients(accelerator, model.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            keys += batch["key"]
        loss, lr = torch.stack(losses).mean(), max(scheduler.get_last_lr())
        run.check_finite(step, loss, grad_norm, keys)
        if not accelerator.optimizer_step_was_skipped:  # as in float16, for an infinite gradient
            scheduler.step()
        if average is not None:
            average.update_parameters(student)
        run.log.add(step, images=config.global_batch_size, loss=loss, lr=lr)
        if run.is_due(step, config.image_steps) and not run.left_out.in_a_row:  # what is not finite has no colours
            run.log.add_image(step, draw(student, batch, target, grid), "reconstruction")
        if run.is_save_due(step):
            # On every process: FSDP gathers the weights from all of them.
            state_dict = accelerator.get_state_dict(model if average is None else average.module)
            if accelerator.is_main_process:
                save_model(student, state_dict, config, run.output_dir / "model")
            run.save(step)


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(SamiConfig, __doc__, arguments, default=MINIATURE)
    check_ranges(config)
    accelerator = start_accelerator(config, fsdp=True)
    with TrainingRun(accelerator, config, "sami", streamed=bool(config.shards)) as run:
        training_function(config, run)


if __name__ == "__main__":
    run_script("sami", main)
