"""Prompts that a person would rather give than exact points: none at all, words, a loose box, a scribble.

Each prompter asks an [`EfficientSamPredictor`] about its picture and answers with a [`SegmentationResult`]:

saliency map -> separate objects -> boxes -> masks; words -> detector -> boxes -> masks.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from transformers import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageSegmentation,
    AutoModelForSemanticSegmentation,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageInput
from transformers.utils import cached_file

from hf_efficientsam.model.configuration_efficientsam import EfficientSamSaliencyConfig
from hf_efficientsam.model.image_processing_efficientsam import non_maximum_suppression
from hf_efficientsam.model.modeling_saliency import EfficientSamSaliencyHead

from .loading import load_head, loading, read_config
from .predictor import EfficientSamPredictor
from .results import SegmentationResult, tight_boxes

# ------------------------------------------------------------------------------------------------ salient objects


class SalientPrompter:
    """
    What stands out in a picture, object by object, without a click. Objects that touch in the map are one.

    Args:
        predictor: a [`EfficientSamPredictor`].
        saliency: where the map comes from:

            - `None`: the head in the folder `saliency` of the predictor's checkpoint, which needs no second network;
            - the directory of such a head, as training/train_saliency.py writes it;
            - the directory or Hub name of a transformers model, see [`ModelSaliency`];
            - a file that ends in .onnx, see [`OnnxSaliency`];
            - a function from an upright RGB picture to a map;
            - a map: an array, tensor or picture of any size that covers the whole picture, in 0 to 1, or in integers
              up to 255 (8 bits) or 65535 (16 bits).
        threshold: a pixel is salient above it, 0 to 1.
        min_area: objects of less than this share of the largest one's pixels are left out, 0 to 1.
        trust_remote_code: run the code that a transformers model brings along.

    Raises:
        ValueError: a source that cannot be loaded, or a number that is out of its range.
    """

    def __init__(
        self,
        predictor: EfficientSamPredictor,
        saliency: Any = None,
        threshold: float = 0.5,
        min_area: float = 0.05,
        trust_remote_code: bool = False,
    ):
        for name, value in (("threshold", threshold), ("min_area", min_area)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {value:g}.")
        self.predictor, self.threshold, self.min_area = predictor, threshold, min_area
        self.source = load_saliency(predictor, saliency, trust_remote_code)

    def map(self, image: ImageInput | None = None) -> np.ndarray:
        """
        `[height, width]`, float32 from 0 to 1: how much each pixel stands out.

        Args:
            image: by default the predictor's.

        Raises:
            RuntimeError: if there is no picture.
            ValueError: if the source gives no map.
        """
        look_at(self.predictor, image)
        return fit_map(self.source(self.predictor.image), self.predictor.original_size)

    def __call__(self, image: ImageInput | None = None) -> SegmentationResult:
        """
        The salient objects, largest first; their `scores` are the mean saliency of their pixels.

        Args, raises: as `map`.
        """
        saliency = self.map(image)
        objects = separate_objects(saliency > self.threshold, self.min_area)
        found = self.predictor.segment(boxes=tight_boxes(objects).tolist())
        scores = [saliency[mask].mean() if mask.any() else 0 for mask in found.masks]
        return replace(found, scores=np.float32(scores), labels=["salient object"] * len(found))


def look_at(predictor: EfficientSamPredictor, image: ImageInput | None) -> None:
    if image is not None:
        predictor.set_image(image)
    predictor.get_image_embedding()  # raises without a picture


def load_saliency(
    predictor: EfficientSamPredictor, saliency: Any, trust_remote_code: bool
) -> Callable[[Image.Image], Any]:
    """The function from the predictor's picture to a map that `saliency` of [`SalientPrompter`] stands for."""
    if saliency is None:
        return HeadSaliency(predictor, load_own_head(predictor))
    if isinstance(saliency, str | Path):
        name = str(saliency)
        if name.lower().endswith(".onnx"):
            return OnnxSaliency(name)
        read_config(name)
        with loading(name):
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        if isinstance(config, EfficientSamSaliencyConfig):
            return HeadSaliency(predictor, load_head(name))
        return ModelSaliency(name, config, trust_remote_code, predictor.device)
    if callable(saliency):
        return saliency
    return lambda image: saliency


