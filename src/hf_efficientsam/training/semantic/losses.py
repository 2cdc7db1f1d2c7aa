"""What semantic segmentation adds to a training loop: the losses of its two heads, whole and sliding evaluation, mIoU.

Both losses are sums that are divided by an amount of the whole step, over processes and accumulated batches, and what
they draw is drawn image by image. So how a step's images are split into batches does not change its gradient, but for
UperNet's batch normalisation and for drop path.
"""

import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from transformers import Mask2FormerForUniversalSegmentation, PreTrainedModel
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from hf_efficientsam.training.data.semantic import NO_CLASS


class PixelLoss:
    """UperNet's: cross-entropy of each pixel that has a class."""

    options = {}

    def amounts(self, labels: torch.Tensor) -> torch.Tensor:
        """What the loss of a step is divided by, of some of its images: `[1]`, summed over all of them."""
        return (labels != NO_CLASS).sum().float()[None]

    def __call__(self, output, labels: torch.Tensor, seeds: list[int], amounts: torch.Tensor) -> torch.Tensor:
        total = F.cross_entropy(output.logits.float(), labels.long(), ignore_index=NO_CLASS, reduction="sum")
        return total / amounts[0].clamp(min=1e-6)  # where no pixel has a class


class _SummedLoss(Mask2FormerLoss):
    """Sums over the masks of one image; transformers' divides by the masks of a batch on all processes."""

    def get_num_masks(self, class_labels, device) -> torch.Tensor:
        return torch.ones((), device=device)


class MaskLoss:
    """
    Mask2Former's, as transformers has it, of all images of a step at once: a class of an image is a mask, queries are
    matched to masks, and masks are compared at points that are drawn by chance, here by each image's own.

    Args:
        model: whose configuration has the weights and the number of points.
    """

    options = {"output_auxiliary_logits": True}  # the loss is of every layer's masks

    def __init__(self, model: Mask2FormerForUniversalSegmentation):
        self.config, self.weights = model.config, model.weight_dict
        self.criterion = _SummedLoss(model.config, model.weight_dict).to(model.device)

    def amounts(self, labels: torch.Tensor) -> torch.Tensor:
        """What the loss of a step is divided by, of some of its images `[B, S, S]`: masks, and weights of queries,
        `[2]`, summed over all of them."""
        masks = [len(classes_of(image)) for image in labels]
        return torch.tensor([sum(masks), sum(map(self.query_weight, masks))])

    def query_weight(self, masks: int) -> float:
        """Of all queries of an image together: those that are matched to none count less."""
        matched = min(masks, self.config.num_queries)
        return matched + self.config.no_object_weight * (self.config.num_queries - matched)

    def __call__(self, output, labels: torch.Tensor, seeds: list[int], amounts: torch.Tensor) -> torch.Tensor:
        """
        Args:
            output: the model's, with the `options`.
            labels: uint8 `[B, S, S]`.
            seeds: of what is drawn for each image.
            amounts: `[2]`, those of the step, divided by the number of batches over which losses are averaged.
        """
        masks_amount, queries_amount = amounts.clamp(min=1e-6)  # where no pixel has a class
        layers, loss = [output, *output.auxiliary_logits], 0
        for number, (image, seed) in enumerate(zip(labels, seeds, strict=True)):
            torch.manual_seed(seed)
            classes, one = classes_of(image), slice(number, number + 1)
            masks = (image == classes[:, None, None]).float()
            for layer in layers:
                queries = layer["masks_queries_logits"][one].float(), layer["class_queries_logits"][one].float()
                parts = self.criterion(*queries, [masks], [classes.long()])
                # A weighted mean over the image's queries becomes its share of all of them.
                parts["loss_cross_entropy"] *= self.query_weight(len(classes)) * masks_amount / queries_amount
                loss = loss + sum(self.weights[name] * part for name, part in parts.items()) / masks_amount
        return loss


def classes_of(labels: torch.Tensor) -> torch.Tensor:
    """The classes that an image `[S, S]` shows, uint8 `[n]`, ascending."""
    classes = labels.unique()
    return classes[classes != NO_CLASS]


def class_scores(model: PreTrainedModel, pixel_values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    Of each class at each pixel: `[B, 3, h, w]` -> `[B, K, *size]`. UperNet's are probabilities; Mask2Former's (arXiv
    2112.01527) sum over the queries the class's probability times the mask's, and do not sum to 1.
    """
    output = model(pixel_values)
    is_mask_former = "masks_queries_logits" in output
    maps = output.masks_queries_logits if is_mask_former else output.logits
    maps = F.interpolate(maps.float(), size, mode="bilinear", align_corners=False)
    if not is_mask_former:
        return maps.softmax(1)
    classes = output.class_queries_logits.float().softmax(2)[..., :-1]  # the last one is no object
    return torch.einsum("bqk,bqhw->bkhw", classes, maps.sigmoid())


def sliding_scores(
    model: PreTrainedModel, pixel_values: torch.Tensor, size: tuple[int, int], window: int
) -> torch.Tensor:
    """`class_scores` as the mean over square windows of the input, `window` pixels wide; neighbours overlap by a third
    or more."""
    (height, width), sums, counts = pixel_values.shape[-2:], 0, 0
    for top in _starts(height, window):
        for left in _starts(width, window):
            part = pixel_values[..., top : top + window, left : left + window]
            scores = class_scores(model, part, part.shape[-2:])
            place = (left, width - left - part.shape[-1], top, height - top - part.shape[-2])
            sums = sums + F.pad(scores, place)
            counts = counts + F.pad(torch.ones_like(scores[:1, :1]), place)
    return F.interpolate(sums / counts, size, mode="bilinear", align_corners=False)


def _starts(length: int, window: int) -> list[int]:
    """Where windows begin, so that the last one ends where the image does."""
    last = max(length - window, 0)
    return [*range(0, last, max(1, window * 2 // 3)), last]


def confusion_matrix(predicted: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """
    Counts of pixels, int64 `[K, K]`: row by true class, column by predicted class.

    Args:
        predicted: classes of any shape.
        labels: true classes of the same shape; `NO_CLASS` is not counted.
        num_classes: K.
    """
    known = labels != NO_CLASS
    pairs = labels[known].long() * num_classes + predicted[known]
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


class MeanIoU(evaluate.Metric):
    """
    `mean_iou`, `pixel_accuracy` and `class_iou`, a list with None for a class that is neither there nor predicted, and
    which the mean leaves out. It is made directly, as `evaluate.load` asks a network, and takes counts, which may be
    of an image or of thousands: their sum is exact, however the images were divided among processes.

        MeanIoU(keep_in_memory=True).compute(confusions=[confusion_matrix(predicted, labels, 150).tolist(), ...])
    """

    def _info(self) -> evaluate.MetricInfo:
        counts = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", features=datasets.Features({"confusions": counts})
        )

    def _compute(self, confusions: list[list[list[int]]]) -> dict:
        counts = np.sum(confusions, axis=0, dtype=np.int64)
        correct, unions = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
        found = unions > 0
        ious = np.divide(correct, unions, where=found, out=np.zeros(len(counts)))
        return {
            "mean_iou": float(ious[found].mean()),
            "pixel_accuracy": float(correct.sum() / counts.sum()),
            "class_iou": [float(iou) if there else None for iou, there in zip(ious, found, strict=True)],
        }
