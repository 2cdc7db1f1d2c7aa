"""One visitor's image and the objects in it, apart from the web page: clicks in, drawings and masks out.

Coordinates are pixels of the upright image, x to the right and y down from the top left corner, or ratios of its width
and height. While a visitor clicks, masks have the size of the image on the page; only `Session.result` makes them at
the size of the image. Everything that can be undone is in a `Scene`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from threading import Event, Lock
from time import perf_counter

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from hf_efficientsam.inference.drawing import draw_masks
from hf_efficientsam.inference.mask_generation import EfficientSamMaskGenerator
from hf_efficientsam.inference.predictor import EfficientSamPredictor
from hf_efficientsam.inference.prompt_files import check_objects
from hf_efficientsam.inference.results import RleMasks, SegmentationResult, boxes_from_masks_np, mask_rles
from hf_efficientsam.model.prompts_efficientsam import BOX_IS_CLIPPED, clip_box

from .scene import Finding, Scene, SceneObject

SHOWN_SIDE = 1024  # pixels: the longer side of the image on the page
PREVIEW_SIDE = 512
THUMBNAIL_SIDE = 112
MAX_STEPS_BACK = 200


class NothingFound(ValueError):
    """A search that ended without an object."""


def no_report(ratio: float) -> None:
    """For callers that do not ask how far something is."""


class WatchedGenerator(EfficientSamMaskGenerator):
    """
    Segment everything on the image that a predictor has encoded; it calls `report` with the ratio done (0 to 1) before
    each batch of points, which are the first half, and each mask.
    """

    def __init__(self, predictor: EfficientSamPredictor, report: Callable[[float], None], **options):
        super().__init__(predictor.model, predictor.processor, output_mode="coco_rle", **options)
        self.predictor, self.report = predictor, report
        self.most_points, self.most_masks, self.finished = 1, 0, 0

    def embed(self, crops: list, batch_size: int) -> Iterator[tuple]:
        yield self.predictor.features, self.predictor.input_size

    def predict(self, embedding: torch.Tensor, points: torch.Tensor, *shared) -> tuple:
        """Called with the points that are left."""
        self.most_points = max(self.most_points, len(points))
        self.report(0.5 * (1 - len(points) / self.most_points))
        return super().predict(embedding, points, *shared)

    def finish(self, masks: list, image_size: tuple[int, int]) -> list[dict]:
        self.most_masks = len(masks)
        return super().finish(masks, image_size)

    def enlarge(self, *mask) -> tuple:
        """Called once for each mask, and for none that a better one covers."""
        self.report(0.5 + 0.5 * self.finished / self.most_masks)
        self.finished += 1
        return super().enlarge(*mask)


class Session:
    """
    One visitor's image, objects, and steps to undo.

    Args:
        predictor: for this visitor alone; it may share its model with others.
        checkpoint: its directory or Hub name, for `code`; `None` is the bundled one.
        file_name: of the image.
        image: as the predictor takes it.
        reduced_from: width and height of the file's image, if `image` is smaller.

    Attributes:
        lock: held while the session is read or changed: clicks may come faster than answers.
        stopping: set when the visitor wants no answer to what takes long.
        shown: the image as the page shows it.

    Raises:
        ValueError: an image that the predictor refuses. Methods that take prompts raise it for wrong prompts.
    """

    def __init__(
        self,
        predictor: EfficientSamPredictor,
        checkpoint: str | None,
        file_name: str,
        image,
        reduced_from: tuple[int, int] | None = None,
    ):
        self.predictor, self.checkpoint, self.file_name = predictor, checkpoint, file_name
        self.reduced_from = reduced_from
        self.lock, self.stopping = Lock(), Event()
        self.scene, self.past, self.future = Scene(), [], []
        self.notice = ""  # a sentence about the last prompt, if it was not taken as it was given
        start = perf_counter()
        predictor.set_image(image)
        self.encode_seconds, self.answer_seconds = perf_counter() - start, None
        self.height, self.width = predictor.original_size
        self.shown = predictor.image.copy()
        self.shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))

    # ---------------------------------------------------------------------------------------------- steps

    @property
    def objects(self) -> tuple[SceneObject, ...]:
        return self.scene.objects

    @property
    def current(self) -> SceneObject | None:
        return self.objects[self.scene.current] if self.scene.current < len(self.objects) else None

    def _step(self, scene: Scene) -> None:
        if scene != self.scene:
            self.past = [*self.past, self.scene][-MAX_STEPS_BACK:]
            self.scene, self.future = scene, []

    def undo(self) -> None:
        if self.past:
            self.future.append(self.scene)
            self.scene = self.past.pop()

    def redo(self) -> None:
        if self.future:
            self.past.append(self.scene)
            self.scene = self.future.pop()

    def clear(self) -> None:
        self._step(Scene())

    # ---------------------------------------------------------------------------------------------- objects

    def select(self, index: int) -> None:
        """Later clicks go to this object; `len(objects)`: to a new one."""
        self.scene = replace(self.scene, current=min(max(0, index), len(self.objects)), corner=None)

    def select_at(self, x: float, y: float) -> None:
        """Selects the smallest object at a place, given as for `add_point`; none there: nothing happens."""
        column, row = self._pixel(x, y, self.shown.size)
        areas = {i: coco_mask.area(one.candidates[one.chosen]) for i, one in enumerate(self.objects) if one.candidates}
        if here := [i for i in areas if self.objects[i].mask()[row, column]]:
            self.select(min(here, key=areas.get))

    def rename(self, name: str, index: int) -> None:
        """Names object `index`, if there is such an object."""
        if 0 <= index < len(self.objects) and (name := " ".join(name.split())[:40]):
            named = self._with(replace(self.objects[index], name=name), index)
            self._step(replace(named, current=self.scene.current, corner=self.scene.corner))

    def remove(self) -> None:
        index = self.scene.current
        objects = self.objects[:index] + self.objects[index + 1 :]
        self._step(Scene(objects, min(index, max(0, len(objects) - 1))))

    def choose(self, candidate: int) -> None:
        if self.current is not None and 0 <= candidate < len(self.current.candidates):
            self._step(self._with(replace(self.current, chosen=candidate), self.scene.current))

    def _with(self, one: SceneObject, index: int) -> Scene:
        """The scene with `one` in place of an object, or after the last."""
        return Scene((*self.objects[:index], one, *self.objects[index + 1 :]), index)

    # ---------------------------------------------------------------------------------------------- prompts

    def add_point(self, x: float, y: float, label: int = 1) -> None:
        """A point at the ratio `x` of the width and `y` of the height (0 to 1), on the object (1) or not (0)."""
        self._answer(*self._with_point(x, y, label))

    def preview(self, x: float, y: float) -> tuple[np.ndarray, int]:
        """
        What a point on the object there would give: the mask, bool, at most `PREVIEW_SIDE` high and wide, and the
        index of its object. Nothing is changed.
        """
        one, index = self._with_point(x, y, 1)
        scale = min(1, PREVIEW_SIDE / max(self.height, self.width))
        size = [max(1, round(scale * side)) for side in (self.height, self.width)]
        masks, scores, _ = self.predictor.predict(**one.prompts(), mask_size=size)
        return masks[scores.argmax()], index

    def set_box(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """A new object in a box between two corners, given as for `add_point`, in any order."""
        left, right = sorted(round(x * self.width) for x in (x1, x2))
        top, bottom = sorted(round(y * self.height) for y in (y1, y2))
        given = [left, top, right, bottom]
        left, top, right, bottom = box = clip_box(given, self.width, self.height)
        if left == right or top == bottom:
            raise ValueError("a box needs two corners that differ in x and in y.")
        self._answer(SceneObject(box=tuple(box)), len(self.objects))
        self.notice = "" if box == given else BOX_IS_CLIPPED

    def add_corner(self, x: float, y: float) -> None:
        """One corner of a box; every second call makes the box."""
        if self.scene.corner is None:
            self._step(replace(self.scene, corner=(x, y)))
        else:
            self.set_box(*self.scene.corner, x, y)

    def _pixel(self, x: float, y: float, size: tuple[int, int]) -> tuple[int, int]:
        return tuple(min(max(0, int(ratio * side)), side - 1) for ratio, side in zip((x, y), size, strict=True))

    def _with_point(self, x: float, y: float, label: int) -> tuple[SceneObject, int]:
        """The marked object with one more point, and its index. What was found without prompts takes none."""
        one, index = self.current, self.scene.current
        if one is None or one.finding is not None:
            one, index = SceneObject(), len(self.objects)
        point = self._pixel(x, y, (self.width, self.height))
        return replace(one, points=(*one.points, point), labels=(*one.labels, int(label))), index

    def _answer(self, one: SceneObject, index: int) -> None:
        start = perf_counter()
        candidates, scores = (), ()
        if 1 in one.labels or one.box is not None:  # background points alone are no prompt
            check_objects([vars(one)], (self.width, self.height), self.predictor.model, self.predictor.processor)
            masks, scores, _ = self.predictor.predict(**one.prompts(), mask_size=self.shown.size[::-1])
            candidates, scores = tuple(mask_rles(masks)), tuple(scores.clip(0, 1).tolist())
        chosen = int(np.argmax(scores)) if scores else 0
        self._step(self._with(replace(one, candidates=candidates, scores=scores, chosen=chosen), index))
        self.answer_seconds = perf_counter() - start

    # ---------------------------------------------------------------------------------------------- findings

    def find_everything(self, report: Callable[[float], None] = no_report, **options) -> None:
        """
        Finds all objects, which replace those there.

        Args:
            report: is called with the ratio done; what it raises ends the search.
            options: as of [`EfficientSamMaskGenerator`].
        """
        start = perf_counter()
        records = WatchedGenerator(self.predictor, report, **options).generate(self.predictor.image)
        report(1)
        rles = [record["segmentation"] for record in records]
        scores = [record["predicted_iou"] for record in records]
        self._take(Finding("everything", options), rles, scores, scores, ["object"] * len(rles), start)

    def find(self, finding: Finding, prompter, *question, report: Callable[[float], None] = no_report) -> None:
        """
        Takes what a prompter of `hf_efficientsam.inference.prompters` finds, which replaces the objects there.

        Args:
            finding: how to write it in Python.
            prompter: called with `question`, it returns a [`SegmentationResult`] of the predictor's image.
            report: as of `find_everything`.
        """
        start = perf_counter()
        report(0)
        result = prompter(*question)
        report(1)
        self._take(finding, result.rles(), result.scores, result.iou_scores.tolist(), result.labels, start)

    def _take(self, finding: Finding, rles: list, scores, ious, names: list[str], start: float) -> None:
        objects = [
            SceneObject(
                " ".join(name.split()),
                candidates=tuple(mask_rles(self._on_page(rle)[None])),
                scores=(min(max(0.0, float(score)), 1.0),),
                iou=min(max(0.0, iou), 1.0),
                finding=finding,
                place=i,
                found=rle,
            )
            for i, (rle, score, iou, name) in enumerate(zip(rles, scores, ious, names, strict=True))
            if coco_mask.area(rle)
        ]
        self.answer_seconds = perf_counter() - start
        if not objects:
            raise NothingFound("nothing was found; lower the thresholds, or point at the object.")
        self._step(Scene(tuple(objects), 0))

    def _on_page(self, rle: dict) -> np.ndarray:
        """A mask of the image at the size of the image on the page."""
        return resize_nearest(coco_mask.decode(rle).astype(bool), self.shown.size)

    # ---------------------------------------------------------------------------------------------- outputs

    def result(self, report: Callable[[float], None] = no_report) -> SegmentationResult:
        """The chosen masks of all objects that have one, of the image's size; `report` as of `find_everything`."""
        done, rles = [one for one in self.objects if one.candidates], []
        for one in done:
            report(0.9 * len(rles) / len(done))
            rles.append(one.found or self._full_mask(one))
        masks = RleMasks(rles, (self.height, self.width))
        scores = np.array([one.score for one in done], dtype=np.float32)
        ious = np.array([one.score if one.iou is None else one.iou for one in done], dtype=np.float32)
        boxes = boxes_from_masks_np(masks)
        for box, one in zip(boxes, done, strict=True):
            box[:] = box if one.box is None else one.box
        return SegmentationResult(masks, scores, ious, boxes, [one.name for one in done])

    def _full_mask(self, one: SceneObject) -> dict:
        """The chosen mask at the size of the image, as compressed RLE: decoded once more, which needs no memory."""
        _, _, logits = self.predictor.predict(**one.prompts(), mask_size=(1, 1))
        sizes = [self.predictor.original_size], [self.predictor.input_size]
        masks = self.predictor.processor.post_process_masks([logits[None, [one.chosen]]], *sizes)
        return mask_rles(masks[0][0].numpy())[0]

    def draw(self) -> Image.Image:
        """The image, small enough for a page, with all objects and their prompts."""
        scale = self.shown.width / self.width
        masks = [one.mask() if one.candidates else np.zeros(self.shown.size[::-1], bool) for one in self.objects]
        points = [[(scale * x, scale * y) for x, y in one.points] for one in self.objects]
        labels = [list(one.labels) for one in self.objects]
        boxes = [one.box and tuple(scale * x for x in one.box) for one in self.objects]
        return draw_masks(self.shown, masks, points, labels, boxes)

    def thumbnails(self) -> list[Image.Image]:
        """The candidates of the current object: small images of the part of the image where they are, dark outside."""
        one = self.current
        if one is None or not one.candidates:
            return []
        masks = np.stack([one.mask(i) for i in range(len(one.candidates))])
        left, top, right, bottom = boxes_from_masks_np(masks.any(axis=0)[None])[0].astype(int)
        margin = max(right - left, bottom - top, THUMBNAIL_SIDE // 2) // 4
        box = clip_box([left - margin, top - margin, right + margin, bottom + margin], *self.shown.size)
        part = self.shown.crop(box)
        scale = THUMBNAIL_SIDE / max(part.size)
        small = part.resize([max(1, round(scale * side)) for side in part.size])
        dark = small.point(lambda value: value // 5)
        parts = masks[:, box[1] : box[3], box[0] : box[2]]
        return [Image.composite(small, dark, Image.fromarray(resize_nearest(mask, small.size))) for mask in parts]


def resize_nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`[h, w]`, bool -> the same at another (width, height)."""
    rows, columns = ((np.arange(n) + 0.5) * old / n for n, old in zip(size[::-1], mask.shape, strict=True))
    return mask[np.ix_(rows.astype(int), columns.astype(int))]
