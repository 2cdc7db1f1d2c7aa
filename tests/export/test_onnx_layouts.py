"""Exports in other tools' layouts: each test makes the call that the tool makes, and compares with torch."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
import torch.nn.functional as F
from commands import all_files, assert_refused, noise, run
from PIL import Image

from hf_efficientsam import EfficientSamModel, EfficientSamPredictor, EfficientSamProcessor
from hf_efficientsam.export import onnx_layouts
from hf_efficientsam.export.onnx_layouts import SamDecoder, export_layout

BOX = np.array([30, 20, 200, 120])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Tiny, for prompts of every kind, with weights large enough that prompts and candidates differ."""
    model = tiny.one_layer_model(**tiny.EVERY_PROMPT)
    for part in (model.mask_decoder, model.prompt_encoder.mask_embed):
        tiny.enlarge_weights(part, std=0.2)
    return tiny.save(tmp_path_factory.mktemp("checkpoint"), model, tiny.processor())


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """layout -> its folder, made by the command when it is first asked for."""
    folders = {}

    def folder(layout: str, *arguments):
        if layout not in folders:
            folders[layout] = tmp_path_factory.mktemp("layout")
            result = run("export-onnx", checkpoint, folders[layout], "--layout", layout, *arguments)
            assert result.exit_code == 0, result.output
        return folders[layout]

    return folder


def session(file):
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def names(values) -> list[str]:
    return [value.name for value in values]


def logits_of_torch(checkpoint, image, **prompt):
    """Logits and scores of the candidates for a prompt, best first."""
    predictor = EfficientSamPredictor.from_pretrained(checkpoint)
    predictor.set_image(image)
    logits, scores, _ = predictor.predict(**prompt, return_logits=True)
    order = np.argsort(-scores)
    return logits[order], scores[order]


def near(ours, theirs, tolerance=1e-3):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1, np.abs(theirs).max()))


# ------------------------------------------------------------------------------------------------ official


def test_official_answers_the_call_of_osam(exported, checkpoint):
    folder = exported("official")
    encoder, decoder = (session(folder / f"efficient_sam_{part}.onnx") for part in ("encoder", "decoder"))
    image = np.asarray(noise(240, 150))
    images = image.transpose(2, 0, 1)[None].astype(np.float32) / 255
    (embeddings,) = encoder.run(None, {"batched_images": images})
    for prompt, points, labels in (
        ({"box": BOX}, BOX.reshape(2, 2), [2, 3]),
        ({"point_coords": [[90, 60], [10, 140]], "point_labels": [1, 0]}, [[90, 60], [10, 140]], [1, 0]),
    ):
        masks, scores, low = decoder.run(
            ["output_masks", "iou_predictions", "low_res_masks"],
            {
                "image_embeddings": embeddings,
                "batched_point_coords": np.array(points, np.float32)[None, None],
                "batched_point_labels": np.array(labels, np.float32)[None, None],
                "orig_im_size": np.array(image.shape[:2], np.int64),
            },
        )
        expected, expected_scores = logits_of_torch(checkpoint, image, **prompt)
        near(masks[0, 0], expected)
        near(scores[0, 0], expected_scores)
        assert low.shape == (1, 1, 3, 16, 16)


# ------------------------------------------------------------------------------------------------ sam


def ask_sam(folder, image, points, labels, size, mask=None):
    """The calls of AnyLabeling and samexporter: one more point that is none, and sizes as floats."""
    encoder, decoder = (session(folder / f"efficientsam.{part}.onnx") for part in ("encoder", "decoder"))
    (name,) = names(encoder.get_inputs())
    (embeddings,) = encoder.run(None, {name: image.astype(np.float32)})
    no_mask = np.zeros((1, 1, 256, 256), np.float32)
    return decoder.run(
        None,
        {
            "image_embeddings": embeddings,
            "point_coords": np.array([[*points, [0, 0]]], np.float32),
            "point_labels": np.array([[*labels, -1]], np.float32),
            "mask_input": no_mask if mask is None else mask,
            "has_mask_input": np.array([0 if mask is None else 1], np.float32),
            "orig_im_size": np.array(size, np.float32),
        },
    )


