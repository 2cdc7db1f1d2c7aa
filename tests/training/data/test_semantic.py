import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Mask2FormerImageProcessorPil

from hf_efficientsam.training.data.semantic import (
    NO_CLASS,
    EvaluationImages,
    LabelledImages,
    LabelSourceConfig,
    SemanticCropConfig,
    SemanticCrops,
    Shapes,
    open_source,
    random_scale_crop,
)

NAMES = ["sky", "void", "road", "tree"]


def write(folder, labels="labels", names=NAMES, values=(0, 1, 2, 3), part="", suffix=".jpg", size=(40, 32)):
    """Two images and their label pictures: upright bars of the values."""
    bars = np.repeat(values, -(-size[0] // len(values)))[: size[0]].astype(np.uint8)
    for name in ("a", "b"):
        for kind in ("images", labels):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (200, 100, 50)).save(folder / "images" / part / f"{name}{suffix}")
        Image.fromarray(np.tile(bars, (size[1], 1))).save(folder / labels / part / f"{name}.png")
    if names is not None:
        (folder / "labels.json").write_text(json.dumps(names))
    return folder


# ----------------------------------------------------------------------------------------------------- sources


def test_a_folder_of_images_and_labels(tmp_path):
    source = LabelledImages(write(tmp_path))
    assert source.classes == NAMES and len(source) == 2
    key, image, labels = source[1]
    assert (key, image.size, labels.shape, labels.dtype) == ("b.jpg", (40, 32), (32, 40), np.uint8)
    assert np.unique(labels).tolist() == [0, 1, 2, 3]


def test_a_name_that_is_ignored_is_left_out_and_the_others_move_up(tmp_path):
    source = LabelledImages(write(tmp_path), ignore_label=1)
    assert source.classes == ["sky", "road", "tree"]
    assert source[0][2][0, [0, 10, 20, 30]].tolist() == [0, NO_CLASS, 1, 2]


def test_names_may_lie_one_folder_up_and_255_is_no_class(tmp_path):
    write(tmp_path / "train", names=None, values=(0, 1, 255))
    (tmp_path / "labels.json").write_text(json.dumps(NAMES))
    assert np.unique(LabelledImages(tmp_path / "train")[0][2]).tolist() == [0, 1, NO_CLASS]


def test_ade20k(tmp_path):
    """Names in its own file, 0 for no class, training and validation under one roof."""
    for part, values in (("training", (0, 1, 3)), ("validation", (2, 2, 2))):
        write(tmp_path, "annotations", None, values, part)
    rows = ["Idx\tRatio\tName", "1\t0.16\twall", "2\t0.1\tbuilding, edifice", "3\t0.1\tsky", ""]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows))
    with pytest.raises(ValueError, match="0 is no class; give --reduce_labels true"):
        open_source(LabelSourceConfig(train=str(tmp_path)), test=False)
    options = LabelSourceConfig(train=str(tmp_path), test=str(tmp_path), reduce_labels=True)
    train, test = open_source(options, test=False), open_source(options, test=True)
    assert train.classes == test.classes == ["wall", "building", "sky"]
    assert np.unique(train[0][2]).tolist() == [0, 2, NO_CLASS] and np.unique(test[0][2]).tolist() == [1]


def broken(folder, change):
    if change == "name":
        (folder / "labels.json").write_text(json.dumps(NAMES[:3]))
    elif change == "missing":
        (folder / "labels" / "b.png").unlink()
    elif change == "no image":
        (folder / "labels" / "b.png").write_bytes(b"no image")
    elif change == "jpeg":
        Image.open(folder / "labels" / "b.png").save(folder / "labels" / "b.jpg")
        (folder / "labels" / "b.png").unlink()
    elif change == "one class":
        (folder / "labels.json").write_text(json.dumps(NAMES[:1]))
    elif change == "no names":
        (folder / "labels.json").unlink()
    elif change == "twice":
        (folder / "labels.json").write_text(json.dumps([*NAMES, NAMES[0]]))
    elif change == "no json":
        (folder / "labels.json").write_text('["a",')
    elif change == "no list":
        (folder / "labels.json").write_text("{}")
    else:
        Image.new(*change).save(folder / "labels" / "b.png")
    return folder


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("twice", "has a name twice"),
        ("no json", "labels.json is not valid json"),
        ("name", "has the value 3, which has no name; name it or set --ignore_label."),
        ("missing", "b.png; every image needs one."),
        ("no image", "b.png cannot be read as an image"),
        ("one class", "must have 2 to 255 classes, and has 1."),
        ("no names", "needs a labels.json"),
        ("no list", "must be a list of names."),
        (("RGB", (40, 32)), "b.png is RGB in PNG; labels are 8-bit"),
        ("jpeg", "b.jpg is L in JPEG; labels are 8-bit, one value a pixel, and no JPEG"),
        (
            ("L", (20, 32)),
            "b.png does not fit its image: it is 40 x 32 pixels, its masks are 20 x 32",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, sentence):
    with pytest.raises(ValueError) as error:
        LabelledImages(broken(write(tmp_path), change))[1]
    assert sentence in str(error.value)


