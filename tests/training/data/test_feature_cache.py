import errno
import io
import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file
from tars import write_shard
from torch.utils.data import DataLoader

from hf_efficientsam.training.data.feature_cache import (
    FeatureCache,
    ViewParts,
    open_manifest,
    part_path,
    write_index,
    write_part,
)
from hf_efficientsam.training.data.images import FolderImages, ImageViews, ShardImages, StreamedViews

TEACHER = {"name": "some/teacher", "weights_hash": "abc", "size": 56, "dtype": "float32"}
MANIFEST = {"teacher": TEACHER, "width": 3, "crop_scale": 0.2, "views": 2, "view_seed": 0, "data": "def"}
KEYS = [["a/0.png", "a/1.png", "b"], ["c", "déjà.jpg"]]  # of two parts


def features(view: int, part: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * view + part)
    return torch.randn(len(KEYS[part]), 4, 3, generator=generator).half()


def write_parts(folder, views=2):
    open_manifest(folder, MANIFEST)
    for view in range(views):
        for part, keys in enumerate(KEYS):
            write_part(folder, view, part, keys, features(view, part))


@pytest.fixture
def folder(tmp_path):
    write_parts(tmp_path / "cache")
    write_index(tmp_path / "cache", 2, 2)
    return tmp_path / "cache"


# --------------------------------------------------------------------------------------------- reading


def test_a_flipped_bit_of_the_features_is_seen(tmp_path):
    write_part(tmp_path, 0, 0, ["a", "b"], torch.arange(24.0).view(2, 4, 3))
    open_manifest(tmp_path, MANIFEST)
    write_index(tmp_path, 1, 1)
    cache, path = FeatureCache(tmp_path, {}), part_path(tmp_path, 0, 0)
    content = bytearray(path.read_bytes())
    place = content.index(torch.tensor([13.0], dtype=torch.float16).numpy().tobytes())  # of the second image
    content[place + 1] ^= 1
    path.write_bytes(content)
    assert torch.equal(cache.read("a", 0), torch.arange(12.0).view(4, 3).half())
    with pytest.raises(ValueError, match="its checksum differs"):
        cache.read("b", 0)


def test_a_part_without_checksums_of_an_earlier_version_is_read(tmp_path):
    write_part(tmp_path, 0, 0, ["a"], torch.zeros(1, 4, 3))
    open_manifest(tmp_path, MANIFEST)
    write_index(tmp_path, 1, 1)
    path = part_path(tmp_path, 0, 0)
    tensors = load_file(path)
    del tensors["checksums"]
    save_file(tensors, path)
    assert torch.equal(FeatureCache(tmp_path, {}).read("a", 0), torch.zeros(4, 3).half())


def test_every_view_of_every_key_is_read(folder):
    cache = FeatureCache(folder, MANIFEST)
    assert (len(cache), cache.views, cache.width) == (5, 2, 3)
    for copy in (cache, pickle.loads(pickle.dumps(cache))):
        for view in range(2):
            for part, keys in enumerate(KEYS):
                for row, key in enumerate(keys):
                    read = copy.read(key, view)
                    assert read.dtype == torch.float16 and torch.equal(read, features(view, part)[row])
    assert read.untyped_storage().nbytes() == 4 * 3 * 2  # and not the whole file


def test_what_is_not_in_the_cache_is_named(folder):
    cache = FeatureCache(folder, {})
    for key, view in [("d", 0), ("", 1), ("b", 2), ("b", -1)]:
        with pytest.raises(ValueError, match=rf"View {view} of {key} is not in .*run training/cache_features\.py"):
            cache.read(key, view)


def test_a_cache_that_is_not_there_or_not_complete_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no feature cache; make one with training/cache_features\.py"):
        FeatureCache(tmp_path, {})
    write_parts(tmp_path)
    with pytest.raises(ValueError, match="is not complete; run the same command"):
        FeatureCache(tmp_path, {})


