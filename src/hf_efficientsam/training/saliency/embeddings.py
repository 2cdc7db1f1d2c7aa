"""What a saliency head is trained on: embeddings of images that are encoded once. And what it starts from."""

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel
from hf_efficientsam.model.modeling_saliency import EfficientSamSaliencyHead
from hf_efficientsam.model.processing_efficientsam import EfficientSamProcessor
from hf_efficientsam.training.data.coco import decode_rles

NOISE_RATIO = 1e-5  # of the embeddings' variance: components of less are not made as large as the others


class EmbeddedImages(Dataset):
    """
    Images with one mask each, as the processor shows them to a frozen encoder. An image is encoded when it is first
    asked for, and then kept in half precision: at 512 pixels half a MiB.

    Args:
        model: the encoder's, in evaluation mode.
        processor: its processor, or one of another size.
        source: of samples with one mask each.
    """

    def __init__(self, model: EfficientSamModel, processor: EfficientSamProcessor, source: Dataset):
        self.model, self.processor, self.source, self.known = model, processor, source, {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        """`image_embeddings` float16 `[C, h, w]` on the CPU; `sizes`, the arguments of `post_process_masks` that bring
        a map back to the image; `truth`, bool `[height, width]`; and `key`, a name for messages."""
        if index not in self.known:
            sample = self.source[index]
            inputs = self.processor(sample.image, return_tensors="pt")
            with torch.no_grad():
                embeddings = self.model.get_image_embeddings(inputs["pixel_values"].to(self.model.device))
            self.known[index] = {
                "image_embeddings": embeddings[0].half().cpu(),
                "sizes": {name: inputs[name] for name in ("original_sizes", "reshaped_input_sizes")},
                "truth": decode_rles(sample.rles)[0].astype(bool),
                "key": f"{sample.source}/{sample.image_id}",
            }
        return self.known[index]


class MirroredEmbeddings(Dataset):
    """
    What is trained on: encoded images squashed to one size, and in half of the cases their mirror images. Embeddings
    are mirrored as they are: so an image is encoded once. An item depends on (seed, epoch, index) and on nothing else.
    """

    def __init__(self, images: EmbeddedImages, seed: int = 0):
        self.images, self.seed, self.epoch = images, seed, 0

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict:
        """`image_embeddings` float32 `[C, h, w]`, `labels` float32 `[4 * h, 4 * w]` from 0 to 1, the image's `key`,
        and `seed`, of what the model draws in training."""
        image, generator = self.images[index], np.random.default_rng([self.seed, self.epoch, index])
        embeddings = image["image_embeddings"].float()
        truth = torch.from_numpy(image["truth"])[None].float()
        labels = F.adaptive_avg_pool2d(truth, tuple(4 * side for side in embeddings.shape[1:]))[0]
        if generator.random() < 0.5:
            embeddings, labels = embeddings.flip(-1), labels.flip(-1)
        return {
            "image_embeddings": embeddings,
            "labels": labels,
            "key": image["key"],
            "seed": int(generator.integers(2**63)),
        }


@torch.no_grad()
def whiten(head: EfficientSamSaliencyHead, embeddings: torch.Tensor) -> None:
    """
    Sets a new head's projection so that it takes the principal components of these embeddings `[B, C, h, w]` out of
    their cells, uncorrelated and of variance 1. A few components have nearly all of the variance, and not what is
    needed to know an object by: from random weights the head would take very long to see the others.
    """
    cells = embeddings.double().permute(0, 2, 3, 1).flatten(0, 2)
    mean = cells.mean(0)
    variances, directions = torch.linalg.eigh((cells - mean).T @ (cells - mean) / len(cells))  # ascending
    variances = variances + NOISE_RATIO * variances.sum()
    largest = slice(-head.config.hidden_size, None)
    weight = (directions / variances.sqrt())[:, largest].T
    head.projection.weight.copy_(weight)
    head.projection.bias.copy_(-weight @ mean)
