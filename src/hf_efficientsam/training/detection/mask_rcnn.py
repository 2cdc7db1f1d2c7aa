"""Detection and instance segmentation: torchvision's Mask R-CNN around our backbone.

Only the functions that need torchvision import it: it is an extra, and where it is broken half of transformers is.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from hf_efficientsam.model.modeling_backbone_efficientsam import EfficientSamBackbone

from .data import fit

STRIDES = (4, 8, 16, 32, 64)  # of ViTDet's pyramid; boxes are proposed on all, and looked at on all but the last
# torchvision's names of the losses, and ours.
LOSSES = {"loss_objectness": "objectness", "loss_rpn_box_reg": "proposals", "loss_classifier": "classes"}
LOSSES |= {"loss_box_reg": "boxes", "loss_mask": "masks"}


def check_torchvision() -> None:
    """
    Raises:
        ValueError: if torchvision is not there or its operators do not work, with what to do about it.
    """
    try:
        from torchvision.ops import nms

        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"Detection needs a torchvision that works with torch {torch.__version__} ({error}); install the one that "
            "belongs to it: pip install 'hf-efficientsam[detection]', for a torch without CUDA from its own index."
        ) from error


@dataclass(frozen=True)
class DetectorConfig:
    """What a detector is beside its backbone.

    Args:
        categories: `{id, name}` of each; the label of the first is 1, as 0 is the background.
        image_size: side S in pixels of the square that an image is fitted into, a multiple of 64.
        anchor_scale: side of an anchor as a multiple of its level's stride: 8 is Mask R-CNN's 32 to 512 pixels.
        sampled_boxes: of so many proposals of an image the heads learn.
        min_score: detections of a lower score are left out.
    """

    categories: list[dict]
    image_size: int = 1024
    anchor_scale: float = 8.0
    sampled_boxes: int = 512
    min_score: float = 0.05


class MaskDetector(nn.Module):
    """
    Mask R-CNN with ViTDet's heads (arXiv 2203.16527): two convolutions before the proposals, four with a layer
    normalisation each before boxes and masks.

    Args:
        backbone: with a pyramid of `STRIDES`; the heads are as wide as it.
        config: see there.

    Raises:
        ValueError: without a torchvision that works.
    """

    def __init__(self, backbone: EfficientSamBackbone, config: DetectorConfig):
        super().__init__()
        self.config = config
        self.rcnn = mask_rcnn(backbone, config)

    @property
    def backbone(self) -> EfficientSamBackbone:
        return self.rcnn.backbone.body

    def forward(self, items: list[dict]) -> dict[str, torch.Tensor]:
        """
        The losses of some images, to be trained on.

        Each image's losses are of its own boxes, and the mean is over the images, as in ViTDet's training with one
        image a GPU. Chance (which boxes are sampled) is the image's own too. So it does not matter how a step's images
        are split into batches and processes, but for drop path, which is drawn for a batch.

        Args:
            items: of `DetectionViews`, all of one size.

        Returns:
            means `[]` by the names in `LOSSES`, and their sum as `loss`.
        """
        pixel_values = torch.stack([item["pixel_values"] for item in items])
        size = tuple(pixel_values.shape[-2:])
        with seeded(items[0]["seed"], pixel_values.device):  # stochastic depth
            features = self.rcnn.backbone(pixel_values)
        losses = []
        for number, item in enumerate(items):
            own = {name: level[number : number + 1] for name, level in features.items()}
            with seeded(item["seed"], pixel_values.device):
                losses.append(self._heads(own, pixel_values[number : number + 1], [size], [item])[1])
        means = {name: torch.stack([one[theirs] for one in losses]).mean() for theirs, name in LOSSES.items()}
        return {"loss": torch.stack(list(means.values())).sum(), **means}

    @torch.no_grad()
    def detect(self, images: list[Image.Image]) -> list[dict[str, torch.Tensor]]:
        """
        What is on some images.

        Args:
            images: upright and RGB, of any sizes.

        Returns:
            for each, the best first: `boxes` float32 `[N, 4]` (left, top, right, bottom in pixels of the image),
            `labels` int64 `[N]` (n is `config.categories[n - 1]`), `scores` float32 `[N]` and `masks` bool
            `[N, height, width]`, on the CPU.
        """
        training = self.training
        self.eval()
        fitted = [fit(image, self.config.image_size) for image in images]
        pixel_values = torch.stack([pixels for pixels, _ in fitted]).to(next(self.parameters()).device)
        sizes = [size for _, size in fitted]
        found, _ = self._heads(self.rcnn.backbone(pixel_values), pixel_values, sizes)
        found = self.rcnn.transform.postprocess(found, sizes, [(image.height, image.width) for image in images])
        self.train(training)
        on_cpu = [{name: value.cpu() for name, value in one.items()} for one in found]
        return [one | {"masks": one["masks"][:, 0] > 0.5} for one in on_cpu]

    def _heads(self, features: dict, pixel_values: torch.Tensor, sizes: list, targets: list | None = None) -> tuple:
        from torchvision.models.detection.image_list import ImageList

        features = {name: level.float() for name, level in features.items()}
        with torch.autocast(pixel_values.device.type, enabled=False):  # half precision is too coarse for a box
            proposals, losses = self.rcnn.rpn(ImageList(pixel_values, sizes), features, targets)
            found, more = self.rcnn.roi_heads(features, proposals, sizes, targets)
        return found, losses | more


class NamedPyramid(nn.Module):
    """The backbone's feature maps by name, as torchvision wants them."""

    def __init__(self, backbone: EfficientSamBackbone):
        super().__init__()
        self.body, self.out_channels = backbone, backbone.config.pyramid_channels

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self.body.config.out_features, self.body(pixel_values).feature_maps, strict=True))


