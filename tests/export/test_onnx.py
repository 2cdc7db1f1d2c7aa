import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
from PIL import Image
from typer.testing import CliRunner

from hf_efficientsam import (
    EfficientSamImageProcessor,
    EfficientSamModel,
    EfficientSamOnnxPredictor,
    EfficientSamPredictor,
    __version__,
    bundled_checkpoint,
)
from hf_efficientsam.cli.app import app
from hf_efficientsam.export import onnx_export
from hf_efficientsam.export.onnx_export import encode
from hf_efficientsam.export.quantize import quantize, restore
from hf_efficientsam.inference import onnx_predictor
from hf_efficientsam.inference.loading import checkpoint_fingerprint, load_model
from hf_efficientsam.inference.onnx_predictor import METADATA_KEY, enlarge_mask, to_pixel_values
from hf_efficientsam.model.mask_operations_efficientsam import (
    resize_masks,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
BUS, ELEPHANT = EXAMPLES / "bus.jpg", EXAMPLES / "elephant.jpg"


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """Folder and report of the bundled checkpoint's export with its variants, measured on one image."""
    folder, images = tmp_path_factory.mktemp("bundled"), tmp_path_factory.mktemp("images")
    Image.open(BUS).reduce(2).save(images / BUS.name)
    return folder, onnx_export.export_onnx(bundled_checkpoint(), folder, ("float16", "int8"), images, allow_loss=True)


@pytest.fixture(scope="module")
def plain_checkpoint(tmp_path_factory) -> Path:
    """Tiny, for points and boxes only, with a processor that keeps the aspect ratio."""
    processor = tiny.processor(keep_aspect_ratio=True)
    return tiny.save(tmp_path_factory.mktemp("plain"), tiny.one_layer_model(), processor)


@pytest.fixture(scope="module")
def plain(plain_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain_onnx")
    onnx_export.export_onnx(str(plain_checkpoint), folder)
    return folder


@pytest.fixture
def exported_before(plain, monkeypatch):
    """Export takes the graphs of `plain`, to save the time."""
    for part in ("encoder", "decoder"):
        proto = onnx.load(plain / f"{part}.onnx")
        monkeypatch.setattr(onnx_export, f"export_{part}", lambda model, proto=proto: proto)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / max((a | b).sum(), 1)


def same(ours, theirs):
    """Answers of `predict`."""
    assert iou(ours[0] > 0, theirs[0] > 0) >= 0.999
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=0, atol=1e-4 * max(1, np.abs(theirs[2]).max()))


# ------------------------------------------------------------------------------------------------ as torch


def test_a_box_beyond_the_image_is_clipped_as_with_torch(plain, plain_checkpoint):
    predictors = (
        EfficientSamOnnxPredictor(plain, num_threads=1),
        EfficientSamPredictor.from_pretrained(plain_checkpoint),
    )
    for predictor in predictors:
        predictor.set_image(Image.open(BUS).reduce(8))
        width, height = predictor.image.size
        expected = predictor.predict(box=[0, 5, width, height])
        with pytest.warns(UserWarning, match="clipped"):
            found = predictor.predict(box=[-30, 5, 2 * width, height + 1])
        assert all(map(np.array_equal, found, expected))


@pytest.mark.parametrize("file", [BUS, ELEPHANT], ids=lambda file: file.stem)
def test_answers_equal_torch(bundled, file):
    predictors = EfficientSamOnnxPredictor(bundled[0], num_threads=1), EfficientSamPredictor.from_pretrained()
    for predictor in predictors:
        predictor.set_image(Image.open(file))
    ours, theirs = predictors
    assert (ours.original_size, ours.input_size) == (theirs.original_size, theirs.input_size)
    assert ours.image == theirs.image
    np.testing.assert_allclose(ours.get_image_embedding(), theirs.get_image_embedding().numpy(), rtol=0, atol=1e-4)

    width, height = ours.image.size
    point, box = np.array([[width / 2, height / 2]]), np.array([width / 4, height / 5, width * 0.8, height * 0.9])
    same(*(p.predict(point) for p in predictors))
    same(*(p.predict(box=box, return_logits=True) for p in predictors))
    same(*(p.predict(box=box, multimask_output=False) for p in predictors))
    points, labels = np.array([[width / 2, height / 2], [5, 5], [9, 9]]), np.array([1, 0, -1])
    same(*(p.predict(points, labels, box) for p in predictors))
    low = theirs.predict(box=box)[2][:1]
    same(*(p.predict(point, mask_input=low) for p in predictors))

    asked = {
        "points": [[[width / 2, height / 2]], None, [[9, 9], [30, 40]], *[[[20 * i, 30]] for i in range(1, 8)]],
        "labels": [[1], None, [1, 0], *[[1]] * 7],
        "boxes": [None, box.tolist(), *[None] * 8],
    }
    ours, theirs = (p.segment(**asked, names=[str(i) for i in range(10)]) for p in predictors)
    assert iou(ours.masks, theirs.masks) >= 0.999
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=0, atol=1e-4)
    assert ours.labels == theirs.labels and len(ours.rles()) == 10
    np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=2)


