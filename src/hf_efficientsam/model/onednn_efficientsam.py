"""Linear layers and attention by oneDNN, where torch's own would be MKL's.

torch hands float32 products on an x86 CPU to MKL, which on AMD's CPUs reaches half of what oneDNN does. torch's own
operator for them is `mkldnn::_linear_pointwise`, to which inductor compiles linear layers. It is private and has no
gradients, so it takes torch's place only where `can_multiply` says so; in a torch without it all works as before.

`torch.backends.mkldnn.flags(enabled=False)` turns it off.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

MULTIPLICATIONS = 2**20  # of a linear layer, from which on oneDNN is the faster one; measured
QUERIES_AT_ONCE = 256  # of a thread: their attention weights stay in its cache; measured
FEWEST_KEYS = 512  # with fewer the calls for each head cost what they save; measured

LINEAR = None
if torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available():
    LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def can_multiply(multiplications: int, *tensors: torch.Tensor) -> bool:
    """
    Whether oneDNN may multiply these, and is the faster one: many numbers in plain float32 tensors on a CPU, without
    gradients and autocast, and not in code that is compiled or traced.
    """
    return (
        LINEAR is not None
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and multiplications >= MULTIPLICATIONS
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and all(
            type(one) in (torch.Tensor, nn.Parameter) and one.dtype == torch.float32 and one.device.type == "cpu"
            for one in tensors
        )
    )


def multiply(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` by oneDNN, for contiguous arguments: others can take a thousand times as long."""
    return LINEAR(states, weight, bias, "none", [], "")


def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`, by oneDNN where that is allowed and faster."""
    tensors = (states, weight) if bias is None else (states, weight, bias)
    if can_multiply(states.numel() * weight.shape[0], *tensors):
        return multiply(states.contiguous(), weight.contiguous(), bias)
    return F.linear(states, weight, bias)


def products(states: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Products of `[P, M, C]` with `[P, N, C]`: `[P, M, N]`, by oneDNN where that is allowed and faster."""
    # Not `shape.numel()`: it makes a fixed number of a size that an ONNX export leaves open.
    if can_multiply(math.prod(states.shape[1:]) * others.shape[1], states, others):
        # Matrix by matrix: torch copies a transposed matrix four times as fast as a batch of one.
        pairs = zip(states, others, strict=True)
        return stack([multiply(one.contiguous(), other.contiguous()) for one, other in pairs])
    return torch.bmm(states, others.mT)


def stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """`torch.stack` that does not copy a single tensor."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)


class EfficientSamLinear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return linear(states, self.weight, self.bias)


def can_attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `attention_forward` may take the place of torch's fused attention, and is the faster one."""
    return can_multiply(math.prod(query.shape[2:]) * key.shape[2], query, key, value) and key.shape[2] >= FEWEST_KEYS


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    softmax(q k^T * scaling) v on `[batch, heads, length, dim]`, some queries of a head at a time; returns
    `[batch, length, heads, dim]`. Arguments are those of transformers' attention functions, without mask and dropout.
    """
    output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    images = (query.contiguous(), (scaling * key).contiguous(), value.mT.contiguous(), output.transpose(1, 2))
    step = QUERIES_AT_ONCE * torch.get_num_threads()
    for heads in zip(*images, strict=True):
        for one_query, one_key, one_value, place in zip(*heads, strict=True):
            for queries, part in zip(one_query.split(step), place.split(step), strict=True):
                part.copy_(multiply(multiply(queries, one_key).softmax(dim=-1), one_value))
    return output, None


__all__ = ["EfficientSamLinear", "attention_forward", "can_attend", "can_multiply", "linear", "products", "stack"]