def load_own_head(predictor: EfficientSamPredictor) -> EfficientSamSaliencyHead:
    name = predictor.model.name_or_path
    try:
        has_head = cached_file(name, "config.json", subfolder="saliency") is not None
    except OSError:
        has_head = False
    if not has_head:
        raise ValueError(
            f"{name or 'the model'} has no saliency head; name a saliency model (--saliency), or train a head with "
            "training/train_saliency.py."
        )
    return load_head(name, subfolder="saliency")


class HeadSaliency:
    """A head on the image embedding that the predictor has computed already."""

    def __init__(self, predictor: EfficientSamPredictor, head: EfficientSamSaliencyHead):
        channels = predictor.model.config.vision_config.output_channels
        if head.config.input_channels != channels:
            raise ValueError(
                f"the saliency head {head.name_or_path} takes {head.config.input_channels} channels, but this "
                f"checkpoint's embeddings have {channels}; use the head that was trained with it."
            )
        self.predictor, self.head = predictor, head.to(predictor.device, torch.float32).eval()

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> torch.Tensor:
        predictor = self.predictor
        logits = self.head(predictor.features).logits
        sizes = [predictor.original_size], [predictor.input_size]
        return predictor.processor.post_process_masks([logits], *sizes, binarize=False)[0][0, 0].sigmoid()


class ModelSaliency:
    """
    A transformers model that tells an object from its background:

    - one for semantic segmentation (SegFormer, BEiT, ...) of one class, of two (background first), or of any number
      of which one is called "background": the map is what is left of that one's probability;
    - with `trust_remote_code`, one whose code is in its repository and which its `AutoModelForImageSegmentation` loads
      (BiRefNet, RMBG): it takes `[1, 3, H, W]` and returns a map of logits or of 0 to 1, also in nested lists.

    A repository without a usable image processor is given the whole picture at 1024 x 1024 with ImageNet's mean and
    deviation, as BiRefNet and RMBG 2.0 ask for.
    """

    def __init__(self, name: str, config, trust_remote_code: bool, device: torch.device):
        remote = "AutoModelForImageSegmentation" in (getattr(config, "auto_map", None) or {})
        if not remote and type(config) not in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING:
            raise ValueError(f"{name} holds a model of type {config.model_type!r}, which gives no saliency map.")
        kind = AutoModelForImageSegmentation if remote else AutoModelForSemanticSegmentation
        with loading(name):
            model = kind.from_pretrained(name, trust_remote_code=trust_remote_code, dtype=torch.float32)
        try:
            self.processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
        except (OSError, ValueError):
            self.processor = None
        self.name, self.model, self.device = name, model.to(device).eval(), device

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> np.ndarray:
        if self.processor is None:
            pixel_values = torch.from_numpy(squash(image, (1024, 1024)))
        else:
            pixel_values = self.processor(images=image, return_tensors="pt")["pixel_values"]
        outputs = self.model(pixel_values.to(self.device))
        outputs = outputs.logits if hasattr(outputs, "logits") else outputs
        return pick_map(self._foreground(outputs), self.name)

    def _foreground(self, logits):
        """Logits of several classes -> the probability `[1, 1, h, w]` of being none of the background."""
        if not isinstance(logits, torch.Tensor) or logits.ndim != 4 or logits.shape[1] == 1:
            return logits
        names = [self.model.config.id2label[i].lower() for i in range(logits.shape[1])]
        if "background" not in names and len(names) > 2:
            raise ValueError(
                f"{self.name} tells {len(names)} classes apart, none of which is called background, so it does not "
                "say what is salient; use a model for saliency or background removal."
            )
        background = names.index("background") if "background" in names else 0
        return 1 - logits.softmax(dim=1)[:, background : background + 1]


class OnnxSaliency:
    """
    A saliency model in an ONNX file: one input `[N, 3, H, W]` of floats, which is given the whole picture with
    ImageNet's mean and deviation, at the size in the graph or, where that leaves it open, 320 x 320. The answer is the
    first of the finest outputs with one channel, of logits or of 0 to 1. Anything else fits into a function.

    Args:
        path: the file.

    Raises:
        ValueError: if onnxruntime is not installed, or the file is no such model.
    """

    def __init__(self, path: str):
        try:
            import onnxruntime
        except ImportError:
            raise ValueError(f"{path} needs onnxruntime, which is not installed; pip install onnxruntime.") from None
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file.")
        try:
            self.session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
        except Exception as error:  # onnxruntime's own kinds, which have no common parent
            raise ValueError(
                f"{path} is no ONNX file that onnxruntime can run: {' '.join(str(error).split())}"
            ) from None
        inputs = self.session.get_inputs()
        shapes = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
        first = inputs[0]
        if (
            len(inputs) != 1
            or first.type != "tensor(float)"
            or len(first.shape) != 4
            or first.shape[1] not in (3, "3")
        ):
            raise ValueError(
                f"{path} must take one picture [N, 3, H, W] of floats to be a saliency model, not {shapes}."
            )
        self.path, self.input = path, first.name
        self.size = tuple(side if isinstance(side, int) else 320 for side in first.shape[2:])

    def __call__(self, image: Image.Image) -> np.ndarray:
        try:
            outputs = self.session.run(None, {self.input: squash(image, self.size)})
        except Exception as error:  # as above
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.path} does not run at {self.size[0]} x {self.size[1]} pixels: {reason}") from None
        return pick_map([torch.from_numpy(np.asarray(output)) for output in outputs], self.path)


