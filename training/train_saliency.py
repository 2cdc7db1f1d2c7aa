"""Trains the head that finds salient objects in the image embeddings of a frozen EfficientSAM.

    accelerate launch --num_processes 1 training/train_saliency.py   # a miniature: example images, no network
    accelerate launch training/train_saliency.py --config training/recipes/bundled/8_saliency.yaml \
        --train ../shared/data/saliency/train --val ../shared/data/saliency/val --output_dir runs/saliency

Data are folders with `images/` and, of the same names, `masks/`; or COCO-style json files, whose objects are then what
is salient. Each image is encoded once, and its embedding kept in memory. A run that is started again in the same
`--output_dir` goes on where it stopped. The result is `OUTPUT_DIR/model`, which `from_pretrained` takes and which
belongs into the folder `saliency` of the model's checkpoint; the numbers on `--val` are in `OUTPUT_DIR/metrics.json`,
the training curve and drawings beside it. Several GPUs and machines: training/accelerate/ddp.yaml and multi_node.yaml.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
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
from hf_efficientsam.inference.drawing import image_table
from hf_efficientsam.inference.loading import load_model
from hf_efficientsam.training.data.coco import AnnotationConfig
from hf_efficientsam.training.data.folder_masks import UnitedMasks, open_annotations
from hf_efficientsam.training.engine.checkpoints import replaced_folder
from hf_efficientsam.training.engine.config import (
    EvaluationConfig,
    OutputFolder,
    PositiveFloat,
    PositiveInt,
    RatioBelowOne,
    RunConfig,
    StepsConfig,
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
from hf_efficientsam.training.engine.reports import describe_model, write_report
from hf_efficientsam.training.engine.run import TrainingRun, run_script, start_accelerator
from hf_efficientsam.training.saliency.embeddings import EmbeddedImages, MirroredEmbeddings, whiten
from hf_efficientsam.training.saliency.evaluation import mean_scores, predict_map, score_map

MINIATURE = Path(__file__).parent / "recipes" / "miniature" / "saliency.yaml"
SHOWN = 4  # images in a drawing
WHITENED = 100  # images whose embeddings a new head starts from


@dataclass(frozen=True)
class SaliencyConfig(RunConfig, StepsConfig, EvaluationConfig, AnnotationConfig):
    # Data.
    train: list[str] = field(default_factory=list, metadata={"help": "folders with images/ and masks/, or COCO jsons"})
    val: str | None = field(default=None, metadata={"help": "such a folder or json to measure on"})
    model: str = field(default="bundled", metadata={"help": "whose encoder it is: path or Hub name, or: bundled"})
    image_size: PositiveInt | None = field(
        default=None, metadata={"help": "images are squashed to this side; by default the model's"}
    )
    # Head.
    hidden_size: PositiveInt = field(default=96, metadata={"help": "its width"})
    num_hidden_layers: PositiveInt = field(default=2, metadata={"help": "its transformer layers"})
    num_attention_heads: PositiveInt = field(default=4, metadata={"help": "their attention heads"})
    dropout: RatioBelowOne = field(default=0.1, metadata={"help": "of the narrowed embeddings"})
    drop_path: RatioBelowOne = field(default=0.1, metadata={"help": "ratio of the images that skip its last layer"})
    # Optimisation.
    learning_rate: PositiveFloat = field(default=1e-3, metadata={"help": "its peak; a cosine takes it to zero"})
    # Output.
    output_dir: OutputFolder = "runs/saliency"
    eval_steps: PositiveInt = 500
    save_steps: PositiveInt = 200
    image_steps: PositiveInt = 500


def check(config: SaliencyConfig) -> None:
    check_ranges(config)
    if not config.train:
        raise ValueError("Give --train folders with images/ and masks/, or COCO-style json files.")
    if config.image_size is not None and config.image_size % 16:
        raise ValueError(f"--image_size {config.image_size} must be a multiple of 16.")


def get_data(config: SaliencyConfig, device: torch.device) -> tuple[MirroredEmbeddings, EmbeddedImages | None, int]:
    """What is trained on, what is measured on, and the channels of the embeddings."""
    model, _ = load_model(config.model)
    model, vision = model.to(device), model.config.vision_config
    side = config.image_size or vision.image_size
    processor = EfficientSamProcessor(EfficientSamImageProcessor(size={"height": side, "width": side}))
    source = ConcatDataset([UnitedMasks(open_annotations(path, reading=config)) for path in config.train])
    data = MirroredEmbeddings(EmbeddedImages(model, processor, source), config.seed)
    val = None
    if config.val is not None:
        val = EmbeddedImages(model, processor, UnitedMasks(open_annotations(config.val, reading=config, split="val")))
    return data, val, vision.output_channels


def build_head(config: SaliencyConfig, input_channels: int) -> EfficientSamSaliencyHead:
    if config.hidden_size > input_channels:
        raise ValueError(
            f"--hidden_size {config.hidden_size} must be at most the encoder's {input_channels} channels."
        )
    set_seed(config.seed)  # the same start on every process, whatever was loaded before
    head_config = EfficientSamSaliencyConfig(
        input_channels=input_channels,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        hidden_dropout=config.dropout,
        drop_path_rate=config.drop_path,
    )
    return EfficientSamSaliencyHead(head_config).train()


def whiten_head(head: EfficientSamSaliencyHead, data: MirroredEmbeddings) -> None:
    """Starts a new head from the statistics of embeddings of images from all over the data."""
    some = range(0, len(data), max(1, len(data) // WHITENED))[:WHITENED]
    whiten(head, torch.stack([data.images[index]["image_embeddings"] for index in some]))


def get_optimizer(
    config: SaliencyConfig, head: EfficientSamSaliencyHead
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    groups = parameter_groups(head, config.learning_rate, config.weight_decay)
    optimizer = adamw(groups)
    warmup_steps = config.warmup_of(config.steps)
    schedule = get_scheduler("cosine", optimizer, warmup_steps, config.steps)
    return optimizer, warmed_up(schedule, warmup_steps)


def measure(head: EfficientSamSaliencyHead, images: EmbeddedImages, accelerator: Accelerator) -> dict:
    """See `mean_scores`; the same on every process, which share the images."""
    training = head.training
    head.eval()
    own = range(accelerator.process_index, len(images), accelerator.num_processes)
    scores = [score_map(predict_map(head, images.processor, images[i]), images[i]["truth"]) for i in own]
    head.train(training)
    return {**mean_scores(gather_object(scores)), "images": len(images)}


def draw(head: EfficientSamSaliencyHead, images: EmbeddedImages) -> Image.Image:
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
    return image_table({name: [image.resize(size) for image in cells] for name, cells in columns.items()})


def write_metrics(config: SaliencyConfig, scores: dict, step: int) -> None:
    report = {**scores, "step": step, "config": dataclasses.asdict(config)}
    write_report(Path(config.output_dir) / "metrics.json", report, ("accelerate", "numpy", "pillow"))


def save_head(head: EfficientSamSaliencyHead, config: SaliencyConfig, folder: Path) -> None:
    with replaced_folder(folder) as writing:
        head.save_pretrained(writing)
        describe_model(writing, "train_saliency", head, config)


def training_function(config: SaliencyConfig, run: TrainingRun) -> None:
    accelerator = run.accelerator
    data, val, channels = get_data(config, accelerator.device)
    loader, epoch_steps = epoch_loader(accelerator, data, config.global_batch_size)
    head = build_head(config, channels)
    if not run.checkpoints.steps():
        whiten_head(head, data)
    optimizer, scheduler = get_optimizer(config, head)
    model, optimizer = accelerator.prepare(head, optimizer)
    average = weight_average(head, config.ema_decay)
    averaged = head if average is None else average.module
    done = run.resume(config.steps, [scheduler, average])

    for step, batches in step_batches(accelerator, loader, done, config.steps, epoch_steps):
        losses, keys = [], []
        for batch in batches:
            batch = send_to_device(batch, accelerator.device)
            torch.manual_seed(batch["seed"][0].item())  # of dropout: a resumed run draws what it would have drawn
            with accelerator.accumulate(model):
                loss = model(batch["image_embeddings"], batch["labels"]).loss
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
            average.update_parameters(head)
        run.log.add(step, images=config.global_batch_size, loss=loss, lr=lr)
        if val is not None and run.is_due(step, config.image_steps):
            run.log.add_image(step, draw(averaged, val), "saliency")
        if val is not None and run.is_due(step, config.eval_steps):
            scores = measure(averaged, val, accelerator)
            run.log.add_evaluation(step, **{name: scores[name] for name in ("iou", "mae", "max_f")})
            if accelerator.is_main_process:
                write_metrics(config, scores, step)
        if run.is_save_due(step):
            if accelerator.is_main_process:
                save_head(averaged, config, run.output_dir / "model")
            run.save(step)


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(SaliencyConfig, __doc__, arguments, default=MINIATURE)
    check(config)
    with TrainingRun(start_accelerator(config), config, "saliency") as run:
        training_function(config, run)


if __name__ == "__main__":
    run_script("train_saliency", main)
