"""`training/cache_features.py`, run as a user does, with a tiny teacher and a handful of images."""

import os
import shutil
import signal
import tarfile
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from script_runs import fork, kill_after_the_first_part, refuse, run
from torch.utils.data import default_collate

from hf_efficientsam.training.data.feature_cache import FeatureCache
from hf_efficientsam.training.data.images import DatasetImages, FolderImages, ImageViews, ShardImages
from hf_efficientsam.training.sami.teachers import load_teacher

IMAGES, VIEWS = 11, 2
OPTIONS = ["--size", 32, "--views", VIEWS, "--crop_scale", 0.5, "--view_seed", 5, "--part_size", 2, "--batch_size", 2]

pytestmark = pytest.mark.slow  # every run of the script begins with importing torch and transformers


TEACHER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny.save_teacher(tmp_path_factory.mktemp("teacher"), **TEACHER)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return tiny.save_images(tmp_path_factory.mktemp("images"), IMAGES, 60, 50)


@pytest.fixture(scope="module")
def cached(images, teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cached")
    done = fork("cache_features", "--images", images, "--teacher", teacher, *OPTIONS, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_online_equals_cached(source, folder: Path, teacher_path: Path) -> None:
    teacher = load_teacher(str(teacher_path))
    expected = {"teacher": teacher.description(), "size": 32, "data": source.fingerprint()}
    cache = FeatureCache(folder, expected)
    assert (len(cache), cache.views, cache.width) == (len(source), VIEWS, 16)
    views = ImageViews(source, 32, teacher_size=teacher.size, crop_scale=(0.5, 1.0), views=VIEWS, seed=5, cache=cache)
    seen = []
    for epoch in range(VIEWS + 1):
        views.set_epoch(epoch)
        batch = default_collate([views[i] for i in range(len(views))])
        assert batch["features"].dtype == torch.float16
        online = teacher(batch["teacher_pixels"], (2, 2))
        torch.testing.assert_close(batch["features"].float(), online, rtol=1e-3, atol=1e-4)
        seen.append(online)
    assert not torch.allclose(seen[0], seen[1], rtol=0.01) and torch.equal(seen[0], seen[VIEWS])


def test_the_cache_holds_what_the_teacher_says_of_the_same_crops(images, cached, teacher):
    check_online_equals_cached(FolderImages([images]), cached, teacher)
    assert len(list(cached.glob("view_*/part_*.safetensors"))) == VIEWS * 6


def test_killed_and_resumed_it_ends_as_if_it_had_not_been(images, cached, teacher, tmp_path):
    arguments = ["--images", images, "--teacher", teacher, *OPTIONS, "--output_dir", tmp_path]
    killed = fork("cache_features", *arguments, before=kill_after_the_first_part)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "index.safetensors").exists()
    with pytest.raises(ValueError, match="is not complete"):
        FeatureCache(tmp_path, {})
    done = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.glob("view_*/part_*.safetensors")}
    assert len(done) == 1
    (tmp_path / "view_0000" / "part_000005.writing").write_bytes(b"half of")

    run("cache_features", *arguments)
    assert contents(tmp_path) == contents(cached)
    assert all((path.stat().st_ino, path.stat().st_mtime_ns) == stat for path, stat in done.items())


def test_a_deleted_part_is_made_again_and_nothing_else(images, cached, teacher, tmp_path):
    folder = shutil.copytree(cached, tmp_path / "cache")
    gone = folder / "view_0001" / "part_000003.safetensors"
    gone.unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("view_*/part_*")}
    # Neither the batches nor the workers matter; nor does where the teacher is.
    moved = shutil.copytree(teacher, tmp_path / "moved")
    options = [*OPTIONS, "--batch_size", 1, "--num_workers", 0]
    assert "2/2" in run("cache_features", "--images", images, "--teacher", moved, *options, "--output_dir", folder)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()) and gone.is_file()
    check_online_equals_cached(FolderImages([images]), folder, teacher)


def test_two_processes_make_the_same_cache(images, cached, teacher, tmp_path):
    given = ["--images", images, "--teacher", teacher, *OPTIONS, "--output_dir", tmp_path]
    done = fork("cache_features", *given, processes=2)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(cached)
    assert "12/12" in done.stderr  # the main process's half: 3 of 6 parts of 2 images, in 2 views