def squash(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A whole RGB picture as `[1, 3, *size]`, float32, with ImageNet's mean and deviation taken out."""
    pixels = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR), dtype=np.float32) / 255
    pixels = (pixels - np.float32(IMAGENET_DEFAULT_MEAN)) / np.float32(IMAGENET_DEFAULT_STD)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def pick_map(outputs, name: str) -> np.ndarray:
    """
    The first of the finest maps of one channel among a model's answers, `[h, w]` from 0 to 1: models return their
    maps at several depths too, and other features.

    Args:
        outputs: a tensor, or lists of them, nested in any way.
        name: of the model, for the message.
    """

    def tensors(values):
        if isinstance(values, torch.Tensor):
            yield values
        elif isinstance(values, dict | list | tuple):
            for value in values.values() if isinstance(values, dict) else values:
                yield from tensors(value)

    maps = [one for one in tensors(outputs) if one.ndim >= 2 and one.numel() == one.shape[-2] * one.shape[-1]]
    if not maps:
        raise ValueError(f"{name} returns no map of one channel, so it is no saliency model.")
    found = max(maps, key=torch.Tensor.numel).float()
    found = found.reshape(found.shape[-2:])
    if not 0 <= found.min() <= found.max() <= 1:
        found = found.sigmoid()
    return found.cpu().numpy()


def fit_map(values: Any, size: tuple[int, int]) -> np.ndarray:
    """A map, see [`SalientPrompter`], as float32 `[height, width]` of `size`."""
    if isinstance(values, Image.Image):
        values = np.asarray(values if values.mode in ("1", "L", "F", "I", "I;16") else values.convert("L"))
    if isinstance(values, torch.Tensor):
        values = values.detach().float().cpu() if values.is_floating_point() else values.cpu()
    values = np.asarray(values)
    if values.ndim < 2 or values.size != values.shape[-2] * values.shape[-1] or not values.size:
        raise ValueError(f"A saliency map is [height, width], but it has the shape {list(values.shape)}.")
    values = values.reshape(values.shape[-2:])
    if values.dtype in (np.uint8, np.uint16) and values.max() > 1:
        values = values / np.float32(np.iinfo(values.dtype).max)
    values = torch.from_numpy(values.astype(np.float32))
    if not 0 <= values.min() <= values.max() <= 1:  # NaN is no such number either
        raise ValueError(
            "A saliency map must lie in 0 to 1, or be of 8 or 16 bits; put logits through a sigmoid first."
        )
    return F.interpolate(values[None, None], size, mode="bilinear", antialias=True)[0, 0].clamp(0, 1).numpy()


def separate_objects(salient: np.ndarray, min_area: float) -> np.ndarray:
    """
    `[height, width]` bool -> `[N, height, width]` bool: the regions that hang together, corners included, largest
    first, without those of less than `min_area` of the largest.
    """
    regions, count = ndimage.label(salient, structure=np.ones((3, 3)))
    areas = np.bincount(regions.ravel(), minlength=count + 1)[1:]
    order = [i for i in np.argsort(-areas, kind="stable") if areas[i] >= min_area * areas.max()]
    return np.stack([regions == i + 1 for i in order]) if order else np.zeros((0, *salient.shape), dtype=bool)


# ------------------------------------------------------------------------------------------------ text


