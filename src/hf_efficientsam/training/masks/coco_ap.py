"""AP, as COCO and LVIS count it: of a detector, and of a promptable model's masks on a detector's boxes."""

import json
import math
from collections import Counter, defaultdict
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import compress
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from PIL import Image
from pycocotools import mask as rle_codec

from hf_efficientsam.training.data.coco import CocoMasks, to_rle
from hf_efficientsam.training.data.reading import read_headers, refuse_if_any, say_what_is_read

from .evaluation import masks_at_once
from .metrics import filled_box, mask_iou
from .predictors import ImagePredictor

CANDIDATES = {
    "box_iou": "the one with the highest IoU with the filled box",
    "confidence": "the one with the highest predicted IoU",
}
PROTOCOL = (
    "Every detection's box asks for a mask; of the candidates {candidate} is scored, with the detection's own score "
    "and category. {kind} AP of masks through faster-coco-eval; the area of a detection is that of its mask, and "
    "{max_detections} are counted."
)
COCO_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
# Where they stand in the evaluator's list; places 7 and 8 are for numbers of detections that LVIS has not.
LVIS_NAMES = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "APr": 14, "APc": 15, "APf": 16}
LVIS_NAMES |= {"AR300": 6, "ARs": 9, "ARm": 10, "ARl": 11}
LVIS_DETECTIONS = 300  # an image, of all categories together


