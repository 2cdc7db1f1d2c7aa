"""Prompts that a person would rather give: nothing, words, loose boxes, scribbles."""

import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import ndimage
from transformers import (
    CLIPTokenizer,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from hf_efficientsam import EfficientSamPredictor, EfficientSamSaliencyConfig, EfficientSamSaliencyHead
from hf_efficientsam.inference.prompters import Detector, RoughPrompter, SalientPrompter, TextPrompter
from hf_efficientsam.inference.prompters.rough import mask_prompt, spread_points
from hf_efficientsam.inference.prompters.saliency import fit_map, separate_objects
from hf_efficientsam.inference.prompters.saliency_sources import pick_map
from hf_efficientsam.inference.prompters.text import match_name, split_names

WIDTH, HEIGHT = 60, 40


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


@pytest.fixture
def predictor(tiny_model) -> EfficientSamPredictor:
    predictor = EfficientSamPredictor.from_pretrained(str(tiny_model))
    predictor.set_image(picture())
    return predictor


def two_objects() -> np.ndarray:
    """A map with a large object at 0.9, a smaller one at 0.7 and a speck."""
    saliency = np.full((HEIGHT, WIDTH), 0.1, np.float32)
    saliency[5:25, 30:55], saliency[10:20, 5:15], saliency[38, 2] = 0.9, 0.7, 1
    return saliency


# ------------------------------------------------------------------------------------------------ salient objects


def test_objects_of_a_map_become_masks(predictor):
    saliency = two_objects()
    found = SalientPrompter(predictor, lambda image: saliency)()
    assert found.boxes.tolist() == [[30, 5, 55, 25], [5, 10, 15, 20]] and found.labels == ["salient object"] * 2
    expected = predictor.segment(boxes=found.boxes.tolist())
    assert np.array_equal(found.masks, expected.masks) and np.array_equal(found.iou_scores, expected.iou_scores)
    means = [saliency[mask].mean() if mask.any() else 0 for mask in expected.masks]
    assert found.masks.any() and found.scores == pytest.approx(means) and found.scores.dtype == np.float32
    assert len(SalientPrompter(predictor, lambda image: saliency, threshold=0.8)()) == 1
    assert len(SalientPrompter(predictor, lambda image: saliency, min_area=0)()) == 3
    assert len(SalientPrompter(predictor, lambda image: np.zeros((4, 4)))()) == 0


def test_a_map_that_is_there_already_is_segmented_too(predictor):
    prompter = SalientPrompter(predictor, lambda image: two_objects())
    expected, found = prompter(), prompter.segment_map(two_objects())
    assert np.array_equal(found.masks, expected.masks) and np.array_equal(found.scores, expected.scores)
    with pytest.raises(TypeError, match="call segment_map"):
        SalientPrompter(predictor, two_objects())


def test_objects_are_apart_unless_corners_touch():
    salient = np.zeros((8, 9), bool)
    salient[:2, :2], salient[2:5, 2:5], salient[7, 7:9] = True, True, True
    objects = separate_objects(salient, 0)
    assert objects.sum(axis=(1, 2)).tolist() == [13, 2] and np.array_equal(objects.any(axis=0), salient)
    assert len(separate_objects(salient, 2 / 13)) == 2 and len(separate_objects(salient, 0.2)) == 1


@pytest.mark.parametrize("kind", ["bool", "bytes", "16 bits", "tensor", "L", "RGB", "zeros and ones", "half"])
def test_kinds_of_maps(kind):
    truth = np.zeros((20, 30), bool)
    truth[5:15, 8:20] = True
    gray = truth.astype(np.uint8) * 255
    values = {
        "bool": truth,
        "bytes": gray,
        "16 bits": truth.astype(np.uint16) * 65535,
        "tensor": torch.from_numpy(truth)[None, None],
        "L": Image.fromarray(gray),
        "RGB": Image.fromarray(gray).convert("RGB"),
        "zeros and ones": truth.astype(np.uint8),
        "half": torch.from_numpy(truth).half(),
    }[kind]
    assert np.array_equal(fit_map(values, (20, 30)), truth)
    larger = fit_map(values, (40, 60))
    assert larger.shape == (40, 60) and larger.dtype == np.float32
    assert np.array_equal(larger > 0.5, truth.repeat(2, axis=0).repeat(2, axis=1))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full((4, 4), -1.0), "0 to 1"),
        (np.full((4, 4), np.nan), "0 to 1"),
        (np.zeros((3, 4, 4)), r"\[height, width\]"),
        (np.zeros(4), r"\[height, width\]"),
        (np.zeros((0, 4)), r"\[height, width\]"),
    ],
)
def test_what_is_no_map(predictor, values, words):
    with pytest.raises(ValueError, match=words):
        SalientPrompter(predictor, lambda image: values)()


