"""Trains a detector with instance masks: torchvision's Mask R-CNN around EfficientSAM's encoder, on COCO-style json.

    pip install -e ".[train,detection]"                                         # torchvision is an extra
    accelerate launch --num_processes 1 training/finetune_detection.py   # a miniature: example images, no network
    accelerate launch training/finetune_detection.py --config training/recipes/detection_ti_coco.yaml \
        --train coco/instances_train2017.json --train_images coco/train2017 --val coco/instances_val2017.json \
        --val_images coco/val2017 --encoder runs/sami/model --output_dir runs/coco
    accelerate launch training/finetune_detection.py --evaluate runs/coco/model --val my/instances.json \
        --output_dir runs/mine
    python training/evaluate_masks.py --annotations coco/instances_val2017.json --images coco/val2017 \
        --detections runs/coco/detections.json                                  # EfficientSAM's masks on its boxes

A run that is started again in the same `--output_dir` goes on where it stopped. The result is `OUTPUT_DIR/model`: a
directory of `EfficientSamBackbone`, and with what lies beside its weights what `load_detector` of
hf_efficientsam.training.detection.mask_rcnn takes. AP of boxes and masks is in `OUTPUT_DIR/metrics.json`, the boxes
themselves in `detections.json`, the curves and pictures beside them. Several GPUs and machines:
training/accelerate/ddp.yaml and multi_node.yaml.
"""

import sys

