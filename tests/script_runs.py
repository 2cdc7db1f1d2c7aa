"""How the scripts in `training/` are started as a user does, killed, resumed and compared."""

import contextlib
import functools
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from hf_efficientsam.training.engine.metrics_log import TIMINGS
from hf_efficientsam.training.engine.run import run_script

ROOT = Path(__file__).resolve().parents[1]
TRAINING = ROOT / "training"
# `python killed.py SCRIPT ...` runs the script until its fifth step is done and logged, two after a checkpoint.
KILLED = f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from hf_efficientsam.training.engine.metrics_log import MetricsLog
from script_runs import load_script

def add_and_die(self, step, **values):
    add(self, step, **values)
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

add, MetricsLog.add = MetricsLog.add, add_and_die
load_script(pathlib.Path(sys.argv[1]).stem).main(sys.argv[2:])
"""
# `python freed.py SCRIPT ...` asserts that the distributed model is gone before the group of processes is.
FREED = f"""
import gc, pathlib, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from accelerate import Accelerator
from script_runs import load_script
from torch.nn.parallel import DistributedDataParallel

def end(self):
    assert self.num_processes == 2 and not any(isinstance(one, DistributedDataParallel) for one in gc.get_objects())
    end_training(self)

end_training, Accelerator.end_training = Accelerator.end_training, end
load_script(pathlib.Path(sys.argv[1]).stem).main(sys.argv[2:])
"""
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@functools.cache
def load_script(name: str) -> ModuleType:
    """A script as a module, without starting it."""
    spec = importlib.util.spec_from_file_location(name, TRAINING / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(script: str, *arguments, python=(), cwd=None, timeout=300, environment=()) -> subprocess.CompletedProcess:
    """The script in a process of its own; `python` is what comes between the interpreter and the script."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRACKIO_")}
    environment = inherited | dict(environment)
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *python, TRAINING / f"{script}.py", *arguments]
    return subprocess.run(
        [*map(str, command)], env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout
    )


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
    """A function of a test file, called with the folder on two processes, each started anew: a fork would inherit
    Accelerate's state and threads."""
    start = f"import sys; sys.path[:0] = {[str(Path(file).parent), str(Path(__file__).parent)]!r}\n"
    start += f"from pathlib import Path\nfrom {Path(file).stem} import {function}\n{function}(Path({str(folder)!r}))\n"
    (folder / "start.py").write_text(start)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *TWO_PROCESSES, folder / "start.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


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