def mask_rcnn(backbone: EfficientSamBackbone, config: DetectorConfig) -> nn.Module:
    """torchvision's `MaskRCNN`; see `MaskDetector`."""
    check_torchvision()
    from torchvision.models.convnext import LayerNorm2d
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
    from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.models.detection.rpn import RPNHead
    from torchvision.ops import MultiScaleRoIAlign
    from torchvision.ops.poolers import LevelMapper

    if tuple(backbone.config.pyramid_strides or ()) != STRIDES:
        raise ValueError(f"The backbone has the pyramid {backbone.config.pyramid_strides}; it must be {STRIDES}.")
    pyramid, channels, classes = NamedPyramid(backbone), backbone.config.pyramid_channels, len(config.categories) + 1

    def align(side: int) -> MultiScaleRoIAlign:
        pool = MultiScaleRoIAlign(backbone.config.out_features[:-1], side, sampling_ratio=2)
        # By itself it guesses the strides from the first images' sizes, without their padding.
        pool.scales = [1 / stride for stride in STRIDES[:-1]]
        pool.map_levels = LevelMapper(2, 5, canonical_scale=28 * config.anchor_scale)  # 224 for anchors of 8 strides
        return pool

    return MaskRCNN(
        pyramid,
        rpn_anchor_generator=AnchorGenerator(
            sizes=tuple((config.anchor_scale * stride,) for stride in STRIDES),
            aspect_ratios=((0.5, 1.0, 2.0),) * len(STRIDES),
        ),
        rpn_head=RPNHead(channels, 3, conv_depth=2),
        box_roi_pool=align(7),
        box_head=FastRCNNConvFCHead((channels, 7, 7), 4 * [channels], [4 * channels], LayerNorm2d),
        box_predictor=FastRCNNPredictor(4 * channels, classes),
        box_score_thresh=config.min_score,
        box_batch_size_per_image=config.sampled_boxes,
        mask_roi_pool=align(14),
        mask_head=MaskRCNNHeads(channels, 4 * [channels], 1, LayerNorm2d),
        mask_predictor=MaskRCNNPredictor(channels, channels, classes),
    )


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Chance as it follows from the seed, and afterwards as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def save_detector(detector: MaskDetector, folder: Path) -> None:
    """
    Writes the backbone as `save_pretrained` does, so that the folder is a backbone's for all that takes one, and
    beside it `heads.safetensors` and `detector.json`, which `load_detector` needs too.
    """
    detector.backbone.save_pretrained(folder)
    heads = {name: value.cpu().contiguous() for name, value in detector.state_dict().items() if not of_backbone(name)}
    save_file(heads, folder / "heads.safetensors")
    (folder / "detector.json").write_text(json.dumps(dataclasses.asdict(detector.config), indent=1) + "\n")


def load_detector(folder: str | Path) -> MaskDetector:
    """
    The detector that `save_detector` wrote, ready for `detect`, in float32 on the CPU.

        detector = load_detector("runs/detection/model")
        (found,) = detector.detect([Image.open("street.jpg")])

    Raises:
        ValueError: if there is none, or without a torchvision that works.
    """
    check_torchvision()
    try:
        config = DetectorConfig(**json.loads(Path(folder, "detector.json").read_text()))
        detector = MaskDetector(EfficientSamBackbone.from_pretrained(folder, dtype=torch.float32), config)
        missing, unexpected = detector.load_state_dict(load_file(Path(folder, "heads.safetensors")), strict=False)
    except (OSError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{folder} holds no detector of finetune_detection.py ({error}); give OUTPUT_DIR/model of a run."
        ) from error
    if wrong := [*unexpected, *(name for name in missing if not of_backbone(name))]:
        raise ValueError(
            f"{folder}/heads.safetensors does not fit detector.json (see {wrong[0]}); give another folder."
        )
    return detector.eval()


def of_backbone(name: str) -> bool:
    """Whether a detector's parameter is its backbone's."""
    return name.startswith("rcnn.backbone.body.")