try:  # first: a torchvision without its operators stops transformers, and with that all imports below
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    pass  # `check_torchvision` says so
except RuntimeError as error:
    print(
        f"finetune_detection: The torchvision here does not work with this torch ({error}); install the one that "
        "belongs to it, for a torch without CUDA from its own index.",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

import dataclasses
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object, send_to_device, set_seed
from PIL import Image
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from hf_efficientsam import EfficientSamBackbone, EfficientSamBackboneConfig
from hf_efficientsam.training.data.coco import CocoMasks, decode
from hf_efficientsam.training.data.images import to_image
from hf_efficientsam.training.detection.mask_rcnn import (
    PROTOCOL,
    STRIDES,
    DetectionViews,
    Detector,
    DetectorConfig,
    average_precision,
    boxes_alone,
    check_torchvision,
    draw_detections,
    load_detector,
    match_categories,
    results_of,
    save_detector,
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
    replace_text,
    replaced_folder,
    run_script,
    start_accelerator,
    step_batches,
    write_with_versions,
)
from hf_efficientsam.training.engine.warm_start import EncoderOptions, load_around_encoder
from hf_efficientsam.training.masks.coco_ap import Truth

MINIATURE = Path(__file__).parent / "recipes" / "detection_miniature.yaml"
SHOWN = 4  # images in a picture


@dataclass(frozen=True)
class Recipe(EncoderOptions):
    output_dir: str = field(
        default="runs/detection", metadata={"help": "checkpoints, model, metrics, detections, curves and pictures"}
    )
    evaluate: str | None = field(
        default=None, metadata={"help": "only measure this model of an earlier run on --val, into OUTPUT_DIR"}
    )
    # Data.
    train: str | None = field(default=None, metadata={"help": "COCO-style json with the objects to learn"})
    train_images: str | None = field(default=None, metadata={"help": "folder of its images; by default beside it"})
    val: str | None = field(default=None, metadata={"help": "COCO-style json to measure AP on; without it none is"})
    val_images: str | None = field(default=None, metadata={"help": "folder of its images; by default beside it"})
    val_limit: int | None = field(default=None, metadata={"help": "measure on its first so many images only"})
    epoch_images: int | None = field(default=None, metadata={"help": "images that count as an epoch, else all"})
    image_size: int = field(default=1024, metadata={"help": "side of the model input in pixels"})
    least_scale: float = field(
        default=0.1, metadata={"help": "large-scale jitter: smallest longer side of an image, as a share of it"}
    )
    greatest_scale: float = field(default=2.0, metadata={"help": "and the largest"})
    flip: bool = field(default=True, metadata={"help": "half of the images are mirrored"})
    num_workers: int = field(default=2, metadata={"help": "processes that read images"})
    shards: ClassVar[tuple] = ()  # nothing is streamed
    # Model.
    window_size: int = field(
        default=14, metadata={"help": "patches of the windows of all layers but four; 0: attention is global"}
    )
    pyramid_channels: int = field(default=256, metadata={"help": "width of the feature pyramid and of the heads"})
    anchor_scale: float = field(
        default=8.0, metadata={"help": "side of an anchor in strides of its level; lower it for small images"}
    )
    sampled_boxes: int = field(default=512, metadata={"help": "proposals of an image that the heads learn from"})
    min_score: float = field(default=0.05, metadata={"help": "detections of a lower score are left out"})
    freeze_encoder: bool = field(default=False, metadata={"help": "train the pyramid and the heads alone"})
    # Optimisation.
    epochs: float = field(default=100, metadata={"help": "times over the data"})
    warmup_epochs: float = field(default=10, metadata={"help": "of linear warm-up; then a cosine to zero"})
    global_batch_size: int = field(default=64, metadata={"help": "images a step, over all processes"})
    batch_size: int | None = field(
        default=None,
        metadata={"help": "images at a time and process (all by default); gradients are accumulated"},
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "its peak"})
    layer_decay: float = field(default=1.0, metadata={"help": "each layer's rate as a share of the next one's"})
    weight_decay: float = field(default=0.1, metadata={"help": "AdamW's"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    seed: int = field(default=0, metadata={"help": "of everything random"})
    # Evaluation.
    val_batch_size: int = field(default=4, metadata={"help": "images at a time and process"})
    val_steps: int = field(default=20000, metadata={"help": "an evaluation every so many steps, and at the end"})
    # Output.
    trackers: list[str] = field(default_factory=list, metadata={"help": "tensorboard, trackio, or both"})
    save_steps: int = field(default=1000, metadata={"help": "a checkpoint every so many steps"})
    log_steps: int = field(default=20, metadata={"help": "a point of the curve every so many steps"})
    picture_steps: int = field(default=1000, metadata={"help": "a picture every so many steps"})


POSITIVE = ("val_limit", "epoch_images", "image_size", "least_scale", "anchor_scale", "sampled_boxes", "epochs")
POSITIVE += ("global_batch_size", "batch_size", "val_batch_size", "val_steps", "save_steps", "log_steps")
POSITIVE += ("picture_steps", "pyramid_channels", "learning_rate", "layer_decay", "max_grad_norm")
NOT_NEGATIVE = ("window_size", "num_workers", "seed")
BELOW_ONE = ("drop_path", "min_score")


def check(recipe: Recipe) -> None:
    check_ranges(recipe, POSITIVE, NOT_NEGATIVE, below_one=BELOW_ONE)
    if recipe.image_size % STRIDES[-1]:
        raise ValueError(f"--image_size {recipe.image_size} must be a multiple of {STRIDES[-1]}, the coarsest stride.")
    if recipe.least_scale > recipe.greatest_scale:
        raise ValueError(f"--least_scale {recipe.least_scale} is more than --greatest_scale {recipe.greatest_scale}.")
    if not 0 <= recipe.warmup_epochs < recipe.epochs:
        raise ValueError(f"--warmup_epochs {recipe.warmup_epochs} must be less than --epochs {recipe.epochs}.")
    if recipe.evaluate is None and recipe.train is None:
        raise ValueError("Give --train a COCO-style json, or --evaluate a model.")
    if recipe.evaluate is not None and recipe.val is None:
        raise ValueError("--evaluate needs --val, a COCO-style json to measure AP on.")
    if recipe.evaluate is not None and (Path(recipe.output_dir) / "checkpoints").exists():
        raise ValueError(f"--output_dir {recipe.output_dir} holds a training run; give another for what is measured.")
    if recipe.freeze_encoder and recipe.drop_path:
        raise ValueError("--freeze_encoder leaves the encoder as it is; leave --drop_path out.")
    check_torchvision()


def build_model(recipe: Recipe, categories: list[dict]) -> Detector:
    """
    Raises:
        ValueError: if the encoder cannot be loaded, or weights of it are missing.
    """
    names = ("window_size", "pyramid_channels")
    options = {name: getattr(recipe, name) for name in names}
    options |= {"pyramid_strides": list(STRIDES), "drop_path_rate": recipe.drop_path, "image_size": recipe.image_size}
    set_seed(recipe.seed)  # the same start on every process, whatever was loaded before
    if recipe.encoder is None:
        names = ("hidden_size", "num_attention_heads", "num_hidden_layers")
        options |= {name: getattr(recipe, name) for name in names}
        backbone = EfficientSamBackbone(EfficientSamBackboneConfig(pretrain_image_size=recipe.image_size, **options))
    else:
        backbone, _ = load_around_encoder(EfficientSamBackbone, recipe.encoder, **options)
    backbone.vision_encoder.requires_grad_(not recipe.freeze_encoder)
    names = ("image_size", "anchor_scale", "sampled_boxes", "min_score")
    return Detector(backbone, DetectorConfig(categories, **{name: getattr(recipe, name) for name in names})).train()


def open_truth(recipe: Recipe, categories: list[dict]) -> Truth | None:
    if recipe.val is None:
        return None
    truth = Truth(recipe.val, recipe.val_images, recipe.val_limit)
    if not any(truth.rles):
        raise ValueError(f"There is no object to find in {recipe.val}; check the file and --val_limit.")
    match_categories(categories, truth)  # now, not after a day of training
    return truth


def measure(detector: Detector, truth: Truth, recipe: Recipe, accelerator: Accelerator) -> tuple[dict, list[dict]]:
    """What the detector finds on all images, and how good that is, on every process."""
    ids, results = match_categories(detector.config.categories, truth), []
    own = Subset(truth, range(accelerator.process_index, len(truth), accelerator.num_processes))
    loader = DataLoader(own, recipe.val_batch_size, num_workers=recipe.num_workers, collate_fn=list)
    for samples in tqdm(loader, "evaluation", disable=not accelerator.is_main_process, mininterval=2):
        with accelerator.autocast():
            images = detector.detect([sample.image for sample in samples])
        for sample, found in zip(samples, images, strict=True):
            results += results_of(found, sample.image_id, ids)
    places = {record["id"]: place for place, record in enumerate(truth.records)}
    results = sorted(gather_object(results), key=lambda result: places[result["image_id"]])
    return average_precision(results, truth), results


def write_metrics(
    detector: Detector, truth: Truth, scores: dict, results: list[dict], recipe: Recipe, step: int | None
) -> None:
    """`metrics.json`, `detections.json` and, of the first images, `detections.png`."""
    output, config = Path(recipe.output_dir), detector.config
    output.mkdir(parents=True, exist_ok=True)
    libraries = ("torchvision", "accelerate", "faster-coco-eval", "numpy", "pillow", "pycocotools")
    report = {
        **scores,
        "images": len(truth),
        "detections": len(results),
        "step": step,
        "protocol": PROTOCOL.format(size=config.image_size, score=config.min_score),
        "recipe": dataclasses.asdict(recipe),
        "device": str(next(detector.parameters()).device),
    }
    write_with_versions(output / "metrics.json", report, libraries)
    replace_text(output / "detections.json", json.dumps(boxes_alone(results)) + "\n")
    samples = [truth[index] for index in range(min(SHOWN, len(truth)))]
    masks = [decode(sample.rles) if sample.rles else [] for sample in samples]
    draw_detections(detector, [sample.image for sample in samples], masks).save(output / "detections.png")


def evaluate_saved(recipe: Recipe) -> None:
    """Prints and writes what the run that saved the detector has written into its metrics."""
    accelerator, detector = Accelerator(), load_detector(recipe.evaluate)
    truth = open_truth(recipe, detector.config.categories)
    detector = detector.to(accelerator.device)
    scores, results = measure(detector, truth, recipe, accelerator)
    if accelerator.is_main_process:
        write_metrics(detector, truth, scores, results, recipe, None)
        print(f"{'':8}" + "".join(f"{name:>8}" for name in scores["box"]))
        for kind, values in scores.items():
            print(f"{kind:8}" + "".join(f"{'-':>8}" if one is None else f"{one:8.4f}" for one in values.values()))
    accelerator.end_training()


def draw(detector: Detector, items: list[dict]) -> Image.Image:
    """The first images of a batch as the detector sees them, their objects, and what it finds."""
    images = [to_image(item["pixel_values"]) for item in items[:SHOWN]]
    return draw_detections(detector, images, [item["masks"].cpu() for item in items[:SHOWN]])


def main() -> None:
    recipe = parse_recipe(Recipe, __doc__, None if sys.argv[1:] else ["--config", str(MINIATURE)])
    try:
        check(recipe)
        if recipe.evaluate is not None:
            return evaluate_saved(recipe)
        accelerator = start_accelerator(recipe)
        if accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("A model this small gains nothing from FSDP; launch with training/accelerate/ddp.yaml.")
        scale = (recipe.least_scale, recipe.greatest_scale)
        source = CocoMasks(recipe.train, recipe.train_images)
        data = DetectionViews(source, recipe.image_size, scale, recipe.flip, recipe.seed)
        truth = open_truth(recipe, data.categories)
        loader, epoch_steps = epoch_loader(accelerator, data, recipe, collate_fn=list)
        steps = round(recipe.epochs * epoch_steps)
        if steps == 0:
            raise ValueError(f"--epochs {recipe.epochs} is less than one step of {epoch_steps} an epoch; give more.")
        model = build_model(recipe, data.categories)
        if accelerator.is_main_process:
            check_same_run(recipe, accelerator.num_processes)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"finetune_detection: {last_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    share = partial(layer_decay, num_layers=model.backbone.config.num_hidden_layers, decay=recipe.layer_decay)
    groups = parameter_groups(model, recipe.learning_rate, recipe.weight_decay, share)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    schedule = get_cosine_schedule_with_warmup(optimizer, round(recipe.warmup_epochs * epoch_steps), steps)
    optimization = Optimization(accelerator, model, optimizer, schedule, recipe.max_grad_norm)
    model, detector = optimization.model, optimization.current

    output = Path(recipe.output_dir)
    log = Log(accelerator, output, steps, recipe.log_steps)
    checkpoints = Checkpoints(accelerator, output / "checkpoints")
    step = checkpoints.resume()
    if step == steps:
        accelerator.print(f"{output} holds a finished run; choose another --output_dir for a new one, or delete it.")
    log.start(step, "detection", dataclasses.asdict(recipe))
    if accelerator.is_main_process:
        evaluations = Curve(output / "evaluation.jsonl", step)
    model.train()
    for batches in step_batches(accelerator, loader, data, step, steps, epoch_steps):
        losses, keys = [], []
        for items in batches:
            items = send_to_device(items, accelerator.device)
            with accelerator.accumulate(model):
                parts = model(items)
                optimization.add(parts["loss"])
            losses.append({name: part.detach() for name, part in parts.items()})
            keys += [item["key"] for item in items]
        means = {name: torch.stack([parts[name] for parts in losses]).mean() for name in losses[0]}
        step += 1
        rate = optimization.finish(step, means["loss"], keys)
        log.add(step, images=recipe.global_batch_size, **means, lr=rate)
        if step % recipe.picture_steps == 0 or step == steps:
            log.picture(step, draw(detector, items), "objects")
        if truth is not None and (step % recipe.val_steps == 0 or step == steps):
            scores, results = measure(detector, truth, recipe, accelerator)
            if accelerator.is_main_process:
                aps = {f"{kind}_ap": values["AP"] for kind, values in scores.items()}
                evaluations.add(step=step, **aps)
                evaluations.plot(list(aps))
                accelerator.log(aps, step)
                write_metrics(detector, truth, scores, results, recipe, step)
        if step % recipe.save_steps == 0 or step == steps:
            # The model before the checkpoint: a finished run has its model.
            if accelerator.is_main_process:
                with replaced_folder(output / "model") as folder:
                    save_detector(detector, folder)
            log.plot()
            checkpoints.save(step)
    log.close()
    # The model must not outlive the processes' group: freeing both at once can hang (pytorch/pytorch issue 56297).
    del model, detector, optimization
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    run_script("finetune_detection", main)