class Truth(CocoMasks):
    """All images of a json, with masks or without, to measure predictions by; `dataset[i]` is a `Sample` whose masks
    are those that must be found.

    Args:
        annotations: COCO-style json with the true masks; it is LVIS's if its images have `neg_category_ids`.
        images: the folder of the images; by default `images` beside the annotations.
        limit: only the first so many images of the annotations.
        crowds: "keep" makes objects of crowds, which else are neither missed nor found, as COCO counts.

    Raises ValueError or FileNotFoundError, with one sentence, for files that are not there, broken, or do not fit, and
    where masks are drawn on an image that is not upright, as boxes of detections would be, too.
    """

    def __init__(self, annotations: str, images: str | None = None, limit: int | None = None, crowds: str = "auto"):
        self._read(annotations, images, limit, crowds)
        by_image = defaultdict(list)
        for annotation in self.truth["annotations"]:
            if not annotation["iscrowd"]:
                by_image[annotation["image_id"]].append(annotation)
        self.records = self.evaluated
        own = [by_image[record["id"]] for record in self.records]
        self.rles = [[annotation["segmentation"] for annotation in annotations] for annotations in own]
        self.annotation_ids = [[annotation["id"] for annotation in annotations] for annotations in own]
        self._find_upright()

    def _find_upright(self) -> None:
        """The files of the images, which must be upright for the masks."""
        self.files = self._find(self.records)
        headers = read_headers(self.files, str(self.annotations))
        turned = [orientation > 1 for orientation in self._orientations(self.records, self.files, headers, None)]
        refuse_if_any(
            compress(self.files, turned), f"Masks of {self.annotations} lie as images are before EXIF turns them"
        )

    def _read(self, annotations: str, images: str | None, limit: int | None, crowds: str = "auto") -> None:
        # AP is COCO's, which trusts the marks.
        self.truth = self._open(annotations, images, "skip" if crowds == "auto" else crowds, "val")
        crowds = Counter({"crowds": sum(one["iscrowd"] for one in self.truth["annotations"])})
        kept = f"{len(self.truth['images'])} images with {len(self.truth['annotations']) - crowds.total()} masks"
        say_what_is_read(annotations, kept, crowds)
        self.is_lvis = any("neg_category_ids" in record for record in self.truth["images"])
        _complete(self.truth, self.annotations, self.is_lvis)
        self.evaluated = self.truth["images"][:limit]

    def mask_ap(self, results: list[dict]) -> dict[str, float | None]:
        """AP and AR of results by their usual names; None where there is no such object."""
        return self._ap(results, "segm")

    def box_ap(self, results: list[dict]) -> dict[str, float | None]:
        """The same of their boxes."""
        return self._ap(results, "bbox")

    def _ap(self, results: list[dict], kind: str) -> dict[str, float | None]:
        images = {record["id"] for record in self.evaluated}
        annotations = [one for one in self.truth["annotations"] if one["image_id"] in images]
        truth = COCO({**self.truth, "images": self.evaluated, "annotations": annotations})
        found = truth.loadRes([dict(result) for result in results])
        evaluation = COCOeval_faster(truth, found, kind, lvis_style=self.is_lvis)
        if self.is_lvis:
            evaluation.params.maxDets = [LVIS_DETECTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        names = LVIS_NAMES if self.is_lvis else {name: place for place, name in enumerate(COCO_NAMES)}
        values = {name: float(evaluation.all_stats[place]) for name, place in names.items()}
        return {name: None if value == -1 else value for name, value in values.items()}


@dataclass(frozen=True)
class DetectionSample:
    """An RGB image with the boxes [N,4] (left, top, right, bottom) of the detections that stand at `numbers`."""

    image: Image.Image
    boxes: torch.Tensor
    numbers: list[int]


class Detections(Truth):
    """The images on which a detector found something; `dataset[i]` is a `DetectionSample`.

    Args:
        annotations, images, limit: see `Truth`.
        path: json file with a flat list of `{image_id, category_id, bbox [x, y, width, height], score}`.

    Raises ValueError or FileNotFoundError as `Truth` does.
    """

    def __init__(
        self, annotations: str, path: str, images: str | None = None, limit: int | None = None, crowds: str = "auto"
    ):
        self._read(annotations, images, limit, crowds)
        self.detections = _read_detections(path, self.truth, annotations)
        by_image = defaultdict(list)
        for number, detection in enumerate(self.detections):
            by_image[detection["image_id"]].append(number)
        if self.is_lvis:
            for numbers in by_image.values():
                best = sorted(numbers, key=lambda number: -self.detections[number]["score"])
                numbers[:] = sorted(best[:LVIS_DETECTIONS])
        self.records = [record for record in self.evaluated if record["id"] in by_image]
        self.numbers = [by_image[record["id"]] for record in self.records]
        self._find_upright()
        self.rles = self.annotation_ids = [[] for _ in self.records]  # the images' masks are in `truth`

    def __getitem__(self, index: int) -> DetectionSample:
        numbers = self.numbers[index]
        boxes = torch.tensor([self.detections[number]["bbox"] for number in numbers], dtype=torch.float64)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).float()
        return DetectionSample(super().__getitem__(index).image, boxes, numbers)

    def protocol(self, candidate: str) -> str:
        most = (
            f"{LVIS_DETECTIONS} detections of an image" if self.is_lvis else "100 detections of a category and image"
        )
        kind = "LVIS" if self.is_lvis else "COCO"
        return PROTOCOL.format(candidate=CANDIDATES[candidate], kind=kind, max_detections=most)

    def results(self, rles: dict[int, dict]) -> list[dict]:
        """COCO's results format: the detections whose mask is among `rles`, by their number, in the file's order."""
        # Without the boxes: a result with `bbox` would have the box's area.
        return [
            {name: self.detections[number][name] for name in ("image_id", "category_id")}
            | {"segmentation": rles[number], "score": self.detections[number]["score"]}
            for number in sorted(rles)
        ]


def choose(candidates: torch.Tensor, scores: torch.Tensor, boxes: torch.Tensor, candidate: str) -> torch.Tensor:
    """Of M candidates [N,M,H,W] with predicted IoU [N,M] for boxes [N,4] the one that is scored, [N,H,W]."""
    if candidate == "box_iou":
        scores = mask_iou(candidates, filled_box(boxes, *candidates.shape[-2:]).to(candidates.device)[:, None])
    return candidates[torch.arange(len(candidates)), scores.argmax(1)]


def segment_detections(
    predict: ImagePredictor, sample: DetectionSample, size: tuple[int, int], candidate: str, prompts_at_once: int = 64
) -> list[np.ndarray]:
    """
    Masks for an image's detections.

    Args:
        predict: what masks of the image are asked from.
        sample: whose image is not needed.
        size: height and width of the image.
        candidate: which of `CANDIDATES`.
        prompts_at_once: masks that are asked for together, at most.

    Returns:
        Arrays uint8 [n,W,H] of 0 and 1, column by column as run-length code is.
    """
    parts = []
    for boxes in sample.boxes.split(masks_at_once(*size, prompts_at_once)):
        candidates, scores, _ = predict(input_boxes=boxes)
        chosen = choose(candidates, scores, boxes, candidate)
        parts.append(chosen.transpose(1, 2).to(torch.uint8).contiguous().cpu().numpy())
    return parts


