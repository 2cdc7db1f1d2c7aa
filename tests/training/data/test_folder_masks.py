from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from hf_efficientsam.training.data.coco import AnnotationConfig, decode_rles
from hf_efficientsam.training.data.folder_masks import FolderMasks, UnitedMasks


def write(folder, masks, size=(20, 10), **saving):
    """`images/NUMBER.jpg` and `masks/NUMBER.png` of these arrays or images."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(exist_ok=True)
    for number, mask in enumerate(masks):
        Image.new("RGB", size, (90 * number, 0, 0)).save(folder / "images" / f"{number}.jpg", **saving)
        mask = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        mask.save(folder / "masks" / f"{number}.png")
    return folder


BOX, OTHER = np.zeros((2, 10, 20), np.uint8)
BOX[2:5, 3:8] = 1
OTHER[6:9, 10:18] = 1


def test_each_image_has_its_mask(tmp_path):
    dataset = FolderMasks(write(tmp_path, [BOX * 255, OTHER * 255]))
    assert len(dataset) == 2
    for number, (sample, expected) in enumerate(zip(dataset, (BOX, OTHER), strict=False)):
        assert (decode_rles(sample.rles) == expected[None]).all()
        assert sample.image.size == (20, 10) and abs(sample.image.getpixel((0, 0))[0] - 90 * number) < 5
        assert (sample.image_id, sample.annotation_ids, sample.source) == (number, [number], tmp_path.name)
        (tmp_path / "images" / f"{number}.jpg").unlink()
        assert dataset.without_image(number) == replace(sample, image=None)
        assert UnitedMasks(dataset).without_image(number).image is None


def colors(*objects):
    pixels = np.zeros((10, 20, 3), np.uint8)
    for one, color in zip(objects, ((128, 0, 0), (0, 128, 0)), strict=True):
        pixels[one > 0] = color
    return pixels


def palette():
    image = Image.fromarray(BOX + 2 * OTHER)
    image.putpalette(list(range(256)) * 3)
    return image


@pytest.mark.parametrize(
    "mask",
    [
        BOX + 2 * OTHER,
        BOX * 85 + OTHER * 255,
        palette(),
        colors(BOX, OTHER),
        (BOX + 2 * OTHER).astype(np.uint16) * 300,
    ],
    ids=["1 and 2", "grey and white", "palette", "colours", "16 bits"],
)
def test_each_label_of_a_mask_is_an_object(tmp_path, mask):
    (sample,) = FolderMasks(write(tmp_path, [mask]))
    assert sorted(mask.tolist() for mask in decode_rles(sample.rles)) == sorted([BOX.tolist(), OTHER.tolist()])
    assert len(set(sample.annotation_ids)) == 2


@pytest.mark.parametrize("white", [1, 100, 255])
def test_a_mask_of_one_value_is_one_object(tmp_path, white):
    (sample,) = FolderMasks(write(tmp_path, [BOX * white]))
    assert (decode_rles(sample.rles) == BOX[None]).all()


def test_a_cut_out_is_where_it_is_opaque(tmp_path):
    mask = Image.new("RGBA", (20, 10), (255, 255, 255, 0))
    mask.putalpha(Image.fromarray(BOX * 255))
    (sample,) = FolderMasks(write(tmp_path, [mask]))
    assert (decode_rles(sample.rles) == BOX[None]).all()


def test_a_soft_edge_is_cut_at_half_its_brightness_and_that_is_said_once(tmp_path, caplog):
    large = Image.fromarray(BOX * 255).resize((200, 100), Image.Resampling.NEAREST)
    soft = [large.filter(ImageFilter.GaussianBlur(radius)) for radius in (1, 2)]
    soft.append(Image.fromarray(np.asarray(soft[0]).astype(np.uint16) * 257))
    dataset = FolderMasks(write(tmp_path, soft, size=(200, 100)))
    assert caplog.text.count("soft edges") == 1 and all(f"{number}.png" in caplog.text for number in range(3))
    assert len(dataset) == 3
    for sample in dataset:
        (mask,) = decode_rles(sample.rles)
        assert np.abs(mask.astype(int) - (np.asarray(large) > 0)).sum() < 40, "but for the corners"


def test_what_is_missing_or_does_not_fit_is_named_at_the_start(tmp_path, caplog):
    caplog.set_level("INFO")
    write(tmp_path, [BOX, 0 * BOX, OTHER])
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "images" / ".hidden").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "images" / ".hidden" / "3.jpg")
    Image.fromarray(BOX).save(tmp_path / "masks" / "4.png")
    dataset = FolderMasks(tmp_path)
    assert [sample.image_id for sample in dataset] == [0, 2]
    assert "2 images with 2 masks; left out: 1 images with an empty mask." in caplog.text
    assert "3 images; left out: 1 files ending in .txt." in caplog.text
    assert "masks: 1 files are of no image and are left out, such as 4" in caplog.text
    for number in (0, 1):
        Image.new("L", (21, 10), 255).save(tmp_path / "masks" / f"{number}.png")
    with pytest.raises(ValueError, match=r"(?s)\(2\):.*0\.png does not .* 20 x 10 pixels.* 21 x 10.*1\.png does not"):
        FolderMasks(tmp_path)
    for number in (0, 1):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"(?s)\(2\):.*0\.jpg cannot be read .*1\.jpg cannot be read"):
        FolderMasks(tmp_path)
    for number in (0, 1):
        Image.new("L", (20, 10), 255).save(tmp_path / "masks" / f"{number}.png")
    dataset = FolderMasks(tmp_path, check_images=False)
    assert len(dataset) == 3 and dataset[2].image_id == 2
    with pytest.raises(ValueError, match=r"0\.jpg cannot be read"):
        dataset[0]
    (tmp_path / "masks" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"There is no .*1\.png; every image"):
        FolderMasks(tmp_path)
    Image.new("RGB", (20, 10)).save(tmp_path / "images" / "0.png")
    with pytest.raises(ValueError, match=r"(?s)have one name.* \(1\):\s+0\.jpg and 0\.png$"):
        FolderMasks(tmp_path)
    (tmp_path / "images" / "0.png").unlink()
    for name in ("0.bmp", "of_no_image.bmp", "of_no_image.png"):
        Image.new("L", (20, 10)).save(tmp_path / "masks" / name)
    with pytest.raises(ValueError, match=r"(?s)are of one image; keep one of each \(1\):\s+0\.bmp and 0\.png$"):
        FolderMasks(tmp_path)
    with pytest.raises(ValueError, match="There is no image"):
        FolderMasks(tmp_path / "elsewhere")


def test_a_palette_of_greys_means_its_greys(tmp_path):
    mask = Image.fromarray(1 - BOX)
    mask.putpalette([255] * 3 + [0] * 3)  # white comes first
    (sample,) = FolderMasks(write(tmp_path, [mask]))
    assert (decode_rles(sample.rles) == BOX[None]).all()


def test_a_jpeg_is_read_as_black_and_white_or_refused(tmp_path):
    write(tmp_path, [BOX, BOX])
    for number, mask in enumerate((BOX * 255, BOX * 100 + OTHER * 255)):
        (tmp_path / "masks" / f"{number}.png").unlink()
        Image.fromarray(mask).resize((200, 100), Image.Resampling.NEAREST).save(tmp_path / f"masks/{number}.jpg")
        Image.new("RGB", (200, 100)).save(tmp_path / f"images/{number}.jpg")
    with pytest.raises(ValueError, match=r"(?s)\(1\):\s+\S+1\.jpg: a mask is a JPEG, whose values are not exact"):
        FolderMasks(tmp_path)
    for kind in ("images", "masks"):
        (tmp_path / kind / "1.jpg").unlink()
    (sample,) = FolderMasks(tmp_path)
    (mask,) = decode_rles(sample.rles)
    assert np.abs(mask[5::10, 5::10].astype(int) - BOX).sum() == 0


def test_colours_that_run_into_each_other_are_refused(tmp_path):
    soft = Image.fromarray(colors(BOX, OTHER)).resize((200, 100)).filter(ImageFilter.GaussianBlur(2))
    with pytest.raises(ValueError, match=r"0\.png: a mask's colours run into each other"):
        FolderMasks(write(tmp_path, [soft], size=(200, 100)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("frame", ["upright", "stored"])
def test_masks_of_a_turned_photograph_come_out_upright(tmp_path, caplog, orientation, frame):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(BOX * 255)
    whole = Image.fromarray(BOX * 255)
    whole.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(whole)
    mask = upright if frame == "upright" else stored
    write(tmp_path, [mask], exif=exif)
    given = AnnotationConfig(mask_frame=None if orientation >= 5 else frame)
    (sample,) = FolderMasks(tmp_path, given)
    assert sample.image.size == upright.size
    assert (decode_rles(sample.rles)[0] * 255 == np.asarray(upright)).all()
    assert "EXIF" not in caplog.text
    if orientation in (2, 3, 4) and frame == "upright":
        FolderMasks(tmp_path)
        assert "an EXIF tag turns or mirrors" in caplog.text and "0.jpg" in caplog.text


def test_the_shared_data(shared):
    dataset = FolderMasks(shared / "data" / "saliency" / "val")
    assert len(dataset) == 80 and 0 < decode_rles(dataset[0].rles).mean() < 1
