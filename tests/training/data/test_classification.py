import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tars import write_shard
from torch.utils.data import DataLoader

from hf_efficientsam.training.data.classification import (
    ClassFolders,
    ClassSourceConfig,
    ClassViewConfig,
    ClassViews,
    DatasetClasses,
    EvaluationBatches,
    Patterns,
    ShardClasses,
    StreamedClassViews,
    draw_mixing,
    open_test,
    open_train,
)

CLASSES = ["ash", "birch", "cedar"]
PLAIN = {"rand_augment": 0, "erasing": 0, "mixup": 0, "cutmix": 0}


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    Image.fromarray(coarse).resize((50, 40), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Three images of each of three classes."""
    for number in range(9):
        path = tmp_path / "folder" / CLASSES[number // 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number))
    return tmp_path / "folder"


@pytest.fixture
def shards(tmp_path) -> list[str]:
    """The same in two shards."""
    for shard in range(2):
        members = {}
        for number in range(shard, 9, 2):
            members |= {f"{number}.png": encoded(number), f"{number}.cls": str(number // 3).encode()}
        write_shard(tmp_path / f"{shard}.tar", members)
    return [f"{tmp_path}/{{0..1}}.tar"]


def content(source) -> list:
    return [(image.tobytes(), label) for _, image, label in (source[i] for i in range(len(source)))]


def same(one: dict, other: dict) -> bool:
    assert one.keys() == other.keys()
    return all(np.array_equal(one[name], other[name]) for name in one)


# Sources


def test_folders_datasets_and_shards_hold_the_same(folder, shards, tmp_path):
    folders = ClassFolders(folder)
    assert folders.classes == CLASSES and folders.labels == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [folders[i][0] for i in (0, 8)] == ["ash/0.png", "cedar/8.png"]
    rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(9)]}
    kinds = {
        "names": (datasets.ClassLabel(names=CLASSES), folders.labels),
        "strings": (datasets.Value("string"), [CLASSES[label] for label in folders.labels]),
    }
    for kind, (feature, labels) in kinds.items():
        features = datasets.Features({"image": datasets.Image(), "kind": feature})
        datasets.Dataset.from_dict(rows | {"kind": labels}, features).save_to_disk(tmp_path / kind)
        source = DatasetClasses(str(tmp_path / kind), "train", label_column="kind")
        assert list(source.classes) == CLASSES and content(source) == content(folders), kind
    source = ShardClasses(shards, CLASSES)
    streamed = [(image.tobytes(), label) for shard in range(2) for _, (image, label) in source.read(shard)]
    assert sorted(streamed) == sorted(content(folders))


def test_what_is_no_class(folder, shards, tmp_path):
    (folder / "notes.txt").write_text("")
    (folder / ".hidden").mkdir()
    assert ClassFolders(folder).classes == CLASSES
    with pytest.raises(ValueError, match="at least two classes"):
        ClassFolders(folder / "ash")
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds only 0 images"):
        ClassFolders(folder)
    for number, found in ((b"3", "is 3, of 3 classes"), (b"ash", "is not a number")):
        write_shard(tmp_path / "0.tar", {"1.png": encoded(1), "1.cls": b"2", "2.png": encoded(2), "2.cls": number})
        with pytest.warns(UserWarning, match=found):
            assert [label for _, (_, label) in ShardClasses(shards, CLASSES).read(0)] == [2]
    rows = {"image": [{"bytes": encoded(0), "path": None}] * 2, "label": [0, -1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(ValueError, match=r"Row 1 of .* has no class"):
        DatasetClasses(str(tmp_path / "unlabelled"), "train")
    with pytest.raises(ValueError, match="no column kind; set the label column to one of image, label"):
        DatasetClasses(str(tmp_path / "unlabelled"), "train", label_column="kind")


def test_exactly_one_source(folder, shards, tmp_path):
    with pytest.raises(ValueError, match="Give one of --train"):
        open_train(ClassSourceConfig(train=str(folder), dataset="some"))
    with pytest.raises(ValueError, match="Give images to evaluate on"):
        open_test(ClassSourceConfig(train=str(folder)))
    with pytest.raises(ValueError, match="not both"):
        open_test(ClassSourceConfig(test=str(folder), test_shards=shards))
    with pytest.raises(ValueError, match="give --class_names"):
        open_train(ClassSourceConfig(shards=shards))
    for text in ("ash\n", "ash\nash\n"):
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(ValueError, match="at least two classes, and none twice"):
            open_test(ClassSourceConfig(test_shards=shards, class_names=str(tmp_path / "names.txt")))
    (tmp_path / "names.txt").write_text("ash\nbirch\n cedar\n\n")
    assert open_train(ClassSourceConfig(shards=shards, class_names=str(tmp_path / "names.txt"))).classes == CLASSES


def test_patterns_are_of_their_classes():
    source = Patterns(8, seed=0)
    assert [source[i][2] for i in range(8)] == [0, 1, 2, 3] * 2
    assert source[3][1].tobytes() == Patterns(8, seed=0)[3][1].tobytes() != Patterns(8, seed=1)[3][1].tobytes()
    for i in range(8):
        pixels = np.array(source[i][1])
        bright = pixels.min(-1) >= 150
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 2 and (bright | (pixels.max(-1) < 100)).all()
        kinds = [len(np.unique(bright, axis=axis)[0 if axis else slice(None)]) for axis in (0, 1)]  # of rows, columns
        assert kinds == [[2, 2], [1, 2], [2, 2], [2, 1]][i % 4]
        assert bright.mean() == pytest.approx([0.5, 0.5, 0.25, 0.5][i % 4], abs=0.15)


# Views


def test_an_item_depends_on_seed_epoch_and_key_alone(folder):
    options = ClassViewConfig(size=32)
    one, other = ClassViews(ClassFolders(folder), options), ClassViews(ClassFolders(folder, limit=3), options)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for number, row in enumerate(other.source.rows):
        assert same(one[row], other[number])
    assert torch.equal(torch.get_rng_state(), before)
    first = [one[i] for i in range(9)]
    assert one[0]["pixel_values"].dtype == torch.uint8 and one[0]["pixel_values"].shape == (3, 32, 32)
    for change in ("epoch", "seed"):
        changed = ClassViews(ClassFolders(folder), options, seed=int(change == "seed"))
        changed.set_epoch(int(change == "epoch"))
        assert not any(torch.equal(changed[i]["pixel_values"], first[i]["pixel_values"]) for i in range(9))
    workers = DataLoader(one, batch_size=4, num_workers=2)
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in workers])[8], first[8]["pixel_values"])


def test_each_augmentation_does_its_part(folder):
    def views(**options):
        return [ClassViews(ClassFolders(folder), ClassViewConfig(size=32, **PLAIN | options))[i] for i in range(9)]

    whole = [np.array(ClassFolders(folder)[i][1].resize((32, 32), Image.Resampling.BICUBIC)) for i in range(9)]
    for item, image in zip(views(crop_scale=1, flip=False), whole, strict=True):  # the aspect ratio still varies
        assert np.abs(item["pixel_values"].permute(1, 2, 0).numpy().astype(int) - image).mean() < 40
        assert item["ratio"] == 1 and not item["box"].any()
    plain, flipped = (torch.stack([item["pixel_values"] for item in views(flip=flip)]) for flip in (False, True))
    mirrored = [torch.equal(one.flip(-1), other) for one, other in zip(plain, flipped, strict=True)]
    assert 0 < sum(mirrored) < 9 and sum((plain == flipped).flatten(1).all(1)) == 9 - sum(mirrored)
    augmented = torch.stack([item["pixel_values"] for item in views(rand_augment=2, flip=False)])
    assert not (plain == augmented).flatten(1).all(1).any()
    erased = torch.stack([item["pixel_values"] for item in views(erasing=1, flip=False)])
    grey = (erased == 115).all(1).float().mean((1, 2))
    assert ((grey + 0.01 >= 0.02) & (grey < 0.4)).all() and torch.equal(erased[erased != 115], plain[erased != 115])


def test_mixup_and_cutmix_take_turns():
    generator = np.random.default_rng(0)
    drawn = [draw_mixing(ClassViewConfig(size=64), generator) for _ in range(2000)]
    boxes = np.array([box for _, box in drawn])
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert boxes.min() == 0 and boxes.max() == 64 and (areas >= 0).all()
    cut = np.array([ratio == 1 for ratio, _ in drawn])
    assert 0.45 < cut.mean() < 0.55 and not areas[~cut].any() and (areas[cut] > 0).mean() > 0.9
    ratios = np.array([ratio for ratio, _ in drawn])[~cut]
    assert ratios.mean() == pytest.approx(0.5, abs=0.03) and ratios.std() == pytest.approx(0.31, abs=0.02)  # Beta(0.8)
    assert {draw_mixing(ClassViewConfig(size=64, cutmix=0), generator)[1] for _ in range(9)} == {(0, 0, 0, 0)}
    assert {draw_mixing(ClassViewConfig(size=64, mixup=0), generator)[0] for _ in range(9)} == {1}
    assert draw_mixing(ClassViewConfig(mixup=0, cutmix=0), generator) == (1, (0, 0, 0, 0))


def test_a_stream_gives_the_same_items(folder, shards):
    options = ClassViewConfig(size=32)
    streamed = StreamedClassViews(ShardClasses(shards, CLASSES), options, shuffle_buffer=4)
    items = [item for item, _ in zip(streamed, range(9), strict=False)]
    assert sorted(item["key"] for item in items) == [str(i) for i in range(9)]
    assert all(item["labels"] == int(item["key"]) // 3 for item in items)
    assert len({item["pixel_values"].sum().item() for item in items}) == 9


# Evaluation


def size_and_mean(image, return_tensors):
    """A processor, in short."""
    return {"pixel_values": torch.tensor(np.array(image), dtype=torch.float32).mean((0, 1)).view(1, 3, 1, 1)}


def test_every_image_is_evaluated_once(folder, shards):
    for source in (ClassFolders(folder), ShardClasses(shards, CLASSES)):
        whole = list(EvaluationBatches(source, size_and_mean, 2))
        assert max(len(labels) for _, labels in whole) == 2 and sum(len(labels) for _, labels in whole) == 9
        rows = [
            (*pixels.flatten().tolist(), label.item()) for batch in whole for pixels, label in zip(*batch, strict=True)
        ]
        assert len(set(rows)) == 9
        for workers in (0, 2):
            parts = [
                batch
                for process in range(3)
                for batch in DataLoader(
                    EvaluationBatches(source, size_and_mean, 2, process, 3), None, num_workers=workers
                )
            ]
            assert sorted(repr(tuple(batch)) for batch in parts) == sorted(map(repr, whole))
