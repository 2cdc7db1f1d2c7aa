"""One way to decode an image file, for all data."""

import io

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def decode_image(file: str | io.BytesIO, name: str) -> Image.Image:
    """Upright and RGB; ValueError with `name` if that cannot be."""
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16-bit gray, which convert("RGB") would clip
            image = Image.fromarray((np.array(image) // 256).astype(np.uint8))
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make Pillow raise nearly anything
        raise ValueError(f"{name} cannot be read as an image ({error!r}); replace or remove it.") from error
