"""Hidden states of the frozen part of an encoder, for several fixed views of each training image, on disk.

A frozen layer gives the same numbers for the same pixels, so each image is encoded once. To vary what the decoder sees
all the same, an image is shown in several views, see `views.py`.

The files are those of `training/data/feature_cache.py`: parts in half precision, each written whole or not at all,
with a manifest of what they were made from, and read as a memory map. A start that was interrupted goes on with the
parts that are missing.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from hf_efficientsam.model.modeling_auto_vision_efficientsam import EfficientSamAutoVisionEncoder
from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel
from hf_efficientsam.model.modeling_vision_efficientsam import EfficientSamVisionEncoder
from hf_efficientsam.training.data.feature_cache import (
    FeatureCache,
    open_manifest,
    part_path,
    write_index,
    write_part,
)

from .batch import MaskViews

PART_SIZE = 32  # images in a file: what an interruption can lose, and what is held in memory until it is written

Encoder = EfficientSamVisionEncoder | EfficientSamAutoVisionEncoder


def encode_frozen(encoder: Encoder, pixel_values: torch.Tensor, last_layers: int) -> torch.Tensor:
    """Pixels `[B, 3, H, W]` -> what the encoder's last so many layers, or else its neck, read, tokens `[B, N, C]`."""
    if isinstance(encoder, EfficientSamAutoVisionEncoder):
        return encoder.encode_tokens(pixel_values)
    hidden_states = encoder.embeddings(pixel_values)
    for layer in encoder.layers[: len(encoder.layers) - last_layers]:
        hidden_states = layer(hidden_states)
    return hidden_states


def encode_rest(encoder: Encoder, hidden_states: torch.Tensor, last_layers: int) -> torch.Tensor:
    """What `encode_frozen` makes of square images, through the last layers and the neck: `[B, C, S / 16, S / 16]`."""
    if last_layers:
        for layer in encoder.layers[-last_layers:]:
            hidden_states = layer(hidden_states)
    side = round(hidden_states.shape[1] ** 0.5)
    return encoder.neck(hidden_states, side, side)


class CachedViews:
    """
    The hidden states that training reads in place of pixels; made by `cache_views`.

    Args:
        caches: one for each source of images.
    """

    def __init__(self, caches: list[FeatureCache]):
        self.caches = caches

    def read(self, keys: list[str], views: list[int]) -> torch.Tensor:
        """Float32 `[B, N, C]` of images by their keys and the number of the view."""
        rows = [self._cache_of(key).read(key, view) for key, view in zip(keys, views, strict=True)]
        return torch.stack(rows).float()

    def _cache_of(self, key: str) -> FeatureCache:
        return next((cache for cache in self.caches if key in cache), self.caches[0])  # the first says what is missing


def cache_views(
    model: EfficientSamModel,
    data: MaskViews,
    folder: str | Path,
    last_layers: int,
    accelerator: Accelerator,
    num_workers: int = 0,
) -> CachedViews:
    """
    Encodes what is missing, shared among the processes, and opens the cache: a folder for each source of images, so
    that another source or other numbers of views leave the rest as they are.

    Args:
        model: its encoder up to the last so many layers must not change afterwards.
        data: the images and their views.
        folder: of the cache; is made if it is not there.
        last_layers: how many layers are left out, to be trained.
        accelerator: of the run; its mixed precision is that of the encoder, too.
        num_workers: processes that read images.

    Raises:
        ValueError: if the folder holds a cache of something else, or an image is broken; or if layers are left out
            of an encoder other than the plain ViT, which does not run in two parts.
    """
    encoder = model.vision_encoder
    made_by = {"width": encoder.neck.projection.in_features}
    if isinstance(encoder, EfficientSamVisionEncoder):
        num_frozen = len(encoder.layers) - last_layers
        frozen = [encoder.embeddings, *encoder.layers[:num_frozen]]
        made_by |= {"encoder": weights_hash(frozen), "frozen_layers": num_frozen}
    elif last_layers:
        raise ValueError(
            f"--cache_embeddings with --train_last_layers {last_layers} needs EfficientSAM's plain ViT; give "
            "--train_last_layers 0, which trains the neck of any encoder, or leave --cache_embeddings out."
        )
    else:
        made_by |= {"encoder": weights_hash([encoder.backbone]), "stages": encoder.backbone.out_features}
    was_training = model.training
    model.eval()
    cached = cache_encoded_views(
        lambda pixel_values: encode_frozen(encoder, pixel_values, last_layers),
        made_by, data, folder, accelerator, num_workers,
    )  # fmt: skip
    model.train(was_training)
    return cached


