import math
import warnings

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoProcessor
from without_package import run_without_package

from hf_efficientsam.model.configuration_efficientsam import EfficientSamConfig
from hf_efficientsam.model.image_processing_efficientsam import EfficientSamImageProcessor
from hf_efficientsam.model.processing_efficientsam import EfficientSamProcessor

WIDE = Image.new("RGB", (80, 40))  # scaled by 0.8 across and 1.6 down
TALL = Image.new("RGB", (20, 50))  # scaled by 3.2 across and 1.28 down
NOTHING = [-10, -10]


@pytest.fixture(params=[False, True], ids=["squash", "keep"])
def any_processor(request):
    return EfficientSamProcessor(EfficientSamImageProcessor(size=64, keep_aspect_ratio=request.param))


@pytest.fixture
def processor():
    return EfficientSamProcessor(EfficientSamImageProcessor(size=64))


def close(tensor, expected):
    torch.testing.assert_close(tensor, torch.tensor(expected, dtype=tensor.dtype), rtol=0, atol=1e-5)
    return True


# ------------------------------------------------------------------------------------------------ the model frame


@pytest.mark.parametrize(
    "case", ["one_point", "six_points", "two_queries_of_two_points", "batch_of_two_images_three_queries"]
)
def test_golden_points(shared, case):
    golden = load_file(shared / "golden" / "expected.safetensors")
    images, points = golden[f"{case}.images_uint8"].numpy(), golden[f"{case}.points_xy"]
    processor = EfficientSamProcessor(EfficientSamImageProcessor(size=128))
    inputs = processor(images, input_points=points, input_labels=golden[f"{case}.labels"])
    torch.testing.assert_close(inputs["pixel_values"], golden[f"{case}.pixel_values"], rtol=0, atol=1e-4)
    torch.testing.assert_close(inputs["input_points"], points * torch.tensor([128 / 160, 128 / 120]))
    assert inputs["input_points"].dtype == torch.float32
    assert torch.equal(inputs["input_labels"], golden[f"{case}.labels"])


def test_points_and_boxes_are_scaled_by_the_resize(processor):
    inputs = processor(
        [WIDE, TALL], input_points=[[[10, 20]], [[10, 20]]], input_boxes=[[[0, 5, 80, 40]], [[0, 5, 15, 40]]]
    )
    assert close(inputs["input_points"], [[[[8, 32]]], [[[32, 25.6]]]])
    assert close(inputs["input_boxes"], [[[0, 8, 64, 64]], [[0, 6.4, 48, 51.2]]])
    processor.image_processor.keep_aspect_ratio = True
    inputs = processor([WIDE, TALL], input_points=[[[10, 20]], [[10, 20]]])
    assert inputs["reshaped_input_sizes"].tolist() == [[32, 64], [64, 26]]
    assert close(inputs["input_points"], [[[[8, 16]]], [[[13, 25.6]]]])
    assert close(processor(WIDE, input_points=[[[10, 20]]], keep_aspect_ratio=False)["input_points"], [[[[8, 32]]]])


def test_code_written_for_sam_runs(processor):
    image = Image.new("RGB", (640, 640))
    inputs = processor(image, input_points=[[[450, 600]]], return_tensors="pt")
    assert close(inputs["input_points"], [[[[45, 60]]]])
    assert inputs["input_labels"].tolist() == [[[1]]]
    inputs = processor(image, input_points=[[[[450, 600], [10, 20]], [[30, 40], [50, 60]]]], return_tensors="pt")
    assert inputs["input_points"].shape == (1, 2, 2, 2)
    inputs = processor(image, input_points=[[[450, 600], [0, 0]]], input_labels=[[1, 0]], return_tensors="pt")
    assert inputs["input_labels"].tolist() == [[[1, 0]]]
    inputs = processor(images=[image, image], input_boxes=[[[0, 0, 320, 640]]] * 2, return_tensors="pt")
    assert close(inputs["input_boxes"], [[[0, 0, 32, 64]]] * 2)
    masks = processor.post_process_masks(
        torch.ones(2, 1, 3, 16, 16), inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )
    assert [tuple(mask.shape) for mask in masks] == [(1, 3, 640, 640)] * 2
    assert set(processor(image)) == {"pixel_values", "original_sizes", "reshaped_input_sizes"}
    assert isinstance(processor(image, input_points=[[[1, 2]]], return_tensors="np")["input_points"], np.ndarray)