def test_sam_answers_the_call_of_anylabeling(exported, checkpoint):
    """It draws every image on a black canvas of 684 x 1024, whose masks it scales back."""
    canvas = np.zeros((684, 1024, 3), np.uint8)
    canvas[:640] = np.asarray(noise(240, 150).resize((1024, 640)))
    scale = 1024 / 240
    masks, scores, _ = ask_sam(exported("sam"), canvas, scale * BOX.reshape(2, 2), [2, 3], (684, 1024))
    expected, expected_scores = logits_of_torch(checkpoint, canvas, box=scale * BOX)
    near(masks[0], expected[:1])
    near(scores[0], expected_scores[:1])


def test_sam_answers_the_call_of_samexporter(exported, checkpoint):
    """It scales the longest side to 1024 and enlarges the low-resolution masks itself, as of a padded square."""
    image = np.asarray(noise(120, 200))
    scaled = np.asarray(Image.fromarray(image).resize((614, 1024), Image.Resampling.BILINEAR))
    scale = np.array([614 / 120, 1024 / 200])
    point = np.array([[50, 120]])
    masks, _, low = ask_sam(exported("sam"), scaled, scale * point, [1], image.shape[:2])
    expected, _ = logits_of_torch(checkpoint, scaled, point_coords=scale * point, point_labels=[1])
    assert masks.shape == (1, 1, 200, 120) and low.shape == (1, 1, 256, 256)
    square = F.interpolate(torch.from_numpy(low), size=(1024, 1024), mode="bilinear")[..., :1024, :614]
    near(square[0].numpy(), expected[:1], 0.02)
    near(F.interpolate(square, size=image.shape[:2], mode="bilinear", antialias=True).numpy(), masks, 0.05)


def test_sam_takes_its_own_low_resolution_masks(exported, checkpoint):
    image = np.asarray(noise(1024, 768))
    prompt = {"point_coords": [[400, 300]], "point_labels": [1]}
    _, _, low = ask_sam(exported("sam"), image, [[400, 300]], [1], image.shape[:2])
    predictor = EfficientSamPredictor.from_pretrained(checkpoint)
    predictor.set_image(image)
    _, scores, own_low = predictor.predict(**prompt)
    expected, _ = logits_of_torch(checkpoint, image, **prompt, mask_input=own_low[[scores.argmax()]])
    masks, _, _ = ask_sam(exported("sam"), image, [[400, 300]], [1], image.shape[:2], low)
    without, _, _ = ask_sam(exported("sam"), image, [[400, 300]], [1], image.shape[:2])
    assert np.abs(masks[0] - expected[:1]).max() < 0.2 * np.abs(without[0] - expected[:1]).max()


def test_a_mask_for_a_model_that_takes_none_gives_nan():
    model = tiny.one_layer_model().eval()
    decoder = SamDecoder(model, tiny.image_processor())
    inputs = {
        "image_embeddings": tiny.random(1, tiny.CHANNELS, 4, 4),
        "point_coords": torch.tensor([[[400.0, 300]]]),
        "point_labels": torch.tensor([[1.0]]),
        "mask_input": torch.zeros(1, 1, 256, 256),
        "orig_im_size": torch.tensor([40.0, 50]),
    }
    with torch.no_grad():
        assert decoder(**inputs, has_mask_input=torch.tensor([-1.0]))[0].isfinite().all()
        assert decoder(**inputs, has_mask_input=torch.tensor([1.0]))[0].isnan().all()


def test_the_configuration_of_anylabeling_names_the_files(exported):
    folder = exported("sam")
    lines = (folder / "config.yaml").read_text().splitlines()
    config = {key: json.loads(value) for key, value in (line.split(": ", 1) for line in lines)}
    assert {"type", "name", "display_name", "input_size", "max_width", "max_height"} < config.keys()
    assert config["type"] == "segment_anything"
    paths = {config["encoder_model_path"], config["decoder_model_path"]}
    assert all_files(folder) == {"config.yaml", *paths}


# ------------------------------------------------------------------------------------------------ transformers.js


