import json

import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from pycocotools import mask as rle_codec

from hf_efficientsam.training.data.coco import CocoMasks
from hf_efficientsam.training.masks import feature_views
from hf_efficientsam.training.masks.batch import MaskDataConfig, MaskViews, collate
from hf_efficientsam.training.masks.feature_views import cache_views, encode_rest
from hf_efficientsam.training.masks.views import view_of

SIZE = 64


@pytest.fixture
def data(coco):
    source = CocoMasks(coco / "masks.json")
    return MaskViews([source, source], MaskDataConfig(image_size=SIZE, max_masks=3), noise_size=12, views=[4])


@pytest.fixture
def model():
    return tiny.one_layer_model(background_points=True, mask_prompts=True)


def cached(model, data, folder, last_layers=0):
    return cache_views(model, data, folder, last_layers, Accelerator(cpu=True))


def test_cached_hidden_states_are_those_of_the_views_that_training_sees(model, data, tmp_path):
    cache = cached(model, data, tmp_path / "cache")
    for epoch in range(3):
        data.set_epoch(epoch)
        batch = collate([data[index] for index in (0, 3, 7)])
        embeddings = encode_rest(model.vision_encoder, cache.read(batch.keys, batch.views), 0)
        torch.testing.assert_close(embeddings, model.get_image_embeddings(batch.pixel_values), atol=0.02, rtol=0)


def test_only_what_is_missing_is_encoded(model, data, tmp_path, monkeypatch):
    encoded, encode = [], feature_views.encode_frozen
    monkeypatch.setattr(feature_views, "PART_SIZE", 2)
    monkeypatch.setattr(feature_views, "encode_frozen", lambda *given: encoded.append(1) or encode(*given))
    cached(model, data, tmp_path / "cache")
    assert len(encoded) == 4 * 5  # views of images, though each image comes twice
    lost = tmp_path / "cache" / "file_1" / "view_0002" / "part_000001.safetensors"
    content = lost.read_bytes()
    lost.unlink()
    (tmp_path / "cache" / "file_1" / "index.safetensors").unlink()
    cached(model, data, tmp_path / "cache")
    assert len(encoded) == 4 * 5 + 2 and lost.read_bytes() == content
    cached(model, data, tmp_path / "cache")
    assert len(encoded) == 4 * 5 + 2


def test_a_cache_of_something_else_is_refused(model, data, tmp_path):
    cached(model, data, tmp_path / "cache")
    with torch.no_grad():
        model.vision_encoder.neck.conv.weight.add_(1)  # which is not in it
    cached(model, data, tmp_path / "cache")
    with torch.no_grad():
        model.vision_encoder.layers[0].mlp.fc1.weight.add_(1)
    with pytest.raises(ValueError, match="encoder is"):
        cached(model, data, tmp_path / "cache")
    with pytest.raises(ValueError, match="frozen_layers is 1, not 0"):
        cached(model, data, tmp_path / "cache", last_layers=1)
    assert json.loads((tmp_path / "cache" / "file_1" / "manifest.json").read_text())["size"] == SIZE


def test_views_are_whole_mirrored_and_zoomed_on_a_small_object():
    masks = np.zeros((200, 400, 2), np.uint8, order="F")
    masks[50:60, 300:330, 0] = 1
    masks[0:180, 0:250, 1] = 1
    rles = rle_codec.encode(masks)
    assert view_of("a", 0, rles) == ((0, 0, 400, 200), False)
    assert view_of("a", 1, rles) == ((0, 0, 400, 200), True)
    zoomed = [view_of("a", number, rles) for number in range(2, 8)]
    for (left, top, right, bottom), _ in zoomed:
        assert 0 <= left <= 300 < 330 <= right <= 400 and 0 <= top <= 50 < 60 <= bottom <= 200
        assert (right - left, bottom - top) == (100, 50)
    assert len(set(zoomed)) == 6 and {view.is_mirrored for view in zoomed} == {False, True}
    assert view_of("a", 3, rles) == zoomed[1] != view_of("b", 3, rles)


def test_items_show_the_masks_of_their_view(data):
    seen = set()
    for epoch in range(6):
        data.set_epoch(epoch)
        for index in range(5):
            item = data[index]
            seen.add(item["view"])
            assert item["mask_bits"].flatten(1).any(1).all() and item["mask_bits"].shape[1:] == (SIZE, SIZE // 8)
            assert torch.equal(item["pixel_values"], data.view_pixels(index, item["view"])[1])
    assert seen == {0, 1, 2, 3}
