"""Image processor of EfficientSAM: image -> `pixel_values`, and low-resolution mask logits -> masks of the image.

Also the four helpers that `pipeline("mask-generation")` asks of an image processor. No torchvision anywhere.
"""

import math
from numbers import Integral
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageInput, SizeDict
from transformers.processing_utils import Unpack

from .image_reading_efficientsam import (
    MAX_IMAGE_PIXELS,
    ImagePixels,
    read_pixels,
    resized_size,
    segmentation_map_to_array,
)
from .mask_operations_efficientsam import (
    INPUT_PIXELS_PER_MASK_PIXEL,
    batched_mask_to_box,
    build_point_grid,
    calculate_stability_score,
    generate_crop_boxes,
    is_box_near_crop_edge,
    mask_to_rle_pytorch,
    resize_masks,
    resize_masks_in_parts,
    suppress_duplicates,
    uncrop_boxes_xyxy,
    uncrop_masks,
)
from .run_lengths_efficientsam import rle_to_mask


class EfficientSamImageProcessorKwargs(TypedDict, total=False):
    """Options of [`EfficientSamImageProcessor`], for its constructor and for a single call."""

    do_convert_rgb: bool | None
    do_resize: bool | None
    size: int | dict[str, int] | SizeDict | None
    keep_aspect_ratio: bool | None
    size_divisor: int | None
    do_rescale: bool | None
    rescale_factor: float | None
    do_normalize: bool | None
    image_mean: float | list[float] | tuple[float, ...] | None
    image_std: float | list[float] | tuple[float, ...] | None
    max_image_pixels: int | None
    input_data_format: str | None
    device: str | torch.device | None
    return_tensors: str | None


