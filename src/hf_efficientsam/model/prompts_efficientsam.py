"""Prompts as nested lists or arrays -> checked and padded arrays in the frame of the model input.

Needs numpy only, so that the ONNX predictor takes the prompts that the processor takes, without torch.
"""

import warnings
from typing import Any

import numpy as np

# Fills the place of a missing point, label or box, as in transformers' SAM processors.
PAD_VALUE = -10
VALID_LABELS = (1, 0, -1, PAD_VALUE)  # on the object, on the background, and two that mean "no point"
BOX_IS_CLIPPED = "a box reaches beyond the image; such boxes are clipped to their image."

# How prompts are nested: in full, and with the prompt level left out.
LEVELS = {
    "input_points": ("[image][prompt][point][x, y]", "[image][point][x, y]"),
    "input_labels": ("[image][prompt][point]", "[image][point]"),
    "input_boxes": ("[image][prompt][x1, y1, x2, y2]", "[image][x1, y1, x2, y2]"),
}
DEPTHS = {"input_points": 4, "input_labels": 3, "input_boxes": 3}  # of the full nesting


def prepare_prompts(
    input_points: Any,
    input_labels: Any,
    input_boxes: Any,
    input_masks: Any,
    original_sizes: list,
    input_sizes: list,
) -> dict[str, np.ndarray]:
    """
    Prompts in pixels of each image -> padded arrays in the model frame, as [`EfficientSamProcessor`] documents both.

    Args:
        original_sizes, input_sizes: height and width of each image, and of it in the model input before padding.
    """
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
    boxes = _clip_boxes(boxes, original_sizes)
    _check_masks(masks, points, boxes)

    num_prompts = max(len(image) for image in (*points, *boxes, *masks))
    scales = [(w_in / w, h_in / h) for (h, w), (h_in, w_in) in zip(original_sizes, input_sizes, strict=True)]
    return {
        **_pad_points(points, labels, scales, num_prompts),
        **_pad_boxes(boxes, scales, num_prompts),
        **_pad_masks(masks, num_prompts),
    }


def _to_lists(values: Any, name: str) -> Any:
    """Nested lists of numbers and `None`, whatever they were made of."""
    if values is None or isinstance(values, (int, float)):
        return values
    if isinstance(values, np.floating):  # longdouble, which tolist leaves as it is
        return float(values)
    if hasattr(values, "tolist"):  # an array or a tensor
        return _to_lists(values.tolist(), name)
    if isinstance(values, (list, tuple)):
        return [_to_lists(value, name) for value in values]
    raise TypeError(f"{name} must hold numbers in lists, tuples, arrays or tensors, not a {type(values).__name__}.")


def nesting(values: Any, name: str) -> set[int]:
    """How many lists lie around the numbers of prompts; TypeError if there is something else in them."""
    return _depths(_to_lists(values, name))


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
    if name == "input_boxes" and depths == {4}:  # SAM's notebook has a level more, [[[[x1, y1, x2, y2]]]]
        boxes = [[prompt or [None] for prompt in image or []] for image in values]
        if all(len(prompt) == 1 for image in boxes for prompt in image):
            values, depths = [[box for (box,) in image] for image in boxes], {3}
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


def _read_masks(input_masks: Any, num_images: int) -> list[list[np.ndarray]]:
    """[image][prompt] -> float32 array [h, w]."""
    if input_masks is None:
        return [[] for _ in range(num_images)]
    if len(input_masks) != num_images:
        raise ValueError(
            f"input_masks has masks for {len(input_masks)} images, but there are {num_images} images; its levels are "
            "[image][prompt][h][w]."
        )
    return [[read_mask(mask) for mask in (() if image is None else image)] for image in input_masks]


def read_mask(mask: Any) -> np.ndarray:
    """As float32."""
    if hasattr(mask, "detach"):  # a tensor, which may be on a GPU, in a type that numpy lacks, or carry gradients
        mask = mask.detach().cpu().float()
    try:
        with np.errstate(over="ignore"):  # what becomes infinite is refused later
            return np.asarray(mask, dtype=np.float32)
    except OverflowError:
        raise ValueError("A mask in input_masks has numbers that are too large.") from None


