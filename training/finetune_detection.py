"""Trains a detector with instance masks: torchvision's Mask R-CNN around EfficientSAM's encoder, on COCO-style json.

    pip install -e ".[train,detection]"                                         # torchvision is an extra
    accelerate launch --num_processes 1 training/finetune_detection.py   # a miniature: example images, no network
    accelerate launch training/finetune_detection.py --config training/recipes/paper/detection_ti_coco.yaml \
        --train coco/instances_train2017.json --train_images coco/train2017 --val coco/instances_val2017.json \
        --val_images coco/val2017 --encoder runs/sami/model --output_dir runs/coco
    accelerate launch training/finetune_detection.py --evaluate runs/coco/model --val my/instances.json \
        --output_dir runs/mine
    python training/evaluate_masks.py --annotations coco/instances_val2017.json --images coco/val2017 \
        --detections runs/coco/detections.json                                  # EfficientSAM's masks on its boxes

A run that is started again in the same `--output_dir` goes on where it stopped. The result is `OUTPUT_DIR/model`: a
directory of `EfficientSamBackbone`, and with what lies beside its weights what `load_detector` of
hf_efficientsam.training.detection.mask_rcnn takes. AP of boxes and masks is in `OUTPUT_DIR/metrics.json`, the boxes
themselves in `detections.json`, the training curve and drawings beside them. Several GPUs and machines:
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
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, set_seed
from PIL import Image
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from hf_efficientsam import EfficientSamBackbone, EfficientSamBackboneConfig
from hf_efficientsam.training.data.coco import AnnotationConfig, CocoMasks, decode_rles
from hf_efficientsam.training.data.images import to_image
from hf_efficientsam.training.detection.data import DetectionViews
from hf_efficientsam.training.detection.evaluation import (
    PROTOCOL,
    average_precision,
    boxes_alone,
    draw_detections,
    match_categories,
    results_of,
)
from hf_efficientsam.training.detection.mask_rcnn import (
    STRIDES,
    DetectorConfig,
    MaskDetector,
    check_torchvision,
    load_detector,
    save_detector,
)
from hf_efficientsam.training.engine.checkpoints import replaced_folder
from hf_efficientsam.training.engine.config import (
    EpochsConfig,
    EvaluationConfig,
    LearningRateConfig,
    LoaderConfig,
    NotNegativeFloat,
    NotNegativeInt,
    OutputFolder,
    PositiveFloat,
    PositiveInt,
    RatioBelowOne,
    RunConfig,
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
from hf_efficientsam.training.engine.reports import describe_model, replace_text, write_report
from hf_efficientsam.training.engine.run import (
    TrainingRun,
    accelerator_without_timeout,
    run_script,
    start_accelerator,
)
from hf_efficientsam.training.masks.coco_ap import Truth

MINIATURE = Path(__file__).parent / "recipes" / "miniature" / "detection.yaml"
SHOWN = 4  # images in a drawing


@dataclass(frozen=True)
class DetectionConfig(
    RunConfig, EpochsConfig, LearningRateConfig, EvaluationConfig, LoaderConfig, EncoderConfig, AnnotationConfig
):
    evaluate: str | None = field(
        default=None, metadata={"help": "only measure this model of an earlier run on --val, into OUTPUT_DIR"}
    )
    # Data.
    train: str | None = field(default=None, metadata={"help": "COCO-style json with the objects to learn"})
    train_images: str | None = field(default=None, metadata={"help": "folder of its images; by default beside it"})
    val: str | None = field(default=None, metadata={"help": "COCO-style json to measure AP on; without it none is"})
    val_images: str | None = field(default=None, metadata={"help": "folder of its images; by default beside it"})
    val_limit: PositiveInt | None = field(default=None, metadata={"help": "measure on its first so many images only"})
    image_size: PositiveInt = field(default=1024, metadata={"help": "side of the model input in pixels"})
    least_scale: PositiveFloat = field(
        default=0.1, metadata={"help": "large-scale jitter: smallest longer side of an image, as a ratio of it"}
    )
    greatest_scale: PositiveFloat = field(default=2.0, metadata={"help": "and the largest"})
    flip: bool = field(default=True, metadata={"help": "half of the images are mirrored"})
    # Model.
    window_size: NotNegativeInt = field(
        default=14, metadata={"help": "patches of the windows of all layers but four; 0: attention is global"}
    )
    pyramid_channels: PositiveInt = field(
        default=256, metadata={"help": "width of the feature pyramid and of the heads"}
    )
    anchor_scale: PositiveFloat = field(
        default=8.0, metadata={"help": "side of an anchor in strides of its level; lower it for small images"}
    )
    sampled_boxes: PositiveInt = field(
        default=512, metadata={"help": "proposals of an image that the heads learn from"}
    )
    min_score: RatioBelowOne = field(default=0.05, metadata={"help": "detections of a lower score are left out"})
    freeze_encoder: bool = field(default=False, metadata={"help": "train the pyramid and the heads alone"})
    # Optimisation.
    warmup_epochs: NotNegativeFloat = 10
    global_batch_size: PositiveInt = 64
    learning_rate: PositiveFloat = 2e-4
    weight_decay: NotNegativeFloat = 0.1
    # Evaluation.
    eval_batch_size: PositiveInt = field(default=4, metadata={"help": "images at a time and process"})
    eval_steps: PositiveInt = 20000
    output_dir: OutputFolder = "runs/detection"


def check(config: DetectionConfig) -> None:
    check_ranges(config)
    if config.image_size % STRIDES[-1]:
        raise ValueError(f"--image_size {config.image_size} must be a multiple of {STRIDES[-1]}, the coarsest stride.")
    if config.least_scale > config.greatest_scale:
        raise ValueError(
            f"--least_scale {config.least_scale} must not be more than --greatest_scale {config.greatest_scale}."
        )
    if config.evaluate is None and config.train is None:
        raise ValueError("Give --train a COCO-style json, or --evaluate a model.")
    if config.evaluate is not None and config.val is None:
        raise ValueError("--evaluate needs --val, a COCO-style json to measure AP on.")
    if config.evaluate is not None and (Path(config.output_dir) / "checkpoints").exists():
        raise ValueError(f"--output_dir {config.output_dir} holds a training run; give another for what is measured.")
    if config.freeze_encoder and config.drop_path:
        raise ValueError("--freeze_encoder leaves the encoder as it is; leave --drop_path out.")
    check_torchvision()


def build_model(config: DetectionConfig, categories: list[dict]) -> MaskDetector:
    """
    Raises:
        ValueError: if the encoder cannot be loaded, or weights of it are missing.
    """
    names = ("window_size", "pyramid_channels")
    options = {name: getattr(config, name) for name in names}
    options |= {"pyramid_strides": list(STRIDES), "drop_path_rate": config.drop_path, "image_size": config.image_size}
    set_seed(config.seed)  # the same start on every process, whatever was loaded before
    if config.encoder is None:
        names = ("hidden_size", "num_attention_heads", "num_hidden_layers")
        options |= {name: getattr(config, name) for name in names}
        backbone = EfficientSamBackbone(EfficientSamBackboneConfig(pretrain_image_size=config.image_size, **options))
    else:
        backbone, _ = load_around_encoder(EfficientSamBackbone, config.encoder, **options)
    backbone.vision_encoder.requires_grad_(not config.freeze_encoder)
    names = ("image_size", "anchor_scale", "sampled_boxes", "min_score")
    return MaskDetector(
        backbone, DetectorConfig(categories, **{name: getattr(config, name) for name in names})
    ).train()


def open_truth(config: DetectionConfig, categories: list[dict]) -> Truth | None:
    if config.val is None:
        return None
    truth = Truth(config.val, config.val_images, config.val_limit, config.crowds)
    if not any(truth.rles):
        raise ValueError(f"There is no object to find in {config.val}; check the file and --val_limit.")
    match_categories(categories, truth)  # now, not after a day of training
    return truth


def measure(
    detector: MaskDetector, truth: Truth, config: DetectionConfig, accelerator: Accelerator
) -> tuple[dict, list[dict]]:
    """What the detector finds on all images, and how good that is, on every process."""
    ids, results = match_categories(detector.config.categories, truth), []
    own = Subset(truth, range(accelerator.process_index, len(truth), accelerator.num_processes))
    loader = DataLoader(own, config.eval_batch_size, num_workers=config.num_workers, collate_fn=list)
    for samples in tqdm(loader, "evaluation", disable=not accelerator.is_main_process, mininterval=2):
        with accelerator.autocast():
            images = detector.detect([sample.image for sample in samples])
        for sample, found in zip(samples, images, strict=True):
            results += results_of(found, sample.image_id, ids)
    places = {record["id"]: place for place, record in enumerate(truth.records)}
    results = sorted(gather_object(results), key=lambda result: places[result["image_id"]])
    return average_precision(results, truth), results


def write_metrics(
    detector: MaskDetector,
    truth: Truth,
    scores: dict,
    results: list[dict],
    config: DetectionConfig,
    step: int | None,
) -> None:
    """`metrics.json`, `detections.json` and, of the first images, `detections.png`."""
    output, detector_config = Path(config.output_dir), detector.config
    output.mkdir(parents=True, exist_ok=True)
    libraries = ("torchvision", "accelerate", "faster-coco-eval", "numpy", "pillow", "pycocotools")
    report = {
        **scores,
        "images": len(truth),
        "detections": len(results),
        "step": step,
        "protocol": PROTOCOL.format(size=detector_config.image_size, score=detector_config.min_score),
        "config": dataclasses.asdict(config),
        "device": str(next(detector.parameters()).device),
    }
    write_report(output / "metrics.json", report, libraries)
    replace_text(output / "detections.json", json.dumps(boxes_alone(results)) + "\n")
    samples = [truth[index] for index in range(min(SHOWN, len(truth)))]
    masks = [decode_rles(sample.rles) if sample.rles else [] for sample in samples]
    draw_detections(detector, [sample.image for sample in samples], masks).save(output / "detections.png")


def evaluate_saved(config: DetectionConfig) -> None:
    """Prints and writes what the run that saved the detector has written into its metrics."""
    accelerator, detector = accelerator_without_timeout(), load_detector(config.evaluate)
    truth = open_truth(config, detector.config.categories)
    detector = detector.to(accelerator.device)
    scores, results = measure(detector, truth, config, accelerator)
    if accelerator.is_main_process:
        write_metrics(detector, truth, scores, results, config, None)
        print(f"{'':8}" + "".join(f"{name:>8}" for name in scores["box"]))
        for kind, values in scores.items():
            print(f"{kind:8}" + "".join(f"{'-':>8}" if one is None else f"{one:8.4f}" for one in values.values()))
    accelerator.end_training()


def draw(detector: MaskDetector, items: list[dict]) -> Image.Image:
    """The first images of a batch as the detector sees them, their objects, and what it finds."""
    images = [to_image(item["pixel_values"]) for item in items[:SHOWN]]
    return draw_detections(detector, images, [item["masks"].cpu() for item in items[:SHOWN]])


def get_optimizer(
    config: DetectionConfig, detector: MaskDetector, steps: int, warmup_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    layers = detector.backbone.config.num_hidden_layers
    groups = layer_wise_groups(detector, config, layers, config.weight_decay)
    optimizer = adamw(groups)
    return optimizer, warmed_up(get_cosine_schedule_with_warmup(optimizer, warmup_steps, steps), warmup_steps)


def save_model(detector: MaskDetector, config: DetectionConfig, folder: Path) -> None:
    with replaced_folder(folder) as writing:
        save_detector(detector, writing)
        describe_model(writing, "finetune_detection", detector.backbone, config)


def training_function(config: DetectionConfig, run: TrainingRun) -> None:
    accelerator = run.accelerator
    scale = (config.least_scale, config.greatest_scale)
    source = CocoMasks(config.train, config.train_images, reading=config)
    data = DetectionViews(source, config.image_size, scale, config.flip, config.seed)
    truth = open_truth(config, data.categories)
    loading = (config.global_batch_size, config.num_workers, config.epoch_images)
    loader, epoch_steps = epoch_loader(accelerator, data, *loading, collate_fn=list)
    steps, warmup_steps = config.in_steps(epoch_steps)
    detector = build_model(config, data.categories)
    optimizer, scheduler = get_optimizer(config, detector, steps, warmup_steps)
    model, optimizer = accelerator.prepare(detector, optimizer)
    average = weight_average(detector, config.ema_decay)
    averaged = detector if average is None else average.module
    done = run.resume(steps, [scheduler, average])

    model.train()
    for step, batches in step_batches(accelerator, loader, done, steps, epoch_steps):
        losses, keys = [], []
        for items in batches:
            items = send_to_device(items, accelerator.device)
            with accelerator.accumulate(model):
                parts = model(items)
                accelerator.backward(parts["loss"])
                if accelerator.sync_gradients:
                    grad_norm = clip_gradients(accelerator, model.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            losses.append({name: part.detach() for name, part in parts.items()})
            keys += [item["key"] for item in items]
        means = {name: torch.stack([parts[name] for parts in losses]).mean() for name in losses[0]}
        lr = max(scheduler.get_last_lr())
        run.check_finite(step, means["loss"], grad_norm, keys)
        if not accelerator.optimizer_step_was_skipped:  # as in float16, for an infinite gradient
            scheduler.step()
        if average is not None:
            average.update_parameters(detector)
        run.log.add(step, images=config.global_batch_size, **means, lr=lr)
        if run.is_due(step, config.image_steps):
            run.log.add_image(step, draw(detector, items), "objects")
        if truth is not None and run.is_due(step, config.eval_steps):
            scores, results = measure(averaged, truth, config, accelerator)
            run.log.add_evaluation(step, **{f"{kind}_ap": values["AP"] for kind, values in scores.items()})
            if accelerator.is_main_process:
                write_metrics(averaged, truth, scores, results, config, step)
        if run.is_save_due(step):
            if accelerator.is_main_process:
                save_model(averaged, config, run.output_dir / "model")
            run.save(step)


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(DetectionConfig, __doc__, arguments, default=MINIATURE)
    check(config)
    if config.evaluate is not None:
        return evaluate_saved(config)
    with TrainingRun(start_accelerator(config), config, "detection") as run:
        training_function(config, run)


if __name__ == "__main__":
    run_script("finetune_detection", main)
