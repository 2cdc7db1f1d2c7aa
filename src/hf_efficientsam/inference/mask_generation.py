"""Segment everything: a grid of points over an image -> its masks, without duplicates.

Names, thresholds and records are those of segment-anything's `SamAutomaticMaskGenerator`; the masks are those that
transformers' `pipeline("mask-generation")` finds with this package's image processor. It takes less work:

- the decoder predicts the IoU of a mask before it makes the mask, and makes only those above the threshold;
- whether a mask is stable, and its box, follow from its low-resolution logits (mask_bounds.py);
- only masks that are left at the end are resized to the image, one by one, and large ones by bands of columns.

Peak memory does not grow with the number of points. With masks as RLE it hardly grows with the image either, beside
the image itself: 3 bytes a pixel as an array, 4 as an image of PIL, which is also what a file becomes. Only
`min_mask_region_area` works on whole masks. Images may have as many pixels as the image processor's
`max_image_pixels`. Crops find the small objects of large images.
"""

import math
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice

import numpy as np
import torch
from pycocotools import mask as coco_mask
from tqdm import tqdm
from transformers.image_utils import ImageInput

from hf_efficientsam.model.image_processing_efficientsam import EfficientSamImageProcessor
from hf_efficientsam.model.image_reading_efficientsam import ImagePixels
from hf_efficientsam.model.mask_decoder_shared_efficientsam import SharedImageDecoder
from hf_efficientsam.model.mask_operations_efficientsam import (
    count_above,
    non_maximum_suppression,
    resize_masks_in_parts,
    stability_score,
    suppress_duplicates,
)
from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel
from hf_efficientsam.model.processing_efficientsam import EfficientSamProcessor
from hf_efficientsam.model.run_lengths_efficientsam import mask_to_rle, rle_from_borders, run_borders

from .amg import (
    box_xyxy_to_xywh,
    build_all_layer_point_grids,
    calculate_stability_score,
    coco_encode_rle,
    generate_crop_boxes,
    is_box_near_crop_edge,
    remove_small_regions,
    uncrop_boxes_xyxy,
)
from .loading import find_checkpoint, load_model, load_processor
from .mask_bounds import measure_masks
from .point_grids import check_point_grids, distinct_points

THRESHOLDS = ("pred_iou_thresh", "stability_score_thresh", "stability_score_offset")  # that checkpoints choose
OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")
# A million points, 5461 crops: more is a typing error, and would fill the memory before the first mask.
MOST_POINTS_PER_SIDE, MOST_CROP_LAYERS = 1024, 6
ADAPTIVE_SHARE = 1 / 3  # of the points, that adaptive search asks about


@dataclass
class Candidate:
    """A mask while its crop is searched: number `candidate` of the masks of point number `prompt`."""

    prompt: int
    candidate: int
    logits: torch.Tensor | None  # [h, w]; None while a better mask overlaps this one
    score: float  # predicted IoU
    # Known once its crop is done. `rank` orders the masks; `box` (x1, y1, x2, y2), `crop_box` and `point` are in
    # pixels of the whole image.
    rank: float = 0.0
    box: torch.Tensor | None = None
    point: list[float] = field(default_factory=list)
    crop_box: list[int] = field(default_factory=list)
    input_size: tuple[int, int] = (0, 0)


