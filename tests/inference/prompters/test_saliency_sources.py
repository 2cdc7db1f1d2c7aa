"""Where saliency maps come from: heads, transformers models, ONNX files."""

import sys

import numpy as np
import onnx
import pytest
import tiny
import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from hf_efficientsam.inference.prompters import SalientPrompter
from hf_efficientsam.inference.prompters.saliency import fit_map
from hf_efficientsam.inference.prompters.saliency_sources import pick_map

WIDTH, HEIGHT = 60, 40  # of the images


def test_own_head_answers_from_the_embedding(predictor, tiny_model, tmp_path):
    head = tiny.saliency_head()
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
    tiny.saliency_head(input_channels=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"16 channels.*32"):
        SalientPrompter(predictor, str(tmp_path))


def test_a_head_without_all_of_its_weights(predictor, tmp_path):
    tiny.saliency_head().save_pretrained(tmp_path)
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


def normalised(image: Image.Image, size) -> np.ndarray:
    """The mean over the normalised channels, `[*size]`."""
    pixels = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR), np.float64) / 255
    return ((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).mean(axis=2)


@pytest.mark.parametrize("outputs", [("logits",), ("map",), ("coarse", "logits", "map")])
@pytest.mark.parametrize("size", [(32, 48), ("h", "w")])
def test_an_onnx_file_gives_the_finest_map(image, predictor, tmp_path, outputs, size):
    prompter = SalientPrompter(predictor, save_onnx(tmp_path / "net.onnx", size, outputs=outputs))
    mean = normalised(image, size if size[0] == 32 else (320, 320))
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
def test_transformers_model(predictor, tmp_path, names, image):
    model = save_segmenter(tmp_path, names)
    saliency = SalientPrompter(predictor, str(tmp_path))
    pixel_values = saliency.source.processor(images=image, return_tensors="pt")["pixel_values"]
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


def test_a_model_that_brings_its_code_needs_leave(image, predictor, tmp_path, monkeypatch):
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
    expected = fit_map(np.float32(1 / (1 + np.exp(-normalised(image, (1024, 1024))))), (HEIGHT, WIDTH))
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
