import math

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, pipeline
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from hf_efficientsam.model.configuration_efficientsam import EfficientSamConfig
from hf_efficientsam.model.image_processing_efficientsam import EfficientSamImageProcessor
from hf_efficientsam.model.mask_operations_efficientsam import (
    batched_mask_to_box,
    mask_to_rle_pytorch,
)
from hf_efficientsam.model.run_lengths_efficientsam import rle_to_mask

CASES = [
    "batch_of_two_images_three_queries",
    "box_and_point_and_padding",
    "one_box",
    "one_point",
    "six_points",
    "two_queries_of_two_points",
]


@pytest.fixture(scope="module")
def golden(shared):
    return load_file(shared / "golden" / "expected.safetensors")


@pytest.fixture
def processor():
    return EfficientSamImageProcessor(size=64)


def random_bytes(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth_logits(*shape, seed=0):
    """Blobs of various sizes: what masks look like, so that thresholds and boxes mean something."""
    noise = torch.randn(math.prod(shape[:-2]), 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    return 8 * F.interpolate(noise, size=shape[-2:], mode="bicubic").reshape(shape)


# ------------------------------------------------------------------------------------------------ pixel_values


@pytest.mark.parametrize("case", CASES)
def test_golden_pixel_values(golden, case):
    images = golden[f"{case}.images_uint8"].numpy()
    inputs = EfficientSamImageProcessor(size=128)(images)
    torch.testing.assert_close(inputs["pixel_values"], golden[f"{case}.pixel_values"], rtol=0, atol=1e-4)
    assert inputs["original_sizes"].tolist() == [[120, 160]] * len(images)
    assert inputs["reshaped_input_sizes"].tolist() == [[128, 128]] * len(images)


@pytest.mark.parametrize(
    "convert",
    [
        Image.fromarray,
        lambda a: a.transpose(2, 0, 1),
        lambda a: a[:, ::-1][:, ::-1],  # negative strides on the way
        lambda a: a.astype(np.int64),
        lambda a: a.astype(np.uint16) * 257,
        lambda a: a.astype(np.int32) * 257,
        lambda a: a.astype(np.float32),
        lambda a: a / 255,
        lambda a: torch.from_numpy(a),
        lambda a: torch.from_numpy(a).permute(2, 0, 1),
        lambda a: torch.from_numpy(a).permute(2, 0, 1).double() / 255,
        lambda a: np.concatenate([a, a[..., :1]], axis=-1),  # alpha is dropped
        lambda a: Image.fromarray(np.concatenate([a, a[..., :1]], axis=-1)),
    ],
    ids=[
        *("pil", "chw", "strided", "int64", "uint16", "int32-16bit", "float255", "float1"),
        *("torch-hwc", "torch-chw", "torch-double", "rgba", "pil-rgba"),
    ],
)
def test_every_input_type_gives_the_same_pixels(processor, convert):
    image = random_bytes(30, 41)
    expected = processor(image)["pixel_values"]
    inputs = processor(convert(image))
    torch.testing.assert_close(inputs["pixel_values"], expected, rtol=0, atol=1e-5)
    assert inputs["pixel_values"].dtype == torch.float32
    assert inputs["original_sizes"].tolist() == [[30, 41]]


def test_gray_images_are_repeated_over_the_channels(processor):
    gray = random_bytes(30, 41, 1)
    expected = processor(np.repeat(gray, 3, axis=2))["pixel_values"]
    for image in (gray, gray[..., 0], gray.transpose(2, 0, 1), Image.fromarray(gray[..., 0]), torch.tensor(gray)):
        assert torch.equal(processor(image)["pixel_values"], expected)


def test_a_small_array_is_read_as_hwc_and_a_small_tensor_as_chw(processor):
    image = random_bytes(3, 5)
    assert processor(image)["original_sizes"].tolist() == [[3, 5]]
    assert processor(torch.from_numpy(image))["original_sizes"].tolist() == [[5, 3]]
    assert processor(image, input_data_format="channels_first")["original_sizes"].tolist() == [[5, 3]]


def test_a_list_of_different_sizes_equals_one_at_a_time(processor):
    images = [random_bytes(30, 41), Image.fromarray(random_bytes(64, 20, seed=1)), torch.rand(3, 50, 50)]
    inputs = processor(images)
    for i, image in enumerate(images):
        alone = processor(image)
        assert torch.equal(inputs["pixel_values"][i], alone["pixel_values"][0])
        assert torch.equal(inputs["original_sizes"][i], alone["original_sizes"][0])


def test_sixteen_bit_files_are_scaled_not_clipped(processor, tmp_path):
    gray = (np.arange(30 * 41).reshape(30, 41) * 53).astype(np.uint16)  # up to 65,137
    Image.fromarray(gray).save(tmp_path / "deep.png")
    expected = processor(gray / 65535)["pixel_values"]
    opened = Image.open(tmp_path / "deep.png")
    big_endian = Image.frombytes("I;16B", (41, 30), gray.astype(">u2").tobytes())
    for image in (opened, opened.convert("I"), big_endian, tmp_path / "deep.png", str(tmp_path / "deep.png")):
        torch.testing.assert_close(processor(image)["pixel_values"], expected, rtol=0, atol=1e-5)
    dark = Image.fromarray((gray // 512).astype(np.uint16)).convert("I")  # every value fits a byte, still 16-bit
    torch.testing.assert_close(
        processor(dark)["pixel_values"], processor(gray // 512 / 65535)["pixel_values"], rtol=0, atol=1e-5
    )


def test_exif_rotation_is_undone(processor, tmp_path):
    image = Image.fromarray(random_bytes(30, 41))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    inputs = processor(Image.open(tmp_path / "turned.png"))
    assert inputs["original_sizes"].tolist() == [[41, 30]]
    assert torch.equal(inputs["pixel_values"], processor(image.rotate(-90, expand=True))["pixel_values"])


@pytest.mark.parametrize("mode", ["CMYK", "P", "LA", "PA", "1", "YCbCr", "HSV", "F"])
def test_other_pil_modes(processor, mode):
    image = Image.fromarray(random_bytes(30, 41)).convert("L" if mode in ("LA", "PA", "F") else "RGB").convert(mode)
    expected = processor(np.array(image if mode == "F" else image.convert("RGB")))["pixel_values"]
    assert torch.equal(processor(image)["pixel_values"], expected)


def test_palette_with_transparency(processor, recwarn):
    image = Image.fromarray(random_bytes(30, 41)).quantize(16)
    expected = processor(image)["pixel_values"]
    image.info["transparency"] = bytes(range(16))
    assert torch.equal(processor(image)["pixel_values"], expected)
    assert not recwarn.list


def test_options_of_a_call():
    processor = EfficientSamImageProcessor(size={"height": 32, "width": 64})
    image = random_bytes(32, 64)
    plain = processor(image, do_normalize=False)["pixel_values"][0]
    torch.testing.assert_close(plain, torch.tensor(image / 255, dtype=torch.float32).permute(2, 0, 1))
    raw = processor(image, do_normalize=False, do_rescale=False)["pixel_values"][0]
    assert torch.equal(raw, torch.tensor(image).permute(2, 0, 1).float())
    halved = processor(image, do_normalize=False, rescale_factor=1 / 510)["pixel_values"][0]
    torch.testing.assert_close(halved, plain / 2)
    torch.testing.assert_close(
        processor(image / 255, do_normalize=False, rescale_factor=1 / 510)["pixel_values"][0], plain / 2
    )
    normalised = processor(image, image_mean=0.25, image_std=[0.5, 0.5, 0.5])["pixel_values"][0]
    torch.testing.assert_close(normalised, (plain - 0.25) / 0.5)
    done = (plain - 0.5) / 0.2  # normalised by the user, negative values included
    assert torch.equal(processor(done, do_rescale=False, do_normalize=False)["pixel_values"][0], done)
    assert isinstance(processor(image, return_tensors="np")["pixel_values"], np.ndarray)
    assert processor(image, size=48)["pixel_values"].shape == (1, 3, 48, 48)
    with pytest.raises(TypeError, match="do_pad"):
        processor(image, do_pad=True)


def test_without_resize_images_are_padded_to_the_patch():
    inputs = EfficientSamImageProcessor(do_resize=False)([random_bytes(20, 40), random_bytes(33, 16)])
    assert inputs["pixel_values"].shape == (2, 3, 48, 48)
    assert inputs["reshaped_input_sizes"].tolist() == [[20, 40], [33, 16]]


def test_keep_aspect_ratio_pads_at_the_bottom_and_right_after_normalisation():
    processor = EfficientSamImageProcessor(size=64, keep_aspect_ratio=True)
    images = [random_bytes(30, 100), random_bytes(25, 10, seed=1)]
    inputs = processor(images)
    assert inputs["reshaped_input_sizes"].tolist() == [[19, 64], [64, 26]]  # 19.2 and 25.6, rounded
    assert inputs["pixel_values"].shape == (2, 3, 64, 64)
    assert processor(images[0])["pixel_values"].shape == (1, 3, 32, 64)
    assert processor(images[1])["pixel_values"].shape == (1, 3, 64, 32)
    for pixels, image, (height, width) in zip(inputs["pixel_values"], images, [[19, 64], [64, 26]], strict=True):
        squashed = EfficientSamImageProcessor(size={"height": height, "width": width}, size_divisor=1)(image)
        assert torch.equal(pixels[:, :height, :width], squashed["pixel_values"][0])
        assert not pixels[:, height:].any()
        assert not pixels[:, :, width:].any()
    assert processor.get_reshaped_input_size((10_000, 1)) == (64, 1)  # never less than a pixel


# ------------------------------------------------------------------------------------------------ bad images


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([], "no image"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels: its height is 0"),
        (Image.new("RGB", (0, 7)), "its width 0"),
        (np.zeros(5), r"H x W x C or C x H x W, got an array of shape \(5,\)"),
        (np.zeros((2, 2, 2, 2, 2)), "H x W x C or C x H x W"),
        (np.zeros((5, 6, 2)), "1, 3 or 4 channels"),
        (np.full((5, 6, 3), np.nan), "NaN or infinite"),
        (torch.full((3, 5, 6), math.inf), "NaN or infinite"),
        (np.full((5, 6, 3), -3), "0 to 65535, got -3"),
        (np.full((5, 6, 3), 70_000), "0 to 65535"),
        (np.random.default_rng(0).normal(size=(5, 6, 3)), "do_rescale=False and do_normalize=False"),
        (np.full((5, 6, 3), 1.4), r"lie in \[0, 1\] or in \[0, 255\]"),
    ],
)
def test_bad_images(processor, image, message):
    with pytest.raises(ValueError, match=message):
        processor(image)


@pytest.mark.parametrize("image", [None, 3, {"image": 1}, np.array([["a", "b"]]), np.zeros((2, 2), complex)])
def test_things_that_are_no_image(processor, image):
    with pytest.raises(TypeError, match=r"An image must be|Pixels must be numbers"):
        processor(image)


def test_a_gray_image_needs_do_convert_rgb(processor):
    with pytest.raises(ValueError, match="needs 3 channels, got 1; set do_convert_rgb=True"):
        processor(random_bytes(5, 6, 1), do_convert_rgb=False)


def test_the_pixel_limit_names_itself_and_the_way_out(processor):
    huge = np.broadcast_to(np.uint8(0), (30_000, 30_000, 3))  # takes no memory
    with pytest.raises(ValueError, match=r"30000 x 30000.*178956970.*max_image_pixels.*None lifts"):
        processor(huge)
    with pytest.raises(ValueError, match="100 x 50 pixels is over the limit of 4999 pixels"):
        processor(Image.new("RGB", (100, 50)), max_image_pixels=4999)
    small = random_bytes(10, 10)
    with pytest.raises(ValueError, match="limit of 99 pixels"):
        processor(small, max_image_pixels=99)
    processor(small, max_image_pixels=100)
    assert EfficientSamImageProcessor(max_image_pixels=None).max_image_pixels is None
    processor.max_image_pixels = 5
    processor(small, max_image_pixels=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": {"longest_edge": 64}}, "keep_aspect_ratio=True"),
        ({"size_divisor": 0}, "size_divisor must be at least 1"),
        ({"return_tensors": "tf"}, 'must be "pt" or "np"'),
    ],
)
def test_bad_options(processor, options, message):
    with pytest.raises(ValueError, match=message):
        processor(random_bytes(5, 5), **options)


# ------------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("case", CASES)
def test_golden_masks_at_image_size(golden, case):
    low_res, expected = golden[f"{case}.low_res_masks"], golden[f"{case}.masks_at_image_size"]
    processor = EfficientSamImageProcessor(size=128)
    sizes, input_sizes = torch.tensor([[120, 160]] * len(low_res)), torch.tensor([[128, 128]] * len(low_res))
    for masks in (low_res, list(low_res), low_res.numpy()):
        logits = processor.post_process_masks(masks, sizes, input_sizes, binarize=False)
        torch.testing.assert_close(torch.stack(logits), expected, rtol=0, atol=1e-4)
    binary = processor.post_process_masks(low_res, sizes.tolist(), mask_threshold=0.5)
    assert torch.equal(torch.stack(binary), torch.stack(logits) > 0.5)


def ramp(height, width):
    """Logits 2 x + 3 y, x and y being pixel centres of a model input of height x width, as the model would give."""
    x, y = torch.arange(width // 4) * 4 + 2, torch.arange(height // 4) * 4 + 2
    return (2 * x[None, :] + 3 * y[:, None]).float()[None, None]


@pytest.mark.parametrize("original", [(90, 301), (301, 90), (500, 499), (37, 64)])
def test_keep_aspect_ratio_is_undone_exactly(original):
    processor = EfficientSamImageProcessor(size=256, keep_aspect_ratio=True)
    inputs = processor(np.zeros((*original, 3), np.uint8))
    input_height, input_width = inputs["pixel_values"].shape[-2:]
    reshaped = inputs["reshaped_input_sizes"]
    logits = processor.post_process_masks(
        ramp(input_height, input_width)[None], inputs["original_sizes"], reshaped, binarize=False
    )[0][0, 0]
    assert logits.shape == original
    x = (torch.arange(original[1]) + 0.5) * reshaped[0, 1] / original[1]  # pixel centres in the model input
    y = (torch.arange(original[0]) + 0.5) * reshaped[0, 0] / original[0]
    inner_x, inner_y = ((v > 8) & (v < n - 8) for v, n in ((x, input_width), (y, input_height)))
    assert inner_x.sum() > 15
    assert inner_y.sum() > 15
    expected = 2 * x[None, :] + 3 * y[:, None]
    error = (logits - expected)[inner_y][:, inner_x]
    # torch's bicubic kernel follows a ramp within 5 % of a step (8 and 12 a mask pixel here) and evenly to both sides.
    assert error.abs().max() < 0.05 * (8 + 12)
    assert error.mean().abs() < 0.02


def test_padded_masks_equal_sampling_at_the_pixel_centres():
    masks = smooth_logits(2, 3, 16, 24)
    logits = EfficientSamImageProcessor().post_process_masks([masks], [(50, 77)], [(57, 90)], binarize=False)[0]
    x = (torch.arange(77) + 0.5) * 90 / 77 / 96 * 2 - 1
    y = (torch.arange(50) + 0.5) * 57 / 50 / 64 * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None].expand(2, -1, -1, -1)
    expected = F.grid_sample(masks, grid, mode="bicubic", padding_mode="border", align_corners=False)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)


def test_padding_of_a_batch_does_not_change_the_masks_inside():
    masks = smooth_logits(1, 1, 16, 16)
    padded = F.pad(masks, (0, 8, 0, 4), mode="replicate")  # the border that the unpadded one clamps to
    processor = EfficientSamImageProcessor()
    expected = processor.post_process_masks([masks], [(100, 30)], [(64, 64)], binarize=False)[0]
    logits = processor.post_process_masks([padded], [(100, 30)], [(64, 64)], binarize=False)[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_masks_of_each_image_at_its_own_size_without_padded_prompts():
    masks = smooth_logits(3, 20, 2, 16, 16)
    sizes = [(10, 20), (30, 40), (25, 5)]
    processor = EfficientSamImageProcessor()
    output = processor.post_process_masks(masks, sizes, num_prompts=[20, 1, 0])
    assert [tuple(m.shape) for m in output] == [(20, 2, 10, 20), (1, 2, 30, 40), (0, 2, 25, 5)]
    alone = processor.post_process_masks(masks[1:2, :1], sizes[1:2])
    assert torch.equal(output[1], alone[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_resized_in_float32(dtype):
    masks = smooth_logits(1, 1, 1, 16, 16).to(dtype)
    processor = EfficientSamImageProcessor()
    logits = processor.post_process_masks(masks, [(50, 60)], binarize=False)[0]
    assert logits.dtype == torch.float32
    assert torch.equal(logits, processor.post_process_masks(masks.float(), [(50, 60)], binarize=False)[0])


def test_bad_masks():
    processor = EfficientSamImageProcessor()
    masks = torch.zeros(2, 1, 3, 16, 16)
    with pytest.raises(ValueError, match="masks for 2 images, 1 original_sizes"):
        processor.post_process_masks(masks, [(10, 10)])
    with pytest.raises(ValueError, match=r"\[Q, M, h, w\]"):
        processor.post_process_masks(masks[0], [(10, 10)])
    with pytest.raises(ValueError, match=r"\(65, 64\).*only \(64, 64\)"):
        processor.post_process_masks(masks, [(10, 10)] * 2, [(64, 64), (65, 64)])


# ------------------------------------------------------------------------------------- mask generation helpers


def test_crops_points_and_filter_equal_those_of_sam():
    """Where SAM's own processor runs without torchvision it is the reference (it keeps the aspect ratio)."""
    sam = SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    processor = EfficientSamImageProcessor(size=64, keep_aspect_ratio=True)
    image = Image.fromarray(random_bytes(151, 97))
    expected = sam.generate_crop_boxes(image, 64, 2, 0.4, 5, 1)
    boxes, points, crops, labels = processor.generate_crop_boxes(image, 64, 2, 0.4, 5, 1)
    assert torch.equal(boxes, expected[0])
    torch.testing.assert_close(points, expected[1].float())
    assert all(np.array_equal(crop, other) for crop, other in zip(crops, expected[2], strict=True))
    assert torch.equal(labels, expected[3])

    num_compared = 0
    for crop in (0, 1, 5):
        left, top, right, bottom = boxes[crop].int().tolist()
        masks = smooth_logits(20, 3, bottom - top, right - left, seed=crop)
        scores = torch.rand(20, 3, generator=torch.Generator().manual_seed(crop))
        for thresholds in ((0.3, 0.9, 0, 1), (0.0, 0.7, 1.5, 2), (0.5, 0.0, 0, 1)):
            expected = sam.filter_masks(masks, scores, (151, 97), boxes[crop], *thresholds)
            kept, kept_scores, kept_boxes = processor.filter_masks(masks, scores, (151, 97), boxes[crop], *thresholds)
            assert [rle.pop("crop_box") for rle in kept] == len(kept) * [boxes[crop].int().tolist()]
            assert kept == expected[0]
            assert torch.equal(kept_scores, expected[1])
            assert torch.equal(kept_boxes, expected[2])
            num_compared += len(kept)
    assert num_compared > 20


def test_points_of_squashed_crops_are_cell_centres_in_the_model_frame():
    processor = EfficientSamImageProcessor(size={"height": 64, "width": 128})
    boxes, points, crops, labels = processor.generate_crop_boxes(random_bytes(40, 60), 64, 1, points_per_crop=2)
    assert boxes[0].tolist() == [0, 0, 60, 40]
    assert points.shape == (1, 4, 5, 2)
    assert labels.shape == (1, 4, 5)
    for crop in range(5):
        assert points[0, :, crop].tolist() == [[32, 16], [96, 16], [32, 48], [96, 48]]
    assert [crop.shape for crop in crops] == [
        (3, int(bottom - top), int(right - left)) for left, top, right, bottom in boxes
    ]


def test_fewer_points_in_deeper_layers_are_repeated():
    processor = EfficientSamImageProcessor(size=64)
    _, points, _, labels = processor.generate_crop_boxes(random_bytes(40, 60), 64, 2, 0.3, 4, 2)
    assert points.shape == (1, 16, 21, 2)
    assert [len(points[0, :, crop].unique(dim=0)) for crop in (0, 1, 5)] == [16, 4, 1]
    assert (labels == 1).all()


def test_crops_of_a_tiny_image_are_never_empty():
    boxes, _, crops, _ = EfficientSamImageProcessor(size=64).generate_crop_boxes(random_bytes(3, 5), None, 3)
    assert len(boxes) == len(crops)
    assert all(crop.size for crop in crops)


def test_crops_of_a_float_image_keep_its_range():
    image = np.zeros((40, 40, 3), np.float32)
    image[:20] = 200  # half of the image is bright, the other crops would look as if they were in [0, 1]
    image[20:] = 0.5
    processor = EfficientSamImageProcessor(size=64)
    _, _, crops, _ = processor.generate_crop_boxes(image, 64, 1)
    assert max(crop.max() for crop in crops[2::2]) <= 200 / 255
    assert min(crop.min() for crop in crops) == pytest.approx(0.5 / 255)


def test_crop_arguments_that_cannot_be_honoured():
    processor = EfficientSamImageProcessor(size=64)
    with pytest.raises(ValueError, match="target_size=32 differs"):
        processor.generate_crop_boxes(random_bytes(9, 9), 32)
    with pytest.raises(ValueError, match="one image at a time, got 2"):
        processor.generate_crop_boxes([random_bytes(9, 9)] * 2, 64)


def test_filter_drops_empty_unstable_and_cut_off_masks():
    processor = EfficientSamImageProcessor()
    masks = torch.full((5, 1, 100, 100), -9.0)
    masks[0, 0, 40:60, 30:70] = 9  # good
    masks[1, 0, 40:60, 30:70] = 0.5  # at a threshold of 1 nothing is left of it
    masks[2, 0, 40:60, 30:99] = 9  # reaches the right border of the crop, which is inside the image
    masks[3, 0, 0:60, 0:70] = 9  # reaches the left and top border, which are the image's; the 4th stays empty
    scores = torch.tensor([[0.9], [0.9], [0.9], [0.95], [0.9]])
    rles, kept_scores, boxes = processor.filter_masks(masks, scores, (150, 200), [0, 0, 100, 100])
    assert boxes.tolist() == [[30, 40, 69, 59], [0, 0, 69, 59]]
    torch.testing.assert_close(kept_scores, torch.tensor([0.9, 0.95]))
    full = rle_to_mask(rles[0])
    assert full.shape == (150, 200)
    assert full[40:60, 30:70].all()
    assert full.sum() == 20 * 40
    assert processor.filter_masks(masks, scores, (150, 200), [0, 0, 100, 100], 0.92)[2].tolist() == [[0, 0, 69, 59]]
    assert len(processor.filter_masks(masks, scores, (150, 200), [0, 0, 100, 100], 0, 0)[0]) == 3
    rles, kept_scores, boxes = processor.filter_masks(masks, scores, (150, 200), [0, 0, 100, 100], 0.99)
    assert rles == []
    assert kept_scores.shape == (0,)
    assert boxes.shape == (0, 4)


def test_post_process_for_mask_generation():
    processor = EfficientSamImageProcessor()
    masks = torch.zeros(3, 30, 40, dtype=torch.bool)
    masks[0, 5:15, 5:15] = masks[1, 5:15, 5:16] = masks[2, 20:28, 20:35] = True
    rles, boxes, scores = mask_to_rle_pytorch(masks), batched_mask_to_box(masks), torch.tensor([0.8, 0.9, 0.7])
    kept, kept_scores, kept_rles, kept_boxes = processor.post_process_for_mask_generation(rles, scores, boxes, 0.7)
    assert [np.array_equal(mask, masks[i]) for mask, i in zip(kept, (1, 2), strict=True)] == [True, True]
    assert torch.equal(kept_scores, scores[[1, 2]])
    assert kept_rles == [rles[1], rles[2]]
    assert torch.equal(kept_boxes, boxes[[1, 2]])
    assert len(processor.post_process_for_mask_generation(rles, scores, boxes, 0.95)[0]) == 3
    nothing = processor.post_process_for_mask_generation([], scores[:0], boxes[:0])
    assert [len(part) for part in nothing] == [0, 0, 0, 0]


@pytest.mark.parametrize("keep_aspect_ratio", [False, True])
def test_mask_generation_pipeline(keep_aspect_ratio):
    processor = EfficientSamImageProcessor(size=64, keep_aspect_ratio=keep_aspect_ratio)
    generator = pipeline("mask-generation", model=tiny.official_model(), image_processor=processor, device="cpu")
    image = Image.fromarray(random_bytes(90, 61))
    options = {"points_per_crop": 3, "points_per_batch": 4, "stability_score_thresh": 0.0, "stability_score_offset": 0}
    output = generator(image, pred_iou_thresh=-1e9, crops_n_layers=1, output_rle_mask=True, **options)
    assert len(output["masks"]) == len(output["scores"]) == len(output["rle_mask"]) > 0
    assert all(mask.shape == (90, 61) and mask.any() for mask in output["masks"])
    output = generator(image, pred_iou_thresh=1e9, output_bboxes_mask=True, **options)
    assert output["masks"] == []
    assert output["bounding_boxes"].shape == (0, 4)


# ------------------------------------------------------------------------------------------------ saving


def test_save_and_load(tmp_path):
    options = {
        "size": {"height": 48, "width": 64},
        "keep_aspect_ratio": True,
        "size_divisor": 8,
        "max_image_pixels": None,
        "image_mean": [0.1, 0.2, 0.3],
    }
    processor = EfficientSamImageProcessor(**options)
    processor.save_pretrained(tmp_path)
    loaded = EfficientSamImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.max_image_pixels is None
    assert loaded.size == {"height": 48, "width": 64}
    image = random_bytes(30, 41)
    assert torch.equal(loaded(image)["pixel_values"], processor(image)["pixel_values"])
    assert EfficientSamImageProcessor.from_pretrained(tmp_path, keep_aspect_ratio=False).keep_aspect_ratio is False


def test_auto_image_processor(tmp_path):
    AutoImageProcessor.register(
        EfficientSamConfig, image_processor_classes={"pil": EfficientSamImageProcessor}, exist_ok=True
    )
    EfficientSamImageProcessor(size=48).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is EfficientSamImageProcessor
    assert loaded.size == {"height": 48, "width": 48}


@pytest.mark.parametrize(("keep_aspect_ratio", "rows", "columns"), [(False, 16, 16), (True, 8, 16)])
def test_labels_are_the_map_at_the_centres_of_mask_cells(processor, keep_aspect_ratio, rows, columns):
    numbers = np.arange(60 * 120).reshape(60, 120)
    image = np.zeros((60, 120, 3), np.uint8)
    for given in (numbers, torch.from_numpy(numbers), Image.fromarray(numbers.astype(np.int32))):
        found = processor(image, segmentation_maps=given, keep_aspect_ratio=keep_aspect_ratio)["labels"]
        y, x = ((np.arange(count) + 0.5) / count * size for count, size in ((rows, 60), (columns, 120)))
        assert found.dtype == torch.int64
        assert np.array_equal(found[0], numbers[np.ix_(y.astype(int), x.astype(int))])


def test_labels_of_padding_are_zero(processor):
    images = [np.zeros((60, 120, 3), np.uint8), np.zeros((120, 60, 3), np.uint8)]
    maps = [np.ones((60, 120), bool), np.ones((120, 60), bool)]
    encoding = processor(images, segmentation_maps=maps, keep_aspect_ratio=True, return_tensors="np")
    assert encoding["labels"].shape == (2, 16, 16)
    assert encoding["labels"][0, :8].all() and not encoding["labels"][0, 8:].any()
    assert encoding["labels"][1, :, :8].all() and not encoding["labels"][1, :, 8:].any()


def test_indices_of_a_palette_are_the_labels(processor, tmp_path):
    palette = Image.fromarray(np.full((8, 8), 7, np.uint8), mode="P")
    palette.putpalette([200] * 768)
    palette.save(tmp_path / "map.png")
    for given in (palette, tmp_path / "map.png", [palette]):
        assert (processor(np.zeros((8, 8, 3), np.uint8), segmentation_maps=given)["labels"] == 7).all()


@pytest.mark.parametrize(
    ("segmentation_maps", "message"),
    [
        (np.zeros((8, 9), int), r"a map for each image, of its height and width \[\(8, 8\)\], got maps of shapes"),
        (np.zeros((2, 8, 8), int), "a map for each image"),
        (np.zeros((8, 8)), "whole numbers or booleans, got float64"),
        (Image.new("RGB", (8, 8)), r"got uint8 of shape \(8, 8, 3\)"),
    ],
)
def test_segmentation_maps_that_do_not_fit(processor, segmentation_maps, message):
    with pytest.raises(ValueError, match=message):
        processor(np.zeros((8, 8, 3), np.uint8), segmentation_maps=segmentation_maps)
