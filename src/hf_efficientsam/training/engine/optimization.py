"""Parameter groups, learning rates of layers, the average of the weights, and what is done about infinite losses."""

import math
import re
from collections.abc import Callable, Iterable
from functools import partial

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from .config import LearningRateConfig


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


def adamw(groups: list[dict], betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.AdamW:
    """AdamW; on CUDA all parameters in one kernel, which on a CPU would give other last digits."""
    return torch.optim.AdamW(groups, betas=betas, fused=PartialState().device.type == "cuda" or None)


# Layers of our encoder and SAM's, and layers or stages of a backbone, of which the outermost count.
IN_ENCODER = r"\bvision_encoder\.(?!neck\.)(?:\w+\.)*?"
LAYER = IN_ENCODER + r"(?:layers?|blocks|encoder\.stages|_backbone\.stages)[._]?(\d+)\."
BEFORE_LAYERS = IN_ENCODER + r"(?:embeddings\.|embedder\.|patch_embed|pos_embed|cls_token|stem|conv1\.|bn1\.)"


def count_layers(model: nn.Module) -> int:
    """Layers of an encoder as `layer_depth` counts them; 0 for one without."""
    found = (re.search(LAYER, name) for name, _ in model.named_parameters())
    return 1 + max((int(one[1]) for one in found if one), default=-1)


def layer_depth(name: str, num_layers: int) -> int:
    """
    How many layers from the end of the encoder a parameter is: 1 for the last of its `num_layers` layers (stages, of
    a pyramid), `num_layers + 1` for patch and position embeddings and class token, 0 for everything else.
    """
    if found := re.search(LAYER, name):
        return num_layers - int(found[1])
    return num_layers + 1 if re.search(BEFORE_LAYERS, name) else 0


def encoder_lr_scale(name: str, num_layers: int, layer_decay: float, encoder_scale: float = 1.0) -> float:
    """
    What the learning rate is multiplied by for a parameter of a model with an encoder, which may lie anywhere in it.

    Layer-wise decay is BEiT's (arXiv 2106.08254): `layer_decay` to the power of `layer_depth`. All of the encoder is
    also multiplied by `encoder_scale`. The neck and what comes after the encoder are new, or learn as if they were: 1.
    """
    if not re.search(r"\bvision_encoder\.", name) or ".neck." in name:
        return 1.0
    return layer_decay ** layer_depth(name, num_layers) * encoder_scale


def layer_wise_groups(
    model: nn.Module, config: LearningRateConfig, num_layers: int, weight_decay: float
) -> list[dict]:
    """`parameter_groups` of a model whose encoder has `num_layers` layers, with the rates of `encoder_lr_scale`."""
    scale = partial(
        encoder_lr_scale,
        num_layers=num_layers,
        layer_decay=config.layer_decay,
        encoder_scale=config.encoder_lr_scale,
    )
    return parameter_groups(model, config.learning_rate, weight_decay, scale)


def warmed_up(schedule: LambdaLR, warmup_steps: int) -> LambdaLR:
    """One of transformers' schedules whose first step learns, too: step n of a warm-up of W steps takes n / (W + 1) of
    the learning rate, where theirs takes (n - 1) / W. After the warm-up they are the same."""
    (after, *_) = schedule.lr_lambdas

    def scale(done: int) -> float:
        return (done + 1) / (warmup_steps + 1) if done < warmup_steps else after(done)

    return LambdaLR(schedule.optimizer, scale)


def weight_average(model: nn.Module, decay: float) -> AveragedModel | None:
    """
    An exponential moving average of the weights, as timm and others have it: of a young run, only of its last tenth,
    so that the start is not remembered longer than it deserves. Weights that are not trained stay as they are, to the
    last bit. None for a decay of 0.
    """
    if decay == 0:
        return None

    def update(averages: list[torch.Tensor], weights: list[torch.Tensor], updates: torch.Tensor) -> None:
        weight = 1 - min(decay, (1 + int(updates)) / (10 + int(updates)))
        # Not `lerp`: it makes 0.0 of -0.0, and hashes of frozen weights would differ.
        torch._foreach_sub_(averages, torch._foreach_sub(averages, weights), alpha=weight)

    return AveragedModel(model, multi_avg_fn=update)


def clip_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """
    Clips the gradients to a norm and returns the one that they had. If it is not finite they are removed, so that the
    optimizer's step changes nothing; in float16 the scaler sees to that.
    """
    parameters = list(parameters)
    norm = accelerator.clip_grad_norm_(parameters, max_norm)
    if accelerator.scaler is None and not math.isfinite(norm):
        for parameter in parameters:
            parameter.grad = None
    return norm


def describe_unless_finite(
    accelerator: Accelerator, loss: torch.Tensor, grad_norm: torch.Tensor | float, images: list
) -> str | None:
    """
    What is not finite, loss or gradient, on any process, with the images of that process; None if all is. Called on
    every process with its own loss `[]` and images. In float16 a gradient may be infinite: the next step is then
    scaled less.
    """
    grad_norm = 0.0 if accelerator.scaler is not None else grad_norm
    if accelerator.reduce(loss.detach().float() + float(grad_norm), "mean").isfinite():
        return None
    names = ", ".join(map(str, images))
    fine = loss.isfinite() and math.isfinite(grad_norm)
    problems = gather_object([None if fine else f"{loss.item()} (gradient {float(grad_norm)}) on the images {names}"])
    return "; ".join(filter(None, problems))
