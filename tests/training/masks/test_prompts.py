import torch

from hf_efficientsam.training.masks.prompts import jitter_boxes, sample_error_points, sample_points


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(masks, points):
    """The values of masks [N,H,W] at points [N,2]."""
    x, y = points.long().unbind(-1)
    return masks[torch.arange(len(masks)), y, x]


def test_jitter_is_a_tenth_of_the_side():
    boxes = torch.tensor([500.0, 500.0, 600.0, 540.0]).expand(4000, 4)
    shift = jitter_boxes(boxes, 1024, uniform(4000, 4)) - boxes
    assert torch.allclose(shift.std(0), torch.tensor([10.0, 4.0, 10.0, 4.0]), rtol=0.1)
    assert shift.mean(0).abs().max() < 1
    shift = jitter_boxes(boxes, 1024, uniform(4000, 4), noise=0.2) - boxes
    # Cut off at one standard deviation, 20 pixels, a normal distribution keeps 0.718 of it.
    assert torch.allclose(shift.std(0), torch.tensor([14.4, 8.0, 14.4, 8.0]), rtol=0.1)
    assert shift.abs().max() == 20


def test_jittered_boxes_stay_boxes_inside_the_image():
    corner = uniform(2000, 2, seed=1).float() * 49
    side = 1 + uniform(2000, 2, seed=2).float() * 30
    boxes = torch.cat([corner, (corner + side).clamp(max=50)], -1)
    boxes[:, :2] = torch.minimum(boxes[:, :2], boxes[:, 2:] - 1)
    moved = jitter_boxes(boxes, 50, uniform(2000, 4), noise=1.0)
    assert (moved != boxes).any(-1).float().mean() > 0.5
    assert (moved >= 0).all() and (moved <= 50).all()
    assert (moved[:, 2:] - moved[:, :2] >= 1 - 1e-4).all()


def test_points_are_uniform_inside_the_mask():
    mask = torch.zeros(5, 7, dtype=torch.uint8)
    mask[0, 2] = mask[0, 6] = mask[3, 0] = mask[4, 6] = mask[4, 5] = 1
    points = sample_points(mask.expand(5000, 5, 7), uniform(5000))
    assert points.shape == (5000, 2) and points.dtype == torch.float32
    assert at(mask.expand(5000, 5, 7), points).all()
    _, counts = points.unique(dim=0, return_counts=True)
    assert len(counts) == 5 and counts.min() > 900 and counts.max() < 1100


def test_points_of_many_shapes():
    masks = uniform(3, 4, 33, 17, seed=3) < 0.1
    points = sample_points(masks, uniform(3, 4))
    assert points.shape == (3, 4, 2)
    assert at(masks.flatten(0, 1), points.flatten(0, 1)).all()
    assert torch.equal(points, sample_points(masks, uniform(3, 4)))
    assert not torch.equal(points, sample_points(masks, uniform(3, 4, seed=1)))
    assert sample_points(torch.ones(1, 1), torch.tensor(0.999)).tolist() == [0, 0]
    assert sample_points(torch.zeros(2, 5, 5), uniform(2)).tolist() == [[0, 0], [0, 0]]


def test_clicks_fall_into_the_error():
    target = torch.zeros(3000, 6, 6, dtype=torch.uint8)
    target[:, 1:4, 1:4] = 1
    predicted = torch.zeros(3000, 6, 6, dtype=torch.bool)
    predicted[:, 1:4, 2:6] = True  # misses column 1, three pixels; too much in columns 4 and 5, six pixels
    points, labels = sample_error_points(predicted, target, uniform(len(target)))
    assert (at(predicted, points) != at(target, points).bool()).all()
    assert torch.equal(labels, at(target, points).long())
    assert abs(labels.float().mean() - 1 / 3) < 0.03
    assert len(points.unique(dim=0)) == 9


def test_a_click_without_error_falls_into_the_target():
    target = torch.zeros(50, 6, 6, dtype=torch.uint8)
    target[:, 2:4, 3:5] = 1
    predicted = target.bool()
    predicted[25:, 0, 0] = True  # the second half has one wrong pixel
    points, labels = sample_error_points(predicted, target, uniform(len(target)))
    assert at(target, points)[:25].all() and labels[:25].all()
    assert not points[25:].any() and not labels[25:].any()
    assert len(points[:25].unique(dim=0)) == 4


def test_any_number_below_one_gives_a_pixel_of_the_mask():
    """Also where single precision rounds their product with a large area up to the area itself."""
    mask = torch.ones(1, 4100, 4100, dtype=torch.uint8)
    almost = torch.tensor([1.0]).nextafter(torch.tensor([0.0]))
    x, y = sample_points(mask, almost)[0].tolist()
    assert y == 4099 and 4090 < x < 4100
    assert sample_points(mask, torch.zeros(1))[0].tolist() == [0, 0]
