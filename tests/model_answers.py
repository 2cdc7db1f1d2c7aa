"""Masks, and in place of a model what answers when it is asked for them."""

import torch

from hf_efficientsam.training.masks.metrics import filled_box

HEIGHT, WIDTH = 20, 30
BOXES = torch.tensor([[2.0, 3, 12, 9], [14, 0, 30, 8], [20, 10, 21, 11]])
MASKS = filled_box(BOXES, HEIGHT, WIDTH)


class Answers:
    """
    Instead of a model: finds out which of MASKS is asked for and answers with `candidates(mask [H,W]) -> [M,H,W]`, of
    which the last is the most confident.
    """

    def __init__(self, candidates, background_points=True, mask_prompts=True):
        self.candidates, self.asked = candidates, []
        self.background_points, self.mask_prompts = background_points, mask_prompts

    def __call__(
        self, multimask_output=True, input_boxes=None, input_points=None, input_labels=None, input_masks=None
    ):
        self.asked.append((multimask_output, input_boxes, input_points, input_labels, input_masks))
        points = (input_boxes[:, :2] + input_boxes[:, 2:]) / 2 if input_points is None else input_points[:, 0]
        masks = torch.stack([self.candidates(MASKS[MASKS[:, int(y), int(x)]].squeeze(0)) for x, y in points])
        masks = masks if multimask_output else masks[:, :1]
        return masks, torch.linspace(0, 1, masks.shape[1]).expand(masks.shape[:2]), masks * 2.0 - 1
