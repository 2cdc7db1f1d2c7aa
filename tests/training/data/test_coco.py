import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_codec

from hf_efficientsam.training.data.coco import CocoMasks, decode_rles


def write(folder, annotations, size=(8, 6), content=None):
    """A json with one image of (width, height) `size`; returns its path."""
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(folder / "images" / "a.png")
    image = {"id": 7, "file_name": "a.png", "width": 8, "height": 6}
    path = folder / "masks.json"
    path.write_text(json.dumps(content or {"images": [image], "annotations": annotations}))
    return path


def annotation(segmentation, id=1, image_id=7, **more):
    return {"id": id, "image_id": image_id, "segmentation": segmentation, **more}


SQUARE = np.zeros((6, 8), np.uint8)
SQUARE[1:4, 2:6] = 1  # rows 1 to 3, columns 2 to 5


def square_as(kind):
    if kind == "polygon":
        return [[2, 1, 6, 1, 6, 4, 2, 4]]
    if kind == "compressed":
        rle = rle_codec.encode(np.asfortranarray(SQUARE))
        return {"size": [6, 8], "counts": rle["counts"].decode()}
    return {"size": [6, 8], "counts": [13, 3, 3, 3, 3, 3, 3, 3, 14]}


@pytest.mark.parametrize("kind", ["polygon", "compressed", "uncompressed"])
def test_every_kind_of_segmentation_gives_the_same_mask(tmp_path, kind):
    sample = CocoMasks(write(tmp_path, [annotation(square_as(kind), id=3)]))[0]
    assert np.array_equal(decode_rles(sample.rles), SQUARE[None])
    assert (sample.image_id, sample.annotation_ids, sample.source) == (7, [3], tmp_path.name)
    assert sample.image.mode == "RGB" and sample.image.size == (8, 6)


def test_polygons_of_one_object_are_united(tmp_path):
    halves = [[2, 1, 4, 1, 4, 4, 2, 4], [4, 1, 6, 1, 6, 4, 4, 4], [0, 0, 5, 5]]
    assert np.array_equal(decode_rles(CocoMasks(write(tmp_path, [annotation(halves)]))[0].rles), SQUARE[None])


def test_what_is_left_out(tmp_path):
    path = write(
        tmp_path,
        [
            annotation(square_as("polygon"), id=1),
            annotation(square_as("uncompressed"), id=2, iscrowd=1),
            annotation([[0, 0, 1, 0, 1, 1, 0, 1]], id=3),  # one pixel
            annotation([], id=4),
            annotation([[0, 0, 5, 5]], id=5),  # two corners enclose nothing
        ],
    )
    assert CocoMasks(path)[0].annotation_ids == [1, 3]
    assert CocoMasks(path, skip_crowd=False)[0].annotation_ids == [1, 2, 3]
    assert CocoMasks(path, min_area=2)[0].annotation_ids == [1]
    assert len(CocoMasks(path, min_area=13)) == 0, "an image without masks is left out"


def test_image_is_turned_upright(tmp_path):
    path = write(tmp_path, [annotation(square_as("polygon"))])
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.new("L", (6, 8)).save(tmp_path / "images" / "a.png", exif=exif)
    image = CocoMasks(path)[0].image
    assert image.size == (8, 6) and image.mode == "RGB"


def test_images_may_lie_elsewhere(tmp_path):
    path = write(tmp_path, [annotation(square_as("polygon"))])
    (tmp_path / "images").rename(tmp_path / "photos")
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        CocoMasks(path)
    assert len(CocoMasks(path, tmp_path / "photos")) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        annotation(square_as("polygon"), image_id=8),
        annotation({"size": [8, 6], "counts": square_as("compressed")["counts"]}),
        annotation({"size": [6, 8], "counts": [13, 3]}),
        annotation({"counts": [13, 3]}),
        annotation({"size": [6, 8], "counts": [13, -3, 38]}),
        annotation({"size": [6, 8], "counts": "13o"}),
        annotation({"size": [6, 8], "counts": ""}),
        annotation({"size": [6, 8], "counts": "h\u00e9"}),
        annotation([[2, 1, 6, 1, float("nan"), 4]]),
        annotation([[2, 1, 6, 1, 6, 1e9]]),
        annotation([[2, 1, 6, 1, 6, None]]),
        annotation(None),
    ],
    ids=[
        "unknown image",
        "other size",
        "too few pixels",
        "no size",
        "negative run",
        "too few compressed pixels",
        "no run",
        "no code",
        "corner not a number",
        "corner far away",
        "corner missing",
        "null",
    ],
)
def test_an_annotation_that_does_not_fit_is_named(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"annotation 1 of .*masks\.json"):
        CocoMasks(write(tmp_path, [wrong]))


