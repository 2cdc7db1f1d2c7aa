import numpy as np
import pytest
from PIL import Image

from hf_efficientsam.training.data.coco import decode_rles
from hf_efficientsam.training.data.saliency import SaliencyMasks


@pytest.fixture
def folder(tmp_path):
    for number, white in enumerate((255, 128)):
        for kind in ("images", "masks"):
            (tmp_path / kind).mkdir(exist_ok=True)
        Image.new("RGB", (20, 10), (90 * number, 0, 0)).save(tmp_path / "images" / f"{number}.jpg")
        mask = np.full((10, 20), 127, np.uint8)
        mask[2:5, 3 : 8 + number] = white
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
    return tmp_path


def test_each_image_has_its_mask(folder):
    dataset = SaliencyMasks(folder)
    assert len(dataset) == 2
    for number, sample in enumerate(dataset[i] for i in range(2)):
        expected = np.zeros((10, 20), bool)
        expected[2:5, 3 : 8 + number] = True
        assert (decode_rles(sample.rles)[0] == expected).all()
        assert sample.image.size == (20, 10) and abs(sample.image.getpixel((0, 0))[0] - 90 * number) < 5
        assert (sample.image_id, sample.annotation_ids, sample.source) == (number, [number], folder.name)


def test_what_is_missing_or_does_not_fit_is_named(folder):
    Image.new("L", (20, 10)).save(folder / "masks" / "0.png")
    Image.new("L", (21, 10), 255).save(folder / "masks" / "1.png")
    dataset = SaliencyMasks(folder)
    for number in range(2):
        with pytest.raises(ValueError, match=rf"{number}\.png is empty or of another size"):
            dataset[number]
    (folder / "masks" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"There is no mask .*1\.png; each image"):
        SaliencyMasks(folder)
    Image.new("RGB", (20, 10)).save(folder / "images" / "0.png")
    with pytest.raises(ValueError, match="have one name"):
        SaliencyMasks(folder)
    with pytest.raises(ValueError, match="There is no image"):
        SaliencyMasks(folder / "elsewhere")


def test_the_shared_data(shared):
    dataset = SaliencyMasks(shared / "data" / "saliency" / "val")
    assert len(dataset) == 80 and 0 < decode_rles(dataset[0].rles).mean() < 1
