"""`training/evaluate_masks.py`, run as a user does, on tiny models and a handful of images."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import save_file
from script_runs import fork, refuse, run
from transformers import EdgeTamConfig, SamConfig, SamImageProcessor, SamModel, SamProcessor

from hf_efficientsam import EfficientSamVisionConfig, EfficientSamVisionModel
from hf_efficientsam.inference.loading import checkpoint_fingerprint, load_model
from hf_efficientsam.training.data.coco import CocoMasks, decode_rles

SIZE = 64  # of the tiny models' input

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def tiny_sam(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sam")
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 32, "image_size": SIZE}
    vision |= {"output_channels": 32, "num_pos_feats": 16, "global_attn_indexes": [0], "window_size": 2}
    config = SamConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 32, "image_size": SIZE, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    )
    SamModel(config).save_pretrained(folder)
    processor = SamImageProcessor(size={"longest_edge": SIZE}, pad_size={"height": SIZE, "width": SIZE})
    SamProcessor(processor).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def boxes(coco, tmp_path_factory) -> Path:
    """Detections on all images of `coco` but the first: the true boxes, and one that is none."""
    dataset = CocoMasks(coco / "masks.json")
    found = [
        {"image_id": record["id"], "category_id": 1, "bbox": [2 + 9 * n, 3 + 7 * n, 12 + i, 20], "score": 0.9 - n / 10}
        for i, record in enumerate(dataset.records)
        for n in range(i + 1)
        if i
    ]
    path = tmp_path_factory.mktemp("boxes") / "boxes.json"
    path.write_text(json.dumps([*found, {**found[0], "bbox": [30, 40, 20, 15.5], "score": 0.95}]))
    return path


def numbers(folder: Path, *arguments, processes=0) -> dict:
    """The json that the script writes, without what differs each time."""
    arguments = [*arguments, "--output", folder / "metrics.json"]
    if not processes:
        run("evaluate_masks", "--num_workers", 0, *arguments)
    else:
        done = fork("evaluate_masks", *arguments, processes=processes)
        assert done.returncode == 0, done.stderr
    report = json.loads((folder / "metrics.json").read_text())
    if processes:  # only the main process prints
        tables = len(report["model"]) if isinstance(report["model"], list) else 1
        assert done.stdout.count("mIoU ") + done.stdout.count("AP75") == tables
    return {name: value for name, value in report.items() if name not in ("seconds", "config")}


def test_a_folder_of_images_and_masks(coco, tiny_model, tmp_path):
    dataset, folder = CocoMasks(coco / "masks.json"), tmp_path / "pairs"
    first = [record | {"file_name": f"images/{record['id']}.png"} for record in dataset.records]
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    annotations = []
    for record, sample in zip(first, dataset, strict=True):
        sample.image.save(folder / record["file_name"])
        Image.fromarray(255 * decode_rles(sample.rles[:1])[0]).save(folder / "masks" / f"{record['id']}.png")
        rle = sample.rles[0] | {"counts": sample.rles[0]["counts"].decode()}
        annotations.append({"id": record["id"], "image_id": record["id"], "segmentation": rle})
    (tmp_path / "first.json").write_text(json.dumps({"images": first, "annotations": annotations}))
    asked = ["--model", tiny_model, "--prompts", "box"]
    by_folder = numbers(tmp_path, *asked, "--annotations", folder)
    by_json = numbers(tmp_path, *asked, "--annotations", tmp_path / "first.json", "--images", folder)
    assert by_folder["masks"] == 5 and by_folder["results"] == by_json["results"]


def test_evaluate(coco, tiny_model, tmp_path):
    output, picture = tmp_path / "new" / "metrics.json", tmp_path / "cases.png"
    table = run(
        "evaluate_masks", "--model", tiny_model, "--annotations", coco / "masks.json", "--output", output,
        "--cases", picture,
    )  # fmt: skip
    report = json.loads(output.read_text())
    assert (report["images"], report["masks"], report["model"]) == (5, 15, str(tiny_model))
    assert report["input_size"] == {"height": SIZE, "width": SIZE}
    model, processor = load_model(str(tiny_model))
    assert report["model_sha256"] == checkpoint_fingerprint(model, processor.image_processor)
    assert report["versions"]["hf-efficientsam"] == version("hf-efficientsam")
    assert "uniformly random" in report["protocol"] and report["versions"]["torch"] == torch.__version__
    assert report["config"]["clicks"] == "random" and "datasets" not in report
    results = report["results"]
    assert list(results) == ["box", "click1", "click3", "click5", "baseline"]
    assert results["baseline"]["filled_box"]["all"] == {"miou": 1.0, "count": 15}  # every object is a rectangle
    assert 0.7 < results["baseline"]["ellipse"]["all"]["miou"] < 0.85  # pi / 4, and pixels
    assert set(results["box"]) == {"confident", "best", "single"}
    for prompt in ("box", "click1", "click3", "click5"):
        assert 0 <= results[prompt]["confident"]["all"]["miou"] <= results[prompt]["best"]["all"]["miou"] <= 1
    assert f"{results['box']['confident']['all']['miou']:.4f}" in table
    errors = report["calibration_error"]
    assert list(errors) == ["box", "click1", "click3", "click5"] and all(0 <= error <= 2 for error in errors.values())
    assert f"{errors['box']:.4f}" in table.split("calibration error, box")[1].splitlines()[0]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_evaluate_repeats_itself_whatever_else_is_asked(coco, tiny_model, tmp_path):
    given = ["--model", tiny_model, "--annotations", coco / "masks.json", "--images", coco / "images", "--limit", 3]
    both = numbers(tmp_path, *given, "--prompts", "click3", "box")
    one = numbers(tmp_path, *given, "--prompts", "click3", "--prompts_at_once", 1, "--batch_size", 1)
    assert (one["images"], one["masks"]) == (3, 6)
    for answer in ("confident", "best"):
        ours, theirs = (report["results"]["click3"][answer]["all"]["miou"] for report in (both, one))
        assert ours == pytest.approx(theirs, abs=1e-3)


def test_several_models_and_datasets_in_one_run(coco, tiny_model, tiny_sam, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "masks.json").write_text((coco / "masks.json").read_text())
    (other / "images").symlink_to(coco / "images")
    given = ["--annotations", coco / "masks.json", other / "masks.json", "--prompts", "click1", "box", "click4"]
    given += ["--clicks", "error", "--count_clicks"]
    both = numbers(tmp_path, *given, "--model", tiny_model, tiny_sam, "--cases", tmp_path / "cases.png")
    assert (both["images"], both["masks"]) == (10, 30)
    assert both["model"] == [str(tiny_model), str(tiny_sam)] and "one after the other" in both["protocol"]
    assert both["input_size"][str(tiny_sam)] == {"height": SIZE, "width": SIZE}
    assert (tmp_path / "cases.png").read_bytes().startswith(b"\x89PNG")
    for model in (tiny_model, tiny_sam):
        results, datasets = both["results"][str(model)], both["datasets"][str(model)]
        assert list(results) == ["click1", "box", "click4", "baseline"]
        assert set(datasets) == {coco.name, "other"} and datasets[coco.name] == datasets["other"]
        for prompt, answers in results.items():
            for answer, groups in answers.items():
                part = datasets["other"][prompt][answer]
                assert groups["all"]["count"] == 2 * part["all"]["count"] == 30
                assert groups["all"]["miou"] == pytest.approx(part["all"]["miou"])
        alone = numbers(tmp_path, *given, "--model", model)
        assert alone["results"] == results and alone["datasets"] == datasets
        assert alone["clicks"] == both["clicks"][str(model)] and alone["clicks"]["85"]["all"]["count"] == 30
        assert alone["boundary_iou"] == both["boundary_iou"][str(model)]
        assert list(alone["boundary_iou"]) == ["click1", "box", "click4", "filled_box", "ellipse"]
    assert both["results"][str(tiny_model)]["click4"] != both["results"][str(tiny_sam)]["click4"]


def test_shards_are_the_same_images(coco, shards, tiny_model, tmp_path):
    given = ["--model", tiny_model, "--prompts", "box", "click2", "--batch_size", 1]
    from_shards = numbers(tmp_path, *given, "--shards", *shards)
    from_json = numbers(tmp_path, *given, "--annotations", coco / "masks.json")
    assert from_shards["masks"] == from_json["masks"] and "datasets" not in from_shards
    for prompt, answers in from_json["results"].items():
        for answer, groups in answers.items():
            assert from_shards["results"][prompt][answer]["all"]["miou"] == pytest.approx(groups["all"]["miou"])
    assert numbers(tmp_path, *given, "--shards", *shards, "--limit", 1)["images"] == 2


@pytest.mark.parametrize("clicks", ["random", "error"])
def test_two_processes_give_the_numbers_of_one(coco, tiny_model, tiny_sam, tmp_path, clicks):
    given = ["--model", tiny_model, tiny_sam, "--annotations", coco / "masks.json", "--batch_size", 2]
    given += ["--clicks", clicks, "--prompts", "box", "click3", "--count_clicks"]
    one = numbers(tmp_path, *given)
    two = numbers(tmp_path, *given, "--num_workers", 1, processes=2)
    assert one == two


def test_two_processes_share_shards_and_detections(coco, shards, boxes, tiny_model, tmp_path):
    for given in (
        ["--shards", *shards, "--prompts", "box"],
        ["--annotations", coco / "masks.json", "--detections", boxes, "--batch_size", 1],
    ):
        given += ["--model", tiny_model]
        assert numbers(tmp_path, *given) == numbers(tmp_path, *given, "--num_workers", 1, processes=2)


# ------------------------------------------------------------------------------------------ detections


def test_ap_of_a_detectors_boxes(coco, boxes, tiny_model, tiny_sam, tmp_path):
    given = ["--annotations", coco / "masks.json", "--detections", boxes, "--model"]
    report = numbers(tmp_path, *given, tiny_model, "--write_masks", tmp_path / "new" / "masks.json")
    assert (report["images"], report["detections"]) == (5, 15)
    assert "highest IoU with the filled box" in report["protocol"]
    masks = json.loads((tmp_path / "new" / "masks.json").read_text())
    assert [one["score"] for one in masks] == [one["score"] for one in json.loads(boxes.read_text())]

    truth = json.loads((coco / "masks.json").read_text())
    truth["categories"] = [{"id": 1, "name": "thing"}]
    for annotation in truth["annotations"]:
        left, top, right, _, _, bottom, *_ = annotation["segmentation"][0]
        annotation["area"] = (right - left) * (bottom - top)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    truth = COCO(str(tmp_path / "truth.json"))
    theirs = COCOeval(truth, truth.loadRes(masks), "segm")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    expected = [None if value == -1 else pytest.approx(value, abs=1e-6) for value in theirs.stats]
    assert list(report["results"].values()) == expected

    confident = numbers(tmp_path, *given, tiny_model, tiny_sam, "--candidate", "confidence")
    assert set(confident["results"]) == {str(tiny_model), str(tiny_sam)}
    assert "highest predicted IoU" in confident["protocol"]


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Give --annotations"),
        (["--annotations", "COCO", "--shards", "a.tar"], "Give --annotations a COCO-style json"),
        (["--annotations", "absent.json"], "There is no annotation file absent.json"),
        (["--shards", "absent.tar"], "There is no shard absent.tar"),
        (["--annotations", "COCO", "--prompts", "circle"], "The prompt 'circle' is unknown"),
        (["--annotations", "COCO", "--clicks", "centre"], "invalid choice: 'centre'"),
        (["--annotations", "COCO", "--limit", "0"], "--limit is 0; it must be more than 0"),
        (["--annotations", "COCO", "--batch_size", "0"], "--batch_size is 0; it must be more than 0"),
        (["--annotations", "COCO", "--images", "elsewhere"], "which is not in elsewhere"),
        (["--annotations", "COCO", "--images", "a", "b"], "one for each of the 1 files of --annotations"),
        (["--annotations", "COCO", "--model", "absent/runs/model"], "absent/runs/model: no such directory"),
        (["--annotations", "COCO", "--model", "VISION"], "holds a model of type 'efficientsam_vision_model'"),
        (["--annotations", "COCO", "--model", "EDGETAM"], "it needs timm, which is not installed"),
        (["--annotations", "COCO", "--model", "TINY", "TINY"], "none twice"),
        (["--annotations", "COCO", "--model", "TINY", "--device", "gpu"], "Expected one of cpu"),
        (["--annotations", "COCO", "COCO", "--detections", "BOXES"], "--detections belong to one json file"),
        (["--annotations", "COCO", "--detections", "absent.json"], "There is no file of detections absent.json"),
        (["--annotations", "COCO", "--detections", "BOXES", "--limit", "1"], "There is no mask to evaluate"),
        (["--annotations", "COCO", "--detections", "BOXES", "--cases", "a.png"], "--cases shows masks of"),
        (["--annotations", "COCO", "--write_masks", "a.json"], "--write_masks writes the masks of one --model"),
    ],
)
def test_evaluate_refuses_bad_input_in_one_sentence(coco, boxes, tiny_model, tmp_path, arguments, sentence):
    if "VISION" in arguments:  # an encoder alone
        config = EfficientSamVisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        EfficientSamVisionModel(config).save_pretrained(tmp_path)
    if "EDGETAM" in arguments:
        EdgeTamConfig().save_pretrained(tmp_path)
        save_file({}, tmp_path / "model.safetensors", {"format": "pt"})
    places = {"COCO": coco / "masks.json", "BOXES": boxes, "VISION": tmp_path, "EDGETAM": tmp_path, "TINY": tiny_model}
    assert sentence in refuse("evaluate_masks", *(places.get(argument, argument) for argument in arguments))


@pytest.fixture
def with_a_broken_image(coco, tmp_path) -> Path:
    shutil.copytree(coco, tmp_path / "coco")
    image = tmp_path / "coco" / "images" / "3.jpg"
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])  # its header is whole
    return tmp_path / "coco" / "masks.json"


def test_a_broken_image_is_left_out_named_and_counted(with_a_broken_image, coco, tiny_model, tmp_path):
    kept = json.loads(with_a_broken_image.read_text())
    broken = next(image["id"] for image in kept["images"] if image["file_name"] == "3.jpg")
    kept["images"] = [image for image in kept["images"] if image["id"] != broken]
    kept["annotations"] = [one for one in kept["annotations"] if one["image_id"] != broken]
    (tmp_path / "kept.json").write_text(json.dumps(kept))
    options = ["--model", tiny_model, "--images", coco / "images", "--prompts", "box"]
    expected = numbers(tmp_path, "--annotations", tmp_path / "kept.json", *options)
    for workers in (0, 1):
        given = ["--model", tiny_model, "--annotations", with_a_broken_image, "--prompts", "box"]
        output = ["--num_workers", workers, "--output", tmp_path / "metrics.json"]
        said = run("evaluate_masks", *given, *output, code=2)
        assert "3.jpg cannot be read as an image" in said
        assert said.splitlines()[-1] == (
            "evaluate_masks: 1 images could not be evaluated; the numbers are without them."
        )
        report = json.loads((tmp_path / "metrics.json").read_text())
        assert report["results"] == expected["results"] and len(report["broken"]) == 1


def test_images_without_a_header_are_left_out_as_those_that_end_early_are(with_a_broken_image, tiny_model, tmp_path):
    given = ["--model", tiny_model, "--annotations", with_a_broken_image, "--prompts", "box", "--num_workers", 0]
    run("evaluate_masks", *given, "--output", tmp_path / "cut.json", code=2)
    (with_a_broken_image.parent / "images" / "3.jpg").write_bytes(b"no image")
    (with_a_broken_image.parent / "images" / "4.jpg").write_bytes(b"")
    said = run("evaluate_masks", *given, "--output", tmp_path / "none.json", code=2)
    assert "3.jpg cannot be read as an image" in said and "4.jpg: the file is empty" in said
    assert said.splitlines()[-1] == "evaluate_masks: 2 images could not be evaluated; the numbers are without them."
    cut, none = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("cut", "none"))
    assert cut["images"] == none["images"] + 1 and len(none["broken"]) == 2


def test_ap_needs_all_images(with_a_broken_image, boxes, tiny_model):
    given = ["--model", tiny_model, "--annotations", with_a_broken_image, "--num_workers", 0]
    assert "3.jpg cannot be read as an image" in refuse("evaluate_masks", *given, "--detections", boxes)
