import errno
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from script_runs import run_on_two_processes

from hf_efficientsam.training.engine.checkpoints import Checkpoints, SaveError, replaced_folder
from hf_efficientsam.training.engine.optimization import weight_average


class Run:
    """A run whose model takes one random step at a time."""

    def __init__(self, folder, keep=2):
        accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(2, 2)
        self.model, self.optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 0.1))
        self.checkpoints = Checkpoints(accelerator, folder, keep)

    def step(self):
        self.model(torch.randn(3, 2)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.model.weight.detach().clone()


def test_resuming_goes_on_as_if_nothing_had_happened(tmp_path):
    run = Run(tmp_path / "a")
    assert run.checkpoints.resume() == 0 and run.checkpoints.steps() == []
    run.step()
    run.checkpoints.save(1)
    expected = run.step()

    torch.randn(7)  # another state of the random numbers
    resumed = Run(tmp_path / "a")
    assert resumed.checkpoints.resume() == 1
    assert torch.equal(resumed.step(), expected)  # weights, moments and random numbers are all restored


def test_the_newest_are_kept_and_resumed(tmp_path):
    run = Run(tmp_path, keep=2)
    weights = {}
    for step in (9, 100, 20_000):  # of different lengths: sorted as numbers
        weights[step] = run.step()
        run.checkpoints.save(step)
    assert run.checkpoints.steps() == [100, 20_000]
    resumed = Run(tmp_path)
    assert resumed.checkpoints.resume() == 20_000
    assert torch.equal(resumed.model.weight, weights[20_000])


def test_a_killed_save_is_no_checkpoint(tmp_path, monkeypatch):
    run = Run(tmp_path)
    weight = run.step()
    run.checkpoints.save(1)
    run.step()

    def killed(folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half of")
        (folder / "model_1.safetensors").write_bytes(b"of another kind of run")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run.checkpoints.accelerator, "save_state", killed)
        with pytest.raises(KeyboardInterrupt):
            run.checkpoints.save(2)
    resumed = Run(tmp_path)
    assert resumed.checkpoints.resume() == 1
    assert torch.equal(resumed.model.weight, weight)
    resumed.checkpoints.save(2)  # and the next save is not in its way
    assert resumed.checkpoints.steps() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]
    assert not (tmp_path / "step_00000002" / "model_1.safetensors").exists()


def no_space(path):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "free"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), 2),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), 0),  # torch.save's
    ],
    ids=["python", "safetensors", "torch"],
)
def test_a_full_disk(tmp_path, monkeypatch, error, free):
    run = Run(tmp_path)
    run.step()

    def half(folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(3 * 2**20))
        raise error

    for kept in ("there is no earlier one", "the checkpoint of step 1 is kept"):
        with monkeypatch.context() as patch:
            patch.setattr(run.checkpoints.accelerator, "save_state", half)
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free * 2**20))
            with pytest.raises(SaveError) as caught:
                run.checkpoints.save(2)
        assert str(caught.value) == (
            f"The checkpoint of step 2 could not be written: the disk is full, {tmp_path} needs more than the "
            f"{3 + free}.0 MiB that were free; free space and start again; {kept}."
        )
        assert caught.value.__cause__ is error
        assert not (tmp_path / "writing").exists() and not (tmp_path / "step_00000002").exists()
        if run.checkpoints.steps() == []:
            run.checkpoints.save(1)
    assert Run(tmp_path).checkpoints.resume() == 1


def test_another_reason_is_told_as_it_is(tmp_path, monkeypatch):
    run = Run(tmp_path)

    def refused(folder):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(run.checkpoints.accelerator, "save_state", refused)
    with pytest.raises(
        SaveError, match=r"step 2 could not be written: PermissionError: .*Permission denied; there is"
    ):
        run.checkpoints.save(2)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    run = Run(tmp_path)
    synced, fsync = set(), os.fsync

    def noted(descriptor):
        assert not list(tmp_path.glob("step_*"))
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", noted)
        run.checkpoints.save(1)
    files = [path for path in (tmp_path / "step_00000001").rglob("*") if path.is_file()]
    assert synced == {path.stat().st_ino for path in files} and len(files) >= 3

    monkeypatch.setattr(os, "fsync", no_space)  # where some file systems first say so
    with pytest.raises(SaveError, match=r"the disk is full.*step 1 is kept"):
        run.checkpoints.save(2)
    assert run.checkpoints.steps() == [1] and not (tmp_path / "writing").exists()


