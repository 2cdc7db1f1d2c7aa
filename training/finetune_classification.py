"""Fine-tunes EfficientSAM's vision encoder for image classification: image folders, a `datasets` dataset, shards.

    accelerate launch --num_processes 1 training/finetune_classification.py   # a miniature: made-up images, no network
    accelerate launch training/finetune_classification.py --config training/recipes/classification_ti_imagenet.yaml \
        --encoder runs/sami/model --train imagenet/train --test imagenet/val --output_dir runs/imagenet
    accelerate launch training/finetune_classification.py --encoder runs/sami/model --linear_probe true \
        --dataset my/dataset --test_split validation --output_dir runs/probe
    accelerate launch training/finetune_classification.py --evaluate runs/imagenet/model --test imagenet/val

A run that is started again in the same `--output_dir` goes on where it stopped. The result is `OUTPUT_DIR/model`, an
`EfficientSamForImageClassification` with its image processor, for `pipeline("image-classification")`; top-1 and top-5
are in `OUTPUT_DIR/metrics.json`, the curves and pictures beside it. Several GPUs and machines:
training/accelerate/ddp.yaml and multi_node.yaml.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object, send_to_device, set_seed
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, BitImageProcessorPil, get_cosine_schedule_with_warmup
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hf_efficientsam import EfficientSamForImageClassification, EfficientSamVisionConfig
from hf_efficientsam.inference.drawing import picture_table
from hf_efficientsam.training.classification.mixup import TopAccuracy, mix_neighbors
from hf_efficientsam.training.data.classification import (
    ClassOptions,
    ClassViews,
    EvaluationBatches,
    Source,
    StreamedClassViews,
    ViewOptions,
    open_test,
    open_train,
)
from hf_efficientsam.training.data.images import normalize, to_image
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

MINIATURE = Path(__file__).parent / "recipes" / "classification_miniature.yaml"
SHOWN = 6  # images in a picture


@dataclass(frozen=True)
class Recipe(EncoderOptions, ViewOptions, ClassOptions):
    output_dir: str = field(
        default="runs/classification", metadata={"help": "checkpoints, model, metrics, curves and pictures"}
    )
    evaluate: str | None = field(
        default=None, metadata={"help": "only print how good this model of an earlier run is on the images to test"}
    )
    # Model.
    pooling: str = field(default="mean", metadata={"help": "what is classified: mean (over patches) or cls (a token)"})
    linear_probe: bool = field(default=False, metadata={"help": "train the last norm and the classifier alone"})
    # Data.
    epoch_images: int | None = field(
        default=None, metadata={"help": "images that count as an epoch; needed for shards, else all of them"}
    )
    shuffle_buffer: int = field(default=2000, metadata={"help": "images that a worker mixes while streaming"})
    num_workers: int = field(default=2, metadata={"help": "processes that read images"})
    # Optimisation.
    label_smoothing: float = field(default=0.1, metadata={"help": "share of the target that all classes divide"})
    epochs: float = field(default=100, metadata={"help": "times over the data"})
    warmup_epochs: float = field(default=5, metadata={"help": "of linear warm-up; then a cosine to zero"})
    global_batch_size: int = field(default=1024, metadata={"help": "images a step, over all processes"})
    batch_size: int | None = field(
        default=None,
        metadata={"help": "images at a time and process (all by default); gradients are accumulated"},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "its peak"})
    layer_decay: float = field(default=1.0, metadata={"help": "each layer's rate as a share of the next one's"})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW's"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    ema_decay: float = field(
        default=0.0, metadata={"help": "the saved model averages the weights' past; 0: it does not"}
    )
    seed: int = field(default=0, metadata={"help": "of everything random"})
    # Evaluation.
    crop_ratio: float = field(
        default=0.875, metadata={"help": "side of the square in the middle that is looked at, of the shorter side"}
    )
    test_batch_size: int = field(default=64, metadata={"help": "images at a time and process"})
    test_steps: int = field(default=5000, metadata={"help": "an evaluation every so many steps, and at the end"})
    # Output.
    trackers: list[str] = field(default_factory=list, metadata={"help": "tensorboard, trackio, or both"})
    save_steps: int = field(default=1000, metadata={"help": "a checkpoint every so many steps"})
    log_steps: int = field(default=20, metadata={"help": "a point of the curve every so many steps"})
    picture_steps: int = field(default=1000, metadata={"help": "a picture every so many steps"})


POSITIVE = ("size", "crop_scale", "crop_ratio", "epochs", "epoch_images", "global_batch_size", "batch_size")
POSITIVE += ("test_batch_size", "test_steps", "save_steps", "log_steps", "picture_steps", "shuffle_buffer")
POSITIVE += ("learning_rate", "layer_decay", "max_grad_norm")
NOT_NEGATIVE = ("rand_augment", "mixup", "cutmix", "num_workers", "seed")
SHARES = ("crop_scale", "crop_ratio", "erasing")
BELOW_ONE = ("drop_path", "label_smoothing", "ema_decay")


def check(recipe: Recipe) -> None:
    check_ranges(recipe, POSITIVE, NOT_NEGATIVE, SHARES, BELOW_ONE)
    if not 1 <= recipe.rand_augment_magnitude <= 29:
        raise ValueError(f"--rand_augment_magnitude {recipe.rand_augment_magnitude} must be from 1 to 29.")
    if recipe.size % 16:
        raise ValueError(f"--size {recipe.size} must be a multiple of the patch's 16 pixels.")
    if not 0 <= recipe.warmup_epochs < recipe.epochs:
        raise ValueError(f"--warmup_epochs {recipe.warmup_epochs} must be less than --epochs {recipe.epochs}.")
    if recipe.pooling not in ("mean", "cls"):
        raise ValueError(f"--pooling {recipe.pooling} is not known; choose mean or cls.")
    if recipe.linear_probe and recipe.drop_path:
        raise ValueError("--linear_probe leaves the encoder as it is; leave --drop_path out.")


def build_model(recipe: Recipe, classes: list[str]) -> EfficientSamForImageClassification:
    options = {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
        "classifier_pooling": recipe.pooling,
        "drop_path_rate": recipe.drop_path,
        "image_size": recipe.size,
    }
    set_seed(recipe.seed)  # the same start on every process, whatever was loaded before
    if recipe.encoder is None:
        config = EfficientSamVisionConfig(
            hidden_size=recipe.hidden_size,
            num_attention_heads=recipe.num_attention_heads,
            num_hidden_layers=recipe.num_hidden_layers,
            pretrain_image_size=recipe.size,
            **options,
        )
        model = EfficientSamForImageClassification(config)
    else:
        model, _ = load_around_encoder(EfficientSamForImageClassification, recipe.encoder, **options)
    model.vision_encoder.requires_grad_(not recipe.linear_probe)
    return model.train()


def build_data(recipe: Recipe, source: Source, accelerator: Accelerator) -> ClassViews | StreamedClassViews:
    if not recipe.shards:
        return ClassViews(source, recipe, recipe.seed)
    processes = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    return StreamedClassViews(source, recipe, recipe.seed, shuffle_buffer=recipe.shuffle_buffer, **processes)


def build_processor(recipe: Recipe) -> BitImageProcessorPil:
    """Resizes the shorter side and cuts the middle out, so that an image keeps its proportions."""
    return BitImageProcessorPil(
        size={"shortest_edge": round(recipe.size / recipe.crop_ratio)},
        crop_size={"height": recipe.size, "width": recipe.size},
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )


def seed_drop_path(recipe: Recipe, step: int, batch: int, process: int) -> None:
    """A layer draws anew which images skip it: by this alone, so that a resumed run draws what it would have drawn."""
    torch.manual_seed(int(np.random.SeedSequence([recipe.seed, step, batch, process]).generate_state(1)[0]))


@torch.no_grad()
def measure(
    model: EfficientSamForImageClassification, source: Source, processor, recipe: Recipe, accelerator: Accelerator
) -> dict[str, float]:
    """`top1`, `top5` and the number of `images`, on every process."""
    processes = (accelerator.process_index, accelerator.num_processes)
    batches = EvaluationBatches(source, processor, recipe.test_batch_size, *processes)
    ranked, references = [], []
    training = model.training
    model.eval()
    for pixel_values, labels in DataLoader(batches, batch_size=None, num_workers=recipe.num_workers):
        with accelerator.autocast():
            logits = model(pixel_values.to(accelerator.device)).logits
        ranked += logits.topk(min(5, logits.shape[1])).indices.tolist()
        references += labels.tolist()
    model.train(training)
    ranked, references = gather_object(ranked), gather_object(references)
    if not references:
        raise ValueError("There is no image to evaluate; check --test, --test_split or --test_shards.")
    scores = TopAccuracy(keep_in_memory=True).compute(predictions=ranked, references=references)
    return {**scores, "images": len(references)}


def evaluate_saved(recipe: Recipe) -> None:
    """Prints what the run that saved the model has written into its metrics."""
    accelerator, source = Accelerator(), open_test(recipe)
    model, new = load_around_encoder(EfficientSamForImageClassification, recipe.evaluate)
    if new or list(model.config.id2label.values()) != list(source.classes):
        raise ValueError(f"{recipe.evaluate} is no classifier of the classes to test; choose another.")
    processor = AutoImageProcessor.from_pretrained(recipe.evaluate, backend="pil")
    scores = measure(model.to(accelerator.device), source, processor, recipe, accelerator)
    accelerator.print("\n".join(f"{name}: {value:.6g}" for name, value in scores.items()))
    accelerator.end_training()


def write_metrics(recipe: Recipe, scores: dict[str, float], step: int) -> None:
    report = {**scores, "step": step, "recipe": dataclasses.asdict(recipe)}
    libraries = ("accelerate", "evaluate", "kornia", "numpy", "pillow")
    write_with_versions(Path(recipe.output_dir) / "metrics.json", report, libraries)


@torch.no_grad()
def draw(model: EfficientSamForImageClassification, pixel_values: torch.Tensor, targets: torch.Tensor) -> Image.Image:
    """The first images as the model sees them, their classes by share, and what it says of them."""
    model.eval()
    logits = model(pixel_values[:SHOWN]).logits
    model.train()
    columns = {"images": [], "their classes": [], "said to be": []}
    for pixels, *shares in zip(pixel_values, targets.cpu(), logits.float().softmax(1).cpu(), strict=False):
        columns["images"].append(to_image(pixels).resize((192, 192)))
        for name, share in zip(("their classes", "said to be"), shares, strict=True):
            likeliest = [(model.config.id2label[i], share[i]) for i in share.topk(2).indices.tolist()]
            cell = Image.new("RGB", (192, 192), "white")
            words = "\n".join(f"{label[:20]} {part:.0%}" for label, part in likeliest if part >= 0.005)
            ImageDraw.Draw(cell).text((8, 80), words, font=ImageFont.load_default(size=14), fill="black")
            columns[name].append(cell)
    return picture_table(columns)


def main() -> None:
    recipe = parse_recipe(Recipe, __doc__, None if sys.argv[1:] else ["--config", str(MINIATURE)])
    try:
        check(recipe)
        if recipe.evaluate is not None:
            return evaluate_saved(recipe)
        accelerator = start_accelerator(recipe)
        if accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("A model this small gains nothing from FSDP; launch with training/accelerate/ddp.yaml.")
        source, test_source = open_train(recipe), open_test(recipe)
        if list(source.classes) != list(test_source.classes):
            raise ValueError("The classes of the images to test are not those of the images to train on.")
        data = build_data(recipe, source, accelerator)
        loader, epoch_steps = epoch_loader(accelerator, data, recipe)
        mixes = bool(recipe.mixup or recipe.cutmix)
        images = recipe.global_batch_size // accelerator.gradient_accumulation_steps // accelerator.num_processes
        if mixes and images % 2:
            raise ValueError(
                f"Pairs of images are mixed; {images} at a time must be even (--batch_size), or --mixup 0 --cutmix 0."
            )
        steps = round(recipe.epochs * epoch_steps)
        if steps == 0:
            raise ValueError(f"--epochs {recipe.epochs} is less than one step of {epoch_steps} an epoch; give more.")
        model = build_model(recipe, source.classes)
        if accelerator.is_main_process:
            check_same_run(recipe, accelerator.num_processes)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"finetune_classification: {last_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    share = partial(layer_decay, num_layers=model.config.num_hidden_layers, decay=recipe.layer_decay)
    groups = parameter_groups(model, recipe.learning_rate, recipe.weight_decay, share)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    schedule = get_cosine_schedule_with_warmup(optimizer, round(recipe.warmup_epochs * epoch_steps), steps)
    optimization = Optimization(
        accelerator, model, optimizer, schedule, recipe.max_grad_norm, ema_decay=recipe.ema_decay
    )
    model, num_classes, processor = optimization.model, len(source.classes), build_processor(recipe)

    output = Path(recipe.output_dir)
    log = Log(accelerator, output, steps, recipe.log_steps)
    checkpoints = Checkpoints(accelerator, output / "checkpoints")
    step = checkpoints.resume()
    if step == steps:
        accelerator.print(f"{output} holds a finished run; choose another --output_dir for a new one, or delete it.")
    log.start(step, "classification", dataclasses.asdict(recipe))
    if accelerator.is_main_process:
        evaluations = Curve(output / "evaluation.jsonl", step)
    for batches in step_batches(accelerator, loader, data, step, steps, epoch_steps):
        losses, keys = [], []
        for number, batch in enumerate(batches):
            seed_drop_path(recipe, step, number, accelerator.process_index)
            batch = send_to_device(batch, accelerator.device)
            pixel_values, targets = normalize(batch["pixel_values"]), F.one_hot(batch["labels"], num_classes).float()
            if mixes:
                pixel_values, targets = mix_neighbors(pixel_values, targets, batch["share"], batch["box"])
            with accelerator.accumulate(model):
                logits = model(pixel_values).logits.float()
                loss = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
                optimization.add(loss)
            losses.append(loss.detach())
            keys += batch["key"]
        step, loss = step + 1, torch.stack(losses).mean()
        rate = optimization.finish(step, loss, keys)
        log.add(step, images=recipe.global_batch_size, loss=loss, lr=rate)
        if step % recipe.picture_steps == 0 or step == steps:
            log.picture(step, draw(optimization.current, pixel_values, targets), "classes")
        if step % recipe.test_steps == 0 or step == steps:
            scores = measure(optimization.result, test_source, processor, recipe, accelerator)
            if accelerator.is_main_process:
                evaluations.add(step=step, **scores)
                accelerator.log({name: scores[name] for name in ("top1", "top5")}, step)
                write_metrics(recipe, scores, step)
        if step % recipe.save_steps == 0 or step == steps:
            # The model before the checkpoint: a finished run has its model.
            if accelerator.is_main_process:
                with replaced_folder(output / "model") as folder:
                    optimization.result.save_pretrained(folder)
                    processor.save_pretrained(folder)
                evaluations.plot(["top1", "top5"])
            log.plot()
            checkpoints.save(step)
    log.close()
    # The model must not outlive the processes' group: freeing both at once can hang (pytorch/pytorch issue 56297).
    del model, optimization
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    run_script("finetune_classification", main)
