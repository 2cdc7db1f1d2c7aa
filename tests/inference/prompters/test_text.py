"""Objects by their names."""

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

from hf_efficientsam.inference.prompters import Detector, TextPrompter
from hf_efficientsam.inference.prompters.text import match_name, split_names

WIDTH, HEIGHT = 60, 40  # of the images


class FakeDetector(Detector):
    def __init__(self, boxes, scores, labels):
        self.answer = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(scores), labels

    def __call__(self, image, names, threshold=None):
        self.asked = image, names, threshold
        return self.answer


def test_boxes_of_a_detector_become_masks(predictor, image):
    boxes = [[5, 5, 30, 30], [10, 0, 60, 40], [5, 5, 30, 31], [5, 5, 30, 30], [60, 3, 60, 9]]
    detector = FakeDetector(boxes, [0.5, 0.9, 0.6, 0.4, 0.8], ["a dog", "a cat", "a dog", "a cat", "a cat"])
    found = TextPrompter(predictor, detector, threshold=0.3)("a dog, a cat")
    assert found.boxes.tolist() == [boxes[1], boxes[2], boxes[3]] and found.labels == ["a cat", "a dog", "a cat"]
    assert found.scores.tolist() == pytest.approx([0.9, 0.6, 0.4])
    assert np.array_equal(found.masks, predictor.segment(boxes=found.boxes.tolist()).masks)
    assert np.array_equal(detector.asked[0], image) and detector.asked[1:] == (["a dog", "a cat"], 0.3)
    assert len(TextPrompter(predictor, detector, nms_threshold=1)("a dog")) == 4


def test_nothing_found_is_an_empty_result(predictor, other_image):
    found = TextPrompter(predictor, FakeDetector([], [], []))(["unicorn"], other_image)
    assert len(found) == 0 and found.masks.shape == (0, HEIGHT, WIDTH) and found.labels == []
    assert np.array_equal(predictor.image, other_image)


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


def test_tiny_owl(predictor, tmp_path, image):
    name = save_owl(tmp_path)
    boxes, scores, labels = Detector(name)(image, ["a dog", "a cat"], 0)
    assert len(boxes) == len(scores) == len(labels) == 4 and set(labels) <= {"a dog", "a cat"}
    assert boxes.min() >= 0 and (boxes <= torch.tensor([WIDTH, HEIGHT] * 2)).all() and boxes.std() > 1
    raw = Detector(name)
    inputs = raw.processor(images=image, text=[["a dog", "a cat"]], return_tensors="pt")
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
