"""Annotations: whatever a file holds, there are masks or a clear error."""

import json
from pathlib import Path

import pytest
from fuzz import ANYTHING, COORDINATE, NUMBERS, examples
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hf_efficientsam.training.data.coco import CocoMasks, decode_rles

SEGMENTATION = st.one_of(
    st.lists(st.lists(COORDINATE, max_size=8), max_size=2),
    st.fixed_dictionaries({"size": st.just([12, 20]), "counts": st.one_of(st.lists(NUMBERS, max_size=4), st.text())}),
    st.just({"size": [12, 20], "counts": [100, 20, 120]}),
    ANYTHING,
)
ANNOTATION = st.fixed_dictionaries(
    {"image_id": st.one_of(st.just(1), ANYTHING), "segmentation": SEGMENTATION},
    optional={name: ANYTHING for name in ("id", "category_id", "iscrowd")},
)
RECORD = st.builds(
    lambda changes: {"file_name": "a.png", "id": 1, "width": 20, "height": 12} | changes,
    st.dictionaries(
        st.sampled_from(["file_name", "coco_url", "id", "width", "height", "source"]), ANYTHING, max_size=2
    ),
)


@examples(80)
@given(st.lists(st.one_of(RECORD, RECORD, ANYTHING), max_size=2), st.lists(ANNOTATION, max_size=3))
def test_any_annotations(annotations_folder, records, annotations):
    path = annotations_folder / "masks.json"
    path.write_text(json.dumps({"images": records, "annotations": annotations}, default=str))
    try:
        dataset = CocoMasks(path)
        masks = [decode_rles(dataset[i].rles) for i in range(len(dataset))]
    except (ValueError, FileNotFoundError) as error:
        assert str(error)
        return
    assert all(of_image.shape[1:] == (12, 20) and of_image.any((1, 2)).all() for of_image in masks)


@pytest.fixture(scope="module")
def annotations_folder(tmp_path_factory) -> Path:
    """A folder with images/a.png."""
    folder = tmp_path_factory.mktemp("annotations")
    (folder / "images").mkdir()
    Image.new("RGB", (20, 12), (200, 10, 10)).save(folder / "images" / "a.png")
    return folder