def test_a_function_sees_the_upright_picture_and_may_be_asked_about_a_new_one(predictor):
    seen = []

    def source(image):
        seen.append(image)
        return two_objects()

    prompter = SalientPrompter(predictor, source)
    assert prompter.map(picture(1)).shape == (HEIGHT, WIDTH)
    assert np.array_equal(seen[0], picture(1)) and np.array_equal(predictor.image, picture(1))
    prompter()
    assert np.array_equal(seen[1], picture(1))
    predictor.reset_image()
    with pytest.raises(RuntimeError, match="set_image"):
        prompter()


@pytest.mark.parametrize("option", ["threshold", "min_area"])
@pytest.mark.parametrize("value", [-0.1, 1, float("nan")])
def test_numbers_out_of_range(predictor, option, value):
    with pytest.raises(ValueError, match=option):
        SalientPrompter(predictor, lambda image: two_objects(), **{option: value})


def test_own_head_answers_from_the_embedding(predictor, tiny_model, tmp_path):
    head = EfficientSamSaliencyHead(EfficientSamSaliencyConfig(input_channels=32, hidden_size=24)).eval()
    head.save_pretrained(tmp_path / "saliency")
    with torch.no_grad():
        logits = head(predictor.features).logits
        sizes = [predictor.original_size], [predictor.input_size]
        expected = predictor.processor.post_process_masks([logits], *sizes, binarize=False)[0][0, 0].sigmoid()
    saliency = SalientPrompter(predictor, str(tmp_path / "saliency")).map()
    assert saliency == pytest.approx(expected.numpy(), abs=1e-5) and saliency.std() > 0
    predictor.model.name_or_path = str(tmp_path)  # a checkpoint with a head
    assert np.array_equal(SalientPrompter(predictor).map(), saliency)


def test_a_checkpoint_without_head_says_what_to_do(predictor):
    with pytest.raises(ValueError, match=r"--saliency.*training/train_saliency.py"):
        SalientPrompter(predictor)


def test_a_head_of_another_encoder(predictor, tmp_path):
    EfficientSamSaliencyHead(EfficientSamSaliencyConfig(input_channels=16, hidden_size=24)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"16 channels.*32"):
        SalientPrompter(predictor, str(tmp_path))


def test_a_head_without_all_of_its_weights(predictor, tmp_path):
    EfficientSamSaliencyHead(EfficientSamSaliencyConfig(input_channels=32, hidden_size=24)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("classifier.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights, such as classifier.weight"):
        SalientPrompter(predictor, str(tmp_path))


def save_onnx(path, size=(32, 48), channels=3, outputs=("logits",)):
    """The mean over the channels, times 4; its size is open if `size` is."""
    nodes, infos = [], []
    for i, kind in enumerate(outputs):
        nodes.append(helper.make_node("ReduceMean", ["x"], [f"mean{i}"], axes=[1], keepdims=1))
        if kind == "coarse":
            nodes.append(helper.make_node("AveragePool", [f"mean{i}"], [f"y{i}"], kernel_shape=[4, 4], strides=[4, 4]))
        else:
            nodes.append(helper.make_node({"logits": "Identity", "map": "Sigmoid"}[kind], [f"mean{i}"], [f"y{i}"]))
        infos.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None))
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", channels, *size])
    graph = helper.make_graph(nodes, "g", [value], infos)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return str(path)