def test_a_missing_or_damaged_part_is_named(folder):
    cache, path = FeatureCache(folder, {}), part_path(folder, 1, 0)
    whole = path.read_bytes()
    for content in (whole[:-10], b"", bytes(len(whole))):
        path.write_bytes(content)
        for read in (lambda: cache.read("b", 1), lambda: write_index(folder, 2, 2)):
            with pytest.raises(
                ValueError, match=r"view_0001/part_000000\.safetensors is damaged .* delete it and run"
            ):
                read()
    path.unlink()
    for read in (lambda: cache.read("b", 1), lambda: write_index(folder, 2, 2)):
        with pytest.raises(ValueError, match=r"view_0001/part_000000\.safetensors is missing; run"):
            read()
    cache.read("b", 0)
    path.write_bytes(save({"other": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"part_000000\.safetensors is damaged"):
        cache.read("b", 1)
    for content in (b"half", save({"key_hashes": torch.zeros(2, dtype=torch.int64)})):
        (folder / "index.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"index\.safetensors is damaged"):
            FeatureCache(folder, {})


@pytest.mark.parametrize("content", ["{", "[1]", "null", "[" * 100_000, "{}", '{"views": "2", "width": 3}'])
def test_a_damaged_manifest_is_named(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json .*; start a new cache"):
        FeatureCache(folder, {})
    (folder / "manifest.json").write_text('{"teach')
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read"):
        FeatureCache(folder, {})


# -------------------------------------------------------------------------------------------- manifest


@pytest.mark.parametrize(
    "other, sentence",
    [
        ({"view_seed": 1}, "view_seed is 0, not 1"),
        ({"crop_scale": 0.3}, "crop_scale is 0.2, not 0.3"),
        ({"data": "xyz"}, "data is def, not xyz"),
        ({"views": 3}, "views is 2, not 3"),
        ({"teacher": {**TEACHER, "weights_hash": "xyz"}}, r"teacher\.weights_hash is abc, not xyz"),
        ({"teacher": {**TEACHER, "size": 64}}, r"teacher\.size is 56, not 64"),
        ({"new": 1}, "new is None, not 1"),
    ],
)
def test_another_manifest_is_refused_with_what_differs(folder, other, sentence):
    for action in (lambda: FeatureCache(folder, other), lambda: open_manifest(folder, {**MANIFEST, **other})):
        with pytest.raises(ValueError, match=f"made with other options; use those or another folder: {sentence}.$"):
            action()
    assert json.loads((folder / "manifest.json").read_text()) == MANIFEST


def test_a_teacher_that_moved_or_ran_elsewhere_is_the_same(folder):
    moved = {"teacher": {**TEACHER, "name": "/copy", "dtype": "bfloat16"}}
    FeatureCache(folder, moved)
    open_manifest(folder, {**MANIFEST, **moved})


# --------------------------------------------------------------------------------------------- writing


def test_two_images_with_one_key_are_refused(tmp_path):
    for view in range(2):
        write_part(tmp_path, view, 0, ["a", "b"], torch.zeros(2, 4, 3))
        write_part(tmp_path, view, 1, ["c", "d", "b"], torch.zeros(3, 4, 3))
    with pytest.raises(ValueError, match=r"the same key \(row 1 of part 0 and row 2 of part 1\)"):
        write_index(tmp_path, 2, 2)
    assert not (tmp_path / "index.safetensors").exists()


def test_views_of_other_images_are_refused(tmp_path):
    write_part(tmp_path, 0, 0, ["a", "b"], torch.zeros(2, 4, 3))
    write_part(tmp_path, 1, 0, ["a", "c"], torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match="does not hold the same images in all views"):
        write_index(tmp_path, 1, 2)


@pytest.mark.parametrize("value", [1e5, float("nan")])
def test_features_beyond_half_precision_are_refused(tmp_path, value):
    beyond = torch.zeros(3, 4, 3)
    beyond[1, 2, 0] = value
    with pytest.raises(ValueError, match="features of b do not fit into float16"):
        write_part(tmp_path, 0, 0, ["a", "b", "c"], beyond)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_full_disk_is_said_and_leaves_no_half_file(folder, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"part_000002\.safetensors cannot be written \(No space left on device\)"):
        write_part(folder, 0, 2, ["a"], torch.zeros(1, 4, 3))
    assert sorted(folder.rglob("*")) == before


# ------------------------------------------------------------------------------------- what the teacher sees


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def seen(parts: ViewParts, num_workers: int) -> dict:
    """{part: [(key, pixels), ...]}, after checking batch sizes and that each part ends once, and last."""
    items, ended = {}, []
    for part, keys, pixels in DataLoader(parts, batch_size=None, num_workers=num_workers):
        assert part not in ended
        if keys:
            assert len(keys) == len(pixels) <= parts.batch_size
            items.setdefault(part, []).extend(zip(keys, pixels, strict=True))
        else:
            ended.append(part)
    assert sorted(ended) == sorted(parts.parts)
    return items


@pytest.mark.parametrize("num_workers", [0, 2])
def test_parts_hold_the_views_that_training_takes(tmp_path, num_workers):
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    views = ImageViews(FolderImages([tmp_path]), 32, teacher_size=28, views=2, seed=3)
    assert ViewParts.count(views, 3) == 3
    for view in range(2):
        views.set_epoch(view)
        items = seen(ViewParts(views, [0, 1, 2], 3, batch_size=2), num_workers)
        assert [len(items[part]) for part in range(3)] == [3, 3, 2]
        for i, (key, pixels) in enumerate(item for part in range(3) for item in items[part]):
            assert key == views[i]["key"] and torch.equal(pixels, views[i]["teacher_pixels"])
    assert list(seen(ViewParts(views, [1], 3, 2), 0)) == [1]


@pytest.mark.filterwarnings("ignore:.*(Skipped|Replaced)")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_are_read_once_each_a_part(tmp_path, num_workers):
    write_shard(tmp_path / "0.tar", {"0.png": encoded(0), "0.json": b"{}", "1.png": b"broken", "2.png": encoded(2)})
    write_shard(tmp_path / "1.tar", {"readme.txt": b"nothing to see"})
    write_shard(tmp_path / "2.tar", {f"{i}.png": encoded(i) for i in range(3, 8)})
    views = StreamedViews(ShardImages([f"{tmp_path}/{{0..2}}.tar"]), 32, teacher_size=28, views=1)
    assert ViewParts.count(views, 100) == 3
    items = seen(ViewParts(views, [0, 1, 2], 100, batch_size=2), num_workers)
    keys = {part: [key for key, _ in part_items] for part, part_items in items.items()}
    assert keys == {0: ["0", "2"], 2: ["3", "4", "5", "6", "7"]}
    streamed = {}
    for item in views:
        streamed[item["key"]] = item["teacher_pixels"]
        if len(streamed) == 7:
            break
    assert all(torch.equal(pixels, streamed[key]) for part_items in items.values() for key, pixels in part_items)
