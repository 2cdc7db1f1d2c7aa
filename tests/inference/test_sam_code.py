"""Code written for Segment Anything runs here with the import and the name of the checkpoint changed.

The cells are those that users of segment-anything's and transformers' notebooks have, written from the public
interfaces. Cells for transformers run with `SamModel` and `SamProcessor`, too, on tiny random weights: what a cell
sees (keys, shapes, types) must be the same.
"""

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, Dataset
from transformers import SamConfig, SamModel, SamProcessor
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from hf_efficientsam import EfficientSamMaskGenerator as SamAutomaticMaskGenerator
from hf_efficientsam import EfficientSamModel, EfficientSamProcessor
from hf_efficientsam import EfficientSamPredictor as SamPredictor

WIDTH, HEIGHT = 64, 48
LOW = tiny.SIZE // 4  # side of low-resolution masks
OBJECT = np.pad(np.ones((20, 30), dtype=np.uint8), ((10, 18), (10, 8)))  # in an image of 48 x 48 pixels


def raw_image(width: int = WIDTH) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, HEIGHT), Image.Resampling.BICUBIC)


def square_image() -> Image.Image:
    """There the two processors agree in numbers, too: SAM's pads where ours resizes height and width apart."""
    return raw_image(HEIGHT)


def sam() -> tuple[SamModel, SamProcessor]:
    torch.manual_seed(0)
    vision = {
        "hidden_size": 24,
        "output_channels": tiny.CHANNELS,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": tiny.SIZE,
        "mlp_dim": 32,
        "window_size": 2,
        "num_pos_feats": tiny.CHANNELS // 2,
        "global_attn_indexes": [1],
    }
    prompts = {
        "hidden_size": tiny.CHANNELS,
        "image_size": tiny.SIZE,
        "image_embedding_size": tiny.SIZE // 16,
        "mask_input_channels": 8,
    }
    decoder = {
        "hidden_size": tiny.CHANNELS,
        "mlp_dim": 48,
        "num_attention_heads": 4,
        "iou_head_hidden_dim": 24,
    }
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    sizes = {"height": tiny.SIZE, "width": tiny.SIZE}, {"height": LOW, "width": LOW}
    processor = SamImageProcessorPil(
        size={"longest_edge": tiny.SIZE},
        pad_size=sizes[0],
        mask_size={"longest_edge": LOW},
        mask_pad_size=sizes[1],
    )
    return SamModel(config).eval(), SamProcessor(processor)


def ours() -> tuple[EfficientSamModel, EfficientSamProcessor]:
    return tiny.model(), tiny.processor()


def both(cell) -> tuple[dict, dict]:
    """What a cell shows with SAM and here."""
    return cell(*sam()), cell(*ours())


def assert_alike(theirs: dict, found: dict) -> None:
    """
    The same keys, shapes and types. Two exceptions: SAM's processor gives coordinates in double precision, and labels
    of points only if it was given some.
    """
    assert theirs.keys() <= found.keys() <= theirs.keys() | {"input_labels"}
    for name, value in theirs.items():
        expected = torch.float32 if value.dtype == torch.float64 else value.dtype
        assert (found[name].shape, found[name].dtype) == (value.shape, expected), name


# --------------------------------------------------------------------------- segment-anything: predictor_example.ipynb


@pytest.fixture
def sam_model(tiny_model) -> EfficientSamModel:
    return EfficientSamModel.from_pretrained(tiny_model)  # in place of sam_model_registry[...](checkpoint=...)


@pytest.fixture
def predictor(sam_model) -> SamPredictor:
    sam_model.to(device="cpu")
    predictor = SamPredictor(sam_model)
    predictor.set_image(np.array(raw_image()))
    return predictor


