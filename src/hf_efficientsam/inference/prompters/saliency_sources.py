"""
Where saliency maps come from: functions from an upright RGB image to a map, `[height, width]` of any size, 0 to 1.

`load_saliency` finds the right one for a name: a head of ours, a transformers model, or an ONNX file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageSegmentation,
    AutoModelForSemanticSegmentation,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hf_efficientsam.model.configuration_saliency import EfficientSamSaliencyConfig
from hf_efficientsam.model.modeling_saliency import EfficientSamSaliencyHead

from ..loading import bundled_checkpoint, is_bundled, load_head, load_own_head, loading, read_config
from ..predictor import EfficientSamPredictor

SaliencySource = Callable[[Image.Image], Any]


def load_saliency(
    name: str | Path | None, predictor: EfficientSamPredictor, trust_remote_code: bool = False
) -> SaliencySource:
    """
    Args:
        name: `None`: the head in the folder `saliency` of the predictor's checkpoint, which needs no second network;
            the directory of such a head, as training/train_saliency.py writes it; "bundled" for the bundled
            checkpoint's; the directory or Hub name of a transformers model, see [`ModelSaliency`]; or a file that ends
            in .onnx, see [`OnnxSaliency`].
        predictor: on whose image embedding a head works.
        trust_remote_code: run the code that a transformers model brings along.

    Returns:
        a function from the predictor's image to a map.

    Raises:
        ValueError: a model that cannot be loaded, or that gives no saliency map.
    """
    if name is None:
        checkpoint = predictor.model.name_or_path
        if (head := load_own_head(checkpoint)) is None:
            raise ValueError(
                f"{checkpoint or 'the model'} has no saliency head; name a saliency model (--saliency), or train a "
                "head with training/train_saliency.py."
            )
        return HeadSaliency(predictor, head)
    name = str(Path(bundled_checkpoint(), "saliency")) if is_bundled(name) else str(name)
    if name.lower().endswith(".onnx"):
        return OnnxSaliency(name)
    read_config(name)
    with loading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    if isinstance(config, EfficientSamSaliencyConfig):
        return HeadSaliency(predictor, load_head(name))
    return ModelSaliency(name, config, trust_remote_code, predictor)


class HeadSaliency:
    """A head of ours on the image embedding that the predictor has computed already."""

    def __init__(self, predictor: EfficientSamPredictor, head: EfficientSamSaliencyHead):
        channels = predictor.model.config.vision_config.output_channels
        if head.config.input_channels != channels:
            raise ValueError(
                f"the saliency head {head.name_or_path} takes {head.config.input_channels} channels, but this "
                f"checkpoint's embeddings have {channels}; use the head that was trained with it."
            )
        self.predictor, self.head = predictor, head.float().eval()

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> torch.Tensor:
        predictor = self.predictor
        logits = self.head.to(predictor.device)(predictor.features.float()).logits
        sizes = [predictor.original_size], [predictor.input_size]
        return predictor.processor.post_process_masks([logits], *sizes, binarize=False)[0][0, 0].sigmoid()


class ModelSaliency:
    """
    A transformers model that separates an object from its background:

    - one for semantic segmentation (SegFormer, BEiT, ...) of one class, of two (background first), or of any number
      of which one is called "background": the map is one minus the background's probability;
    - with `trust_remote_code`, one whose code is in its repository and which its `AutoModelForImageSegmentation` loads
      (BiRefNet, RMBG): it takes `[1, 3, H, W]` and returns a map of logits or of 0 to 1, also in nested lists.

    A repository without a usable image processor is given the whole image at 1024 x 1024, normalised by ImageNet's
    mean and standard deviation, as BiRefNet and RMBG 2.0 need it.
    """

    def __init__(self, name: str, config, trust_remote_code: bool, predictor: EfficientSamPredictor):
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
        self.name, self.model, self.predictor = name, model.eval(), predictor

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> np.ndarray:
        if self.processor is None:
            pixel_values = torch.from_numpy(squash(image, (1024, 1024)))
        else:
            pixel_values = self.processor(images=image, return_tensors="pt")["pixel_values"]
        device = self.predictor.device
        outputs = self.model.to(device)(pixel_values.to(device))
        outputs = outputs.logits if hasattr(outputs, "logits") else outputs
        return pick_map(self._foreground(outputs), self.name)

    def _foreground(self, logits):
        """Logits of several classes -> the probability `[1, 1, h, w]` of not being background."""
        if not isinstance(logits, torch.Tensor) or logits.ndim != 4 or logits.shape[1] == 1:
            return logits
        names = [self.model.config.id2label[i].lower() for i in range(logits.shape[1])]
        if "background" not in names and len(names) > 2:
            raise ValueError(
                f"{self.name} has {len(names)} classes, none of which is called background, so it does not "
                "say what is salient; use a model for saliency or background removal."
            )
        background = names.index("background") if "background" in names else 0
        return 1 - logits.softmax(dim=1)[:, background : background + 1]


class OnnxSaliency:
    """
    A saliency model in an ONNX file: one input `[N, 3, H, W]` of floats, which is given the whole image, normalised by
    ImageNet's mean and standard deviation, at the size in the graph or, where that leaves it open, 320 x 320. The map
    is the first of the outputs with one channel and the highest resolution, logits or values from 0 to 1. For a model
    of another form write a function.

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
                f"{path} must take one image [N, 3, H, W] of floats to be a saliency model, not {shapes}."
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
    """A whole RGB image as `[1, 3, *size]`, float32, normalised by ImageNet's mean and standard deviation."""
    pixels = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR), dtype=np.float32) / 255
    pixels = (pixels - np.float32(IMAGENET_DEFAULT_MEAN)) / np.float32(IMAGENET_DEFAULT_STD)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def pick_map(outputs, name: str) -> np.ndarray:
    """
    Among a model's outputs the first map of one channel and the highest resolution, `[h, w]` from 0 to 1: models also
    return coarser maps and features.

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


__all__ = ["HeadSaliency", "ModelSaliency", "OnnxSaliency", "SaliencySource", "load_saliency", "pick_map"]
