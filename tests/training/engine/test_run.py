import dataclasses
import json
import logging
import os
import signal
from datetime import timedelta

import pytest
import torch
from accelerate import Accelerator

from hf_efficientsam.training.engine.checkpoints import SaveError
from hf_efficientsam.training.engine.config import LoaderConfig, RunConfig
from hf_efficientsam.training.engine.optimization import adamw, clip_gradients
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


def test_processes_wait_for_one_another_as_long_as_the_config_says(tmp_path):
    accelerator = start_accelerator(RunConfig(output_dir=str(tmp_path), timeout_minutes=7), cpu=True)
    assert accelerator.init_handler.timeout == timedelta(minutes=7)


def test_a_cpu_computes_in_float32(tmp_path):
    start_accelerator(RunConfig(output_dir=str(tmp_path)), cpu=True)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not adamw([{"params": [torch.nn.Parameter(torch.zeros(1))]}]).defaults["fused"]


@pytest.mark.gpu
def test_a_gpu_computes_in_tf32_and_steps_in_one_kernel(tmp_path):
    start_accelerator(RunConfig(output_dir=str(tmp_path)))
    assert torch.get_float32_matmul_precision() == "high"
    assert adamw([{"params": [torch.nn.Parameter(torch.zeros(1, device="cuda"))]}]).defaults["fused"]
    torch.set_float32_matmul_precision("highest")


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
    with pytest.raises(ValueError, match=r"a run of 1 processes.* with 2, some would come twice.* Start 1, or train"):
        check(processes=2, streamed=True)
    with pytest.raises(ValueError, match="another num_workers, batch_size, num_processes; choose"):
        check(2, True, batch_size=2, num_workers=1)


def train(folder, at=None, happens=None, steps=6, **options):
    """A run of 6 steps of one random weight each, with a checkpoint every 2; after step `at` something happens."""
    config = RunConfig(output_dir=str(folder), **{"save_steps": 2, "log_steps": 1, **options})
    with TrainingRun(Accelerator(cpu=True), config, "masks") as run:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        model, optimizer = run.accelerator.prepare(model, optimizer)
        for step in range(run.resume(steps, [scheduler, None]) + 1, steps + 1):
            loss = model(torch.randn(3, 2)).sum()
            if step == at:
                loss = happens() * loss
            run.accelerator.backward(loss)
            grad_norm = clip_gradients(run.accelerator, model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            run.check_finite(step, loss, grad_norm, [f"{step}.jpg"])
            scheduler.step()
            run.log.add(step, images=3, loss=loss.detach(), lr=scheduler.get_last_lr()[0])
            if run.is_save_due(step):
                run.save(step)
        return model.weight.detach().clone()


def fail():
    raise OSError("no disk")


def test_a_run_that_stopped_goes_on_from_its_checkpoint(tmp_path):
    torch.manual_seed(0)
    whole = train(tmp_path / "whole")
    torch.manual_seed(0)
    with pytest.raises(TrainingStopped, match="no disk"):
        train(tmp_path / "stopped", 5, fail)
    resumed = train(tmp_path / "stopped")
    assert torch.equal(resumed, whole)
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [
        "checkpoints",
        "config.json",
        "curve.jsonl",
        "curve.png",
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_ends_its_step_and_saves_it(tmp_path, number):
    torch.manual_seed(0)
    whole = train(tmp_path / "whole")
    torch.manual_seed(0)
    handler = signal.getsignal(number)
    with pytest.raises(TrainingStopped, match=f"Stopped by {number.name} after step 3, which is saved") as stopped:
        train(tmp_path / "stopped", 3, lambda: os.kill(os.getpid(), number) or 1)
    assert stopped.value.code == 128 + number and signal.getsignal(number) is handler
    assert torch.equal(train(tmp_path / "stopped"), whole)
    assert (tmp_path / "stopped" / "checkpoints" / "step_00000004").exists()


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 3, twice)


def test_checkpoints_by_time(tmp_path):
    with pytest.raises(TrainingStopped):
        train(tmp_path / "often", 6, fail, save_steps=100, save_minutes=1e-9)
    with pytest.raises(TrainingStopped):
        train(tmp_path / "never", 6, fail, save_steps=100, save_minutes=0)
    assert sorted(path.name for path in (tmp_path / "often" / "checkpoints").iterdir()) == [
        "step_00000004",
        "step_00000005",
    ]
    assert not (tmp_path / "never" / "checkpoints").exists()


def test_a_step_that_is_not_finite_is_left_out_and_said(tmp_path, caplog):
    def left_out(folder):
        torch.manual_seed(0)
        return train(folder, 3, lambda: float("nan"))

    weight = left_out(tmp_path / "whole")
    assert weight.isfinite().all() and not torch.equal(weight, train(tmp_path / "other"))
    assert "The loss of step 3 is nan" in caplog.text and "on the images 3.jpg; the step is left out." in caplog.text
    rows = [json.loads(line) for line in (tmp_path / "whole" / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 4, 5, 6]


def test_a_run_that_stays_not_finite_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, given: self.weight * float("inf"))
    with pytest.raises(TrainingStopped, match=r"The loss of step 5 is .*5 in a row.*lower --learning_rate"):
        train(tmp_path / "long", steps=20)
    with pytest.raises(TrainingStopped, match="The loss of step 2 is"):
        train(tmp_path / "short", steps=2)


def test_a_worker_that_was_killed_gives_a_sentence(tmp_path):
    def killed():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    with pytest.raises(TrainingStopped, match="A process that reads images was killed"):
        train(tmp_path, 3, killed)


def test_ctrl_c_at_the_start_gives_a_sentence(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_script("sami", main)
    assert ended.value.code == 130 and capsys.readouterr().err == "\nsami: Stopped by Ctrl-C.\n"


def test_what_readers_say_is_shown(capsys, monkeypatch):
    def main():
        logging.getLogger("hf_efficientsam.training.data.reading").info("3 images")

    for rank, shown in (("0", "3 images\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        run_script("sami", main)
        assert capsys.readouterr().err == shown


def test_a_finished_run_says_where_its_results_are_and_what_to_type_next(tmp_path, capsys):
    weight = train(tmp_path)
    last, command = capsys.readouterr().out.splitlines()[-2:]
    assert f"The model is in {tmp_path / 'model'}, its log and plots are in {tmp_path}. Next:" in last
    assert command == f"  efficientsam demo --model {tmp_path / 'model'}"
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
