"""What is accepted has an effect; everything else is refused by its name."""

import numpy as np
import pytest
import tiny
import torch

EMBEDDINGS, BOXES = torch.zeros(1, tiny.CHANNELS, 4, 4), torch.tensor([[[8.0, 8, 50, 50]]])
PIXELS = torch.zeros(1, 3, tiny.SIZE, tiny.SIZE)
MODELS = {
    "model": (tiny.model, {"image_embeddings": EMBEDDINGS, "input_boxes": BOXES}),
    "model with pixels": (tiny.model, {"pixel_values": PIXELS, "input_boxes": BOXES}),
    "encoder": (tiny.vision_model, {"pixel_values": PIXELS}),
    "backbone": (tiny.backbone, {"pixel_values": PIXELS}),
    "classifier": (tiny.classifier, {"pixel_values": PIXELS}),
    "sami": (tiny.sami_model, {"pixel_values": PIXELS}),
    "saliency": (tiny.saliency_head, {"image_embeddings": EMBEDDINGS}),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "name", ["attention_similarity", "target_embedding", "input_box", "position_ids", "is_causal"]
)
def test_a_model_refuses_an_argument_that_it_does_not_use(kind, name):
    make, arguments = MODELS[kind]
    model = make()
    with pytest.raises(TypeError, match=f"takes no {name}; leave it out"):
        model(**arguments, **{name: torch.zeros(1)})
    with torch.no_grad():
        model(**arguments, **{name: None}, output_hidden_states=True, return_dict=True)


def test_options_nested_as_in_transformers_act():
    processor, image = tiny.processor(), np.full((30, 40, 3), 90, np.uint8)
    plain = processor(image, do_normalize=False, return_tensors="np")
    nested = processor(
        image,
        images_kwargs={"do_normalize": False},
        common_kwargs={"return_tensors": "np"},
        text_kwargs={},
        audio_kwargs={},
        videos_kwargs=None,
    )
    assert isinstance(nested["pixel_values"], np.ndarray)
    assert np.array_equal(nested["pixel_values"], plain["pixel_values"])


@pytest.mark.parametrize("given", [{"images": np.zeros((30, 40, 3), np.uint8)}, {"original_sizes": [(30, 40)]}])
@pytest.mark.parametrize(
    "option",
    [{"do_pad": True}, {"text_kwargs": {"padding": True}}, {"images_kwargs": {"sise": 32}}, {"text": "a cat"}],
)
def test_a_processor_refuses_an_option_that_it_does_not_have(given, option):
    name = next(iter(next(iter(option.values())))) if "images_kwargs" in option else next(iter(option))
    with pytest.raises(TypeError, match=name):
        tiny.processor()(**given, input_boxes=[[[1, 1, 20, 20]]], **option)
