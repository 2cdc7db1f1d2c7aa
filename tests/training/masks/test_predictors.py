import pytest
import tiny
import tiny_peers
import torch
from PIL import Image
from transformers import SamImageProcessorPil, SamModel, SamProcessor

from hf_efficientsam import EfficientSamImageProcessor, EfficientSamProcessor
from hf_efficientsam.training.masks.predictors import Predictor, load_mask_predictor, prepare_image

HEIGHT, WIDTH = 20, 30
BOXES = torch.tensor([[2.0, 3, 12, 9], [14, 0, 30, 8], [20, 10, 21, 11]])
POINTS = torch.tensor([[[3.0, 4], [9, 9]], [[20, 5], [1, 19]]])
LABELS = torch.tensor([[1, 0], [1, 1]])


def noise(width=WIDTH, height=HEIGHT):
    return Image.effect_noise((width, height), 90).convert("RGB")


@pytest.fixture
def ours():
    model = tiny.one_layer_model(background_points=True, mask_prompts=True).eval()
    return Predictor("ours", model, EfficientSamProcessor(EfficientSamImageProcessor(size=64, keep_aspect_ratio=True)))


@pytest.fixture
def sam():
    size = {"height": 64, "width": 64}
    processor = SamProcessor(SamImageProcessorPil(size={"longest_edge": 64}, pad_size=size))
    return Predictor("sam", tiny_peers.sam(), processor)


def encode(predictor, image):
    (predict,) = predictor.encode([prepare_image(predictor.processor, image)])
    return predict


@torch.no_grad()
@pytest.mark.parametrize("name", ["ours", "sam"])
def test_answers_are_what_model_and_processor_give(request, name):
    predictor, image = request.getfixturevalue(name), noise()
    predict = encode(predictor, image)
    for prompts in ({"input_boxes": BOXES}, {"input_points": POINTS, "input_labels": LABELS}):
        for multimask in (True, False):
            given = {name: values[None].tolist() for name, values in prompts.items()}
            inputs = predictor.processor(images=image, return_tensors="pt", **given)
            sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
            inputs = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}  # SAM's: double
            output = predictor.model(**inputs, multimask_output=multimask)
            masks, scores, logits = predict(multimask_output=multimask, **prompts)
            assert torch.allclose(scores, output.iou_scores[0], atol=1e-6)
            assert torch.allclose(logits, output.pred_masks[0], atol=1e-5)
            assert masks.shape == (len(scores), 3 if multimask else 1, HEIGHT, WIDTH)
            assert torch.equal(masks, predictor.processor.post_process_masks([logits], *sizes)[0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["ours", "sam"])
def test_each_prompt_has_its_own_mask(request, name):
    predictor = request.getfixturevalue(name)
    predict = encode(predictor, noise())
    _, before, logits = predict(input_points=POINTS, input_labels=LABELS)
    previous = logits[:, 0]
    _, scores, both = predict(input_points=POINTS, input_labels=LABELS, input_masks=previous)
    assert not torch.allclose(scores, before)
    for i in range(2):
        alone = predictor.model(
            **predict.embeddings,
            input_points=(POINTS[[i]] * predict.scale).float()[None],
            input_labels=LABELS[[i]][None],
            input_masks=previous[[i]][None],
        )
        assert torch.allclose(alone.pred_masks[0, 0], both[i], atol=1e-5)


def test_images_of_any_shape_are_encoded_in_their_order(ours):
    images = [noise(30, 20), noise(20, 30), noise(30, 20)]
    ours.processor.image_processor.size_divisor = 16
    together = ours.encode([prepare_image(ours.processor, image) for image in images])
    for image, predict in zip(images, together, strict=True):
        alone = encode(ours, image)
        ours_alone = alone.embeddings["image_embeddings"]
        assert torch.allclose(predict.embeddings["image_embeddings"], ours_alone, atol=1e-5)
        masks, _, _ = predict(input_boxes=torch.tensor([[2.0, 3, 12, 9]]))
        assert masks.shape == (1, 3, image.height, image.width)


def test_the_input_of_a_model(ours, sam):
    assert ours.input_size() == sam.input_size() == {"height": 64, "width": 64}


@pytest.mark.parametrize("name", tiny_peers.PEERS)
def test_every_peer_is_loaded_and_asked(tmp_path, name):
    predictor = load_mask_predictor(str(tiny_peers.save(tmp_path, name)), "cpu")
    images = [prepare_image(predictor.processor, noise(width)) for width in (30, 40)]
    _, second = predictor.encode(images)
    masks, scores, logits = second(input_boxes=BOXES)
    assert masks.shape == (3, 3, HEIGHT, 40) and scores.shape == (3, 3)
    (alone,) = predictor.encode(images[1:])
    assert torch.allclose(alone(input_boxes=BOXES)[2], logits, atol=1e-4)
    again, _, _ = second(input_boxes=BOXES, input_masks=logits[:, 0])
    assert again.shape == masks.shape


def test_loading(ours, sam, tmp_path):
    sam.model.save_pretrained(tmp_path / "sam")
    sam.processor.save_pretrained(tmp_path / "sam")
    loaded = load_mask_predictor(str(tmp_path / "sam"), "cpu")
    assert isinstance(loaded.model, SamModel) and not loaded.model.training
    image = noise()
    boxes = {"input_boxes": BOXES}
    assert torch.equal(encode(loaded, image)(**boxes)[2], encode(sam, image)(**boxes)[2])

    ours.model.save_pretrained(tmp_path / "ours")
    ours.processor.save_pretrained(tmp_path / "ours")
    loaded = load_mask_predictor(str(tmp_path / "ours"), "cpu")
    # Not bit for bit: loaded weights may lie at another alignment, for which products are summed in another order.
    torch.testing.assert_close(encode(loaded, image)(**boxes)[2], encode(ours, image)(**boxes)[2], rtol=0, atol=1e-5)


def test_what_cannot_be_loaded(sam, tmp_path):
    sam.processor.save_pretrained(tmp_path / "sam")
    sam.model.config.save_pretrained(tmp_path / "sam")
    with pytest.raises(ValueError, match=r"sam cannot be loaded: .*no file named"):
        load_mask_predictor(str(tmp_path / "sam"), "cpu")
    with pytest.raises(ValueError, match="no such directory"):
        load_mask_predictor(str(tmp_path / "nothing"), "cpu")
