import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle_codec

from hf_efficientsam.model.image_reading_efficientsam import image_to_array
from hf_efficientsam.training.data.coco import AnnotationConfig, CocoMasks, decode_rles
from hf_efficientsam.training.data.images import FolderImages


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


def test_what_is_left_out_is_said_by_reason(tmp_path, caplog):
    path = write(
        tmp_path,
        [
            annotation(square_as("polygon"), id=1),
            annotation(square_as("uncompressed"), id=2, iscrowd=1),
            annotation([[0, 0, 1, 0, 1, 1, 0, 1]], id=3),  # one pixel
            annotation([], id=4),
            annotation([[0, 0, 5, 5]], id=5),  # two corners enclose nothing
            annotation(None, id=6),  # a box
            {"id": 7, "image_id": 7},
        ],
    )
    assert CocoMasks(path)[0].annotation_ids == [1, 3]
    assert "1 images with 2 masks; left out: 1 masks marked as crowds" in caplog.text
    assert "2 boxes without a mask, 2 masks without pixels." in caplog.text
    assert CocoMasks(path, reading=AnnotationConfig(crowds="keep"))[0].annotation_ids == [1, 2, 3]
    assert CocoMasks(path, min_area=2)[0].annotation_ids == [1]
    caplog.clear()
    assert len(CocoMasks(path, min_area=13)) == 0, "an image without masks is left out"
    assert "2 masks of fewer than 13 pixels, 1 images without a mask." in caplog.text


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
        annotation([[2, 1, 6, 1, 6, 4, 2]]),
        annotation(square_as("uncompressed"), iscrowd="maybe"),
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
        "x without y",
        "iscrowd",
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
    with pytest.raises(FileNotFoundError, match=r"lists train2017/(\d+\.jpg) or \1, .* which is not in .*images;"):
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


def test_an_address_is_refused_as_it_was_given(tmp_path):
    address = "https://example.org/some//instances.json"
    for open_it in (lambda: CocoMasks(address), lambda: CocoMasks(write(tmp_path, []), address)):
        with pytest.raises(FileNotFoundError, match=f"{address}: an address is neither read"):
            open_it()
    with pytest.raises(FileNotFoundError, match=f"{address}: an address is neither read"):
        FolderImages([address])


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


def test_images_that_do_not_fit_are_all_named_at_the_start(tmp_path):
    images = [{"id": i, "file_name": f"{i}.png", "width": 8, "height": 6} for i in range(12)]
    content = {"images": images, "annotations": [annotation(square_as("polygon"), i, i) for i in range(12)]}
    path = write(tmp_path, [], content=content)
    for i in range(12):
        Image.new("RGB", (6, 8)).save(tmp_path / "images" / f"{i}.png")
    named = r"(?s)\(12\):.*0\.png is 6 x 8 .* 8 x 6.*9\.png is 6 x 8[^\n]*\n  and 2 more$"
    with pytest.raises(ValueError, match=named):
        CocoMasks(path)
    for i in range(12):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"not an image")
    with pytest.raises(
        ValueError, match=r"(?s)\(12\):.*0\.png cannot be read.*9\.png cannot be read[^\n]*\n  and 2 more$"
    ):
        CocoMasks(path)


