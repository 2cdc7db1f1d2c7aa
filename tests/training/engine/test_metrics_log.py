import json
import socket
import sqlite3

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from script_runs import call_function_of, fork_function, run_on_two_processes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_efficientsam.training.engine.checkpoints import Checkpoints
from hf_efficientsam.training.engine.metrics_log import TIMINGS, MetricsLog, tracker_arguments


def log_steps(folder, until, trackers=(), save_at=5, steps=14):
    """A run whose loss is 1 / step, with rows at 4, 8, 12 and 14, images at 4 and 8; stopped after `until`."""
    accelerator = Accelerator(cpu=True, **tracker_arguments(list(trackers), folder))
    log = MetricsLog(accelerator, folder, steps, every=4)
    checkpoints = Checkpoints(accelerator, folder / "checkpoints")
    step = checkpoints.resume()
    log.start(step, "sami", {"images": ["a", "b"], "cache": None, "rate": 1e-3, "flip": True})
    while step < until:
        step += 1
        log.add(step, images=8, loss=torch.tensor(1 / step), rate=0.1 * step)
        if step == save_at:
            checkpoints.save(step)
        if step in (4, 8):
            log.add_image(step, Image.new("RGB", (6, 3), (20 * step, 0, 0)), "colours")
    return accelerator, log


def without_timings(rows):
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def test_rows_are_means_and_the_newest_rate(tmp_path):
    _, log = log_steps(tmp_path, 14)
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    losses = [np.mean([1 / step for step in range(*steps)]) for steps in ((1, 5), (5, 9), (9, 13), (13, 15))]
    assert [row["step"] for row in rows] == [4, 8, 12, 14]
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    assert [row["rate"] for row in rows] == pytest.approx([0.4, 0.8, 1.2, 1.4])
    assert all(row.keys() == {"step", "loss", "rate", *TIMINGS} for row in rows)
    assert rows[-1]["seconds_to_go"] == 0 and rows[0]["images_per_second"] > 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert Image.open(tmp_path / "images" / "colours_00000008.png").getpixel((0, 0)) == (160, 0, 0)


def test_time_is_counted(tmp_path, monkeypatch):
    """Two steps of ten seconds: 8 images each, eight more steps to come; the next start adds to the seconds."""
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    log = MetricsLog(Accelerator(cpu=True), tmp_path, steps=10, every=2)
    log.start(0, "sami", {})
    for step in (1, 2):
        now += 10
        log.add(step, images=8, loss=torch.tensor(1.0))
    timings = {"images_per_second": 0.8, "seconds": 20, "seconds_to_go": 80}
    assert log.rows == [{"step": 2, "loss": 1.0, **timings}]
    log.start(2, "sami", {})
    for step in (3, 4):
        now += 5
        log.add(step, images=8, loss=torch.tensor(1.0))
    assert log.rows[-1] == {"step": 4, "loss": 1.0, "images_per_second": 1.6, "seconds": 30, "seconds_to_go": 30}


@pytest.mark.parametrize("killed_at", [2, 5, 7, 9])
def test_a_resumed_run_writes_the_same_rows(tmp_path, killed_at):
    """The checkpoint is at step 5, in the middle of the mean over steps 5 to 8."""
    _, whole = log_steps(tmp_path / "whole", 14)
    log_steps(tmp_path / "killed", killed_at)
    _, resumed = log_steps(tmp_path / "killed", 14)
    assert len(whole.rows) == 4
    assert without_timings(resumed.rows) == without_timings(whole.rows)


def log_on_two_processes(folder):
    accelerator = Accelerator(cpu=True)
    log = MetricsLog(accelerator, folder, 4, every=4)
    log.start(0, "sami", {})
    for step in (1, 2, 3, 4):
        log.add(step, images=8, loss=torch.tensor(10.0 * accelerator.process_index + step))
        if step == 3:
            torch.save(log.state_dict(), folder / f"state_{accelerator.process_index}")
    accelerator.end_training()


@pytest.mark.slow
def test_losses_are_means_over_the_processes(tmp_path):
    run_on_two_processes(__file__, "log_on_two_processes", tmp_path)
    assert json.loads((tmp_path / "curve.jsonl").read_text())["loss"] == 7.5
    # The state of the main process is saved and loaded on all, so it must be the same on all.
    states = [torch.load(tmp_path / f"state_{index}") for index in (0, 1)]
    assert torch.equal(states[0]["sums"], states[1]["sums"]) and states[0]["summed"] == states[1]["summed"] == 3


def test_tensorboard_sees_each_step_once(tmp_path):
    log_steps(tmp_path, 9, ["tensorboard"])
    accelerator, log = log_steps(tmp_path, 14, ["tensorboard"])
    log.close()
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "trackers" / "sami")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [4, 8, 12, 14]
    assert [event.value for event in events.Scalars("rate")] == pytest.approx([0.4, 0.8, 1.2, 1.4])
    assert set(TIMINGS) < set(events.Tags()["scalars"])
    images = events.Images("colours")
    assert [event.step for event in images] == [4, 8] and (images[0].width, images[0].height) == (6, 3)


def log_to_trackio(folder, until):
    def refused(self, address):
        raise AssertionError(f"a connection to {address}")

    socket.socket.connect = refused
    accelerator, log = log_steps(folder, until, ["trackio"])
    log.close()
    accelerator.end_training()


@pytest.mark.slow
def test_trackio_sees_each_step_once_and_needs_no_network(tmp_path):
    """In processes of their own: trackio decides where its files go when it is imported."""
    for until in (9, 14):
        done = fork_function(call_function_of, __file__, "log_to_trackio", tmp_path / "run_a", until)
        assert done.returncode == 0, done.stderr
    database = sqlite3.connect(tmp_path / "run_a" / "trackers" / "sami.db")
    rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    values = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert {name for name, _, _ in rows} == {"run_a"}
    assert [step for step, value in values if "loss" in value] == [4, 8, 12, 14]
    assert [step for step, value in values if "colours" in value] == [4, 8]
    (config,) = database.execute("SELECT config FROM configs").fetchall()
    assert json.loads(config[0])["images"] == "['a', 'b']"
    assert len(list((tmp_path / "run_a" / "trackers" / "media").rglob("*.png"))) == 2


def test_an_unknown_tracker(tmp_path):
    with pytest.raises(ValueError, match=r"no tracker wandb here; install it, or take .*tensorboard.*trackio"):
        tracker_arguments(["wandb", "tensorboard"], tmp_path)


def test_evaluations_after_the_checkpoint_are_dropped_and_plotted(tmp_path):
    for start, later in ((0, (2, 4, 6)), (4, (6,))):
        log = MetricsLog(Accelerator(cpu=True), tmp_path, steps=6, every=1)
        log.start(start, "sami", {})
        for step in later:
            log.add_evaluation(step, top1=0.1 * step + start, top5=1.0)
        log.close()
    rows = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6] and rows[-1]["top1"] == pytest.approx(4.6)
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "curve.png").exists()


def test_a_plot_is_drawn_again_once_there_are_new_rows(tmp_path):
    _, log = log_steps(tmp_path, 9)
    plot = tmp_path / "curve.png"
    log.plot()
    plot.unlink()
    log.plot()
    assert not plot.exists()
    for step in (10, 11, 12):
        log.add(step, images=8, loss=torch.tensor(1.0), rate=0.1)
    log.plot()
    assert plot.exists()


def test_a_torn_last_line_is_dropped(tmp_path):
    """As a kill leaves it."""
    path = tmp_path / "evaluation.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    MetricsLog(Accelerator(cpu=True), tmp_path, steps=6, every=1).start(2, "sami", {})
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'
