"""Fine-tunes EfficientSAM's vision encoder for image classification: image folders, a `datasets` dataset, shards.

    accelerate launch --num_processes 1 training/finetune_classification.py   # a miniature: made-up images, no network
    accelerate launch training/finetune_classification.py \
        --config training/recipes/paper/classification_ti_imagenet.yaml --encoder runs/sami/model \
        --train imagenet/train --test imagenet/val --output_dir runs/imagenet
    accelerate launch training/finetune_classification.py --encoder runs/sami/model --linear_probe true \
        --dataset my/dataset --test_split validation --output_dir runs/probe
    accelerate launch training/finetune_classification.py --evaluate runs/imagenet/model --test imagenet/val

A run that is started again in the same `--output_dir` goes on where it stopped. The result is `OUTPUT_DIR/model`, an
`EfficientSamForImageClassification` with its image processor, for `pipeline("image-classification")`; top-1 and top-5
are in `OUTPUT_DIR/metrics.json`, the training curve and drawings beside it. Several GPUs and machines:
training/accelerate/ddp.yaml and multi_node.yaml.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, set_seed
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, BitImageProcessorPil, get_cosine_schedule_with_warmup
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hf_efficientsam import EfficientSamForImageClassification, EfficientSamVisionConfig
from hf_efficientsam.inference.drawing import image_table
from hf_efficientsam.training.classification.evaluation import top_accuracy
from hf_efficientsam.training.classification.mixup import mix_neighbors
from hf_efficientsam.training.data.classification import (
    ClassSourceConfig,
    ClassViewConfig,
    ClassViews,
    EvaluationBatches,
    Source,
    StreamedClassViews,
    open_test,
    open_train,
)
from hf_efficientsam.training.data.images import normalize, to_image
from hf_efficientsam.training.engine.checkpoints import replaced_folder
from hf_efficientsam.training.engine.config import (
    EpochsConfig,
    EvaluationConfig,
    LearningRateConfig,
    OutputFolder,
    PositiveFloat,
    PositiveInt,
    PositiveRatio,
    RatioBelowOne,
    RunConfig,
    StreamConfig,
    check_ranges,
    parse_config,
)
from hf_efficientsam.training.engine.encoder_weights import EncoderConfig, load_around_encoder
from hf_efficientsam.training.engine.loaders import epoch_loader, step_batches
from hf_efficientsam.training.engine.optimization import (
    adamw,
    clip_gradients,
    layer_wise_groups,
    warmed_up,
    weight_average,
)
from hf_efficientsam.training.engine.reports import describe_model, write_report
from hf_efficientsam.training.engine.run import (
    TrainingRun,
    accelerator_without_timeout,
    run_script,
    start_accelerator,
)

MINIATURE = Path(__file__).parent / "recipes" / "miniature" / "classification.yaml"
SHOWN = 6  # images in a drawing


@dataclass(frozen=True)
class ClassificationConfig(
    RunConfig,
    EpochsConfig,
    LearningRateConfig,
    EvaluationConfig,
    StreamConfig,
    EncoderConfig,
    ClassViewConfig,
    ClassSourceConfig,
):
    evaluate: str | None = field(
        default=None, metadata={"help": "only print how good this model of an earlier run is on the images to test"}
    )
    # Model.
    pooling: Literal["mean", "cls"] = field(
        default="mean", metadata={"help": "what is classified: the mean over the patches, or a class token"}
    )
    linear_probe: bool = field(default=False, metadata={"help": "train the last norm and the classifier alone"})
    # Optimisation.
    label_smoothing: RatioBelowOne = field(
        default=0.1, metadata={"help": "ratio of the target that all classes divide"}
    )
    global_batch_size: PositiveInt = 1024
    learning_rate: PositiveFloat = 1e-3
    # Evaluation.
    crop_ratio: PositiveRatio = field(
        default=0.875, metadata={"help": "side of the square in the middle that is looked at, of the shorter side"}
    )
    eval_batch_size: PositiveInt = field(default=64, metadata={"help": "images at a time and process"})
    output_dir: OutputFolder = "runs/classification"


def check(config: ClassificationConfig) -> None:
    check_ranges(config)
    if not 1 <= config.rand_augment_magnitude <= 29:
        raise ValueError(f"--rand_augment_magnitude {config.rand_augment_magnitude} must be from 1 to 29.")
    if config.size % 16:
        raise ValueError(f"--size {config.size} must be a multiple of the patch's 16 pixels.")
    if config.linear_probe and config.drop_path:
        raise ValueError("--linear_probe leaves the encoder as it is; leave --drop_path out.")


def build_model(config: ClassificationConfig, classes: list[str]) -> EfficientSamForImageClassification:
    options = {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
        "classifier_pooling": config.pooling,
        "drop_path_rate": config.drop_path,
        "image_size": config.size,
    }
    set_seed(config.seed)  # the same start on every process, whatever was loaded before
    if config.encoder is None:
        model_config = EfficientSamVisionConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_hidden_layers=config.num_hidden_layers,
            pretrain_image_size=config.size,
            **options,
        )
        model = EfficientSamForImageClassification(model_config)
    else:
        model, _ = load_around_encoder(EfficientSamForImageClassification, config.encoder, **options)
    model.vision_encoder.requires_grad_(not config.linear_probe)
    return model.train()


def build_data(
    config: ClassificationConfig, source: Source, accelerator: Accelerator
) -> ClassViews | StreamedClassViews:
    if not config.shards:
        return ClassViews(source, config, config.seed)
    processes = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    return StreamedClassViews(source, config, config.seed, shuffle_buffer=config.shuffle_buffer, **processes)


def build_processor(config: ClassificationConfig) -> BitImageProcessorPil:
    """Resizes the shorter side and cuts the middle out, so that an image keeps its proportions."""
    return BitImageProcessorPil(
        size={"shortest_edge": round(config.size / config.crop_ratio)},
        crop_size={"height": config.size, "width": config.size},
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )


def get_loader(
    config: ClassificationConfig, source: Source, accelerator: Accelerator
) -> tuple[DataLoader, int, int, int]:
    """Batches, optimiser steps an epoch, in all, and of warm-up."""
    data = build_data(config, source, accelerator)
    loading = (config.global_batch_size, config.num_workers, config.epoch_images)
    loader, epoch_steps = epoch_loader(accelerator, data, *loading)
    images = config.global_batch_size // accelerator.gradient_accumulation_steps // accelerator.num_processes
    if (config.mixup or config.cutmix) and images % 2:
        raise ValueError(
            f"Pairs of images are mixed; {images} at a time must be even (--batch_size), or --mixup 0 --cutmix 0."
        )
    return loader, epoch_steps, *config.in_steps(epoch_steps)


def get_optimizer(
    config: ClassificationConfig, model: EfficientSamForImageClassification, steps: int, warmup_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    layers = model.config.num_hidden_layers
    groups = layer_wise_groups(model, config, layers, config.weight_decay)
    optimizer = adamw(groups)
    return optimizer, warmed_up(get_cosine_schedule_with_warmup(optimizer, warmup_steps, steps), warmup_steps)


def seed_drop_path(seed: int, step: int, batch: int, process: int) -> None:
    """A layer draws anew which images skip it: by this alone, so that a resumed run draws what it would have drawn."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, batch, process]).generate_state(1)[0]))


