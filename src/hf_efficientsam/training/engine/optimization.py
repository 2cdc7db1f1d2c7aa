"""Parameter groups, learning rates of layers, the average of the weights, and a check that losses are finite."""

import math
import re
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim.swa_utils import AveragedModel


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, lr_scale: Callable[[str], float] = lambda name: 1.0
) -> list[dict]:
    """
    For an optimiser: the trainable parameters by learning rate, `learning_rate * lr_scale(name)`, and by weight decay,
    which is for the weights of linear layers and convolutions alone.
    """
    layers, groups = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d), {}
    decaying = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, layers)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((lr_scale(name), name in decaying), []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rate * scale, "weight_decay": weight_decay if decays else 0.0}
        for (scale, decays), parameters in groups.items()
    ]


def encoder_lr_scale(name: str, num_layers: int, layer_decay: float, encoder_scale: float = 1.0) -> float:
    """
    What the learning rate is multiplied by for a parameter of a model with our encoder, which may lie anywhere in it.

    Layer-wise decay is BEiT's (arXiv 2106.08254): `layer_decay` for the last of the encoder's `num_layers` layers, its
    square for the one before, and so on to the embeddings and the class token. All of these are also multiplied by
    `encoder_scale`. The neck and what comes after the encoder are new, or learn as if they were: 1.
    """
    if not re.search(r"\bvision_encoder\.", name) or ".neck." in name:
        return 1.0
    depth = 0
    if found := re.search(r"\bvision_encoder\.layers\.(\d+)\.", name):
        depth = num_layers - int(found[1])
    elif re.search(r"\bvision_encoder\.(embeddings\.|cls_token)", name):
        depth = num_layers + 1
    return layer_decay**depth * encoder_scale


def weight_average(model: nn.Module, decay: float) -> AveragedModel | None:
    """
    An exponential moving average of the weights, as timm and others have it: of a young run, only of its last tenth,
    so that the start is not remembered longer than it deserves. None for a decay of 0.
    """
    if decay == 0:
        return None

    def update(averages: list[torch.Tensor], weights: list[torch.Tensor], updates: torch.Tensor) -> None:
        weight = 1 - min(decay, (1 + int(updates)) / (10 + int(updates)))
        torch._foreach_lerp_(averages, weights, weight)

    return AveragedModel(model, multi_avg_fn=update)


def stop_unless_finite(
    accelerator: Accelerator, loss: torch.Tensor, grad_norm: torch.Tensor | float, step: int, images: list
) -> None:
    """
    Raises FloatingPointError on all processes if the loss or the gradient of one of them is not finite, naming its
    images. Called on every process before the step is saved, with its own loss `[]` and images. In float16 a gradient
    may be infinite: the step is then left out and the next one scaled less.
    """
    grad_norm = 0.0 if accelerator.scaler is not None else grad_norm
    if accelerator.reduce(loss.detach().float() + float(grad_norm), "mean").isfinite():
        return
    names = ", ".join(map(str, images))
    fine = loss.isfinite() and math.isfinite(grad_norm)
    problems = gather_object([None if fine else f"{loss.item()} (gradient {float(grad_norm)}) on the images {names}"])
    raise FloatingPointError(
        f"The loss of step {step} is {'; '.join(filter(None, problems))}. It is not saved; look at these "
        "images or lower the learning rate, and start again from the last checkpoint."
    )