def test_an_image_that_changes_later_is_named(tmp_path):
    dataset = CocoMasks(write(tmp_path, [annotation(square_as("polygon"))]))
    Image.new("RGB", (6, 8)).save(tmp_path / "images" / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is 6 x 8 .* 8 x 6"):
        dataset[0]
    (tmp_path / "images" / "a.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"a\.png cannot be read"):
        dataset[0]


def image(id, name="a.png", **more):
    return {"id": id, "file_name": name, "width": 8, "height": 6, **more}


@pytest.mark.parametrize(
    ("images", "annotations", "sentence"),
    [
        ([image(7), image(7, "b.png")], [], "has the image id 7 more than once"),
        ([image(7), image("7", "b.png")], [], "has the image id 7 more than once"),
        ([image(7), image(8), image(9, "./a.png")], [], r"has the image a\.png more than once"),
        ([image(7, "s/a.png"), image(8, "s\\a.png")], [], "has the image s/a.png more than once"),
        (
            [image(7)],
            [annotation([], 1), annotation([], 2), annotation([], "1")],
            "the annotation id 1 more than once",
        ),
        ([image(7)], [annotation([], 1, 8), annotation([], 2, 9)], r"annotation 1, 2 of .* does not list \(8, 9\)"),
        ([image(7)], [{"id": 1, "segmentation": []}], r"annotation 1 of .* does not list \(None\)"),
    ],
    ids=["image id", "image id as text", "file name", "backslash", "annotation id", "unknown images", "no image"],
)
def test_what_is_ambiguous_is_refused_and_named(tmp_path, images, annotations, sentence):
    path = write(tmp_path, [], content={"images": images, "annotations": annotations})
    with pytest.raises(ValueError, match=sentence):
        CocoMasks(path)


@pytest.mark.parametrize(
    ("record", "entry"),
    [
        (image("7"), annotation(square_as("polygon"))),
        (image(7), annotation(square_as("polygon"), image_id="7")),
        (image(7, width="8", height=6.0), annotation(square_as("polygon"), image_id=7.0)),
        (image("x", "sub\\b.png"), annotation(square_as("polygon"), image_id="x")),
        (image(7), annotation(square_as("polygon")[0])),
        (image(7), annotation([[2, 1], [6, 1], [6, 4], [2, 4]])),
        (image(7), annotation([[[2, 1], [6, 1], [6, 4], [2, 4]], [[2, 1], [6, 1], [6, 4]]])),
        (image(7), annotation([square_as("compressed"), square_as("uncompressed")])),
        (image(7), annotation(square_as("polygon"), iscrowd="0")),
    ],
    ids=[
        "id as text",
        "image_id as text",
        "sizes as text",
        "backslash",
        "one polygon",
        "corners",
        "polygons of corners",
        "RLEs",
        "iscrowd",
    ],
)
def test_what_tools_write_in_other_ways_is_read(tmp_path, record, entry):
    path = write(tmp_path, [], content={"images": [record], "annotations": [entry]})
    (tmp_path / "images" / "sub").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "images" / "sub" / "b.png")
    sample = CocoMasks(path)[0]
    assert np.array_equal(decode_rles(sample.rles), SQUARE[None])
    assert sample.image_id == record["id"], "as the file has it"


def test_categories_are_matched_like_ids_of_images(tmp_path):
    content = {
        "images": [image(7)],
        "annotations": [annotation(square_as("polygon"), category_id="3")],
        "categories": [{"id": 3, "name": "cat"}],
    }
    assert CocoMasks(write(tmp_path, [], content=content)).category_ids == [[3]]


@pytest.mark.parametrize(
    ("json_at", "images_at", "name"),
    [
        ("train/_annotations.coco.json", "train", "a.png"),
        ("annotations.json", "", "JPEGImages/a.png"),
        ("labels.json", "data", "a.png"),
        ("annotations/instances_default.json", "images/default", "a.png"),
        ("annotations/instances.json", "images", "a.png"),
        ("annotations/instances_val2017.json", "val2017", "a.png"),
        ("result.json", "", "images\\a.png"),
    ],
    ids=["Roboflow", "labelme", "FiftyOne", "CVAT", "Supervisely", "COCO", "Label Studio"],
)
def test_images_are_found_where_tools_put_them(tmp_path, json_at, images_at, name):
    for path in (tmp_path / json_at, tmp_path / images_at / name.replace("\\", "/")):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(tmp_path / images_at / name.replace("\\", "/"))
    content = {"images": [image(7, name)], "annotations": [annotation(square_as("polygon"))]}
    (tmp_path / json_at).write_text(json.dumps(content))
    assert len(CocoMasks(tmp_path / json_at)) == 1


def brush(id, category_id=1, **more):
    return annotation(square_as("uncompressed"), id, category_id=category_id, iscrowd=1, **more)


@pytest.mark.parametrize(
    ("annotations", "kept"),
    [
        ([brush(1), *[annotation(square_as("polygon"), id) for id in (2, 3, 4)]], [2, 3, 4]),
        ([brush(1, 1), brush(2, 2), *[annotation(square_as("polygon"), id) for id in range(3, 9)]], [*range(3, 9)]),
        ([brush(1), brush(2, 2)], [1, 2]),
        ([brush(1, 1), brush(2, 2), *[annotation(square_as("polygon"), id) for id in (3, 4)]], [1, 2, 3, 4]),
        ([brush(1), brush(2), *[annotation(square_as("polygon"), id) for id in range(3, 9)]], [*range(1, 9)]),
        ([brush(1, attributes={}), *[annotation(square_as("polygon"), id) for id in (2, 3, 4)]], [1, 2, 3, 4]),
        ([annotation(square_as("polygon"), 1, iscrowd=1), brush(2), brush(3)], [2, 3]),
    ],
    ids=["COCO", "two of COCO", "all", "half", "two of a kind", "CVAT", "outlines are meant"],
)
def test_masks_that_a_tool_marks_as_crowds_are_read(tmp_path, caplog, annotations, kept):
    path = write(tmp_path, annotations)
    assert CocoMasks(path)[0].annotation_ids == kept
    said = "are read as masks, because tools such as CVAT" if 1 in kept or 2 in kept else "masks marked as crowds"
    assert said in caplog.text or kept == [2, 3, 4]
    skipped = [one["id"] for one in annotations if not one.get("iscrowd")]
    found = CocoMasks(path, reading=AnnotationConfig(crowds="skip"))
    assert [ids for ids in found.annotation_ids] == ([skipped] if skipped else [])
    everything = CocoMasks(path, reading=AnnotationConfig(crowds="keep"))
    assert everything[0].annotation_ids == [one["id"] for one in annotations]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_in_the_stored_frame_come_out_upright(tmp_path, caplog, orientation):
    path = write(tmp_path, [annotation(square_as("polygon"))])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(SQUARE * 255).convert("RGB")
    stored.save(tmp_path / "images" / "a.png", exif=exif)
    tells = orientation >= 5  # 8 x 6 in the json, 6 x 8 once upright
    sample = CocoMasks(path, reading=AnnotationConfig(mask_frame=None if tells else "stored"))[0]
    assert np.array_equal(decode_rles(sample.rles)[0] * 255, np.asarray(sample.image)[..., 0])
    assert "EXIF" not in caplog.text
    if orientation in (2, 3, 4):
        assert np.array_equal(decode_rles(CocoMasks(path)[0].rles)[0], SQUARE)
        assert "an EXIF tag turns or mirrors" in caplog.text and "a.png" in caplog.text


def test_what_inference_reads_is_what_is_trained_on(tmp_path):
    grey = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)
    images = {"a.tif": grey, "b.png": (grey * 65535).astype(np.uint16), "c.png": (grey * 255).astype(np.uint8)}
    path = write(tmp_path, [])
    for name, pixels in images.items():
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    content = {
        "images": [image(i, name) for i, name in enumerate(images)],
        "annotations": [annotation(square_as("polygon"), i, i) for i in range(3)],
    }
    path.write_text(json.dumps(content))
    for sample, name in zip(CocoMasks(path), images, strict=False):
        seen = image_to_array(tmp_path / "images" / name)
        seen = seen if seen.dtype == np.float32 else seen / 255
        assert np.abs(np.asarray(sample.image).transpose(2, 0, 1) / 255 - seen).max() <= 0.5 / 255 + 1e-6


def test_of_an_animation_the_first_frame_is_used(tmp_path):
    path = write(
        tmp_path, [], content={"images": [image(7, "a.gif")], "annotations": [annotation(square_as("polygon"))]}
    )
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "images" / "a.gif", save_all=True, append_images=frames[1:])
    assert CocoMasks(path)[0].image.getpixel((0, 0))[0] > 200


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
