import io
import os
from itertools import islice, pairwise

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import skip_first_batches
from PIL import Image
from tars import write_shard
from torch.utils.data import DataLoader

from hf_efficientsam.training.data.augment import random_resized_crop
from hf_efficientsam.training.data.images import (
    DatasetImages,
    FolderImages,
    ImageViews,
    ShardImages,
    StreamedViews,
    open_images,
)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encoded(seed, size=(50, 40), file_format="PNG", mode="RGB"):
    """The file of a smooth image, another for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, file_format)
    return buffer.getvalue()


def write_folder(folder, names):
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        file_format = {"jpg": "JPEG", "jpeg": "JPEG"}.get(name.lower().split(".")[-1], name.split(".")[-1])
        (folder / name).write_bytes(encoded(seed, file_format=file_format))
    return folder


def write_shards(folder, shards, records):
    """`records` in all, named by their number, dealt to shards one after the other."""
    for shard in range(shards):
        members = {f"{k}.png": encoded(k, (12, 10)) for k in range(shard, records, shards)}
        write_shard(folder / f"{shard:02}.tar", members)
    return ShardImages([f"{folder}/{{00..{shards - 1:02}}}.tar"])


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "folder", [f"{i}.png" for i in range(6)])


def same(one, other):
    assert one.keys() == other.keys()
    tensors = one.keys() - {"key", "view"}
    return all(
        one[name] == other[name] if name not in tensors else torch.equal(one[name], other[name]) for name in one
    )


def split_batches(loader):
    return [{name: batch[name][i] for name in batch} for batch in loader for i in range(len(batch["key"]))]


# Folders


def test_folder_is_read_recursively_and_sorted(tmp_path):
    write_folder(tmp_path, ["b.png", "a/z.JPG", "a/c.webp", "a/b/d.jpeg"])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    source = open_images(images=[str(tmp_path)])
    assert [key for key, _ in source] == ["a/b/d.jpeg", "a/c.webp", "a/z.JPG", "b.png"]
    assert all(image.mode == "RGB" and image.size == (50, 40) for _, image in source)


def test_keys_of_several_folders_are_unique_and_move_along(tmp_path):
    roots = [write_folder(tmp_path / "old" / name / "images", ["1.png", "2.png"]) for name in "ab"]
    keys = ["a/images/1.png", "a/images/2.png", "b/images/1.png", "b/images/2.png"]
    source = FolderImages([*reversed(roots), tmp_path / "old" / "a"])  # the last is there already
    assert source.files == keys
    (tmp_path / "old").rename(tmp_path / "new")
    moved = FolderImages([tmp_path / "new" / name / "images" for name in "ab"])
    assert moved.files == keys and moved.fingerprint() != FolderImages([tmp_path / "new" / "a"]).fingerprint()
    before = moved.fingerprint()
    (tmp_path / "new" / "a" / "images" / "1.png").write_bytes(encoded(0, (51, 40)))
    assert moved.fingerprint() != before


def test_image_is_upright_and_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.linear_gradient("L").resize((50, 40)).save(tmp_path / "turned.jpg", exif=exif)
    for mode in ("1", "L", "LA", "P", "RGBA"):
        Image.linear_gradient("L").convert(mode).save(tmp_path / f"{mode}.png")
    Image.fromarray(np.array(Image.linear_gradient("L")).astype(np.uint16) * 257).save(tmp_path / "16 bit.png")
    Image.linear_gradient("L").convert("CMYK").save(tmp_path / "CMYK.jpg")
    read = dict(list(FolderImages([tmp_path])))
    assert len(read) == 8 and all(image.mode == "RGB" for image in read.values())
    assert read["16 bit.png"].tobytes() == read["L.png"].tobytes()
    turned = np.array(read["turned.jpg"])[..., 0].astype(int)
    assert turned.shape == (50, 40) and turned[:, 0].mean() > 200 and turned[:, -1].mean() < 50


def test_broken_file_is_named(folder):
    whole = (folder / "3.png").read_bytes()
    for content in (b"", b"no image", whole[: len(whole) // 2]):
        (folder / "3.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"3\.png(: the file is empty| cannot be read as an image)"):
            ImageViews(FolderImages([folder]), 32)[3]


def test_files_that_cannot_be_opened_are_all_named_at_the_start(folder):
    for name in ("1.png", "3.png"):
        (folder / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"(?s)broken; .* \(2\):.*1\.png cannot be read .*3\.png cannot be read"):
        open_images(images=[str(folder)])


def test_what_is_no_image_is_counted(folder, caplog):
    for name in ("a.txt", "b.txt", "c.mp4", ".DS_Store"):
        (folder / name).write_bytes(b"")
    number = len(FolderImages([folder]))
    assert f"{number} images; left out: 1 files ending in .mp4, 2 files ending in .txt." in caplog.text


def test_folder_without_images(tmp_path):
    for name in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=f"no image .* under {name}"):
            FolderImages([name])


# Datasets


def small_dataset(files):
    features = datasets.Features({"photo": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"photo": [{"bytes": file, "path": None} for file in files], "label": list(range(len(files)))}
    return datasets.Dataset.from_dict(rows, features)


def test_saved_dataset_parquet_and_imagefolder_give_the_folders_images(tmp_path):
    write_folder(tmp_path / "photos", [f"train/{i}.png" for i in range(4)])
    expected = [image.tobytes() for _, image in FolderImages([tmp_path / "photos"])]
    dataset = small_dataset([encoded(i) for i in range(4)])
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=dataset, test=dataset.select([2])).save_to_disk(tmp_path / "several")
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(tmp_path / "parquet" / "train-00000.parquet")
    fingerprints = []
    for name, column in [("one", "photo"), ("several", "photo"), ("parquet", "photo"), ("photos", "image")]:
        source = open_images(dataset=str(tmp_path / name), image_column=column)
        assert [key for key, _ in source] == ["0", "1", "2", "3"], name
        assert [image.tobytes() for _, image in source] == expected, name
        fingerprints.append(source.fingerprint())
    assert len(set(fingerprints[:3])) == 1, "the same rows"
    test = DatasetImages(str(tmp_path / "several"), "test", "photo")
    assert len(test) == 1 and test[0][1].tobytes() == expected[2] and test.fingerprint() not in fingerprints
    assert len(DatasetImages(str(tmp_path / "parquet"), "train[:2]", "photo")) == 2


def test_what_a_dataset_lacks_is_said(tmp_path):
    broken = small_dataset([encoded(0), encoded(1)[:200]])
    datasets.DatasetDict(train=broken).save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    broken.to_parquet(tmp_path / "parquet" / "train.parquet")
    for name in ("saved", "parquet"):
        name = str(tmp_path / name)
        with pytest.raises(ValueError, match="no column image; set the image column to one of photo, label"):
            DatasetImages(name)
        with pytest.raises(ValueError, match=r"column label of .* holds .*int64.*, not images"):
            DatasetImages(name, image_column="label")
        with pytest.raises(ValueError, match="split val"):
            DatasetImages(name, "val", "photo")
        with pytest.raises(ValueError, match=r"Row 1 of .*, split train, cannot be read as an image"):
            DatasetImages(name, image_column="photo")[1]
    with pytest.raises(ValueError, match="nobody/nothing cannot be loaded"):
        DatasetImages("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty cannot be loaded"):
        DatasetImages(str(tmp_path / "empty"))


def test_exactly_one_source(folder):
    for sources in ({}, {"images": [str(folder)], "shards": ["a.tar"]}):
        with pytest.raises(ValueError, match="exactly one"):
            open_images(**sources)


# Views


def test_an_item_depends_on_seed_epoch_and_key_only(folder):
    source = FolderImages([folder])
    views = ImageViews(source, 32, teacher_size=48, seed=3)
    items = [views[i] for i in range(6)]
    backwards = ImageViews(list(reversed(list(source))), 32, teacher_size=48, seed=3)
    assert all(same(backwards[5 - i], items[i]) for i in range(6)), "its place in the data does not matter"
    for batch_size, workers in [(1, 0), (4, 1), (2, 2)]:
        assert all(map(same, split_batches(DataLoader(views, batch_size, num_workers=workers)), items))
    other_seed, other_epoch = ImageViews(source, 32, seed=4), ImageViews(source, 32, seed=3)
    other_epoch.set_epoch(1)
    for other in (other_seed, other_epoch):
        assert not torch.equal(other[0]["pixel_values"], items[0]["pixel_values"])
        assert not torch.equal(other[0]["noise"], items[0]["noise"])
    image = source[0][1]
    one, other = ImageViews([("one", image), ("other", image)], 32)
    assert not torch.equal(one["pixel_values"], other["pixel_values"])
    assert not torch.equal(one["noise"], other["noise"])
    with pytest.raises(IndexError):
        views[6]


def test_a_batch_has_the_promised_shapes(folder):
    batch = next(iter(DataLoader(ImageViews(FolderImages([folder]), 32, patch_size=8, teacher_size=28), 5)))
    assert batch.keys() == {"key", "view", "pixel_values", "noise", "teacher_pixels"}
    assert batch["key"] == ["0.png", "1.png", "2.png", "3.png", "4.png"] and batch["view"].tolist() == [0] * 5
    assert batch["view"].dtype == torch.int64
    assert batch["pixel_values"].shape == (5, 3, 32, 32) and batch["pixel_values"].dtype == torch.uint8
    assert batch["teacher_pixels"].shape == (5, 3, 28, 28) and batch["teacher_pixels"].dtype == torch.uint8
    assert batch["noise"].shape == (5, 16) and batch["noise"].dtype == torch.float32
    assert batch["noise"].min() >= 0 and batch["noise"].max() < 1 and len(batch["noise"].unique()) == 80


def test_views_repeat_and_noise_does_not(folder):
    views = ImageViews(FolderImages([folder]), 32, views=2)
    items = []
    for epoch in range(4):
        views.set_epoch(epoch)
        items.append(views[0])
    assert [item["view"] for item in items] == [0, 1, 0, 1]
    pixels = [item["pixel_values"] for item in items]
    assert torch.equal(pixels[0], pixels[2]) and torch.equal(pixels[1], pixels[3])
    assert not torch.equal(pixels[0], pixels[1])
    assert len(torch.stack([item["noise"] for item in items]).unique(dim=0)) == 4


def test_noise_has_a_seed_of_its_own(folder):
    source = FolderImages([folder])
    one, other = ImageViews(source, 32, seed=1)[0], ImageViews(source, 32, seed=1, noise_seed=2)[0]
    assert torch.equal(one["pixel_values"], other["pixel_values"]) and not torch.equal(one["noise"], other["noise"])
    assert same(one, ImageViews(source, 32, seed=1, noise_seed=1)[0])


def test_epoch_reaches_persistent_workers(folder):
    views = ImageViews(FolderImages([folder]), 32)
    loader = DataLoader(views, 2, num_workers=2, persistent_workers=True)
    first = split_batches(loader)
    views.set_epoch(5)
    assert all(map(same, split_batches(loader), [views[i] for i in range(6)]))
    assert not same(first[0], views[0])


def test_teacher_sees_the_students_crop(tmp_path):
    source = FolderImages([write_folder(tmp_path, [f"{i}.png" for i in range(20)])])
    for item, alone in zip(ImageViews(source, 32, teacher_size=96), ImageViews(source, 32), strict=True):
        assert torch.equal(item["pixel_values"], alone["pixel_values"]), "with or without a teacher"
        small = F.interpolate(item["teacher_pixels"][None].float(), (32, 32), mode="area")[0]
        # A one-pixel shift or a flip of these images costs at least 3.
        assert (small - item["pixel_values"]).abs().mean() < 1.5
    same_size = ImageViews(source, 32, teacher_size=32)[0]
    assert torch.equal(same_size["teacher_pixels"], same_size["pixel_values"])


def test_flipped_half_of_the_time(tmp_path):
    Image.linear_gradient("L").rotate(90).save(tmp_path / "gradient.png")  # bright to the right
    views, flipped = ImageViews(FolderImages([tmp_path]), 16), 0
    for epoch in range(200):
        views.set_epoch(epoch)
        pixels = views[0]["pixel_values"].float()
        flipped += bool(pixels[..., :8].mean() > pixels[..., 8:].mean())
    assert 75 < flipped < 125


def test_crops_are_as_in_mae():
    generator = np.random.default_rng(0)
    boxes = np.array([random_resized_crop(640, 480, (0.2, 1.0), generator) for _ in range(3000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (640, 480)).all()
    area, ratio = width * height / (640 * 480), width / height
    assert 0.198 < area.min() < 0.21 and 0.95 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.345
    small = area < 0.5  # all of these fit, so none was drawn again
    assert abs(np.log(ratio[small]).mean()) < 0.02, "log-uniform: portrait as often as landscape"
    assert abs(area[small].mean() - 0.35) < 0.01, "uniform"
    assert (boxes[:, 0] == 0).any() and (boxes[:, 2] == 640).any() and (boxes[:, 3] == 480).any()
    assert abs((boxes[:, 0] / (640 - width).clip(1)).mean() - 0.5) < 0.03


def test_crop_of_an_image_that_none_fits_is_the_largest_in_the_middle():
    generator = np.random.default_rng(0)
    assert random_resized_crop(1000, 30, (0.2, 1.0), generator) == (480, 0, 520, 30)
    assert random_resized_crop(30, 1000, (0.2, 1.0), generator) == (0, 480, 30, 520)
    assert random_resized_crop(1, 1, (1.0, 1.0), generator) == (0, 0, 1, 1)


class Cache:
    views = 2

    def read(self, key, view):
        return torch.full((4, 3), int(key[0]) + 10 * view, dtype=torch.float16)


def test_cached_features_of_the_view(folder):
    views = ImageViews(FolderImages([folder]), 32, views=2, cache=Cache())
    views.set_epoch(3)
    batch = next(iter(DataLoader(views, 2)))
    assert batch["features"].shape == (2, 4, 3) and batch["features"][:, 0, 0].tolist() == [10, 11]
    for number in (None, 3):
        with pytest.raises(ValueError, match="The cache holds 2 views"):
            ImageViews(FolderImages([folder]), 32, views=number, cache=Cache())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"size": 30}, "multiple of the patch's 16 pixels"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale must be 0 < least"),
        ({"views": 0}, "views must be at least 1"),
    ],
)
def test_arguments_that_do_not_fit(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageViews(FolderImages([folder]), **{"size": 32} | arguments)


# Shards


def test_the_same_keys_give_the_same_items_from_every_source(tmp_path, folder):
    files = [(folder / f"{i}.png").read_bytes() for i in range(6)]
    small_dataset(files).save_to_disk(tmp_path / "dataset")
    shard = write_shard(tmp_path / "a.tar", {f"{i}.png": file for i, file in enumerate(files)})
    sources = [
        [(key.removesuffix(".png"), image) for key, image in FolderImages([folder])],
        DatasetImages(str(tmp_path / "dataset"), image_column="photo"),
    ]
    streamed = islice(StreamedViews(ShardImages([shard]), 32, teacher_size=48, seed=1), 6)
    streamed = sorted(streamed, key=lambda item: item["key"])
    for source in sources:
        views = ImageViews(source, 32, teacher_size=48, seed=1)
        assert all(same(one, other) for one, other in zip(views, streamed, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_repeats_itself_exactly_and_never_ends(tmp_path, workers):
    def batches(epoch, number=6):
        views = StreamedViews(write_shards(tmp_path, 2, 8), 16, shuffle_buffer=4, seed=1)
        views.set_epoch(epoch)
        loader = DataLoader(views, 4, num_workers=workers)
        return loader, list(islice(loader, number))

    (loader, first), (_, again), (_, other) = batches(0), batches(0), batches(1)
    assert [batch["key"] for batch in first] == [batch["key"] for batch in again]
    assert [batch["key"] for batch in first] != [batch["key"] for batch in other]
    assert {key for batch in first for key in batch["key"]} == set("01234567")
    assert [batch["key"] for batch in first[:2]] != [batch["key"] for batch in first[2:4]], "another order"
    resumed = list(islice(skip_first_batches(loader, 4), 2))
    assert [batch["key"] for batch in resumed] == [batch["key"] for batch in first[4:]]
    assert all(
        torch.equal(*(batch["pixel_values"] for batch in pair)) for pair in zip(resumed, first[4:], strict=True)
    )


def test_epoch_reaches_persistent_workers_of_a_stream(tmp_path):
    views = StreamedViews(write_shards(tmp_path, 1, 8), 16, shuffle_buffer=4)
    loader = DataLoader(views, 8, num_workers=1, persistent_workers=True, prefetch_factor=1)
    keys = []
    for epoch in range(2):
        views.set_epoch(epoch)
        batch = next(iter(loader))
        assert batch["view"].tolist() == [epoch] * 8
        keys.append(batch["key"])
    assert keys[0] != keys[1] and sorted(keys[0]) == sorted(keys[1])


def test_first_image_of_a_record_is_read_whatever_lies_beside_it(tmp_path):
    members = {
        "a/1.json": b"{broken",
        "a/1.jpg": encoded(1, file_format="JPEG"),
        "a/1.mask.png": encoded(9),
        "a/2.txt": b"\xff",
        "../b.c/2.PNG": encoded(2),
        "3.webp": encoded(3, file_format="WEBP"),
    }
    source = open_images(shards=[write_shard(tmp_path / "a.tar", members)])
    read = dict(source.read(0))
    assert list(read) == ["a/1", "../b.c/2", "3"]
    assert read["../b.c/2"].tobytes() == Image.open(io.BytesIO(encoded(2))).tobytes()
    assert {item["key"] for item in islice(StreamedViews(source, 16), 3)} == set(read)


@pytest.mark.filterwarnings("ignore:.* as 1 so far")
def test_a_broken_image_gives_its_place_in_a_stream_to_another(tmp_path):
    members = {f"{k}.png": encoded(k) for k in range(6)}
    members["2.png"], members["4.png"] = b"no image", members["4.png"][:100]
    source = ShardImages([write_shard(tmp_path / "a.tar", members)])
    with pytest.warns(UserWarning, match=r"4\.png in .*a\.tar cannot be read as an image.* Skipped, as 2 so far"):
        assert [key for key, _ in source.read(0)] == ["0", "1", "3", "5"]
    with pytest.warns(UserWarning, match=r"\.png in .*a\.tar cannot be read as an image.* Replaced .* 2 so far"):
        items = list(islice(StreamedViews(source, 16), 6))
    assert {item["key"] for item in items} == set("0135")
    items.sort(key=lambda item: item["key"])
    twins = [pair for pair in pairwise(items) if pair[0]["key"] == pair[1]["key"]]
    assert len(twins) == 2 and all(same(*pair) for pair in twins)


def test_a_file_name_that_is_no_text_is_taken(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / os.fsdecode(b"\xff.png"))
    source = FolderImages([tmp_path])
    assert source.fingerprint() and ImageViews(source, 16)[0]["pixel_values"].shape == (3, 16, 16)
