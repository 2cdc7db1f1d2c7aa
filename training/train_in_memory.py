"""Trains promptable masks on one GPU for a number of minutes, with all images and masks in the GPU's memory.

    python training/pack_masks.py --annotations my/train/instances.json --size 512 --output_dir runs/pack
    python training/pack_masks.py --annotations my/val/instances.json --output_dir runs/pack
    python training/train_in_memory.py --config training/recipes/bundled/gpu_s.yaml --minutes 9 \
        --shards runs/pack/train/*.tar --val runs/pack/val/*.tar --output_dir runs/gpu

For a GPU that is lent for minutes. The learning rate falls with the time and not with the steps; the model is measured
several times and saved each time, in half precision in files of at most 16 MB, with everything else in
`OUTPUT_DIR/summary.json`. Another run with `--model OUTPUT_DIR/model` goes on from there. With `--reconstruct_minutes`
--model is a teacher: a new encoder of --hidden_size, made of a part of the teacher's, first learns to give the
teacher's image embeddings (SAMI's loss, arXiv 2312.00863, without masking) and then learns prompts with its decoder.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from hf_efficientsam import EfficientSamImageProcessor, EfficientSamModel, EfficientSamProcessor
from hf_efficientsam.training.data.sa1b import Sa1bShards
from hf_efficientsam.training.engine.checkpoints import replaced_folder
from hf_efficientsam.training.engine.config import (
    LearningRateConfig,
    NotNegativeFloat,
    NotNegativeInt,
    OptimizationConfig,
    OutputFolder,
    PositiveFloat,
    PositiveInt,
    RatioBelowOne,
    check_ranges,
    parse_config,
)
from hf_efficientsam.training.engine.encoder_weights import select_encoder
from hf_efficientsam.training.engine.optimization import adamw, layer_wise_groups, warmed_up, weight_average
from hf_efficientsam.training.engine.reports import write_report
from hf_efficientsam.training.engine.run import check_device, run_script
from hf_efficientsam.training.engine.stopping import LeftOutSteps, StopSignals
from hf_efficientsam.training.masks.batch import Batch, CropConfig
from hf_efficientsam.training.masks.evaluation import ImageBatches, Item, split_broken
from hf_efficientsam.training.masks.interactive import InteractiveSegmentation, PromptConfig
from hf_efficientsam.training.masks.losses import MaskLoss, MaskLossConfig
from hf_efficientsam.training.masks.memory import MasksInMemory
from hf_efficientsam.training.masks.model_building import MaskModelConfig, build_model
from hf_efficientsam.training.masks.validation import measure_model, scores_of

ROW_SECONDS = 10


@dataclass(frozen=True)
class InMemoryConfig(
    MaskModelConfig, OptimizationConfig, LearningRateConfig, PromptConfig, MaskLossConfig, CropConfig
):
    # Data.
    shards: list[str] = field(
        default_factory=list,
        metadata={"help": "tars that pack_masks.py wrote; one named twice weighs double"},
    )
    val: list[str] = field(default_factory=list, metadata={"help": "tars of other images, to measure on"})
    batch_size: PositiveInt = field(default=16, metadata={"help": "images a step"})
    prompts: PositiveInt = field(default=32, metadata={"help": "prompts an image and step"})
    # Time.
    minutes: PositiveFloat = field(default=9.0, metadata={"help": "of the whole run, loading and measuring included"})
    reconstruct_minutes: NotNegativeFloat = field(
        default=0.0, metadata={"help": "of them, a new encoder learns --model's image embeddings in so many"}
    )
    warmup_steps: NotNegativeInt = field(default=100, metadata={"help": "linear warm-up; then a cosine of the time"})
    evaluations: PositiveInt = field(default=4, metadata={"help": "times that the model is measured and saved"})
    val_images: PositiveInt = field(default=24, metadata={"help": "so many images each time, but all at the end"})
    ema_decay: RatioBelowOne = 0.998
    # Output.
    output_dir: OutputFolder = field(default="runs/in_memory", metadata={"help": "model and summary.json"})
    num_workers: NotNegativeInt = field(default=8, metadata={"help": "processes that read the files at the start"})
    device: str | None = field(default=None, metadata={"help": "by default the GPU; cpu to try a configuration"})


def check(config: InMemoryConfig) -> None:
    check_ranges(config)
    config.check_model()
    if not config.shards or not config.val:
        raise ValueError("Give --shards and --val tar files that training/pack_masks.py wrote.")
    if config.reconstruct_minutes and config.model is None:
        raise ValueError("--reconstruct_minutes needs a teacher; give --model.")
    if config.reconstruct_minutes >= config.minutes:
        raise ValueError("--reconstruct_minutes must be less than --minutes.")


def choose_device(name: str | None) -> torch.device:
    check_device(name)
    if name is None and not torch.cuda.is_available():
        raise ValueError(
            f"torch {torch.__version__} finds no GPU here; install a torch with CUDA, or give --device cpu to try."
        )
    return torch.device(name or "cuda")


# --------------------------------------------------------------------------------------------- what it leaves


class Summary:
    """Prints what happens with the seconds since the start, and keeps it for `summary.json`."""

    def __init__(self, config: InMemoryConfig, device: torch.device):
        self.started = time.perf_counter()
        self.path = Path(config.output_dir) / "summary.json"
        self.curve, self.evaluations, self.losses, self.steps = [], [], [], 0
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        self.run = {"config": asdict(config), "device": name}
        self.say(f"torch {torch.__version__}, {name}")

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def say(self, text: str) -> None:
        print(f"{self.seconds():7.1f} s  {text}", flush=True)

    def add(self, rows: list[dict], **values) -> None:
        """A row of `curve` or `evaluations`."""
        rows.append({"seconds": round(self.seconds(), 1), **values})
        self.say(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()))

    def add_step(self, step: int, losses: dict[str, torch.Tensor], lr: float) -> None:
        """The losses of a step; those of the steps since the last row, averaged, are a row every few seconds."""
        if step == 1:
            self.losses = []  # of what was trained before, other losses
        if all(loss.isfinite() for loss in losses.values()):  # else the step was left out
            self.losses.append({name: loss.detach() for name, loss in losses.items()})
        since = self.seconds() - (self.curve[-1]["seconds"] if self.curve else 0)
        if (since < ROW_SECONDS and step > 1) or not self.losses:
            return
        means = {name: torch.stack([one[name] for one in self.losses]).mean().item() for name in losses}
        self.add(self.curve, step=step, **means, lr=lr)
        self.losses = []

    def write(self) -> None:
        report = {"evaluations": self.evaluations, "curve": self.curve, **self.run, "seconds": self.seconds()}
        if torch.cuda.is_available():
            report["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        write_report(self.path, report, ("numpy", "pillow", "pycocotools"))


def save(model: EfficientSamModel, processor: EfficientSamProcessor, folder: Path) -> None:
    with replaced_folder(folder) as writing:
        copy.deepcopy(model).half().cpu().save_pretrained(writing, max_shard_size="16MB")
        processor.save_pretrained(writing)
        for source in writing.glob("*.py"):
            source.unlink()  # the package has them; what travels back is only the weights and their configuration


# --------------------------------------------------------------------------------------------------- measuring


def read_val(config: InMemoryConfig, processor: EfficientSamProcessor) -> list[list[Item]]:
    batches = ImageBatches([Sa1bShards(config.val)], [processor], batch_size=4)
    read = list(DataLoader(batches, batch_size=None, num_workers=config.num_workers))
    if not read:
        raise ValueError("There is no image with masks in --val; check the files.")
    return sorted(read, key=lambda items: items[0].place)


def evaluate(
    model: EfficientSamModel, processor: EfficientSamProcessor, batches: list[list[Item]]
) -> dict[str, float]:
    records, _ = split_broken(measure_model(model, processor, batches))  # shards leave broken images out
    return scores_of(records)


# ---------------------------------------------------------------------------------------------------- training


def build_student(config: InMemoryConfig, teacher: EfficientSamModel) -> EfficientSamModel:
    """The teacher's decoder behind a narrower encoder, whose weights are evenly spaced ones of the teacher's."""
    student_config = copy.deepcopy(teacher.config)
    vision = student_config.vision_config
    vision.hidden_size, vision.intermediate_size = config.hidden_size, 4 * config.hidden_size
    vision.num_attention_heads = config.num_attention_heads
    student = EfficientSamModel(student_config)
    for part in ("prompt_encoder", "mask_decoder"):
        getattr(student, part).load_state_dict(getattr(teacher, part).state_dict())
    select_encoder(teacher.vision_encoder, student.vision_encoder)
    return student


def get_optimizer(config: InMemoryConfig, model: EfficientSamModel) -> torch.optim.Optimizer:
    layers = model.config.vision_config.num_hidden_layers
    return adamw(layer_wise_groups(model, config, layers, config.weight_decay))


def fit(
    config: InMemoryConfig,
    summary: Summary,
    model: EfficientSamModel,
    draw: Callable[[], Batch],
    step_losses: Callable[[Batch], dict[str, torch.Tensor]],
    until: float,
    measure: Callable[[EfficientSamModel], None],
    signals: StopSignals,
) -> EfficientSamModel:
    """
    Trains a model until so many seconds are over, and for one second at least, or a signal has come. Batches are drawn
    in float32; the losses are computed in bfloat16. Steps whose gradient is not finite are left out.

    Returns:
        the average of its weights.

    Raises:
        TrainingStopped: see `LeftOutSteps`.
    """
    optimizer, started = get_optimizer(config, model), summary.seconds()
    average = weight_average(model, config.ema_decay)
    averaged = model if average is None else average.module

    def part_of_time() -> float:
        return min(1.0, (summary.seconds() - started) / max(until - started, 1.0))

    cosine = LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * part_of_time())) / 2)
    scheduler, step, measured = warmed_up(cosine, config.warmup_steps), 0, 1
    model.train()
    left_out = LeftOutSteps()
    while step == 0 or (part_of_time() < 1 and not signals.number):
        step += 1
        batch = draw()
        with torch.autocast(model.device.type, torch.bfloat16):
            parts = step_losses(batch)
        parts["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        if norm.isfinite():
            optimizer.step()
        left_out.note(step, None if norm.isfinite() else f"{parts['loss'].item()} (gradient {norm.item()})", False)
        optimizer.zero_grad()
        rate_now = max(scheduler.get_last_lr())
        scheduler.step()
        if average is not None:
            average.update_parameters(model)
        summary.add_step(step, parts, rate_now)
        if measured / config.evaluations <= part_of_time() < 1 and not signals.number:
            measured += 1
            measure(averaged)
    summary.steps += step
    return averaged


def reconstruct(
    config: InMemoryConfig,
    summary: Summary,
    student: EfficientSamModel,
    teacher: EfficientSamModel,
    data: MasksInMemory,
    signals: StopSignals,
) -> EfficientSamModel:
    """The student after its first minutes, in which it learns the teacher's image embeddings."""
    generator = torch.Generator(data.device).manual_seed(config.seed)
    teacher.eval()

    def draw() -> Batch:
        return data.batch(config.batch_size, 1, 1, generator, config.crop_scale, config.color_jitter)

    def step_losses(batch: Batch) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            target = teacher.get_image_embeddings(batch.pixel_values)
        return {"loss": F.mse_loss(student.get_image_embeddings(batch.pixel_values).float(), target.float())}

    until = summary.seconds() + 60 * config.reconstruct_minutes
    return fit(config, summary, student, draw, step_losses, until, lambda model: None, signals)