def prepare_batch(batch: dict, num_classes: int, mixes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images `[B, 3, H, W]` and their targets `[B, K]`, mixed with their neighbours if asked for."""
    pixel_values, targets = normalize(batch["pixel_values"]), F.one_hot(batch["labels"], num_classes).float()
    return mix_neighbors(pixel_values, targets, batch["ratio"], batch["box"]) if mixes else (pixel_values, targets)


@torch.no_grad()
def measure(
    model: EfficientSamForImageClassification,
    source: Source,
    processor,
    config: ClassificationConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """`top1`, `top5` and the number of `images`, on every process."""
    processes = (accelerator.process_index, accelerator.num_processes)
    batches = EvaluationBatches(source, processor, config.eval_batch_size, *processes)
    ranked, references = [], []
    training = model.training
    model.eval()
    for pixel_values, labels in DataLoader(batches, batch_size=None, num_workers=config.num_workers):
        with accelerator.autocast():
            logits = model(pixel_values.to(accelerator.device)).logits
        ranked += logits.topk(min(5, logits.shape[1])).indices.tolist()
        references += labels.tolist()
    model.train(training)
    ranked, references = gather_object(ranked), gather_object(references)
    if not references:
        raise ValueError("There is no image to evaluate; check --test, --test_split or --test_shards.")
    return {**top_accuracy(ranked, references), "images": len(references)}


def evaluate_saved(config: ClassificationConfig) -> None:
    """Prints what the run that saved the model has written into its metrics."""
    accelerator, source = accelerator_without_timeout(), open_test(config)
    model, new = load_around_encoder(EfficientSamForImageClassification, config.evaluate)
    if new or list(model.config.id2label.values()) != list(source.classes):
        raise ValueError(f"{config.evaluate} is no classifier of the classes to test; choose another.")
    processor = AutoImageProcessor.from_pretrained(config.evaluate, backend="pil")
    scores = measure(model.to(accelerator.device), source, processor, config, accelerator)
    accelerator.print("\n".join(f"{name}: {value:.6g}" for name, value in scores.items()))
    accelerator.end_training()


def save_model(
    model: EfficientSamForImageClassification,
    processor: BitImageProcessorPil,
    config: ClassificationConfig,
    folder: Path,
) -> None:
    with replaced_folder(folder) as writing:
        model.save_pretrained(writing)
        processor.save_pretrained(writing)
        describe_model(writing, "finetune_classification", model, config)


def write_metrics(config: ClassificationConfig, scores: dict[str, float], step: int) -> None:
    report = {**scores, "step": step, "config": dataclasses.asdict(config)}
    libraries = ("accelerate", "kornia", "numpy", "pillow")
    write_report(Path(config.output_dir) / "metrics.json", report, libraries)


@torch.no_grad()
def draw(model: EfficientSamForImageClassification, pixel_values: torch.Tensor, targets: torch.Tensor) -> Image.Image:
    """The first images as the model sees them, the ratios of their classes, and what it predicts."""
    model.eval()
    logits = model(pixel_values[:SHOWN]).logits
    model.train()
    columns = {"images": [], "their classes": [], "predicted": []}
    for pixels, *ratios in zip(pixel_values, targets.cpu(), logits.float().softmax(1).cpu(), strict=False):
        columns["images"].append(to_image(pixels).resize((192, 192)))
        for name, ratio in zip(("their classes", "predicted"), ratios, strict=True):
            likeliest = [(model.config.id2label[i], ratio[i]) for i in ratio.topk(2).indices.tolist()]
            cell = Image.new("RGB", (192, 192), "white")
            words = "\n".join(f"{label[:20]} {part:.0%}" for label, part in likeliest if part >= 0.005)
            ImageDraw.Draw(cell).text((8, 80), words, font=ImageFont.load_default(size=14), fill="black")
            columns[name].append(cell)
    return image_table(columns)


def training_function(config: ClassificationConfig, run: TrainingRun) -> None:
    accelerator = run.accelerator
    source, test_source = open_train(config), open_test(config)
    if list(source.classes) != list(test_source.classes):
        raise ValueError("The classes of the images to test are not those of the images to train on.")
    loader, epoch_steps, steps, warmup_steps = get_loader(config, source, accelerator)
    classifier, processor = build_model(config, source.classes), build_processor(config)
    optimizer, scheduler = get_optimizer(config, classifier, steps, warmup_steps)
    model, optimizer = accelerator.prepare(classifier, optimizer)
    average = weight_average(classifier, config.ema_decay)
    averaged = classifier if average is None else average.module
    done = run.resume(steps, [scheduler, average])

    mixes = bool(config.mixup or config.cutmix)
    for step, batches in step_batches(accelerator, loader, done, steps, epoch_steps):
        losses, keys = [], []
        for number, batch in enumerate(batches):
            seed_drop_path(config.seed, step - 1, number, accelerator.process_index)
            batch = send_to_device(batch, accelerator.device)
            pixel_values, targets = prepare_batch(batch, len(source.classes), mixes)
            with accelerator.accumulate(model):
                logits = model(pixel_values).logits.float()
                loss = F.cross_entropy(logits, targets, label_smoothing=config.label_smoothing)
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
            average.update_parameters(classifier)
        run.log.add(step, images=config.global_batch_size, loss=loss, lr=lr)
        if run.is_due(step, config.image_steps):
            run.log.add_image(step, draw(classifier, pixel_values, targets), "classes")
        if run.is_due(step, config.eval_steps):
            scores = measure(averaged, test_source, processor, config, accelerator)
            run.log.add_evaluation(step, top1=scores["top1"], top5=scores["top5"])
            if accelerator.is_main_process:
                write_metrics(config, scores, step)
        if run.is_save_due(step):
            if accelerator.is_main_process:
                save_model(averaged, processor, config, run.output_dir / "model")
            run.save(step)


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(ClassificationConfig, __doc__, arguments, default=MINIATURE)
    check(config)
    if config.evaluate is not None:
        return evaluate_saved(config)
    with TrainingRun(start_accelerator(config), config, "classification", bool(config.shards)) as run:
        training_function(config, run)


if __name__ == "__main__":
    run_script("finetune_classification", main)