@pytest.fixture(scope="module")
def transformers_js(exported, tmp_path_factory):
    images = tmp_path_factory.mktemp("images")
    noise(64, 64).save(images / "noise.png")
    variants = ["--variant", "float16", "--variant", "int8", "--images", images, "--allow-loss"]
    return exported("transformers.js", *variants)


def test_transformers_js_finds_its_files(transformers_js):
    parts = ("vision_encoder", "prompt_encoder_mask_decoder")
    onnx_files = {f"onnx/{part}{suffix}.onnx" for part in parts for suffix in ("", "_fp16", "_quantized")}
    assert all_files(transformers_js) == {"config.json", "preprocessor_config.json"} | onnx_files
    assert json.loads((transformers_js / "config.json").read_text())["model_type"] == "sam"
    preprocessor = json.loads((transformers_js / "preprocessor_config.json").read_text())
    assert preprocessor["processor_class"] == "SamProcessor"
    assert preprocessor["image_processor_type"] == "SamImageProcessor"
    assert preprocessor["size"] == {"height": tiny.SIZE, "width": tiny.SIZE} and preprocessor["do_normalize"]


@pytest.mark.parametrize("suffix", ["", "_fp16", "_quantized"])
def test_transformers_js_answers_the_call_of_its_sam_model(transformers_js, checkpoint, suffix):
    encoder = session(transformers_js / f"onnx/vision_encoder{suffix}.onnx")
    decoder = session(transformers_js / f"onnx/prompt_encoder_mask_decoder{suffix}.onnx")
    processor = EfficientSamProcessor.from_pretrained(checkpoint)
    model = EfficientSamModel.from_pretrained(checkpoint)
    inputs = processor(noise(240, 150), input_boxes=[[BOX.tolist()]], return_tensors="pt")
    features = dict(
        zip(
            names(encoder.get_outputs()),
            encoder.run(None, {"pixel_values": inputs["pixel_values"].numpy()}),
            strict=True,
        )
    )
    assert features.keys() == {"image_embeddings", "image_positional_embeddings"}
    answer = decoder.run(
        ["iou_scores", "pred_masks"],
        {
            **features,
            "input_points": inputs["input_boxes"].numpy().reshape(1, 1, 2, 2),
            "input_labels": np.array([[[2, 3]]], np.int64),
        },
    )
    assert set(names(decoder.get_inputs())) == {*features, "input_points", "input_labels"}
    with torch.no_grad():
        expected = model(inputs["pixel_values"], input_boxes=inputs["input_boxes"])
    tolerance = {"": 1e-4, "_fp16": 0.02, "_quantized": 0.1}[suffix]
    near(answer[0], expected.iou_scores.numpy(), tolerance)
    near(answer[1], expected.pred_masks.numpy(), tolerance)


# ------------------------------------------------------------------------------------------------ refused


def test_files_of_variants_from_before_are_removed(transformers_js, checkpoint, tmp_path, monkeypatch):
    graphs = {part.file: onnx.load(transformers_js / part.file) for part in onnx_layouts.LAYOUTS["transformers.js"]}

    def write_part(part, model, image_processor, folder, description):
        onnx.save(graphs[part.file], folder / part.file)
        return graphs[part.file], 0.0

    monkeypatch.setattr(onnx_layouts, "write_part", write_part)
    old = tmp_path / "onnx/vision_encoder_fp16.onnx"
    old.parent.mkdir()
    old.write_bytes(b"old")
    export_layout("transformers.js", str(checkpoint), tmp_path)
    assert not old.exists() and (tmp_path / "onnx/vision_encoder.onnx").exists()


def test_what_a_layout_cannot_do_is_refused(tmp_path):
    model = tiny.save(tmp_path / "model", tiny.one_layer_model(), tiny.processor(keep_aspect_ratio=True))
    out = tmp_path / "out"
    assert_refused(run("export-onnx", model, out, "--layout", "official"), "squash", "--layout native")
    variant = run("export-onnx", model, out, "--layout", "sam", "--variant", "int8", "--images", tmp_path)
    assert_refused(variant, "--variant is for the layouts native and transformers.js")
    assert not out.exists()