def test_prompts_alone_for_embeddings_computed_earlier(any_processor):
    prompts = {"input_points": [[[10, 20]], [[10, 20]]], "input_boxes": [[[0, 5, 80, 40]], None]}
    inputs = any_processor([WIDE, TALL], **prompts)
    for sizes in (inputs["original_sizes"], [(40, 80), (50, 20)], np.array([[40, 80], [50, 20]])):
        alone = any_processor(original_sizes=sizes, **prompts)
        assert set(alone) == {"input_points", "input_labels", "input_boxes"}
        assert all(torch.equal(alone[name], inputs[name]) for name in alone)


# ------------------------------------------------------------------------------------------------ ragged prompts


def test_padding_of_ragged_prompts(processor):
    inputs = processor(
        [WIDE, TALL],
        input_points=[[[[10, 20]], [[10, 20], [20, 20], [30, 20]], []], [None, [[10, 25]]]],
        input_labels=[[[0], [1, 0, 1], []], [None, [1]]],
        input_boxes=[[None, [10, 10, 20, 20]], [[5, 5, 10, 10], None]],
    )
    empty = [NOTHING] * 3
    assert close(
        inputs["input_points"],
        [
            [[[8, 32], NOTHING, NOTHING], [[8, 32], [16, 32], [24, 32]], empty],
            [empty, [[32, 32], NOTHING, NOTHING], empty],
        ],
    )
    assert inputs["input_labels"].tolist() == [
        [[0, -10, -10], [1, 0, 1], [-10] * 3],
        [[-10] * 3, [1, -10, -10], [-10] * 3],
    ]
    assert close(
        inputs["input_boxes"],
        [[[-10] * 4, [8, 16, 16, 32], [-10] * 4], [[16, 6.4, 32, 12.8], [-10] * 4, [-10] * 4]],
    )
    assert processor.count_prompts(inputs) == [2, 2]


def test_ragged_equals_one_image_at_a_time(any_processor):
    images = [WIDE, TALL, WIDE]
    points = [[[[1, 2]], [[3, 4], [5, 6]]], [], [[[7, 8], [9, 10], [11, 12]]]]
    boxes = [None, [[1, 2, 3, 4]], [[5, 6, 70, 80], [1, 1, 2, 2], [3, 3, 4, 5]]]
    together = any_processor(images, input_points=points, input_boxes=boxes)
    counts = any_processor.count_prompts(together)
    assert counts == [2, 1, 3]
    for i, image in enumerate(images):
        alone = any_processor(image, input_points=points[i : i + 1], input_boxes=boxes[i : i + 1])
        assert any_processor.count_prompts(alone) == counts[i : i + 1]
        for name, padding_shape in (("input_points", (3, 3, 2)), ("input_labels", (3, 3)), ("input_boxes", (3, 4))):
            expected = torch.full(padding_shape, -10.0)
            if name in alone:
                part = alone[name][0]
                expected[tuple(slice(n) for n in part.shape)] = part.float()
            assert torch.equal(together[name][i].float(), expected)


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x,
        np.array,
        torch.tensor,
        lambda x: torch.tensor(x, dtype=torch.float64),
        lambda x: tuple(map(tuple, x)),
        lambda x: [np.array(part) for part in x],
        lambda x: [torch.tensor(part) for part in x],
        lambda x: [[np.array(part) for part in parts] for parts in x],
        lambda x: [[[torch.tensor(number) for number in numbers] for numbers in parts] for parts in x[0:1]] + x[1:],
    ],
    ids=["lists", "array", "tensor", "double", "tuples", "arrays", "tensors", "inner-arrays", "scalars"],
)
def test_prompts_of_every_type(processor, convert):
    points, labels, boxes = [[[1, 2], [3, 4]], [[5, 6], [7, 8]]], [[1, 0], [0, 1]], [[[1, 2, 3, 4]], [[5, 6, 7, 8]]]
    expected = processor([WIDE, TALL], input_points=points, input_labels=labels, input_boxes=boxes)
    inputs = processor(
        [WIDE, TALL],
        input_points=convert(points),
        input_labels=np.array(labels),
        input_boxes=convert(boxes),
    )
    for name in ("input_points", "input_labels", "input_boxes"):
        assert torch.equal(inputs[name], expected[name])


