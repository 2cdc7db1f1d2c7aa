"""Draws masks with their prompts over images, class maps, and features. Needs only PIL and numpy."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from colorsys import hsv_to_rgb

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

# Distinct with every kind of colour vision, and against most photographs; after eight objects they repeat.
PALETTE = (
    (0, 140, 255),  # blue
    (255, 176, 0),  # amber
    (220, 38, 127),  # magenta
    (0, 190, 150),  # bluish green
    (240, 228, 66),  # yellow
    (120, 94, 240),  # violet
    (254, 97, 0),  # orange
    (150, 220, 255),  # pale blue
)
FOREGROUND_COLOR, BACKGROUND_COLOR = (0, 158, 60), (214, 20, 40)
PIXELS_AT_ONCE = 2**20  # that are drawn over
OPACITY = 0.45  # of the fill
REMOVED_COLOR = (128, 128, 128)  # of patches that the encoder does not see
PANEL_SIDE = 192  # pixels


def draw_masks(
    image: Image.Image,
    masks,
    points: Sequence | None = None,
    labels: Sequence | None = None,
    boxes: Sequence | None = None,
    scores: Sequence[float] | None = None,
) -> Image.Image:
    """
    Draws each mask over the image in a colour of its own, with an outline, its prompts, and a tag with its number
    (if there are several) and score (if given). Lines and text grow with the image.

    Coordinates are (x, y) in pixels of `image`, x to the right and y down. N objects, drawn in order.

    Args:
        image: upright (an EXIF tag is ignored), of any mode that PIL converts to RGB.
        masks: N masks of the image's height and width, true or above 0 inside; arrays, tensors or `RleMasks`.
        points: for each object a list of its points (x, y), or `None`.
        labels: for each object a list of its points' labels: 1 on the object (circle), 0 on the background (cross),
            negative: the point is not drawn. Without labels every point is on the object.
        boxes: for each object its box (x1, y1, x2, y2), or `None`.
        scores: for each object its score.

    Returns:
        A new RGB image of the same size.

    Raises:
        ValueError: if a mask is not of the image's size, or there is not one entry for each mask.
    """
    for name, values in {"points": points, "labels": labels, "boxes": boxes, "scores": scores}.items():
        if values is not None and len(values) != len(masks):
            raise ValueError(f"There are {len(masks)} masks but {name} for {len(values)} objects; give one for each.")

    tops = []

    def laid() -> Iterator[np.ndarray]:  # one at a time: all masks of a large image may not fit into memory
        for mask in masks:
            mask = _to_bool(mask, image)
            tops.append(_top_of(mask) if mask.any() else None)
            yield mask

    width = line_width(image.size)
    image = lay_masks(image, laid())
    draw = ImageDraw.Draw(image)
    for i, box in enumerate(boxes or []):
        if box is not None and len(box):
            draw.rectangle([round(float(x)) for x in box], outline=color_of(i), width=width)
    for i, top in enumerate(tops):
        parts = [str(i + 1)] if len(tops) > 1 else []
        parts += [f"{float(scores[i]):.2f}"] if scores is not None else []
        if parts and top is not None:
            _draw_tag(draw, "  ".join(parts), top, color_of(i), image.size)
    for i, prompt in enumerate(points or []):  # last, as they are small and must stay visible
        for k, point in enumerate(prompt if prompt is not None else []):
            label = 1 if labels is None else int(labels[i][k])
            if label >= 0:
                _draw_point(image, point, label, radius=3 * width + 1)
    return image


def _to_bool(mask, image: Image.Image) -> np.ndarray:
    """A mask of the image as a bool array; ValueError for another size."""
    mask = np.asarray(mask)
    if mask.shape != (image.height, image.width):
        raise ValueError(
            f"A mask has shape {mask.shape}, but the image is {image.height} pixels high and {image.width} wide; "
            "masks are [N, height, width]."
        )
    return mask if mask.dtype == bool else mask > 0


def lay_masks(image: Image.Image, masks: Iterable[np.ndarray]) -> Image.Image:
    """
    `draw_masks` without prompts and tags, for many masks: arrays `[height, width]`, bool, which may come from a
    generator one at a time.
    """
    width = line_width(image.size)
    image = image.convert("RGB")
    for i, mask in enumerate(masks):
        _draw_mask(image, mask, color_of(i), width)
    return image


def color_of(index: int) -> tuple[int, int, int]:
    return PALETTE[index % len(PALETTE)]


def ink_on(color: tuple[int, int, int]) -> str:
    """Black or white, whichever is readable on a colour."""
    return "black" if np.dot(color, (0.299, 0.587, 0.114)) > 110 else "white"


def line_width(size: tuple[int, int]) -> int:
    """Width in pixels of an outline that looks the same on images of any (width, height)."""
    return max(1, round(max(size) / 280))


def _draw_mask(image: Image.Image, mask: np.ndarray, color: tuple[int, int, int], width: int) -> None:
    """Fill and outline, in place. Only pixels near the mask are computed, so small masks are cheap."""
    if not mask.any():
        return
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    margin = 4 * width
    left, top = max(0, columns[0] - margin), max(0, rows[0] - margin)
    right, bottom = min(mask.shape[1], columns[-1] + 1 + margin), min(mask.shape[0], rows[-1] + 1 + margin)
    inside = mask[top:bottom, left:right]

    # A blurred step is a function of the distance to the edge; its inverse (that of the logistic curve is close
    # enough) gives the distance in pixels, positive inside, and with it an outline with soft rather than jagged edges.
    blurred = Image.fromarray(inside.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(width))
    blurred = np.asarray(blurred)
    rows_at_once = max(1, PIXELS_AT_ONCE // blurred.shape[1])
    for start in range(0, len(blurred), rows_at_once):  # floats of all of a large image would take 100 bytes a pixel
        band = slice(start, start + rows_at_once)
        step = (blurred[band] / np.float32(255)).clip(1 / 512, 1 - 1 / 512)
        distance = width * np.log(step / (1 - step)) / 1.7
        line = _coverage(distance, 0, width)[..., None]
        halo = 0.7 * _coverage(distance, -max(1, 0.7 * width), 0)[..., None]

        area = (int(left), int(top) + start, int(right), int(top) + start + len(step))
        pixels = np.asarray(image.crop(area), dtype=np.float32)
        pixels = np.where(inside[band, :, None], (1 - OPACITY) * pixels + OPACITY * np.float32(color), pixels)
        pixels = (1 - halo) * pixels + halo * 255
        pixels = (1 - line) * pixels + line * np.float32(color)
        image.paste(Image.fromarray(pixels.round().astype(np.uint8)), area[:2])


def _coverage(distance: np.ndarray, start: float, end: float) -> np.ndarray:
    """How much of each pixel lies in the band from `start` to `end`."""
    return (distance - start + 0.5).clip(0, 1) * (end - distance + 0.5).clip(0, 1)


def _top_of(mask: np.ndarray) -> tuple[int, int]:
    """(x, y) of the middle pixel of a mask's first row."""
    row = int(mask.any(axis=1).argmax())
    columns = np.flatnonzero(mask[row])
    return int(columns[len(columns) // 2]), row


def _draw_tag(draw: ImageDraw.ImageDraw, text: str, anchor: tuple[int, int], color, size: tuple[int, int]) -> None:
    """Text on a rounded patch that stands on `anchor`, moved where it would leave the image."""
    height = max(9, round(max(size) / 36))
    font = ImageFont.load_default(size=height)
    pad = height // 3
    text_left, text_top, text_right, text_bottom = draw.textbbox((0, 0), text, font=font)
    tag_width, tag_height = text_right - text_left + 2 * pad, text_bottom - text_top + 2 * pad
    left = max(0, min(anchor[0] - tag_width // 2, size[0] - tag_width))
    top = max(0, min(anchor[1] - tag_height // 2, size[1] - tag_height))
    draw.rounded_rectangle((left, top, left + tag_width, top + tag_height), radius=pad, fill=color)
    draw.text((left + pad - text_left, top + pad - text_top), text, font=font, fill=ink_on(color))


def _draw_point(image: Image.Image, point, label: int, radius: int) -> None:
    """A green circle on the object or a red cross on the background, both ringed with white."""

    def circle(draw: ImageDraw.ImageDraw, unit: float) -> None:
        draw.ellipse((0, 0, 2 * unit, 2 * unit), fill="white")
        draw.ellipse((0.28 * unit, 0.28 * unit, 1.72 * unit, 1.72 * unit), fill=FOREGROUND_COLOR)

    def cross(draw: ImageDraw.ImageDraw, unit: float) -> None:
        for start, thickness, color in ((0.16, 0.85, "white"), (0.36, 0.4, BACKGROUND_COLOR)):
            near, far = start * unit, (2 - start) * unit
            for line in ((near, near, far, far), (near, far, far, near)):
                draw.line(line, fill=color, width=round(thickness * unit))

    stamp = _stamp(circle if label else cross, 2 * radius + 1)
    # Pixel p covers p to p + 1, so its index is the coordinate rounded down.
    image.paste(stamp, (int(point[0]) - radius, int(point[1]) - radius), stamp)


def _stamp(draw_shape: Callable, side: int, enlarge: int = 8) -> Image.Image:
    """A small RGBA image, drawn large and shrunk so that its edges are smooth."""
    large = Image.new("RGBA", (side * enlarge, side * enlarge), (255, 255, 255, 0))
    draw_shape(ImageDraw.Draw(large), (side * enlarge - 1) / 2)
    return large.resize((side, side), Image.Resampling.BOX)


def draw_classes(image: Image.Image, classes) -> Image.Image:
    """
    Draws a colour for each class over the image, which turns gray so that colours can be recognised: a class has the
    same colour in every image, and up to 150 classes have different ones.

    Args:
        image: of any mode that PIL converts to RGB.
        classes: of each pixel, 0 to 254, and 255 where there is none and the image shows; `[height, width]`, array
            or tensor on the CPU.

    Returns:
        A new RGB image of the same size.

    Raises:
        ValueError: if `classes` is not of the image's size.
    """
    classes = np.asarray(classes)
    if classes.shape != (image.height, image.width):
        raise ValueError(
            f"The classes have shape {classes.shape}; the image is {image.height} pixels high and {image.width} wide."
        )
    # Beyond the palette: hues at the golden angle, which keeps any number of them apart, alternately light and dark.
    hues = [(number * 0.618034 % 1, (0.85, 0.55)[number % 2], (1, 0.75, 0.5)[number % 3]) for number in range(255)]
    colors = [*PALETTE, *(tuple(round(255 * part) for part in hsv_to_rgb(*hue)) for hue in hues)][:255]
    colors = np.float32([*colors, (0, 0, 0)])[classes]
    gray = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    pixels = np.where(classes[..., None] == 255, image.convert("RGB"), 0.3 * gray + 0.7 * colors)
    return Image.fromarray(pixels.round().astype(np.uint8))


# ------------------------------------------------------------------------------------------------ features


def pca_colors(features, reference=None) -> np.ndarray:
    """
    Features as colours: red, green and blue are the first three principal components, so similar features have similar
    colours. Each is scaled from the 2nd to the 98th percentile, because a few outlier patches (vision transformers
    have them) would otherwise take all the contrast.

    Args:
        features: `[..., C]`, array or tensor on the CPU.
        reference: features `[..., C]` from which components and ranges are computed, by default `features`
            themselves; images with the same reference can be compared.

    Returns:
        uint8 array `[..., 3]`. Where the reference varies in fewer than three directions, the others are mid-grey.

    Raises:
        ValueError: if the numbers of channels differ, or the features are not finite.
    """
    features = np.asarray(features, dtype=np.float32)
    reference = features if reference is None else np.asarray(reference, dtype=np.float32)
    if features.shape[-1] != reference.shape[-1]:
        raise ValueError(f"The features have {features.shape[-1]} channels, but the reference {reference.shape[-1]}.")
    if not (np.isfinite(features).all() and np.isfinite(reference).all()):
        raise ValueError("The features are not finite, so they have no colours.")
    rows = reference.reshape(-1, reference.shape[-1])
    mean = rows.mean(axis=0)
    _, strengths, components = np.linalg.svd(rows - mean, full_matrices=False)
    components = components[:3][strengths[:3] > 1e-5 * np.linalg.norm(rows)]
    components *= np.where(components.sum(axis=1, keepdims=True) < 0, -1, 1)  # an SVD has no sign of its own
    colors = np.full((*features.shape[:-1], 3), 0.5, dtype=np.float32)
    colors[..., : len(components)] = _stretch((features - mean) @ components.T, (rows - mean) @ components.T)
    return (255 * colors).round().astype(np.uint8)


def _stretch(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """`[..., n]` to 0 to 1, from the 2nd to the 98th percentile of each column of `reference` `[m, n]`."""
    low, high = np.percentile(reference, (2, 98), axis=0)
    return ((values - low) / np.maximum(high - low, 1e-12)).clip(0, 1)


def draw_features(
    images: Sequence[Image.Image], masks, targets, reconstructions, grid: tuple[int, int], pixels: bool = False
) -> Image.Image:
    """
    Inputs and outputs of masked pretraining, a row for each image: the input, the input without the removed patches,
    the target and its reconstruction, both in the colours of all targets (`pca_colors`).

    Args:
        images: B images, as the student sees them.
        masks: `[B, N]`, 1 for removed patches.
        targets, reconstructions: `[B, N, C]`, arrays or tensors on the CPU.
        grid: rows and columns of patches, h * w = N, row by row.
        pixels: targets are pixels instead of features, C = 3 * side * side, by channel, row, column, in any range.

    Raises:
        ValueError: if the shapes do not fit, or values are not finite.
    """
    num_patches = grid[0] * grid[1]
    masks, targets, reconstructions = (np.asarray(one, dtype=np.float32) for one in (masks, targets, reconstructions))
    for name, values in {"masks": masks, "targets": targets, "reconstructions": reconstructions}.items():
        if values.shape[:2] != (len(images), num_patches):
            raise ValueError(
                f"The {name} have shape {list(values.shape)}, but {len(images)} images on a grid of {grid[0]} x "
                f"{grid[1]} need [{len(images)}, {num_patches}, ...]."
            )
    size = (PANEL_SIDE * grid[1] // max(grid), PANEL_SIDE * grid[0] // max(grid))
    images = [image.convert("RGB").resize(size, Image.Resampling.BICUBIC) for image in images]
    removed = [Image.fromarray(mask.reshape(grid) > 0).resize(size, Image.Resampling.NEAREST) for mask in masks]
    gray = Image.new("RGB", size, REMOVED_COLOR)
    columns = {
        "input": images,
        "masked": [Image.composite(gray, image, mask) for image, mask in zip(images, removed, strict=True)],
        "target": _draw_patches(targets, targets, grid, pixels, size),
        "reconstruction": _draw_patches(reconstructions, targets, grid, pixels, size),
    }
    return image_table(columns)


def image_table(columns: dict[str, Sequence[Image.Image]]) -> Image.Image:
    """Images of one size in a table, by column, under the columns' names."""
    first = next(iter(columns.values()))
    (width, height), rows, top = first[0].size, len(first), PANEL_SIDE // 8
    gap = PANEL_SIDE // 32
    table = Image.new("RGB", (gap + len(columns) * (width + gap), top + rows * (height + gap)), "white")
    draw, font = ImageDraw.Draw(table), ImageFont.load_default(size=top // 2)
    for column, (name, cells) in enumerate(columns.items()):
        left = gap + column * (width + gap)
        draw.text((left + width // 2, top // 2), name, font=font, fill="black", anchor="mm")
        for row, cell in enumerate(cells):
            table.paste(cell, (left, top + row * (height + gap)))
    return table


def _draw_patches(
    values: np.ndarray, reference: np.ndarray, grid: tuple[int, int], pixels: bool, size: tuple[int, int]
) -> list[Image.Image]:
    """An image of `size` for each of `values` `[B, N, C]`, where a patch is one colour or its own pixels."""
    if pixels:
        colors = (255 * _stretch(values[..., None], reference.reshape(-1, 1))).round().astype(np.uint8)
    else:
        colors = pca_colors(values, reference)
    side = round((colors[0, 0].size / 3) ** 0.5)
    colors = colors.reshape(-1, *grid, 3, side, side).transpose(0, 1, 4, 2, 5, 3)  # B, h, side, w, side, 3
    colors = colors.reshape(-1, grid[0] * side, grid[1] * side, 3)
    return [Image.fromarray(one).resize(size, Image.Resampling.NEAREST) for one in colors]


__all__ = ["draw_classes", "draw_features", "draw_masks", "image_table", "lay_masks", "pca_colors"]
