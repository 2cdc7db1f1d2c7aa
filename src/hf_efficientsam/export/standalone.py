"""Does a repository of the Hub work where this package is not installed? Asked before it is uploaded."""

import inspect
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from hf_efficientsam.inference.loading import load_head, load_model

logger = logging.getLogger(__name__)

# Begins what runs where the package cannot be imported, as on a machine that has transformers alone.
NOT_INSTALLED = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_efficientsam":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
try:
    import hf_efficientsam
except ImportError:
    pass
else:
    raise SystemExit("the package is not blocked")
"""

STRANGER = """
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForMaskGeneration, AutoProcessor

{answer}

folder, has_head, threads, output = sys.argv[1:]
torch.set_num_threads(int(threads))
options = {{"trust_remote_code": True, "dtype": torch.float32}}
model = AutoModelForMaskGeneration.from_pretrained(folder, **options).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
head = AutoModel.from_pretrained(folder, subfolder="saliency", **options).eval() if has_head == "True" else None
save_file(answer(model, processor, head), output)
"""


@torch.no_grad()
def answer(model, processor, head) -> dict[str, torch.Tensor]:
    """What a model says to fixed questions about a fixed picture, and its saliency head if there is one."""
    image = (np.arange(60 * 80 * 3) * 7919 % 256).astype(np.uint8).reshape(60, 80, 3)
    inputs = processor(image, input_points=[[[[40, 30]], [[10, 20], [12, 25]]]], input_boxes=[[[5, 5, 60, 50], None]])
    outputs = model(**inputs)
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    masks = processor.post_process_masks(outputs.pred_masks, *sizes)[0]
    answers = {"pred_masks": outputs.pred_masks, "iou_scores": outputs.iou_scores, "masks": masks}
    if head is not None:
        answers["saliency"] = head(model.get_image_embeddings(inputs["pixel_values"])).logits
    return answers


def verify_standalone(directory: Path, name: str, folder: Path) -> None:
    """
    Loads the model repository `name`, made in `folder`, in a process that has transformers but not this package and no
    network, and compares its answers with those of the checkpoint in `directory`.

    Raises:
        ValueError: if it cannot be loaded there or answers otherwise than the checkpoint does here.
    """
    logger.info("Loading %s in a process without this package ...", name)
    model, processor = load_model(str(directory))
    head = load_head(str(directory / "saliency")) if (directory / "saliency").is_dir() else None
    expected = answer(model.cpu(), processor, head)
    script = NOT_INSTALLED + STRANGER.format(answer=inspect.getsource(answer))
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary, "answers.safetensors")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": temporary, "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("PYTHONPATH", None)
        arguments = [folder.resolve(), head is not None, torch.get_num_threads(), output]
        process = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            cwd=temporary,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if process.returncode:
            reason = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise ValueError(f"{name} would not load without this package, so it is not uploaded: {reason}")
        found = load_file(output)
    for key, value in expected.items():
        if found[key].shape != value.shape or not torch.allclose(found[key].float(), value.float(), atol=1e-4):
            raise ValueError(
                f"{name} would give other {key} without this package than {directory} gives here, so it "
                "is not uploaded."
            )
