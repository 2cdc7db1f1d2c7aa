"""Processor of EfficientSAM: pictures and prompts in pixels of each picture -> padded tensors in the model frame."""

import math
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessorMixin

# Fills the place of a missing point, label or box, as in transformers' SAM processors.
PAD_VALUE = -10
VALID_LABELS = (1, 0, -1, PAD_VALUE)  # on the object, on the background, and two that mean "no point"

# How prompts are nested: in full, and with the prompt level left out.
LEVELS = {
    "input_points": ("[image][prompt][point][x, y]", "[image][point][x, y]"),
    "input_labels": ("[image][prompt][point]", "[image][point]"),
    "input_boxes": ("[image][prompt][x1, y1, x2, y2]", "[image][x1, y1, x2, y2]"),
}
DEPTHS = {"input_points": 4, "input_labels": 3, "input_boxes": 3}  # of the full nesting


class EfficientSamProcessor(ProcessorMixin):
    """
    Prepares pictures and prompts for [`EfficientSamModel`] and brings its masks back to the size of the pictures.

    Args:
        image_processor: an [`EfficientSamImageProcessor`].
    """

    def __init__(self, image_processor):
        super().__init__(image_processor)

    def __call__(
        self,
        images: ImageInput | None = None,
        input_points: Any = None,
        input_labels: Any = None,
        input_boxes: Any = None,
        input_masks: Any = None,
        original_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        return_tensors: str | None = "pt",
        **kwargs,
    ) -> BatchFeature:
        """
        All prompts are nested lists, tuples, arrays or tensors, in any mixture and of any raggedness. A prompt is one
        object; it may have several points, or a box, or both, and `None` or `[]` stands where it has none.
        Coordinates are (x, y) in pixels of the upright picture, x to the right and y down, 0 being the first pixel.

        Args:
            images: what the image processor takes. Without images, give `original_sizes`; then only prompts are
                returned, for use with `image_embeddings` computed earlier.
            input_points: `[image][prompt][point][x, y]`, or `[image][point][x, y]` for one prompt an image.
            input_labels: `[image][prompt][point]`, or `[image][point]`: 1 on the object, 0 on the background, -1 or
                -10 for a point to be ignored. Without labels every point is on the object.
            input_boxes: `[image][prompt][x1, y1, x2, y2]`, or `[image][x1, y1, x2, y2]`. Prompt i has points i and
                box i. A box may reach beyond the picture.
            input_masks: `[image][prompt][h][w]`, low-resolution logits (a quarter of the model input), all of one
                size.
            original_sizes: `[B, 2]`, height and width of each picture.
            return_tensors: "pt" (as is `None`) or "np".
            kwargs: options of the image processor for this call.

        Returns:
            What the image processor returns, and, each only if something of it was given, with Q and P the largest
            numbers of prompts and points in the batch:

            - `input_points` `[B, Q, P, 2]` float32 in pixels of the resized picture, (-10, -10) where there is none;
            - `input_labels` `[B, Q, P]` int64, -10 where there is no point;
            - `input_boxes` `[B, Q, 4]` float32 in the same frame, four times -10 where there is none;
            - `input_masks` `[B, Q, h, w]` float32, zeros where there is none.

        Raises:
            ValueError: prompts that do not fit the images or each other, that lie outside the image, or that are not
                finite numbers nested as above; the message names the image and the prompt.
            TypeError: prompts that are not numbers.
        """
        if images is not None:
            if original_sizes is not None:
                raise ValueError("Pass images or original_sizes, not both.")
            encoding = self.image_processor(images, return_tensors="pt", **kwargs)
            original_sizes = encoding["original_sizes"].tolist()
            input_sizes = encoding["reshaped_input_sizes"].tolist()
        elif original_sizes is not None:
            encoding = {}
            original_sizes = _check_sizes(_to_lists(original_sizes, "original_sizes"))
            input_sizes = [self.image_processor.get_reshaped_input_size(size, **kwargs) for size in original_sizes]
        else:
            raise ValueError("Pass images, or the original_sizes of images whose embeddings you have.")

        points = _read_prompts(input_points, "input_points", len(original_sizes))
        boxes = _read_prompts(input_boxes, "input_boxes", len(original_sizes))
        masks = _read_masks(input_masks, len(original_sizes))
        if input_labels is None:
            labels = [[[1] * len(prompt) for prompt in image] for image in points]
        else:
            labels = _read_prompts(input_labels, "input_labels", len(original_sizes))
        _check_labels(labels, points)
        _check_points(points, labels, original_sizes)
        _check_boxes(boxes, original_sizes)
        _check_masks(masks, points, boxes)

        num_prompts = max(len(image) for image in (*points, *boxes, *masks))
        scales = [(w_in / w, h_in / h) for (h, w), (h_in, w_in) in zip(original_sizes, input_sizes, strict=True)]
        prompts = {
            **_points_to_tensors(points, labels, scales, num_prompts),
            **_boxes_to_tensor(boxes, scales, num_prompts),
            **_masks_to_tensor(masks, num_prompts),
        }
        return BatchFeature({**encoding, **prompts}, tensor_type=return_tensors)

    def count_prompts(self, inputs: dict) -> list[int]:
        """
        Number of real prompts of each image in what a call returned, for `post_process_masks(num_prompts=...)`: those
        up to the last one that has a point or a box. If only masks were given, all count.
        """
        real = []  # [B, Q] each
        if "input_points" in inputs:
            real.append((torch.as_tensor(inputs["input_labels"]) >= 0).any(dim=-1))
        if "input_boxes" in inputs:
            real.append((torch.as_tensor(inputs["input_boxes"]) != PAD_VALUE).any(dim=-1))
        if not real and "input_masks" in inputs:
            real.append(torch.ones(inputs["input_masks"].shape[:2], dtype=torch.bool))
        if not real:
            raise ValueError("There are no prompts in the inputs; pass what the processor returned.")
        positions = torch.arange(1, real[0].shape[1] + 1, device=real[0].device)
        return (torch.stack(real).any(dim=0) * positions).amax(dim=1).tolist()

    def post_process_masks(self, *args, **kwargs) -> list[torch.Tensor]:
        """See [`EfficientSamImageProcessor.post_process_masks`]."""
        return self.image_processor.post_process_masks(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.image_processor.model_input_names, "original_sizes", "reshaped_input_sizes"]