class EfficientSamMaskGenerator:
    """
    Finds the masks of a whole image without a prompt: every point of a grid is a prompt, and of the predicted masks
    the confident and stable ones are kept, without duplicates.

        generator = EfficientSamMaskGenerator(model, processor)
        for record in generator.generate(image): ...

    Args:
        model: on any device, in any precision.
        processor: the model's [`EfficientSamProcessor`] or its image processor; by default from the repository or
            directory that the model was loaded from.
        points_per_side: points along each side of the grid over the image.
        points_per_batch: prompts that go through the model at a time. A batch that does not fit into memory is halved,
            with a warning.
        pred_iou_thresh: least predicted IoU, exclusive; 0 keeps all. This and the next two are by default the
            checkpoint's own, `model.config.mask_generation`: segment-anything's 0.88, 0.95 and 1.0 where it has none.
        stability_score_thresh: least stability, exclusive; 0 keeps all. Stability is the IoU of the two masks that
            `mask_threshold` plus and minus `stability_score_offset` give.
        stability_score_offset: see there.
        mask_threshold: logits above it belong to the object.
        box_nms_thresh: of two masks of a crop whose boxes overlap by a larger IoU only the better is kept: the more
            confident. By default 0.7, with `adaptive` 0.8.
        crop_n_layers: layer i (from 1) also looks at 4**i overlapping crops of the image, for small objects.
        crop_nms_thresh: the same between crops, where the mask of the smaller crop is kept.
        crop_overlap_ratio: overlap of the crops of layer 1 as a fraction of the image's short side; it halves with
            each layer.
        crop_n_points_downscale_factor: the grid of layer i has this factor to the power i fewer points a side.
        point_grids: for the image and for each layer its points `[n, 2]`, x and y from 0 to 1, in place of the grids
            of cell centres that `points_per_side` makes.
        min_mask_region_area: holes and islands of fewer pixels are filled and removed; 0 leaves all.
        multimask_output: three candidates for each point, or one.
        adaptive: ask about a third of the points of each grid: those that differ most in what the encoder sees there
            and in place. Predicted IoU times stability then decides which of two masks is the better one. Without it
            all points are asked about, and the masks are exactly those of transformers' pipeline.
        output_mode: what `segmentation` is: "binary_mask", a bool array `[height, width]`; "uncompressed_rle", a dict
            with COCO's `size` and `counts` as numbers; "coco_rle", with `counts` as pycocotools' string.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        model: EfficientSamModel,
        processor: EfficientSamProcessor | EfficientSamImageProcessor | None = None,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float | None = None,
        stability_score_thresh: float | None = None,
        stability_score_offset: float | None = None,
        box_nms_thresh: float | None = None,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: list[np.ndarray] | None = None,
        min_mask_region_area: int = 0,
        output_mode: str = "binary_mask",
        mask_threshold: float = 0.0,
        multimask_output: bool = True,
        adaptive: bool = False,
    ):
        if box_nms_thresh is None:
            box_nms_thresh = 0.8 if adaptive else 0.7
        given = (pred_iou_thresh, stability_score_thresh, stability_score_offset)
        defaults = (model.config.mask_generation[name] for name in THRESHOLDS)
        pred_iou_thresh, stability_score_thresh, stability_score_offset = (
            default if value is None else value for value, default in zip(given, defaults, strict=True)
        )
        check_options(
            at_least={
                "points_per_batch": (points_per_batch, 1),
                "crop_n_layers": (crop_n_layers, 0),
                "crop_n_points_downscale_factor": (crop_n_points_downscale_factor, 1),
                "min_mask_region_area": (min_mask_region_area, 0),
                "stability_score_offset": (stability_score_offset, 0),
            },
            at_most={
                "points_per_side": (points_per_side or 0, MOST_POINTS_PER_SIDE),
                "crop_n_layers": (crop_n_layers, MOST_CROP_LAYERS),
            },
            ious={
                "pred_iou_thresh": pred_iou_thresh,
                "stability_score_thresh": stability_score_thresh,
                "box_nms_thresh": box_nms_thresh,
                "crop_nms_thresh": crop_nms_thresh,
            },
        )
        if output_mode not in OUTPUT_MODES:
            raise ValueError(f"output_mode must be one of {', '.join(OUTPUT_MODES)}, got {output_mode!r}.")
        if point_grids is None:
            if points_per_side is None or points_per_side < 1:
                raise ValueError(f"points_per_side must be at least 1, got {points_per_side}; or give point_grids.")
            scale = crop_n_points_downscale_factor
            point_grids = build_all_layer_point_grids(points_per_side, crop_n_layers, scale)
        self.model = model.eval()
        processor = processor or load_processor(model)
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
        self.point_grids = check_point_grids(point_grids, crop_n_layers)
        self.min_mask_region_area = min_mask_region_area
        self.multimask_output = multimask_output
        self.output_mode = output_mode
        self.adaptive = adaptive

    @classmethod
    def from_pretrained(
        cls,
        name: str | None = None,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str = torch.float32,
        **options,
    ) -> "EfficientSamMaskGenerator":
        """
        From a directory, a Hub name or "bundled", the default; `device` and `dtype` as of `load_model`, `options` as
        of the class.
        """
        return cls(*load_model(find_checkpoint(name), dtype, device), **options)

    def to(self, *args, **kwargs) -> "EfficientSamMaskGenerator":
        """Moves the model as `torch.Tensor.to` does."""
        self.model.to(*args, **kwargs)
        return self

    def generate(self, image: ImageInput, progress: bool = False) -> list[dict]:
        """
        Args:
            image: an image as the image processor takes it.
            progress: show a bar over the crops.

        Returns:
            A dict for each mask, the best first (see `adaptive`), but those of smaller crops before all others:
            `segmentation`, see `output_mode`, of the upright image; `area` in pixels;
            `bbox` [x, y, width, height], whose last column and row are x + width and y + height as in
            segment-anything; `predicted_iou`; `stability_score`; `point_coords` [[x, y]], the prompt in pixels of the
            image; `crop_box` [x, y, width, height], the crop that the mask was found in.
        """
        return next(self.generate_many([image], crop_progress=progress))

    @torch.no_grad()
    def generate_many(
        self, images: Iterable[ImageInput], batch_size: int = 1, crop_progress: bool = False
    ) -> Iterator[list[dict]]:
        """
        What `generate` returns for each of several images, one after the other as they are done.

        Args:
            images: images; they are read when their turn comes.
            batch_size: images that are read ahead, and that go through the encoder together with their crops as far
                as they have one shape there.
            crop_progress: show a bar over the crops of these.
        """
        images = iter(images)
        while group := [self.image_processor.read_pixels(image) for image in islice(images, batch_size)]:
            jobs = [  # image, crop, layer of the crop
                (number, box, layer)
                for number, pixels in enumerate(group)
                for box, layer in zip(
                    *generate_crop_boxes(pixels.size, self.crop_n_layers, self.crop_overlap_ratio), strict=True
                )
            ]
            crops = [group[number].crop(*box) for number, box, _ in jobs]
            found: list[list[Candidate]] = [[] for _ in group]
            bar = tqdm(self.embed(crops, batch_size), total=len(crops), unit="crop", disable=not crop_progress)
            sizes = [pixels.size for pixels in group]
            for (number, box, layer), (embedding, input_size) in zip(jobs, bar, strict=True):
                found[number] += self.search(embedding, input_size, box, sizes[number], self.point_grids[layer])
            del group, crops  # before masks are enlarged
            for size, masks in zip(sizes, found, strict=True):
                yield self.finish(masks, size)

    def embed(self, crops: list[ImagePixels], batch_size: int) -> Iterator[tuple[torch.Tensor, tuple[int, int]]]:
        """The image embedding `[1, C, h, w]` of each crop, and its size in the model input."""

        def input_size(crop: ImagePixels) -> tuple[int, int]:
            return self.image_processor.get_reshaped_input_size(crop.size)

        for size, same in groupby(crops, input_size):
            while batch := list(islice(same, batch_size)):
                inputs = self.image_processor(batch, return_tensors="pt")
                pixel_values = inputs["pixel_values"].to(self.model.device, self.model.dtype)
                for embedding in self.model.get_image_embeddings(pixel_values):
                    yield embedding[None], size

    def search(
        self,
        embedding: torch.Tensor,
        input_size: tuple[int, int],
        crop_box: list[int],
        image_size: tuple[int, int],
        grid: np.ndarray,
    ) -> list[Candidate]:
        """The masks of one crop without duplicates, the best first."""
        left, top, right, bottom = crop_box
        points = torch.from_numpy((grid * input_size[::-1]).astype(np.float32)).to(self.model.device)
        if self.adaptive:
            chosen = distinct_points(embedding, points, ADAPTIVE_SHARE)
            points, grid = points[chosen], grid[chosen.cpu().numpy()]
        shared = self.model.share_image(embedding)
        boxes = torch.empty(0, 4, dtype=torch.int64, device=self.model.device)
        found, keep, ranks, asked = [], [], embedding.new_empty(0), 0
        while asked < len(points):
            kept, scores, logits = self.predict(embedding, points[asked:], shared)
            stable, new_boxes = measure_masks(
                logits.float(),
                (bottom - top, right - left),
                input_size,
                self.mask_threshold,
                self.stability_score_offset,
                self.stability_score_thresh,
            )
            stable &= ~is_box_near_crop_edge(new_boxes, crop_box, [0, 0, *image_size[::-1]])
            scores, logits = scores[stable], logits[stable]
            prompts, candidates = (index[stable].tolist() for index in kept.nonzero(as_tuple=True))
            found += [
                Candidate(asked + prompt, candidate, one.clone(), score)
                for prompt, candidate, one, score in zip(prompts, candidates, logits, scores.tolist(), strict=True)
            ]
            boxes = torch.cat([boxes, uncrop_boxes_xyxy(new_boxes[stable], crop_box)])
            ranks = torch.cat([ranks, self.rank(scores, logits)])
            keep = non_maximum_suppression(boxes, ranks, self.box_nms_thresh).tolist()
            # A mask that a better one overlaps comes back when that one falls to a third. It is then decoded again;
            # until then its logits are freed, so that memory does not grow with the number of points.
            for i in set(range(len(found))).difference(keep):
                found[i].logits = None
            asked += len(kept)
        for i in keep:
            mask = found[i]
            if mask.logits is None:
                mask.logits = self.decode_again(mask, embedding, points, shared)
            mask.rank, mask.box = float(ranks[i]), boxes[i]
            mask.crop_box, mask.input_size = crop_box, input_size
            x, y = (grid[mask.prompt] * (right - left, bottom - top)).tolist()
            mask.point = [left + x, top + y]
        return [found[i] for i in keep]

    def rank(self, scores: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """By what masks are ordered, `[n]`; in adaptive search from the stability of the low-resolution masks."""
        if not self.adaptive:
            return scores
        return scores * calculate_stability_score(logits, self.mask_threshold, self.stability_score_offset)

    def decode_again(
        self, mask: Candidate, embedding: torch.Tensor, points: torch.Tensor, shared: SharedImageDecoder | None
    ) -> torch.Tensor:
        """The logits `[h, w]` of one candidate."""
        point = points[None, mask.prompt, None, None]
        logits = self.model.predict_confident(embedding, point, -math.inf, None, self.multimask_output, shared)[2]
        return logits[mask.candidate].clone()

    def predict(
        self, embedding: torch.Tensor, points: torch.Tensor, shared: SharedImageDecoder | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`predict_confident` for the first of some points, as many as go through the model at a time."""
        threshold = self.pred_iou_thresh if self.pred_iou_thresh > 0 else -math.inf
        while True:
            batch = points[None, : self.points_per_batch, None]
            try:
                return self.model.predict_confident(embedding, batch, threshold, None, self.multimask_output, shared)
            except RuntimeError as error:  # torch.OutOfMemoryError on a GPU, a plain RuntimeError on a CPU
                if self.points_per_batch == 1 or not re.search("out of memory|not enough memory", str(error).lower()):
                    raise
                self.points_per_batch //= 2
                warnings.warn(f"Out of memory: going on with points_per_batch={self.points_per_batch}.", stacklevel=2)

    def finish(self, masks: list[Candidate], image_size: tuple[int, int]) -> list[dict]:
        """The records of an image's masks from all crops."""
        if not masks:
            return []
        boxes = torch.stack([mask.box for mask in masks])
        crop_boxes = torch.tensor([mask.crop_box for mask in masks], device=boxes.device)
        ranks = torch.tensor([mask.rank for mask in masks], dtype=torch.float32, device=boxes.device)
        keep = suppress_duplicates(boxes, ranks, crop_boxes, self.box_nms_thresh, self.crop_nms_thresh).tolist()
        records, changed = [], []
        for mask in (masks[i] for i in keep):
            pixels, rle, stability = self.enlarge(mask, image_size)
            if self.min_mask_region_area:
                pixels, filled = remove_small_regions(pixels, self.min_mask_region_area, "holes")
                pixels, removed = remove_small_regions(pixels, self.min_mask_region_area, "islands")
                changed.append(filled or removed)
                rle = mask_to_rle(pixels)
            records.append(self.record(mask, pixels, rle, stability))
        if self.min_mask_region_area:  # masks that are now alike: those that were left as they were are better
            threshold = max(self.box_nms_thresh, self.crop_nms_thresh)
            boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in (record["bbox"] for record in records)])
            scores = 1 - torch.from_numpy(np.array(changed)).float()
            keep = non_maximum_suppression(torch.from_numpy(boxes), scores, threshold)
            records = [records[i] for i in sorted(keep.tolist())]
        return records

    def enlarge(self, mask: Candidate, image_size: tuple[int, int]) -> tuple[np.ndarray | None, dict, float]:
        """
        A mask in the image: its pixels `[height, width]`, bool, if they are wanted; its uncompressed RLE; and its
        stability.
        """
        left, top, right, bottom = mask.crop_box
        wants_pixels = self.output_mode == "binary_mask" or self.min_mask_region_area
        pixels = np.zeros(image_size, dtype=bool) if wants_pixels else None
        inner = outer = 0
        borders = []
        for _, columns, logits in resize_masks_in_parts(
            mask.logits[None].float(), (bottom - top, right - left), mask.input_size
        ):
            inner += count_above(logits, self.mask_threshold + self.stability_score_offset)
            outer += count_above(logits, self.mask_threshold - self.stability_score_offset)
            band = (logits[0] > self.mask_threshold).cpu().numpy()
            borders.append(run_borders(band, image_size[0], left + columns.start, top))
            if wants_pixels:
                pixels[top:bottom, left + columns.start : left + columns.stop] = band
        return pixels, rle_from_borders(borders, image_size), stability_score(inner, outer).item()

    def record(self, mask: Candidate, pixels: np.ndarray | None, rle: dict, stability: float) -> dict:
        """The record of one mask, as `generate` documents it."""
        compressed = coco_encode_rle(rle)
        x, y, width, height = coco_mask.toBbox(compressed).astype(int).tolist()
        return {
            "segmentation": dict(zip(OUTPUT_MODES, (pixels, rle, compressed), strict=True))[self.output_mode],
            "area": int(coco_mask.area(compressed)),
            "bbox": [x, y, max(width - 1, 0), max(height - 1, 0)],
            "predicted_iou": mask.score,
            "point_coords": [mask.point],
            "stability_score": stability,
            "crop_box": box_xyxy_to_xywh(mask.crop_box),
        }


# ------------------------------------------------------------------------------------------------ options


def check_options(at_least: dict[str, tuple], at_most: dict[str, tuple], ious: dict[str, float]) -> None:
    """Raises a ValueError for the first value out of range; values come as name -> (value, limit), or name -> IoU."""
    for name, (value, least) in at_least.items():
        if not value >= least:  # NaN is refused, too
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    for name, (value, most) in at_most.items():
        if value > most:
            raise ValueError(f"{name} must be at most {most}, got {value}.")
    for name, value in ious.items():
        if not value <= 1:
            raise ValueError(f"{name} is compared with an IoU, so it must be at most 1, got {value}.")


__all__ = ["EfficientSamMaskGenerator"]
