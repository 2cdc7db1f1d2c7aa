"""`training/filter_annotations.py`."""

import json

import pytest
from script_runs import refuse, run


@pytest.fixture
def annotations(tmp_path):
    """Six images, every second of source "b", each with two annotations."""
    (tmp_path / "images").mkdir()
    images = [
        {"id": i, "file_name": f"{i}.jpg", "width": 8, "height": 8, "source": "ab"[i % 2], "license": i}
        for i in range(6)
    ]
    masks = [{"id": i, "image_id": i // 2, "segmentation": []} for i in range(12)]
    content = {"images": images, "annotations": masks, "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "all.json").write_text(json.dumps(content))
    return tmp_path / "all.json"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], [0, 1, 2, 3, 4, 5]),
        (["--sources", "b"], [1, 3, 5]),
        (["--sources", "b", "--limit", 2], [1, 3]),
        (["--sources", "a", "b", "--limit", 3], [0, 2, 4]),
        (["--limit", 99], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_images_and_their_masks_are_kept_whole(annotations, options, expected):
    output = annotations.parent / "some" / "instances.json"
    run("filter_annotations", "--annotations", annotations, "--output", output, *options)
    written, everything = json.loads(output.read_text()), json.loads(annotations.read_text())
    assert written["images"] == [everything["images"][i] for i in expected]
    assert [one["image_id"] for one in written["annotations"]] == [i for i in expected for _ in range(2)]
    assert written["categories"] == everything["categories"]
    assert (output.parent / "images").resolve() == (annotations.parent / "images").resolve()


def test_bad_input_is_refused_in_one_sentence(annotations, tmp_path):
    given = ["--annotations", annotations, "--output", tmp_path / "some" / "x.json"]
    assert "no image has this source" in refuse("filter_annotations", *given, "--sources", "c")
    (tmp_path / "other" / "images").mkdir(parents=True)
    assert "in a folder of its own" in refuse("filter_annotations", *given[:3], tmp_path / "other" / "x.json")
    assert "Give --annotations" in refuse("filter_annotations")