def test_a_plain_model_keeps_the_aspect_ratio_of_images(plain, plain_checkpoint):
    predictors = (
        EfficientSamOnnxPredictor(plain, num_threads=1),
        EfficientSamPredictor.from_pretrained(str(plain_checkpoint)),
    )
    noise = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    for predictor in predictors:
        predictor.set_image(noise, image_format="BGR")
        assert predictor.input_size == (36, 64)
    assert predictors[0].features.shape == (1, 32, 3, 4)
    same(*(p.predict(np.array([[60, 20]]), box=np.array([40, 5, 90, 45]), return_logits=True) for p in predictors))


def test_batches_and_other_sizes_equal_torch(plain, plain_checkpoint):
    model = EfficientSamModel.from_pretrained(plain_checkpoint)
    run = onnx_predictor.open_session(plain / "encoder.onnx", ["CPUExecutionProvider"], 1)
    for shape in [(1, 3, 16, 16), (3, 3, 48, 160), (1, 3, 64, 64)]:
        pixels = torch.randn(shape)
        found = run({"pixel_values": pixels.numpy()})[0]
        np.testing.assert_allclose(found, encode(model, {"pixel_values": pixels})[0].numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("keep", [False, True], ids=["squash", "keep"])
@pytest.mark.parametrize("size", [(40, 70), (513, 300), (1200, 1600), (1, 1), (64, 64)])
def test_pixels_and_masks_equal_the_image_processor(size, keep):
    rng = np.random.default_rng(0)
    processor = EfficientSamImageProcessor(size={"height": 256, "width": 192}, keep_aspect_ratio=keep)
    options = {**processor.to_dict(), "size": [256, 192]}
    for pixels in (rng.integers(0, 256, (3, *size), dtype=np.uint8), rng.random((3, *size), dtype=np.float32)):
        expected = processor(pixels, input_data_format="channels_first")
        values, input_size = to_pixel_values(pixels, options)
        assert list(input_size) == expected["reshaped_input_sizes"][0].tolist()
        np.testing.assert_allclose(values, expected["pixel_values"][0].numpy(), rtol=0, atol=1e-5)
        logits = 10 * rng.normal(size=[n // 4 for n in values.shape[-2:]]).astype(np.float32)
        enlarged = resize_masks(torch.from_numpy(logits)[None, None], size, input_size)[0, 0].numpy()
        np.testing.assert_allclose(enlarge_mask(logits, size, input_size), enlarged, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------ the export


def test_files_describe_themselves(bundled):
    folder, report = bundled
    assert {path.name for path in folder.iterdir()} == set(report)
    assert not any(b"stack_trace" in path.read_bytes() for path in folder.iterdir())  # paths of the machine
    model = onnx.load(folder / "encoder.onnx")
    assert next(one.version for one in model.opset_import if one.domain == "") == onnx_export.OPSET
    description = json.loads({one.key: one.value for one in model.metadata_props}[METADATA_KEY])
    assert description["background_points"] and description["mask_prompts"]
    model, processor = load_model(bundled_checkpoint())
    assert description["model_sha256"] == checkpoint_fingerprint(model, processor.image_processor)
    assert description["versions"]["hf_efficientsam"] == __version__
    assert description["preprocessing"]["size"] == [512, 512] and len(description["preprocessing"]["image_mean"]) == 3
    assert description["difference"] == report["encoder.onnx"]["difference"] <= onnx_export.TOLERANCE


def test_files_of_before_an_option_was_written_still_run(plain, tmp_path):
    for file in plain.glob("*.onnx"):
        model = onnx.load(file)
        for entry in model.metadata_props:
            if entry.key == METADATA_KEY:
                description = json.loads(entry.value)
                del description["preprocessing"]["do_convert_rgb"], description["model_sha256"]
                entry.value = json.dumps(description)
        onnx.save(model, tmp_path / file.name)
    masks = []
    for folder in (plain, tmp_path):
        predictor = EfficientSamOnnxPredictor(folder, num_threads=1)
        predictor.set_image(Image.open(BUS).convert("RGBA"))
        masks.append(predictor.predict(box=np.array([100, 80, 500, 400]))[0])
    assert np.array_equal(*masks)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_sha256": "0"}, "encoder.onnx and decoder.onnx are of two checkpoints; export both again, together."),
        ({"preprocessing": {"size": [1, 1]}}, "are of two checkpoints"),
        ({"preprocessing": None}, "another version of the package and does not say its preprocessing; export it"),
    ],
)
def test_files_that_do_not_fit_together_or_this_version_are_refused(plain, tmp_path, change, sentence):
    shutil.copy(plain / "encoder.onnx", tmp_path)
    model = onnx.load(plain / "decoder.onnx")
    (entry,) = (one for one in model.metadata_props if one.key == METADATA_KEY)
    description = json.loads(entry.value) | change
    entry.value = json.dumps({key: value for key, value in description.items() if value is not None})
    onnx.save(model, tmp_path / "decoder.onnx")
    with pytest.raises(ValueError, match=sentence):
        EfficientSamOnnxPredictor(tmp_path, num_threads=1)


def test_files_say_nothing_of_this_machine(plain):
    for file in plain.glob("*.onnx"):
        content = file.read_bytes()
        assert b"stack_trace" not in content and str(Path(onnx_export.__file__).parent).encode() not in content


@pytest.mark.parametrize(("variant", "ratio", "least_iou"), [("float16", 0.55, 0.995), ("int8", 0.32, 0.85)])
def test_variants_are_smaller_and_lose_little(bundled, variant, ratio, least_iou):
    folder, report = bundled
    for part in ("encoder", "decoder"):
        found = report[f"{part}_{variant}.onnx"]
        assert found["bytes"] < ratio * report[f"{part}.onnx"]["bytes"]
        assert least_iou < found["mask_iou"] < 1
    predictors = [EfficientSamOnnxPredictor(folder, one, num_threads=1) for one in (variant, "float32")]
    assert predictors[0].description["mask_iou"] == found["mask_iou"]
    for predictor in predictors:
        predictor.set_image(BUS)
    ours, exact = (p.predict(box=np.array([100, 80, 500, 400]))[0] for p in predictors)
    assert iou(ours, exact) > least_iou


def test_a_difference_from_torch_is_refused(exported_before, plain_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "TOLERANCE", 1e-12)
    with pytest.raises(ValueError, match=r"encoder.onnx differs from torch by .* nothing was written"):
        onnx_export.export_onnx(str(plain_checkpoint), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_decoder_is_found(plain, plain_checkpoint, tmp_path, monkeypatch):
    encoder, decoder = (onnx.load(plain / f"{part}.onnx") for part in ("encoder", "decoder"))
    weight = next(one for one in decoder.graph.initializer if len(one.dims) == 2)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.01, weight.name))
    monkeypatch.setattr(onnx_export, "export_encoder", lambda model: encoder)
    monkeypatch.setattr(onnx_export, "export_decoder", lambda model: decoder)
    with pytest.raises(ValueError, match=r"decoder\.onnx differs from torch"):
        onnx_export.export_onnx(str(plain_checkpoint), tmp_path)


def test_the_command_writes_variants_that_lose_little(exported_before, plain_checkpoint, tmp_path, monkeypatch):
    def export(*arguments):
        result = CliRunner().invoke(app, ["export-onnx", str(plain_checkpoint), *map(str, arguments)])
        return result.exit_code, result.output

    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    assert export(out, "--variant", "int8") == (
        2,
        "efficientsam: variants are measured on images; pass a folder of them with --images.\n",
    )
    assert export(out, "--variant", "int8", "--images", images)[1].endswith("no images to measure variants on.\n")
    Image.open(BUS).reduce(12).save(images / "bus.png")
    monkeypatch.setattr(onnx_export, "LARGEST_LOSS", -0.1)
    code, output = export(out, "--variant", "int8", "--images", images)
    *progress, sentence = output.splitlines()
    assert code == 2 and "int8 gives masks of IoU" in sentence and not out.exists()
    assert "Measuring int8 on 1 images ..." in progress and all(line.endswith(" ...") for line in progress)
    code, output = export(out, "--variant", "int8", "--images", images, "--allow-loss")
    assert code == 0 and output.count("of torch") == 2 and output.count("mask IoU") == 2
    assert output.endswith(f"run them with EfficientSamOnnxPredictor({str(out)!r})\n")
    assert {path.name for path in out.iterdir()} == {
        f"{part}{ending}.onnx" for part in ("encoder", "decoder") for ending in ("", "_int8")
    }
    code, output = export(images / "bus.png")
    assert code == 2 and "is a file" in output


def test_integers_are_near_the_weights():
    values = (
        np.random.default_rng(0).normal(size=(5, 6, 3, 3)).astype(np.float32)
        * np.logspace(-3, 3, 5)[:, None, None, None]
    )
    values[2] = 0
    axis, integers, scales = quantize(values, 0)
    assert integers.dtype == np.int8 and scales.shape == (5,)
    assert (np.abs(restore(axis, integers, scales) - values) <= scales[:, None, None, None] / 2 * 1.001).all()


# ------------------------------------------------------------------------------------------------ the predictor


def test_the_predictor_works_without_torch(bundled):
    """In a process that has no torch and no transformers."""
    code = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import hf_efficientsam
predictor = hf_efficientsam.EfficientSamOnnxPredictor({str(bundled[0])!r}, num_threads=1)
predictor.set_image({str(BUS)!r})
result = predictor.segment(boxes=[[100, 80, 500, 400]])
assert isinstance(result, hf_efficientsam.SegmentationResult)
print(result.masks.sum(), result.coco("bus.jpg")["images"][0]["file_name"])
try:
    from hf_efficientsam import EfficientSamModel
except ImportError as error:
    print(error)
assert not hasattr(hf_efficientsam, "nonsense")
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    first, second = process.stdout.splitlines()
    predictor = EfficientSamOnnxPredictor(bundled[0], num_threads=1)
    predictor.set_image(BUS)
    assert first == f"{predictor.segment(boxes=[[100, 80, 500, 400]]).masks.sum()} bus.jpg"
    assert second.startswith("EfficientSamModel needs torch and transformers")


def test_openvino_is_given_the_same(plain, monkeypatch):
    """OpenVINO itself is not installed here: onnxruntime answers in its place."""
    opened = []

    class Core:
        def compile_model(self, file, device, config):
            opened.append(
                (Path(file).name, device, config["INFERENCE_NUM_THREADS"], config["INFERENCE_PRECISION_HINT"])
            )
            run = onnx_predictor.open_session(file, ["CPUExecutionProvider"], 1)
            return lambda inputs: types.SimpleNamespace(to_tuple=lambda: tuple(run(inputs)))

    monkeypatch.setitem(sys.modules, "openvino", types.SimpleNamespace(Core=Core))
    answers = []
    for runtime in ("onnxruntime", "openvino"):
        predictor = EfficientSamOnnxPredictor(plain, runtime=runtime, num_threads=1)
        predictor.set_image(BUS)
        answers.append(predictor.predict(np.array([[100, 100]]))[2])
    assert opened == [(f"{part}.onnx", "CPU", 1, "f32") for part in ("encoder", "decoder")]
    assert np.array_equal(*answers)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match="needs openvino"):
        EfficientSamOnnxPredictor(plain, runtime="openvino")


