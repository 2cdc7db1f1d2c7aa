"""YOLO datasets and folders of labelme's files as data: what is read, what is left out, what is refused."""

import base64
import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_efficientsam import SegmentationResult
from hf_efficientsam.inference.results import boxes_from_masks_np
from hf_efficientsam.training.data.coco import AnnotationConfig, CocoMasks, decode_rles
from hf_efficientsam.training.data.folder_masks import FolderMasks, open_annotations

HEIGHT, WIDTH = 60, 80
TRIANGLE = "0.1 0.1 0.9 0.1 0.5 0.9"


def disc(radius, x, y):
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


MASKS = np.stack([disc(20, 30, 30) & ~disc(8, 30, 30), disc(8, 60, 12) | disc(7, 65, 45)])


def write_image(path: Path, size=(WIDTH, HEIGHT), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "gray").save(path, **options)
    return path


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def result():
    scores = np.float32([0.9, 0.8])
    return SegmentationResult(MASKS, scores, scores, boxes_from_masks_np(MASKS), ["dog", "cat"])


def names_of(data: CocoMasks, index: int) -> list[str]:
    names = {category["id"]: category["name"] for category in data.categories}
    return [names[number] for number in data.category_ids[index]]


# ------------------------------------------------------------------------------------------ round trips


def test_what_yolo_writes_is_read_as_the_same_masks(tmp_path, result):
    write_image(tmp_path / "set/images/sub/a.jpg")
    write(tmp_path / "set/labels/sub/a.txt", result.yolo(tolerance=0))
    write(tmp_path / "set/data.yaml", f"train: images\nval: images\nnames: {json.dumps(result.categories)}\n")
    for path in (tmp_path / "set", tmp_path / "set/data.yaml"):
        data = open_annotations(path)
        assert np.array_equal(decode_rles(data[0].rles), MASKS)
        assert names_of(data, 0) == ["dog", "cat"] and data[0].image.size == (WIDTH, HEIGHT)
        assert data[0].source == "set"


def test_what_labelme_writes_is_read_as_the_same_masks(tmp_path, result):
    write_image(tmp_path / "photos/a.jpg")
    write(tmp_path / "labelme/a.json", result.labelme("../photos/a.jpg", tolerance=0))
    data = open_annotations(tmp_path / "labelme")
    masks = dict(zip(names_of(data, 0), decode_rles(data[0].rles), strict=True))
    assert len(masks) == 2
    assert np.array_equal(masks["dog"], MASKS[0]) and np.array_equal(masks["cat"], MASKS[1])


# ------------------------------------------------------------------------------------------ YOLO


def yolo_set(folder: Path, **settings: str) -> Path:
    """A dataset of two splits as Roboflow exports it, with other settings of data.yaml if given."""
    for split, kind in (("train", 0), ("valid", 1)):
        write_image(folder / split / "images/a.jpg")
        write(folder / split / "labels/a.txt", f"{kind} {TRIANGLE}\n")
    settings = {"train": "../train/images", "val": "../valid/images", "names": "['cat', 'dog']"} | settings
    return write(folder / "data.yaml", "".join(f"{key}: {value}\n" for key, value in settings.items()))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train": "train/images", "val": "[valid/images]", "names": "{0: cat, 1: dog}"},
        {"path": "/nowhere/else", "val": "valid.txt"},
    ],
)
def test_a_split_of_data_yaml_is_read(tmp_path, settings):
    yolo_set(tmp_path, **settings)
    write(tmp_path / "valid.txt", "./valid/images/a.jpg\n")
    for split, name in (("train", "cat"), ("val", "dog")):
        data = open_annotations(tmp_path, split=split)
        assert len(data) == 1 and names_of(data, 0) == [name]


def test_images_of_one_file_of_labels_and_images_listed_twice_are_refused(tmp_path):
    for name in ("images/a.jpg", "images/a.png", "images/b.jpg", "images/b.png"):
        write_image(tmp_path / name)
    write(tmp_path / "labels/a.txt", f"3 {TRIANGLE}\n")  # b has none, and that is the same for both
    with pytest.raises(ValueError, match=r"(?s)one file of labels.* \(1\):\s+\S+/a\.jpg and \S+/a\.png$"):
        open_annotations(tmp_path)
    (tmp_path / "images/a.png").unlink()
    assert len(open_annotations(tmp_path)) == 1
    write(tmp_path / "data.yaml", "train: [images, list.txt]\nnames: {3: cat}\n")
    write(tmp_path / "list.txt", "./images/a.jpg\n")
    with pytest.raises(ValueError, match=r"(?s)listed twice.* \(1\):\s+\S+/a\.jpg and \S+/a\.jpg$"):
        open_annotations(tmp_path)