def test_one_point_then_more_with_the_best_mask(predictor):
    input_point, input_label = np.array([[30, 20]]), np.array([1])
    masks, scores, logits = predictor.predict(
        point_coords=input_point,
        point_labels=input_label,
        multimask_output=True,
    )
    assert masks.shape == (3, HEIGHT, WIDTH) and masks.dtype == bool
    assert scores.shape == (3,) and logits.shape == (3, LOW, LOW)
    mask_input = logits[np.argmax(scores), :, :]
    masks, _, _ = predictor.predict(
        point_coords=np.array([[30, 20], [40, 25], [5, 5]]),
        point_labels=np.array([1, 1, 0]),
        mask_input=mask_input[None, :, :],
        multimask_output=False,
    )
    assert masks.shape == (1, HEIGHT, WIDTH)


def test_box_and_point_in_it(predictor):
    input_box, input_point, input_label = np.array([20, 10, 50, 30]), np.array([[30, 20]]), np.array([0])
    masks, _, _ = predictor.predict(
        point_coords=None,
        point_labels=None,
        box=input_box[None, :],
        multimask_output=False,
    )
    with_point, _, _ = predictor.predict(
        point_coords=input_point,
        point_labels=input_label,
        box=input_box,
        multimask_output=False,
    )
    assert masks.shape == with_point.shape == (1, HEIGHT, WIDTH)


@pytest.mark.parametrize("keep_aspect_ratio", [False, True])
def test_several_boxes(predictor, keep_aspect_ratio):
    predictor.processor.image_processor.keep_aspect_ratio = keep_aspect_ratio
    image = np.array(raw_image())
    predictor.set_image(image)
    input_boxes = torch.tensor([[20, 10, 50, 30], [0, 0, 30, 48], [40, 5, 60, 45]], device=predictor.device)
    transformed_boxes = predictor.transform.apply_boxes_torch(input_boxes, image.shape[:2])
    masks, scores, logits = predictor.predict_torch(
        point_coords=None,
        point_labels=None,
        boxes=transformed_boxes,
        multimask_output=False,
    )
    assert masks.shape == (3, 1, HEIGHT, WIDTH) and masks.dtype == torch.bool
    assert scores.shape == (3, 1) and logits.shape == (3, 1, 12 if keep_aspect_ratio else LOW, LOW)
    for i, box in enumerate(input_boxes.numpy()):
        expected = predictor.predict(box=box, multimask_output=False)
        assert np.array_equal(masks[i].cpu().numpy(), expected[0])
        assert scores[i].numpy() == pytest.approx(expected[1], abs=1e-5)
        assert logits[i].numpy() == pytest.approx(expected[2], abs=1e-4)


def test_several_points_and_masks_as_tensors(predictor):
    points = np.array([[[30.0, 20.0], [5, 5]], [[40, 25], [50, 40]]])
    labels = np.array([[1, 0], [1, 1]])
    size = predictor.original_size
    coords = predictor.transform.apply_coords_torch(torch.from_numpy(points), size)
    assert coords.numpy() == pytest.approx(predictor.transform.apply_coords(points, size))
    first = predictor.predict_torch(coords, torch.from_numpy(labels))
    best = first[2][torch.arange(2), first[1].argmax(dim=1)][:, None]
    masks, scores, _ = predictor.predict_torch(
        coords, torch.from_numpy(labels), mask_input=best, multimask_output=True, return_logits=True
    )
    assert masks.shape == (2, 3, HEIGHT, WIDTH) and masks.dtype == torch.float32
    for i in range(2):
        expected = predictor.predict(points[i], labels[i], mask_input=best[i].numpy(), return_logits=True)
        assert masks[i].numpy() == pytest.approx(expected[0], abs=1e-3)
        assert scores[i].numpy() == pytest.approx(expected[1], abs=1e-5)


def test_boxes_in_the_model_input(predictor):
    """As `ResizeLongestSide`: the image's own frame scaled, any leading shape, a new array."""
    transform, size = predictor.transform, (24, 32)
    predictor.processor.image_processor.keep_aspect_ratio = True
    boxes = np.array([[0, 0, 32, 24], [8, 6, 16, 12]])
    expected = 2 * boxes
    assert np.array_equal(transform.apply_boxes(boxes, size), expected)
    assert np.array_equal(transform.apply_boxes(boxes[0], size), expected[:1])
    assert torch.equal(transform.apply_boxes_torch(torch.from_numpy(boxes), size), torch.from_numpy(expected).float())
    predictor.processor.image_processor.keep_aspect_ratio = False
    assert transform.apply_coords(np.array([32, 24]), size).tolist() == [tiny.SIZE, tiny.SIZE]


