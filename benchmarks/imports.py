"""
Seconds of CPU that imports and the command's help take, beside `from transformers import SamModel`.

    python benchmarks/imports.py

Each is the least of `RUNS` processes, taken in turn so that a busy machine slows all alike.
"""

import os
import subprocess
import sys

RUNS = 2
COMMAND = "import sys; from hf_efficientsam.cli.app import app; sys.argv = ['efficientsam', {!r}]; app()"
MEASURED = {
    "from transformers import SamModel": "from transformers import SamModel",
    "import hf_efficientsam": "import hf_efficientsam",
    "from hf_efficientsam import EfficientSamModel": "from hf_efficientsam import EfficientSamModel",
    "efficientsam --version": COMMAND.format("--version"),
    "efficientsam --help": COMMAND.format("--help"),
}


def cpu_seconds(code: str) -> float:
    """User and system time of a Python process that runs the code."""
    before = os.times()
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    least = dict.fromkeys(MEASURED, float("inf"))
    for _ in range(RUNS):
        for name, code in MEASURED.items():
            least[name] = min(least[name], cpu_seconds(code))
    peer = least["from transformers import SamModel"]
    for name, seconds in least.items():
        print(f"{name:46} {seconds:5.2f} s  {seconds / peer:5.2f} of SamModel's import")


if __name__ == "__main__":
    main()
