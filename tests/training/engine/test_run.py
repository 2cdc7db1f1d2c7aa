import dataclasses

import pytest
import torch
from accelerate import Accelerator

from hf_efficientsam.training.engine.checkpoints import SaveError
from hf_efficientsam.training.engine.config import LoaderConfig, RunConfig
from hf_efficientsam.training.engine.run import (
    TrainingRun,
    TrainingStopped,
    check_same_run,
    run_script,
    start_accelerator,
)


def test_gradients_are_accumulated_to_the_global_batch(monkeypatch, tmp_path):
    def steps(batch_size, processes):
        monkeypatch.setattr(Accelerator, "num_processes", processes)
        config = RunConfig(global_batch_size=8, batch_size=batch_size, output_dir=str(tmp_path))
        return start_accelerator(config, cpu=True).gradient_accumulation_steps

    assert [steps(2, n) for n in (1, 2, 4)] == [4, 2, 1] and [steps(None, n) for n in (1, 2, 8)] == [1, 1, 1]
    for batch_size, processes in ((3, 2), (1, 16)):
        with pytest.raises(ValueError, match=f"8 must be a multiple of --batch_size {batch_size} times {processes}"):
            steps(batch_size, processes)


@dataclasses.dataclass(frozen=True)
class Config(RunConfig, LoaderConfig):
    pass


def test_another_configuration_in_the_same_folder_is_refused(tmp_path):
    def check(processes=1, streamed=False, **options):
        check_same_run(Config(output_dir=str(tmp_path), **options), processes, streamed)

    check(weight_decay=0.9)
    check()  # nothing of the first one was kept
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    check(2, save_steps=2, batch_size=2, num_workers=1)
    with pytest.raises(ValueError, match="another weight_decay; choose a new --output_dir"):
        check(weight_decay=0.4)
    (tmp_path / "config.json").unlink()
    check(streamed=True)
    check(streamed=True, save_steps=2)
    with pytest.raises(ValueError, match="another num_workers, batch_size, num_processes; choose"):
        check(2, True, batch_size=2, num_workers=1)


def train(folder, until=6):
    """A run of 6 steps of one random weight each, with a checkpoint every 2."""
    config = RunConfig(output_dir=str(folder), save_steps=2, log_steps=1)
    with TrainingRun(Accelerator(cpu=True), config, "test") as run:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        model, optimizer = run.accelerator.prepare(model, optimizer)
        for step in range(run.resume(6, [scheduler, None]) + 1, 7):
            loss = model(torch.randn(3, 2)).sum()
            run.accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            run.log.add(step, images=3, loss=loss.detach(), lr=scheduler.get_last_lr()[0])
            if run.is_due(step, config.save_steps):
                run.save(step)
            if step == until < 6:
                raise OSError("no disk")
        return model.weight.detach().clone()


def test_a_run_that_stopped_goes_on_from_its_checkpoint(tmp_path):
    torch.manual_seed(0)
    whole = train(tmp_path / "whole")
    torch.manual_seed(0)
    with pytest.raises(TrainingStopped, match="no disk"):
        train(tmp_path / "stopped", until=5)
    resumed = train(tmp_path / "stopped")
    assert torch.equal(resumed, whole)
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [
        "checkpoints",
        "config.json",
        "curve.jsonl",
        "curve.png",
    ]


def test_a_finished_run_says_so(tmp_path, capsys):
    weight = train(tmp_path)
    again = train(tmp_path)
    assert torch.equal(weight, again) and "holds a finished run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("no such file"), 2), (OSError("no disk"), 2), (SaveError("full"), 2), (TrainingStopped("nan"), 1)],
)
def test_a_script_ends_with_a_sentence(capsys, error, code):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_script("sami", main)
    assert ended.value.code == code
    assert capsys.readouterr().err == f"\nsami: {error}\n"


def test_of_an_error_in_a_worker_the_sentence_is_said(capsys):
    def main():
        raise ValueError("Caught ValueError in DataLoader worker\nTraceback:\n  line\nValueError: 3.jpg is broken.\n")

    with pytest.raises(SystemExit):
        run_script("sami", main)
    assert capsys.readouterr().err == "\nsami: 3.jpg is broken.\n"


def test_what_is_no_fault_of_the_user_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script("sami", lambda: 1 / 0)