def test_one_prompt_an_image_needs_no_prompt_level(processor):
    for short, full in (
        ({"input_points": [[[1, 2], [3, 4]], [[5, 6]]]}, {"input_points": [[[[1, 2], [3, 4]]], [[[5, 6]]]]}),
        ({"input_boxes": [[1, 2, 3, 4], None]}, {"input_boxes": [[[1, 2, 3, 4]], None]}),
    ):
        inputs, expected = processor([WIDE, TALL], **short), processor([WIDE, TALL], **full)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_any_number_of_points(processor):
    points = np.random.default_rng(0).uniform(0, 20, (1, 1, 500, 2))
    inputs = processor(TALL, input_points=points)
    assert inputs["input_points"].shape == (1, 1, 500, 2)
    assert (inputs["input_labels"] == 1).all()


def test_prompts_that_are_padded_already(processor):
    inputs = processor(
        WIDE,
        input_points=torch.tensor([[[[10.0, 20.0], [math.nan, 900.0]], [[-1.0, -1.0], [0.0, 0.0]]]]),
        input_labels=torch.tensor([[[1, -1], [-10, -10]]]),
        input_boxes=torch.tensor([[[-10.0] * 4, [1.0, 2.0, 3.0, 4.0]]]),
    )
    assert close(inputs["input_points"], [[[[8, 32], NOTHING], [NOTHING, NOTHING]]])
    assert inputs["input_labels"].tolist() == [[[1, -1], [-10, -10]]]
    assert close(inputs["input_boxes"], [[[-10] * 4, [0.8, 3.2, 2.4, 6.4]]])


@pytest.mark.parametrize("nothing", [None, [], [[]], [[[]]], [None]])
def test_no_prompts_at_all(processor, nothing):
    if nothing == []:
        with pytest.raises(ValueError, match="0 images, but there are 1"):
            processor(WIDE, input_points=nothing)
        return
    inputs = processor(WIDE, input_points=nothing, input_boxes=nothing)
    assert set(inputs) == {"pixel_values", "original_sizes", "reshaped_input_sizes"}
    with pytest.raises(ValueError, match="no prompts in the inputs"):
        processor.count_prompts(inputs)


def test_the_border_of_the_image_is_inside(processor):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = processor(WIDE, input_points=[[[0, 0], [80, 40]]], input_boxes=[[[0, 0, 80, 40]]])
    assert close(inputs["input_points"], [[[[0, 0], [64, 64]]]]) and close(inputs["input_boxes"], [[[0, 0, 64, 64]]])


def test_boxes_beyond_the_image_are_clipped_to_it_and_others_are_not_touched(processor):
    inside, missing = [3.5, 2, 79, 39.5], [-10, -10, -10, -10]
    with pytest.warns(UserWarning, match="beyond the image; such boxes are clipped") as said:
        inputs = processor(
            [WIDE, TALL], input_boxes=[[[-20, -1, 100, 45], inside, missing], [[-10, -10, 5, 5], [1, 2, 10**9, 1e9]]]
        )
    assert len(said) == 1
    wide, tall = [[0, 0, 80, 40], inside, missing], [[0, 0, 5, 5], [1, 2, 20, 50]]
    expected = processor([WIDE, TALL], input_boxes=[wide, tall])
    assert torch.equal(inputs["input_boxes"], expected["input_boxes"])
    assert close(inputs["input_boxes"][0, 1], [2.8, 3.2, 63.2, 63.2])
    assert processor.count_prompts(inputs) == [2, 2]


def test_input_masks(processor):
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    for given in (masks, masks.numpy(), masks.tolist(), [list(masks[0]), masks[1].numpy()]):
        inputs = processor([WIDE, TALL], input_masks=given)
        assert torch.equal(inputs["input_masks"], masks.float())
        assert processor.count_prompts(inputs) == [3, 3]
    inputs = processor([WIDE, TALL], input_points=[[[[1, 2]]] * 3, [[[1, 2]]]], input_masks=[masks[0], masks[1, :1]])
    assert torch.equal(inputs["input_masks"][1, 0], masks[1, 0].float())
    assert not inputs["input_masks"][1, 1:].any()
    assert processor.count_prompts(inputs) == [3, 1]


