"""
CPU seconds of `efficientsam segment` for a point in one picture, beside what it cannot do without.

    python benchmarks/segment.py [--repeats 3]

Medians of processes taken in turn. "transformers" is the import of the class that its models inherit from. Encoder and
decoder of the same picture are timed in a process that has them loaded. One thread, bundled checkpoint.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from imports import cpu_seconds

IMAGE = str(Path(__file__).parents[1] / "examples" / "bus.jpg")
COMMAND = f"""
import sys
from hf_efficientsam.cli.main import main
sys.argv = ["efficientsam", "segment", {IMAGE!r}, "--point", "400,220"]
main()
"""
MODEL = f"""
import time
from PIL import Image
from hf_efficientsam import EfficientSamPredictor
predictor, image = EfficientSamPredictor.from_pretrained(), Image.open({IMAGE!r})
for _ in range(3):  # the first also loads the kernels
    start = time.process_time()
    predictor.set_image(image)
    predictor.predict([[400, 220]], [1])
print(time.process_time() - start)
"""
IMPORTS = {
    "import torch": "import torch",
    "import torch and transformers": "from transformers import PreTrainedModel",
    "efficientsam segment": COMMAND,
}
MODEL_ROW = "encoder and decoder"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    os.environ["OMP_NUM_THREADS"] = "1"
    seconds = {name: [] for name in [*IMPORTS, MODEL_ROW]}
    for _ in range(repeats):
        for name, code in IMPORTS.items():
            seconds[name].append(cpu_seconds(code))
        seconds[MODEL_ROW].append(float(subprocess.check_output([sys.executable, "-c", MODEL])))
    medians = {name: median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:32}{value:6.2f} CPU-s")
    for peer in list(IMPORTS)[:2]:
        least = medians[peer] + 1.2 * medians[MODEL_ROW]
        ratio = medians["efficientsam segment"] / least
        print(f"the command takes {ratio:.2f} of `{peer}` + 1.2 times encoder and decoder")


if __name__ == "__main__":
    main()
