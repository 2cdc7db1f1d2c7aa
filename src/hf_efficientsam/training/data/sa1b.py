"""SA-1B, as Meta publishes it: tar shards of sa_ID.jpg and sa_ID.json, the masks of an image."""

import io
import json
import os

from pycocotools import mask as rle_codec

from .coco import DEFAULT_READING, AnnotationConfig, Sample, to_rle, turn_rle
from .reading import IMAGE_SUFFIXES, decode_image, read_header
from .shards import CountedWarnings, Shards


class Sa1bShards(Shards):
    """The records of SA-1B's shards, or of others in their format, each decoded to a `Sample`. See `Shards`.

    A record is an image and a json of the same name, `{"image": {"image_id", "width", "height"}, "annotations":
    [{"id", "segmentation"}]}` with COCO RLE, compressed or not (or polygons); what else is in it is not read. `source`
    of the samples is the shard's file name without .tar.

    Args:
        shards: see `Shards`.
        min_area: leave out masks of fewer pixels, with warnings that count them. The json's `area` is not read.
        reading: its `mask_frame`, see `FrameConfig`.

    A record is broken if its image, json or any mask cannot be read, if they disagree about the size, or if no mask of
    `min_area` pixels is left.
    """

    needs = (IMAGE_SUFFIXES, (".json",))

    def __init__(self, shards: list[str], min_area: int = 1, reading: AnnotationConfig = DEFAULT_READING):
        super().__init__(shards)
        self.min_area, self.mask_frame = min_area, reading.mask_frame
        self.empty = CountedWarnings("Left out")
        self.hidden = CountedWarnings("Taken to be, give --mask_frame upright or stored")

    def decode(self, record: dict) -> Sample:
        (image_name, encoded), (name, text) = record["members"]
        image_name, name = (f"{member} in {record['shard']}" for member in (image_name, name))
        try:
            content = json.loads(text)
            size = int(content["image"]["width"]), int(content["image"]["height"])
            image_id = int(content["image"]["image_id"])
            annotations = [(int(entry["id"]), entry["segmentation"]) for entry in content["annotations"]]
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else repr(error)
            raise ValueError(f"{name} cannot be read as SA-1B's json ({reason}).") from error
        image = decode_image(io.BytesIO(encoded), image_name)
        try:
            header = read_header(io.BytesIO(encoded))
            orientation = header.mask_orientation(size, self.mask_frame)
        except ValueError:
            raise ValueError(
                f"{image_name} is {image.width} x {image.height} pixels when upright, but its json says {size[0]} x "
                f"{size[1]}."
            ) from None
        if header.hides_frame and self.mask_frame is None:
            self.hidden(f"An EXIF tag turns or mirrors {image_name}; are its masks upright?")
        rles, ids = [], []
        for annotation_id, segmentation in annotations:
            try:
                rle = to_rle(segmentation, size[1], size[0])
            except Exception as error:  # damaged masks make pycocotools raise nearly anything
                raise ValueError(f"Mask {annotation_id} of {name} cannot be read ({error!r}).") from error
            if rle is not None and rle_codec.area(rle) >= self.min_area:
                rles.append(rle if orientation == 1 else turn_rle(rle, orientation))
                ids.append(annotation_id)
            else:
                self.empty(f"Mask {annotation_id} of {name} has less than {self.min_area} pixels.")
        if not rles:
            raise ValueError(f"{name} has no mask of at least {self.min_area} pixels.")
        source = os.path.basename(record["shard"].partition("?")[0]).removesuffix(".tar")
        return Sample(image, rles, image_id, ids, source)
