"""Packs the images and masks of COCO-style json files into a few tar files, to train or evaluate on another machine.

    python training/pack_masks.py --annotations my/train/instances.json --size 512 --output_dir runs/pack
    python training/pack_masks.py --annotations ../shared/data/coco-val-dev/instances_val.json --output_dir runs/pack

The images of `FOLDER/instances.json` become `OUTPUT_DIR/FOLDER/FOLDER_000.tar` and so on, in SA-1B's format: whatever
takes `--shards` reads them. With `--size` each image is squashed to that square, as a model's input of this size is,
and its masks with it; without, image files stay as they are, so that masks can be compared at the image's own size.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from hf_efficientsam.training.data.augment import crop_image, large_enough_masks
from hf_efficientsam.training.data.coco import CocoMasks, encode_mask
from hf_efficientsam.training.data.rle_resizing import resize_rles
from hf_efficientsam.training.engine.checkpoints import replaced_folder
from hf_efficientsam.training.engine.config import OutputFolder, PositiveFloat, PositiveInt, check_ranges, parse_config
from hf_efficientsam.training.engine.run import run_script

Record = tuple[str, dict[str, bytes]]  # the key of an image, and its files by their suffix


@dataclass(frozen=True)
class PackConfig:
    annotations: list[str] = field(default_factory=list, metadata={"help": "COCO-style json files, `images` beside"})
    output_dir: OutputFolder = field(default="runs/pack", metadata={"help": "folder of the packed folders"})
    size: PositiveInt | None = field(default=None, metadata={"help": "side of the squashed images in pixels"})
    quality: PositiveInt = field(default=80, metadata={"help": "WebP's, of squashed images"})
    shard_mib: PositiveFloat = field(default=4.0, metadata={"help": "a file has at most so many MiB"})


def check(config: PackConfig) -> None:
    check_ranges(config)
    if not config.annotations:
        raise ValueError("Give --annotations at least one COCO-style json file.")
    if config.quality > 100:
        raise ValueError(f"--quality {config.quality} must be at most 100.")
    names = [folder_name(annotations) for annotations in config.annotations]
    if len(set(names)) < len(names):
        raise ValueError("Two of --annotations lie in folders of the same name, which names their files; rename one.")


def folder_name(annotations: str) -> str:
    return Path(annotations).resolve().parent.name


def squash(image: Image.Image, size: int, quality: int) -> bytes:
    """The image as a square WebP file, resized as at inference."""
    pixels = 255 * crop_image(image, (0, 0, *image.size), size)
    encoded = io.BytesIO()
    squashed = Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())
    squashed.save(encoded, "WEBP", quality=quality, method=6)
    return encoded.getvalue()


def squash_masks(rles: list[dict], size: int) -> list[dict | None]:
    """None in place of a mask of which hardly anything is left."""
    height, width = rles[0]["size"]
    masks = (resize_rles([rle], (0, 0, width, height), size) for rle in rles)
    return [encode_mask(one[0].numpy()) if large_enough_masks(one) else None for one in masks]


def read_records(config: PackConfig, dataset: CocoMasks, name: str) -> Iterator[Record]:
    """The images that have masks, one after the other."""
    for index in tqdm(range(len(dataset)), desc=name, unit="image", mininterval=2):
        sample, path = dataset[index], Path(dataset.files[index])
        if config.size is None:
            image, rles, (width, height) = {path.suffix.lower(): path.read_bytes()}, sample.rles, sample.image.size
        else:
            image = {".webp": squash(sample.image, config.size, config.quality)}
            rles, width, height = squash_masks(sample.rles, config.size), config.size, config.size
        annotations = [
            {"id": number, "segmentation": rle | {"counts": rle["counts"].decode()}}
            for number, rle in zip(sample.annotation_ids, rles, strict=True)
            if rle is not None
        ]
        if annotations:
            record = {"image_id": sample.image_id, "width": width, "height": height}
            text = json.dumps({"image": record, "annotations": annotations})
            yield str(sample.image_id), {**image, ".json": text.encode()}


def full_shards(records: Iterable[Record], limit: float) -> Iterator[list[Record]]:
    """The records in lists whose tar files have at most so many bytes, unless one record alone has more."""
    shard, size = [], tarfile.RECORDSIZE
    for key, files in records:
        added = sum(512 + -(-len(content) // 512) * 512 for content in files.values())  # headers, and whole blocks
        if shard and size + added > limit:
            yield shard
            shard, size = [], tarfile.RECORDSIZE
        shard.append((key, files))
        size += added
    yield shard


def write_shard(path: Path, records: list[Record]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, files in records:
            for suffix, content in files.items():
                info = tarfile.TarInfo(key + suffix)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def pack(config: PackConfig, annotations: str) -> None:
    name, dataset = folder_name(annotations), CocoMasks(annotations)
    if not len(dataset):
        raise ValueError(f"There is no mask in {annotations}; check the file.")
    folder, count = Path(config.output_dir) / name, 0
    with replaced_folder(folder) as writing:
        records = read_records(config, dataset, name)
        for number, shard in enumerate(full_shards(records, config.shard_mib * 2**20)):
            write_shard(writing / f"{name}_{number:03}.tar", shard)
            count += len(shard)
    files = [path.stat().st_size for path in folder.iterdir()]
    print(f"{folder}: {count} images, {sum(files) / 2**20:.1f} MiB in {len(files)} files")


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(PackConfig, __doc__, arguments)
    check(config)
    for annotations in config.annotations:
        pack(config, annotations)


if __name__ == "__main__":
    run_script("pack_masks", main)
