import io
import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from hf_efficientsam import EfficientSamPredictor, SegmentationResult
from hf_efficientsam.demo.outputs import FORMATS, file_of, python_code
from hf_efficientsam.demo.scene import Finding, Scene, SceneObject
from hf_efficientsam.demo.session import NothingFound, Session
from hf_efficientsam.inference.loading import load_model
from hf_efficientsam.inference.results import mask_rles
from hf_efficientsam.model.prompts_efficientsam import BOX_IS_CLIPPED

WIDTH, HEIGHT = 90, 60
LOOSE = {"points_per_side": 3, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(str(tiny_model))


@pytest.fixture
def session(model, tiny_model, image) -> Session:
    return Session(EfficientSamPredictor(*model), str(tiny_model), "photo of a dog.png", image)


def test_points_are_those_of_the_predictor(session):
    session.add_point(0.5, 0.25)
    session.add_point(0.999, 1.0, label=0)
    (one,) = session.objects
    assert one.points == ((45, 15), (89, 59)) and one.labels == (1, 0)

    masks, scores, _ = session.predictor.predict([[45, 15], [89, 59]], [1, 0])
    assert one.scores == pytest.approx(scores.clip(0, 1)) and one.chosen == scores.argmax()
    assert (session.result().masks[0] == masks[scores.argmax()]).all()
    assert [(one.mask(i) == mask).all() for i, mask in enumerate(masks)] == [True] * 3
    assert session.encode_seconds > 0 and session.answer_seconds > 0


def test_boxes_by_corners_and_by_dragging_in_any_direction(session):
    session.add_corner(0.9, 0.8)
    assert session.scene.corner == (0.9, 0.8) and not session.objects
    session.add_corner(0.1, 0.2)
    assert session.current.box == (9, 12, 81, 48) and session.scene.corner is None
    assert not session.notice
    session.set_box(0.1, 0.8, 1.2, -1)
    assert session.notice == BOX_IS_CLIPPED
    assert [one.box for one in session.objects] == [(9, 12, 81, 48), (9, 0, 90, 48)]
    assert session.result().boxes.tolist() == [[9, 12, 81, 48], [9, 0, 90, 48]]
    with pytest.raises(ValueError, match="two corners that differ"):
        session.set_box(0.5, 0.1, 0.5, 0.9)


def test_a_box_is_a_new_object_and_takes_nothing_of_the_last_one(session):
    session.add_point(0.5, 0.5)
    session.set_box(0.1, 0.1, 0.4, 0.4)
    session.add_point(0.2, 0.2)
    assert [(len(one.points), one.box) for one in session.objects] == [(1, None), (1, (9, 6, 36, 24))]
    masks, scores, _ = session.predictor.predict([[18, 12]], [1], box=[9, 6, 36, 24])
    assert (session.result().masks[1] == masks[scores.argmax()]).all()
    session.undo()
    session.undo()
    assert len(session.objects) == 1 and session.scene.current == 0


def test_a_preview_is_what_a_click_would_give_and_changes_nothing(session):
    session.set_box(0.1, 0.1, 0.9, 0.9)
    before, past = session.scene, list(session.past)
    mask, index = session.preview(0.5, 0.5)
    assert (session.scene, session.past, index) == (before, past, 0)
    session.add_point(0.5, 0.5)
    assert (session.current.mask() == mask).all()


def test_background_alone_is_no_object_yet(session):
    session.add_point(0.5, 0.5, label=0)
    assert not session.objects[0].candidates and not len(session.result())
    session.add_point(0.2, 0.2)
    assert len(session.result()) == 1


def test_undo_redo_and_clear(session):
    scenes = [session.scene]
    for change in (
        lambda: session.add_point(0.5, 0.5),
        lambda: session.add_point(0.1, 0.1, label=0),
        lambda: session.choose(1 - session.current.chosen),
        lambda: session.rename("a  dog", 0),
        lambda: session.add_corner(0.2, 0.2),
        session.clear,
    ):
        change()
        scenes.append(session.scene)
    assert len(set(map(repr, scenes))) == 6  # the first and the last are empty
    for scene in reversed(scenes[:-1]):
        session.undo()
        assert session.scene == scene
    session.undo()  # nothing is left
    for scene in scenes[1:]:
        session.redo()
        assert session.scene == scene
    session.undo()
    session.add_point(0.7, 0.7)
    session.redo()  # what was undone is gone after another step
    assert session.current.name == "a dog" and len(session.current.points) == 3


def test_several_objects(session):
    session.add_point(0.2, 0.2)
    session.rename("dog", 0)
    session.select(1)
    assert session.current is None
    session.rename("nothing is there", 1)
    session.add_point(0.8, 0.8)
    session.select(0)
    session.rename("cat", 1)  # its name arrives after the next click
    assert session.scene.current == 0
    session.add_point(0.3, 0.3)
    assert [len(one.points) for one in session.objects] == [2, 1]
    assert session.result().labels == ["dog", "cat"]
    session.remove()
    assert [one.name for one in session.objects] == ["cat"] and session.current.name == "cat"
    session.remove()
    session.remove()  # there is none
    assert session.scene == Scene()


def test_what_is_found_takes_the_place_of_what_was_there(session):
    session.add_point(0.5, 0.5)
    before = session.scene
    session.find_everything(**LOOSE)
    assert session.objects and all(one.finding.method == "everything" for one in session.objects)
    places = [one.place for one in session.objects]
    assert places == sorted(set(places))
    session.undo()
    assert session.scene == before

    with pytest.raises(NothingFound, match="nothing was found"):
        session.find(Finding("salient", {}), lambda: session.predictor.segment(boxes=[]))
    assert session.scene == before


def half(session: Session, left: bool) -> SegmentationResult:
    """What a prompter could find: the left half of the picture, or the right one."""
    mask = np.zeros((1, HEIGHT, WIDTH), dtype=bool)
    mask[:, :, slice(0, WIDTH // 2) if left else slice(WIDTH // 2, WIDTH)] = True
    one = np.ones(1, dtype=np.float32)
    return SegmentationResult(mask, one, one, np.zeros((1, 4), dtype=np.float32), ["a\ndog"])


def test_clicks_on_what_was_found_mark_it_and_new_points_make_new_objects(session):
    session.find(Finding("text", {}, "a dog"), lambda question: half(session, left=question == "a dog"), "a dog")
    session.select(1)
    session.select_at(0.9, 0.5)
    assert session.current is None
    session.select_at(0.1, 0.5)
    assert session.current.name == "a dog"  # in one line, for it stands in a comment of the code
    session.add_point(0.1, 0.1)
    assert [one.finding is None for one in session.objects] == [False, True]


def test_code_makes_the_same_masks(session, image, tmp_path, monkeypatch):
    image.save(tmp_path / session.file_name)
    monkeypatch.chdir(tmp_path)
    session.find_everything(**LOOSE)
    session.select(0)
    session.remove()
    session.add_point(0.5, 0.25)
    session.add_point(0.9, 0.9, label=0)
    session.choose(2)
    session.select(len(session.objects))
    session.set_box(0.1, 0.1, 0.6, 0.7)
    session.add_point(0.3, 0.3)
    scope = {}
    exec(python_code(session), scope)
    assert len(scope["masks"]) == len(session.objects) > 2
    assert (np.stack(scope["masks"]) == session.result().masks).all()


def test_files_open_again(session, image):
    with pytest.raises(ValueError, match="nothing to download yet"):
        file_of(session, "mask")
    session.set_box(0.1, 0.1, 0.5, 0.5)
    session.rename("dog", 0)
    session.select(1)
    session.add_point(0.8, 0.8)
    files = {kind: file_of(session, kind) for kind in FORMATS}
    masks = np.asarray(session.result().masks)
    assert {kind: name for kind, (name, _) in files.items()} == {
        "mask": "photo of a dog_mask.png",
        "cutout": "photo of a dog_cutout.png",
        "labels": "photo of a dog_labels.png",
        "coco": "photo of a dog_coco.json",
        "rle": "photo of a dog_rle.json",
    }
    session.file_name = 'a "quoted" <name>' + 200 * "x" + ".png"  # no page shows it as more than text
    assert file_of(session, "mask")[0] == ("a _quoted_ _name_" + 200 * "x")[:200] + "_mask.png"
    session.file_name = "photo of a dog.png"
    pictures = {kind: np.asarray(Image.open(io.BytesIO(files[kind][1]))) for kind in ("mask", "cutout", "labels")}
    assert ((pictures["mask"] == 255) == masks.any(axis=0)).all() and set(np.unique(pictures["mask"])) <= {0, 255}
    assert (pictures["cutout"][..., :3] == np.asarray(image)).all()
    assert (pictures["cutout"][..., 3] == pictures["mask"]).all()
    assert ((pictures["labels"] > 0) == masks.any(axis=0)).all()
    coco, rle = (json.loads(files[kind][1]) for kind in ("coco", "rle"))
    assert {one["name"] for one in coco["categories"]} == {"dog", "object"}
    assert coco["images"][0]["file_name"] == session.file_name
    for annotations in (coco["annotations"], rle["objects"]):
        assert all((coco_mask.decode(one["segmentation"]) == masks[i]).all() for i, one in enumerate(annotations))


def test_pictures_for_the_page(session, model, tiny_model):
    session.add_point(0.5, 0.5)
    session.add_corner(0.1, 0.1)
    drawn = np.asarray(session.draw())
    assert drawn.shape == (HEIGHT, WIDTH, 3) and (drawn != np.asarray(session.predictor.image)).any()


def test_thumbnails_show_the_part_of_the_image_where_the_object_is(session):
    mask = np.zeros((2, HEIGHT, WIDTH), dtype=bool)
    mask[0, 10:14, 20:25] = True
    session.shown = Image.fromarray(255 * mask[0].astype(np.uint8))  # white where the object is
    session.scene = Scene((SceneObject(candidates=tuple(mask_rles(mask)), scores=(1.0, 0.5)),))
    small, empty = (np.asarray(one) > 128 for one in session.thumbnails())
    assert max(small.shape) == 112 and not empty.any()
    assert 0.015 < small.mean() < 0.03  # 20 pixels of about 1000, not of 5400


def test_masks_of_a_large_image_are_small_until_they_are_downloaded(model, tiny_model, monkeypatch):
    large = Session(EfficientSamPredictor(*model), str(tiny_model), "large.png", Image.new("RGB", (2048, 1200)))
    sizes, resize = [], model[1].image_processor.post_process_masks

    def watched(masks, original_sizes, *rest, **options):
        sizes.extend(map(tuple, original_sizes))
        return resize(masks, original_sizes, *rest, **options)

    monkeypatch.setattr(model[1].image_processor, "post_process_masks", watched)
    large.set_box(0.25, 0.25, 0.75, 0.75)
    assert large.draw().size == (1024, 600) and large.current.mask().shape == (600, 1024)
    assert sizes == [(600, 1024)]
    masks, scores, _ = large.predictor.predict(box=[512, 300, 1536, 900])
    assert (large.result().masks[0] == masks[scores.argmax()]).all() and masks.shape == (3, 1200, 2048)


def test_wrong_prompts_change_nothing(session, model, monkeypatch):
    session.add_point(0.5, 0.5)
    before = session.scene
    monkeypatch.setattr(model[0].config.prompt_encoder_config, "background_points", False)
    with pytest.raises(ValueError, match="takes no background points"):
        session.add_point(0.1, 0.1, label=0)
    assert session.scene == before


def test_a_download_never_holds_the_masks_of_all_objects(model, tiny_model):
    large = Session(EfficientSamPredictor(*model), str(tiny_model), "large.png", Image.new("RGB", (900, 600)))
    large.set_box(0.1, 0.1, 0.9, 0.9)
    large.scene = Scene(large.objects * 20)
    tracemalloc.start()
    try:
        assert len(large.result()) == 20
        assert tracemalloc.get_traced_memory()[1] < 10 * 900 * 600
    finally:
        tracemalloc.stop()