def normalised(size) -> np.ndarray:
    pixels = np.asarray(picture().resize(size[::-1], Image.Resampling.BILINEAR), np.float64) / 255
    return ((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).mean(axis=2)


@pytest.mark.parametrize("outputs", [("logits",), ("map",), ("coarse", "logits", "map")])
@pytest.mark.parametrize("size", [(32, 48), ("h", "w")])
def test_onnx_file(predictor, tmp_path, outputs, size):
    prompter = SalientPrompter(predictor, save_onnx(tmp_path / "net.onnx", size, outputs=outputs))
    mean = normalised(size if size[0] == 32 else (320, 320))
    expected = fit_map(np.float32(1 / (1 + np.exp(-mean))), (HEIGHT, WIDTH))
    assert prompter.map() == pytest.approx(expected, abs=1e-4) and expected.std() > 0.05


def test_onnx_files_that_do_not_fit(predictor, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such file"):
        SalientPrompter(predictor, str(tmp_path / "absent.onnx"))
    (tmp_path / "broken.onnx").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="no ONNX file"):
        SalientPrompter(predictor, tmp_path / "broken.onnx")
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\].*'n', 1, 32, 48"):
        SalientPrompter(predictor, save_onnx(tmp_path / "gray.onnx", channels=1))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="pip install onnxruntime"):
        SalientPrompter(predictor, save_onnx(tmp_path / "net.onnx"))


def test_the_first_of_the_finest_maps_counts():
    maps = [torch.full((1, 1, n, n + 1), value) for n, value in ((2, 0.1), (4, 0.2), (4, 0.3))]
    found = pick_map([maps[:2], {"a": maps[2], "features": torch.ones(1, 8, 9, 9)}], "net")
    assert found.shape == (4, 5) and found == pytest.approx(0.2)
    assert pick_map(torch.full((1, 3, 3), -2.0), "net") == pytest.approx(0.1192, abs=1e-4)
    with pytest.raises(ValueError, match="net returns no map"):
        pick_map([torch.zeros(1, 2, 4, 4)], "net")


def save_segmenter(folder, names) -> SegformerForSemanticSegmentation:
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        id2label=dict(enumerate(names)),
    )
    model = SegformerForSemanticSegmentation(config).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "SegformerImageProcessor", "size": {"height": 32, "width": 32}}'
    )
    return model