def test_counted_prompts_drop_the_padding_of_the_masks(processor):
    inputs = processor([WIDE, TALL], input_boxes=[[[0, 0, 9, 9]] * 3, [[0, 0, 9, 9]]])
    masks = processor.post_process_masks(
        torch.zeros(2, 3, 1, 16, 16),
        inputs["original_sizes"],
        inputs["reshaped_input_sizes"],
        num_prompts=processor.count_prompts(inputs),
    )
    assert [tuple(mask.shape) for mask in masks] == [(3, 1, 40, 80), (1, 1, 50, 20)]


# ------------------------------------------------------------------------------------------------ bad prompts


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"input_points": [[[1, 2]]]}, "prompts for 1 images, but there are 2 images"),
        ({"input_boxes": [[[1, 2, 3, 4]]] * 3}, "prompts for 3 images, but there are 2 images"),
        ({"input_masks": torch.zeros(1, 1, 4, 4)}, "masks for 1 images, but there are 2 images"),
        ({"input_points": [[1, 2], [3, 4]]}, r"nested as \[image\]\[prompt\]\[point\]\[x, y\].*numbers lie 2 deep"),
        ({"input_points": 3}, "numbers lie 0 deep"),
        ({"input_points": [[[1, 2]], [[[1, 2]]]]}, "numbers lie 3 and 4 deep"),
        ({"input_boxes": [[[[1, 2, 3, 4], [1, 2, 3, 4]]]] * 2}, "numbers lie 4 deep"),
        (
            {"input_points": [None, [[[1, 2]], [[1, 2, 3]]]]},
            r"Image 1, prompt 1: a point is a pair x, y, got \[1, 2, 3",
        ),
        ({"input_points": [None, [[[1, 2], None]]]}, "Image 1, prompt 0: a point is a pair x, y, got None"),
        ({"input_boxes": [None, [[1, 2, 3]]]}, "Image 1, prompt 0: a box is four numbers"),
        ({"input_labels": [[1], [1]]}, "Image 0 has input_labels but no input_points"),
        (
            {"input_points": [None, [[[1, 2]]]], "input_labels": [None, [[1], [1]]]},
            "Image 1 has 1 prompts in input_points but 2 in input_labels",
        ),
        (
            {"input_points": [None, [[[1, 2], [3, 4]]]], "input_labels": [None, [[1]]]},
            "Image 1, prompt 0 has 2 points but 1 labels",
        ),
        ({"input_points": [[[1, 2]]] * 2, "input_labels": [[1], [2]]}, "Image 1, prompt 0 .* label 2; .*input_boxes"),
        ({"input_points": [[[1, 2]]] * 2, "input_labels": [[3], [1]]}, "Image 0, prompt 0 .* label 3; .*input_boxes"),
        ({"input_points": [[[1, 2]]] * 2, "input_labels": [[7], [1]]}, "has the label 7; a label is 1"),
        ({"input_points": [[[1, 2]]] * 2, "input_labels": [[0.5], [1]]}, "has the label 0.5; a label is 1"),
        ({"input_points": [[[1, math.nan]], None]}, r"Image 0, prompt 0: the point \[1, nan\] is not finite"),
        ({"input_points": [[[math.inf, 1]], None]}, "is not finite"),
        ({"input_boxes": [[[1, 2, math.nan, 4]], None]}, "Image 0, prompt 0: the box .* is not finite"),
        (
            {"input_points": [None, [[[1, 2]], [[20.5, 2]]]]},
            r"Image 1, prompt 1: the point \[20.5, 2\] lies outside the image, which is 20 pixels wide and 50 high",
        ),
        ({"input_points": [[[-0.1, 2]], None]}, "lies outside the image, which is 80 pixels wide"),
        ({"input_points": [[[30, 41]], None]}, "lies outside the image"),
        ({"input_boxes": [[[5, 5, 5, 9]], None]}, "Image 0, prompt 0: the box .* has no area.*x1 < x2 and y1 < y2"),
        ({"input_boxes": [None, [[1, 9, 5, 5]]]}, "Image 1, prompt 0: the box .* has no area"),
        ({"input_boxes": [None, [[20, 1, 30, 5]]]}, "Image 1, prompt 0: .* entirely outside .* 20 pixels wide"),
        ({"input_boxes": [[[1, -9, 30, 0]], None]}, "entirely outside"),
        (
            {"input_points": [[[[1, 2]], [[3, 4]]], None], "input_masks": [torch.zeros(1, 4, 4)] * 2},
            "Image 0 has 2 prompts but 1 input_masks",
        ),
        ({"input_masks": [[np.zeros((4, 4))], [np.zeros((4, 5))]]}, r"Image 1, prompt 0: .*\(4, 5\) after \(4, 4\)"),
        ({"input_masks": torch.zeros(2, 4, 4)}, r"must be \[h, w\]"),
        ({"input_masks": torch.full((2, 1, 4, 4), math.nan)}, "Image 0, prompt 0: .* NaN"),
        ({"original_sizes": [[40, 80], [50, 20]]}, "images or original_sizes, not both"),
    ],
)
def test_bad_prompts(processor, prompts, message):
    with pytest.raises(ValueError, match=message):
        processor([WIDE, TALL], **prompts)