def test_shards_and_datasets(images, teacher, tmp_path):
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for path in sorted(images.iterdir())[shard::3]:
                tar.add(path, path.name)
    pattern = f"{tmp_path}/{{0..2}}.tar"
    run("cache_features", "--shards", pattern, "--teacher", teacher, *OPTIONS, "--output_dir", tmp_path / "streamed")
    cache = FeatureCache(tmp_path / "streamed", {"data": ShardImages([pattern]).fingerprint(), "view_seed": 5})
    assert len(cache) == IMAGES and len(list((tmp_path / "streamed").glob("view_*/part_*"))) == VIEWS * 3
    assert cache.read("07", 1).shape == (4, 16)

    encoded = [{"bytes": path.read_bytes(), "path": None} for path in sorted(images.iterdir())]
    rows = datasets.Dataset.from_dict({"photo": encoded}).cast_column("photo", datasets.Image())
    rows.save_to_disk(str(tmp_path / "rows"))
    given = ["--dataset", tmp_path / "rows", "--image_column", "photo", "--teacher", teacher]
    run("cache_features", *given, *OPTIONS, "--output_dir", tmp_path / "cache")
    check_online_equals_cached(DatasetImages(str(tmp_path / "rows"), "train", "photo"), tmp_path / "cache", teacher)


def test_it_refuses_to_mix_caches(images, cached, teacher, tmp_path):
    before = contents(cached)
    fewer = shutil.copytree(images, tmp_path / "fewer")
    (fewer / "03.png").unlink()
    for other, sentence in [
        (["--teacher", tiny.save_teacher(tmp_path / "other", seed=1, **TEACHER)], "teacher.weights_hash is "),
        (["--teacher_size", 28], "teacher.size is 56, not 28"),
        (["--size", 48], "size is 32, not 48"),
        (["--crop_scale", 0.4], "crop_scale is 0.5, not 0.4"),
        (["--view_seed", 6], "view_seed is 5, not 6"),
        (["--views", 3], "views is 2, not 3"),
        (["--part_size", 3], "part_size is 2, not 3"),
        (["--images", fewer], "data is "),
    ]:
        given = ["--images", images, "--teacher", teacher, *OPTIONS, "--output_dir", cached]
        said = refuse("cache_features", *given, *other)
        assert f"made with other options; use those or another folder: {sentence}" in said
        assert said.count(", not ") == 1  # nothing but that
    assert contents(cached) == before


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--images", "absent"], "There is no image"),
        ([], "Give exactly one of images"),
        (["--images", "IMAGES", "--teacher", "no/such/teacher"], "is neither a directory with a model"),
        (["--images", "IMAGES", "--teacher_size", 60], "multiple of its patch of 14"),
        (["--images", "IMAGES", "--size", 100], "must be a multiple of"),
        (["--images", "IMAGES", "--views", 0], "it must be more than 0"),
        (["--images", "IMAGES", "--part_size", 0], "it must be more than 0"),
        (
            ["--images", "IMAGES", "--output_dir", "/dev/null/cache"],
            "--output_dir is /dev/null/cache; it must be a folder, or a name for one",
        ),
    ],
)
def test_it_refuses_bad_input_in_one_sentence(images, teacher, tmp_path, arguments, sentence):
    given = ["--teacher", teacher, "--output_dir", tmp_path / "cache"]
    said = refuse("cache_features", *given, *(images if argument == "IMAGES" else argument for argument in arguments))
    assert said.startswith("cache_features: ") and sentence in said
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_named(images, teacher, tmp_path, num_workers):
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "04.png").write_bytes(b"no image")
    options = [*OPTIONS, "--num_workers", num_workers, "--output_dir", tmp_path / "cache"]
    said = refuse("cache_features", "--images", folder, "--teacher", teacher, *options)
    assert said.strip().startswith(f"{folder / '04.png'} cannot be read as an image")


def test_a_full_disk_is_said(images, teacher, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    options = [*OPTIONS, "--num_workers", 0, "--output_dir", tmp_path / "cache"]
    said = refuse("cache_features", "--images", images, "--teacher", teacher, *options)
    assert "part_000000.safetensors cannot be written (No space left on device)" in said
