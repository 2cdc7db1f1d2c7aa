"""Writes a COCO-style json of some of another one's images, to train on: those of certain sources, or an even sample.

    python training/filter_annotations.py --annotations ../shared/data/train-seg/instances_train.json \
        --sources clothing-co-parsing oxford-iiit-pet feral-cat --limit 200 --output runs/salient/instances.json

Or only the masks of a teacher's pseudo-labels, the json of `efficientsam everything`, that it is sure of:

    python training/filter_annotations.py --annotations runs/found/instances.json --images photographs \
        --min_predicted_iou 0.7 --output runs/pseudo/instances.json

A source is the `source` of an image's record. Beside the output a link `images` leads to the images of the input.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from hf_efficientsam.training.data.coco_json import find_folder, read_json
from hf_efficientsam.training.engine.config import OutputFile, PositiveInt, check_ranges, parse_config
from hf_efficientsam.training.engine.run import run_script


@dataclass(frozen=True)
class FilterConfig:
    annotations: str = field(
        default="", metadata={"help": "COCO-style json file, its images where `--train` finds them"}
    )
    images: str | None = field(default=None, metadata={"help": "folder of its images, if they are elsewhere"})
    output: OutputFile = field(default="", metadata={"help": "json file to write, in a folder of its own"})
    sources: list[str] = field(default_factory=list, metadata={"help": "only images of these; by default of all"})
    limit: PositiveInt | None = field(default=None, metadata={"help": "so many of them at most, evenly spread"})
    min_predicted_iou: float = field(
        default=0.0, metadata={"help": "only masks that `efficientsam everything` gave at least this predicted IoU"}
    )


def choose_images(images: list[dict], sources: list[str], limit: int | None) -> list[dict]:
    """The records of images of these sources (none: of all), every k-th if there are more than `limit`."""
    known = {image.get("source") for image in images}
    if unknown := set(sources) - known:
        raise ValueError(
            f"--sources {min(unknown)}: no image has this source; choose of {', '.join(sorted(map(str, known)))}."
        )
    chosen = [image for image in images if not sources or image.get("source") in sources]
    count = min(len(chosen), limit or len(chosen))
    return [chosen[number * len(chosen) // count] for number in range(count)]


def choose_masks(annotations: list[dict], numbers: set, min_predicted_iou: float) -> list[dict]:
    """The annotations of images with these numbers, and of those the ones with this predicted IoU or more."""
    chosen = [annotation for annotation in annotations if annotation["image_id"] in numbers]
    if not min_predicted_iou:
        return chosen
    if any("predicted_iou" not in annotation for annotation in chosen):
        raise ValueError("--min_predicted_iou: the json has masks without predicted_iou; leave the option out.")
    return [annotation for annotation in chosen if annotation["predicted_iou"] >= min_predicted_iou]


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(FilterConfig, __doc__, arguments)
    if not config.annotations or not config.output:
        raise ValueError("Give --annotations a COCO-style json file and --output the name of another.")
    check_ranges(config)
    source, output = Path(config.annotations), Path(config.output)
    content = read_json(source)
    folder = Path(config.images) if config.images else find_folder(source, content["images"])
    link, images = output.parent / "images", folder.resolve()
    if link.exists() and link.resolve() != images:
        raise ValueError(f"{link} is there and is not {images}; choose --output in a folder of its own.")
    chosen = choose_images(content["images"], config.sources, config.limit)
    numbers = {image["id"] for image in chosen}
    annotations = choose_masks(content["annotations"], numbers, config.min_predicted_iou)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**content, "images": chosen, "annotations": annotations}))
    if not link.exists():
        link.symlink_to(images)
    print(f"{output}: {len(chosen)} images, {len(annotations)} masks")


if __name__ == "__main__":
    run_script("filter_annotations", main)
