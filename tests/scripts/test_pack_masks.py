"""`training/pack_masks.py`."""

import json
import tarfile

import torch
from PIL import Image
from script_runs import refuse, run

from hf_efficientsam.training.data.coco import CocoMasks, decode_rles
from hf_efficientsam.training.data.sa1b import Sa1bShards


def samples(folder) -> list:
    shards = Sa1bShards(sorted(map(str, folder.glob("*.tar"))))
    return [sample for number in range(len(shards.shards)) for _, sample in shards.read(number)]


def test_without_a_size_images_and_masks_stay_as_they_are(coco, tmp_path):
    run("pack_masks", "--annotations", coco / "masks.json", "--output_dir", tmp_path)
    dataset, folder = CocoMasks(coco / "masks.json"), tmp_path / coco.name
    packed = samples(folder)
    assert [one.image_id for one in packed] == [0, 1, 2, 3, 4]
    for ours, theirs in zip(packed, dataset, strict=True):
        assert ours.image.tobytes() == theirs.image.tobytes()
        assert (ours.rles, ours.annotation_ids) == (theirs.rles, theirs.annotation_ids)
    with tarfile.open(folder / f"{coco.name}_000.tar") as tar:
        assert tar.extractfile("3.jpg").read() == (coco / "images" / "3.jpg").read_bytes()


def test_with_a_size_image_and_masks_are_squashed_together(coco, tmp_path):
    run("pack_masks", "--annotations", coco / "masks.json", "--output_dir", tmp_path, "--size", 64, "--quality", 95)
    for sample in samples(tmp_path / coco.name):
        assert sample.image.size == (64, 64)
        light = torch.tensor(list(sample.image.convert("L").getdata())).reshape(64, 64)
        for mask in torch.from_numpy(decode_rles(sample.rles)).bool():
            assert 8 <= mask.sum() < 64 * 64 / 2
            assert light[mask].float().mean() > 80  # the objects are bright, the ground is below 40


def test_no_file_is_larger_than_the_limit(coco, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("pack_masks", "--annotations", coco / "masks.json", "--output_dir", whole)
    limit = 0.02
    run("pack_masks", "--annotations", coco / "masks.json", "--output_dir", parts, "--shard_mib", limit)
    files = sorted((parts / coco.name).iterdir())
    assert len(files) > 1 and [path.name for path in files] == [f"{coco.name}_{n:03}.tar" for n in range(len(files))]
    assert max(path.stat().st_size for path in files) <= limit * 2**20
    for ours, theirs in zip(samples(parts / coco.name), samples(whole / coco.name), strict=True):
        assert (ours.image_id, ours.rles) == (theirs.image_id, theirs.rles)


def test_a_mask_of_which_nothing_is_left_is_left_out(tmp_path):
    (tmp_path / "some" / "images").mkdir(parents=True)
    Image.new("RGB", (200, 200)).save(tmp_path / "some" / "images" / "0.png")
    image = {"id": 0, "file_name": "0.png", "width": 200, "height": 200}
    corners = ([0, 0, 100, 0, 100, 100], [150, 150, 153, 150, 153, 153])
    annotations = [{"id": i, "image_id": 0, "segmentation": [polygon]} for i, polygon in enumerate(corners)]
    path = tmp_path / "some" / "instances.json"
    path.write_text(json.dumps({"images": [image], "annotations": annotations}))
    run("pack_masks", "--annotations", path, "--output_dir", tmp_path, "--size", 32)
    (sample,) = samples(tmp_path / "some")
    assert sample.annotation_ids == [0]


def test_bad_options_are_refused_in_one_sentence(coco, tmp_path):
    assert "at least one" in refuse("pack_masks")
    given = ["--annotations", coco / "masks.json"]
    assert "at most 100" in refuse("pack_masks", *given, "--quality", 101)
    assert "folders of the same name" in refuse("pack_masks", *given, coco / "masks.json")