class RleEncoder:
    """Masks to compressed RLE, in `num_workers` processes if there are any.

    Packed to bits on the way, a mask of 500 x 375 pixels costs the main process 0.12 ms in place of the 0.7 ms of
    encoding it; sent as bytes it would cost more than its encoding.
    """

    def __init__(self, num_workers: int):
        self.pool = ProcessPoolExecutor(num_workers, get_context("spawn")) if num_workers else None

    def __call__(self, masks: np.ndarray) -> Future:
        """A promise of the RLEs of masks [N,W,H]."""
        if self.pool is not None:
            return self.pool.submit(_encode_bits, np.packbits(masks), masks.shape)
        done = Future()
        done.set_result(encode_masks(masks))
        return done

    def __enter__(self) -> "RleEncoder":
        return self

    def __exit__(self, *error) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def encode_masks(masks: np.ndarray) -> list[dict]:
    """Masks uint8 [N,W,H] -> COCO RLEs, as they can be written to json."""
    return [rle | {"counts": rle["counts"].decode()} for rle in rle_codec.encode(masks.transpose(2, 1, 0))]


def _encode_bits(bits: np.ndarray, shape: tuple[int, int, int]) -> list[dict]:
    return encode_masks(np.unpackbits(bits, count=math.prod(shape)).reshape(shape))


# ------------------------------------------------------------------------------------------ reading


def _complete(truth: dict, path: Path, is_lvis: bool) -> None:
    """Makes what the evaluator needs of the annotations: masks as RLE, box, area, iscrowd and ids that are not 0."""
    records = {record["id"]: record for record in truth["images"]}
    for number, annotation in enumerate(truth["annotations"], start=1):
        try:
            size = [records[annotation["image_id"]][side] for side in ("height", "width")]
            empty = {"size": size, "counts": [math.prod(size)]}
            rle = to_rle(annotation["segmentation"], *size) or to_rle(empty, *size)
            annotation["category_id"]
        except Exception as error:  # damaged masks make pycocotools raise nearly anything
            name = f"annotation {annotation.get('id')} of {path}"
            raise ValueError(f"{name} cannot be read ({error!r}); repair or remove it.") from error
        annotation |= {"segmentation": rle, "id": number}
        annotation.setdefault("area", float(rle_codec.area(rle)))
        annotation.setdefault("bbox", rle_codec.toBbox(rle).tolist())
    ids = sorted({annotation["category_id"] for annotation in truth["annotations"]})
    truth.setdefault("categories", [{"id": number} for number in ids])
    if is_lvis and not all("frequency" in category for category in truth["categories"]):
        raise ValueError(f"{path} is LVIS's but has categories without `frequency`; download it again.")


def _read_detections(path: str, truth: dict, annotations: str) -> list[dict]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file of detections {path}; check the path.")
    try:
        detections = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid json ({error}); export it again.") from error
    form = "a flat list of {image_id, category_id, bbox [x, y, width, height], score}"
    if not isinstance(detections, list) or not all(isinstance(one, dict) for one in detections):
        raise ValueError(f"{path} does not hold detections: it must be {form}.")
    if not detections:
        raise ValueError(f"{path} has no detections; it must be {form}.")
    images = {record["id"] for record in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    for number, detection in enumerate(detections):
        name = f"Detection {number} of {path}"
        if missing := {"image_id", "category_id", "bbox", "score"} - detection.keys():
            raise ValueError(f"{name} has no {', '.join(sorted(missing))}; the file must be {form}.")
        box = detection["bbox"]
        numbers = [*box, detection["score"]] if isinstance(box, list) else []
        if len(numbers) != 5 or not all(isinstance(n, int | float) and abs(n) < 1e30 for n in numbers):
            raise ValueError(
                f"{name} needs four numbers as bbox and one as score, but has {box}, {detection['score']}."
            )
        if min(box[2:]) < 0:
            raise ValueError(f"{name} has the bbox {box} of negative size; it must be [x, y, width, height].")
        for what, known in (("image_id", images), ("category_id", categories)):
            if not isinstance(detection[what], int | float | str) or detection[what] not in known:
                raise ValueError(f"{name} has the {what} {detection[what]}, which {annotations} lacks; give its own.")
    return detections
