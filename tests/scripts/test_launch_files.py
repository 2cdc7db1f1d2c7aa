"""The files in `training/accelerate` start processes that find each other, here two on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from script_runs import TRAINING, clean_environment, free_port

# Each process writes a file of its own: what several print into one pipe comes mixed.
SCRIPT = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator

accelerator = Accelerator(mixed_precision="no")
indices = accelerator.gather(torch.tensor([accelerator.process_index])).tolist()
Path(sys.argv[1], str(accelerator.process_index)).write_text(f"{indices} of {accelerator.num_processes}")
accelerator.end_training()
"""

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("file", "machines"), [("ddp", 1), ("fsdp2", 1), ("multi_node", 2)])
def test_a_launch_file_starts_two_processes_that_find_each_other(tmp_path, file, machines):
    script, found = tmp_path / "script.py", tmp_path / "found"
    script.write_text(SCRIPT)
    found.mkdir()
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", TRAINING / "accelerate" / f"{file}.yaml", "--num_processes", 2]
    command += ["--num_machines", machines, "--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    environment = clean_environment() | {"PYTHONPATH": os.pathsep.join(sys.path)}
    outputs = [tmp_path / f"machine_{rank}" for rank in range(machines)]
    started = []
    for rank, output in enumerate(outputs):
        with output.open("w") as file:
            own = [*command, "--machine_rank", rank, script, found]
            started.append(subprocess.Popen([*map(str, own)], env=environment, stdout=file, stderr=file))
    try:
        codes = [one.wait(timeout=300) for one in started]
    finally:
        for one in started:
            one.kill()
    assert codes == [0] * machines, "".join(map(Path.read_text, outputs))
    assert {path.name: path.read_text() for path in found.iterdir()} == {"0": "[0, 1] of 2", "1": "[0, 1] of 2"}
