import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_codec

from hf_efficientsam.training.data.augment import random_crop_flip

HEIGHT, WIDTH = 60, 100


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def rle(box):
    """The mask of a box (left, top, right, bottom)."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return rle_codec.encode(np.asfortranarray(mask))


def image_of(box, color=(255, 255, 255)):
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = color
    return Image.fromarray(pixels)


OBJECT = (20, 10, 60, 40)


def augment(rles, seed=0, size=64, image=None, **options):
    return random_crop_flip(image or image_of(OBJECT), rles, size, seeded(seed), **options)


def test_image_and_masks_stay_together():
    for seed in range(20):
        image, masks = augment([rle(OBJECT)], seed)
        assert image.shape == (3, 64, 64) and image.dtype == torch.float32
        assert masks.shape == (1, 64, 64) and masks.dtype == torch.uint8
        # The object is white and the rest black; only pixels along the edge may differ.
        assert ((image[0] >= 0.5) != masks[0].bool()).float().mean() < 0.03


def test_a_crop_that_keeps_its_aspect_ratio_has_a_longer_side_of_the_size():
    for seed in range(20):
        image, masks = augment([rle(OBJECT)], seed, keeps_aspect_ratio=True, antialias=True)
        assert max(image.shape[1:]) == 64 > min(image.shape[1:]) and masks.shape == (1, *image.shape[1:])
        assert ((image[0] >= 0.5) != masks[0].bool()).float().mean() < 0.03
    whole, _ = augment([rle(OBJECT)], scale=(1, 1), keeps_aspect_ratio=True)
    assert whole.shape == (3, 38, 64)


def test_flipped_half_of_the_time():
    lefts = [augment([rle(OBJECT)], seed, scale=(1, 1))[1][..., :32].sum().item() for seed in range(100)]
    assert len(set(lefts)) == 2 and 30 < lefts.count(max(lefts)) < 70


def test_same_seed_same_result_other_seed_another():
    one, again, other = (augment([rle(OBJECT)], seed, color_jitter=0.3) for seed in (1, 1, 2))
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])
    assert not torch.equal(one[0], other[0])


def test_scale_of_one_is_the_whole_image_as_at_inference():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
    pixels, masks = augment([rle(OBJECT)], image=image, scale=(1, 1))
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    expected = torch.nn.functional.interpolate(expected, (64, 64), mode="bilinear", antialias=False)[0]
    assert torch.equal(pixels, expected) or torch.equal(pixels, expected.flip(-1))
    share = (OBJECT[2] - OBJECT[0]) * (OBJECT[3] - OBJECT[1]) / (HEIGHT * WIDTH)
    assert masks.float().mean() == pytest.approx(share, abs=0.02)


def test_crops_show_the_share_asked_for():
    # Stripes of known width tell how much of the image's width the crop shows.
    ramp = np.repeat(np.linspace(0, 1, WIDTH)[None], HEIGHT, 0)
    image = Image.fromarray(np.stack([(255 * ramp).astype(np.uint8)] * 3, -1))
    everything = [rle((x, y, x + 5, y + 5)) for x in range(0, WIDTH, 5) for y in range(0, HEIGHT, 5)]
    widths = []
    for seed in range(100):
        pixels, _ = augment(everything, seed, image=image, scale=(0.25, 0.25))
        widths.append((pixels.max() - pixels.min()).item())
    # Half of the width, times the square root of 3/4 to 4/3.
    assert min(widths) > 0.41 and max(widths) < 0.6 and max(widths) - min(widths) > 0.1


def test_masks_that_the_crop_hardly_shows_are_left_out():
    masks = [rle((x, 0, x + 10, HEIGHT)) for x in range(0, WIDTH, 10)]
    for seed in range(20):
        _, shown = augment(masks, seed, scale=(0.3, 0.3))
        assert 1 <= len(shown) < len(masks)
        areas = shown.sum((1, 2)).float()
        assert (areas > 0.15 * areas.max()).all()  # a fifth, give or take the rounding to pixels


def test_at_most_max_masks_chosen_at_random():
    masks = [rle((x, 20, x + 10, 40)) for x in range(0, WIDTH, 10)]
    positions = set()
    for seed in range(10):
        _, chosen = augment(masks, seed, max_masks=3, scale=(1, 1))
        assert len(chosen) == 3
        positions.update(chosen.float().mean(1).argmax(1).tolist())
    assert len(positions) > 5


@pytest.mark.parametrize("box", [(99, 59, 100, 60), (0, 0, WIDTH, HEIGHT)], ids=["one pixel", "everything"])
def test_never_without_masks(box):
    for seed in range(10):
        pixels, masks = augment([rle(box)], seed, size=16)
        assert len(masks) == 1 and masks.any()
        # The whole image is shown, so the share of the object in it is that of the image.
        assert (pixels[0] > 0.5).float().mean() == pytest.approx(0.2, abs=0.05)


def test_colour_is_changed_within_limits():
    image = Image.new("RGB", (WIDTH, HEIGHT), (100, 150, 200))
    means = torch.stack([augment([rle(OBJECT)], s, image=image, color_jitter=0.2)[0].mean((1, 2)) for s in range(20)])
    assert means.std(0).min() > 0.01
    assert means.min() >= 0 and means.max() <= 1
    plain = augment([rle(OBJECT)], image=image)[0].mean((1, 2))
    assert torch.allclose(plain, torch.tensor([100, 150, 200]) / 255)


def test_bad_input():
    with pytest.raises(ValueError, match="without masks"):
        augment([])
    with pytest.raises(ValueError, match="scale"):
        augment([rle(OBJECT)], scale=(0, 1))
    with pytest.raises(ValueError, match="max_masks"):
        augment([rle(OBJECT)], max_masks=0)
