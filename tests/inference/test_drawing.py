import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hf_efficientsam.inference.drawing import (
    BACKGROUND_COLOR,
    FOREGROUND_COLOR,
    OPACITY,
    PALETTE,
    PANEL_SIDE,
    REMOVED_COLOR,
    draw_classes,
    draw_features,
    draw_masks,
    lay_masks,
    line_width,
    pca_colors,
)

GRAY = (100, 100, 100)


def square(size=(280, 200), box=(60, 40, 180, 140)) -> np.ndarray:
    mask = np.zeros(size[::-1], dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def draw(masks, size=(280, 200), **prompts) -> np.ndarray:
    return np.asarray(draw_masks(Image.new("RGB", size, GRAY), masks, **prompts)).astype(int)


def blend(color, below=GRAY) -> np.ndarray:
    return (1 - OPACITY) * np.array(below) + OPACITY * np.array(color)


def near(pixel, color, tolerance=1) -> bool:
    return bool(np.abs(pixel - np.array(color)).max() <= tolerance)


def test_inside_is_tinted_outside_is_untouched():
    picture = draw([square()])
    assert near(picture[50:130, 70:170], blend(PALETTE[0]))
    outside = ~square(box=(54, 34, 186, 146))
    assert near(picture[outside], GRAY, 0)


def test_outline_in_the_color_of_the_object_with_a_light_edge():
    picture = draw([square()])
    for row, column in [(90, 60), (90, 179), (40, 120), (139, 120)]:  # the outermost pixels of the mask
        assert near(picture[row, column], PALETTE[0], 60)
        assert not near(picture[row, column], blend(PALETTE[0]), 20)
    assert picture[90, 59].min() > 130  # lighter than the ground


@pytest.mark.parametrize("kind", ["tensor", "numbers", "stack", "logits"])
def test_masks_of_any_kind(kind):
    mask = square()
    masks = {
        "tensor": torch.from_numpy(mask)[None],
        "numbers": [mask.astype(np.uint8) * 255],
        "stack": mask[None],
        "logits": [np.where(mask, 3.0, -3.0)],
    }[kind]
    assert np.array_equal(draw(masks), draw([mask]))


def test_each_object_has_its_color_and_later_ones_lie_above():
    masks = [square(box=(0, 0, 100, 200)), square(box=(150, 0, 280, 200)), square(box=(180, 100, 280, 200))]
    picture = draw(masks)
    assert near(picture[150, 50], blend(PALETTE[0]))
    assert near(picture[50, 260], blend(PALETTE[1]))
    assert near(picture[150, 230], blend(PALETTE[2], blend(PALETTE[1])), 2)
    assert len(draw([square()] * 10)) == 200  # more objects than colours


def test_color_blind_safe_palette():
    """No two colours look alike to people without one kind of cone (simulation of Vienot, Brettel and Mollon 1999)."""
    linear = (np.array(PALETTE) / 255) ** 2.2
    to_lms = np.array([[17.8824, 43.5161, 4.1193], [3.4557, 27.1554, 3.8671], [0.02996, 0.18431, 1.4670]])
    protan, deutan = np.eye(3), np.eye(3)
    protan[0], deutan[1] = (0, 2.02344, -2.52581), (0.494207, 0, 1.24827)
    for cones in (np.eye(3), protan, deutan):
        seen = (linear @ (np.linalg.inv(to_lms) @ cones @ to_lms).T).clip(0, 1) ** (1 / 2.2)
        distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
        assert distances[~np.eye(len(PALETTE), dtype=bool)].min() > 0.1


def test_box():
    picture = draw([np.zeros((200, 280), bool), square(box=(0, 0, 40, 40))], boxes=[[100, 50, 200, 150], None])
    for row, column in [(50, 150), (150, 150), (100, 100), (100, 200)]:
        assert near(picture[row, column], PALETTE[0])
    assert near(picture[100, 150], GRAY)


def test_points():
    empty = np.zeros((200, 280), bool)
    picture = draw([empty], points=[[(100.0, 50.0), (200.0, 150.0), (30, 30)]], labels=[[1, 0, -1]])
    radius = 3 * line_width((280, 200)) + 1
    assert near(picture[50, 100], FOREGROUND_COLOR) and near(picture[150, 200], BACKGROUND_COLOR)
    assert near(picture[50, 100 + radius], (255, 255, 255), 60)  # the white ring
    assert near(picture[150, 200 + radius], GRAY, 10)  # a cross leaves its sides free
    assert picture[50 - radius : 51 + radius, 100 - radius : 101 + radius].min() >= 0
    assert near(picture[30, 30], GRAY, 0)  # padding
    assert np.array_equal(draw([empty], points=[[(9, 9)]]), draw([empty], points=[[(9, 9)]], labels=[[1]]))


def test_points_and_boxes_at_the_border():
    corners = [(0, 0), (280, 200), (279, 0)]
    picture = draw([square()], points=[corners], labels=[[1, 1, 0]], boxes=[[-5, -5, 285, 205]])
    assert near(picture[0, 0], FOREGROUND_COLOR)


def test_tags():
    """Numbers where there are several objects, scores where they are given; a tag stays within the picture."""
    mask = square(box=(200, 0, 280, 80))  # a tag on its upper edge would stick out
    plain, scored, two = draw([mask]), draw([mask], scores=[0.5]), draw([mask, square()])
    changed = np.argwhere((plain != scored).any(axis=-1))
    assert scored[:20, 200:].max(axis=-1).min() < 60  # dark letters on a light colour
    assert len(changed) > 50 and changed[:, 0].max() < 30 and changed[:, 1].min() > 190
    only_second = draw([np.zeros_like(mask), square()])
    tag_of_first = (two != only_second).any(axis=-1) & ~square(box=(190, 0, 280, 90))
    assert not tag_of_first.any()
    solid = (np.abs(two[:20, 200:] - np.array(PALETTE[0])).max(axis=-1) <= 1).sum()
    assert solid > (np.abs(plain[:20, 200:] - np.array(PALETTE[0])).max(axis=-1) <= 1).sum() + 30


def test_many_masks_without_tags_one_at_a_time():
    masks = [square(), square(box=(150, 100, 260, 190))]
    laid = np.asarray(lay_masks(Image.new("RGB", (280, 200), GRAY), (mask for mask in masks)))
    drawn = draw(masks)
    assert near(laid[120, 230], blend(PALETTE[1])) and not np.array_equal(laid, drawn)
    rows = np.abs(laid - drawn).max(axis=(1, 2)).nonzero()[0]
    assert rows.max() < 110  # the tags stand on the masks' first rows, 40 and 100
    assert np.array_equal(lay_masks(Image.new("RGB", (280, 200), GRAY), masks[:1]), draw(masks[:1]))


def test_lines_grow_with_the_picture():
    widths = [line_width((side, side // 2)) for side in (10, 280, 640, 4000)]
    assert widths == [1, 1, 2, 14]
    small = draw([square()], points=[[(120, 90)]], scores=[0.9])
    size = (2800, 2000)
    large = draw([square(size, (600, 400, 1800, 1400))], size, points=[[(1200, 900)]], scores=[0.9])
    shrunk = Image.fromarray(large.astype(np.uint8)).resize((280, 200), Image.Resampling.BOX)
    assert np.abs(np.asarray(shrunk).astype(int) - small).mean() < 5


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 50)])
def test_tiny_pictures(size):
    mask = np.ones(size[::-1], bool)
    picture = draw([mask, mask], size, points=[[(0, 0)], []], boxes=[[0, 0, 1, 1], None], scores=[0.1, 0.2])
    assert picture.shape == (*size[::-1], 3)


def test_empty_masks_and_no_masks():
    assert near(draw([np.zeros((200, 280), bool)], scores=[0.3]), GRAY, 0)
    assert near(draw([]), GRAY, 0)


def test_the_picture_given_stays_as_it_is():
    image = Image.new("L", (280, 200), 100)
    result = draw_masks(image, [square()])
    assert result.mode == "RGB" and result.size == (280, 200)
    assert ImageOps.grayscale(image).getextrema() == (100, 100)
    color = Image.new("RGB", (280, 200), GRAY)
    draw_masks(color, [square()])
    assert color.getextrema() == ((100, 100),) * 3


def test_wrong_input():
    image = Image.new("RGB", (280, 200))
    with pytest.raises(ValueError, match=r"shape \(280, 200\), but the image is 200 pixels high and 280 wide"):
        draw_masks(image, [square().T])
    for name, values in [("points", []), ("boxes", [[0, 0, 1, 1]] * 2), ("scores", [0.1, 0.2]), ("labels", [])]:
        with pytest.raises(ValueError, match=f"1 masks but {name} for {len(values)} objects"):
            draw_masks(image, [square()], **{name: values})


def test_each_class_has_a_color_of_its_own():
    """As many as ADE20K has, told apart by at least one channel; no class leaves the picture as it is."""
    classes = np.arange(150, dtype=np.uint8).reshape(10, 15)
    picture = np.asarray(draw_classes(Image.new("RGB", (15, 10)), classes)).astype(int).reshape(-1, 3)
    distances = np.abs(picture[:, None] - picture).max(axis=2)
    assert distances[~np.eye(150, dtype=bool)].min() >= 8
    picture = np.asarray(draw_classes(Image.new("RGB", (2, 1), GRAY), torch.tensor([[1, 255]])))
    assert near(picture[0, 0], 0.3 * np.array(GRAY) + 0.7 * np.array(PALETTE[1])) and near(picture[0, 1], GRAY, 0)
    with pytest.raises(ValueError, match=r"shape \(2, 1\); the image is 1 pixels high and 2 wide"):
        draw_classes(Image.new("RGB", (2, 1)), np.zeros((2, 1)))


# ------------------------------------------------------------------------------------------------ features


def test_principal_components_worked_by_hand():
    """Three directions of falling strength, at right angles, each red, green or blue; an offset does not matter."""
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 3)))[0].T
    axes *= np.sign(axes.sum(axis=1, keepdims=True))
    corners = np.array([[r, g, b] for r in (-3, 3) for g in (-2, 2) for b in (-1, 1)])
    colors = pca_colors(torch.from_numpy(corners @ axes + 5))
    assert colors.dtype == np.uint8 and np.array_equal(colors, 255 * (corners > 0))


