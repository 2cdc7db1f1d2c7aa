import io
import json
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import datasets
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_codec
from tars import write_shard

from hf_efficientsam.training.data.coco import AnnotationConfig, CocoMasks, decode_rles
from hf_efficientsam.training.data.sa1b import Sa1bShards

SQUARE = np.zeros((6, 8), np.uint8)
SQUARE[1:4, 2:6] = 1


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def compressed(mask):
    rle = rle_codec.encode(np.asfortranarray(mask))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def described(image_id, size, segmentations):
    """SA-1B's json, with all that it has."""
    annotations = [
        {
            "id": 100 * int(image_id) + i,
            "segmentation": segmentation,
            "bbox": [2, 1, 4, 3],
            "area": -1,  # is not read
            "predicted_iou": 0.9,
            "stability_score": 0.95,
            "crop_box": [0, 0, *size],
            "point_coords": [[3.5, 2.5]],
        }
        for i, segmentation in enumerate(segmentations)
    ]
    image = {"image_id": image_id, "width": size[0], "height": size[1], "file_name": f"sa_{image_id}.jpg"}
    return {"image": image, "annotations": annotations}


def jpg(size=(8, 6), **options):
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 60)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def write(folder, content, image=None):
    """A shard of two records, the first as given, the second whole; the first one's json may be bytes."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    whole = json.dumps(described(2, (8, 6), [compressed(SQUARE)])).encode()
    members = {"sa_1.jpg": image or jpg(), "sa_1.json": text, "sa_2.jpg": jpg(), "sa_2.json": whole}
    return write_shard(folder / "sa_000007.tar", members)


def test_a_real_shard_holds_the_masks_of_the_json_it_was_made_of(shared, tmp_path):
    coco = CocoMasks(shared / "data" / "coco-val-dev" / "instances_val.json")
    members = {}
    for record, rles in list(zip(coco.records, coco.rles, strict=True))[:5]:
        segmentations = [rle | {"counts": rle["counts"].decode()} for rle in rles]
        content = described(record["id"], (record["width"], record["height"]), segmentations)
        members[f"sa_{record['id']}.jpg"] = (coco.images / record["file_name"]).read_bytes()
        members[f"sa_{record['id']}.json"] = json.dumps(content).encode()
    source = Sa1bShards([write_shard(tmp_path / "sa_000000.tar", members)])
    read = list(source.read(0))
    assert [key for key, _ in read] == [f"sa_{record['id']}" for record in coco.records[:5]]
    for i, (_, sample) in enumerate(read):
        assert (sample.image_id, sample.source) == (coco[i].image_id, "sa_000000")
        assert sample.annotation_ids == [100 * sample.image_id + n for n in range(len(sample.rles))]
        assert np.array_equal(decode_rles(sample.rles), decode_rles(coco[i].rles))
        assert sample.image.mode == "RGB" and sample.image.tobytes() == coco[i].image.tobytes()


@pytest.mark.filterwarnings("ignore:.* as 2 so far")
def test_counts_may_be_compressed_or_not_and_small_masks_are_left_out(tmp_path):
    dot, nothing = np.zeros_like(SQUARE), np.zeros_like(SQUARE)
    dot[0, 0] = 1
    uncompressed = {"size": [6, 8], "counts": [13, 3, 3, 3, 3, 3, 3, 3, 14]}
    masks = [compressed(SQUARE), compressed(nothing), uncompressed, compressed(dot), []]
    path = write(tmp_path, described(1, (8, 6), masks))
    for min_area, ids in [(1, [100, 102, 103]), (2, [100, 102]), (12, [100, 102])]:
        sample = dict(Sa1bShards([path], min_area).read(0))["sa_1"]
        assert sample.annotation_ids == ids and sample.source == "sa_000007"
        assert all(isinstance(rle["counts"], bytes) and rle["size"] == [6, 8] for rle in sample.rles)
        assert np.array_equal(decode_rles(sample.rles)[:2], [SQUARE, SQUARE])
    with pytest.warns(UserWarning, match=r"sa_1\.json in .*sa_000007\.tar has no mask of at least 13 pixels"):
        assert dict(Sa1bShards([path], 13).read(0)) == {}


def test_masks_are_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    path = write(tmp_path, described("1", ("8", 6.0), [compressed(SQUARE)]), jpg((6, 8), exif=exif))
    assert dict(Sa1bShards([path]).read(0))["sa_1"].image.size == (8, 6)


def test_where_nothing_tells_the_frame_of_masks_an_option_does_or_a_warning(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    path = write(tmp_path, described(1, (8, 6), [compressed(SQUARE)]), jpg(exif=exif))
    with pytest.warns(UserWarning, match=r"turns or mirrors sa_1\.jpg .*give --mask_frame upright or stored"):
        sample = dict(Sa1bShards([path]).read(0))["sa_1"]
    assert np.array_equal(decode_rles(sample.rles), SQUARE[None])
    sample = dict(Sa1bShards([path], reading=AnnotationConfig(mask_frame="stored")).read(0))["sa_1"]
    assert np.array_equal(decode_rles(sample.rles), SQUARE[None, ::-1, ::-1])


def test_source_of_a_signed_url(tmp_path):
    path = write(tmp_path, described(1, (8, 6), [compressed(SQUARE)]))
    source = Sa1bShards([path])
    record = next(iter(source.records))
    record["members"] = [(name, extent.read()) for name, extent in record["members"]]
    record["shard"] = "https://cdn.example.org/m1/sa_000020.tar?ccb=10-5&oh=00/_x"
    assert source.decode(record).source == "sa_000020"


GOOD = described(1, (8, 6), [compressed(SQUARE)])
COUNTS = compressed(SQUARE)["counts"]
BROKEN = {
    "garbage": b"\xff{",
    "empty": b"",
    "deep": b"[" * 100_000,
    "a list": [GOOD],
    "a number": 1,
    "no image": {"annotations": GOOD["annotations"]},
    "no annotations": {"image": GOOD["image"]},
    "null": GOOD | {"annotations": None},
    "no id": GOOD | {"image": GOOD["image"] | {"image_id": None}},
    "a mask without id": GOOD | {"annotations": [{"segmentation": compressed(SQUARE)}]},
    "other image size": described(1, (6, 8), [compressed(SQUARE)]),
    "no masks": described(1, (8, 6), []),
    "other mask size": described(1, (8, 6), [compressed(SQUARE), compressed(SQUARE.T)]),
    "polygon of gigabytes": described(1, (8, 6), [[[0, 0, 1e12, 1, 6, 1e12, 2, 4]]]),
    "no counts": described(1, (8, 6), [{"size": [6, 8]}]),
    "no size": described(1, (8, 6), [{"counts": COUNTS}]),
    "null counts": described(1, (8, 6), [{"size": [6, 8], "counts": None}]),
    "too few": described(1, (8, 6), [{"size": [6, 8], "counts": [13, 3]}]),
    "negative": described(1, (8, 6), [{"size": [6, 8], "counts": [-1, 49]}]),
    "halves": described(1, (8, 6), [{"size": [6, 8], "counts": [0.5] * 96}]),
    "words": described(1, (8, 6), [{"size": [6, 8], "counts": ["a", "b"]}]),
    # Over each of these pycocotools alone would wait forever, or decode what happens to be in memory.
    "empty counts": described(1, (8, 6), [{"size": [6, 8], "counts": ""}]),
    "cut counts": described(1, (8, 6), [{"size": [6, 8], "counts": COUNTS[:-1]}]),
    "longer counts": described(1, (8, 6), [{"size": [6, 8], "counts": COUNTS + "5"}]),
    "cut within a length": described(1, (8, 6), [{"size": [6, 8], "counts": COUNTS + "P"}]),
    "other letters": described(1, (8, 6), [{"size": [6, 8], "counts": "\u00ff!"}]),
    "a long length": described(1, (8, 6), [{"size": [6, 8], "counts": "o" * 40 + "0"}]),
    "a negative length": described(1, (8, 6), [{"size": [6, 8], "counts": "OQ1P1"}]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_record_is_named_and_left_out(tmp_path, case):
    source = Sa1bShards([write(tmp_path, BROKEN[case])])
    with pytest.warns(UserWarning, match=r"sa_1\.j(pg|son) in .*sa_000007\.tar .* Skipped, as 1 so far"):
        assert [key for key, _ in source.read(0)] == ["sa_2"]


def test_a_broken_image_or_member_is_named_and_left_out(tmp_path):
    for image in (b"no image", jpg()[:300]):
        with pytest.warns(UserWarning, match=r"sa_1\.jpg in .*sa_000007\.tar cannot be read as an image"):
            assert [key for key, _ in Sa1bShards([write(tmp_path, GOOD, image)]).read(0)] == ["sa_2"]
    text = json.dumps(GOOD).encode()
    members = {"sa_1.jpg": jpg(), "sa_2.json": text, "../sa_3.json": text, "../sa_3.jpg": jpg(), "sa_4.jpg": jpg()}
    with pytest.warns(UserWarning) as warned:
        read = list(Sa1bShards([write_shard(tmp_path / "a.tar", members)]).read(0))
    assert [key for key, _ in read] == ["../sa_3"]
    said = [str(warning.message).split(" in ")[0] for warning in warned]
    assert said == ["sa_1", "sa_2", "sa_4"] and "a.tar has no .json. Skipped, as 3 so far" in str(warned[2].message)


def test_a_shard_by_http(tmp_path, shared):
    """From a server on this machine: real images, read while they arrive; a shard that is not there is left out."""
    coco = shared / "data" / "coco-val-dev"
    truth = CocoMasks(coco / "instances_val.json")
    members = {}
    for i in range(3):
        sample = truth[i]
        rles = [rle | {"counts": rle["counts"].decode()} for rle in sample.rles]
        members[f"sa_{i}.jpg"] = (coco / "images" / truth.records[i]["file_name"]).read_bytes()
        members[f"sa_{i}.json"] = json.dumps(described(i, sample.image.size, rles)).encode()
    write_shard(tmp_path / "sa_000000.tar", members)
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        source = Sa1bShards([f"http://127.0.0.1:{server.server_port}/sa_00000{{0..1}}.tar"])
        found = list(source.read(0))
        with pytest.warns(UserWarning, match="sa_000001.tar is broken"):
            assert not list(source.read(1))
        server.shutdown()
    assert [key for key, _ in found] == ["sa_0", "sa_1", "sa_2"]
    for i, (_, sample) in enumerate(found):
        assert np.array_equal(decode_rles(sample.rles), decode_rles(truth[i].rles)) and sample.source == "sa_000000"
