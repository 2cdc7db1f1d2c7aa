import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from script_runs import run_on_two_processes
from tars import write_shard

from hf_efficientsam.training.data.shards import Shards, Streamed
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


def test_a_resumed_epoch_does_not_read_what_it_passes_over():
    class Counted(Numbers):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return index

    accelerator, data = (
        Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)),
        Counted(),
    )
    loader, epoch_steps = epoch_loader(accelerator, data, global_batch_size=1)
    (_, batches), *_ = step_batches(accelerator, loader, epoch_steps - 1, epoch_steps, epoch_steps)
    assert len(list(batches)) == 1 and data.read == 1


class Texts(Shards):
    needs = ((".txt",),)

    def decode(self, record):
        return int(record["members"][0][1])


class Items(Streamed):
    def item(self, key, decoded):
        return decoded


def two_epochs_of_uneven_shards(folder):
    accelerator = Accelerator(cpu=True)
    index, others = accelerator.process_index, accelerator.num_processes
    data = Items(Texts([f"{folder}/{{0..1}}.tar"]), process_index=index, num_processes=others, shuffle_buffer=2)
    loader, epoch_steps = epoch_loader(accelerator, data, global_batch_size=2, epoch_images=10, num_workers=1)
    steps = step_batches(accelerator, loader, 0, 2 * epoch_steps, epoch_steps)
    numbers = [
        accelerator.gather(torch.cat(list(batches))) for _, batches in steps
    ]  # each waits for the other process
    assert [len(one) for one in numbers] == [2] * 10


def test_two_processes_end_their_epochs_together_though_one_has_a_single_image(tmp_path):
    write_shard(tmp_path / "0.tar", {"0.txt": b"0"})
    write_shard(tmp_path / "1.tar", {f"{number}.txt": b"%d" % number for number in range(1, 10)})
    run_on_two_processes(__file__, "two_epochs_of_uneven_shards", tmp_path)


def test_an_epoch_of_less_than_a_step_is_refused():
    with pytest.raises(ValueError, match="3 images are less than one step; lower --global_batch_size 4"):
        epoch_loader(Accelerator(cpu=True), Numbers(), global_batch_size=4, epoch_images=3)