def test_images_must_be_given(tmp_path):
    with pytest.raises(ValueError, match="Give images: --test a folder"):
        open_source(LabelSourceConfig(train="shapes"), test=True)
    with pytest.raises(ValueError, match="There is no folder"):
        LabelledImages(tmp_path)


def test_camvid(shared):
    source = LabelledImages(shared / "data" / "semantic" / "val", ignore_label=11)
    assert len(source) == 50 and len(source.classes) == 11 and "Unlabelled" not in source.classes
    _, image, labels = source[0]
    assert image.size == (480, 360) and set(np.unique(labels)) <= {*range(11), NO_CLASS}


def test_made_up_shapes():
    source = Shapes(6, seed=0)
    image, labels = source[2][1:]
    pixels = np.array(image)
    for label in np.unique(labels):  # a colour each
        assert len(np.unique(pixels[labels == label], axis=0)) == 1
    assert not np.array_equal(labels, source[3][2]) and not np.array_equal(labels, Shapes(6, seed=1)[2][2])


# ------------------------------------------------------------------------------------------------------- crops


def test_a_crop_depends_on_seed_epoch_and_key_alone():
    def item(seed, epoch, index):
        data = SemanticCrops(Shapes(4, 0), SemanticCropConfig(size=32), seed)
        data.set_epoch(epoch)
        return data[index]

    first, again = item(0, 1, 2), item(0, 1, 2)
    assert first["key"] == "0/2" and first["seed"] == again["seed"]
    assert torch.equal(first["pixel_values"], again["pixel_values"]) and torch.equal(first["labels"], again["labels"])
    assert len({first["seed"], item(0, 2, 2)["seed"], item(1, 1, 2)["seed"], item(0, 1, 3)["seed"]}) == 4


def test_labels_stay_with_their_pixels():
    """Each shape has a colour of its own, so a crop's pixels say what its labels must be."""
    source, options = Shapes(8, 0), SemanticCropConfig(size=96, min_scale=0.5, max_scale=2, color_jitter=0)
    data = SemanticCrops(source, options)
    for index in range(len(source)):
        item = data[index]
        _, image, labels = source[index]
        colors = torch.stack(
            [
                torch.tensor(np.array(image)[labels == label][0])
                if (labels == label).any()
                else torch.full((3,), -999)
                for label in range(4)
            ]
        ).float()
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
        pixels = (item["pixel_values"].permute(1, 2, 0) * std + mean) * 255
        known = item["labels"] != NO_CLASS
        nearest = (pixels[known][:, None] - colors).abs().sum(2).argmin(1)
        assert (nearest == item["labels"][known]).float().mean() > 0.95  # but where two colours blend at an edge
        assert not item["pixel_values"][:, ~known].any()


def test_crops_show_images_at_every_scale():
    options, generator = SemanticCropConfig(size=32, min_scale=0.5, max_scale=2), np.random.default_rng(0)
    scales, whole = [], 0
    for _ in range(300):
        (left, top, right, bottom), (width, height) = random_scale_crop(120, 80, options, generator)
        assert 0 <= left < right <= 120.001 and 0 <= top < bottom <= 80.001 and max(width, height) <= 32
        scales.append(80 / 32 * height / (bottom - top))
        whole += height < 32
    assert 0.5 <= min(scales) < 0.55 and 1.95 < max(scales) < 2.05
    assert 60 < whole < 140  # a third of the scales is below 1


def test_images_to_evaluate_on_keep_the_size_of_their_labels(tmp_path):
    processor = Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 256}, size_divisor=32)
    pixel_values, labels = EvaluationImages(LabelledImages(write(tmp_path)), processor)[0]
    assert pixel_values.shape == (1, 3, 64, 96) and labels.shape == (32, 40)