class TextPrompter:
    """
    Objects by their names: a detector finds boxes, the predictor masks in them.

    Args:
        predictor: a [`EfficientSamPredictor`].
        detector: the directory or Hub name of a transformers model for zero-shot object detection: OWL-ViT, OWLv2,
            Grounding DINO, OmDet-Turbo; or such a [`Detector`], loaded already.
        threshold: boxes of lower scores are left out, 0 to 1; by default the detector's own.
        nms_threshold: of two boxes of one name which overlap by a larger IoU, only the better one stays.

    Raises:
        ValueError: a detector that cannot be loaded, or a number that is out of its range.
    """

    def __init__(
        self,
        predictor: EfficientSamPredictor,
        detector: "str | Path | Detector",
        threshold: float | None = None,
        nms_threshold: float = 0.7,
    ):
        for name, value in (("threshold", threshold), ("nms_threshold", nms_threshold)):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {value:g}.")
        self.predictor, self.threshold, self.nms_threshold = predictor, threshold, nms_threshold
        self.detector = detector if isinstance(detector, Detector) else Detector(str(detector), predictor.device)

    def __call__(self, text: str | Sequence[str], image: ImageInput | None = None) -> SegmentationResult:
        """
        The objects, best first; their `scores` and `boxes` are the detector's, their `labels` the names asked for.

        Args:
            text: the names, "a dog, a cat" or a list.
            image: by default the predictor's.

        Raises:
            RuntimeError: if there is no picture.
            ValueError: if there are no names.
        """
        names = split_names(text)
        look_at(self.predictor, image)
        boxes, scores, labels = self.detector(self.predictor.image, names, self.threshold)
        order = [i for i in self._best_of_each(boxes, scores, labels) if (boxes[i, 2:] > boxes[i, :2]).all()]
        labels = [labels[i] for i in order]
        found = self.predictor.segment(boxes=boxes[order].tolist(), names=labels)
        return replace(found, scores=scores[order].numpy())

    def _best_of_each(self, boxes: torch.Tensor, scores: torch.Tensor, labels: list[str]) -> list[int]:
        """Indices of the boxes without doubles of one name, best first."""
        kept = []
        for label in set(labels):
            own = torch.tensor([i for i, other in enumerate(labels) if other == label])
            kept += own[non_maximum_suppression(boxes[own], scores[own], self.nms_threshold)].tolist()
        return sorted(kept, key=lambda i: (-scores[i], i))


def split_names(text: str | Sequence[str]) -> list[str]:
    """Names without doubles, from "a dog, a cat" or a list."""
    names = [name.strip(" .\t\n") for name in (text.split(",") if isinstance(text, str) else text)]
    names = list(dict.fromkeys(name for name in names if name))
    if not names:
        raise ValueError('nothing is asked for; give names of objects, such as "a dog, a cat".')
    return names


