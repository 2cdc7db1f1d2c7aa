import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_efficientsam.training.data.coco import CocoMasks
from hf_efficientsam.training.masks.batch import Batch, MaskDataConfig, MaskTrainingSet, MaskViews, collate


def coco_masks(folder, masks_per_image, first_id=0):
    """Images of noise, image i with masks_per_image[i] boxes."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i, count in enumerate(masks_per_image, start=first_id):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 50, "height": 40})
        for k in range(count):
            box = [5 * k, 5, 5 * k + 20, 5, 5 * k + 20, 35, 5 * k, 35]
            annotations.append({"id": len(annotations), "image_id": i, "segmentation": [box]})
    (folder / "masks.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return CocoMasks(folder / "masks.json")


@pytest.fixture
def two_sets(tmp_path):
    return [coco_masks(tmp_path / "a", [1, 3]), coco_masks(tmp_path / "b", [5, 2, 4], first_id=10)]


def training_set(sources, seed=0, **options):
    return MaskTrainingSet(sources, MaskDataConfig(image_size=32, color_jitter=0, **options), noise_size=5, seed=seed)


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in ("pixel_values", "mask_bits", "noise"))


def test_several_sets_are_read_one_after_the_other(two_sets):
    dataset = training_set(two_sets)
    keys = [dataset[i]["key"] for i in range(len(dataset))]
    assert [key.split("/")[1] for key in keys] == ["0", "1", "10", "11", "12"] and len(set(keys)) == 5
    with pytest.raises(IndexError):
        dataset[5]


@pytest.mark.parametrize(("every", "expected"), [(2, ["0", "10", "12"]), (3, ["0", "10"]), (9, ["0", "10"])])
def test_only_every_so_many_th_image_of_each_set(two_sets, every, expected):
    dataset = training_set(two_sets, every=every)
    assert [dataset[i]["key"].split("/")[1] for i in range(len(dataset))] == expected


def test_an_item_depends_on_seed_epoch_and_index_only(two_sets):
    dataset, again = training_set(two_sets), training_set(two_sets)
    first = [dataset[i] for i in range(5)]
    assert all(same(again[i], first[i]) for i in reversed(range(5)))
    again.set_epoch(1)
    assert not same(again[2], first[2])
    again.set_epoch(0)
    assert same(again[2], first[2])
    assert not same(training_set(two_sets, seed=1)[2], first[2])


def test_images_of_two_files_have_names_of_their_own(tmp_path):
    sets = [
        coco_masks(tmp_path / part / "train", [1, 2]) for part in ("cats", "dogs")
    ]  # the same folder, the same ids
    names = [item["key"] for item in map(training_set([*sets, sets[0]]).__getitem__, range(6))]
    assert len(set(names)) == 4 and names[4:] == names[:2]  # a file given twice is one


def test_pixel_values_are_normalised(tmp_path):
    coco = coco_masks(tmp_path, [1])
    Image.new("RGB", (50, 40), (255, 0, 0)).save(tmp_path / "images" / "0.png")
    pixel_values = training_set([coco])[0]["pixel_values"]
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    assert torch.allclose(pixel_values, expected[:, None, None].expand(3, 32, 32), atol=1e-5)


def test_collate_pads_with_masks_that_are_not_valid(two_sets):
    dataset = training_set(two_sets, max_masks=4, crop_scale=1.0)
    items = [dataset[i] for i in range(5)]
    batch = collate(items)
    assert batch.pixel_values.shape == (5, 3, 32, 32) and batch.pixel_values.dtype == torch.float32
    assert batch.masks.shape == (5, 4, 32, 32) and batch.masks.dtype == torch.uint8
    assert batch.valid.sum(1).tolist() == [1, 3, 4, 2, 4]
    assert batch.noise.shape == (5, 4, 5) and torch.equal(batch.noise.flatten(2).any(-1), batch.valid)
    assert [key.split("/")[1] for key in batch.keys] == ["0", "1", "10", "11", "12"]
    assert torch.equal(batch.masks.flatten(2).any(-1), batch.valid), "padding is empty, and nothing else is"
    assert torch.equal(batch.mask_bits[1, :3], items[1]["mask_bits"])


def test_batch_moves_to_a_device(two_sets):
    batch = collate([training_set(two_sets)[0]]).to("meta", non_blocking=True)
    assert isinstance(batch, Batch) and len(batch.keys) == 1
    assert {getattr(batch, name).device.type for name in ("pixel_values", "mask_bits", "valid", "noise")} == {"meta"}


def test_workers_that_live_on_hear_of_the_epoch(two_sets):
    dataset = training_set(two_sets)
    loader = DataLoader(dataset, batch_size=5, collate_fn=collate, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        (batch,) = loader
        assert torch.equal(batch.pixel_values[0], dataset[0]["pixel_values"])


def test_the_whole_image_as_it_is(tmp_path):
    """As the paper fine-tunes: no crop, no mirror image."""
    coco = coco_masks(tmp_path, [3] * 6)
    dataset = training_set([coco], crop_scale=1.0, flip=False, max_masks=3)
    for i in range(6):
        first, second = dataset[i], training_set([coco], crop_scale=1.0, flip=False, max_masks=3, seed=9)[i]
        assert torch.equal(first["pixel_values"], second["pixel_values"])
    flipped = training_set([coco], crop_scale=1.0, max_masks=3)
    assert any(not torch.equal(flipped[i]["pixel_values"], dataset[i]["pixel_values"]) for i in range(6))


def test_nothing_to_train_on(tmp_path):
    for sources in ([], [coco_masks(tmp_path, [0])]):
        with pytest.raises(ValueError, match="no image"):
            training_set(sources)


def test_each_mask_can_be_prompted_several_times_with_other_random_numbers(two_sets):
    once, twice = (training_set(two_sets, max_masks=4, prompts_per_mask=n)[2] for n in (1, 2))
    assert all(torch.equal(twice["mask_bits"][start::2], once["mask_bits"]) for start in (0, 1))
    assert len(twice["noise"]) == 8 and len(twice["noise"].unique(dim=0)) == 8


def views_of(sources, views):
    return MaskViews(sources, MaskDataConfig(image_size=32, color_jitter=0), noise_size=5, views=views)


def test_views_without_pixels_are_the_same_and_open_no_image(two_sets, tmp_path):
    options = {"options": MaskDataConfig(image_size=32), "noise_size": 5, "views": [4]}
    whole, masks_alone = MaskViews(two_sets, **options), MaskViews(two_sets, **options, with_pixels=False)
    expected = [whole[i] for i in range(5)]
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    for item, one in zip(map(masks_alone.__getitem__, range(5)), expected, strict=True):
        assert item.keys() == one.keys() - {"pixel_values"}
        assert all(torch.equal(item[name], one[name]) for name in ("mask_bits", "noise"))
        assert all(item[name] == one[name] for name in ("key", "index", "view"))
    batch = collate([masks_alone[i] for i in (3, 1)])
    assert batch.pixel_values is None and batch.indices == [3, 1] and len(batch.views) == 2


def test_views_are_one_number_or_one_for_each_file_the_same_wherever_it_is_given(two_sets):
    one, other = two_sets
    data = views_of([one, other, one], [1, 4, 1])
    assert data.distinct_sources() == {0: range(2), 1: range(2, 5)}
    seen = {"a": set(), "b": set()}
    for epoch in range(30):
        data.set_epoch(epoch)
        for i in range(len(data)):
            item = data[i]
            seen["a" if item["key"].split("/")[1] in "01" else "b"].add(item["view"])
    assert seen == {"a": {0}, "b": {0, 1, 2, 3}}
    with pytest.raises(ValueError, match="one number, or one for each of the 2 files"):
        views_of(two_sets, [1, 2, 3])
    with pytest.raises(ValueError, match="two numbers to one file"):
        views_of([one, one], [1, 2])