class EfficientSamImageProcessor(PilBackend):
    """
    Turns images into `pixel_values` as the official EfficientSAM does: floats in [0, 1], resized to `size` by
    bilinear interpolation without antialiasing and without rounding to bytes, normalised.

    Images may be paths, URLs, `bytes`, file objects, PIL images of any mode, arrays or tensors, a stacked batch, or a
    list of any of these. What each means is the same wherever this package takes an image:

    - Files: PIL reads them, HEIC only where pillow-heif is installed (the extra `heif`). They are turned upright as
      their EXIF tag says. Of an animated image or one of several pages the first frame is taken, which is said once.
      Colour profiles are not applied, except that LAB needs one.
    - PIL images: alpha is dropped, so that what is transparent has the colour that is stored there. 16-bit gray
      ("I;16", and "I") is divided by 65535. "F" follows the rules of float arrays.
    - Arrays and tensors: H x W, H x W x C or C x H x W with 1, 3 or 4 channels; where both layouts fit, an array is
      read as H x W x C and a tensor as C x H x W. Values become [0, 1]: booleans as they are; bytes / 255; unsigned
      16-bit / 65535; other integers / 255, or / 65535 if any exceeds 255; floats in [0, 1] as they are, floats that
      reach beyond that, up to 255, / 255. Other values are refused.

    transformers' `pipeline` opens files itself and makes 8-bit RGB of them and of PIL images, which clips 16-bit gray
    and floats. Give it `as_model_sees(file, image_processor)` of `hf_efficientsam.inference.image_files`.

    Args:
        do_convert_rgb: turn gray, palette, CMYK, alpha... into RGB. If off, images must have three channels.
        do_resize: resize to `size`. If off, images are only padded to a multiple of `size_divisor`.
        size: `{"height": int, "width": int}` of the model input, in pixels. An int means a square.
        keep_aspect_ratio: False squashes to `size` as the official model does. True makes the longest side
            `max(size)` and pads with zeros, after normalisation, at the bottom and right.
        size_divisor: the padded height and width are multiples of this, the patch size of the model.
        do_rescale: bring pixels to [0, 1] as described above. If off, values are taken as they are.
        rescale_factor: factor for bytes; other ranges are scaled in proportion.
        do_normalize, image_mean, image_std: subtract the mean and divide by the standard deviation of each channel.
        max_image_pixels: larger images are refused, files before they are decoded; `None` lifts the limit. PIL's own
            limit does not count for files that are opened here.

    The call also takes `input_data_format` ("channels_first" or "channels_last"), `device` (where to resize),
    `return_tensors` ("pt", which is also what `None` gives, or "np") and `segmentation_maps`: for each image an array,
    tensor, PIL image or path of whole numbers or booleans, [height, width] of the upright image.

    Returns of a call: `pixel_values` [B, 3, H, W] float32, `original_sizes` [B, 2] int64 (height and width of the
    upright image) and `reshaped_input_sizes` [B, 2] int64 (height and width in `pixel_values` before padding); with
    `segmentation_maps` also `labels` [B, H / 4, W / 4] int64, their values at the centres of the cells of the model's
    masks, 0 in the padding.

    Raises:
        ValueError: no image, an empty one, one over `max_image_pixels`, a shape that is no image, NaN, values out of
            range, or segmentation maps that do not fit the images.
        TypeError: something that is not an image.
    """

    _auto_class = "AutoImageProcessor"
    valid_kwargs = EfficientSamImageProcessorKwargs
    do_convert_rgb = True
    do_resize = True
    size = SizeDict(height=1024, width=1024)
    keep_aspect_ratio = False
    size_divisor = 16
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    max_image_pixels = MAX_IMAGE_PIXELS

    def __init__(self, **kwargs: Unpack[EfficientSamImageProcessorKwargs]):
        super().__init__(**kwargs)
        if "max_image_pixels" in kwargs:  # the base class takes None for "not given"; here it means "no limit"
            self.max_image_pixels = kwargs["max_image_pixels"]

    # ---------------------------------------------------------------------------------------------- options

    def _standardize_kwargs(self, **kwargs) -> dict:
        kwargs = super()._standardize_kwargs(default_to_square=True, **kwargs)
        size = kwargs["size"]
        if size is None or not all(isinstance(n, Integral) and n > 0 for n in (size.height, size.width)):
            raise ValueError(
                f"size needs a height and a width, got {size and dict(size)}; to keep the aspect ratio, give both and "
                "set keep_aspect_ratio=True."
            )
        return kwargs

    def _validate_preprocess_kwargs(self, size_divisor: int, return_tensors: str | None = None, **kwargs):
        if not (isinstance(size_divisor, Integral) and size_divisor >= 1):
            raise ValueError(f"size_divisor must be at least 1, got {size_divisor}.")
        for name in ("image_mean", "image_std", "rescale_factor"):
            if (given := kwargs.get(name)) is None:
                continue
            values = np.asarray(given)
            is_number = values.dtype.kind in "iuf" and np.isfinite(values).all() and values.shape in ((), (1,), (3,))
            if not is_number or (name == "image_std" and not values.all()):
                raise ValueError(f"{name} must be a number or one for each channel, and image_std not 0, got {given}.")
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f'return_tensors must be "pt" or "np", got {return_tensors!r}.')

    def get_reshaped_input_size(self, original_size: tuple[int, int], **kwargs) -> tuple[int, int]:
        """
        Height and width that an image of `original_size` (height, width) has in `pixel_values` before padding.
        `do_resize`, `size` and `keep_aspect_ratio` may be overridden as in a call.
        """
        given = {name for name, value in kwargs.items() if value is not None}
        if unknown := given - self.valid_kwargs.__annotations__.keys():
            raise TypeError(f"The image processor has no option {', '.join(sorted(unknown))}.")
        if not kwargs.get("do_resize", self.do_resize):
            return tuple(original_size)
        size = self._standardize_kwargs(size=kwargs.get("size", self.size))["size"]
        keep_aspect_ratio = kwargs.get("keep_aspect_ratio", self.keep_aspect_ratio)
        return resized_size(original_size, (size.height, size.width), keep_aspect_ratio)

    # ---------------------------------------------------------------------------------- image -> pixel_values

    def preprocess(self, images: ImageInput, segmentation_maps=None, **kwargs) -> BatchFeature:
        return super().preprocess(images, segmentation_maps, **kwargs)

    def _preprocess_image_like_inputs(
        self, images: ImageInput, segmentation_maps, return_tensors: str | None, **kwargs
    ) -> BatchFeature:
        # One image at a time: each is decoded, resized and let go before the next one is decoded.
        pixel_values, original_sizes, reshaped_input_sizes = [], [], []
        for image in _list_images(images):
            pixels = self.read_pixels(image, **kwargs)
            original_sizes.append(pixels.size)
            pixel_values.append(self._preprocess(pixels, **kwargs))
            reshaped_input_sizes.append(tuple(pixel_values[-1].shape[-2:]))
        data = {
            "pixel_values": _pad_and_stack(pixel_values, kwargs["size_divisor"]),
            "original_sizes": torch.tensor(original_sizes, dtype=torch.int64, device="cpu"),
            "reshaped_input_sizes": torch.tensor(reshaped_input_sizes, dtype=torch.int64, device="cpu"),
        }
        if segmentation_maps is not None:
            padded_size = tuple(data["pixel_values"].shape[-2:])
            data["labels"] = _maps_to_labels(segmentation_maps, original_sizes, reshaped_input_sizes, padded_size)
        return BatchFeature(data=data, tensor_type=return_tensors)

    def process_image(self, image: Any, input_data_format: str | None = None, **kwargs) -> np.ndarray:
        """
        One image as an array [3, H, W]: bytes where the image has bytes, else float32 in [0, 1] (as given, if
        `do_rescale` is off). `do_convert_rgb`, `do_rescale` and `max_image_pixels` may be overridden as in a call.
        Errors: see the class.
        """
        return self.read_pixels(image, input_data_format, **kwargs).array()

    def read_pixels(self, image: Any, input_data_format: str | None = None, **kwargs) -> ImagePixels:
        """What `process_image` makes an array of, not yet one; a call of the image processor takes it, too."""
        names = ("do_convert_rgb", "do_rescale", "max_image_pixels")
        options = {name: kwargs.get(name, getattr(self, name)) for name in names}
        return read_pixels(image, input_data_format=input_data_format, **options)

    def _preprocess(
        self,
        image: ImagePixels,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...],
        image_std: float | tuple[float, ...],
        device: str | torch.device | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """-> float32 tensor [3, H, W], resized and normalised, not padded."""
        pixels = _resize_image(image, self.get_reshaped_input_size(image.size, **kwargs), device)
        if do_rescale:
            pixels = pixels * (rescale_factor if image.are_bytes else 255 * rescale_factor)
        if do_normalize:
            mean, std = (pixels.new_tensor(x).reshape(-1, 1, 1) for x in (image_mean, image_std))
            pixels = (pixels - mean) / std
        return pixels

    # ------------------------------------------------------------------------------------ logits -> masks

    def post_process_masks(
        self,
        masks: torch.Tensor | list[torch.Tensor],
        original_sizes: torch.Tensor | list[tuple[int, int]],
        reshaped_input_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        mask_threshold: float = 0.0,
        binarize: bool = True,
        num_prompts: list[int] | None = None,
    ) -> list[torch.Tensor]:
        """
        Brings the model's low-resolution mask logits to the size of each image, in one bicubic interpolation.

        Args:
            masks: [B, Q, M, h, w], or one [Q, M, h, w] an image: logits that cover the whole (padded) model input.
                The input's size is taken to be 4h x 4w, which holds for every EfficientSAM.
            original_sizes: [B, 2], height and width of each image.
            reshaped_input_sizes: [B, 2], height and width of each image in the model input before padding.
                `None`: nothing was padded.
            mask_threshold: logits above it belong to the object.
            binarize: return bool masks; else float32 logits.
            num_prompts: number of real prompts of each image; the padded ones after them are dropped.

        Returns:
            One tensor [Q, M, height, width] an image, in the image's own pixels.

        Raises:
            ValueError: if the arguments disagree about the number of images, or an image does not fit the input.
        """
        sizes = _to_list(original_sizes)
        input_sizes = [None] * len(sizes) if reshaped_input_sizes is None else _to_list(reshaped_input_sizes)
        counts = [None] * len(sizes) if num_prompts is None else _to_list(num_prompts)
        if not len(masks) == len(sizes) == len(input_sizes) == len(counts):
            raise ValueError(
                f"Got masks for {len(masks)} images, {len(sizes)} original_sizes, {len(input_sizes)} "
                f"reshaped_input_sizes and {len(counts)} num_prompts; there must be one of each for each image."
            )
        output_masks = []
        for image_masks, size, input_size, count in zip(masks, sizes, input_sizes, counts, strict=True):
            if not isinstance(image_masks, torch.Tensor):
                image_masks = torch.as_tensor(image_masks, device="cpu")
            image_masks = image_masks[:count]
            if image_masks.ndim != 4:
                raise ValueError(f"Masks of an image must be [Q, M, h, w], got shape {tuple(image_masks.shape)}.")
            if binarize:
                flat = image_masks.flatten(0, 1)
                answer = flat.new_empty(len(flat), *size, dtype=torch.bool)
                for some, columns, resized in resize_masks_in_parts(flat, size, input_size):
                    answer[some, :, columns] = resized > mask_threshold
                output_masks.append(answer.unflatten(0, image_masks.shape[:2]))
            else:
                output_masks.append(resize_masks(image_masks, size, input_size))
        return output_masks

    # ------------------------------------------------------------------------ for pipeline("mask-generation")

    def generate_crop_boxes(
        self,
        image: ImageInput,
        target_size: int | None = None,
        crop_n_layers: int = 0,
        overlap_ratio: float = 512 / 1500,
        points_per_crop: int = 32,
        crop_n_points_downscale_factor: int = 1,
        device: str | torch.device | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, list[np.ndarray], torch.Tensor]:
        """
        Cuts an image into crops (segment-anything's layers) and lays a grid of points over each.

        Args:
            image: one image.
            target_size: the height of this processor's `size`, as the pipeline passes it; another one is refused.
            crop_n_layers: layer i (from 1) adds 4**i overlapping crops to the whole image.
            overlap_ratio: overlap of the crops of layer 1 as a fraction of the image's short side; it halves with
                each layer.
            points_per_crop: points along each side of the grid; they are the centres of its cells.
            crop_n_points_downscale_factor: the grid of layer i has this factor to the power i fewer points a side.
            device: where the tensors go.

        Returns:
            `crop_boxes` [C, 4] float32, (x1, y1, x2, y2) in pixels of the image, the whole image first;
            `points` [1, N, C, 2] float32, (x, y) in the model frame of each crop;
            the C crops, arrays [3, h, w];
            `labels` [1, N, C] int64, all 1.
            Where a layer has fewer points than N, they are repeated: the copies fall to non-maximum suppression.
        """
        if target_size not in (None, self.size.height):
            raise ValueError(
                f"target_size={target_size} differs from the height of this processor's size, {self.size.height}; "
                "change the processor's size instead."
            )
        images = _list_images(image)
        if len(images) != 1:
            raise ValueError(f"Crops are made of one image at a time, got {len(images)}.")
        pixels = self.process_image(images[0])

        crop_boxes, layers = generate_crop_boxes(pixels.shape[-2:], crop_n_layers, overlap_ratio)
        crops = [pixels[:, top:bottom, left:right] for left, top, right, bottom in crop_boxes]
        points = []
        for crop, layer in zip(crops, layers, strict=True):
            grid = build_point_grid(max(1, int(points_per_crop / crop_n_points_downscale_factor**layer)))
            height, width = self.get_reshaped_input_size(crop.shape[-2:])
            points.append(np.resize(grid * (width, height), (points_per_crop**2, 2)))  # np.resize repeats

        crop_boxes = torch.tensor(crop_boxes, dtype=torch.float32, device=device)
        points = torch.tensor(np.stack(points, axis=1)[None], dtype=torch.float32, device=device)
        labels = torch.ones(points.shape[:-1], dtype=torch.int64, device=device)
        return crop_boxes, points, crops, labels

    def filter_masks(
        self,
        masks: torch.Tensor,
        iou_scores: torch.Tensor,
        original_size: tuple[int, int],
        cropped_box_image: torch.Tensor | list[int],
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        mask_threshold: float = 0.0,
        stability_score_offset: float = 1.0,
    ) -> tuple[list[dict], torch.Tensor, torch.Tensor]:
        """
        Keeps the masks of one crop that are confident, stable, not empty, and not cut off by the crop's border.

        Args:
            masks: [Q, M, h, w] logits at the size of the crop.
            iou_scores: [Q, M], the model's own estimates.
            original_size: height and width of the whole image.
            cropped_box_image: [4], the crop (x1, y1, x2, y2) in pixels of the image.
            pred_iou_thresh: least `iou_scores`, exclusive; 0 keeps all.
            stability_score_thresh: least stability, exclusive; 0 keeps all. Stability is the IoU of the two masks
                that `mask_threshold` plus and minus `stability_score_offset` give.

        Returns:
            The N masks that are left, as uncompressed COCO RLE of the whole image, each with its `crop_box`;
            `iou_scores` [N]; `boxes` [N, 4] int64, first and last column and row (x1, y1, x2, y2) in the image.
        """
        masks, scores = masks.flatten(0, 1), iou_scores.flatten(0, 1).to(masks.device)
        if len(masks) != len(scores):
            raise ValueError(f"Got {len(masks)} masks but {len(scores)} iou_scores.")
        keep = (masks > mask_threshold).flatten(1).any(dim=1)
        if pred_iou_thresh > 0:
            keep &= scores > pred_iou_thresh
        if stability_score_thresh > 0:
            keep &= calculate_stability_score(masks, mask_threshold, stability_score_offset) > stability_score_thresh
        masks, scores = masks[keep] > mask_threshold, scores[keep]

        crop_box = [int(x) for x in cropped_box_image]
        height, width = (int(x) for x in original_size)
        boxes = batched_mask_to_box(masks)
        keep = ~is_box_near_crop_edge(boxes, crop_box, [0, 0, width, height])
        masks, boxes = uncrop_masks(masks[keep], crop_box, height, width), uncrop_boxes_xyxy(boxes[keep], crop_box)
        rles = [rle | {"crop_box": crop_box} for rle in mask_to_rle_pytorch(masks)]
        return rles, scores[keep], boxes

    def post_process_for_mask_generation(
        self,
        all_masks: list[dict],
        all_scores: torch.Tensor,
        all_boxes: torch.Tensor,
        crops_nms_thresh: float = 0.7,
    ) -> tuple[list[np.ndarray], torch.Tensor, list[dict], torch.Tensor]:
        """
        Drops the masks whose box overlaps that of a better one by an IoU of more than `crops_nms_thresh`: among the
        masks of each crop the more confident is better, between crops that of the smaller crop.

        Args:
            all_masks, all_scores, all_boxes: what `filter_masks` returned, concatenated over crops and points.

        Returns:
            N bool arrays [height, width], best first; their `iou_scores` [N]; their RLEs; their boxes [N, 4].
        """
        crop_boxes = [rle.get("crop_box", (0, 0, *rle["size"][::-1])) for rle in all_masks]
        crop_boxes = torch.tensor(crop_boxes, device=all_boxes.device).reshape(-1, 4)
        keep = suppress_duplicates(all_boxes, all_scores, crop_boxes, crops_nms_thresh, crops_nms_thresh)
        rles = [{key: all_masks[i][key] for key in ("size", "counts")} for i in keep.tolist()]
        return [rle_to_mask(rle) for rle in rles], all_scores[keep.to(all_scores.device)], rles, all_boxes[keep]