class Detector:
    """
    A transformers model for zero-shot object detection with its processor.

    Args:
        name: directory or Hub name.
        device: where it runs.

    Raises:
        ValueError: if it cannot be loaded or is of another kind.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        read_config(name)
        with loading(name):
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if type(config) not in MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING:
            raise ValueError(
                f"{name} holds a model of type {config.model_type!r}, which finds no objects by their names; use one "
                "for zero-shot object detection, such as OWLv2 or Grounding DINO."
            )
        with loading(name):
            self.processor = AutoProcessor.from_pretrained(name)
            model = AutoModelForZeroShotObjectDetection.from_pretrained(name, dtype=torch.float32)
        self.model, self.device = model.to(device).eval(), device

    @torch.inference_mode()
    def __call__(
        self, image: Image.Image, names: list[str], threshold: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """
        Boxes `[N, 4]` in pixels of the picture, none of which reaches beyond it, their scores `[N]`, and their names.
        """
        inputs = self.processor(images=image, text=[names], return_tensors="pt").to(self.device)
        outputs = self.model(**inputs)
        finish = self.processor.post_process_grounded_object_detection
        options = {} if threshold is None else {"threshold": threshold}
        if threshold is not None and "text_threshold" in inspect.signature(finish).parameters:
            options["text_threshold"] = threshold  # or a box that is sure enough could have no name
        found = finish(outputs, target_sizes=[(image.height, image.width)], text_labels=[names], **options)[0]
        boxes = found["boxes"].float().cpu().reshape(-1, 4)
        boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([image.width, image.height] * 2))
        labels = [match_name(label, names) for label in found["text_labels"]]
        return boxes, found["scores"].float().cpu(), labels


def match_name(phrase: str, names: list[str]) -> str:
    """Which of the names a detector means that answers with parts of them, such as "dog" for "a dog"."""
    alike = [name for name in names if phrase and (phrase.lower() in name.lower() or name.lower() in phrase.lower())]
    return phrase if not alike or phrase in names else alike[0]


# ------------------------------------------------------------------------------------------------ rough prompts


class RoughPrompter:
    """
    Objects that were shown in a hurry.

    Args:
        predictor: a [`EfficientSamPredictor`] that has a picture.
    """

    margin = 0.1  # of its box on each side, how far an object may reach beyond what was painted of it
    num_points = 3  # that are drawn from a painted region where the model takes no mask

    def __init__(self, predictor: EfficientSamPredictor):
        self.predictor = predictor

    def boxes(self, boxes: Any) -> SegmentationResult:
        """
        Args:
            boxes: `[N, 4]`, two opposite corners each in any order; they may reach beyond the picture.

        Returns:
            the N objects; their `boxes` are put in order and cut off at the picture's edges.

        Raises:
            RuntimeError: if there is no picture.
            ValueError: a box without area in the picture.
        """
        look_at(self.predictor, None)
        height, width = self.predictor.original_size
        corners = np.asarray(boxes, dtype=np.float32).reshape(-1, 2, 2)
        corners = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        return self.predictor.segment(boxes=corners.clip(0, [width, height] * 2).tolist())

    def scribble(self, painted: np.ndarray, background: np.ndarray | None = None) -> SegmentationResult:
        """
        One object of which a part was painted over, or all of it.

        Args:
            painted: `[height, width]`, bool, on the object.
            background: likewise, off the object, for a model that takes background points.

        Raises:
            RuntimeError: if there is no picture.
            ValueError: paint of another size than the picture's, or none.
        """
        look_at(self.predictor, None)
        painted = self._check_paint(painted)
        config = self.predictor.model.config.prompt_encoder_config
        points = [] if config.mask_prompts else spread_points(painted, self.num_points)
        labels = [1] * len(points)
        if background is not None and (off := self._check_paint(background)).any():
            if not config.background_points:
                raise ValueError("this model takes no background points; paint on the object only.")
            background_points = spread_points(off, self.num_points)
            points, labels = points + background_points, labels + [0] * len(background_points)
        if not painted.any():
            raise ValueError("nothing is painted; paint on the object.")
        box = tight_boxes(painted[None])[0]
        grown = np.tile(self.margin * (box[2:] - box[:2]), 2) * [-1, -1, 1, 1]
        return self.predictor.segment(
            points=[points] if points else None,
            labels=[labels] if points else None,
            boxes=[(box + grown).clip(0, [*painted.shape[::-1]] * 2).tolist()],
            masks=[mask_prompt(painted, self.predictor)] if config.mask_prompts else None,
        )

    def _check_paint(self, painted: np.ndarray) -> np.ndarray:
        painted = np.asarray(painted) > 0
        if painted.shape != self.predictor.original_size:
            raise ValueError(
                f"The paint has the shape {list(painted.shape)}, but the picture is [height, width] = "
                f"{list(self.predictor.original_size)}."
            )
        return painted


def mask_prompt(mask: np.ndarray, predictor: EfficientSamPredictor, confidence: float = 8.0) -> np.ndarray:
    """
    A mask of the predictor's picture, `[height, width]` bool, as the low-resolution logits `[h, w]` that the model
    takes: `confidence` inside, minus that outside, in between where a cell is cut.
    """
    height, width = predictor.input_size
    rows, columns = (predictor.model.config.vision_config.patch_size * n for n in predictor.features.shape[-2:])
    share = F.interpolate(torch.from_numpy(mask).float()[None, None], (height, width), mode="bilinear", antialias=True)
    share = F.avg_pool2d(F.pad(share, (0, columns - width, 0, rows - height)), kernel_size=4)
    return (confidence * (2 * share - 1))[0, 0].numpy()


def spread_points(region: np.ndarray, count: int) -> list[list[float]]:
    """
    Up to `count` points (x, y) in a region `[height, width]` bool: the one deepest in it, then the deepest of what is
    not near one, with half of the side of a square of its area as near.
    """
    rows, columns = np.indices(region.shape)
    left, near, points = region.copy(), region.sum() / 4, []
    while left.any() and len(points) < count:
        # What is outside the picture counts as off.
        depth = ndimage.distance_transform_edt(np.pad(left, 1))[1:-1, 1:-1]
        row, column = np.unravel_index(depth.argmax(), depth.shape)
        points.append([column + 0.5, row + 0.5])
        left &= (rows - row) ** 2 + (columns - column) ** 2 > near
    return points


__all__ = ["Detector", "RoughPrompter", "SalientPrompter", "TextPrompter"]