def test_embedding_serves_a_training(predictor):
    """It carries no gradients, but what is computed from it may."""
    embedding = predictor.get_image_embedding()
    weight = torch.ones(tiny.CHANNELS, requires_grad=True)
    (embedding * weight[:, None, None]).sum().backward()
    assert weight.grad.shape == (tiny.CHANNELS,)


# ------------------------------------------------------------ segment-anything: automatic_mask_generator_example.ipynb


def test_masks_of_a_whole_image(sam_model):
    mask_generator = SamAutomaticMaskGenerator(sam_model)
    assert mask_generator.image_processor.size.height == tiny.SIZE
    mask_generator = SamAutomaticMaskGenerator(
        model=sam_model,
        points_per_side=4,
        pred_iou_thresh=0,
        stability_score_thresh=0,
        crop_n_layers=1,
        crop_n_points_downscale_factor=2,
        min_mask_region_area=10,
        output_mode="binary_mask",
    )
    masks = mask_generator.generate(np.array(raw_image()))
    assert masks
    assert list(masks[0]) == [
        "segmentation",
        "area",
        "bbox",
        "predicted_iou",
        "point_coords",
        "stability_score",
        "crop_box",
    ]
    largest = max(masks, key=lambda mask: mask["area"])
    assert largest["segmentation"].shape == (HEIGHT, WIDTH) and largest["segmentation"].dtype == bool


def test_model_that_was_not_loaded_needs_a_processor():
    for user in (SamAutomaticMaskGenerator, SamPredictor):
        with pytest.raises(ValueError, match="pass its processor"):
            user(tiny.model())


# ----------------------------------------------------------------------- transformers: page and notebook of SamModel


@pytest.mark.parametrize(
    "prompts",
    [
        {},
        {"input_points": [[[30, 20]]]},
        {"input_points": [[[30, 20], [40, 25]]]},
        {"input_points": [[[[30, 20]], [[40, 25]]]]},
        {"input_boxes": [[[10, 10, 40, 30]]]},
        {"input_boxes": [[[[10, 10, 40, 30]]]]},
        {"input_boxes": [[[10, 10, 40, 30], [0, 0, 30, 48]]]},
        {"input_boxes": [[[10, 10, 40, 30]]], "input_points": [[[30, 20]]], "input_labels": [[0]]},
        {"input_points": torch.tensor([[[30, 20]]]), "input_labels": torch.tensor([[1]])},
        {"input_points": [[[30, 20]]], "segmentation_maps": Image.fromarray(OBJECT)},
        {"input_points": [[[30, 20]]], "segmentation_maps": Image.fromarray(255 * OBJECT).convert("1")},
    ],
    ids=lambda prompts: " ".join(prompts),
)
def test_inputs_outputs_and_masks(prompts):
    def cell(model, processor):
        inputs = processor(square_image(), **prompts, return_tensors="pt").to("cpu")
        with torch.no_grad():
            outputs = model(**inputs)
        masks = processor.image_processor.post_process_masks(
            outputs.pred_masks.cpu(), inputs["original_sizes"].cpu(), inputs["reshaped_input_sizes"].cpu()
        )
        results = {"iou_scores": outputs.iou_scores, "pred_masks": outputs.pred_masks, "masks": masks[0]}
        return {**inputs, **results}

    theirs, found = both(cell)
    assert_alike(theirs, found)
    for name in {"input_points", "input_labels", "input_boxes", "labels", "reshaped_input_sizes"} & theirs.keys():
        assert torch.equal(theirs[name].float(), found[name].float()), name


def test_batch_of_images():
    def cell(model, processor):
        images, points = [square_image(), square_image().resize((32, 32))], [[[30, 20]], [[10, 10]]]
        maps = [OBJECT, np.ones((32, 32), dtype=np.uint8)]
        inputs = processor(images, segmentation_maps=maps, input_points=points, return_tensors="pt")
        return {**inputs, "pred_masks": model(**inputs, multimask_output=False).pred_masks}

    theirs, found = both(cell)
    assert_alike(theirs, found)
    assert torch.equal(theirs["labels"], found["labels"])


