"""One visitor's image and the objects in it, apart from the web page: clicks in; drawings, files and code out.

Coordinates are pixels of the upright image, x to the right and y down from the top left corner. Everything that can be
undone is in a `Scene`, which is immutable: each step makes a new one.
"""

import io
import json
import re
from dataclasses import dataclass, replace
from pathlib import PurePath
from threading import Lock
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from hf_efficientsam.inference.drawing import draw_masks
from hf_efficientsam.inference.mask_generation import EfficientSamMaskGenerator
from hf_efficientsam.inference.predictor import EfficientSamPredictor
from hf_efficientsam.inference.prompt_files import check_objects
from hf_efficientsam.inference.results import RleMasks, SegmentationResult, boxes_from_masks_np, mask_rles
from hf_efficientsam.model.prompts_efficientsam import BOX_IS_CLIPPED, clip_box

SHOWN_SIDE = 1024  # pixels: the longer side of the image on the page
THUMBNAIL_SIDE = 112
MAX_STEPS_BACK = 200

FORMATS = {
    "mask": "Mask",
    "cutout": "Cut-out",
    "labels": "Label map",
    "coco": "COCO",
    "rle": "RLE",
}


# For `Session.code`, how objects are found without clicks: the class, the call, and the expression of mask i.
FOUND_BY = {
    "everything": (
        "EfficientSamMaskGenerator",
        "generator = EfficientSamMaskGenerator(predictor.model, predictor.processor, {options})\n"
        "found = generator.generate(predictor.image)",
        'found[i]["segmentation"]',
    ),
    "salient": ("SalientPrompter", "found = SalientPrompter(predictor, {options})()", "found.masks[i]"),
    "text": ("TextPrompter", "found = TextPrompter(predictor, {options})({question!r})", "found.masks[i]"),
}


class NothingFound(ValueError):
    """A search that ended without an object."""


@dataclass(frozen=True)
class Finding:
    """
    A search that found objects without clicks.

    Attributes:
        method: one of `FOUND_BY`.
        options: arguments of its class, as they are written in Python.
        question: the text that was searched for.
    """

    method: str
    options: dict[str, Any]
    question: str = ""


@dataclass(frozen=True)
class SceneObject:
    """
    An object: its prompts, or its place in a finding, and its candidate masks.

    Attributes:
        name: the visitor's name for it.
        points, labels: (x, y), and 1 on the object or 0 on the background.
        box: (x1, y1, x2, y2), or `None`.
        candidates: compressed RLE of each candidate mask, in the model's order; none before the model has answered.
        scores: their scores.
        chosen: index of the candidate that the visitor has chosen.
        iou: the model's estimate of its mask's IoU, if that is not its score.
        finding, place: what found it, and its number there from 0, if it has no prompts.
    """

    name: str = "object"
    points: tuple[tuple[int, int], ...] = ()
    labels: tuple[int, ...] = ()
    box: tuple[int, int, int, int] | None = None
    candidates: tuple[dict, ...] = ()
    scores: tuple[float, ...] = ()
    chosen: int = 0
    iou: float | None = None
    finding: Finding | None = None
    place: int = 0

    @property
    def score(self) -> float:
        return self.scores[self.chosen]

    def mask(self, candidate: int | None = None) -> np.ndarray:
        """`[height, width]`, bool: the chosen candidate, or another."""
        return coco_mask.decode(self.candidates[self.chosen if candidate is None else candidate]).astype(bool)


@dataclass(frozen=True)
class Scene:
    """
    Attributes:
        objects: all objects.
        current: index of the object that clicks go to; `len(objects)`: the next click begins a new one.
        corner: first corner (x, y) of a box whose second is still missing.
    """

    objects: tuple[SceneObject, ...] = ()
    current: int = 0
    corner: tuple[int, int] | None = None