# ------------------------------------------------------------------------------------------------ reading images


def _list_images(images) -> list:
    """One image, a stacked batch or (nested) lists of them -> flat list of images."""
    if isinstance(images, (list, tuple)):
        flat = [image for item in images for image in _list_images(item)]
    elif isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        flat = list(images)
    else:
        flat = [images]
    if not flat:
        raise ValueError("There is no image in the batch; pass at least one.")
    return flat


def _resize_image(image: ImagePixels, size: tuple[int, int], device: str | torch.device | None) -> torch.Tensor:
    """
    -> float32 [3, *size], by bilinear interpolation without antialiasing: along the rows of one band after the other,
    and then down the columns. That is to the bit what both at once give (see `resize_masks_in_parts`), without the
    whole image in float32.
    """
    rows, start = torch.empty(3, 1, image.size[0], size[1], device=device), 0
    for band in image.bands():
        band = torch.from_numpy(np.ascontiguousarray(band)).to(device=device, dtype=torch.float32)[:, None]
        if band.shape[2] == image.size[0]:
            return F.interpolate(band, size=size, mode="bilinear", align_corners=False)[:, 0]
        end = start + band.shape[2]
        rows[:, :, start:end] = F.interpolate(band, (band.shape[2], size[1]), mode="bilinear", align_corners=False)
        start = end
    return F.interpolate(rows, size=size, mode="bilinear", align_corners=False)[:, 0]


