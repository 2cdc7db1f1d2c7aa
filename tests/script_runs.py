"""How the scripts in `training/` are started as a user does, killed, resumed and compared."""

import contextlib
import functools
import gc
import importlib.util
import io
import json
import multiprocessing.connection
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from hf_efficientsam.training.data import feature_cache
from hf_efficientsam.training.engine.metrics_log import TIMINGS, MetricsLog
from hf_efficientsam.training.engine.run import run_script

ROOT = Path(__file__).resolve().parents[1]
TRAINING = ROOT / "training"


@functools.cache
def load_script(name: str) -> ModuleType:
    """A script as a module, without starting it."""
    spec = importlib.util.spec_from_file_location(name, TRAINING / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(script: str, *arguments, python=(), cwd=None, timeout=300, environment=()) -> subprocess.CompletedProcess:
    """The script as a user starts it; `python` is what comes between the interpreter and the script."""
    command = [sys.executable, *python, TRAINING / f"{script}.py", *arguments]
    environment = clean_environment() | dict(environment)
    return subprocess.run(
        [*map(str, command)], env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout
    )


def clean_environment() -> dict[str, str]:
    """That of this process, for one of one thread without a GPU and without trackio's settings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRACKIO_")}
    return inherited | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


def free_port() -> int:
    """A port for a process that is started next. It lies below those that systems give to whoever asks for any port
    (32768 and more), so no other process is given it in between. It is drawn apart from the generators that trainings
    seed: two workers of pytest with equal seeds would both be given the same one."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


# Processes of their own are forked from one that has imported the libraries and done nothing else: so they neither
# inherit Accelerate's state and threads, nor need the seconds that the imports take.
FORKS = multiprocessing.get_context("forkserver")
IMPORTED = ["accelerate", "hf_efficientsam", "hf_efficientsam.training.engine.run"]
FORKS.set_forkserver_preload(IMPORTED)


def fork(script: str, *arguments, before: Callable[[], None] | None = None, **options) -> subprocess.CompletedProcess:
    """The script in one process or, with `processes=2`, in two; `before`, of this file, is called in them first."""
    return fork_function(run_forked_script, script, [*map(str, arguments)], before, **options)


def run_forked_script(script: str, arguments: list[str], before: Callable[[], None] | None) -> None:
    if before:
        before()
    run_script(script, lambda: load_script(script).main(arguments))


def kill_after_step_5() -> None:
    """Ends the process once its fifth step is done and logged, two after a checkpoint."""
    after_step_5(lambda: os.kill(os.getpid(), signal.SIGKILL))


def kill_after_the_first_part() -> None:
    """Ends the process once it has written the first part of a feature cache."""

    def write_and_die(*arguments):
        write_part(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    write_part, feature_cache.write_part = feature_cache.write_part, write_and_die


def stop_all_after_step_5() -> None:
    """Tells the process and its workers to stop, as a scheduler or a terminal does."""
    os.setsid()
    after_step_5(lambda: subprocess.run(["kill", "-TERM", "--", f"-{os.getpgrp()}"], check=True, process_group=0))


def after_step_5(action: Callable[[], Any]) -> None:
    add = MetricsLog.add

    def add_and_act(self, step, **values):
        add(self, step, **values)
        if step == 5:
            action()

    MetricsLog.add = add_and_act


def check_that_the_model_is_freed() -> None:
    """Asserts that the distributed model is gone before the group of processes is."""
    end_training = Accelerator.end_training

    def end(self):
        models = [one for one in gc.get_objects() if isinstance(one, DistributedDataParallel)]
        assert self.num_processes == 2 and not models
        end_training(self)

    Accelerator.end_training = end


def fork_function(
    function: Callable, *arguments, processes: int = 1, timeout: float = 300, environment=()
) -> subprocess.CompletedProcess:
    """A function in one process, or in several that form a group. If one fails, the others are ended."""
    environment = clean_environment() | dict(environment)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # for the imports of the process that is forked
        started = []
        for rank in map(str, range(processes)):
            own = environment | (group | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {})
            started.append(FORKS.Process(target=call, args=(function, arguments, own, Path(folder) / rank)))
            started[-1].start()
        deadline, running = time.monotonic() + timeout, list(started)
        while running and not any(one.exitcode for one in started) and time.monotonic() < deadline:
            multiprocessing.connection.wait([one.sentinel for one in running], deadline - time.monotonic())
            running = [one for one in running if one.is_alive()]
        code = next((one.exitcode for one in started if one.exitcode), None if running else 0)
        for one in running:
            one.kill()
        for one in started:
            one.join()
        said = ["".join(path.read_text() for path in sorted(Path(folder).glob(f"*.{name}"))) for name in OUTPUTS]
    if code is None:
        raise subprocess.TimeoutExpired(str(function), timeout, *said)
    return subprocess.CompletedProcess([], code, *said)


OUTPUTS = {"stdout": 1, "stderr": 2}


def call(function: Callable, arguments: tuple, environment: dict[str, str], output: Path) -> None:
    """In a new process: its output goes to two files."""
    for name, descriptor in OUTPUTS.items():
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of workers, as a user's; this process came from a server
    function(*arguments)


def run(script: str, *arguments, code: int = 0) -> str:
    """What a script says, in this process, which saves the imports."""
    output, main = io.StringIO(), load_script(script).main
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(output),
        contextlib.redirect_stdout(output),
    ):
        patch.setenv("ACCELERATE_USE_CPU", "true")
        ended = 0
        try:
            run_script(script, lambda: main([*map(str, arguments)]))
        except SystemExit as exit:
            ended = exit.code
    assert ended == code, output.getvalue()
    return output.getvalue()


def run_on_two_processes(file: str, function: str, folder: Path) -> None:
    """A function of a test file, called with the folder on two processes."""
    done = fork_function(call_function_of, file, function, folder, processes=2)
    assert done.returncode == 0, done.stderr


def call_function_of(file: str, function: str, *arguments) -> None:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, function)(*arguments)


def refuse(script: str, *arguments) -> str:
    """The sentence with which a script refuses its arguments."""
    return run(script, *arguments, code=2).splitlines()[-1]


def curve(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the result, and of the newest checkpoint: those are not averaged."""
    newest = max((folder / "checkpoints").glob("step_*"))
    return load_file(folder / "model" / "model.safetensors") | {
        f"checkpoint.{name}": value for name, value in load_file(newest / "model.safetensors").items()
    }


def assert_equal(one: Path, other: Path) -> None:
    assert curve(one) == curve(other)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_close(one: Path, other: Path, curves: float = 1e-5, values: float = 1e-5) -> None:
    assert [row["step"] for row in curve(one)] == [row["step"] for row in curve(other)]
    for ours, theirs in zip(curve(one), curve(other), strict=True):
        assert ours == pytest.approx(theirs, rel=curves)
    ours, theirs = weights(one), weights(other)
    for name in ours:
        # A bias of the keys does not change the attention: its gradient is rounding, which Adam makes a step of.
        if not name.endswith("k_proj.bias"):
            assert (ours[name] - theirs[name]).abs().max() < values, name


def card_of(folder: Path) -> ModelCard:
    """The card beside the model of a run."""
    return ModelCard.load(folder / "model" / "README.md")


def steps_saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def stopped_after(step: int, folder: Path, copy: Path) -> Path:
    """A run as it would be had it been killed between two checkpoints, or before the first."""
    shutil.copytree(folder, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    shutil.rmtree(copy / "model")
    return copy
