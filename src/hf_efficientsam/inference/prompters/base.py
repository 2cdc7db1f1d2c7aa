"""What the prompters have in common."""

from typing import Self

import torch
from transformers.image_utils import ImageInput

from ..predictor import EfficientSamPredictor


class Prompter:
    """
    Finds prompts for an [`EfficientSamPredictor`], so that nobody has to give exact ones.

    Args:
        predictor: the predictor whose image is segmented.
    """

    def __init__(self, predictor: EfficientSamPredictor):
        self.predictor = predictor

    @classmethod
    def from_pretrained(
        cls,
        name: str | None = None,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str = torch.float32,
        **options,
    ) -> Self:
        """Of the predictor that `EfficientSamPredictor.from_pretrained` makes; `options` are those of the class."""
        return cls(EfficientSamPredictor.from_pretrained(name, device, dtype), **options)

    def to(self, *args, **kwargs) -> Self:
        """Moves the predictor, and the model that finds its prompts, as `torch.Tensor.to` does."""
        self.predictor.to(*args, **kwargs)
        return self

    def look_at(self, image: ImageInput | None = None) -> None:
        """
        Makes `image`, if one is given, that of the predictor.

        Raises:
            RuntimeError: if there is no image.
        """
        if image is not None:
            self.predictor.set_image(image)
        self.predictor.get_image_embedding()  # raises without an image


def check_unit(name: str, value: float | None, below_one: bool = False) -> None:
    """Raises a ValueError unless a number (or `None`) lies in 0 to 1, or, with `below_one`, below 1."""
    if value is None or (0 <= value < 1 if below_one else 0 <= value <= 1):
        return
    raise ValueError(f"{name} must be {'at least 0 and below 1' if below_one else 'from 0 to 1'}, not {value:g}.")


__all__ = ["Prompter", "check_unit"]
