import numpy as np
import pytest
from PIL import Image

from hf_efficientsam import EfficientSamPredictor

WIDTH, HEIGHT = 60, 40


@pytest.fixture
def image() -> Image.Image:
    """60 pixels wide and 40 high."""
    return noise_image(0)


@pytest.fixture
def other_image() -> Image.Image:
    return noise_image(1)


def noise_image(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


@pytest.fixture
def predictor(tiny_model, image) -> EfficientSamPredictor:
    """It has `image`."""
    predictor = EfficientSamPredictor.from_pretrained(str(tiny_model))
    predictor.set_image(image)
    return predictor