def test_the_reference_gives_the_colors():
    reference = np.random.default_rng(0).normal(size=(4, 50, 6))
    colors = pca_colors(reference)
    assert colors.shape == (4, 50, 3)
    assert np.array_equal(pca_colors(reference[1], reference), colors[1])
    assert not np.array_equal(pca_colors(reference[1]), colors[1])
    assert np.array_equal(pca_colors(reference + 100, reference + 100), colors)


def test_one_odd_patch_does_not_take_all_the_contrast():
    features = np.random.default_rng(0).normal(size=(200, 6))
    features[0] *= 100
    assert pca_colors(features)[1:, 0].std() > 50


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_directions_that_do_not_vary_are_gray(channels):
    features = np.zeros((10, channels))
    assert (pca_colors(features) == 128).all()
    features[:, 0] = np.arange(10)
    colors = pca_colors(features)
    assert colors[0, 0] == 0 and colors[9, 0] == 255 and (colors[:, 1:] == 128).all()


def cell(picture: Image.Image, row: int, column: int, grid=(2, 3)) -> np.ndarray:
    """The middle of each patch `[h, w, 3]` in one cell of a feature picture."""
    patch, gap = PANEL_SIDE // max(grid), PANEL_SIDE // 32
    left, top = gap + column * (PANEL_SIDE + gap), PANEL_SIDE // 8 + row * (patch * grid[0] + gap)
    pixels = np.asarray(picture).astype(int)[top : top + patch * grid[0], left : left + PANEL_SIDE]
    return pixels[patch // 2 :: patch, patch // 2 :: patch]


def test_draw_features():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 255, (2, 2, 3, 3), dtype=np.uint8)  # two images of 2 x 3 patches
    images = [Image.fromarray(block).resize((48, 32), Image.Resampling.NEAREST) for block in blocks]
    masks = np.array([[1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 0]])
    targets = rng.normal(size=(2, 6, 5))
    reconstructions = 0.5 * targets
    picture = draw_features(images, torch.from_numpy(masks), targets, torch.from_numpy(reconstructions), (2, 3))
    for row in (0, 1):
        assert near(cell(picture, row, 0), blocks[row], 2)
        removed = masks[row].reshape(2, 3, 1)
        assert near(cell(picture, row, 1), np.where(removed, REMOVED_COLOR, blocks[row]), 2)
        assert near(cell(picture, row, 2), pca_colors(targets)[row].reshape(2, 3, 3))
        assert near(cell(picture, row, 3), pca_colors(reconstructions, targets)[row].reshape(2, 3, 3))
    header = np.asarray(picture)[: PANEL_SIDE // 8]
    assert header.min() < 100 and header.max() == 255  # words


def test_pixels_are_shown_in_their_places():
    """The patches of a picture, by channel, row, column as the model orders them, give the picture again."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    patches = torch.nn.functional.unfold(pixels, 16, stride=16).transpose(1, 2)
    picture = draw_features([image], np.zeros((1, 6)), patches / 100 - 1, patches / 100 - 1, (2, 3), pixels=True)
    plain = image.resize((PANEL_SIDE, PANEL_SIDE * 2 // 3), Image.Resampling.NEAREST)
    gap = PANEL_SIDE // 32
    for column in (2, 3):
        left, top = gap + column * (PANEL_SIDE + gap), PANEL_SIDE // 8
        shown = picture.crop((left, top, left + plain.width, top + plain.height))
        assert np.abs(np.asarray(shown).astype(int) - np.asarray(plain)).max() < 15  # up to the stretched contrast


def test_wrong_features():
    image, features = Image.new("RGB", (32, 32)), np.zeros((1, 4, 5))
    with pytest.raises(ValueError, match="5 channels, but the reference 6"):
        pca_colors(features, np.zeros((4, 6)))
    with pytest.raises(ValueError, match="not finite"):
        pca_colors(features * np.nan, features)
    with pytest.raises(ValueError, match="not finite"):
        pca_colors(features, features + np.inf)
    with pytest.raises(ValueError, match=r"masks have shape \[1, 3\], but 1 images on a grid of 2 x 2 need \[1, 4"):
        draw_features([image], np.zeros((1, 3)), features, features, (2, 2))
    with pytest.raises(ValueError, match=r"reconstructions have shape \[2, 4, 5\]"):
        draw_features([image], np.zeros((1, 4)), features, np.zeros((2, 4, 5)), (2, 2))
