"""Segment everything: a grid of points over a picture -> its masks, without duplicates.

Names, thresholds and records are those of segment-anything's `SamAutomaticMaskGenerator`; the masks are those that
transformers' `pipeline("mask-generation")` finds with this package's image processor. Less is done for them:

- the decoder tells how good a mask will be before it makes the mask, and makes only good ones;
- whether a mask is stable, and the box around it, follow from its low-resolution logits (`measure_masks`);
- only masks that are left at the end are brought to the size of the picture, one by one.

Peak memory grows with the picture and with the number of masks that are left, not with the number of points. Pictures
may have as many pixels as the image processor's `max_image_pixels`; where that is raised, about 10 bytes of memory a
pixel are needed beside the masks, which are best asked for as RLE. Crops find the small objects of large pictures.
"""

import math
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from tqdm import tqdm
from transformers.image_utils import ImageInput

from hf_efficientsam.model.image_processing_efficientsam import (
    INPUT_PIXELS_PER_MASK_PIXEL,
    EfficientSamImageProcessor,
    lay_crops,
    mask_to_box,
    masks_to_rles,
    non_maximum_suppression,
    point_grid,
    resize_masks,
    stability_score,
    suppress_duplicates,
    touches_crop_border,
)
from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel
from hf_efficientsam.model.processing_efficientsam import EfficientSamProcessor

from .results import mask_rles

OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")


def official_point_grid(n: int) -> np.ndarray:
    """`[n * n, 2]`: the grid of the official notebook over the unit square, x and y at 0, 1/n, ... (n - 1)/n."""
    places = np.arange(n) / n
    return np.stack(np.meshgrid(places, places, indexing="ij"), axis=-1).reshape(-1, 2)


GRIDS = {"cell_centers": point_grid, "official": official_point_grid}


# ------------------------------------------------------------------------------------------------ low resolution


@dataclass(frozen=True)
class CubicAxis:
    """
    How `resize_masks` makes one axis of a mask from that of the logits: pixel p is the sum of the four logits around
    it, by weights of its own. Pixels between the same two logits form a cell; cell c lies between logits c - 1 and c,
    so n logits have n + 1 cells. K is the largest number of pixels in a cell.

    Attributes:
        first, last: `[cells]`, first and last pixel of each cell; a cell without pixels has last < first.
        weights: `[cells, K, 4]` of the logits c - 2 to c + 1, where those beyond the border repeat the last.
    """

    first: torch.Tensor
    last: torch.Tensor
    weights: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        return self.last - self.first + 1

    @classmethod
    def make(cls, num_pixels: int, num_logits: int, scale: float, device: torch.device) -> "CubicAxis":
        """`scale` is the distance of two pixels, in logits."""
        scale = torch.tensor(scale, dtype=torch.float32)
        places = scale * (torch.arange(num_pixels, dtype=torch.float32) + 0.5) - 0.5
        cells = places.floor()
        offsets = places - cells
        cells = cells.long() + 1
        counts = torch.bincount(cells, minlength=num_logits + 1)
        first = counts.cumsum(0) - counts
        weights = torch.zeros(num_logits + 1, max(1, int(counts.max())), 4)
        weights[cells, torch.arange(num_pixels) - first[cells]] = cls.cubic_weights(offsets)
        return cls(*(x.to(device) for x in (first, first + counts - 1, weights)))

    @staticmethod
    def cubic_weights(offsets: torch.Tensor, a: float = -0.75) -> torch.Tensor:
        """`[n]` in [0, 1) -> `[n, 4]`. Cubic convolution (Keys 1981) with the constant of torch's bicubic."""

        def near(x):
            return ((a + 2) * x - (a + 3)) * x * x + 1

        def far(x):
            return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

        return torch.stack([far(offsets + 1), near(offsets), near(1 - offsets), far(2 - offsets)], dim=1)


