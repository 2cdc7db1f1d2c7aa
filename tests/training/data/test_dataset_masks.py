import io
import json
import pickle
from dataclasses import replace

import datasets
import numpy as np
import pytest
from datasets import Features, Json, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from pycocotools import mask as rle_codec
from torch.utils.data import DataLoader

from hf_efficientsam.training.data import images as images_module
from hf_efficientsam.training.data.coco import decode_rles
from hf_efficientsam.training.data.dataset_masks import DatasetMasks

# Two objects in an image of 8 x 6 pixels: 12 pixels and 4 pixels.
MASKS = np.zeros((2, 6, 8), np.uint8)
MASKS[0, 1:4, 2:6] = 1
MASKS[1, 4:6, 6:8] = 1
MAP = MASKS[0] * 3 + MASKS[1] * 7

POLYGON = List(List(Value("float32")))
RLE = {"size": List(Value("int32")), "counts": Value("string")}
RUNS = {"size": List(Value("int32")), "counts": List(Value("int32"))}


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encoded(pixels, mode=None, file_format="PNG", **options):
    """A file with an image of these pixels, or of this size."""
    image = Image.new("RGB", pixels, (10, 20, 30)) if isinstance(pixels, tuple) else Image.fromarray(pixels)
    if mode == "P":
        image.putpalette(list(range(256)) * 3)
    elif mode:
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def polygon(x0, y0, x1, y1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def rle(mask):
    compressed = rle_codec.encode(np.asfortranarray(mask))
    return {"size": [6, 8], "counts": compressed["counts"].decode()}


def runs(mask):
    flat = np.append(mask.ravel("F"), 2).astype(int)
    ends = np.flatnonzero(np.diff(flat)) + 1
    return {"size": [6, 8], "counts": np.diff(ends, prepend=0).tolist()}


POLYGONS = [polygon(2, 1, 6, 4), polygon(6, 4, 8, 6)]
RLES = [rle(mask) for mask in MASKS]


def save(folder, feature, rows, image=None):
    """A dataset with these rows in the column `masks`, as `save_to_disk` writes it; returns its path."""
    features = Features({"image": ImageFeature(), "masks": feature, "label": Value("int64")})
    columns = {"image": [image or encoded((8, 6))] * len(rows), "masks": rows, "label": list(range(len(rows)))}
    datasets.Dataset.from_dict(columns, features).save_to_disk(folder / "saved")
    return str(folder / "saved")


KINDS = {
    "map L": (ImageFeature(), encoded(MAP)),
    "map P": (ImageFeature(), encoded(MAP, "P")),
    "map in colours": (ImageFeature(), encoded(np.stack([MAP, 0 * MAP, 9 * (MAP == 3)], 2).astype(np.uint8))),
    "map RGBA": (ImageFeature(), encoded(MAP, "RGBA")),
    "map I;16": (ImageFeature(), encoded(MAP.astype(np.uint16) * 1000)),
    "map I": (ImageFeature(), encoded(MAP.astype(np.int32) * 1000, file_format="TIFF")),
    "images 1": (List(ImageFeature()), [encoded(mask.astype(bool)) for mask in MASKS]),
    "images L": (List(ImageFeature()), [encoded(mask * 255) for mask in MASKS]),
    "polygons": (List(POLYGON), POLYGONS),
    "compressed": (List(RLE), RLES),
    "compressed bytes": (
        List({**RLE, "counts": Value("binary")}),
        [{**one, "counts": one["counts"].encode()} for one in RLES],
    ),
    "uncompressed": (List(RUNS), [runs(mask) for mask in MASKS]),
    "json of both": (List(Json()), [POLYGONS[0], RLES[1]]),
    "annotations": (
        List({"id": Value("int64"), "segmentation": RLE}),
        [{"id": i, "segmentation": one} for i, one in enumerate(RLES)],
    ),
    "annotation lists": (
        {"id": List(Value("int64")), "segmentation": List(POLYGON)},
        {"id": [0, 1], "segmentation": POLYGONS},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_column_gives_the_same_masks(tmp_path, kind):
    feature, value = KINDS[kind]
    source = DatasetMasks(save(tmp_path, feature, [value, value]))
    assert len(source) == len(list(source)) == 2
    for row, sample in enumerate(source):
        assert np.array_equal(decode_rles(sample.rles), MASKS)
        assert all(isinstance(one["counts"], bytes) and one["size"] == [6, 8] for one in sample.rles)
        assert sample.image.mode == "RGB" and sample.image.size == (8, 6)
        assert (sample.image_id, sample.annotation_ids) == (row, [row * 100_000, row * 100_000 + 1])
        assert sample.source == str(tmp_path / "saved")


def test_a_binary_mask_is_one_object(tmp_path):
    sample = DatasetMasks(save(tmp_path, ImageFeature(), [encoded(MAP > 0)]))[0]
    assert np.array_equal(decode_rles(sample.rles), [MAP > 0])


def test_an_image_of_one_object_may_have_several_values(tmp_path):
    values = MASKS[0] * np.arange(256, 256 * 9, 256, dtype=np.uint16)  # neighbours, 0 in 8 bits
    sample = DatasetMasks(save(tmp_path, List(ImageFeature()), [[encoded(values)]]))[0]
    assert np.array_equal(decode_rles(sample.rles), MASKS[:1])


def test_parquet_slices_and_other_columns(tmp_path):
    features = Features({"photo": ImageFeature(), "objects": List(RLE)})
    columns = {"photo": [encoded((8, 6))] * 3, "objects": [RLES, RLES[:1], RLES[1:]]}
    dataset = datasets.Dataset.from_dict(columns, features)
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(tmp_path / "parquet" / "train-00000.parquet")
    name = str(tmp_path / "parquet")
    for split, first in (("train", 0), ("train[1:]", 1)):
        source = DatasetMasks(name, split, image_column="photo", mask_column="objects")
        assert [len(sample.rles) for sample in source] == [2, 1, 1][first:]
    assert [sample.image_id for sample in source] == [0, 1], "of the slice"


def test_jsonl_of_annotations_as_coco_has_them(tmp_path):
    """Polygons, and RLE for the crowd, which is left out."""
    (tmp_path / "own").mkdir()
    (tmp_path / "a.png").write_bytes(encoded((8, 6))["bytes"])
    crowd = {"segmentation": runs(MASKS[0]), "iscrowd": 1}
    row = {"image": str(tmp_path / "a.png"), "masks": [crowd, {"segmentation": POLYGONS[1], "iscrowd": 0}]}
    (tmp_path / "own" / "train.jsonl").write_text(json.dumps(row))
    sample = DatasetMasks(str(tmp_path / "own"))[0]
    assert np.array_equal(decode_rles(sample.rles), MASKS[1:]) and sample.annotation_ids == [1]


@pytest.mark.parametrize("as_lists", [False, True])
def test_crowds_are_left_out(tmp_path, as_lists):
    feature = {"segmentation": POLYGON, "iscrowd": Value("int64")}
    value = [{"segmentation": one, "iscrowd": i} for i, one in enumerate(POLYGONS)]
    if as_lists:
        feature = {key: List(inner) for key, inner in feature.items()}
        value = {key: [one[key] for one in value] for key in feature}
    sample = DatasetMasks(save(tmp_path, feature if as_lists else List(feature), [value]))[0]
    assert np.array_equal(decode_rles(sample.rles), MASKS[:1])


def test_small_masks_are_left_out(tmp_path):
    name = save(tmp_path, List(POLYGON), [[[], *POLYGONS[::-1]], POLYGONS[1:]])
    assert DatasetMasks(name)[0].annotation_ids == [1, 2], "nothing is drawn in the first"
    source = DatasetMasks(name, min_area=5)
    assert source[0].annotation_ids == [2] and np.array_equal(decode_rles(source[0].rles), MASKS[:1])
    assert len(source) == 2, "which masks are small shows when they are read"
    with pytest.warns(UserWarning, match="Row 1 of .* has no mask of 5 pixels; the next comes in its place"):
        assert source[1].annotation_ids == [2] and source[1].image_id == 0
    nothing = DatasetMasks(name, min_area=1000)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"No row of .* has a mask of 1000 pixels"):
        nothing[1]


@pytest.mark.parametrize("kind", ["map L", "images L", "polygons", "annotations", "annotation lists"])
def test_rows_that_list_no_mask_are_left_out(tmp_path, kind):
    feature, value = KINDS[kind]
    empty = [None] if kind == "map L" else [None, {"id": [], "segmentation": []} if kind == "annotation lists" else []]
    source = DatasetMasks(save(tmp_path, feature, [*empty, value, *empty, value]))
    assert [sample.image_id for sample in source] == [len(empty), 2 * len(empty) + 1]
    with pytest.raises(ValueError, match=r"column masks of .*saved, split train, lists no mask"):
        DatasetMasks(save(tmp_path / "none", feature, empty))


def test_image_and_masks_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    mask = encoded(np.ascontiguousarray(np.rot90(MAP)), exif=exif)
    sample = DatasetMasks(save(tmp_path, ImageFeature(), [mask], encoded((6, 8), exif=exif)))[0]
    assert sample.image.size == (8, 6) and np.array_equal(decode_rles(sample.rles), MASKS)


def test_a_column_or_split_that_does_not_fit_is_named(tmp_path):
    name = save(tmp_path, List(POLYGON), [POLYGONS])
    with pytest.raises(ValueError, match="no column mask; set the mask column to one of image, masks, label"):
        DatasetMasks(name, mask_column="mask")
    with pytest.raises(ValueError, match="no column photo; set the image column to one of image, masks, label"):
        DatasetMasks(name, image_column="photo")
    datasets.DatasetDict(train=datasets.load_from_disk(name)).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="has no split val; set it to one of train"):
        DatasetMasks(str(tmp_path / "splits"), "val")
    (tmp_path / "parquet").mkdir()
    datasets.load_from_disk(name).select([]).to_parquet(tmp_path / "parquet" / "train.parquet")
    with pytest.raises(ValueError, match=r"split train of .*parquet cannot be loaded: .*no data"):
        DatasetMasks(str(tmp_path / "parquet"))
    with pytest.raises(ValueError, match="saved has a split without rows"):
        DatasetMasks(save(tmp_path / "empty", List(POLYGON), []))


@pytest.mark.parametrize(
    ("feature", "value"),
    [
        (Value("int64"), 1),
        (Value("string"), "a.png"),
        (List(Value("float32")), [1.0] * 6),
        (POLYGON, POLYGONS[0]),
        (List(List(List(Value("string")))), [[["1"]]]),
        (List({"bbox": List(Value("float32"))}), [{"bbox": [1.0]}]),
        (ImageFeature(decode=False), encoded(MAP)),
    ],
    ids=["number", "text", "numbers", "one polygon an object", "texts", "boxes", "not decoded"],
)
def test_a_column_of_another_kind_is_refused(tmp_path, feature, value):
    with pytest.raises(ValueError, match=r"column masks of .*saved holds .*, not masks .*; set another or cast it"):
        DatasetMasks(save(tmp_path, feature, [value]))


WRONG = {
    "floats": (ImageFeature(), encoded(MAP.astype(np.float32), file_format="TIFF"), "image of mode F, but 8, 16 or"),
    "jpeg": (ImageFeature(), encoded(MAP, file_format="JPEG"), "JPEG, whose values are not exact; save masks as PNG"),
    "map size": (ImageFeature(), encoded(MAP.T.copy()), "mask is 6 x 8 pixels, but the image is 8 x 6"),
    "image size": (List(ImageFeature()), [encoded(MAP), encoded(MAP[1:])], "mask is 8 x 5 pixels"),
    "rle size": (List(RLE), [{**RLES[0], "size": [8, 6]}], r"mask size \[8, 6\] is not the image's"),
    "rle pixels": (List(RUNS), [{"size": [6, 8], "counts": [13, 3]}], "counts add up to 16 pixels of 48"),
    "file": (ImageFeature(), {"bytes": b"no image", "path": None}, "cannot identify image file"),
    "null image": (List(ImageFeature()), [None], "NoneType"),
    "null polygons": (List(POLYGON), [None], "NoneType"),
    "nan": (List(POLYGON), [[[float("nan")] * 6]], "corner of a polygon"),
    "json": (List(Json()), ["text"], "TypeError"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_row_that_does_not_fit_is_named(tmp_path, kind):
    feature, value, message = WRONG[kind]
    good = encoded(MAP) if isinstance(feature, ImageFeature) else []
    source = DatasetMasks(save(tmp_path, feature, [good, value]))
    with pytest.raises(ValueError, match=f"Row 1 of .*saved, split train, has masks that cannot be used .*{message}"):
        source[len(source) - 1]


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    source = DatasetMasks(save(tmp_path, List(POLYGON), [POLYGONS], {"bytes": b"no image", "path": None}))
    with pytest.raises(ValueError, match=r"Row 0 of .*saved, split train, cannot be read as an image"):
        source[0]


def same(one, other):
    return one.image.tobytes() == other.image.tobytes() and (one.rles, one.annotation_ids, one.image_id) == (
        other.rles,
        other.annotation_ids,
        other.image_id,
    )


def test_source_can_be_pickled(tmp_path):
    feature, value = KINDS["images L"]
    source = DatasetMasks(save(tmp_path, feature, [value] * 3))
    assert same(pickle.loads(pickle.dumps(source))[2], source[2])


def test_masks_can_be_read_without_decoding_the_image(tmp_path, monkeypatch):
    dataset = DatasetMasks(save(tmp_path, List(ImageFeature()), [[encoded(mask) for mask in MASKS]]))
    whole = dataset[0]
    monkeypatch.setattr(images_module, "decode_image", None)
    assert dataset.without_image(0) == replace(whole, image=None)


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_the_same(tmp_path, context):
    feature, value = KINDS["map L"]
    source = DatasetMasks(save(tmp_path, feature, [value] * 3))
    loader = DataLoader(source, batch_size=None, num_workers=1, multiprocessing_context=context)
    assert all(same(one, other) for one, other in zip(loader, source, strict=True))
