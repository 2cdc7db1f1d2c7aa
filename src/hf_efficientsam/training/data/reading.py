"""One way to decode an image file, for all data."""

import io

from PIL import Image

from hf_efficientsam.model.image_reading_efficientsam import MAX_IMAGE_PIXELS, image_to_array, to_pil_image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def decode_image(file: str | io.BytesIO, name: str) -> Image.Image:
    """
    The image as inference reads it, but in 8 bits a channel. ValueError with `name` if that cannot be, or if it has
    more pixels than the image processor takes by default.
    """
    return to_pil_image(image_to_array(file, max_image_pixels=MAX_IMAGE_PIXELS, name=name))