def test_image_embeddings_once():
    def cell(model, processor):
        inputs = processor(square_image(), return_tensors="pt")
        image_embeddings = model.get_image_embeddings(inputs["pixel_values"])
        inputs = processor(square_image(), input_points=[[[30, 20]]], return_tensors="pt")
        inputs.pop("pixel_values", None)
        inputs.update({"image_embeddings": image_embeddings})
        with torch.no_grad():
            outputs = model(**inputs)
        return {"image_embeddings": image_embeddings, "pred_masks": outputs.pred_masks}

    assert_alike(*both(cell))


@pytest.mark.parametrize("prompts", [["input_points"], ["input_boxes"], ["input_boxes", "input_masks"]])
def test_prompts_encoded_apart_from_the_decoder(prompts):
    values = {
        "input_points": torch.tensor([[[[30.0, 20.0]], [[40.0, 25.0]]]]),
        "input_labels": torch.tensor([[[1], [1]]]),
        "input_boxes": torch.tensor([[[10.0, 10.0, 40.0, 30.0]]]),
        "input_masks": tiny.random(1, 1, LOW, LOW),
    }
    prompts = {name: values[name] for name in [*prompts, *["input_labels"] * ("input_points" in prompts)]}

    def cell(model, processor):
        image_embeddings = model.get_image_embeddings(tiny.pixel_values(1, tiny.SIZE, tiny.SIZE))
        positions = model.get_image_wide_positional_embeddings()
        sparse, dense = model.get_prompt_embeddings(**prompts)
        with torch.no_grad():
            masks, scores = model.mask_decoder(
                image_embeddings=image_embeddings,
                image_positional_embeddings=positions,
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=True,
            )
            expected = model(image_embeddings=image_embeddings, **prompts)
        torch.testing.assert_close(masks, expected.pred_masks, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(scores, expected.iou_scores, atol=1e-4, rtol=1e-4)
        return {"positions": positions, "sparse": sparse[:, :, 0], "dense": dense, "masks": masks, "scores": scores}

    assert_alike(*both(cell))


def test_prompts_of_uneven_length_cannot_be_encoded_apart():
    points = torch.full((1, 2, 8, 2), 5.0)
    labels = torch.ones(1, 2, 8, dtype=torch.long)
    labels[0, 1, 7] = -10
    with pytest.raises(ValueError, match=r"tokens; beyond num_prompt_slots, 6, they must have equal numbers"):
        tiny.model().get_prompt_embeddings(points, labels)


# ------------------------------------------------------------------------------ transformers: the fine-tuning notebook


class SAMDataset(Dataset):
    def __init__(self, processor):
        self.processor = processor

    def __len__(self):
        return 4

    def __getitem__(self, i):
        inputs = self.processor(
            square_image(), segmentation_maps=OBJECT, input_boxes=[[[10, 10, 40, 30]]], return_tensors="pt"
        )
        return {name: value.squeeze(0) for name, value in inputs.items()}


def test_fine_tuning():
    def cell(model, processor):
        dataloader = DataLoader(SAMDataset(processor), batch_size=2, shuffle=True)
        batch = next(iter(dataloader))
        for name, parameter in model.named_parameters():
            if name.startswith("vision_encoder") or name.startswith("prompt_encoder"):
                parameter.requires_grad_(False)
        optimizer = torch.optim.Adam(model.mask_decoder.parameters(), lr=1e-3, weight_decay=0)
        model.train()
        losses = []
        for _ in range(5):
            outputs = model(
                pixel_values=batch["pixel_values"], input_boxes=batch["input_boxes"], multimask_output=False
            )
            predicted_masks = outputs.pred_masks.squeeze(1)
            ground_truth_masks = batch["labels"].float()
            loss = binary_cross_entropy_with_logits(predicted_masks, ground_truth_masks.unsqueeze(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        return {**batch, "predicted_masks": predicted_masks}

    assert_alike(*both(cell))
