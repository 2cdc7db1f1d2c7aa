import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel
from without_package import run_without_package

from hf_efficientsam import EfficientSamModel, EfficientSamSaliencyConfig, EfficientSamSaliencyHead, bundled_checkpoint
from hf_efficientsam.model.modeling_saliency import saliency_loss

CODE = {
    "configuration_efficientsam.py",
    "configuration_saliency.py",
    "configuration_sami.py",
    "configuration_vision_efficientsam.py",
    "modeling_saliency.py",
    "modeling_vision_efficientsam.py",
    "onednn_efficientsam.py",
}
ENTRIES = {
    "AutoConfig": "configuration_saliency.EfficientSamSaliencyConfig",
    "AutoModel": "modeling_saliency.EfficientSamSaliencyHead",
}
# Loads a head's folder and writes its logits.
STRANGER = """
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel

folder, resaved, output = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
head = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert type(config).__name__ == "EfficientSamSaliencyConfig" and type(head).__name__ == "EfficientSamSaliencyHead"
assert type(head).__module__.startswith("transformers_modules."), type(head).__module__
with torch.no_grad():
    logits = head(torch.arange(32 * 6).reshape(1, 32, 2, 3) / 100).logits
head.save_pretrained(resaved)
assert not any(name.startswith("hf_efficientsam") for name in sys.modules)
save_file({"logits": logits}, output)
"""


def embeddings(batch=2, height=4, width=5) -> torch.Tensor:
    return torch.randn(batch, 32, height, width, generator=torch.Generator().manual_seed(batch + height + width))


# ------------------------------------------------------------------------------------------------ the forward


@pytest.mark.parametrize("size", [(4, 4), (4, 6), (5, 3), (1, 1), (1, 7)])
def test_logits_are_four_times_as_fine_whatever_the_size(size):
    with torch.no_grad():
        output = tiny.saliency_head()(embeddings(2, *size))
    assert output.logits.shape == (2, 1, 4 * size[0], 4 * size[1]) and output.loss is None


def test_images_do_not_know_of_each_other():
    head, images = tiny.saliency_head(), embeddings(3)
    with torch.no_grad():
        together, alone = head(images).logits, torch.cat([head(image[None]).logits for image in images])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_every_cell_depends_on_the_whole_picture():
    images = embeddings(1, 16, 16).requires_grad_()
    tiny.saliency_head(initializer_range=0.5)(images).logits[..., :4, :4].sum().backward()
    assert images.grad[0, :, -1, -1].abs().max() > 0


def test_dropout_is_for_training_alone():
    head, images = tiny.saliency_head(hidden_dropout=0.5, drop_path_rate=0.5), embeddings()
    with torch.no_grad():
        assert torch.equal(head(images).logits, head(images).logits)
        head.train()
        assert not torch.equal(head(images).logits, head(images).logits)


def test_half_precision():
    head, images = tiny.saliency_head(), embeddings()
    with torch.no_grad():
        expected = head(images).logits
        for dtype, close in ((torch.bfloat16, 3e-2), (torch.float16, 3e-3)):
            logits = head.to(dtype)(images).logits  # of an encoder that runs in float32
            assert logits.dtype == dtype
            torch.testing.assert_close(logits.float(), expected, atol=close, rtol=0)
            assert head(images, torch.ones(2, 16, 20)).loss.dtype == torch.float32


def test_what_does_not_fit_is_refused():
    head = tiny.saliency_head()
    for shape in ((2, 31, 4, 4), (32, 4, 4)):
        with pytest.raises(ValueError, match=r"it must be \(B, 32, h, w\), from the encoder"):
            head(torch.zeros(shape))
    for shape in ((1, 16, 16), (2, 1, 16, 16)):
        with pytest.raises(ValueError, match=r"it must be \(2, H, W\)"):
            head(embeddings(), torch.zeros(shape))
    with pytest.raises(ValueError, match="choose num_attention_heads so that it divides hidden_size"):
        EfficientSamSaliencyConfig(hidden_size=50)


# --------------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_that_of_paper_and_pencil():
    logits = torch.tensor([[3.0, 0.0], [0.0, -1.0]])[None, None]
    labels = torch.tensor([[1.0, 1.0], [0.0, 0.0]])[None]
    p = [0.9525741, 0.5, 0.5, 0.2689414]
    cross_entropy = (0.0485874 + 0.6931472 + 0.6931472 + 0.3132617) / 4  # -log of what is right
    overlap, union = p[0] + p[1], p[2] + p[3] + 2
    expected = cross_entropy + 1 - (overlap + 1) / (union + 1)
    assert saliency_loss(logits, labels).item() == pytest.approx(expected, abs=1e-6)
    fine = labels.repeat_interleave(3, 1).repeat_interleave(3, 2)  # labels of another resolution are averaged
    assert saliency_loss(logits, fine).item() == pytest.approx(expected, abs=1e-6)


def test_a_perfect_map_loses_nothing_and_a_wrong_one_much():
    labels = torch.zeros(1, 8, 8)
    labels[:, 2:5] = 1
    logits = 100 * (2 * labels[:, None] - 1)
    assert saliency_loss(logits, labels) == pytest.approx(0, abs=1e-6) and saliency_loss(-logits, labels) > 100
    assert saliency_loss(torch.full((1, 1, 8, 8), -100.0), torch.zeros(1, 8, 8)) == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------------------------------------- save and load


def test_it_lives_in_a_folder_of_its_checkpoint(tmp_path):
    head = tiny.saliency_head(hidden_dropout=0.25)
    head.save_pretrained(tmp_path / "saliency")
    again = EfficientSamSaliencyHead.from_pretrained(tmp_path, subfolder="saliency")
    assert again.config.hidden_dropout == 0.25 and not again.training
    with torch.no_grad():
        assert torch.equal(again(embeddings()).logits, head(embeddings()).logits)
    assert type(AutoModel.from_pretrained(tmp_path / "saliency")) is EfficientSamSaliencyHead
    assert type(AutoConfig.from_pretrained(tmp_path / "saliency")) is EfficientSamSaliencyConfig


@pytest.mark.slow
def test_saved_folder_needs_no_package(tmp_path):
    head, folder, resaved = tiny.saliency_head(), tmp_path / "first", tmp_path / "second"
    head.save_pretrained(folder)
    assert {path.name for path in folder.glob("*.py")} == CODE
    assert json.loads((folder / "config.json").read_text())["auto_map"] == ENTRIES
    run_without_package(STRANGER, folder, resaved, tmp_path / "logits.safetensors", modules_cache=tmp_path / "cache")
    with torch.no_grad():
        expected = head(torch.arange(32 * 6).reshape(1, 32, 2, 3) / 100).logits
    torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], expected, atol=1e-6, rtol=0)
    assert {path.name for path in resaved.iterdir()} == {path.name for path in folder.iterdir()}


def test_the_bundled_checkpoint_has_one_of_less_than_a_megabyte():
    head = EfficientSamSaliencyHead.from_pretrained(bundled_checkpoint(), subfolder="saliency", dtype=torch.float32)
    encoder = EfficientSamModel.config_class.from_pretrained(bundled_checkpoint()).vision_config
    assert head.config.input_channels == encoder.output_channels
    assert 2 * sum(parameter.numel() for parameter in head.parameters()) < 1e6
