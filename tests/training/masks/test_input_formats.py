import numpy as np
import pytest
import tiny_peers
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import SamImageProcessorPil

from hf_efficientsam.model.mask_operations_efficientsam import boxes_from_masks
from hf_efficientsam.training.data.coco import Sample, encode_mask
from hf_efficientsam.training.data.mask_bits import unpack_masks
from hf_efficientsam.training.masks.batch import MaskDataConfig, MaskTrainingSet
from hf_efficientsam.training.masks.input_formats import InputFormat, PlainImageProcessor, pad_to_square

LEVEL = 1 / 255 / 0.224  # of a channel, normalised


def noise(width, height):
    return Image.effect_noise((width, height), 90).convert("RGB")


@pytest.fixture
def processor(tmp_path):
    def read(name):
        return PlainImageProcessor.from_pretrained(str(tiny_peers.save(tmp_path / name, name)))

    return read


@pytest.mark.parametrize(("width", "height"), [(90, 61), (40, 100), (64, 64)])
def test_sams_is_transformers_own(processor, tmp_path, width, height):
    plain, image = processor("sam"), noise(width, height)
    own = SamImageProcessorPil.from_pretrained(tmp_path / "sam")
    ours, theirs = plain(image), own(image, return_tensors="pt")
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], rtol=0, atol=1e-5)
    sizes = [ours[name].tolist() for name in ("original_sizes", "reshaped_input_sizes")]
    assert sizes == [[list(theirs[name][0])] for name in ("original_sizes", "reshaped_input_sizes")]
    logits = torch.randn(2, 3, 16, 16)
    (masks,) = plain.post_process_masks([logits], *sizes)
    assert torch.equal(masks, own.post_process_masks([logits], *sizes)[0])


def test_sam2s_is_torchs_antialiased_resizing_to_a_square(processor):
    """torchvision, which SAM 2's own needs, resizes tensors by the same function."""
    plain, image = processor("sam2"), noise(90, 61)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, (64, 64), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(tiny_peers.IMAGENET[name])[:, None, None] for name in ("image_mean", "image_std"))
    ours = plain(image)
    assert ours["original_sizes"].tolist() == [[61, 90]] and "reshaped_input_sizes" not in ours
    torch.testing.assert_close(ours["pixel_values"], (resized / 255 - mean) / std, rtol=0, atol=1.01 * LEVEL)
    logits = torch.randn(2, 3, 16, 16)
    expected = F.interpolate(logits, (61, 90), mode="bilinear", align_corners=False) > 0
    assert torch.equal(plain.post_process_masks([logits], [(61, 90)])[0], expected)


@pytest.mark.parametrize("name", ["sam", "sam2", "sam3_tracker"])
def test_a_whole_image_is_trained_on_as_it_is_evaluated(processor, name):
    plain, image = processor(name), noise(90, 61)
    mask = np.zeros((61, 90), np.uint8)
    mask[10:50, 20:70] = 1
    sample = Sample(image, [encode_mask(mask)], 0, [1], "noise")
    options = MaskDataConfig(image_size=64, crop_scale=1, flip=False, color_jitter=0)
    item = MaskTrainingSet([[sample]], options, input_format=plain.format)[0]
    level = 1.01 / 255 / min(plain.format.std)
    torch.testing.assert_close(item["pixel_values"], plain(image)["pixel_values"][0], rtol=0, atol=level)
    squashed = image.resize((64, 43) if plain.format.keeps_aspect_ratio else (64, 64))
    left, top, right, bottom = boxes_from_masks(unpack_masks(item["mask_bits"]))[0].tolist()
    width, height = squashed.size
    expected = [20 / 90 * width, 10 / 61 * height, 70 / 90 * width, 50 / 61 * height]
    assert [left, top, right, bottom] == pytest.approx(expected, abs=1)


def test_mean_and_variance_are_the_files(processor):
    image = Image.new("RGB", (10, 20), (255, 0, 51))
    values = processor("sam3_tracker")(image)["pixel_values"][0]
    torch.testing.assert_close(values, torch.tensor([1.0, -1, -0.6])[:, None, None].expand(3, 64, 64))


def test_files_of_the_processor_are_copied(processor, tmp_path):
    (tmp_path / "copy").mkdir()
    processor("sam2").save_pretrained(tmp_path / "copy")
    (file,) = (tmp_path / "copy").iterdir()
    assert file.read_bytes() == (tmp_path / "sam2" / "preprocessor_config.json").read_bytes()


def test_a_model_without_a_processor_is_refused(tmp_path):
    tiny_peers.sam().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="choose a model that is saved together with its image processor"):
        PlainImageProcessor.from_pretrained(str(tmp_path))


def test_an_input_becomes_its_image_again():
    pixels = torch.rand(3, 20, 32)
    form = InputFormat((0.5,) * 3, (0.5,) * 3, keeps_aspect_ratio=True)
    padded = form.normalize(pixels, 32)
    assert padded.shape == (3, 32, 32) and not padded[:, 20:].any()
    image = torch.from_numpy(np.array(form.to_image(padded))).permute(2, 0, 1)[:, :20] / 255
    torch.testing.assert_close(image, pixels, rtol=0, atol=1.01 / 255)
    assert pad_to_square(pixels[:, :, :20], 20).shape == (3, 20, 20)
