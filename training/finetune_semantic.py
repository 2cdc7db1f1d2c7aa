"""Fine-tunes EfficientSAM's vision encoder for semantic segmentation: ADE20K, or folders of images and label images.

    accelerate launch --num_processes 1 training/finetune_semantic.py   # a miniature: made-up images, no network
    accelerate launch training/finetune_semantic.py --config training/recipes/paper/semantic_ti_ade20k.yaml \
        --encoder runs/sami/model --train ADEChallengeData2016 --test ADEChallengeData2016 --output_dir runs/ade20k
    accelerate launch training/finetune_semantic.py --encoder runs/sami/model --head upernet --ignore_label 0 \
        --train my/train --test my/val --output_dir runs/mine
    accelerate launch training/finetune_semantic.py --config training/recipes/paper/semantic_ti_ade20k.yaml \
        --evaluate runs/ade20k/model --test ADEChallengeData2016 --evaluation slide

A run that is started again in the same `--output_dir` goes on where it stopped. The result is `OUTPUT_DIR/model`,
which `from_pretrained` of transformers' `Mask2FormerForUniversalSegmentation` (or `UperNetForSemanticSegmentation`)
takes once `hf_efficientsam` is imported; mIoU, pixel accuracy and the IoU of each class are in
`OUTPUT_DIR/metrics.json`, the training curve and drawings beside it. Several GPUs and machines:
training/accelerate/ddp.yaml and multi_node.yaml.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, set_seed
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    PreTrainedModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    get_polynomial_decay_schedule_with_warmup,
)

from hf_efficientsam import EfficientSamBackbone, EfficientSamBackboneConfig
from hf_efficientsam.inference.drawing import draw_classes, image_table
from hf_efficientsam.training.data.semantic import (
    NO_CLASS,
    EvaluationImages,
    LabelSourceConfig,
    SemanticCropConfig,
    SemanticCrops,
    Source,
    open_source,
)
from hf_efficientsam.training.engine.checkpoints import replaced_folder
from hf_efficientsam.training.engine.config import (
    EvaluationConfig,
    LearningRateConfig,
    LoaderConfig,
    NotNegativeFloat,
    NotNegativeInt,
    OutputFolder,
    PositiveFloat,
    PositiveInt,
    RunConfig,
    StepsConfig,
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
from hf_efficientsam.training.semantic.evaluation import (
    class_scores,
    confusion_matrix,
    confusion_scores,
    sliding_scores,
)
from hf_efficientsam.training.semantic.losses import PixelLoss, QueryLoss

MINIATURE = Path(__file__).parent / "recipes" / "miniature" / "semantic.yaml"
HEADS = {"mask2former": Mask2FormerForUniversalSegmentation, "upernet": UperNetForSemanticSegmentation}
SHOWN = 4  # images in a drawing


@dataclass(frozen=True)
class SemanticConfig(
    RunConfig,
    StepsConfig,
    LearningRateConfig,
    EvaluationConfig,
    LoaderConfig,
    EncoderConfig,
    SemanticCropConfig,
    LabelSourceConfig,
):
    evaluate: str | None = field(
        default=None, metadata={"help": "only print how good this model of an earlier run is on the images to test"}
    )
    # Encoder.
    window_size: NotNegativeInt = field(
        default=0, metadata={"help": "side in patches of the windows that most layers attend within; 0: everywhere"}
    )
    # Head.
    head: Literal["mask2former", "upernet"] = field(default="mask2former", metadata={"help": "what segments"})
    width: PositiveInt = field(
        default=256, metadata={"help": "its channels, and the feature pyramid's; a multiple of 32"}
    )
    num_queries: PositiveInt = field(default=100, metadata={"help": "masks that Mask2Former makes of an image"})
    pixel_decoder_layers: PositiveInt = field(default=6, metadata={"help": "Mask2Former's layers over the pyramid"})
    decoder_layers: PositiveInt = field(default=9, metadata={"help": "Mask2Former's layers over the queries"})
    num_points: PositiveInt = field(default=12544, metadata={"help": "pixels at which its loss compares two masks"})
    # Optimisation.
    steps: PositiveInt = 160000
    warmup_steps: NotNegativeInt = 0
    schedule_power: PositiveFloat = field(
        default=0.9, metadata={"help": "then the rate falls as this power of what is left"}
    )
    global_batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 2e-4
    encoder_lr_scale: NotNegativeFloat = 0.1
    # Evaluation.
    evaluation: Literal["whole", "slide"] = field(
        default="whole", metadata={"help": "images are looked at whole, or by sliding windows of --size"}
    )
    output_dir: OutputFolder = "runs/semantic"


def check(config: SemanticConfig) -> None:
    check_ranges(config)
    for name in ("size", "width"):
        if getattr(config, name) % 32:
            raise ValueError(f"--{name} {getattr(config, name)} must be a multiple of 32.")
    if config.max_scale < config.min_scale:
        raise ValueError(f"--max_scale {config.max_scale} must not be less than --min_scale {config.min_scale}.")


def build_backbone(config: SemanticConfig) -> EfficientSamBackbone:
    """The encoder under a new feature pyramid; ValueError if it cannot be loaded, or weights of it are missing."""
    options = {
        "window_size": config.window_size,
        "drop_path_rate": config.drop_path,
        "image_size": config.size,
        "pyramid_strides": [4, 8, 16, 32],
        "pyramid_channels": config.width,
    }
    if config.encoder is not None:
        return load_around_encoder(EfficientSamBackbone, config.encoder, **options)[0]
    options |= {name: getattr(config, name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")}
    return EfficientSamBackbone(EfficientSamBackboneConfig(pretrain_image_size=config.size, **options))


def build_model(config: SemanticConfig, classes: list[str]) -> PreTrainedModel:
    set_seed(config.seed)  # the same start on every process, whatever was loaded before
    backbone = build_backbone(config)
    options = {
        "backbone_config": backbone.config,
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
    }
    if config.head == "upernet":
        # Without the second classifier on the stride-16 map, which in ResNets speeds up the first layers.
        model_config = UperNetConfig(hidden_size=config.width, use_auxiliary_head=False, **options)
        model = UperNetForSemanticSegmentation(model_config)
        model.backbone.load_state_dict(backbone.state_dict())
        return model.train()
    model_config = Mask2FormerConfig(
        feature_size=config.width,
        mask_feature_size=config.width,
        hidden_dim=config.width,
        num_attention_heads=config.width // 32,
        encoder_layers=config.pixel_decoder_layers,
        encoder_feedforward_dim=4 * config.width,
        decoder_layers=config.decoder_layers + 1,  # transformers counts the masks before the first layer
        dim_feedforward=8 * config.width,
        num_queries=config.num_queries,
        train_num_points=config.num_points,
        **options,
    )
    model = Mask2FormerForUniversalSegmentation(model_config)
    model.model.pixel_level_module.encoder.load_state_dict(backbone.state_dict())
    return model.train()


def build_processor(config: SemanticConfig, model: PreTrainedModel) -> Mask2FormerImageProcessorPil:
    """Resizes the shorter side to `--size`, and both to multiples of 32."""
    size = {"shortest_edge": config.size, "longest_edge": 4 * config.size}
    return Mask2FormerImageProcessorPil(
        size=size, size_divisor=32, ignore_index=NO_CLASS, num_labels=model.config.num_labels
    )


def synchronize_batch_norm(
    config: SemanticConfig, model: PreTrainedModel, accelerator: Accelerator
) -> PreTrainedModel:
    """UperNet normalises over all images of a step: with several processes they must share their statistics."""
    if config.head != "upernet":
        return model
    if config.global_batch_size // accelerator.gradient_accumulation_steps == 1:
        raise ValueError("UperNet normalises over several images; raise --batch_size, or --global_batch_size.")
    if accelerator.num_processes == 1:
        return model
    if accelerator.device.type != "cuda":
        raise ValueError(
            "UperNet normalises over all images of a step, which processes share on GPUs alone; start one."
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def get_optimizer(
    config: SemanticConfig, model: PreTrainedModel
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    layers = model.config.backbone_config.num_hidden_layers
    groups = layer_wise_groups(model, config, layers, config.weight_decay)
    optimizer = adamw(groups)
    warmup_steps = config.warmup_of(config.steps)
    schedule = get_polynomial_decay_schedule_with_warmup(
        optimizer, warmup_steps, config.steps, lr_end=0.0, power=config.schedule_power
    )
    return optimizer, warmed_up(schedule, warmup_steps)


def predict(
    model: PreTrainedModel, pixel_values: torch.Tensor, size: tuple[int, int], config: SemanticConfig
) -> torch.Tensor:
    """The likeliest class of each pixel of one image: `[1, 3, h, w]` -> int64 `[*size]`."""
    if config.evaluation == "slide":
        return sliding_scores(model, pixel_values, size, config.size)[0].argmax(0)
    return class_scores(model, pixel_values, size)[0].argmax(0)


@torch.no_grad()
def measure(
    model: PreTrainedModel, source: Source, processor, config: SemanticConfig, accelerator: Accelerator
) -> dict:
    """`mean_iou`, `pixel_accuracy`, the number of `images` and `class_iou` by name, on every process. Each image is
    looked at by itself, so the counts are the same however many processes share them."""
    own = range(accelerator.process_index, len(source), accelerator.num_processes)
    images = Subset(EvaluationImages(source, processor), own)
    num_classes, training = len(source.classes), model.training
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=accelerator.device)
    model.eval()
    for pixel_values, labels in DataLoader(images, batch_size=None, num_workers=config.num_workers):
        with accelerator.autocast():
            predicted = predict(model, pixel_values.to(accelerator.device), labels.shape, config)
        counts += confusion_matrix(predicted, labels.to(accelerator.device), num_classes)
    model.train(training)
    scores = confusion_scores(np.sum(gather_object([counts.tolist()]), axis=0))
    class_iou = dict(zip(source.classes, scores.pop("class_iou"), strict=True))
    return {**scores, "images": len(source), "class_iou": class_iou}


def evaluate_saved(config: SemanticConfig) -> None:
    """Prints what the run that saved the model has written into its metrics."""
    accelerator, source = accelerator_without_timeout(), open_source(config, test=True)
    try:
        head = AutoConfig.from_pretrained(config.evaluate).model_type
    except (OSError, ValueError):
        head = None
    if head not in HEADS:
        raise ValueError(
            f"{config.evaluate} holds no result of finetune_semantic.py; give the folder OUTPUT_DIR/model."
        )
    model = HEADS[head].from_pretrained(config.evaluate, dtype=torch.float32)
    if list(model.config.id2label.values()) != source.classes:
        raise ValueError(f"The classes of the images to test are not those of {config.evaluate}; choose others.")
    processor = AutoImageProcessor.from_pretrained(config.evaluate, backend="pil")
    config = dataclasses.replace(config, size=processor.size.shortest_edge)
    scores = measure(model.to(accelerator.device), source, processor, config, accelerator)
    scores |= {f"IoU of {name}": iou for name, iou in scores.pop("class_iou").items() if iou is not None}
    accelerator.print("\n".join(f"{name}: {value:.6g}" for name, value in scores.items()))
    accelerator.end_training()


def save_model(
    model: PreTrainedModel, processor: Mask2FormerImageProcessorPil, config: SemanticConfig, folder: Path
) -> None:
    with replaced_folder(folder) as writing:
        model.save_pretrained(writing)
        processor.save_pretrained(writing)
        describe_model(writing, "finetune_semantic", model, config)


def write_metrics(config: SemanticConfig, scores: dict, step: int) -> None:
    report = {**scores, "step": step, "config": dataclasses.asdict(config)}
    libraries = ("accelerate", "scipy", "numpy", "pillow")
    write_report(Path(config.output_dir) / "metrics.json", report, libraries)


@torch.no_grad()
def draw(model: PreTrainedModel, source: Source, processor, config: SemanticConfig) -> Image.Image:
    """Some of the images to test on, their classes, and what the model takes them for, side by side."""
    columns = {"images": [], "their classes": [], "predicted": []}
    model.eval()
    for index in range(0, len(source), max(1, len(source) // SHOWN))[:SHOWN]:  # neighbours may be of one film
        _, image, labels = source[index]
        pixel_values = processor(image, return_tensors="pt")["pixel_values"].to(model.device)
        predicted = predict(model, pixel_values, labels.shape, config)
        columns["images"].append(image)
        columns["their classes"].append(draw_classes(image, labels))
        columns["predicted"].append(draw_classes(image, predicted.cpu()))
    model.train()
    width, height = columns["images"][0].size
    size = (256 * width // max(width, height), 256 * height // max(width, height))
    return image_table({name: [image.resize(size) for image in cells] for name, cells in columns.items()})


def training_function(config: SemanticConfig, run: TrainingRun) -> None:
    accelerator = run.accelerator
    source, test_source = open_source(config, test=False), open_source(config, test=True)
    if source.classes != test_source.classes:
        raise ValueError("The classes of the images to test are not those of the images to train on.")
    data, loading = SemanticCrops(source, config, config.seed), (config.num_workers, config.epoch_images)
    loader, epoch_steps = epoch_loader(accelerator, data, config.global_batch_size, *loading)
    segmenter = synchronize_batch_norm(config, build_model(config, source.classes), accelerator)
    processor = build_processor(config, segmenter)
    optimizer, scheduler = get_optimizer(config, segmenter)
    model, optimizer = accelerator.prepare(segmenter, optimizer)
    criterion = PixelLoss() if config.head == "upernet" else QueryLoss(segmenter)
    average = weight_average(segmenter, config.ema_decay)
    averaged = segmenter if average is None else average.module
    done = run.resume(config.steps, [scheduler, average])

    for step, batches in step_batches(accelerator, loader, done, config.steps, epoch_steps):
        batches, losses = list(batches), []
        # A mean over the masks or pixels of all batches and processes: accelerate divides by the number of both.
        amounts = torch.stack([criterion.amounts(batch["labels"]) for batch in batches]).sum(0)
        amounts = accelerator.reduce(amounts.to(accelerator.device)) / (len(batches) * accelerator.num_processes)
        for batch in batches:
            batch = send_to_device(batch, accelerator.device)
            seeds = batch["seed"].tolist()
            torch.manual_seed(seeds[0])  # of drop path, so that a resumed run draws what it would have drawn
            with accelerator.accumulate(model):
                loss = criterion(model(batch["pixel_values"], **criterion.options), batch["labels"], seeds, amounts)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = clip_gradients(accelerator, model.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        loss, lr = torch.stack(losses).mean(), max(scheduler.get_last_lr())
        run.check_finite(step, loss, grad_norm, [key for batch in batches for key in batch["key"]])
        if not accelerator.optimizer_step_was_skipped:  # as in float16, for an infinite gradient
            scheduler.step()
        if average is not None:
            average.update_parameters(segmenter)
        run.log.add(step, images=config.global_batch_size, loss=loss, lr=lr)
        if run.is_due(step, config.image_steps):
            run.log.add_image(step, draw(segmenter, test_source, processor, config), "classes")
        if run.is_due(step, config.eval_steps):
            scores = measure(averaged, test_source, processor, config, accelerator)
            run.log.add_evaluation(step, mean_iou=scores["mean_iou"], pixel_accuracy=scores["pixel_accuracy"])
            if accelerator.is_main_process:
                write_metrics(config, scores, step)
        if run.is_save_due(step):
            if accelerator.is_main_process:
                save_model(averaged, processor, config, run.output_dir / "model")
            run.save(step)


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(SemanticConfig, __doc__, arguments, default=MINIATURE)
    check(config)
    if config.evaluate is not None:
        return evaluate_saved(config)
    with TrainingRun(start_accelerator(config), config, "semantic") as run:
        training_function(config, run)


if __name__ == "__main__":
    run_script("finetune_semantic", main)