# ------------------------------------------------------------------------------------------------ reading prompts


def _to_lists(values: Any, name: str) -> Any:
    """Nested lists of numbers and `None`, whatever they were made of."""
    if values is None or isinstance(values, (int, float)):
        return values
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().tolist()
    if isinstance(values, (np.ndarray, np.generic)):
        return _to_lists(values.tolist(), name)
    if isinstance(values, (list, tuple)):
        return [_to_lists(value, name) for value in values]
    raise TypeError(f"{name} must hold numbers in lists, tuples, arrays or tensors, not a {type(values).__name__}.")


def _depths(values: Any) -> set[int]:
    """How many lists lie around the numbers; more than one answer if the nesting is uneven, none without numbers."""
    if values is None:
        return set()
    if not isinstance(values, list):
        return {0}
    return {depth + 1 for value in values for depth in _depths(value)}


def _read_prompts(values: Any, name: str, num_images: int) -> list[list[list]]:
    """[image][prompt] -> list of points, list of labels, or box; `[]` where there is none."""
    if values is None:
        return [[] for _ in range(num_images)]
    values = _to_lists(values, name)
    depths = _depths(values)
    full, short = LEVELS[name]
    if not isinstance(values, list) or (depths and depths not in ({DEPTHS[name]}, {DEPTHS[name] - 1})):
        found = " and ".join(map(str, sorted(depths)))
        raise ValueError(
            f"{name} must be nested as {full}, or as {short} where every image has one prompt, so {DEPTHS[name]} or "
            f"{DEPTHS[name] - 1} levels deep, but its numbers lie {found} deep."
        )
    if len(values) != num_images:
        raise ValueError(
            f"{name} has prompts for {len(values)} images, but there are {num_images} images; its levels are {full}, "
            f"or {short}."
        )
    if depths == {DEPTHS[name] - 1}:
        values = [[image] if image else [] for image in values]
    return [[prompt or [] for prompt in image or []] for image in values]


def _read_masks(input_masks: Any, num_images: int) -> list[list[torch.Tensor]]:
    """[image][prompt] -> float32 tensor [h, w]."""
    if input_masks is None:
        return [[] for _ in range(num_images)]
    if len(input_masks) != num_images:
        raise ValueError(
            f"input_masks has masks for {len(input_masks)} images, but there are {num_images} images; its levels are "
            "[image][prompt][h][w]."
        )
    return [
        [torch.as_tensor(mask, dtype=torch.float32) for mask in (() if image is None else image)]
        for image in input_masks
    ]


# ------------------------------------------------------------------------------------------------ checking prompts


def _check_sizes(original_sizes: list) -> list:
    for i, size in enumerate(original_sizes):
        if not isinstance(size, list) or len(size) != 2 or not min(size) >= 1:
            raise ValueError(
                f"original_sizes must hold a height and a width for each image, but image {i} has {size}."
            )
    return original_sizes


def _check_labels(labels: list, points: list):
    for i, (image_labels, image_points) in enumerate(zip(labels, points, strict=True)):
        if image_labels and not image_points:
            raise ValueError(f"Image {i} has input_labels but no input_points.")
        if len(image_labels) != len(image_points):
            raise ValueError(
                f"Image {i} has {len(image_points)} prompts in input_points but {len(image_labels)} in input_labels."
            )
        for q, (prompt_labels, prompt_points) in enumerate(zip(image_labels, image_points, strict=True)):
            if len(prompt_labels) != len(prompt_points):
                raise ValueError(
                    f"Image {i}, prompt {q} has {len(prompt_points)} points but {len(prompt_labels)} labels."
                )
            for label in prompt_labels:
                if label in (2, 3):
                    raise ValueError(
                        f"Image {i}, prompt {q} has the label {label}; pass box corners as input_boxes instead."
                    )
                if label not in VALID_LABELS:
                    raise ValueError(
                        f"Image {i}, prompt {q} has the label {label}; a label is 1 (on the object), 0 (on the "
                        "background), or -1 or -10 (no point)."
                    )


