"""
How far the masks of other tools, which run files of `efficientsam export-onnx --layout`, are from those of
`EfficientSamPredictor`.

    python benchmarks/other_tools/table.py [--model bundled] [--folder build/other_tools]

Each tool runs its own code on the exported files: osam, samexporter and X-AnyLabeling in an environment of their own,
transformers.js in node. They are installed into the folder from PyPI and npm's registry, unless they are there; tools
and files take 1.4 GB. A run without the installation takes 70 seconds of one core.

Prompts are the 18 boxes of `grid_boxes` over each of three photographs; of a box's masks the best is compared. A row
has the mean and the least IoU of all boxes, and the mean of each photograph.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from hf_efficientsam import EfficientSamPredictor
from hf_efficientsam.export.onnx_layouts import LAYOUTS, export_layout
from hf_efficientsam.export.quantize import grid_boxes, mask_iou

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
NAMES = ("bus", "clock", "elephant")
OSAM, OPENCV, SAMEXPORTER, X_ANYLABELING, TRANSFORMERS_JS = "0.8.1", "5.0.0.93", "0.5.0", "4.2.1", "4.3.2"
TOOLS = {  # as the callers name their answers -> as the table does
    "osam": f"osam {OSAM}, and through it labelme (`official`)",
    "samexporter-efficient_sam": f"samexporter {SAMEXPORTER}'s `efficient_sam` (`official`)",
    "samexporter-sam": f"samexporter {SAMEXPORTER}'s `sam` (`sam`)",
    "x-anylabeling": f"X-AnyLabeling {X_ANYLABELING} (`sam`)",
    "transformers.js": f"transformers.js {TRANSFORMERS_JS}, in node (`transformers.js`)",
}


def install(folder: Path) -> Path:
    """The interpreter that has the Python tools; transformers.js is in `folder/node_modules`."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, f"osam=={OSAM}", f"opencv-python-headless=={OPENCV}"], check=True)
    # samexporter asks for torch and X-AnyLabeling for Qt, which the calls here do not need.
    alone = [f"samexporter=={SAMEXPORTER}", f"x-anylabeling-cvhub=={X_ANYLABELING}"]
    subprocess.run([*pip, "--no-deps", *alone], check=True)
    # Without its script, which fetches CUDA libraries, onnxruntime-node runs on the CPU.
    npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", folder]
    subprocess.run([*npm, f"@huggingface/transformers@{TRANSFORMERS_JS}"], check=True)
    return python


def ask_tools(folder: Path, python: Path, prompts: list[dict]) -> None:
    """Writes the answers `folder/answers/TOOL-NAME`, bytes 0 and 1 `[boxes, height, width]`."""
    (folder / "answers").mkdir(exist_ok=True)
    (folder / "prompts.json").write_text(json.dumps(prompts))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HOME": str(folder), "LOGURU_LEVEL": "WARNING"}  # of osam, which keeps its models at home
    subprocess.run([python, HERE / "python_tools.py", folder], env=environment, check=True)
    node = environment | {"NODE_PATH": str(folder / "node_modules")}
    subprocess.run(["node", HERE / "transformers_js.cjs", folder], env=node, check=True)


def print_table(ious: dict[str, dict[str, np.ndarray]]) -> None:
    """`ious`: tool -> name of a photograph -> IoU of each box."""
    print(f"| tool | mean | least | {' | '.join(NAMES)} |\n|{'---|' * (3 + len(NAMES))}")
    for tool, found in ious.items():
        every = np.concatenate(list(found.values()))
        values = [every.mean(), every.min(), *(one.mean() for one in found.values())]
        print(f"| {TOOLS[tool]} | {' | '.join(f'{value:.3f}' for value in values)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="directory or Hub name of a checkpoint")
    parser.add_argument("--folder", type=Path, default=Path("build/other_tools"), help="for tools and exported files")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python = install(folder)
    for layout in LAYOUTS:
        export_layout(layout, args.model, folder / layout)
    predictor, prompts, expected = EfficientSamPredictor.from_pretrained(args.model), [], {}
    for name in NAMES:
        path = EXAMPLES / f"{name}.jpg"
        boxes = [box.tolist() for box in grid_boxes(*Image.open(path).size)]
        prompts.append({"name": name, "path": str(path), "boxes": boxes})
        predictor.set_image(path)
        expected[name] = predictor.segment(boxes=boxes).masks
    ask_tools(folder, python, prompts)
    ious = {tool: {} for tool in TOOLS}
    for tool, found in ious.items():
        for name, masks in expected.items():
            answer = np.fromfile(folder / "answers" / f"{tool}-{name}", np.uint8).reshape(masks.shape)
            found[name] = mask_iou(answer.astype(bool), masks)
    print_table(ious)


if __name__ == "__main__":
    main()
