"""Writes a teacher's features of images to disk once, so that sami.py reads them instead of running the teacher.

    accelerate launch training/cache_features.py --teacher facebook/sam-vit-huge --images imagenet/train --views 8 \
        --output_dir caches/sam_h
    accelerate launch training/sami.py --cache caches/sam_h --images imagenet/train --views 8

Each image is cached in `views` random crops, the very ones that sami.py takes with the same `--size`, `--crop_scale`
and `--view_seed`; a view at 224 pixels is 98 KiB for a teacher of width 256. A run that is started again with the same
options does what is missing. Several processes share the work, on several machines too if all of them see OUTPUT_DIR.
Features are in memory until their file is complete: `num_workers` files at a time, in each process.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_efficientsam.training.data.feature_cache import ViewParts, open_manifest, part_path, write_index, write_part
from hf_efficientsam.training.data.images import ImageSourceConfig, ImageViews, StreamedViews, open_images
from hf_efficientsam.training.engine.config import (
    NotNegativeInt,
    OutputFolder,
    PositiveInt,
    PositiveRatio,
    check_ranges,
    parse_config,
)
from hf_efficientsam.training.engine.run import accelerator_without_timeout, run_script
from hf_efficientsam.training.sami.teachers import Teacher, load_teacher


@dataclass(frozen=True)
class CacheFeaturesConfig(ImageSourceConfig):
    # What the features depend on.
    teacher: str = field(default="bundled", metadata={"help": "vision model: Hub name, directory, or: bundled"})
    teacher_size: PositiveInt | None = field(default=None, metadata={"help": "its input side; else its processor's"})
    size: PositiveInt = field(default=224, metadata={"help": "side of the student's crop in pixels"})
    crop_scale: PositiveRatio = field(
        default=0.2, metadata={"help": "smallest part of an image's area that a crop keeps"}
    )
    views: PositiveInt = field(default=1, metadata={"help": "crops of each image"})
    view_seed: NotNegativeInt = field(default=0, metadata={"help": "of the crops"})
    # How it is done.
    batch_size: PositiveInt = field(default=32, metadata={"help": "images at a time and process"})
    num_workers: NotNegativeInt = field(
        default=2, metadata={"help": "processes that read images, each a part of its own"}
    )
    part_size: PositiveInt = field(default=512, metadata={"help": "images in a file; of shards, each makes one"})
    output_dir: OutputFolder = field(default="runs/features", metadata={"help": "folder of the cache"})


def build_views(config: CacheFeaturesConfig, teacher: Teacher) -> ImageViews | StreamedViews:
    source = open_images(config.images, config.dataset, config.split, config.image_column, config.shards)
    return (StreamedViews if config.shards else ImageViews)(
        source,
        config.size,
        teacher_size=teacher.size,
        crop_scale=(config.crop_scale, 1.0),
        views=config.views,
        seed=config.view_seed,
    )


def build_manifest(config: CacheFeaturesConfig, teacher: Teacher, views: ImageViews | StreamedViews) -> dict:
    options = ("size", "crop_scale", "views", "view_seed", "part_size")
    return {
        "teacher": teacher.description(),
        "patch_size": views.patch_size,
        "width": teacher.width,
        **{name: getattr(config, name) for name in options},
        "data": views.source.fingerprint(),
    }


def cache_features(config: CacheFeaturesConfig, accelerator: Accelerator) -> None:
    teacher = load_teacher(config.teacher, config.teacher_size, accelerator.device)
    views = build_views(config, teacher)
    if accelerator.is_main_process:
        open_manifest(config.output_dir, build_manifest(config, teacher, views))
    accelerator.wait_for_everyone()
    num_parts = ViewParts.count(views, config.part_size)
    everything = [(view, part) for view in range(config.views) for part in range(num_parts)]
    missing = [which for which in everything if not part_path(config.output_dir, *which).is_file()]
    accelerator.wait_for_everyone()  # all have looked before the first of them writes
    mine = missing[accelerator.process_index :: accelerator.num_processes]

    grid = (config.size // views.patch_size,) * 2
    nothing = torch.zeros(0, grid[0] * grid[1], teacher.width, dtype=torch.float16)
    total = (
        None if config.shards else sum(min(config.part_size, len(views) - part * config.part_size) for _, part in mine)
    )
    with tqdm(total=total, unit="image", disable=not accelerator.is_main_process, mininterval=5) as progress:
        for view, which in groupby(mine, key=itemgetter(0)):
            views.set_epoch(view)
            parts = ViewParts(views, [part for _, part in which], config.part_size, config.batch_size)
            pin_memory = accelerator.device.type == "cuda"
            loader = DataLoader(parts, batch_size=None, num_workers=config.num_workers, pin_memory=pin_memory)
            unfinished = defaultdict(lambda: ([], [nothing]))
            for part, keys, pixels in loader:
                all_keys, all_features = unfinished[part]
                if keys:
                    features = teacher(pixels.to(accelerator.device, non_blocking=True), grid)
                    all_keys += keys
                    all_features.append(features.to("cpu", torch.float16))
                    progress.update(len(keys))
                else:
                    write_part(config.output_dir, view, part, all_keys, torch.cat(all_features))
                    del unfinished[part]
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_index(config.output_dir, num_parts, config.views)


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(CacheFeaturesConfig, __doc__, arguments)
    check_ranges(config)
    accelerator = accelerator_without_timeout()
    cache_features(config, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    run_script("cache_features", main)