def _check_points(points: list, labels: list, original_sizes: list):
    for i, (image, (height, width)) in enumerate(zip(points, original_sizes, strict=True)):
        for q, prompt in enumerate(image):
            for point, label in zip(prompt, labels[i][q], strict=True):
                if not isinstance(point, list) or len(point) != 2 or None in point:
                    raise ValueError(f"Image {i}, prompt {q}: a point is a pair x, y, got {point}.")
                if label < 0:  # padding, wherever it lies
                    continue
                if not all(map(math.isfinite, point)):
                    raise ValueError(f"Image {i}, prompt {q}: the point {point} is not finite.")
                if not (0 <= point[0] <= width and 0 <= point[1] <= height):
                    raise ValueError(
                        f"Image {i}, prompt {q}: the point {point} lies outside the image, which is {width} pixels "
                        f"wide and {height} high; points are x, y in pixels of the image."
                    )


def _is_padding(box: list) -> bool:
    return not box or all(value == PAD_VALUE for value in box)


def _check_boxes(boxes: list, original_sizes: list):
    for i, (image, (height, width)) in enumerate(zip(boxes, original_sizes, strict=True)):
        for q, box in enumerate(image):
            if box and (len(box) != 4 or None in box):
                raise ValueError(f"Image {i}, prompt {q}: a box is four numbers x1, y1, x2, y2, got {box}.")
            if _is_padding(box):
                continue
            if not all(map(math.isfinite, box)):
                raise ValueError(f"Image {i}, prompt {q}: the box {box} is not finite.")
            x1, y1, x2, y2 = box
            if x1 >= x2 or y1 >= y2:
                raise ValueError(
                    f"Image {i}, prompt {q}: the box {box} has no area; its corners must be x1 < x2 and y1 < y2."
                )
            if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
                raise ValueError(
                    f"Image {i}, prompt {q}: the box {box} lies entirely outside the image, which is {width} pixels "
                    f"wide and {height} high; boxes are x1, y1, x2, y2 in pixels of the image."
                )


def _check_masks(masks: list, points: list, boxes: list):
    if not any(masks):
        return
    first = next(mask for image in masks for mask in image)
    for i, image in enumerate(masks):
        num_prompts = max(len(points[i]), len(boxes[i]))
        if len(image) < num_prompts:
            raise ValueError(
                f"Image {i} has {num_prompts} prompts but {len(image)} input_masks; each prompt needs one."
            )
        for q, mask in enumerate(image):
            if mask.ndim != 2 or mask.shape != first.shape:
                raise ValueError(
                    f"Image {i}, prompt {q}: every mask in input_masks must be [h, w], all of one size, got shape "
                    f"{tuple(mask.shape)} after {tuple(first.shape)}."
                )
            if not mask.isfinite().all():
                raise ValueError(f"Image {i}, prompt {q}: the mask in input_masks holds NaN or infinite logits.")


# ------------------------------------------------------------------------------------------------ padding prompts


def _points_to_tensors(points: list, labels: list, scales: list, num_prompts: int) -> dict[str, torch.Tensor]:
    num_points = max((len(prompt) for image in points for prompt in image), default=0)
    if num_points == 0:
        return {}
    input_points = torch.full((len(points), num_prompts, num_points, 2), PAD_VALUE, dtype=torch.float32)
    input_labels = torch.full((len(points), num_prompts, num_points), PAD_VALUE, dtype=torch.int64)
    for i, image in enumerate(points):
        for q, prompt in enumerate(image):
            if prompt:
                scaled = torch.tensor(prompt, dtype=torch.float64) * torch.tensor(scales[i], dtype=torch.float64)
                input_points[i, q, : len(prompt)] = scaled.float()
                input_labels[i, q, : len(prompt)] = torch.tensor(labels[i][q], dtype=torch.int64)
    input_points[input_labels < 0] = PAD_VALUE
    return {"input_points": input_points, "input_labels": input_labels}


def _boxes_to_tensor(boxes: list, scales: list, num_prompts: int) -> dict[str, torch.Tensor]:
    if all(_is_padding(box) for image in boxes for box in image):
        return {}
    input_boxes = torch.full((len(boxes), num_prompts, 4), PAD_VALUE, dtype=torch.float32)
    for i, image in enumerate(boxes):
        for q, box in enumerate(image):
            if not _is_padding(box):
                scaled = torch.tensor(box, dtype=torch.float64) * torch.tensor(scales[i] * 2, dtype=torch.float64)
                input_boxes[i, q] = scaled.float()
    return {"input_boxes": input_boxes}


def _masks_to_tensor(masks: list, num_prompts: int) -> dict[str, torch.Tensor]:
    if not any(masks):
        return {}
    shape = next(mask.shape for image in masks for mask in image)
    input_masks = torch.zeros(len(masks), num_prompts, *shape)
    for i, image in enumerate(masks):
        if image:
            input_masks[i, : len(image)] = torch.stack(image)
    return {"input_masks": input_masks}


__all__ = ["EfficientSamProcessor"]