def train_prompts(
    config: InMemoryConfig,
    summary: Summary,
    model: EfficientSamModel,
    data: MasksInMemory,
    until: float,
    measure: Callable[[EfficientSamModel], None],
    signals: StopSignals,
) -> EfficientSamModel:
    task = InteractiveSegmentation(model, MaskLoss(config), config)
    generator = torch.Generator(data.device).manual_seed(config.seed)
    shared = torch.Generator().manual_seed(config.seed)

    def draw() -> Batch:
        shapes = (config.batch_size, config.prompts, config.noise_size)
        return data.batch(*shapes, generator, config.crop_scale, config.color_jitter)

    def step_losses(batch: Batch) -> dict[str, torch.Tensor]:
        return task(batch.pixel_values, batch.masks, batch.valid, batch.noise, shared)

    return fit(config, summary, model, draw, step_losses, until, measure, signals)


def train(config: InMemoryConfig, signals: StopSignals) -> None:
    device = choose_device(config.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    summary = Summary(config, device)
    model = build_model(config, config.image_size, config.seed)
    size = config.image_size or model.config.vision_config.image_size
    model.config.vision_config.image_size = size
    processor = EfficientSamProcessor(EfficientSamImageProcessor(size={"height": size, "width": size}))
    data = MasksInMemory(config.shards, size, device, config.num_workers)
    val = read_val(config, processor)
    summary.say(f"{len(data)} images, {len(data.bits)} masks")

    folder, some = Path(config.output_dir), val[: math.ceil(config.val_images / 4)]

    def keep(model: EfficientSamModel) -> None:
        save(model, processor, folder / "model")
        summary.write()

    def measure(model: EfficientSamModel, batches: list[list[Item]]) -> None:
        scores = evaluate(model, processor, batches)
        summary.add(summary.evaluations, images=sum(map(len, batches)), **scores)
        keep(model)

    model, before = model.to(device), summary.seconds()
    measure(model, some)
    last = (summary.seconds() - before) * max(1, len(val) / len(some))  # what measuring on all will take
    if config.reconstruct_minutes:
        model = reconstruct(config, summary, build_student(config, model).to(device), model, data, signals)
    if not signals.number:
        until = 60 * config.minutes - last
        model = train_prompts(config, summary, model, data, until, lambda averaged: measure(averaged, some), signals)
    if signals.number:
        keep(model)
        raise signals.stopped(summary.steps, f"--model {folder / 'model'} goes on from there")
    measure(model, val)


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(InMemoryConfig, __doc__, arguments)
    check(config)
    with StopSignals() as signals:
        train(config, signals)


if __name__ == "__main__":
    run_script("train_in_memory", main)