def cache_encoded_views(
    encode: Callable[[torch.Tensor], torch.Tensor],
    made_by: dict,
    data: MaskViews,
    folder: str | Path,
    accelerator: Accelerator,
    num_workers: int = 0,
) -> CachedViews:
    """
    As `cache_views`, with any function of the pixels.

    Args:
        encode: pixels `[1, 3, S, S]` on the accelerator's device -> features `[1, N, C]`.
        made_by: what tells `encode` from others, in plain json, and the `width` C.
        data, folder, accelerator, num_workers: see `cache_views`.
    """
    encoded = {
        **made_by,
        "precision": accelerator.mixed_precision,
        "size": data.options.image_size,
        "part_size": PART_SIZE,
    }
    sources = data.distinct_sources()
    folders = [Path(folder) / f"file_{which + 1}" for which in sources]
    manifests = [{**encoded, "views": data.views[which], "data": data.fingerprint(which)} for which in sources]
    if accelerator.is_main_process:
        for place, manifest in zip(folders, manifests, strict=True):
            open_manifest(place, manifest)
    accelerator.wait_for_everyone()
    for place, manifest, indices in zip(folders, manifests, sources.values(), strict=True):
        parts = [indices[start : start + PART_SIZE] for start in range(0, len(indices), PART_SIZE)]
        encode_parts(encode, data, place, parts, manifest["views"], accelerator, num_workers)
    return CachedViews([FeatureCache(*one) for one in zip(folders, manifests, strict=True)])


@torch.no_grad()
def encode_parts(
    encode: Callable[[torch.Tensor], torch.Tensor],
    data: MaskViews,
    folder: Path,
    parts: list[range],
    views: int,
    accelerator: Accelerator,
    num_workers: int,
) -> None:
    """Writes those parts of a source's cache that are missing, a share in each process, and then its index."""
    everything = [(view, part) for view in range(views) for part in range(len(parts))]
    missing = [which for which in everything if not part_path(folder, *which).is_file()]
    accelerator.wait_for_everyone()  # all have looked before the first of them writes
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    total = sum(len(parts[part]) for _, part in mine)
    with tqdm(total=total, unit="image", desc="encoding", disable=not accelerator.is_main_process) as progress:
        for view, part in mine:
            images = Subset(_ViewPixels(data, view), parts[part])
            keys, features = [], []
            for key, pixel_values in DataLoader(images, batch_size=None, num_workers=num_workers):
                # One at a time, so that its batch changes no digit.
                with accelerator.autocast():
                    encoded = encode(pixel_values[None].to(accelerator.device))
                keys.append(key)
                features.append(encoded.half().cpu())
                progress.update()
            write_part(folder, view, part, keys, torch.cat(features))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not (folder / "index.safetensors").is_file():
        write_index(folder, len(parts), views)
    accelerator.wait_for_everyone()


class _ViewPixels(Dataset):
    """Name and pixels float32 `[3, S, S]` of a view of each image."""

    def __init__(self, data: MaskViews, view: int):
        self.data, self.view = data, view

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor]:
        return self.data.view_pixels(index, self.view)


def weights_hash(modules: Iterable[nn.Module]) -> str:
    """Of the weights that features depend on."""
    digest = hashlib.sha256()
    for module in modules:
        for name, weight in module.state_dict().items():
            digest.update(name.encode() + weight.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
