"""Images and masks in memory: the batches are crops of the shards' images with their masks."""

import pytest
import torch
import torch.nn.functional as F

from hf_efficientsam.training.data.augment import crop_image
from hf_efficientsam.training.data.coco import CocoMasks, decode_rles
from hf_efficientsam.training.data.images import normalize
from hf_efficientsam.training.masks.memory import MasksInMemory, random_crops, sampling_grid

SIZE = 64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def memory(shards):
    return MasksInMemory([str(path) for path in shards], SIZE, "cpu")


def test_images_and_masks_are_those_of_the_shards(memory, coco):
    dataset = CocoMasks(coco / "masks.json")
    order = [0, 2, 4, 1, 3]  # as they lie in the two shards
    assert memory.counts.tolist() == [len(dataset.rles[i]) for i in order]
    for number, index in enumerate(order):
        image = dataset[index].image
        expected = crop_image(image, (0, 0, *image.size), SIZE)
        assert (memory.images[number] / 255 - expected).abs().max() < 1 / 255
        masks = torch.from_numpy(decode_rles(dataset.rles[index])).float()
        expected = F.interpolate(masks[:, None], (SIZE, SIZE), mode="bilinear", antialias=True)[:, 0]
        mine = memory.masks(memory.starts[number] + torch.arange(len(masks)))
        assert (mine - expected).abs().max() < 0.51 and mine.max() == 1


def test_a_batch_of_whole_images_is_what_was_stored_or_mirrored(memory):
    batch = memory.batch(12, 3, 7, seeded(), crop_scale=1, color_jitter=0)
    assert batch.pixel_values.shape == (12, 3, SIZE, SIZE) and batch.noise.shape == (12, 3, 7)
    assert batch.valid.all()
    stored = [normalize(image.float() / 255) for image in memory.images]
    mirrored = 0
    for pixels, masks in zip(batch.pixel_values, batch.masks, strict=True):
        distances = {
            (n, flip): (pixels - (one.flip(-1) if flip else one)).abs().max()
            for n, one in enumerate(stored)
            for flip in (0, 1)
        }
        number, flip = min(distances, key=distances.get)
        assert distances[number, flip] < 1e-4
        mirrored += flip
        own = memory.masks(memory.starts[number] + torch.arange(memory.counts[number]))
        own = own.flip(-1) if flip else own
        assert all((mask == own).all((1, 2)).any() for mask in masks)
    assert 0 < mirrored < 12


def test_masks_stay_on_their_objects_through_crops(memory):
    """The objects are bright on a dark ground."""
    batch = memory.batch(16, 2, 1, seeded(1), crop_scale=0.3, color_jitter=0)
    brightness = batch.pixel_values.mean(1)
    seen = 0
    for light, masks, valid in zip(brightness, batch.masks.bool(), batch.valid, strict=True):
        for mask in masks[valid]:
            seen += 1
            assert light[mask].mean() > light.amin() + 1
    assert seen > 8


def test_what_a_crop_hardly_shows_is_not_asked_for(memory):
    batch = memory.batch(64, 4, 1, seeded(2), crop_scale=0.05)
    pixels = batch.masks.sum((-2, -1))
    assert not batch.valid.all() and pixels[batch.valid].min() >= 8 and pixels[batch.valid].max() <= 0.9 * SIZE**2


def test_an_image_has_no_mask_twice_while_it_has_others(memory):
    images, crops = torch.arange(5), torch.tensor([[0.0, 0, 1, 1]]).repeat(5, 1)
    order = torch.rand(5, memory.most, generator=seeded())
    chosen = memory.choose_masks(images, crops, order, 3)
    for number, masks in enumerate(chosen.tolist()):
        start, count = int(memory.starts[number]), int(memory.counts[number])
        assert len(set(masks)) == min(3, count) and set(masks) <= set(range(start, start + count))


def test_a_shard_that_is_named_twice_weighs_double(shards):
    first, second = map(str, shards)
    memory = MasksInMemory([first, second, second], SIZE, "cpu")
    assert memory.weights.tolist() == [1, 1, 1, 2, 2] and len(memory) == 5


def test_crops_have_the_area_and_aspect_ratio_that_was_asked_for():
    crops = random_crops(torch.rand(1000, 4, generator=seeded()), 0.2)
    sides = crops[:, 2:] - crops[:, :2]
    area, ratio = sides.prod(-1), sides[:, 0] / sides[:, 1]
    assert 0.2 - 1e-6 <= area.min() < 0.22 and area.max() <= 1 + 1e-6
    assert 0.75 - 1e-4 <= ratio.min() < 0.78 and 1.3 < ratio.max() <= 4 / 3 + 1e-4
    assert crops.min() >= -1e-6 and crops.max() <= 1 + 1e-6


def test_a_grid_leads_to_its_crop():
    image = torch.arange(64.0).reshape(1, 1, 8, 8).expand(2, -1, -1, -1)
    crops = torch.tensor([[0.25, 0.5, 0.75, 1.0]] * 2)
    shown = F.grid_sample(image, sampling_grid(crops, torch.tensor([False, True]), 4), align_corners=False)
    assert torch.allclose(shown[0, 0], image[0, 0, 4:8, 2:6]) and torch.allclose(shown[1], shown[0].flip(-1))


def test_shards_without_masks_are_refused(tmp_path):
    (tmp_path / "empty.tar").write_bytes(b"\0" * 10240)
    with pytest.raises(ValueError, match="no image with masks"):
        MasksInMemory([str(tmp_path / "empty.tar")], SIZE, "cpu")
