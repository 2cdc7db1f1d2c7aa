"""What was found in an image: masks with scores, boxes and labels; as COCO, RLE, label map and cut-out.

Needs numpy, PIL and pycocotools only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from ..model.run_lengths_efficientsam import mask_to_rle
from .formats.annotation_files import coco_annotations, label_studio_task, labelme_file, yolo_file
from .formats.polygons import EDITABLE_TOLERANCE, polygons_of_mask


class RleMasks(Sequence):
    """
    Masks `[N, height, width]`, bool, that are kept as compressed COCO RLE and decoded one at a time: all masks of a
    large image together may not fit into memory. `np.asarray` makes an array of them.

    Args:
        rles: N of them, `{"size": [height, width], "counts": str}`.
        size: height and width.
    """

    def __init__(self, rles: list[dict], size: tuple[int, int]):
        self.rles = rles
        self.shape = (len(rles), *size)

    def __len__(self) -> int:
        return len(self.rles)

    def __getitem__(self, index: int | slice) -> "np.ndarray | RleMasks":
        if isinstance(index, slice):
            return RleMasks(self.rles[index], self.shape[1:])
        return coco_mask.decode(self.rles[index]).view(bool)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        masks = np.empty(self.shape, dtype=dtype or bool)
        for i, mask in enumerate(self):
            masks[i] = mask
        return masks


@dataclass(frozen=True)
class SegmentationResult:
    """
    N objects of one image. Coordinates are pixels of the upright image, x to the right and y down; the right and
    bottom edges of a box are exclusive.

    Attributes:
        masks: `[N, height, width]`, bool: an array, or [`RleMasks`], which need less memory.
        scores: `[N]`, float32, 0 to 1, the confidence that there is an object: a detector's score, the mean saliency
            of its pixels, or, where points and boxes were given, `iou_scores`.
        iou_scores: `[N]`, float32: the model's own estimate of each mask's IoU with the ground truth.
        boxes: `[N, 4]`, float32, (x1, y1, x2, y2): the box that was the prompt, or else the tight box around the mask
            (zeros if that is empty).
        labels: N names.

    Raises:
        ValueError: if these are not N of each.
    """

    masks: np.ndarray | RleMasks
    scores: np.ndarray
    iou_scores: np.ndarray
    boxes: np.ndarray
    labels: list[str] = field(default_factory=list)

    def __post_init__(self):
        counts = {name: len(getattr(self, name)) for name in ("masks", "scores", "iou_scores", "boxes", "labels")}
        if len(set(counts.values())) > 1:
            raise ValueError(f"A result has one of each for every object, not {counts}.")

    def __len__(self) -> int:
        return len(self.masks)

    def rles(self) -> list[dict]:
        """The masks as compressed COCO RLE, `{"size": [height, width], "counts": str}`."""
        return self.masks.rles if isinstance(self.masks, RleMasks) else mask_rles(self.masks)

    def label_map(self) -> Image.Image:
        """At each pixel the number of its object, from 1: of the smallest where masks overlap, 0 where none is."""
        return draw_label_map(self.masks, [int(mask.sum()) for mask in self.masks], self.masks.shape[1:])

    def cut_out(self, image: Image.Image) -> Image.Image:
        """The objects on a transparent background: RGBA of the size of `image`, the upright image."""
        cut = image.convert("RGB")
        cut.putalpha(self.union())
        return cut

    def union(self) -> Image.Image:
        """A gray image, 255 where any object is and 0 elsewhere."""
        union = np.zeros(self.masks.shape[1:], dtype=bool)
        for mask in self.masks:
            union |= mask
        return Image.fromarray(union.astype(np.uint8) * 255)

    def polygons(self, tolerance: float = 0.0) -> list[list[np.ndarray]]:
        """
        Of each object its parts as polygons, float32 `[n, 2]` in pixels, along the edges of the pixels, with bridges
        to holes; see `polygons_of_mask`.

        Args:
            tolerance: largest distance in pixels of a corner that is left out; 0 is exact.
        """
        return [polygons_of_mask(mask, tolerance) for mask in self.masks]

    @property
    def categories(self) -> list[str]:
        """The different labels, sorted; the number of a class is its place here."""
        return sorted(set(self.labels))

    def coco(self, file_name: str) -> dict:
        """
        A COCO dataset of the one image: `images`, `annotations` (compressed RLE; `bbox` is tight, `[x, y, width,
        height]`; `score` and `predicted_iou`) and a category for each different label. Empty masks are left out.
        """
        height, width = self.masks.shape[1:]
        numbers = [self.categories.index(label) + 1 for label in self.labels]
        annotations = coco_annotations(self.rles(), numbers, self.scores, self.iou_scores)
        return {
            "images": [{"id": 1, "file_name": file_name, "height": height, "width": width}],
            "annotations": [{"id": i, "image_id": 1, **one} for i, one in enumerate(annotations, start=1)],
            "categories": [{"id": i, "name": name} for i, name in enumerate(self.categories, start=1)],
        }

    def yolo(self, tolerance: float = EDITABLE_TOLERANCE, categories: Sequence[str] | None = None) -> str:
        """
        A YOLO segmentation label file: a line for each object that is not empty, its parts joined by bridges.

        Args:
            tolerance: see `polygons`.
            categories: the names of a dataset's classes in order; by default `categories`.

        Raises:
            ValueError: if an object's label is not among them.
        """
        names = list(self.categories if categories is None else categories)
        if unknown := set(self.labels) - set(names):
            raise ValueError(f"The label {min(unknown)!r} is not among the categories; add it.")
        height, width = self.masks.shape[1:]
        classes = [names.index(label) for label in self.labels]
        return yolo_file(self.polygons(tolerance), classes, width, height)

    def labelme(self, file_name: str, tolerance: float = EDITABLE_TOLERANCE) -> dict:
        """What labelme's json beside the image `file_name` holds; see `polygons` for the tolerance."""
        height, width = self.masks.shape[1:]
        return labelme_file(self.polygons(tolerance), self.labels, file_name, width, height)

    def label_studio(self, image: str, tolerance: float = EDITABLE_TOLERANCE) -> dict:
        """A Label Studio task of the image at this URL or path, with the objects as a prediction of polygons."""
        height, width = self.masks.shape[1:]
        return label_studio_task(self.polygons(tolerance), self.labels, self.scores, image, width, height)

    def to_supervision(self):
        """
        `supervision.Detections` of the objects, with masks, scores and classes.

        Raises:
            ImportError: if supervision is not installed.
        """
        from supervision import Detections  # heavy, and only wanted by those who have it

        return Detections(
            xyxy=np.asarray(self.boxes, dtype=np.float32).reshape(-1, 4),
            mask=np.asarray(self.masks),
            confidence=self.scores,
            class_id=np.array([self.categories.index(label) for label in self.labels], dtype=int),
            data={"class_name": np.array(self.labels, dtype=str), "predicted_iou": self.iou_scores},
        )

    def to_fiftyone(self):
        """
        `fiftyone.Detections` of the objects that are not empty: relative boxes with the mask inside each.

        Raises:
            ImportError: if fiftyone is not installed.
        """
        import fiftyone  # heavy, and only wanted by those who have it

        height, width = self.masks.shape[1:]
        detections = []
        for mask, score, iou, label in zip(self.masks, self.scores, self.iou_scores, self.labels, strict=True):
            if mask.any():
                left, top, right, bottom = boxes_from_masks_np(mask[None])[0].astype(int).tolist()
                box = [left / width, top / height, (right - left) / width, (bottom - top) / height]
                inside = mask[top:bottom, left:right]
                scores = {"confidence": float(score), "predicted_iou": float(iou)}
                detections.append(fiftyone.Detection(label=label, bounding_box=box, mask=inside, **scores))
        return fiftyone.Detections(detections=detections)