def check_sizes(original_sizes: Any) -> list[list]:
    """`original_sizes` as lists of height and width."""
    original_sizes = _to_lists(original_sizes, "original_sizes")
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
                if not _are_finite(point):
                    raise ValueError(f"Image {i}, prompt {q}: the point {point} is not finite.")
                if not (0 <= point[0] <= width and 0 <= point[1] <= height):
                    raise ValueError(
                        f"Image {i}, prompt {q}: the point {point} lies outside the image, which is {width} pixels "
                        f"wide and {height} high; points are x, y in pixels of the image."
                    )


def _are_finite(values: list) -> bool:
    """Once they are float32 in the model frame, too; Python's whole numbers may be of any length."""
    return all(abs(value) < 1e30 for value in values)


def _is_missing(box: list) -> bool:
    return not box or all(value == PAD_VALUE for value in box)


def _check_boxes(boxes: list, original_sizes: list):
    for i, (image, (height, width)) in enumerate(zip(boxes, original_sizes, strict=True)):
        for q, box in enumerate(image):
            if box and (len(box) != 4 or None in box):
                raise ValueError(f"Image {i}, prompt {q}: a box is four numbers x1, y1, x2, y2, got {box}.")
            if _is_missing(box):
                continue
            if not _are_finite(box):
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


def clip_box(box: list[float], width: int, height: int) -> list[float]:
    """
    A box (x1, y1, x2, y2) without what lies beyond its image, which the model has no positions for: it was trained
    without them, and its masks get worse. Who clips says `BOX_IS_CLIPPED`.
    """
    return np.clip(box, 0, (width, height) * 2).tolist()


def _clip_boxes(boxes: list, original_sizes: list) -> list[list[list]]:
    """Python shows the warning once a process, as its text is the same for all boxes."""
    clipped = [
        [box if _is_missing(box) else clip_box(box, width, height) for box in image]
        for image, (height, width) in zip(boxes, original_sizes, strict=True)
    ]
    if clipped != boxes:
        warnings.warn(BOX_IS_CLIPPED, stacklevel=2)
    return clipped


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
            if mask.ndim != 2 or mask.shape != first.shape or not mask.size:
                raise ValueError(
                    f"Image {i}, prompt {q}: every mask in input_masks must be [h, w], all of one size, got shape "
                    f"{mask.shape} after {first.shape}."
                )
            if not (np.abs(mask) <= 1e9).all():  # the squares of larger ones do not fit into float32 for long
                raise ValueError(
                    f"Image {i}, prompt {q}: the mask in input_masks holds NaN or infinite logits, or some beyond 1e9."
                )


def _pad_points(points: list, labels: list, scales: list, num_prompts: int) -> dict[str, np.ndarray]:
    num_points = max((len(prompt) for image in points for prompt in image), default=0)
    if num_points == 0:
        return {}
    input_points = np.full((len(points), num_prompts, num_points, 2), PAD_VALUE, dtype=np.float32)
    input_labels = np.full((len(points), num_prompts, num_points), PAD_VALUE, dtype=np.int64)
    for i, image in enumerate(points):
        for q, prompt in enumerate(image):
            if prompt:
                input_points[i, q, : len(prompt)] = np.float64(prompt) * scales[i]
                input_labels[i, q, : len(prompt)] = labels[i][q]
    input_points[input_labels < 0] = PAD_VALUE
    return {"input_points": input_points, "input_labels": input_labels}


def _pad_boxes(boxes: list, scales: list, num_prompts: int) -> dict[str, np.ndarray]:
    if all(_is_missing(box) for image in boxes for box in image):
        return {}
    input_boxes = np.full((len(boxes), num_prompts, 4), PAD_VALUE, dtype=np.float32)
    for i, image in enumerate(boxes):
        for q, box in enumerate(image):
            if not _is_missing(box):
                input_boxes[i, q] = np.float64(box) * (scales[i] * 2)
    return {"input_boxes": input_boxes}


def _pad_masks(masks: list, num_prompts: int) -> dict[str, np.ndarray]:
    if not any(masks):
        return {}
    shape = next(mask.shape for image in masks for mask in image)
    input_masks = np.zeros((len(masks), num_prompts, *shape), dtype=np.float32)
    for i, image in enumerate(masks):
        if image:
            input_masks[i, : len(image)] = np.stack(image)
    return {"input_masks": input_masks}