@pytest.mark.parametrize("names", [["object"], ["no", "yes"], ["dog", "Background", "cat"]])
def test_transformers_model(predictor, tmp_path, names):
    model = save_segmenter(tmp_path, names)
    saliency = SalientPrompter(predictor, str(tmp_path))
    pixel_values = saliency.source.processor(images=picture(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(pixel_values).logits
    background = 0 if len(names) == 2 else 1
    expected = logits.sigmoid()[0, 0] if len(names) == 1 else 1 - logits.softmax(dim=1)[0, background]
    assert saliency.map() == pytest.approx(fit_map(expected, (HEIGHT, WIDTH)), abs=1e-5)


REMOTE_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class RemoverConfig(PretrainedConfig):
    model_type = "tiny_remover"

class Remover(PreTrainedModel):
    config_class = RemoverConfig

    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.post_init()

    def forward(self, pixel_values):
        assert pixel_values.shape == (1, 3, 1024, 1024)
        return [self.weight * pixel_values.mean(dim=1, keepdim=True)]
"""


def test_model_that_brings_its_code(predictor, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "remover"
    folder.mkdir()
    (folder / "remover.py").write_text(REMOTE_CODE)
    (folder / "config.json").write_text(
        '{"model_type": "tiny_remover", "auto_map": {"AutoConfig": "remover.RemoverConfig", '
        '"AutoModelForImageSegmentation": "remover.Remover"}}'
    )
    save_file({"weight": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot be loaded.*trust_remote_code"):
        SalientPrompter(predictor, str(folder))
    found = SalientPrompter(predictor, str(folder), trust_remote_code=True).map()
    expected = fit_map(np.float32(1 / (1 + np.exp(-normalised((1024, 1024))))), (HEIGHT, WIDTH))
    assert found == pytest.approx(expected, abs=1e-4)


def test_models_that_tell_no_saliency(predictor, tiny_model, tmp_path):
    save_segmenter(tmp_path, ["dog", "cat", "cow"])
    with pytest.raises(ValueError, match=r"3 classes.*background"):
        SalientPrompter(predictor, str(tmp_path)).map()
    with pytest.raises(ValueError, match="'efficientsam', which gives no saliency map"):
        SalientPrompter(predictor, str(tiny_model))
    with pytest.raises(ValueError, match="no such directory"):
        SalientPrompter(predictor, str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="nor a Hub model in reach"):
        SalientPrompter(predictor, "nobody/nothing")


# ------------------------------------------------------------------------------------------------ text


class FakeDetector(Detector):
    def __init__(self, boxes, scores, labels):
        self.answer = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(scores), labels

    def __call__(self, image, names, threshold=None):
        self.asked = image, names, threshold
        return self.answer


def test_boxes_of_a_detector_become_masks(predictor):
    boxes = [[5, 5, 30, 30], [10, 0, 60, 40], [5, 5, 30, 31], [5, 5, 30, 30], [60, 3, 60, 9]]
    detector = FakeDetector(boxes, [0.5, 0.9, 0.6, 0.4, 0.8], ["a dog", "a cat", "a dog", "a cat", "a cat"])
    found = TextPrompter(predictor, detector, threshold=0.3)("a dog, a cat")
    assert found.boxes.tolist() == [boxes[1], boxes[2], boxes[3]] and found.labels == ["a cat", "a dog", "a cat"]
    assert found.scores.tolist() == pytest.approx([0.9, 0.6, 0.4])
    assert np.array_equal(found.masks, predictor.segment(boxes=found.boxes.tolist()).masks)
    assert np.array_equal(detector.asked[0], picture()) and detector.asked[1:] == (["a dog", "a cat"], 0.3)
    assert len(TextPrompter(predictor, detector, nms_threshold=1)("a dog")) == 4


def test_nothing_found_is_an_empty_result(predictor):
    found = TextPrompter(predictor, FakeDetector([], [], []))(["unicorn"], picture(1))
    assert len(found) == 0 and found.masks.shape == (0, HEIGHT, WIDTH) and found.labels == []
    assert np.array_equal(predictor.image, picture(1))


@pytest.mark.parametrize("text", ["a dog, a cat", "a dog. ,, a cat,a dog", ["a dog", " a cat "]])
def test_names(text):
    assert split_names(text) == ["a dog", "a cat"]


@pytest.mark.parametrize("text", ["", " , .", []])
def test_no_names(predictor, text):
    with pytest.raises(ValueError, match="a dog, a cat"):
        TextPrompter(predictor, FakeDetector([], [], []))(text)


def test_names_of_detectors_that_answer_with_parts():
    names = ["a black dog", "cat"]
    assert [match_name(phrase, names) for phrase in ("dog", "a CAT", "cat", "bird", "")] == [
        *["a black dog", "cat", "cat", "bird", ""]
    ]


def save_owl(folder):
    torch.manual_seed(0)
    characters = ["!", "a", "c", "d", "g", "o", "t"]
    vocabulary = [*characters, *[one + "</w>" for one in characters], "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        {token: i for i, token in enumerate(vocabulary)}, [], model_max_length=8, pad_token="!", unk_token="!"
    )
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Owlv2Config(
        text_config={
            **layers,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 8,
            "bos_token_id": len(vocabulary) - 2,
            "eos_token_id": len(vocabulary) - 1,
        },
        vision_config={**layers, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    Owlv2ForObjectDetection(config).eval().save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return str(folder)


def test_tiny_owl(predictor, tmp_path):
    name = save_owl(tmp_path)
    boxes, scores, labels = Detector(name)(picture(), ["a dog", "a cat"], 0)
    assert len(boxes) == len(scores) == len(labels) == 4 and set(labels) <= {"a dog", "a cat"}
    assert boxes.min() >= 0 and (boxes <= torch.tensor([WIDTH, HEIGHT] * 2)).all() and boxes.std() > 1
    raw = Detector(name)
    inputs = raw.processor(images=picture(), text=[["a dog", "a cat"]], return_tensors="pt")
    with torch.no_grad():
        outputs = raw.model(**inputs)
    cx, cy, w, h = (WIDTH * outputs.pred_boxes[0].T).tolist()  # of the square that the picture is padded to
    expected = np.transpose([np.subtract(cx, np.divide(w, 2)), np.subtract(cy, np.divide(h, 2))])
    assert boxes[:, :2].numpy() == pytest.approx(expected.clip(0, [WIDTH, HEIGHT]), abs=1e-3)
    found = TextPrompter(predictor, name, threshold=0, nms_threshold=1)("a dog, a cat")
    assert len(found) and found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert len(TextPrompter(predictor, name, threshold=1)("a dog")) == 0


def test_detectors_that_cannot_be_had(predictor, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"nobody/detector is neither a directory.*nor a Hub model in reach"):
        TextPrompter(predictor, "nobody/detector")
    with pytest.raises(ValueError, match="'efficientsam', which finds no objects by their names"):
        TextPrompter(predictor, str(tiny_model))
    for options in ({"threshold": 1.1}, {"nms_threshold": -1}):
        with pytest.raises(ValueError, match="from 0 to 1"):
            TextPrompter(predictor, FakeDetector([], [], []), **options)


# ------------------------------------------------------------------------------------------------ rough prompts


def test_loose_boxes_are_put_in_order_and_cut_off(predictor):
    found = RoughPrompter(predictor).boxes([[70, 30, 10, -5], [5, 6, 20, 20]])
    expected = predictor.segment(boxes=[[10, 0, 60, 30], [5, 6, 20, 20]])
    assert found.boxes.tolist() == expected.boxes.tolist() and np.array_equal(found.masks, expected.masks)
    with pytest.raises(ValueError, match="no area"):
        RoughPrompter(predictor).boxes([[70, 5, 80, 9]])


def paint() -> np.ndarray:
    painted = np.zeros((HEIGHT, WIDTH), bool)
    painted[10:20, 5:25] = True
    return painted


def test_a_scribble_is_a_mask_and_a_grown_box(predictor):
    found = RoughPrompter(predictor).scribble(paint())
    box = [3, 9, 27, 21]  # a tenth larger on each side
    expected = predictor.segment(boxes=[box], masks=[mask_prompt(paint(), predictor)])
    assert found.boxes.tolist() == [box] and np.array_equal(found.masks, expected.masks) and found.masks.any()
    off = np.zeros_like(paint())
    off[30:38, 40:58] = True
    found = RoughPrompter(predictor).scribble(paint(), off)
    points = spread_points(off, 3)
    expected = predictor.segment([points], [[0] * 3], [box], [mask_prompt(paint(), predictor)])
    assert np.array_equal(found.iou_scores, expected.iou_scores) and len(points) == 3
    assert np.array_equal(RoughPrompter(predictor).scribble(paint(), ~paint() & False).boxes, [box])


def test_without_mask_prompts_a_scribble_is_points_and_a_box(predictor):
    config = predictor.model.config.prompt_encoder_config
    config.mask_prompts = False
    found = RoughPrompter(predictor).scribble(paint())
    expected = predictor.segment([spread_points(paint(), 3)], None, [[3, 9, 27, 21]])
    assert np.array_equal(found.iou_scores, expected.iou_scores)
    config.background_points = False
    with pytest.raises(ValueError, match="no background points"):
        RoughPrompter(predictor).scribble(paint(), paint())


def test_points_lie_deep_and_apart():
    painted = paint()
    points = spread_points(painted, 3)
    depth = ndimage.distance_transform_edt(painted)
    assert len(points) == 3 and depth[int(points[0][1]), int(points[0][0])] == depth.max()
    assert all(painted[int(y), int(x)] for x, y in points)
    assert (
        min(np.hypot(*np.subtract(a, b)) for i, a in enumerate(points) for b in points[:i]) > painted.sum() ** 0.5 / 2
    )
    assert len(spread_points(np.eye(1, dtype=bool), 3)) == 1 and spread_points(painted & False, 3) == []


@pytest.mark.parametrize("keep_aspect_ratio", [False, True])
def test_mask_prompts_are_in_the_frame_of_the_models_logits(predictor, keep_aspect_ratio):
    """What is brought to the model's frame and back is what it was."""
    predictor.processor.image_processor.keep_aspect_ratio = keep_aspect_ratio
    predictor.set_image(picture())
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:, 20:] = True
    logits = mask_prompt(mask, predictor)
    assert logits.shape == tuple(4 * n for n in predictor.features.shape[-2:]) and set(np.sign(logits[0])) == {-1, 1}
    sizes = [predictor.original_size], [predictor.input_size]
    back = predictor.processor.post_process_masks([torch.from_numpy(logits)[None, None]], *sizes)[0][0, 0].numpy()
    assert np.mean(back != mask) < 0.1 and not back[:, :17].any() and back[:-2, 24:].all()


@pytest.mark.parametrize(
    ("painted", "words"), [(np.zeros((40, 60)), "nothing is painted"), (np.ones((60, 40)), "40, 60")]
)
def test_paint_that_does_not_fit(predictor, painted, words):
    with pytest.raises(ValueError, match=words):
        RoughPrompter(predictor).scribble(painted)