def mask_rles(masks: np.ndarray) -> list[dict]:
    """`[N, height, width]`, bool -> N compressed COCO RLEs with text in place of bytes, as json needs it."""
    return [coco_encode_rle(mask_to_rle(mask)) for mask in masks]  # a fourth of the time of pycocotools' own


def coco_encode_rle(uncompressed_rle: dict) -> dict:
    """An uncompressed COCO RLE -> a compressed one, with text in place of bytes, as json needs it."""
    rle = coco_mask.frPyObjects(uncompressed_rle, *uncompressed_rle["size"])
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def draw_label_map(masks: Sequence[np.ndarray], areas: Sequence[int], size: tuple[int, int]) -> Image.Image:
    """
    A gray image of `size` (height, width) with the number, from 1, of the smallest mask at each pixel, and 0 where
    there is none; 8 bits a pixel for up to 255 masks, else 16.

    Args:
        masks: bool `[height, width]` each.
        areas: their numbers of pixels.

    Raises:
        ValueError: more masks than 16 bits count.
    """
    if len(areas) > 65535:
        raise ValueError(f"a label map counts up to 65535 masks, not {len(areas)}; raise the thresholds.")
    labels = np.zeros(size, dtype=np.uint8 if len(areas) < 256 else np.uint16)
    for i in largest_first(areas):
        labels[masks[i]] = i + 1
    return Image.fromarray(labels)


def largest_first(areas: Sequence[int]) -> list[int]:
    """Indices sorted by area, largest first: painted in this order, small masks stay visible."""
    return sorted(range(len(areas)), key=lambda i: -areas[i])


def boxes_from_masks_np(masks: np.ndarray | RleMasks) -> np.ndarray:
    """
    Tight boxes of masks `[N, height, width]`, bool -> `[N, 4]`, float32, (x1, y1, x2, y2) in pixels, right and bottom
    exclusive; zeros for an empty mask. The same for tensors: `boxes_from_masks` of training/masks/prompts.py.
    """
    boxes = np.zeros((len(masks), 4), dtype=np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


__all__ = [
    "RleMasks",
    "SegmentationResult",
    "boxes_from_masks_np",
    "coco_encode_rle",
    "draw_label_map",
    "largest_first",
    "mask_rles",
]