def test_without_data_yaml_all_images_are_read_and_boxes_counted(tmp_path, caplog):
    for name in "abc":
        write_image(tmp_path / f"images/{name}.jpg")
    write(tmp_path / "labels/a.txt", f"3 {TRIANGLE}\n\n3 0.5 0.5 0.2 0.2\n")
    write(tmp_path / "labels/b.txt", "")
    with caplog.at_level(logging.WARNING):
        data = open_annotations(tmp_path)
    assert len(data) == 1 and data.categories is None and data.category_ids == [[3]]
    assert "1 boxes without a mask" in caplog.text and "2 images without a mask" in caplog.text
    assert decode_rles(data[0].rles).sum() == pytest.approx(0.8 * 0.8 / 2 * WIDTH * HEIGHT, rel=0.03)


@pytest.mark.parametrize("kind", ["yolo", "labelme"])
def test_of_annotations_without_a_size_nothing_tells_the_frame_of_a_turned_photograph(tmp_path, kind, caplog):
    exif = Image.Exif()
    exif[0x0112] = 6  # what is stored at the top is at the right
    write_image(tmp_path / "images/a.jpg", exif=exif)

    def read(frame: str | None, width: int, height: int):
        points = [[0, 0], [width, 0], [width, height / 4], [0, height / 4]]
        shape = {"label": "a", "shape_type": "polygon", "points": points}
        write(tmp_path / "a.json", {"imagePath": "images/a.jpg", "shapes": [shape]})
        caplog.clear()
        data = open_annotations(tmp_path, reading=AnnotationConfig(mask_frame=frame))
        return decode_rles(data[0].rles)[0]

    if kind == "yolo":
        write(tmp_path / "labels/a.txt", "0 0 0 1 0 1 0.25 0 0.25\n")
    for frame in (None, "upright"):
        mask = read(frame, HEIGHT, WIDTH)
        assert mask.shape == (WIDTH, HEIGHT) and mask[: WIDTH // 4].all() and not mask[WIDTH // 4 :].any()
        assert ("Give --mask_frame" in caplog.text) == (frame is None)
    mask = read("stored", WIDTH, HEIGHT)
    assert mask.shape == (WIDTH, HEIGHT) and mask[:, -HEIGHT // 4 :].all() and not mask[:, : -HEIGHT // 4].any()
    assert "EXIF" not in caplog.text


def test_labels_of_no_image_are_counted_and_hidden_folders_left_alone(tmp_path, caplog):
    for name in ("images/a.jpg", "images/.ipynb_checkpoints/a-checkpoint.jpg"):
        write_image(tmp_path / name)
    for name in ("a", "b", "sub/c", ".hidden/d"):
        write(tmp_path / f"labels/{name}.txt", f"0 {TRIANGLE}\n")
    assert len(open_annotations(tmp_path)) == 1
    assert "2 files of labels are of no image and are left out" in caplog.text and "sub/c.txt" in caplog.text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 0.1 0.1 0.9", "line 2: must be a class and the corners"),
        ("cat 0.1 0.1 0.9 0.1 0.5 0.9", "line 2: must be a class and the corners"),
        ("0 10 10 90 10 50 90", "from 0 to 1"),
        ("0 nan 0.1 0.9 0.1 0.5 0.9", "from 0 to 1"),
        (f"2 {TRIANGLE}", "there is no class 2"),
        (f"0.5 {TRIANGLE}", "there is no class 0.5"),
    ],
)
def test_a_broken_label_is_refused_with_its_line(tmp_path, line, words):
    yolo_set(tmp_path)
    file = write(tmp_path / "train/labels/a.txt", f"0 {TRIANGLE}\n{line}\n")
    with pytest.raises(ValueError, match=words) as error:
        open_annotations(tmp_path)
    assert str(file) in str(error.value)


def test_settings_that_do_not_fit_are_refused(tmp_path):
    file = yolo_set(tmp_path, val="gone/images")
    with pytest.raises(FileNotFoundError, match="gone/images, which is not there; correct its `val`"):
        open_annotations(file, split="val")
    with pytest.raises(ValueError, match="leave --images out"):
        open_annotations(file, images=tmp_path)
    write(file, "train: [")
    with pytest.raises(ValueError, match=r"no data\.yaml with `train` and `names`"):
        open_annotations(file)
    with pytest.raises(FileNotFoundError, match="no annotation file"):
        open_annotations(tmp_path / "absent.yaml")


# ------------------------------------------------------------------------------------------ labelme


def shape(kind: str, points: list, label: str = "dog", **others) -> dict:
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}} | others


def labelme(image: str, *shapes: dict) -> dict:
    return {"imagePath": image, "imageData": None, "imageHeight": HEIGHT, "imageWidth": WIDTH, "shapes": list(shapes)}


