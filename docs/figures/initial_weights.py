"""Makes docs/initial_weights.jpg: what an untrained model with geometric initial weights answers.

python docs/figures/initial_weights.py
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hf_efficientsam import EfficientSamConfig, EfficientSamImageProcessor, EfficientSamModel, EfficientSamProcessor
from hf_efficientsam.inference.drawing import draw_masks, image_table
from hf_efficientsam.training.masks.initial_weights import set_geometric_weights

ROOT = Path(__file__).parents[2]
SIZE = 512


def untrained_model() -> EfficientSamModel:
    torch.manual_seed(0)
    kinds = {"background_points": True, "mask_prompts": True}
    config = EfficientSamConfig(vision_config={"image_size": SIZE}, prompt_encoder_config=kinds)
    model = EfficientSamModel(config).eval()
    set_geometric_weights(model)
    return model


def star(width: int, height: int) -> np.ndarray:
    """A mask prompt that is no box and no disc, bool [height, width]."""
    y, x = np.mgrid[:height, :width]
    x, y = (x - width / 2) / width, (y - height / 2) / width
    return np.hypot(x, y) < 0.27 + 0.12 * np.cos(5 * np.arctan2(x, -y))


@torch.no_grad()
def main() -> None:
    model = untrained_model()
    processor = EfficientSamProcessor(EfficientSamImageProcessor(size={"height": SIZE, "width": SIZE}))
    image = Image.open(ROOT / "examples" / "elephant.jpg").convert("RGB")
    image.thumbnail((400, 400))
    width, height = image.size
    box = [0.30 * width, 0.22 * height, 0.72 * width, 0.80 * height]
    clicks = [[0.42 * width, 0.45 * height], [0.62 * width, 0.5 * height], [0.54 * width, 0.62 * height]]
    labels = [1, 1, 0]
    mask = star(width, height)

    def answer(input_masks=None, **prompt):
        inputs = processor(images=image, return_tensors="pt", **prompt)
        output = model(**inputs, input_masks=input_masks, multimask_output=False)
        return processor.post_process_masks(output.pred_masks, inputs["original_sizes"])[0][0]

    logits = torch.where(torch.from_numpy(mask), 10.0, -10.0)[None, None]
    by_clicks = answer(input_points=[[clicks]], input_labels=[[labels]])
    columns = {
        "a box": [draw_masks(image, answer(input_boxes=[[box]]), boxes=[box])],
        "clicks, one on the background": [draw_masks(image, by_clicks, points=[clicks], labels=[labels])],
        "a mask prompt": [draw_masks(image, answer(input_masks=logits))],
    }
    image_table(columns).save(ROOT / "docs" / "initial_weights.jpg", quality=85, optimize=True)


if __name__ == "__main__":
    main()
