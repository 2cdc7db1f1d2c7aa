import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_efficientsam.training.data.coco import CocoMasks, decode_rles, encode_mask
from hf_efficientsam.training.data.mask_bits import pack_masks, unpack_masks
from hf_efficientsam.training.data.rle_resizing import resize_rles


def random_mask(height, width, seed):
    """Smooth regions of all sizes, which touch the edges; some are noise."""
    noise = torch.rand(1, 1, 9, 9, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(noise, (height, width), mode="bicubic")[0, 0]
    if seed % 4 == 0:
        smooth = torch.rand(height, width, generator=torch.Generator().manual_seed(seed))
    return (smooth > 0.3 + 0.1 * (seed % 6)).byte().numpy()


def plainly(masks, box, size):
    """float64 [N,h,w]: the planes decoded and resized whole."""
    left, top, right, bottom = box
    part = torch.from_numpy(masks)[:, None, top:bottom, left:right].double()
    return F.interpolate(part, size, mode="bilinear", antialias=True)[:, 0]


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 150, 90), 64),
        ((0, 0, 150, 90), 40),
        ((13, 5, 121, 78), 48),
        ((40, 20, 60, 50), 64),  # enlarged
        ((0, 0, 150, 90), 90),  # one axis stays
        ((140, 80, 150, 90), 8),
        ((70, 0, 71, 90), 16),  # a single column
        ((13, 5, 121, 78), (48, 30)),  # no square
    ],
)
def test_equals_resized_planes(box, size):
    masks = np.stack([random_mask(90, 150, seed) for seed in range(12)])
    resized = resize_rles([encode_mask(mask) for mask in masks], box, size)
    expected = plainly(masks, box, size)
    undecided = (expected - 0.5).abs() < 5e-6  # what is half covered belongs to the mask
    assert resized.dtype == torch.uint8 and resized.shape == (12, *expected.shape[1:])
    assert torch.equal(resized[~undecided], (expected > 0.5).byte()[~undecided])
    assert resized[undecided].all()


def test_a_part_of_the_same_size_is_the_part_itself():
    masks = np.stack([random_mask(90, 150, seed) for seed in range(8)])
    resized = resize_rles([encode_mask(mask) for mask in masks], (30, 10, 94, 74), 64)
    assert np.array_equal(resized, masks[:, 10:74, 30:94])


@pytest.mark.parametrize("rows", [slice(0, 0), slice(0, 90), slice(89, 90), slice(0, 1)])
@pytest.mark.parametrize("columns", [slice(0, 150), slice(149, 150), slice(70, 80)])
def test_masks_of_nothing_everything_and_lines(rows, columns):
    mask = np.zeros((90, 150), np.uint8)
    mask[rows, columns] = 1
    for box, size in (((0, 0, 150, 90), 24), ((72, 0, 150, 88), 24)):
        expected = plainly(mask[None], box, size)
        assert torch.equal(resize_rles([encode_mask(mask)], box, size), (expected > 0.5 - 5e-6).byte())


def test_areas_of_real_masks_stay(shared):
    """Within 0.03 % of those of the planes resized in bytes, as before."""
    rles = [rle for rles in CocoMasks(shared / "data/coco-val-dev/instances_val.json").rles[:12] for rle in rles]
    before = after = 0
    for rle in rles:
        height, width = rle["size"]
        plane = torch.from_numpy(decode_rles([rle])) * 255
        before += (F.interpolate(plane[:, None], (512, 512), mode="bilinear", antialias=True) >= 128).sum()
        after += resize_rles([rle], (0, 0, width, height), 512).sum()
    assert after.item() == pytest.approx(before.item(), rel=3e-4)


def test_packed_masks_come_back():
    masks = torch.from_numpy(np.stack([random_mask(32, 48, seed) for seed in range(6)])).view(2, 3, 32, 48)
    bits = pack_masks(masks)
    assert bits.shape == (2, 3, 32, 6) and np.array_equal(bits, np.packbits(masks.numpy(), axis=-1))
    assert torch.equal(unpack_masks(bits), masks)
