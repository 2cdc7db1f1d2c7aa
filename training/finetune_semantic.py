"""Fine-tunes EfficientSAM's vision encoder for semantic segmentation: ADE20K, or folders of images and label pictures.

    accelerate launch --num_processes 1 training/finetune_semantic.py   # a miniature: made-up images, no network
    accelerate launch training/finetune_semantic.py --config training/recipes/semantic_ti_ade20k.yaml \
        --encoder runs/sami/model --train ADEChallengeData2016 --test ADEChallengeData2016 --output_dir runs/ade20k
    accelerate launch training/finetune_semantic.py --encoder runs/sami/model --head upernet --ignore_label 0 \
        --train my/train --test my/val --output_dir runs/mine
    accelerate launch training/finetune_semantic.py --config training/recipes/semantic_ti_ade20k.yaml \
        --evaluate runs/ade20k/model --test ADEChallengeData2016 --evaluation slide

A run that is started again in the same `--output_dir` goes on where it stopped. The result is `OUTPUT_DIR/model`,
which `from_pretrained` of transformers' `Mask2FormerForUniversalSegmentation` (or `UperNetForSemanticSegmentation`)
takes once `hf_efficientsam` is imported; mIoU, pixel accuracy and the IoU of each class are in
`OUTPUT_DIR/metrics.json`, the curves and pictures beside it. Several GPUs and machines: training/accelerate/ddp.yaml
and multi_node.yaml.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import Accelerator, DistributedType
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
from hf_efficientsam.inference.drawing import draw_classes, picture_table
from hf_efficientsam.training.data.semantic import (
    NO_CLASS,
    CropOptions,
    EvaluationImages,
    LabelOptions,
    SemanticCrops,
    Source,
    open_source,
)
from hf_efficientsam.training.engine.runtime import (
    Checkpoints,
    Curve,
    Log,
    Optimization,
    check_ranges,
    check_same_run,
    epoch_loader,
    last_line,
    layer_decay,
    parameter_groups,
    parse_recipe,
    replaced_folder,
    run_script,
    start_accelerator,
    step_batches,
    write_with_versions,
)
from hf_efficientsam.training.engine.warm_start import EncoderOptions, load_around_encoder
from hf_efficientsam.training.semantic.losses import (
    MaskLoss,
    MeanIoU,
    PixelLoss,
    class_scores,
    confusion_matrix,
    sliding_scores,
)

MINIATURE = Path(__file__).parent / "recipes" / "semantic_miniature.yaml"
HEADS = {"mask2former": Mask2FormerForUniversalSegmentation, "upernet": UperNetForSemanticSegmentation}
SHOWN = 4  # images in a picture


@dataclass(frozen=True)
class Recipe(EncoderOptions, CropOptions, LabelOptions):
    # What the shared parts ask of a recipe and images in folders do not have.
    shards: ClassVar[list[str]] = []
    epoch_images: ClassVar[int | None] = None

    output_dir: str = field(
        default="runs/semantic", metadata={"help": "checkpoints, model, metrics, curves and pictures"}
    )
    evaluate: str | None = field(
        default=None, metadata={"help": "only print how good this model of an earlier run is on the images to test"}
    )
    # Encoder.
    window_size: int = field(
        default=0, metadata={"help": "side in patches of the windows that most layers attend within; 0: everywhere"}
    )
    # Head.
    head: str = field(default="mask2former", metadata={"help": "what segments: mask2former or upernet"})
    width: int = field(default=256, metadata={"help": "its channels, and the feature pyramid's; a multiple of 32"})
    num_queries: int = field(default=100, metadata={"help": "masks that Mask2Former makes of an image"})
    pixel_decoder_layers: int = field(default=6, metadata={"help": "Mask2Former's layers over the pyramid"})
    decoder_layers: int = field(default=9, metadata={"help": "Mask2Former's layers over the queries"})
    num_points: int = field(default=12544, metadata={"help": "pixels at which its loss compares two masks"})
    # Optimisation.
    steps: int = field(default=160000, metadata={"help": "optimiser steps"})
    warmup_steps: int = field(default=0, metadata={"help": "linear warm-up"})
    schedule_power: float = field(default=0.9, metadata={"help": "then the rate falls as this power of what is left"})
    global_batch_size: int = field(default=16, metadata={"help": "images a step, over all processes"})
    batch_size: int | None = field(
        default=None,
        metadata={"help": "images at a time and process (all by default); gradients are accumulated"},
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "its peak"})
    encoder_rate: float = field(default=0.1, metadata={"help": "the encoder's learning rate as a share of it"})
    layer_decay: float = field(default=1.0, metadata={"help": "and each layer's as a share of the next one's"})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW's"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    ema_decay: float = field(
        default=0.0, metadata={"help": "the saved model averages the weights' past; 0: it does not"}
    )
    seed: int = field(default=0, metadata={"help": "of everything random"})
    # Evaluation.
    evaluation: str = field(
        default="whole", metadata={"help": "images are looked at whole, or by windows of --size: whole or slide"}
    )
    test_steps: int = field(default=5000, metadata={"help": "an evaluation every so many steps, and at the end"})
    # Output.
    num_workers: int = field(default=2, metadata={"help": "processes that read images"})
    trackers: list[str] = field(default_factory=list, metadata={"help": "tensorboard, trackio, or both"})
    save_steps: int = field(default=1000, metadata={"help": "a checkpoint every so many steps"})
    log_steps: int = field(default=20, metadata={"help": "a point of the curve every so many steps"})
    picture_steps: int = field(default=1000, metadata={"help": "a picture every so many steps"})


POSITIVE = ("size", "min_scale", "num_queries", "pixel_decoder_layers", "decoder_layers", "num_points", "width")
POSITIVE += ("steps", "schedule_power", "global_batch_size", "batch_size", "test_steps", "save_steps", "log_steps")
POSITIVE += ("picture_steps", "learning_rate", "layer_decay", "max_grad_norm")
NOT_NEGATIVE = ("encoder_rate", "warmup_steps", "window_size", "num_workers", "seed")
BELOW_ONE = ("color_jitter", "drop_path", "ema_decay")


def check(recipe: Recipe) -> None:
    check_ranges(recipe, POSITIVE, NOT_NEGATIVE, below_one=BELOW_ONE)
    for name in ("size", "width"):
        if getattr(recipe, name) % 32:
            raise ValueError(f"--{name} {getattr(recipe, name)} must be a multiple of 32.")
    if recipe.max_scale < recipe.min_scale:
        raise ValueError(f"--max_scale {recipe.max_scale} must not be less than --min_scale {recipe.min_scale}.")
    if recipe.warmup_steps >= recipe.steps:
        raise ValueError(f"--warmup_steps {recipe.warmup_steps} must be less than --steps {recipe.steps}.")
    if recipe.head not in HEADS:
        raise ValueError(f"--head {recipe.head} is not known; choose mask2former or upernet.")
    if recipe.evaluation not in ("whole", "slide"):
        raise ValueError(f"--evaluation {recipe.evaluation} is not known; choose whole or slide.")


def build_backbone(recipe: Recipe) -> EfficientSamBackbone:
    """The encoder under a new feature pyramid; ValueError if it cannot be loaded, or weights of it are missing."""
    options = {
        "window_size": recipe.window_size,
        "drop_path_rate": recipe.drop_path,
        "image_size": recipe.size,
        "pyramid_strides": [4, 8, 16, 32],
        "pyramid_channels": recipe.width,
    }
    if recipe.encoder is not None:
        return load_around_encoder(EfficientSamBackbone, recipe.encoder, **options)[0]
    options |= {name: getattr(recipe, name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")}
    return EfficientSamBackbone(EfficientSamBackboneConfig(pretrain_image_size=recipe.size, **options))


def build_model(recipe: Recipe, classes: list[str]) -> PreTrainedModel:
    set_seed(recipe.seed)  # the same start on every process, whatever was loaded before
    backbone = build_backbone(recipe)
    options = {
        "backbone_config": backbone.config,
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
    }
    if recipe.head == "upernet":
        # Without the second classifier on the stride-16 map, which in ResNets speeds up the first layers.
        config = UperNetConfig(hidden_size=recipe.width, use_auxiliary_head=False, **options)
        model = UperNetForSemanticSegmentation(config)
        model.backbone.load_state_dict(backbone.state_dict())
        return model.train()
    config = Mask2FormerConfig(
        feature_size=recipe.width,
        mask_feature_size=recipe.width,
        hidden_dim=recipe.width,
        num_attention_heads=recipe.width // 32,
        encoder_layers=recipe.pixel_decoder_layers,
        encoder_feedforward_dim=4 * recipe.width,
        decoder_layers=recipe.decoder_layers + 1,  # transformers counts the masks before the first layer
        dim_feedforward=8 * recipe.width,
        num_queries=recipe.num_queries,
        train_num_points=recipe.num_points,
        **options,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    model.model.pixel_level_module.encoder.load_state_dict(backbone.state_dict())
    return model.train()


def build_processor(recipe: Recipe, model: PreTrainedModel) -> Mask2FormerImageProcessorPil:
    """Resizes the shorter side to `--size`, and both to multiples of 32."""
    size = {"shortest_edge": recipe.size, "longest_edge": 4 * recipe.size}
    return Mask2FormerImageProcessorPil(
        size=size, size_divisor=32, ignore_index=NO_CLASS, num_labels=model.config.num_labels
    )


def learning_rate_share(name: str, num_layers: int, recipe: Recipe) -> float:
    """Of a parameter: less than 1 in the encoder, if the recipe says so; the pyramid is new and learns as the head."""
    share = layer_decay(name, num_layers, recipe.layer_decay)
    return share * recipe.encoder_rate if "vision_encoder." in name else share


def predict(model: PreTrainedModel, pixel_values: torch.Tensor, size: tuple[int, int], recipe: Recipe) -> torch.Tensor:
    """The likeliest class of each pixel of one image: `[1, 3, h, w]` -> int64 `[*size]`."""
    if recipe.evaluation == "slide":
        return sliding_scores(model, pixel_values, size, recipe.size)[0].argmax(0)
    return class_scores(model, pixel_values, size)[0].argmax(0)


@torch.no_grad()
def measure(model: PreTrainedModel, source: Source, processor, recipe: Recipe, accelerator: Accelerator) -> dict:
    """`mean_iou`, `pixel_accuracy`, the number of `images` and `class_iou` by name, on every process. Each image is
    looked at by itself, so the counts are the same however many processes share them."""
    own = range(accelerator.process_index, len(source), accelerator.num_processes)
    images = Subset(EvaluationImages(source, processor), own)
    num_classes, training = len(source.classes), model.training
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=accelerator.device)
    model.eval()
    for pixel_values, labels in DataLoader(images, batch_size=None, num_workers=recipe.num_workers):
        with accelerator.autocast():
            predicted = predict(model, pixel_values.to(accelerator.device), labels.shape, recipe)
        counts += confusion_matrix(predicted, labels.to(accelerator.device), num_classes)
    model.train(training)
    scores = MeanIoU(keep_in_memory=True).compute(confusions=gather_object([counts.tolist()]))
    class_iou = dict(zip(source.classes, scores.pop("class_iou"), strict=True))
    return {**scores, "images": len(source), "class_iou": class_iou}


def evaluate_saved(recipe: Recipe) -> None:
    """Prints what the run that saved the model has written into its metrics."""
    accelerator, source = Accelerator(), open_source(recipe, test=True)
    try:
        head = AutoConfig.from_pretrained(recipe.evaluate).model_type
    except (OSError, ValueError):
        head = None
    if head not in HEADS:
        raise ValueError(
            f"{recipe.evaluate} holds no result of finetune_semantic.py; give the folder OUTPUT_DIR/model."
        )
    model = HEADS[head].from_pretrained(recipe.evaluate, dtype=torch.float32)
    if list(model.config.id2label.values()) != source.classes:
        raise ValueError(f"The classes of the images to test are not those of {recipe.evaluate}; choose others.")
    processor = AutoImageProcessor.from_pretrained(recipe.evaluate, backend="pil")
    recipe = dataclasses.replace(recipe, size=processor.size.shortest_edge)
    scores = measure(model.to(accelerator.device), source, processor, recipe, accelerator)
    scores |= {f"IoU of {name}": iou for name, iou in scores.pop("class_iou").items() if iou is not None}
    accelerator.print("\n".join(f"{name}: {value:.6g}" for name, value in scores.items()))
    accelerator.end_training()


def write_metrics(recipe: Recipe, scores: dict, step: int) -> None:
    report = {**scores, "step": step, "recipe": dataclasses.asdict(recipe)}
    libraries = ("accelerate", "evaluate", "scipy", "numpy", "pillow")
    write_with_versions(Path(recipe.output_dir) / "metrics.json", report, libraries)


@torch.no_grad()
def draw(model: PreTrainedModel, source: Source, processor, recipe: Recipe) -> Image.Image:
    """Some of the images to test on, their classes, and what the model takes them for, side by side."""
    columns = {"images": [], "their classes": [], "predicted": []}
    model.eval()
    for index in range(0, len(source), max(1, len(source) // SHOWN))[:SHOWN]:  # neighbours may be of one film
        _, image, labels = source[index]
        pixel_values = processor(image, return_tensors="pt")["pixel_values"].to(model.device)
        predicted = predict(model, pixel_values, labels.shape, recipe)
        columns["images"].append(image)
        columns["their classes"].append(draw_classes(image, labels))
        columns["predicted"].append(draw_classes(image, predicted.cpu()))
    model.train()
    width, height = columns["images"][0].size
    size = (256 * width // max(width, height), 256 * height // max(width, height))
    return picture_table({name: [picture.resize(size) for picture in cells] for name, cells in columns.items()})


def main() -> None:
    recipe = parse_recipe(Recipe, __doc__, None if sys.argv[1:] else ["--config", str(MINIATURE)])
    try:
        check(recipe)
        if recipe.evaluate is not None:
            return evaluate_saved(recipe)
        accelerator = start_accelerator(recipe)
        if accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("A model this small gains nothing from FSDP; launch with training/accelerate/ddp.yaml.")
        source, test_source = open_source(recipe, test=False), open_source(recipe, test=True)
        if source.classes != test_source.classes:
            raise ValueError("The classes of the images to test are not those of the images to train on.")
        data = SemanticCrops(source, recipe, recipe.seed)
        loader, epoch_steps = epoch_loader(accelerator, data, recipe)
        model = build_model(recipe, source.classes)
        images = recipe.global_batch_size // accelerator.gradient_accumulation_steps
        if recipe.head == "upernet" and images == 1:
            raise ValueError("UperNet normalises over several images; raise --batch_size, or --global_batch_size.")
        if recipe.head == "upernet" and accelerator.num_processes > 1:
            if accelerator.device.type != "cuda":
                raise ValueError("UperNet normalises over all images of a step, which processes share on GPUs alone.")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if accelerator.is_main_process:
            check_same_run(recipe, accelerator.num_processes)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"finetune_semantic: {last_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    num_layers = model.config.backbone_config.num_hidden_layers
    share = partial(learning_rate_share, num_layers=num_layers, recipe=recipe)
    groups = parameter_groups(model, recipe.learning_rate, recipe.weight_decay, share)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    schedule = get_polynomial_decay_schedule_with_warmup(
        optimizer, recipe.warmup_steps, recipe.steps, lr_end=0.0, power=recipe.schedule_power
    )
    optimization = Optimization(
        accelerator, model, optimizer, schedule, recipe.max_grad_norm, ema_decay=recipe.ema_decay
    )
    criterion = PixelLoss() if recipe.head == "upernet" else MaskLoss(optimization.current)
    model, processor = optimization.model, build_processor(recipe, optimization.current)

    output = Path(recipe.output_dir)
    log = Log(accelerator, output, recipe.steps, recipe.log_steps)
    checkpoints = Checkpoints(accelerator, output / "checkpoints")
    step = checkpoints.resume()
    if step == recipe.steps:
        accelerator.print(f"{output} holds a finished run; choose another --output_dir for a new one, or delete it.")
    log.start(step, "semantic", dataclasses.asdict(recipe))
    if accelerator.is_main_process:
        evaluations = Curve(output / "evaluation.jsonl", step)
    for batches in step_batches(accelerator, loader, data, step, recipe.steps, epoch_steps):
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
                optimization.add(loss)
            losses.append(loss.detach())
        step, loss = step + 1, torch.stack(losses).mean()
        rate = optimization.finish(step, loss, [key for batch in batches for key in batch["key"]])
        log.add(step, images=recipe.global_batch_size, loss=loss, lr=rate)
        if step % recipe.picture_steps == 0 or step == recipe.steps:
            log.picture(step, draw(optimization.current, test_source, processor, recipe), "classes")
        if step % recipe.test_steps == 0 or step == recipe.steps:
            scores = measure(optimization.result, test_source, processor, recipe, accelerator)
            if accelerator.is_main_process:
                means = {name: scores[name] for name in ("mean_iou", "pixel_accuracy")}
                evaluations.add(step=step, **means)
                accelerator.log(means, step)
                write_metrics(recipe, scores, step)
        if step % recipe.save_steps == 0 or step == recipe.steps:
            # The model before the checkpoint: a finished run has its model.
            if accelerator.is_main_process:
                with replaced_folder(output / "model") as folder:
                    optimization.result.save_pretrained(folder)
                    processor.save_pretrained(folder)
                evaluations.plot(["mean_iou", "pixel_accuracy"])
            log.plot()
            checkpoints.save(step)
    log.close()
    # The model must not outlive the processes' group: freeing both at once can hang (pytorch/pytorch issue 56297).
    del model, optimization, criterion
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    run_script("finetune_semantic", main)