def test_wrong_files_are_refused(plain, bundled, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        EfficientSamOnnxPredictor(tmp_path)
    with pytest.raises(ValueError, match=r"encoder_int8.onnx: no such file"):
        EfficientSamOnnxPredictor(plain, "int8")
    with pytest.raises(ValueError, match="does not run the int8 variant"):
        EfficientSamOnnxPredictor(bundled[0], "int8", runtime="openvino")
    with pytest.raises(ValueError, match="runtime must be"):
        EfficientSamOnnxPredictor(plain, runtime="tensorrt")
    for part in ("encoder", "decoder"):
        model = onnx.load(plain / f"{part}.onnx")
        del model.metadata_props[:]
        onnx.save(model, tmp_path / f"{part}.onnx")
    with pytest.raises(ValueError, match="was not written by"):
        EfficientSamOnnxPredictor(tmp_path)
    (tmp_path / "decoder.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match="cannot be loaded"):
        EfficientSamOnnxPredictor(tmp_path)


def test_wrong_questions_are_refused(plain, bundled):
    predictor = EfficientSamOnnxPredictor(plain, num_threads=1)
    with pytest.raises(RuntimeError, match="no image"):
        predictor.predict(np.array([[1, 2]]))
    with pytest.raises(ValueError, match="over the limit"):
        predictor.options["max_image_pixels"] = 10
        predictor.set_image(BUS)
    predictor.options["max_image_pixels"] = None
    predictor.set_image(np.zeros((40, 60, 3), np.uint8))
    assert len(predictor.segment()) == 0
    with pytest.raises(ValueError, match="There is no prompt"):
        predictor.predict()
    with pytest.raises(ValueError, match="lies outside the image"):
        predictor.predict(np.array([[1, 41]]))
    with pytest.raises(ValueError, match="no background points"):
        predictor.predict(np.array([[1, 2]]), np.array([0]))
    with pytest.raises(ValueError, match="no mask prompts"):
        predictor.predict(mask_input=np.zeros((1, 16, 16)))
    predictor = EfficientSamOnnxPredictor(bundled[0], num_threads=1)
    predictor.set_image(np.zeros((40, 60, 3), np.uint8))
    with pytest.raises(ValueError, match=r"must be 128 x 128.*not \(64, 64\)"):
        predictor.predict(mask_input=np.zeros((1, 64, 64)))
