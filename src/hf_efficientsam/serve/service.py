"""What the HTTP API computes, apart from HTTP: one model, and the images that were encoded last."""

import hashlib
from collections import OrderedDict
from threading import BoundedSemaphore, Lock

from pycocotools import mask as coco_mask

from hf_efficientsam.inference.formats.polygons import polygons_of_mask
from hf_efficientsam.inference.loading import is_bundled, load_model
from hf_efficientsam.inference.mask_generation import EfficientSamMaskGenerator
from hf_efficientsam.inference.predictor import EfficientSamPredictor
from hf_efficientsam.inference.prompt_files import check_objects
from hf_efficientsam.inference.results import mask_rles
from hf_efficientsam.inference.uploads import MAX_PIXELS, read_objects, read_upload, warnings_of


class UnknownImage(LookupError):
    """An image that was never sent, or is no longer kept."""


class EncodedImages:
    """
    Predictors with their images set, by name; those used least recently make room for others.

    Args:
        max_images: most images to keep.
        max_bytes: most bytes to keep, counted as embedding and RGB pixels; one image is kept whatever its size.
    """

    def __init__(self, max_images: int, max_bytes: int):
        self.max_images, self.max_bytes = max_images, max_bytes
        self.predictors: OrderedDict[str, EfficientSamPredictor] = OrderedDict()
        self.lock = Lock()

    def __len__(self) -> int:
        return len(self.predictors)

    @property
    def num_bytes(self) -> int:
        return sum(bytes_of(predictor) for predictor in self.predictors.values())

    def get(self, name: str) -> EfficientSamPredictor:
        """Raises UnknownImage if there is none of this name."""
        with self.lock:
            if name not in self.predictors:
                raise UnknownImage(f"there is no image {name} here (any more); send it with POST /images.")
            self.predictors.move_to_end(name)
            return self.predictors[name]

    def add(self, name: str, predictor: EfficientSamPredictor) -> None:
        with self.lock:
            self.predictors[name] = predictor
            self.predictors.move_to_end(name)
            while len(self) > self.max_images or (len(self) > 1 and self.num_bytes > self.max_bytes):
                self.predictors.popitem(last=False)

    def remove(self, name: str) -> None:
        """Raises UnknownImage if there is none of this name."""
        self.get(name)
        with self.lock:
            self.predictors.pop(name, None)


def bytes_of(predictor: EfficientSamPredictor) -> int:
    width, height = predictor.image.size
    return predictor.features.nbytes + 3 * width * height


class Service:
    """
    One model, which all requests share; two compute at a time.

    Args:
        model: directory or Hub name of the checkpoint; by default the bundled one.
        device, dtype: of the model, as of `load_model`.
        max_pixels: larger images are refused.
        max_images, max_bytes: of `EncodedImages`.

    Raises:
        ValueError: a checkpoint that cannot be loaded.
    """

    def __init__(
        self,
        model: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
        max_pixels: int = MAX_PIXELS,
        max_images: int = 64,
        max_bytes: int = 2**30,
    ):
        self.name = "bundled" if is_bundled(model) else model
        self.model, self.processor = load_model(model, dtype, device, max_pixels)
        self.max_pixels = max_pixels
        self.images = EncodedImages(max_images, max_bytes)
        self.computing = BoundedSemaphore(2)

    def encode(self, content: bytes, file_name: str) -> tuple[str, EfficientSamPredictor]:
        """
        The name of an image, which follows from the content of its file, and the predictor that it is set in. An image
        that is kept is not encoded again.

        Raises:
            ValueError: one sentence about what is wrong with the file.
        """
        name = hashlib.sha256(content).hexdigest()
        try:
            return name, self.images.get(name)
        except UnknownImage:
            predictor = EfficientSamPredictor(self.model, self.processor)
        with self.computing:
            predictor.set_image(read_upload(content, file_name, self.max_pixels))
        self.images.add(name, predictor)
        return name, predictor

    def segment(
        self, name: str, prompts: dict, separate_points: bool, candidates: bool
    ) -> tuple[list[list[tuple]], list[str]]:
        """
        The masks of the objects that points and boxes show.

        Args:
            name: of an image.
            prompts, separate_points: as of `read_objects`.
            candidates: all candidate masks of each object, the most confident first, or that one alone.

        Returns:
            for each object its masks, (compressed COCO RLE, predicted IoU); and the sentences of `warnings_of`.

        Raises:
            UnknownImage: no image of this name is kept.
            ValueError: one sentence about what is wrong with the prompts.
        """
        predictor = self.images.get(name)
        objects = read_objects(prompts, separate_points)
        check_objects(objects, predictor.image.size, self.model, self.processor)
        found = []
        with self.computing:
            for one in objects:  # one by one, because masks are of the image's size
                masks, scores = predictor.segment_candidates(
                    [one["points"]], [one["labels"]], [one["box"]], best_only=not candidates
                )
                found.append(list(zip(mask_rles(masks[0]), scores[0].clip(0, 1).tolist(), strict=True)))
        return found, warnings_of(objects, *predictor.image.size)

    def find_everything(self, name: str, **options) -> list[list[tuple]]:
        """As `segment`, of all objects, one mask each; `options` are those of [`EfficientSamMaskGenerator`]."""
        predictor = self.images.get(name)
        generator = EfficientSamMaskGenerator(self.model, self.processor, output_mode="coco_rle", **options)
        with self.computing:
            records = generator.generate(predictor.image)
        return [[(record["segmentation"], min(max(0.0, record["predicted_iou"]), 1.0))] for record in records]


def annotation_of(rle: dict, score: float, as_polygons: bool, tolerance: float) -> dict:
    """A mask with the fields of a COCO annotation, and its score."""
    segmentation = rle
    if as_polygons:
        parts = polygons_of_mask(coco_mask.decode(rle).astype(bool), tolerance)
        segmentation = [part.ravel().tolist() for part in parts]
    area, bbox = int(coco_mask.area(rle)), coco_mask.toBbox(rle).tolist()
    return {"segmentation": segmentation, "area": area, "bbox": bbox, "score": round(score, 4)}