def test_polygons_circles_and_masks_are_read_and_other_shapes_counted(tmp_path, caplog):
    buffer = io.BytesIO()
    Image.fromarray(np.full((5, 4), 255, np.uint8)).save(buffer, format="png")
    png = base64.b64encode(buffer.getvalue()).decode()
    write_image(tmp_path / "a.jpg")
    shapes = [
        shape("polygon", [[0, 0], [10, 0], [10, 10], [0, 10]]),
        shape("circle", [[40, 30], [50, 30]]),
        shape("mask", [[70, 50], [73, 54]], mask=png),
        shape("rectangle", [[0, 0], [20, 20]]),
        shape("line", [[0, 0], [20, 20]]),
        shape("point", [[5, 5]]),
        shape("point", [[6, 6]]),
    ]
    write(tmp_path / "a.json", labelme("a.jpg", *shapes))
    with caplog.at_level(logging.WARNING):
        square, circle, mask = decode_rles(open_annotations(tmp_path)[0].rles).astype(bool)
    assert square[:10, :10].all() and square.sum() == 100
    assert (circle ^ disc(10, 40, 30)).sum() < 10
    assert mask[50:55, 70:74].all() and mask.sum() == 20
    for words in ("1 boxes without a mask", "1 shapes of the type line", "2 shapes of the type point"):
        assert words in caplog.text


def test_a_group_of_one_label_is_one_object(tmp_path):
    write_image(tmp_path / "a.jpg")
    squares = [[[x, 0], [x + 10, 0], [x + 10, 10], [x, 10]] for x in (0, 5, 40)]
    parts = [shape("polygon", squares[0], group_id=1), shape("polygon", squares[1], group_id=1)]
    other = shape("polygon", squares[2], "cat", group_id=1)
    write(tmp_path / "a.json", labelme("a.jpg", *parts, other))
    data = open_annotations(tmp_path)
    assert [mask.sum() for mask in decode_rles(data[0].rles)] == [150, 100] and names_of(data, 0) == ["dog", "cat"]


@pytest.mark.parametrize("name", ["..\\photos\\a.jpg", "C:\\photos\\a.jpg", "other/name.jpg"])
def test_images_are_found_where_labelme_says_or_by_name(tmp_path, name):
    write(tmp_path / "labels/a.json", labelme(name, shape("polygon", [[0, 0], [10, 0], [10, 10]])))
    with pytest.raises(FileNotFoundError, match="give the folder of the images"):
        open_annotations(tmp_path / "labels")
    write_image(tmp_path / "photos/a.jpg")
    if name.startswith("other"):
        write_image(tmp_path / "labels/a.png")  # beside the json, under its name
        data = open_annotations(tmp_path / "labels")
    else:
        data = open_annotations(tmp_path / "labels", images=tmp_path / "photos")
    assert len(data) == 1 and data[0].image.size == (WIDTH, HEIGHT)


def test_two_labelme_files_of_one_image_are_refused(tmp_path):
    write_image(tmp_path / "a.jpg")
    for name in ("a", "copy/of_a", "b"):
        content = labelme("../a.jpg" if "/" in name else "a.jpg", shape("polygon", [[0, 0], [10, 0], [10, 10]]))
        write(tmp_path / f"{name}.json", content)
    names = r"\(1\):\s+\S+/a\.json and \S+/b\.json and \S+/copy/of_a\.json$"
    with pytest.raises(ValueError, match=rf"(?s)are of one image; keep one of each {names}"):
        open_annotations(tmp_path)


def test_what_is_not_labelmes_is_named_or_refused(tmp_path, caplog):
    write_image(tmp_path / "a.jpg")
    write(tmp_path / "notes.json", {"my": "notes"})
    with pytest.raises(ValueError, match="needs the folders images/ and masks/, or images/ and labels/"):
        open_annotations(tmp_path)
    file = write(tmp_path / "a.json", labelme("a.jpg", shape("polygon", [[0, 0], [10, 0], [10, 10]])))
    with caplog.at_level(logging.WARNING):
        assert len(open_annotations(tmp_path)) == 1
    assert "not labelme's, and left out" in caplog.text and "notes.json" in caplog.text
    write(file, labelme("a.jpg", shape("circle", [[0, 0]])))
    with pytest.raises(ValueError, match=r"a\.json cannot be read"):
        open_annotations(tmp_path)


def test_a_folder_of_mask_images_stays_one(tmp_path):
    write_image(tmp_path / "images/a.jpg")
    Image.fromarray(MASKS[0]).save(write_image(tmp_path / "masks/a.png"))
    assert isinstance(open_annotations(tmp_path), FolderMasks)