def lvis_like(shared, folder, names):
    """A json of the first images of coco-val-dev without `file_name`, and the images at `names` in `folder`/images."""
    original = shared / "data/coco-val-dev"
    content = json.loads((original / "instances_val.json").read_text())
    content["images"] = content["images"][: len(names)]
    ids = {record["id"] for record in content["images"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    for record, name in zip(content["images"], names, strict=True):
        file = record.pop("file_name")
        record["coco_url"] = f"http://images.cocodataset.org/train2017/{file}"
        path = folder / "images" / name.format(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(original / "images" / file)
    (folder / "lvis.json").write_text(json.dumps(content))
    return folder / "lvis.json"


def test_lvis_has_urls_in_place_of_names(shared, tmp_path):
    lvis = CocoMasks(lvis_like(shared, tmp_path, ["train2017/{}", "{}", "train2017/{}", "{}"]))
    coco = CocoMasks(shared / "data/coco-val-dev/instances_val.json")
    ids = [record["id"] for record in coco.records]
    assert len(lvis) > 1
    for sample in lvis:
        assert sample == coco[ids.index(sample.image_id)]
    (tmp_path / "images" / "train2017").rename(tmp_path / "images" / "val2017")
    with pytest.raises(FileNotFoundError, match=r"lists train2017/(\d+\.jpg) or \1, which is not in .*images;"):
        CocoMasks(tmp_path / "lvis.json")


def test_a_name_goes_before_a_url(tmp_path):
    path = write(tmp_path, [annotation(square_as("polygon"))])
    content = json.loads(path.read_text())
    content["images"][0]["coco_url"] = "http://images.cocodataset.org/train2017/b.png"
    path.write_text(json.dumps(content))
    assert len(CocoMasks(path)) == 1


@pytest.mark.parametrize(
    "names",
    [
        {"file_name": "{folder}/secret.png"},
        {"file_name": "../secret.png"},
        {"file_name": "a/../../secret.png"},
        {"coco_url": "http://images.cocodataset.org/../secret.png"},
    ],
    ids=["absolute", "upwards", "upwards in the end", "url"],
)
def test_names_stay_in_the_folder_of_images(tmp_path, names):
    path = write(tmp_path, [annotation(square_as("polygon"))])
    (tmp_path / "images" / "a").mkdir()
    (tmp_path / "images" / "a.png").rename(tmp_path / "secret.png")
    content = json.loads(path.read_text())
    del content["images"][0]["file_name"]
    content["images"][0] |= {key: name.format(folder=tmp_path) for key, name in names.items()}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"names the image .*secret\.png, outside the folder of images"):
        CocoMasks(path)


def test_names_may_turn_round_within_the_folder_of_images(tmp_path):
    path = write(tmp_path, [annotation(square_as("polygon"))])
    (tmp_path / "images" / "b").mkdir()
    path.write_text(path.read_text().replace("a.png", "b/../a.png"))
    assert CocoMasks(path)[0].image.size == (8, 6)


def test_a_broken_json_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        CocoMasks(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match=r"masks\.json is not COCO-style"):
        CocoMasks(write(tmp_path, [], content={"images": []}))
    with pytest.raises(ValueError, match=r"masks\.json has an image without height, width"):
        CocoMasks(write(tmp_path, [], content={"images": [{"id": 1, "file_name": "a.png"}], "annotations": []}))
    nameless = {"id": 1, "file_name": None, "width": 8, "height": 6}
    with pytest.raises(ValueError, match=r"masks\.json has an image without file_name"):
        CocoMasks(write(tmp_path, [], content={"images": [nameless], "annotations": []}))
    for wrong in ({"images": [1], "annotations": []}, {"images": [], "annotations": [None]}, ["images"]):
        with pytest.raises(ValueError, match=r"masks\.json is not COCO-style"):
            CocoMasks(write(tmp_path, [], content=wrong))
    unhashable = nameless | {"id": [1], "file_name": "a.png"}
    with pytest.raises(ValueError, match=r"masks\.json has an image without id"):
        CocoMasks(write(tmp_path, [], content={"images": [unhashable], "annotations": []}))
    for broken in ('{"images": [', "[" * 100_000):
        (tmp_path / "masks.json").write_text(broken)
        with pytest.raises(ValueError, match=r"masks\.json is not valid json"):
            CocoMasks(tmp_path / "masks.json")


def test_an_image_that_does_not_fit_is_named(tmp_path):
    dataset = CocoMasks(write(tmp_path, [annotation(square_as("polygon"))], size=(6, 8)))
    with pytest.raises(ValueError, match=r"a\.png is 6 x 8 .* 8 x 6"):
        dataset[0]
    (tmp_path / "images" / "a.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"a\.png cannot be read"):
        dataset[0]


def test_decode_wants_a_mask():
    with pytest.raises(ValueError, match="no mask"):
        decode_rles([])


@pytest.mark.parametrize(
    ("name", "images", "masks"),
    [
        ("train-seg/instances_train.json", 1260, 29509),
        ("coco-train/instances_train.json", 357, 2991),
        ("coco-val-dev/instances_val.json", 100, 899),
    ],
)
def test_real_files(shared, name, images, masks):
    dataset = CocoMasks(shared / "data" / name)
    assert len(dataset) == images
    assert sum(len(rles) for rles in dataset.rles) == masks
    sample = dataset[0]
    pixels = torch.from_numpy(decode_rles(sample.rles))
    assert pixels.shape == (len(sample.annotation_ids), sample.image.height, sample.image.width)
    assert pixels.unique().tolist() == [0, 1]
