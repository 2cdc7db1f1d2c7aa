"""Trains the head that finds salient objects in the image embeddings of a frozen EfficientSAM.

    accelerate launch --num_processes 1 training/train_saliency.py   # a miniature: example images, no network
    accelerate launch training/train_saliency.py --config training/recipes/saliency.yaml \
        --train ../shared/data/saliency/train --val ../shared/data/saliency/val --output_dir runs/saliency

Data are folders with `images/` and, of the same names, `masks/`; or COCO-style json files, whose objects are then what
is salient. Each image is encoded once, and its embedding kept in memory. A run that is started again in the same
`--output_dir` goes on where it stopped. The result is `OUTPUT_DIR/model`, which `from_pretrained` takes and which
belongs into the folder `saliency` of the model's checkpoint; the numbers on `--val` are in `OUTPUT_DIR/metrics.json`,
the curves and pictures beside it. Several GPUs and machines: training/accelerate/ddp.yaml and multi_node.yaml.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object, send_to_device, set_seed
from PIL import Image
from torch.utils.data import ConcatDataset
from transformers import get_scheduler

from hf_efficientsam import (
    EfficientSamImageProcessor,
    EfficientSamProcessor,
    EfficientSamSaliencyConfig,
    EfficientSamSaliencyHead,
)
from hf_efficientsam.inference.drawing import picture_table
from hf_efficientsam.inference.loading import find_checkpoint, load_model
from hf_efficientsam.training.data.saliency import open_saliency
from hf_efficientsam.training.engine.runtime import (
    Checkpoints,
    Curve,
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
    write_with_versions,
)
from hf_efficientsam.training.saliency.encoded_images import (
    EncodedImages,
    MirroredEmbeddings,
    mean_scores,
    predict_map,
    score_map,
    whiten,
)

MINIATURE = Path(__file__).parent / "recipes" / "saliency_miniature.yaml"
SHOWN = 4  # images in a picture
WHITENED = 100  # images whose embeddings a new head starts from


@dataclass(frozen=True)
class Recipe:
    # What the shared parts ask of a recipe and this script leaves no choice about.
    shards: ClassVar[list[str]] = []
    epoch_images: ClassVar[int | None] = None
    num_workers: ClassVar[int] = 0  # images are read where they are encoded

    output_dir: str = field(
        default="runs/saliency", metadata={"help": "checkpoints, model, metrics, curves and pictures"}
    )
    # Data.
    train: list[str] = field(default_factory=list, metadata={"help": "folders with images/ and masks/, or COCO jsons"})
    val: str | None = field(default=None, metadata={"help": "such a folder or json to measure on"})
    model: str = field(default="bundled", metadata={"help": "whose encoder it is: path or Hub name, or: bundled"})
    image_size: int | None = field(
        default=None, metadata={"help": "images are squashed to this side; by default the model's"}
    )
    # Head.
    hidden_size: int = field(default=96, metadata={"help": "its width"})
    num_hidden_layers: int = field(default=2, metadata={"help": "its transformer layers"})
    num_attention_heads: int = field(default=4, metadata={"help": "their attention heads"})
    dropout: float = field(default=0.1, metadata={"help": "of the narrowed embeddings"})
    drop_path: float = field(default=0.1, metadata={"help": "share of the images that skip its last layer"})
    # Optimisation.
    steps: int = field(default=2000, metadata={"help": "optimiser steps"})
    warmup_steps: int = field(default=100, metadata={"help": "linear warm-up; at most a third of all steps"})
    global_batch_size: int = field(default=8, metadata={"help": "images a step, over all processes"})
    batch_size: int | None = field(
        default=None,
        metadata={"help": "images at a time and process (all by default); gradients are accumulated"},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "its peak; a cosine takes it to zero"})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW's"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    ema_decay: float = field(
        default=0.0, metadata={"help": "the saved head averages the weights' past; 0: it does not"}
    )
    seed: int = field(default=0, metadata={"help": "of everything random"})
    # Output.
    trackers: list[str] = field(default_factory=list, metadata={"help": "tensorboard, trackio, or both"})
    test_steps: int = field(default=500, metadata={"help": "an evaluation every so many steps, and at the end"})
    save_steps: int = field(default=200, metadata={"help": "a checkpoint every so many steps"})
    log_steps: int = field(default=20, metadata={"help": "a point of the curve every so many steps"})
    picture_steps: int = field(default=500, metadata={"help": "a picture every so many steps"})


POSITIVE = ("image_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "steps")
POSITIVE += ("global_batch_size", "batch_size", "learning_rate", "max_grad_norm", "test_steps", "save_steps")
POSITIVE += ("log_steps", "picture_steps")
NOT_NEGATIVE = ("warmup_steps", "weight_decay", "seed")
BELOW_ONE = ("dropout", "drop_path", "ema_decay")


def check(recipe: Recipe) -> None:
    check_ranges(recipe, POSITIVE, NOT_NEGATIVE, below_one=BELOW_ONE)
    if not recipe.train:
        raise ValueError("Give --train folders with images/ and masks/, or COCO-style json files.")
    if recipe.image_size is not None and recipe.image_size % 16:
        raise ValueError(f"--image_size {recipe.image_size} must be a multiple of 16.")


def build_head(recipe: Recipe, input_channels: int) -> EfficientSamSaliencyHead:
    if recipe.hidden_size > input_channels:
        raise ValueError(
            f"--hidden_size {recipe.hidden_size} must be at most the encoder's {input_channels} channels."
        )
    set_seed(recipe.seed)  # the same start on every process, whatever was loaded before
    config = EfficientSamSaliencyConfig(
        input_channels=input_channels,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        hidden_dropout=recipe.dropout,
        drop_path_rate=recipe.drop_path,
    )
    return EfficientSamSaliencyHead(config).train()


def measure(head: EfficientSamSaliencyHead, images: EncodedImages, accelerator: Accelerator) -> dict:
    """See `mean_scores`; the same on every process, which share the images."""
    training = head.training
    head.eval()
    own = range(accelerator.process_index, len(images), accelerator.num_processes)
    scores = [score_map(predict_map(head, images.processor, images[i]), images[i]["truth"]) for i in own]
    head.train(training)
    return {**mean_scores(gather_object(scores)), "images": len(images)}


def draw(head: EfficientSamSaliencyHead, images: EncodedImages) -> Image.Image:
    """Some of the images to measure on, what is salient in them, and what the head takes for it, side by side."""
    columns = {"images": [], "what is salient": [], "found": []}
    head.eval()
    for index in range(0, len(images), max(1, len(images) // SHOWN))[:SHOWN]:
        found = predict_map(head, images.processor, images[index])
        columns["images"].append(images.source[index].image)
        columns["what is salient"].append(Image.fromarray(255 * images[index]["truth"].astype(np.uint8)))
        columns["found"].append(Image.fromarray((255 * found).astype(np.uint8)))
    head.train()
    width, height = columns["images"][0].size
    size = (256 * width // max(width, height), 256 * height // max(width, height))
    return picture_table({name: [picture.resize(size) for picture in cells] for name, cells in columns.items()})


def write_metrics(recipe: Recipe, scores: dict, step: int) -> None:
    report = {**scores, "step": step, "recipe": dataclasses.asdict(recipe)}
    write_with_versions(Path(recipe.output_dir) / "metrics.json", report, ("accelerate", "numpy", "pillow"))


def main() -> None:
    recipe = parse_recipe(Recipe, __doc__, None if sys.argv[1:] else ["--config", str(MINIATURE)])
    try:
        check(recipe)
        accelerator = start_accelerator(recipe)
        if accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("A model this small gains nothing from FSDP; launch with training/accelerate/ddp.yaml.")
        model, _ = load_model(find_checkpoint(None if recipe.model == "bundled" else recipe.model))
        model, vision = model.to(accelerator.device), model.config.vision_config
        side = recipe.image_size or vision.image_size
        processor = EfficientSamProcessor(EfficientSamImageProcessor(size={"height": side, "width": side}))
        source = ConcatDataset([open_saliency(path) for path in recipe.train])
        data = MirroredEmbeddings(EncodedImages(model, processor, source), recipe.seed)
        loader, epoch_steps = epoch_loader(accelerator, data, recipe)
        images = None if recipe.val is None else EncodedImages(model, processor, open_saliency(recipe.val))
        head = build_head(recipe, vision.output_channels)
        if accelerator.is_main_process:
            check_same_run(recipe, accelerator.num_processes)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"train_saliency: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    output = Path(recipe.output_dir)
    checkpoints = Checkpoints(accelerator, output / "checkpoints")
    if not checkpoints.steps():
        some = range(0, len(data), max(1, len(data) // WHITENED))[:WHITENED]
        whiten(head, torch.stack([data.images[index]["image_embeddings"] for index in some]))
    groups = parameter_groups(head, recipe.learning_rate, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    schedule = get_scheduler("cosine", optimizer, min(recipe.warmup_steps, recipe.steps // 3), recipe.steps)
    optimization = Optimization(
        accelerator, head, optimizer, schedule, recipe.max_grad_norm, ema_decay=recipe.ema_decay
    )
    head = optimization.model

    log = Log(accelerator, output, recipe.steps, recipe.log_steps)
    step = checkpoints.resume()
    if step == recipe.steps:
        accelerator.print(f"{output} holds a finished run; choose another --output_dir for a new one, or delete it.")
    log.start(step, "saliency", dataclasses.asdict(recipe))
    if accelerator.is_main_process:
        evaluations = Curve(output / "evaluation.jsonl", step)
    for batches in step_batches(accelerator, loader, data, step, recipe.steps, epoch_steps):
        losses, keys = [], []
        for batch in batches:
            batch = send_to_device(batch, accelerator.device)
            torch.manual_seed(batch["seed"][0].item())  # of dropout: a resumed run draws what it would have drawn
            with accelerator.accumulate(head):
                loss = head(batch["image_embeddings"], batch["labels"]).loss
                optimization.add(loss)
            losses.append(loss.detach())
            keys += batch["key"]
        step, loss = step + 1, torch.stack(losses).mean()
        rate = optimization.finish(step, loss, keys)
        log.add(step, images=recipe.global_batch_size, loss=loss, lr=rate)
        if images is not None and (step % recipe.picture_steps == 0 or step == recipe.steps):
            log.picture(step, draw(optimization.result, images), "saliency")
        if images is not None and (step % recipe.test_steps == 0 or step == recipe.steps):
            scores = measure(optimization.result, images, accelerator)
            if accelerator.is_main_process:
                means = {name: scores[name] for name in ("iou", "mae", "max_f")}
                evaluations.add(step=step, **means)
                accelerator.log(means, step)
                write_metrics(recipe, scores, step)
        if step % recipe.save_steps == 0 or step == recipe.steps:
            # The model before the checkpoint: a finished run has its model.
            if accelerator.is_main_process:
                with replaced_folder(output / "model") as folder:
                    optimization.result.save_pretrained(folder)
                if evaluations.rows:
                    evaluations.plot(["iou", "mae", "max_f"])
            log.plot()
            checkpoints.save(step)
    log.close()
    # The model must not outlive the processes' group: freeing both at once can hang (pytorch/pytorch issue 56297).
    del head, optimization
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    run_script("train_saliency", main)
