"""The files in `training/accelerate` start processes that find each other, here two on a CPU."""

import os
import socket
import subprocess
import sys

import pytest
from script_runs import TRAINING, clean_environment

SCRIPT = """
import torch
from accelerate import Accelerator

accelerator = Accelerator(mixed_precision="no")
indices = accelerator.gather(torch.tensor([accelerator.process_index])).tolist()
print("found", indices, "of", accelerator.num_processes)
accelerator.end_training()
"""

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("file", "machines"), [("ddp", 1), ("fsdp2", 1), ("multi_node", 2)])
def test_a_launch_file_starts_two_processes_that_find_each_other(tmp_path, file, machines):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", TRAINING / "accelerate" / f"{file}.yaml", "--num_processes", 2]
    command += ["--num_machines", machines, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    started = [
        subprocess.Popen(
            [*map(str, command), "--machine_rank", str(rank), str(script)],
            env=clean_environment() | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(machines)
    ]
    said = "".join(one.communicate(timeout=300)[0] for one in started)
    assert all(one.returncode == 0 for one in started), said
    assert said.count("found [0, 1] of 2") == 2, said
