"""Crops of unlabelled images, each with what a teacher says of it: computed in the training step, or from a cache."""

from dataclasses import dataclass, field

import torch
from accelerate import PartialState

from hf_efficientsam.training.data.feature_cache import FeatureCache
from hf_efficientsam.training.data.images import ImageSourceConfig, ImageViews, StreamedViews, open_images
from hf_efficientsam.training.engine.config import NotNegativeInt, PositiveInt, PositiveRatio

from .teachers import Teacher, load_teacher


@dataclass(frozen=True)
class TeacherViewsConfig(ImageSourceConfig):
    """The student's images and their teacher. A script's configuration is a `RunConfig` and a `StreamConfig`, too."""

    size: PositiveInt = field(default=224, metadata={"help": "side of the student's crop in pixels"})
    crop_scale: PositiveRatio = field(
        default=0.2, metadata={"help": "smallest part of an image's area that a crop keeps"}
    )
    views: PositiveInt | None = field(
        default=None, metadata={"help": "crops of an image; else new ones in each epoch"}
    )
    view_seed: NotNegativeInt = field(default=0, metadata={"help": "of the crops: that of the cache, if one is used"})
    teacher: str | None = field(default=None, metadata={"help": "vision model: Hub name, directory, or: bundled"})
    teacher_size: PositiveInt | None = field(default=None, metadata={"help": "its input side; else its processor's"})
    cache: str | None = field(default=None, metadata={"help": "its features from cache_features.py"})


def needed_teacher(config: TeacherViewsConfig, device: torch.device) -> Teacher | None:
    """None where there is none, or its features are in a cache."""
    return load_teacher(config.teacher, config.teacher_size, device) if config.teacher and not config.cache else None


def open_views(config: TeacherViewsConfig, teacher: Teacher | None) -> ImageViews | StreamedViews:
    """
    The crops of the images, with `teacher_pixels` for a teacher or its `features` from the cache.

    Raises:
        ValueError: if there are no images, or the cache is of other ones, other crops or another teacher.
    """
    source = open_images(config.images, config.dataset, config.split, config.image_column, config.shards)
    crop_scale = (config.crop_scale, 1.0)
    arguments = {"size": config.size, "crop_scale": crop_scale, "views": config.views, "seed": config.view_seed}
    if config.cache:
        expected = {name: getattr(config, name) for name in ("size", "crop_scale", "view_seed")} | {"patch_size": 16}
        expected["data"] = source.fingerprint()
        if config.teacher:  # is looked at and let go; without it a cache says itself whose it is
            expected["teacher"] = load_teacher(config.teacher, config.teacher_size).description()
        arguments["cache"] = FeatureCache(config.cache, expected)
        arguments["views"] = config.views or arguments["cache"].views
    elif teacher is not None:
        arguments["teacher_size"] = teacher.size
    if not config.shards:
        return ImageViews(source, noise_seed=config.seed, **arguments)
    state = PartialState()
    return StreamedViews(
        source,
        noise_seed=config.seed,
        process_index=state.process_index,
        num_processes=state.num_processes,
        shuffle_buffer=config.shuffle_buffer,
        **arguments,
    )
