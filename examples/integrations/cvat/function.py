"""Two auto-annotation functions of CVAT that ask `efficientsam serve`: for clicks and boxes, and for everything."""

import io

import cvat_sdk.auto_annotation as cvataa
import PIL.Image
import requests
from cvat_sdk import models
from cvat_sdk.masks import encode_mask
from pycocotools import mask as coco_mask


class Server:
    """`efficientsam serve` at an address. An image that it still has is not encoded again when it is sent again."""

    def __init__(self, url: str):
        self.url = url

    def ask(self, answer: requests.Response) -> dict:
        """What the server answered. Raises RuntimeError with the server's sentence where it refused."""
        if answer.status_code >= 400:
            raise RuntimeError(f"efficientsam serve: {answer.text}")
        return answer.json()

    def background_points(self) -> bool:
        return self.ask(requests.get(f"{self.url}/model"))["background_points"]

    def find(self, content: bytes, path: str, asked: dict) -> list[dict]:
        """The best mask of each object in an image file, in the order of the server."""
        image = self.ask(requests.post(f"{self.url}/images", files={"file": content}))
        found = self.ask(requests.post(f"{self.url}/images/{image['id']}/{path}", json=asked))
        return [one["masks"][0] for one in found["objects"]]


def file_of(image: PIL.Image.Image) -> bytes:
    content = io.BytesIO()
    image.convert("RGB").save(content, "PNG", compress_level=1)
    return content.getvalue()


def shape_of(mask: dict) -> list[float]:
    """A mask in CVAT's encoding."""
    return encode_mask(coco_mask.decode(mask["segmentation"]).astype(bool))


class Interactor:
    """The object that clicks and a box show, as a mask."""

    def __init__(self, server: Server):
        self.server = server
        negative = 0 if server.background_points() else None
        self.spec = cvataa.InteractionFunctionSpec(min_pos_points=0, min_neg_points=negative, min_bounding_boxes=0)

    def preprocess_image(self, context: cvataa.InteractionFunctionContext, image: PIL.Image.Image) -> bytes:
        return file_of(image)

    def detect(
        self, context: cvataa.InteractionFunctionContext, pp_image: bytes, prompts: cvataa.InteractionPrompts
    ) -> list[cvataa.InteractionResultShape]:
        if not prompts.pos_points and prompts.bounding_box is None:
            return []  # the background alone shows no object
        points = [list(point) for point in (*prompts.pos_points, *prompts.neg_points)]
        labels = [1] * len(prompts.pos_points) + [0] * len(prompts.neg_points)
        boxes = [] if prompts.bounding_box is None else [[*prompts.bounding_box[0], *prompts.bounding_box[1]]]
        masks = self.server.find(pp_image, "masks", {"points": points, "labels": labels, "boxes": boxes})
        confidence = cvataa.InteractionResultAttributes.CONFIDENCE
        return [
            cvataa.InteractionResultShape(
                type="mask",
                points=shape_of(mask),
                attributes=[models.AttributeValRequest(spec_id=int(confidence), value=str(mask["score"]))],
            )
            for mask in masks
        ]


class Detector:
    """All objects of an image, as masks, or polygons, of one label."""

    def __init__(self, server: Server, label: str):
        self.server = server
        self.spec = cvataa.DetectionFunctionSpec(labels=[cvataa.label_spec(label, 0, type="mask")])

    def detect(
        self, context: cvataa.DetectionFunctionContext, image: PIL.Image.Image
    ) -> list[models.LabeledShapeRequest]:
        asked = {"format": "polygons", "tolerance": 1.0} if context.conv_mask_to_poly else {}
        if context.conf_threshold is not None:
            asked["pred_iou_thresh"] = context.conf_threshold
        masks = self.server.find(file_of(image), "everything", asked)
        if context.conv_mask_to_poly:
            return [cvataa.polygon(0, part) for mask in masks for part in mask["segmentation"]]
        return [cvataa.mask(0, shape_of(mask)) for mask in masks]


def create(kind: str = "interactor", url: str = "http://127.0.0.1:8000", label: str = "object"):
    """
    What `cvat-cli` calls with its parameters `-p NAME=str:VALUE`.

    Args:
        kind: "interactor" or "detector".
        url: of `efficientsam serve`.
        label: the task's label that a detector gives to all objects.
    """
    return {"interactor": Interactor, "detector": lambda server: Detector(server, label)}[kind](Server(url))
