import pytest
import torch
import torch.nn.functional as F

from hf_efficientsam.training.data.semantic import (
    NO_CLASS,
)
from hf_efficientsam.training.semantic.losses import PixelLoss, QueryLoss


class Output(dict):
    """As transformers' outputs are: fields by name and by attribute."""

    __getattr__ = dict.__getitem__


def test_the_mask_loss_is_transformers_own(mask_former, monkeypatch):
    """Of a batch, where both compare masks at the same points."""

    def points(*shape, device):
        return torch.linspace(0.05, 0.95, shape[1] * 2).view(shape[1:]).repeat(shape[0], 1, 1)

    monkeypatch.setattr(torch, "rand", points)
    torch.manual_seed(1)
    labels = torch.randint(0, 3, (3, 32, 32), dtype=torch.uint8)
    labels[1], labels[2] = 1, NO_CLASS
    with torch.no_grad():
        output = mask_former(torch.randn(3, 3, 32, 32), output_auxiliary_logits=True)
    classes = [torch.tensor(one, dtype=torch.long) for one in ([0, 1, 2], [1], [])]
    masks = [(image == one[:, None, None]).float() for image, one in zip(labels, classes, strict=True)]
    queries = output.masks_queries_logits, output.class_queries_logits
    expected = mask_former.get_loss_dict(*queries, masks, classes, output.auxiliary_logits)
    loss = QueryLoss(mask_former)
    ours = loss(output, labels, [1, 2, 3], loss.amounts(labels))
    assert ours.item() == pytest.approx(mask_former.get_loss(expected).item(), rel=1e-5)


def test_the_mask_loss_of_a_step_does_not_depend_on_its_batches(mask_former):
    torch.manual_seed(2)
    pixel_values, labels = torch.randn(3, 3, 64, 64), torch.randint(0, 3, (3, 64, 64), dtype=torch.uint8)
    labels[0, :32], labels[1] = NO_CLASS, 1  # 3, 1 and 3 masks
    loss = QueryLoss(mask_former)
    amounts = torch.stack([loss.amounts(labels[:1]), loss.amounts(labels[1:])]).sum(0)
    assert amounts.tolist() == pytest.approx([7, 7 + 0.1 * 5])

    def gradient(*parts):
        mask_former.zero_grad()
        for part in parts:
            output = mask_former(pixel_values[part], **loss.options)
            loss(output, labels[part], list(range(3))[part], amounts).backward()
        return torch.cat([parameter.grad.flatten() for parameter in mask_former.parameters()])

    assert torch.allclose(gradient(slice(0, 3)), gradient(slice(0, 1), slice(1, 3)), atol=1e-4, rtol=1e-3)


def test_the_pixel_loss_is_the_mean_over_the_pixels_of_a_step():
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4), dtype=torch.uint8)
    labels[0, 1:] = NO_CLASS
    expected = F.cross_entropy(logits, labels.long(), ignore_index=NO_CLASS)
    loss = PixelLoss()
    amounts = loss.amounts(labels)
    parts = [loss(Output(logits=logits[i : i + 1]), labels[i : i + 1], [0], amounts) for i in range(2)]
    assert amounts.tolist() == [20] and sum(parts).item() == pytest.approx(expected.item())
    nothing = torch.full((1, 4, 4), NO_CLASS, dtype=torch.uint8)
    assert loss(Output(logits=logits[:1]), nothing, [0], loss.amounts(nothing)) == 0