class Session:
    """
    One visitor's image, objects, and steps to undo.

    Args:
        predictor: for this visitor alone; it may share its model with others.
        checkpoint: its directory or Hub name, for `code`; `None` is the bundled one.
        file_name: of the image.
        image: as the predictor takes it.

    Raises:
        ValueError: an image that the predictor refuses. Methods that take prompts raise it for wrong prompts.
    """

    def __init__(self, predictor: EfficientSamPredictor, checkpoint: str | None, file_name: str, image):
        self.predictor, self.checkpoint, self.file_name = predictor, checkpoint, file_name
        self.lock = Lock()  # held while the session is read or changed: clicks may come faster than answers
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
        column, row = self._pixel(x, y)
        here = [i for i, one in enumerate(self.objects) if one.candidates and one.mask()[row, column]]
        if here:
            self.select(min(here, key=lambda i: coco_mask.area(self.objects[i].candidates[self.objects[i].chosen])))

    def rename(self, name: str) -> None:
        if self.current is not None and (name := " ".join(name.split())[:40]):
            self._step(self._with_current(replace(self.current, name=name)))

    def remove(self) -> None:
        index = self.scene.current
        objects = self.objects[:index] + self.objects[index + 1 :]
        self._step(Scene(objects, min(index, max(0, len(objects) - 1))))

    def choose(self, candidate: int) -> None:
        if self.current is not None and 0 <= candidate < len(self.current.candidates):
            self._step(self._with_current(replace(self.current, chosen=candidate)))

    def _with_current(self, one: SceneObject) -> Scene:
        index = self.scene.current
        return Scene((*self.objects[:index], one, *self.objects[index + 1 :]), index)

    # ---------------------------------------------------------------------------------------------- prompts

    def add_point(self, x: float, y: float, label: int = 1) -> None:
        """A point at the ratio `x` of the width and `y` of the height (0 to 1), on the object (1) or not (0)."""
        one = self._prompted()
        self._answer(replace(one, points=(*one.points, self._pixel(x, y)), labels=(*one.labels, int(label))))

    def set_box(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """A box between two corners, given as for `add_point`, in any order."""
        left, right = sorted(round(x * self.width) for x in (x1, x2))
        top, bottom = sorted(round(y * self.height) for y in (y1, y2))
        given = [left, top, right, bottom]
        left, top, right, bottom = box = clip_box(given, self.width, self.height)
        if left == right or top == bottom:
            raise ValueError("a box needs two corners that differ in x and in y.")
        self._answer(replace(self._prompted(), box=tuple(box)))
        self.notice = "" if box == given else BOX_IS_CLIPPED

    def add_corner(self, x: float, y: float) -> None:
        """One corner of a box; every second call makes the box."""
        if self.scene.corner is None:
            self._step(replace(self.scene, corner=self._pixel(x, y)))
        else:
            column, row = self.scene.corner
            self.set_box((column + 0.5) / self.width, (row + 0.5) / self.height, x, y)

    def _pixel(self, x: float, y: float) -> tuple[int, int]:
        return (
            min(max(0, int(x * self.width)), self.width - 1),
            min(max(0, int(y * self.height)), self.height - 1),
        )

    def _prompted(self) -> SceneObject:
        """The object that prompts are added to: not one that was found without prompts, but a new one instead."""
        if self.current is not None and self.current.finding is not None:
            self.select(len(self.objects))
        return self.current or SceneObject()

    def _answer(self, one: SceneObject) -> None:
        start = perf_counter()
        candidates, scores = (), ()
        if 1 in one.labels or one.box is not None:  # background points alone are no prompt
            check_objects([vars(one)], (self.width, self.height), self.predictor.model, self.predictor.processor)
            masks, scores, _ = self.predictor.predict(**_as_arguments(one))
            candidates, scores = tuple(mask_rles(masks)), tuple(scores.clip(0, 1).tolist())
        chosen = int(np.argmax(scores)) if scores else 0
        self._step(self._with_current(replace(one, candidates=candidates, scores=scores, chosen=chosen)))
        self.answer_seconds = perf_counter() - start

    # ---------------------------------------------------------------------------------------------- findings

    def find_everything(self, **options) -> None:
        """Finds all objects, which replace those there; `options` are those of [`EfficientSamMaskGenerator`]."""
        start = perf_counter()
        model, processor = self.predictor.model, self.predictor.processor
        generator = EfficientSamMaskGenerator(model, processor, output_mode="coco_rle", **options)
        records = generator.generate(self.predictor.image)
        rles = [record["segmentation"] for record in records]
        scores = [record["predicted_iou"] for record in records]
        self._take(Finding("everything", options), rles, scores, scores, ["object"] * len(rles), start)

    def find(self, finding: Finding, prompter, *question) -> None:
        """
        Takes what a prompter of `hf_efficientsam.inference.prompters` finds, which replaces the objects there.

        Args:
            finding: how to write it in `code`.
            prompter: called with `question`, it returns a [`SegmentationResult`] of the predictor's image.
        """
        start = perf_counter()
        result = prompter(*question)
        self._take(finding, result.rles(), result.scores, result.iou_scores.tolist(), result.labels, start)

    def _take(self, finding: Finding, rles: list, scores, ious, names: list[str], start: float) -> None:
        objects = [
            SceneObject(
                " ".join(name.split()),
                candidates=(rle,),
                scores=(min(max(0.0, float(score)), 1.0),),
                iou=min(max(0.0, iou), 1.0),
                finding=finding,
                place=i,
            )
            for i, (rle, score, iou, name) in enumerate(zip(rles, scores, ious, names, strict=True))
            if coco_mask.area(rle)
        ]
        self.answer_seconds = perf_counter() - start
        if not objects:
            raise NothingFound("nothing was found; lower the thresholds, or point at the object.")
        self._step(Scene(tuple(objects), 0))

    # ---------------------------------------------------------------------------------------------- outputs

    def result(self) -> SegmentationResult:
        """The chosen masks of all objects that have one."""
        done = [one for one in self.objects if one.candidates]
        masks = RleMasks([one.candidates[one.chosen] for one in done], (self.height, self.width))
        scores = np.array([one.score for one in done], dtype=np.float32)
        ious = np.array([one.score if one.iou is None else one.iou for one in done], dtype=np.float32)
        boxes = boxes_from_masks_np(masks)
        for box, one in zip(boxes, done, strict=True):
            box[:] = box if one.box is None else one.box
        return SegmentationResult(masks, scores, ious, boxes, [one.name for one in done])

    def draw(self) -> Image.Image:
        """The image, small enough for a page, with all objects and their prompts."""
        scale = self.shown.width / self.width
        masks = [self._shown_mask(one) for one in self.objects]
        points = [[(scale * x, scale * y) for x, y in one.points] for one in self.objects]
        labels = [list(one.labels) for one in self.objects]
        boxes = [one.box and tuple(scale * x for x in one.box) for one in self.objects]
        if self.scene.corner is not None:
            masks.append(np.zeros(self.shown.size[::-1], dtype=bool))
            points, labels, boxes = [*points, [[scale * x for x in self.scene.corner]]], [*labels, [1]], [*boxes, None]
        return draw_masks(self.shown, masks, points, labels, boxes)

    def _shown_mask(self, one: SceneObject, candidate: int | None = None, size=None) -> np.ndarray:
        """A mask at the size of the image on the page, or another (width, height); empty before an answer."""
        width, height = size or self.shown.size
        if not one.candidates:
            return np.zeros((height, width), dtype=bool)
        rows = (np.arange(height) + 0.5) * self.height / height
        columns = (np.arange(width) + 0.5) * self.width / width
        return one.mask(candidate)[np.ix_(rows.astype(int), columns.astype(int))]

    def thumbnails(self) -> list[Image.Image]:
        """The candidates of the current object: small images that are dark outside the mask."""
        one = self.current
        if one is None or not one.candidates:
            return []
        small = self.shown.copy()
        small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        dark = small.point(lambda value: value // 5)
        masks = [self._shown_mask(one, i, small.size) for i in range(len(one.candidates))]
        return [Image.composite(small, dark, Image.fromarray(mask)) for mask in masks]

    def file(self, kind: str) -> tuple[str, bytes]:
        """
        Name and content of a file with all objects; `kind` is one of `FORMATS`.

        Raises:
            ValueError: if there is no object yet.
        """
        result = self.result()
        if not len(result):
            raise ValueError("there is nothing to download yet; click on an object first.")
        stem = re.sub(r"[^\w. -]+", "_", PurePath(self.file_name).stem)
        stem = stem.encode()[:200].decode(errors="ignore") or "picture"  # a file's name has up to 255 bytes
        if kind == "coco":
            return f"{stem}_coco.json", json.dumps(result.coco(self.file_name)).encode()
        if kind == "rle":
            objects = [
                {"label": label, "score": round(float(score), 4), "segmentation": rle}
                for label, score, rle in zip(result.labels, result.scores, result.rles(), strict=True)
            ]
            return f"{stem}_rle.json", json.dumps({"image": self.file_name, "objects": objects}).encode()
        drawings = {
            "mask": result.union,
            "cutout": lambda: result.cut_out(self.predictor.image),
            "labels": result.label_map,
        }
        content = io.BytesIO()
        drawings[kind]().save(content, "PNG")
        return f"{stem}_{kind}.png", content.getvalue()

    def code(self) -> str:
        """Python that makes the masks of `result` from the image's file, as the list `masks`."""
        done = [one for one in self.objects if one.candidates]
        finding = next((one.finding for one in done if one.finding is not None), None)
        tool, ask, mask_of = FOUND_BY[finding.method] if finding else (None, None, None)
        lines = [f"from hf_efficientsam import {', '.join(sorted({'EfficientSamPredictor', tool} - {None}))}", ""]
        lines += [f"predictor = EfficientSamPredictor.from_pretrained({self.checkpoint!r})".replace("(None)", "()")]
        lines += [f"predictor.set_image({self.file_name!r})", "masks = []  # of each object, bool [height, width]"]
        if finding:
            options = ", ".join(f"{name}={value!r}" for name, value in finding.options.items())
            lines += ["", *ask.format(options=options, question=finding.question).splitlines()]
            places = [one.place for one in done if one.finding is not None]
            lines += [f"masks += [{mask_of} for i in {places}]"]
        for i, one in enumerate(done, start=1):
            if one.finding is None:
                arguments = ", ".join(f"{name}={value}" for name, value in _as_arguments(one).items())
                lines += ["", f"# {i}: {one.name}", f"candidates, scores, _ = predictor.predict({arguments})"]
                lines += [f"masks.append(candidates[{one.chosen}])"]
        return "\n".join(lines) + "\n"


def _as_arguments(one: SceneObject) -> dict:
    """An object's prompts as `EfficientSamPredictor.predict` takes them."""
    arguments = {}
    if one.points:
        arguments |= {"point_coords": [list(point) for point in one.points], "point_labels": list(one.labels)}
    if one.box is not None:
        arguments["box"] = list(one.box)
    return arguments
