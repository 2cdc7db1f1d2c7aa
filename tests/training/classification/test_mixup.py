import torch

from hf_efficientsam.training.classification.mixup import mix_neighbors


def test_neighbors_are_mixed_by_hand():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8).clone()
    ratio = torch.tensor([0.75, 1, 1, 1])
    box = torch.tensor([[0, 0, 0, 0], [2, 0, 6, 4], [0, 0, 0, 0], [0, 0, 8, 8]])
    mixed, targets = mix_neighbors(images, torch.eye(4), ratio, box)
    assert (mixed[0] == 0.25).all() and (mixed[2] == 2).all() and (mixed[3] == 2).all()
    assert (mixed[1, :, :4, 2:6] == 0).all() and mixed[1].sum() == 3 * (64 - 16)
    expected = [[0.75, 0.25, 0, 0], [0.25, 0.75, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]
    assert targets.tolist() == expected
    halves = [
        mix_neighbors(images[i : i + 2], torch.eye(4)[i : i + 2], ratio[i : i + 2], box[i : i + 2]) for i in (0, 2)
    ]
    for part, name in enumerate((mixed, targets)):
        assert torch.equal(torch.cat([half[part] for half in halves]), name)