def _pad_and_stack(images: list[torch.Tensor], divisor: int) -> torch.Tensor:
    """[3, h, w] each -> [B, 3, H, W], zeros at the bottom and right up to the common multiple of `divisor`."""
    height, width = (math.ceil(max(image.shape[axis] for image in images) / divisor) * divisor for axis in (1, 2))
    return torch.stack([F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images])


def _maps_to_labels(
    maps, original_sizes: list[tuple[int, int]], input_sizes: list[tuple[int, int]], padded_size: tuple[int, int]
) -> torch.Tensor:
    """Segmentation maps of images -> their values in the cells of low-resolution masks, int64 [B, H / 4, W / 4]."""
    is_batch = isinstance(maps, (list, tuple)) or getattr(maps, "ndim", 2) == 3
    maps = [segmentation_map_to_array(one) for one in (maps if is_batch else [maps])]
    if [one.shape for one in maps] != [tuple(size) for size in original_sizes]:
        raise ValueError(
            f"segmentation_maps must hold a map for each image, of its height and width {original_sizes}, got maps of "
            f"shapes {[one.shape for one in maps]}."
        )
    height, width = (n // INPUT_PIXELS_PER_MASK_PIXEL for n in padded_size)
    labels = np.zeros((len(maps), height, width), dtype=np.int64)
    for one, input_size, label in zip(maps, input_sizes, labels, strict=True):
        rows, columns = (  # of the map at the cells' centres
            ((np.arange(cells) + 0.5) * INPUT_PIXELS_PER_MASK_PIXEL * pixels / input_pixels).astype(int)
            for cells, pixels, input_pixels in zip(label.shape, one.shape, input_size, strict=True)
        )
        rows, columns = rows[rows < one.shape[0]], columns[columns < one.shape[1]]
        label[: len(rows), : len(columns)] = one[np.ix_(rows, columns)]
    return torch.from_numpy(labels)


def _to_list(sizes) -> list:
    return sizes.tolist() if isinstance(sizes, (torch.Tensor, np.ndarray)) else list(sizes)


__all__ = ["EfficientSamImageProcessor"]
