"""How images become the input of a promptable model, and its logits masks of those images."""

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file

from hf_efficientsam.training.data.augment import fitted_size
from hf_efficientsam.training.data.images import normalize, to_image
from hf_efficientsam.training.data.processor_files import read_processor_values

PROCESSOR_FILES = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME)


@dataclass(frozen=True)
class InputFormat:
    """
    What training crops become; by default what our models take.

    Attributes:
        mean, std: of R, G and B in [0, 1].
        keeps_aspect_ratio: the longer side becomes S and the rest of the square is 0, below or to the right; else the
            crop is squashed to the square.
        antialias: whether reducing averages all pixels.
    """

    mean: tuple[float, ...] = tuple(IMAGENET_DEFAULT_MEAN)
    std: tuple[float, ...] = tuple(IMAGENET_DEFAULT_STD)
    keeps_aspect_ratio: bool = False
    antialias: bool = False

    def normalize(self, pixels: torch.Tensor, size: int) -> torch.Tensor:
        """RGB `[3, h, w]` in [0, 1], one side of which is S -> model input `[3, S, S]`."""
        return pad_to_square(normalize(pixels, self.mean, self.std), size)

    def to_image(self, pixel_values: torch.Tensor) -> Image.Image:
        """The inverse, padding included."""
        return to_image(pixel_values, self.mean, self.std)


OUR_FORMAT = InputFormat()


def pad_to_square(values: torch.Tensor, size: int) -> torch.Tensor:
    """`[..., h, w]` -> `[..., S, S]`, with zeros below or to the right."""
    bottom, right = size - values.shape[-2], size - values.shape[-1]
    return F.pad(values, (0, right, 0, bottom)) if bottom or right else values


@dataclass(frozen=True)
class PlainImageProcessor:
    """
    The image processor of SAM, SAM-HQ, SAM 2, SAM 3 or EdgeTAM from the values of its file, with the same interface.
    transformers' own need torchvision, but for the first two.

    Images are resized by PIL, as the first two do; torchvision's results differ by rounding, at most 1 of 255.

    Args:
        size: side S of the model's input in pixels.
        format: of that input.
        resample: PIL's number of the filter.
        files: of the processor, which `save_pretrained` copies.
    """

    size: int
    format: InputFormat = InputFormat(antialias=True)
    resample: int = Image.Resampling.BILINEAR
    files: list[Path] = field(default_factory=list)

    @classmethod
    def from_pretrained(cls, name: str) -> "PlainImageProcessor":
        """
        Args:
            name: directory or Hub name of a model.

        Raises:
            ValueError: if no processor was saved with it.
        """
        values = read_processor_values(name)
        mean, std = (tuple(value / 255 for value in one) for one in (values.mean, values.std))
        found = [cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in PROCESSOR_FILES]
        input_format = InputFormat(mean, std, values.keeps_aspect_ratio, antialias=True)
        return cls(values.side, input_format, values.resample, [Path(file) for file in found if file])

    def __call__(self, images: Image.Image, return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        """An RGB image -> `pixel_values` `[1, 3, S, S]`, `original_sizes` and, unless it is squashed,
        `reshaped_input_sizes`, each (height, width) `[1, 2]`."""
        sizes = {"original_sizes": torch.tensor([[images.height, images.width]])}
        height = width = self.size
        if self.format.keeps_aspect_ratio:
            height, width = fitted_size(images.height, images.width, self.size)
            sizes["reshaped_input_sizes"] = torch.tensor([[height, width]])
        pixels = np.array(images.resize((width, height), self.resample))
        pixels = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        return {"pixel_values": self.format.normalize(pixels, self.size)[None], **sizes}

    def post_process_masks(
        self, masks: list[torch.Tensor], original_sizes: list, reshaped_input_sizes: list | None = None
    ) -> list[torch.Tensor]:
        """Logits `[Q, M, h, w]` of each image -> bool masks `[Q, M, height, width]` at its own size."""
        results = []
        for i, logits in enumerate(masks):
            if reshaped_input_sizes is not None:
                height, width = reshaped_input_sizes[i]
                logits = F.interpolate(logits, (self.size, self.size), mode="bilinear")[..., :height, :width]
            results.append(F.interpolate(logits, tuple(original_sizes[i]), mode="bilinear") > 0)
        return results

    def to_dict(self) -> dict:
        """What results depend on."""
        return {"size": self.size, "format": asdict(self.format), "resample": int(self.resample)}

    def save_pretrained(self, folder: str | Path) -> None:
        """The files that the processor was read from."""
        for file in self.files:
            shutil.copyfile(file, Path(folder) / file.name)