def fail_on_one_process(folder):
    """One of the two cannot write, then the other; at last they find different checkpoints."""
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 2)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    checkpoints = Checkpoints(accelerator, folder)
    save_state, index = accelerator.save_state, accelerator.process_index
    checkpoints.save(1)
    for failing in (0, 1):
        accelerator.save_state = no_space if index == failing else save_state
        try:
            checkpoints.save(2)
        except SaveError as error:
            (folder / f"sentence_{failing}_{index}").write_text(str(error))
    accelerator.save_state = save_state
    checkpoints.save(3)
    assert checkpoints.resume() == 3
    if index == 1:
        checkpoints.folder = folder / "not shared"
    with pytest.raises(ValueError, match=r"different steps \(\[0, 3\]\).*all machines share"):
        checkpoints.resume()
    accelerator.end_training()


@pytest.mark.slow
def test_two_processes_fail_together(tmp_path):
    run_on_two_processes(__file__, "fail_on_one_process", tmp_path)
    for failing in (0, 1):
        sentences = {(tmp_path / f"sentence_{failing}_{index}").read_text() for index in (0, 1)}
        assert len(sentences) == 1 and sentences.pop().endswith("the checkpoint of step 1 is kept.")
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000001", "step_00000003"]


def test_an_averaged_model_is_part_of_a_checkpoint(tmp_path):
    def start():
        run = Run(tmp_path)
        unwrapped = run.checkpoints.accelerator.unwrap_model(run.model)
        average = weight_average(unwrapped, 0.9)
        run.checkpoints.accelerator.register_for_checkpointing(average)
        return run, average

    def step(run, average):
        run.step()
        average.update_parameters(run.model)
        return average.module.weight.clone()

    run, average = start()
    step(run, average)
    step(run, average)
    run.checkpoints.save(2)
    expected = step(run, average)
    assert not torch.equal(expected, run.model.weight)
    run, average = start()
    assert run.checkpoints.resume() == 2 and average.n_averaged == 2
    assert torch.equal(step(run, average), expected)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    with pytest.raises(KeyboardInterrupt), replaced_folder(folder) as writing:
        (writing / "weights").write_text("half")
        raise KeyboardInterrupt
    assert (folder / "weights").read_text() == "old"
    with replaced_folder(folder) as writing:
        (writing / "weights").write_text("new")
    assert (folder / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    folder.rename(tmp_path / "model.old")  # where a kill between the two renames leaves it
    with pytest.raises(KeyboardInterrupt), replaced_folder(folder):
        raise KeyboardInterrupt
    assert (folder / "weights").read_text() == "new"


def test_a_full_disk_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    with (
        pytest.raises(
            SaveError, match=r"model could not be written: the disk is full, .* free space and start again\."
        ),
        replaced_folder(folder) as writing,
    ):
        (writing / "weights").write_text("half")
        no_space(writing)
    assert (folder / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "random_states_0.pkl"])
@pytest.mark.parametrize("damage", [cut, os.unlink, lambda path: path.write_bytes(b"")], ids=["cut", "gone", "empty"])
def test_of_a_damaged_checkpoint_the_one_before_is_resumed(tmp_path, caplog, file, damage):
    run = Run(tmp_path)
    run.step()
    run.checkpoints.save(1)
    expected = run.step()
    run.checkpoints.save(2)
    damage(tmp_path / "step_00000002" / file)
    torch.randn(7)
    resumed = Run(tmp_path)
    assert resumed.checkpoints.resume() == 1
    assert torch.equal(resumed.step(), expected)
    assert caplog.text.count("step_00000002 is damaged") == 1
    resumed.checkpoints.save(2)  # the damaged one is not in its way
    assert Run(tmp_path).checkpoints.resume() == 2


def test_damaged_checkpoints_alone_are_refused(tmp_path):
    run = Run(tmp_path)
    run.checkpoints.save(1)
    cut(tmp_path / "step_00000001" / "optimizer.bin")
    with pytest.raises(ValueError, match=r"All checkpoints in .* are damaged; delete"):
        Run(tmp_path).checkpoints.resume()