# The absolute weights of a pixel add up to at most 1.375 in one axis, so the negative ones in both to (1.375 ** 2 - 1)
# / 2: a pixel lies no further than this share of their range beyond the 16 logits around it.
OVERSHOOT = (1.375**2 - 1) / 2


def mask_axes(
    logits_size: tuple[int, int], size: tuple[int, int], input_size: tuple[int, int], device
) -> tuple[CubicAxis, CubicAxis]:
    """Rows and columns of `resize_masks(logits, size, input_size)`."""
    padded = [INPUT_PIXELS_PER_MASK_PIXEL * n for n in logits_size]
    if list(input_size) == padded:
        scales = [n / n_out for n, n_out in zip(logits_size, size, strict=True)]
    else:
        scales = [n / (INPUT_PIXELS_PER_MASK_PIXEL * n_out) for n, n_out in zip(input_size, size, strict=True)]
    return tuple(CubicAxis.make(*one, device) for one in zip(size, logits_size, scales, strict=True))


def measure_masks(
    logits: torch.Tensor,
    size: tuple[int, int],
    input_size: tuple[int, int],
    mask_threshold: float,
    stability_score_offset: float,
    stability_score_thresh: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Which masks `resize_masks(logits, size, input_size)` are stable and not empty, and their boxes, without resizing.

    Between four logits the interpolated pixels are bounded by the 16 around (`OVERSHOOT`). Where the bounds leave open
    on which side of a threshold they lie, they are computed. What depends on rounding after all, and masks of which
    more than half is open, are resized. So the answer is the same.

    Args:
        logits: `[N, h, w]`, float32.
        size, input_size: height and width of the masks, and of the model input that shows them before padding.
        mask_threshold, stability_score_offset, stability_score_thresh: see [`EfficientSamMaskGenerator`].

    Returns:
        `[N]` bool, and `[N, 4]` int64: first column, first row, last column, last row of each such mask.
    """
    stable = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    boxes = torch.zeros(len(logits), 4, dtype=torch.long, device=logits.device)
    axes = mask_axes(logits.shape[1:], size, input_size, logits.device)
    thresholds = [mask_threshold]
    if stability_score_thresh > 0:
        thresholds = [mask_threshold + stability_score_offset, mask_threshold - stability_score_offset, mask_threshold]
    at_once = max(1, 2**22 // logits.shape[1:].numel())
    for start in range(0, len(logits), at_once):
        part = torch.arange(len(logits), device=logits.device)[start : start + at_once]
        counts, part_boxes, dense = _bound_masks(logits[part], axes, thresholds)
        surely, never = counts[0, -1] > 0, counts[1, -1] == 0
        if stability_score_thresh > 0:
            (inner_low, outer_low, _), (inner_high, outer_high, _) = counts.double()
            surely &= inner_low > (stability_score_thresh + 1e-6) * outer_high.clamp(min=1)
            never |= inner_high <= (stability_score_thresh - 1e-6) * outer_low.clamp(min=1)
        never &= ~dense
        open_masks = ~never & (dense | ~surely | (part_boxes[0] != part_boxes[1]).any(dim=1))
        stable[part], boxes[part] = surely & ~never & ~open_masks, part_boxes[0]
        for few in part[open_masks].split(max(1, 2**22 // math.prod(size))):
            masks = resize_masks(logits[few, None], size, input_size)[:, 0]
            good = (masks > mask_threshold).flatten(1).any(dim=1)
            if stability_score_thresh > 0:
                good &= stability_score(masks, mask_threshold, stability_score_offset) > stability_score_thresh
            stable[few[good]], boxes[few[good]] = True, mask_to_box(masks[good] > mask_threshold)
    return stable, boxes


def _bound_masks(
    logits: torch.Tensor, axes: tuple[CubicAxis, CubicAxis], thresholds: list[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Returns:
        `[2, 3, N]` int64: at least and at most so many pixels are above each of the thresholds;
        `[2, N, 4]` int64: boxes of the pixels surely, and of those possibly, above the last threshold;
        `[N]` bool: masks with too many open pixels, whose numbers here mean nothing.
    """
    rows, columns = axes
    num_logits = max(logits.shape[1:])
    padded = F.pad(logits[:, None], (2, 2, 2, 2), mode="replicate")[:, 0]
    highest, lowest = _windows(padded, torch.maximum), _windows(padded, torch.minimum)
    spread = highest - lowest
    # Rounding: of the sums, and of the pixels' places (up to num_logits, so that is their error in units of 2 ** -23),
    # by which values change no faster than 6 times the spread from logit to logit.
    slack = 1e-6 * torch.maximum(highest.abs(), lowest.abs()) + 6 * num_logits * 2.0**-23 * spread
    low, high = lowest - OVERSHOOT * spread - slack, highest + OVERSHOOT * spread + slack

    pixels = rows.counts[:, None] * columns.counts  # of each cell
    is_open = torch.zeros_like(low, dtype=torch.bool)
    for threshold in thresholds:
        is_open |= (low <= threshold) & (high > threshold)
    is_open &= pixels > 0
    dense = is_open.float().mean(dim=(1, 2)) > 0.5
    is_open &= ~dense[:, None, None]

    settled = low.masked_fill(is_open | (pixels == 0), -math.inf)  # so not above any threshold
    widths, heights = columns.counts.float(), rows.counts.double()  # exact up to 2 ** 24 columns
    counts = torch.stack([((settled > one).float() @ widths).double() @ heights for one in thresholds]).long()
    counts = counts.repeat(2, 1, 1)
    inside = settled > thresholds[-1]
    boxes = torch.cat(
        [
            _extent(inside.any(dim=1), columns.first, columns.last),
            _extent(inside.any(dim=2), rows.first, rows.last),
        ],
        dim=1,
    )[:, [0, 2, 1, 3]].repeat(2, 1, 1)

    mask, row, column = is_open.nonzero(as_tuple=True)
    corner = (mask * padded.shape[1] + row) * padded.shape[2] + column
    window = torch.arange(4, device=logits.device)
    window = (window[:, None] * padded.shape[2] + window).flatten()
    around = padded.flatten()[corner[:, None] + window].unflatten(1, (4, 4))
    values = rows.weights[row] @ around @ columns.weights[column].transpose(1, 2)  # [open cells, K, K]
    y = rows.first[row, None] + torch.arange(values.shape[1], device=logits.device)
    x = columns.first[column, None] + torch.arange(values.shape[2], device=logits.device)
    real = (y <= rows.last[row, None])[:, :, None] & (x <= columns.last[column, None])[:, None]
    slack = slack[mask, row, column][:, None, None]
    for i, doubt in enumerate((slack, -slack)):  # surely, possibly
        for k, threshold in enumerate(thresholds):
            above = real & (values > threshold + doubt)
            counts[i, k].index_add_(0, mask, above.flatten(1).sum(dim=1))
        for axis, places, ends in ((2, y, (1, 3)), (1, x, (0, 2))):
            hit = above.any(dim=axis)
            first = torch.where(hit, places, NOWHERE).amin(dim=1)
            last = torch.where(hit, places, -1).amax(dim=1)
            boxes[i, :, ends[0]].scatter_reduce_(0, mask, first, "amin")
            boxes[i, :, ends[1]].scatter_reduce_(0, mask, last, "amax")
    return counts, boxes, dense


NOWHERE = 2**40  # first column or row of an empty mask


def _windows(padded: torch.Tensor, larger) -> torch.Tensor:
    """`[N, h + 4, w + 4] -> [N, h + 1, w + 1]`: the largest (or least) of each 4 x 4."""
    for axis in (1, 2):
        for step in (1, 2):
            n = padded.shape[axis] - step
            padded = larger(padded.narrow(axis, 0, n), padded.narrow(axis, step, n))
    return padded


def _extent(hit: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """`[N, cells]` bool -> `[N, 2]`: first and last pixel of the cells that are hit."""
    return torch.stack([torch.where(hit, first, NOWHERE).amin(dim=1), torch.where(hit, last, -1).amax(dim=1)], dim=1)


# ------------------------------------------------------------------------------------------------ the generator


class EfficientSamMaskGenerator:
    """
    Finds the masks of a whole picture without a prompt: every point of a grid is a prompt, and of the masks that come
    back the confident and stable ones are kept, each object once.

        generator = EfficientSamMaskGenerator(model, processor)
        for record in generator.generate(image): ...

    Args:
        model: on any device, in any precision.
        processor: the model's [`EfficientSamProcessor`] or its image processor.
        points_per_side: points along each side of the grid over the picture.
        points_per_batch: prompts that go through the model at a time. A batch that does not fit into memory is halved,
            with a warning.
        pred_iou_thresh: least predicted IoU, exclusive; 0 keeps all.
        stability_score_thresh: least stability, exclusive; 0 keeps all. Stability is the IoU of the two masks that
            `mask_threshold` plus and minus `stability_score_offset` give.
        mask_threshold: logits above it belong to the object.
        box_nms_thresh: of two masks of a crop whose boxes overlap by a larger IoU only the more confident is kept.
        crop_n_layers: layer i (from 1) also looks at 4**i overlapping crops of the picture, for small objects.
        crop_nms_thresh: the same between crops, where the mask of the smaller crop is kept.
        crop_overlap_ratio: overlap of the crops of layer 1 as a fraction of the picture's short side; it halves with
            each layer.
        crop_n_points_downscale_factor: the grid of layer i has this factor to the power i fewer points a side.
        point_grids: for the picture and for each layer its points `[n, 2]`, x and y from 0 to 1, in place of
            `points_per_side` and `point_layout`.
        point_layout: "cell_centers" as segment-anything lays the grid, or "official" as the official EfficientSAM
            notebook does, from the top left corner.
        min_mask_region_area: holes and islands of fewer pixels are filled and removed; 0 leaves all.
        multimask_output: three candidates for each point, or one.
        output_mode: what `segmentation` is: "binary_mask", a bool array `[height, width]`; "uncompressed_rle", a dict
            with COCO's `size` and `counts` as numbers; "coco_rle", with `counts` as pycocotools' string.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        model: EfficientSamModel,
        processor: EfficientSamProcessor | EfficientSamImageProcessor,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: list[np.ndarray] | None = None,
        min_mask_region_area: int = 0,
        output_mode: str = "binary_mask",
        mask_threshold: float = 0.0,
        multimask_output: bool = True,
        point_layout: str = "cell_centers",
    ):
        for name, value, least in (
            ("points_per_batch", points_per_batch, 1),
            ("crop_n_layers", crop_n_layers, 0),
            ("crop_n_points_downscale_factor", crop_n_points_downscale_factor, 1),
            ("min_mask_region_area", min_mask_region_area, 0),
            ("stability_score_offset", stability_score_offset, 0),
        ):
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        # A million points, 5461 crops: more is a slip of the hand, and would fill the memory before the first mask.
        for name, value, most in (
            ("points_per_side", points_per_side or 0, 1024),
            ("crop_n_layers", crop_n_layers, 6),
        ):
            if value > most:
                raise ValueError(f"{name} must be at most {most}, got {value}.")
        for name, value in (
            ("pred_iou_thresh", pred_iou_thresh),
            ("stability_score_thresh", stability_score_thresh),
            ("box_nms_thresh", box_nms_thresh),
            ("crop_nms_thresh", crop_nms_thresh),
        ):
            if not value <= 1:
                raise ValueError(f"{name} is compared with an IoU, so it must be at most 1, got {value}.")
        for name, value, choices in (
            ("output_mode", output_mode, OUTPUT_MODES),
            ("point_layout", point_layout, GRIDS),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
        if point_grids is None:
            if points_per_side is None or points_per_side < 1:
                raise ValueError(f"points_per_side must be at least 1, got {points_per_side}; or give point_grids.")
            sides = [int(points_per_side / crop_n_points_downscale_factor**i) for i in range(crop_n_layers + 1)]
            point_grids = [GRIDS[point_layout](max(1, side)) for side in sides]
        if len(point_grids) != crop_n_layers + 1:
            raise ValueError(
                f"point_grids must hold {crop_n_layers + 1} grids, for the picture and each layer of crops."
            )
        for grid in point_grids:
            if np.ndim(grid) != 2 or np.shape(grid)[1] != 2 or np.min(grid) < 0 or np.max(grid) > 1:
                raise ValueError("Each of point_grids must be points [n, 2] with x and y from 0 to 1.")
        self.model = model.eval()
        self.image_processor = getattr(processor, "image_processor", processor)
        self.points_per_batch = points_per_batch
        self.pred_iou_thresh = pred_iou_thresh
        self.stability_score_thresh = stability_score_thresh
        self.stability_score_offset = stability_score_offset
        self.mask_threshold = mask_threshold
        self.box_nms_thresh = box_nms_thresh
        self.crop_n_layers = crop_n_layers
        self.crop_nms_thresh = crop_nms_thresh
        self.crop_overlap_ratio = crop_overlap_ratio
        self.point_grids = [torch.as_tensor(np.asarray(grid), dtype=torch.float64) for grid in point_grids]
        self.min_mask_region_area = min_mask_region_area
        self.multimask_output = multimask_output
        self.output_mode = output_mode

    def generate(self, image: ImageInput, progress: bool = False) -> list[dict]:
        """
        Args:
            image: a picture as the image processor takes it.
            progress: show a bar over the crops.

        Returns:
            A dict for each mask, the most confident first, but those of smaller crops before all others:
            `segmentation`, see `output_mode`, of the upright picture; `area` in pixels;
            `bbox` [x, y, width, height], whose last column and row are x + width and y + height as in
            segment-anything; `predicted_iou`; `stability_score`; `point_coords` [[x, y]], the prompt in pixels of the
            picture; `crop_box` [x, y, width, height], the crop that the mask was found in.
        """
        return next(self.generate_many([image], crop_progress=progress))

    @torch.no_grad()
    def generate_many(
        self, images: Iterable[ImageInput], batch_size: int = 1, crop_progress: bool = False
    ) -> Iterator[list[dict]]:
        """
        What `generate` returns for each of several pictures, one after the other as they are done.

        Args:
            images: pictures; they are read when their turn comes.
            batch_size: pictures that are read ahead, and that go through the encoder together with their crops as far
                as they have one shape there.
            crop_progress: show a bar over the crops of these.
        """
        images, processor = iter(images), self.image_processor
        options = processor.do_convert_rgb, processor.do_rescale, processor.max_image_pixels
        while group := [processor.process_image(image, *options) for image in islice(images, batch_size)]:
            jobs = [  # picture, crop, layer of the crop
                (number, box, layer)
                for number, pixels in enumerate(group)
                for box, layer in zip(
                    *lay_crops(*pixels.shape[1:], self.crop_n_layers, self.crop_overlap_ratio), strict=True
                )
            ]
            crops = [group[number][:, top:bottom, left:right] for number, (left, top, right, bottom), _ in jobs]
            found: list[list[Mask]] = [[] for _ in group]
            bar = tqdm(self.embed(crops, batch_size), total=len(crops), unit="crop", disable=not crop_progress)
            for (number, box, layer), (embedding, input_size) in zip(jobs, bar, strict=True):
                size = group[number].shape[1:]
                found[number] += self.search(embedding, input_size, box, size, self.point_grids[layer])
            for pixels, masks in zip(group, found, strict=True):
                yield self.finish(masks, pixels.shape[1:])

    def embed(self, crops: list[np.ndarray], batch_size: int) -> Iterator[tuple[torch.Tensor, tuple[int, int]]]:
        """The image embedding `[1, C, h, w]` of each crop `[3, height, width]`, and its size in the model input."""

        def input_size(crop: np.ndarray) -> tuple[int, int]:
            return self.image_processor.get_reshaped_input_size(crop.shape[1:])

        for size, same in groupby(crops, input_size):
            while batch := list(islice(same, batch_size)):
                inputs = self.image_processor(batch, input_data_format="channels_first", return_tensors="pt")
                pixel_values = inputs["pixel_values"].to(self.model.device, self.model.dtype)
                for embedding in self.model.get_image_embeddings(pixel_values):
                    yield embedding[None], size

    def search(
        self,
        embedding: torch.Tensor,
        input_size: tuple[int, int],
        crop_box: list[int],
        picture_size: tuple[int, int],
        grid: torch.Tensor,
    ) -> list["Mask"]:
        """The masks of one crop without duplicates, the most confident first."""
        left, top, right, bottom = crop_box
        offset = torch.tensor([left, top, left, top], device=self.model.device)
        points = (grid * torch.tensor(input_size[::-1])).float().to(self.model.device)
        found, boxes, scores = [], offset.new_empty(0, 4), embedding.new_empty(0)
        keep = []
        for start, kept, new_scores, logits in self.predict(embedding, points):
            stable, new_boxes = measure_masks(
                logits.float(),
                (bottom - top, right - left),
                input_size,
                self.mask_threshold,
                self.stability_score_offset,
                self.stability_score_thresh,
            )
            new_boxes = new_boxes + offset
            stable &= ~touches_crop_border(new_boxes, crop_box, picture_size)
            prompts, candidates = (index[stable].tolist() for index in kept.nonzero(as_tuple=True))
            found += [
                Mask(start + prompt, candidate, one.clone())
                for prompt, candidate, one in zip(prompts, candidates, logits[stable], strict=True)
            ]
            boxes, scores = torch.cat([boxes, new_boxes[stable]]), torch.cat([scores, new_scores[stable]])
            keep = non_maximum_suppression(boxes, scores, self.box_nms_thresh).tolist()
            # A mask that a better one overlaps comes back when that one falls to a third. It is then decoded again;
            # until then its logits are let go, so that memory does not grow with the number of points.
            for i in set(range(len(found))).difference(keep):
                found[i].logits = None
        for i in keep:
            mask = found[i]
            if mask.logits is None:
                everything = self.model.predict_confident(
                    embedding, points[None, mask.prompt, None, None], -math.inf, multimask_output=self.multimask_output
                )
                mask.logits = everything[2][mask.candidate].clone()
            mask.score, mask.box = float(scores[i]), boxes[i]
            mask.crop_box, mask.input_size = crop_box, input_size
            x, y = (grid[mask.prompt] * torch.tensor([right - left, bottom - top])).tolist()
            mask.point = [left + x, top + y]
        return [found[i] for i in keep]

    def predict(
        self, embedding: torch.Tensor, points: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """`predict_confident` for some points at a time, after the number of the first of them."""
        start, threshold = 0, self.pred_iou_thresh if self.pred_iou_thresh > 0 else -math.inf
        while start < len(points):
            batch = points[None, start : start + self.points_per_batch, None]
            try:
                result = self.model.predict_confident(embedding, batch, threshold, None, self.multimask_output)
            except RuntimeError as error:  # torch.OutOfMemoryError on a GPU, a plain RuntimeError on a CPU
                if self.points_per_batch == 1 or not re.search("out of memory|not enough memory", str(error).lower()):
                    raise
                self.points_per_batch = max(1, self.points_per_batch // 2)
                warnings.warn(f"Out of memory: going on with points_per_batch={self.points_per_batch}.", stacklevel=2)
                continue
            yield start, *result
            start += batch.shape[1]

    def finish(self, masks: list["Mask"], picture_size: tuple[int, int]) -> list[dict]:
        """The records of a picture's masks from all crops."""
        if not masks:
            return []
        boxes = torch.stack([mask.box for mask in masks])
        crop_boxes = torch.tensor([mask.crop_box for mask in masks], device=boxes.device)
        scores = torch.tensor([mask.score for mask in masks], device=boxes.device)
        keep = suppress_duplicates(boxes, scores, crop_boxes, self.box_nms_thresh, self.crop_nms_thresh).tolist()
        records, boxes, changed = [], [], []
        for mask in (masks[i] for i in keep):
            segmentation, stability = self.enlarge(mask, picture_size)
            if self.min_mask_region_area:
                segmentation, filled = remove_small_regions(segmentation, self.min_mask_region_area, holes=True)
                segmentation, removed = remove_small_regions(segmentation, self.min_mask_region_area, holes=False)
                changed.append(filled or removed)
            left, top, right, bottom = mask_to_box(torch.from_numpy(segmentation)[None])[0].tolist()
            boxes.append([left, top, right, bottom])
            crop_left, crop_top, crop_right, crop_bottom = mask.crop_box
            records.append(
                {
                    "segmentation": self.encode(segmentation),
                    "area": int(segmentation.sum()),
                    "bbox": [left, top, right - left, bottom - top],
                    "predicted_iou": mask.score,
                    "point_coords": [mask.point],
                    "stability_score": stability,
                    "crop_box": [crop_left, crop_top, crop_right - crop_left, crop_bottom - crop_top],
                }
            )
        if self.min_mask_region_area:  # masks that are now alike: those that were left as they were are better
            threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
            keep = non_maximum_suppression(torch.tensor(boxes), 1 - torch.tensor(changed).float(), threshold)
            records = [records[i] for i in sorted(keep.tolist())]
        return records

    def enlarge(self, mask: "Mask", picture_size: tuple[int, int]) -> tuple[np.ndarray, float]:
        """A mask in the picture, bool `[height, width]`, and its stability."""
        left, top, right, bottom = mask.crop_box
        logits = resize_masks(mask.logits[None, None], (bottom - top, right - left), mask.input_size)[0]
        stability = stability_score(logits, self.mask_threshold, self.stability_score_offset).item()
        segmentation = np.zeros(picture_size, dtype=bool)
        segmentation[top:bottom, left:right] = (logits[0] > self.mask_threshold).cpu().numpy()
        return segmentation, stability

    def encode(self, segmentation: np.ndarray) -> np.ndarray | dict:
        if self.output_mode == "binary_mask":
            return segmentation
        if self.output_mode == "uncompressed_rle":
            return masks_to_rles(torch.from_numpy(segmentation)[None])[0]
        return mask_rles(segmentation[None])[0]


@dataclass
class Mask:
    """A mask while the picture is searched: `candidate` of the point number `prompt` of its crop."""

    prompt: int
    candidate: int
    logits: torch.Tensor | None  # [h, w]; None while a better mask overlaps this one
    # Known once its crop is done: frame of `box` (x1, y1, x2, y2), `crop_box` and `point` is the picture.
    score: float = 0.0
    box: torch.Tensor | None = None
    point: list[float] = field(default_factory=list)
    crop_box: list[int] = field(default_factory=list)
    input_size: tuple[int, int] = (0, 0)


def remove_small_regions(mask: np.ndarray, area: int, holes: bool) -> tuple[np.ndarray, bool]:
    """
    Fills the holes, or removes the islands, of fewer than `area` pixels, corners connected; the largest island
    stays in any case. Returns the mask `[height, width]` and whether anything changed.
    """
    regions, count = ndimage.label(mask != holes, structure=np.ones((3, 3)))
    areas = np.bincount(regions.ravel(), minlength=count + 1)
    small = areas < area
    small[0] = False
    if not small.any():
        return mask, False
    if holes:
        return mask | small[regions], True
    if small[1:].all():
        small[1 + areas[1:].argmax()] = False
    return mask & ~small[regions], True


__all__ = ["EfficientSamMaskGenerator", "official_point_grid", "remove_small_regions"]
