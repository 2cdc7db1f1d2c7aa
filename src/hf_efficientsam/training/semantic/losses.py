"""The losses of the two heads of semantic segmentation.

Both losses are sums that are divided by an amount of the whole step, over processes and accumulated batches, and what
they draw is drawn image by image. So how a step's images are split into batches does not change its gradient, but for
UperNet's batch normalisation and for drop path.
"""

import torch
import torch.nn.functional as F
from transformers import Mask2FormerForUniversalSegmentation
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


class QueryLoss:
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
                # A weighted mean over the image's queries becomes its part of the mean over all of them.
                parts["loss_cross_entropy"] *= self.query_weight(len(classes)) * masks_amount / queries_amount
                loss = loss + sum(self.weights[name] * part for name, part in parts.items()) / masks_amount
        return loss


def classes_of(labels: torch.Tensor) -> torch.Tensor:
    """The classes that an image `[S, S]` shows, uint8 `[n]`, ascending."""
    classes = labels.unique()
    return classes[classes != NO_CLASS]