@pytest.mark.parametrize("points", [[[["a", "b"]]], [[{"x": 1}]], np.array([[["a", "b"]]])])
def test_prompts_that_are_no_numbers(processor, points):
    with pytest.raises(TypeError, match="input_points must hold numbers"):
        processor(WIDE, input_points=points)


def test_bad_sizes(processor):
    with pytest.raises(ValueError, match="Pass images, or the original_sizes"):
        processor(input_points=[[[1, 2]]])
    for sizes in ([40, 80], [[40, 80, 3]], [[0, 80]], [["a"]], [[]]):
        with pytest.raises((ValueError, TypeError), match="original_sizes must hold"):
            processor(original_sizes=sizes, input_points=[[[1, 2]]])


# ------------------------------------------------------------------------------------------------ saving


def test_save_and_load(tmp_path):
    processor = EfficientSamProcessor(EfficientSamImageProcessor(size=48, keep_aspect_ratio=True))
    processor.save_pretrained(tmp_path)
    AutoImageProcessor.register(
        EfficientSamConfig, image_processor_classes={"pil": EfficientSamImageProcessor}, exist_ok=True
    )
    AutoProcessor.register(EfficientSamConfig, EfficientSamProcessor, exist_ok=True)
    EfficientSamConfig().save_pretrained(tmp_path)
    expected = processor(WIDE, input_points=[[[10, 20]]])
    for loaded in (EfficientSamProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is EfficientSamProcessor
        assert type(loaded.image_processor) is EfficientSamImageProcessor
        inputs = loaded(WIDE, input_points=[[[10, 20]]])
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)


LOAD_FROM_A_REPOSITORY = """
import numpy as np
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
names = [type(part).__name__ for part in (processor, processor.image_processor)]
assert names == ["EfficientSamProcessor", "EfficientSamImageProcessor"], names
inputs = processor(np.zeros((40, 80, 3), np.uint8), input_points=[[[10, 20]]])
assert inputs["input_points"].tolist() == [[[[8.0, 32.0]]]], inputs["input_points"]
"""


@pytest.mark.slow
def test_a_saved_repository_loads_without_the_package(tmp_path):
    tiny.processor().save_pretrained(tmp_path / "repository")
    run_without_package(LOAD_FROM_A_REPOSITORY, tmp_path / "repository", modules_cache=tmp_path / "modules")


def test_boxes_may_have_the_extra_level_of_the_sam_notebook():
    processor = tiny.processor()
    given = {"original_sizes": [(64, 64), (64, 64)]}
    expected = processor(input_boxes=[[[1, 2, 30, 40], [5, 5, 9, 9]], [None, [1, 1, 8, 8]]], **given)
    found = processor(input_boxes=[[[[1, 2, 30, 40]], [[5, 5, 9, 9]]], [None, [[1, 1, 8, 8]]]], **given)
    assert torch.equal(found["input_boxes"], expected["input_boxes"])
    with pytest.raises(ValueError, match="must be nested"):
        processor(input_boxes=[[[[1, 2, 30, 40], [5, 5, 9, 9]]], [None]], **given)


def test_segmentation_maps_without_images():
    with pytest.raises(ValueError, match="together with images"):
        tiny.processor()(original_sizes=[(8, 8)], segmentation_maps=np.zeros((8, 8), int))
