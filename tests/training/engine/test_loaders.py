import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration

from hf_efficientsam.training.engine.loaders import epoch_loader, step_batches


class Numbers(torch.utils.data.Dataset):
    epoch = 0

    def __len__(self):
        return 11

    def __getitem__(self, index):
        return 100 * self.epoch + index

    def set_epoch(self, epoch):
        self.epoch = epoch


def test_an_epoch_has_whole_steps_and_can_be_entered_anywhere():
    configuration = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, dataloader_config=configuration)
    loader, epoch_steps = epoch_loader(accelerator, Numbers(), global_batch_size=4)
    assert epoch_steps == 2

    def numbers(done, steps=6):
        batches = step_batches(accelerator, loader, done, steps, epoch_steps)
        return {step: [batch.tolist() for batch in two] for step, two in batches}

    whole = numbers(0)
    assert list(whole) == [1, 2, 3, 4, 5, 6]
    assert all(len(batches) == 2 and all(len(batch) == 2 for batch in batches) for batches in whole.values())
    epochs = [[n for batch in whole[first] + whole[first + 1] for n in batch] for first in (1, 3, 5)]
    assert [{number // 100 for number in epoch} for epoch in epochs] == [{0}, {1}, {2}]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert [number % 100 for number in epochs[1]] != epochs[0]  # another order
    for done in (1, 2, 3):
        assert numbers(done) == {step: batches for step, batches in whole.items() if step > done}
    assert numbers(6) == {} and numbers(0, 3) == {step: whole[step] for step in (1, 2, 3)}


def test_an_epoch_of_less_than_a_step_is_refused():
    with pytest.raises(ValueError, match="3 images are less than one step; lower --global_batch_size 4"):
        epoch_loader(Accelerator(cpu=True), Numbers(), global_batch_size=4, epoch_images=3)
