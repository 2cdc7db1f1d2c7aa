"""Distils any teacher into any encoder: the encoder learns to give the teacher's image embeddings, or its features.

    accelerate launch --num_processes 1 training/distill.py   # a miniature: example images, no network, a minute
    accelerate launch training/distill.py --teacher facebook/sam-vit-huge --images photos --size 1024
    accelerate launch training/distill.py --config training/recipes/own_data/distill.yaml --images photos

`--target embeddings`, for a promptable teacher (MobileSAM, arXiv 2306.14289): mean squared error of the image
embeddings, after which the teacher's own decoder, which is taken over, reads the new encoder. `--target features`, for
any vision model of transformers: a linear layer reconstructs its normalised features, as SAMI does but without masking
(sami.py masks, which only plain vision transformers can do). Images need no masks; the teacher runs in every step, or
once with cache_features.py. The student is what finetune_masks.py would start from. The result, `OUTPUT_DIR/model`, is
for `finetune_masks.py --model`, whose `--teacher` goes on with the teacher's masks. A run that is started again in the
same `--output_dir` goes on where it stopped.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import send_to_device
from transformers import get_cosine_schedule_with_warmup

from hf_efficientsam import EfficientSamImageProcessor, EfficientSamModel, EfficientSamProcessor
from hf_efficientsam.training.data.images import normalize
from hf_efficientsam.training.engine.checkpoints import replaced_folder
from hf_efficientsam.training.engine.config import (
    NotNegativeInt,
    OutputFolder,
    PositiveFloat,
    PositiveInt,
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
    parameter_groups,
    warmed_up,
    weight_average,
)
from hf_efficientsam.training.engine.reports import describe_model
from hf_efficientsam.training.engine.run import TrainingRun, run_script, start_accelerator
from hf_efficientsam.training.masks.distillation import (
    EmbeddingDistillation,
    FeatureReconstruction,
    take_over_decoder,
)
from hf_efficientsam.training.masks.model_building import MaskModelConfig, build_model
from hf_efficientsam.training.masks.predictors import load_mask_predictor
from hf_efficientsam.training.sami.teacher_views import TeacherViewsConfig, needed_teacher, open_views

MINIATURE = Path(__file__).parent / "recipes" / "miniature" / "distill.yaml"


@dataclass(frozen=True)
class DistillConfig(MaskModelConfig, RunConfig, StepsConfig, StreamConfig, TeacherViewsConfig):
    target: Literal["embeddings", "features"] = field(
        default="embeddings", metadata={"help": "what is learnt; embeddings are of a promptable teacher"}
    )
    learning_rate: PositiveFloat = field(default=1e-3, metadata={"help": "peak of the learning rate"})
    size: PositiveInt = 1024
    output_dir: OutputFolder = "runs/distill"
    num_workers: NotNegativeInt = 1


def check(config: DistillConfig) -> None:
    check_ranges(config)
    config.check_model()
    if config.teacher is None:
        raise ValueError("Give --teacher a model; with --cache its features are read, not computed.")


def build_student(config: DistillConfig) -> EfficientSamModel:
    """The new encoder with the teacher's decoder, as far as it fits; for `features` with a decoder of its own."""
    student = build_model(config, config.size, config.seed)
    student.config.vision_config.image_size = config.size
    if config.target == "embeddings":
        try:
            promptable = load_mask_predictor(config.teacher, "cpu").model
        except ValueError as error:
            raise ValueError(f"{error} Of a teacher without prompts choose --target features.") from None
        left = take_over_decoder(promptable, student)
        if left:
            total = sum(len(part.state_dict()) for part in (student.prompt_encoder, student.mask_decoder))
            print(f"{len(left)} of {total} weights of the decoder do not fit the teacher's and are new: {left[0]} ...")
    return student


def build_task(config: DistillConfig, student: EfficientSamModel, width: int) -> torch.nn.Module:
    """Pixels and the teacher's features of `width` -> loss. Of the student its encoder is trained alone."""
    channels = student.config.vision_config.output_channels
    if config.target == "features":
        return FeatureReconstruction(student.vision_encoder, channels, width)
    if width != channels:
        raise ValueError(
            f"The teacher's embeddings have {width} channels and the student's {channels}; choose --target features."
        )
    return EmbeddingDistillation(student.vision_encoder)


def save_model(student: EfficientSamModel, encoder: dict, config: DistillConfig, folder: Path) -> None:
    """The student with these weights of the encoder."""
    weights = student.state_dict() | {f"vision_encoder.{name}": weight for name, weight in encoder.items()}
    size = {"height": config.size, "width": config.size}
    with replaced_folder(folder) as writing:
        student.save_pretrained(writing, state_dict=weights)
        EfficientSamProcessor(
            EfficientSamImageProcessor(size=size, size_divisor=student.config.vision_config.size_divisor)
        ).save_pretrained(writing)
        describe_model(writing, "distill", student, config)


def training_function(config: DistillConfig, run: TrainingRun) -> None:
    accelerator = run.accelerator
    teacher = needed_teacher(config, accelerator.device)
    data = open_views(config, teacher)
    loader, epoch_steps = epoch_loader(
        accelerator, data, config.global_batch_size, config.num_workers, config.epoch_images
    )
    student = build_student(config)
    task = build_task(config, student, (data.cache or teacher).width)
    optimizer = adamw(parameter_groups(task, config.learning_rate, config.weight_decay))
    warmup_steps = config.warmup_of(config.steps)
    scheduler = warmed_up(get_cosine_schedule_with_warmup(optimizer, warmup_steps, config.steps), warmup_steps)
    model, optimizer = accelerator.prepare(task, optimizer)
    average = weight_average(task, config.ema_decay)
    done = run.resume(config.steps, [scheduler, average])

    grid = (config.size // data.patch_size,) * 2
    model.train()
    for step, batches in step_batches(accelerator, loader, done, config.steps, epoch_steps):
        losses, keys = [], []
        for batch in batches:
            batch = send_to_device(batch, accelerator.device)
            target = teacher(batch["teacher_pixels"], grid) if teacher is not None else batch["features"]
            with accelerator.accumulate(model):
                loss = model(normalize(batch["pixel_values"]), target)
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
            average.update_parameters(task)
        run.log.add(step, images=config.global_batch_size, loss=loss, lr=lr)
        if run.is_save_due(step):
            if accelerator.is_main_process:
                trained = task if average is None else average.module
                save_model(student, trained.encoder.state_dict(), config, run.output_dir / "model")
            run.save(step)


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(DistillConfig, __doc__, arguments, default=MINIATURE)
    check(config)
    accelerator = start_accelerator(config)
    with TrainingRun(accelerator, config, "distill", streamed=bool(config.shards)) as run:
        training_function(config, run)


if __name__ == "__main__":
    run_script("distill", main)
