"""Processor of EfficientSAM: images and prompts in pixels of each image -> padded tensors in the model frame."""

from typing import Any

import torch
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessorMixin

from .prompts_efficientsam import PAD_VALUE, check_sizes, prepare_prompts


class EfficientSamProcessor(ProcessorMixin):
    """
    Prepares images and prompts for [`EfficientSamModel`] and brings its masks back to the size of the images.

    Args:
        image_processor: an [`EfficientSamImageProcessor`].
    """

    _auto_class = "AutoProcessor"

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
        segmentation_maps: ImageInput | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        All prompts are nested lists, tuples, arrays or tensors, in any mixture and of any raggedness. A prompt is one
        object; it may have several points, or a box, or both, and `None` or `[]` stands where it has none.
        Coordinates are (x, y) in pixels of the upright image, x to the right and y down, 0 being the first pixel.

        Args:
            images: what the image processor takes. Without images, give `original_sizes`; then only prompts are
                returned, for use with `image_embeddings` computed earlier.
            input_points: `[image][prompt][point][x, y]`, or `[image][point][x, y]` for one prompt an image.
            input_labels: `[image][prompt][point]`, or `[image][point]`: 1 on the object, 0 on the background, -1 or
                -10 for a point to be ignored. Without labels every point is on the object.
            input_boxes: `[image][prompt][x1, y1, x2, y2]`, or `[image][x1, y1, x2, y2]`. Prompt i has points i and
                box i. A box that reaches beyond the image is clipped to it, with a warning.
            input_masks: `[image][prompt][h][w]`, low-resolution logits (a quarter of the model input), all of one
                size.
            original_sizes: `[B, 2]`, height and width of each image.
            segmentation_maps: what is to be found in the images, for training: see the image processor, which makes
                `labels` of them.
            kwargs: `return_tensors`, "pt" (as is `None`) or "np", and options of the image processor for this call,
                also as transformers' `images_kwargs` and `common_kwargs`; there is no text, audio or video,
                so `text_kwargs` and the like must be empty.

        Returns:
            What the image processor returns, and, each only if something of it was given, with Q and P the largest
            numbers of prompts and points in the batch:

            - `input_points` `[B, Q, P, 2]` float32 in pixels of the resized image, (-10, -10) where there is none;
            - `input_labels` `[B, Q, P]` int64, -10 where there is no point;
            - `input_boxes` `[B, Q, 4]` float32 in the same frame, four times -10 where there is none;
            - `input_masks` `[B, Q, h, w]` float32, zeros where there is none.

        Raises:
            ValueError: prompts that do not fit the images or each other, that lie outside the image, or that are not
                finite numbers nested as above; the message names the image and the prompt.
            TypeError: prompts that are not numbers, or an unknown option.
        """
        kwargs = _image_options(**kwargs)
        return_tensors = kwargs.pop("return_tensors", None)
        if segmentation_maps is not None:
            if images is None:
                raise ValueError("segmentation_maps are read together with images; pass these, too.")
            kwargs["segmentation_maps"] = segmentation_maps
        encoding, original_sizes, input_sizes = self._process_images(images, original_sizes, **kwargs)
        prompts = prepare_prompts(input_points, input_labels, input_boxes, input_masks, original_sizes, input_sizes)
        prompts = {name: torch.from_numpy(array) for name, array in prompts.items()}
        return BatchFeature({**encoding, **prompts}, tensor_type=return_tensors)

    def _process_images(self, images, original_sizes, **kwargs) -> tuple[dict, list, list]:
        """What the image processor returns, if there are images, and the sizes of the images before and after it."""
        if images is not None:
            if original_sizes is not None:
                raise ValueError("Pass images or original_sizes, not both.")
            encoding = self.image_processor(images, return_tensors="pt", **kwargs)
            return encoding, encoding["original_sizes"].tolist(), encoding["reshaped_input_sizes"].tolist()
        if original_sizes is None:
            raise ValueError("Pass images, or the original_sizes of images whose embeddings you have.")
        original_sizes = check_sizes(original_sizes)
        input_sizes = [self.image_processor.get_reshaped_input_size(size, **kwargs) for size in original_sizes]
        return {}, original_sizes, input_sizes

    def count_prompts(self, inputs: dict) -> list[int]:
        """
        Number of real prompts of each image in what a call returned, for `post_process_masks(num_prompts=...)`: those
        up to the last one that has a point or a box. If only masks were given, all count.
        """
        given = {
            name: value if isinstance(value, torch.Tensor) else torch.from_numpy(value)
            for name, value in inputs.items()
            if name.startswith("input_")
        }
        real = []  # [B, Q] each
        if "input_points" in given:
            real.append((given["input_labels"] >= 0).any(dim=-1))
        if "input_boxes" in given:
            real.append((given["input_boxes"] != PAD_VALUE).any(dim=-1))
        if not real and "input_masks" in given:
            real.append(torch.ones_like(given["input_masks"][:, :, 0, 0], dtype=torch.bool))
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


def _image_options(images_kwargs: dict | None = None, common_kwargs: dict | None = None, **kwargs) -> dict:
    """Options of the image processor, nested as transformers' processors take them, in one dict."""
    for name in ("text", "text_kwargs", "audio_kwargs", "videos_kwargs"):
        if kwargs.pop(name, None):
            raise TypeError(f"{name} would have no effect: this processor takes images and prompts; leave it out.")
    return {**(common_kwargs or {}), **(images_kwargs or {}), **kwargs}


__all__ = ["EfficientSamProcessor"]
