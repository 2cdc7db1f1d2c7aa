"""What is traced for ONNX: vision encoder, decoder, examples of their inputs, and interpolation by matrices."""

import torch
from torch import nn

from hf_efficientsam.model.mask_decoder_fast_efficientsam import FastMaskDecoder, project_shared_image
from hf_efficientsam.model.modeling_auto_vision_efficientsam import EfficientSamAutoVisionEncoder
from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel

CUBIC = -0.75  # coefficient of torch's bicubic interpolation


class ExportedEncoder(nn.Module):
    """The vision encoder; the plain ViT's position table is interpolated at every size, which at its own changes
    nothing."""

    def __init__(self, model: EfficientSamModel):
        super().__init__()
        self.encoder = model.vision_encoder

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if isinstance(self.encoder, EfficientSamAutoVisionEncoder):
            return self.encoder(pixel_values).last_hidden_state
        embeddings = self.encoder.embeddings
        patches = embeddings.projection(pixel_values)
        side = embeddings.pretrain_grid
        table = embeddings.position_embeddings[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        # By matrices, as onnxruntime's own interpolation takes a twentieth of the time of the bundled encoder.
        table = resample(table, *patches.shape[-2:], side / sides(patches))
        hidden_states = (patches + table).flatten(2).transpose(1, 2)
        for layer in self.encoder.layers:
            hidden_states = layer(hidden_states)
        return self.encoder.neck(hidden_states, *patches.shape[-2:])


class ExportedDecoder(nn.Module):
    """Prompt encoder and mask decoder, for all prompts at once and with all masks."""

    def __init__(self, model: EfficientSamModel):
        super().__init__()
        self.model = model

    def forward(
        self,
        image_embeddings: torch.Tensor,
        input_points: torch.Tensor,
        input_labels: torch.Tensor,
        input_boxes: torch.Tensor | None = None,
        input_masks: torch.Tensor | None = None,
        has_input_masks: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        decoder = self.model.mask_decoder
        prompts = (input_points, input_labels, input_boxes, input_masks)
        own, tokens, token_multiplicity, dense_prompts = self.model.encode_prompts(image_embeddings, *prompts)
        positions = own if positions is None else positions
        image = decoder.embed_image(image_embeddings, dense_prompts)
        if input_masks is not None:
            without_mask = decoder.embed_image(image_embeddings, self.model.encode_prompts(image_embeddings)[-1])
            image = torch.where(has_input_masks[..., None, None], image, without_mask)
        tokens, log_multiplicity = decoder.embed_tokens(tokens, token_multiplicity)
        shared = project_shared_image(decoder.layers[0], image, positions) if input_masks is None else None
        fast = FastMaskDecoder(decoder)
        tokens, image = fast.attend(image, positions, tokens, log_multiplicity, None, shared)
        grid_size = tuple(image_embeddings.shape[-2:])
        return fast.predict_masks(tokens, image, grid_size, None), decoder.predict_iou(tokens, None)


def encoder_inputs(model: EfficientSamModel, batch: int, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Noise for images of `grid` times the encoder's `size_divisor` down and across, or of its only size."""
    config = model.config.vision_config
    height, width = 2 * [config.fixed_size] if config.fixed_size else (config.size_divisor * n for n in grid)
    return {"pixel_values": torch.randn(batch, config.num_channels, height, width)}


def decoder_inputs(
    model: EfficientSamModel, batch: int, prompts: int, points: int, grid: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Noise, with points, boxes and masks of every kind that the model takes, and some missing."""
    config = model.config
    height, width = grid
    sides = torch.tensor([width, height]) * config.vision_config.patch_size
    labels = torch.tensor([1, 0, -10] if config.prompt_encoder_config.background_points else [1, -10])
    corners = torch.rand(batch, prompts, 2, 2).sort(dim=2).values * sides
    missing = torch.rand(batch, prompts, 1) < 0.3
    inputs = {
        "image_embeddings": torch.randn(batch, config.vision_config.output_channels, height, width),
        "input_points": torch.rand(batch, prompts, points, 2) * sides,
        "input_labels": labels[torch.randint(len(labels), (batch, prompts, points))],
        "input_boxes": corners.flatten(2).masked_fill(missing, -10),
    }
    if config.prompt_encoder_config.mask_prompts:
        inputs["input_masks"] = 10 * torch.randn(batch, prompts, 4 * height, 4 * width)
        inputs["has_input_masks"] = torch.rand(batch, prompts) < 0.5
    return inputs


# ------------------------------------------------------------------------------------------------ masks


def cubic_matrix(count: int, cells: int, step: torch.Tensor) -> torch.Tensor:
    """
    Bicubic interpolation of a row of `cells` as a matrix `[count, cells]`: output i lies at (i + 0.5) * step cells,
    and the edge is repeated. As `torch.nn.functional.interpolate`, but exported with a scale apart from the sizes.
    """
    position = (torch.arange(count) + 0.5) * step - 0.5
    taps = position.floor()[:, None] + torch.arange(-1, 3)
    x = (position[:, None] - taps).abs()
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * CUBIC - 4 * CUBIC
    is_cell = taps.clamp(0, cells - 1)[..., None] == torch.arange(cells)
    return (torch.where(x <= 1, near, far)[..., None] * is_cell).sum(dim=1)


def resample(masks: torch.Tensor, height: int, width: int, steps: torch.Tensor) -> torch.Tensor:
    """`[..., h, w]` -> `[..., height, width]`, with steps `[2]` down and across as in `cubic_matrix`."""
    rows, columns = masks.shape[-2:]
    return cubic_matrix(height, rows, steps[0]) @ masks @ cubic_matrix(width, columns, steps[1]).T


def enlarge(masks: torch.Tensor, image_size: torch.Tensor) -> torch.Tensor:
    """`[..., h, w]` of a squashed image -> `[..., *image_size]`."""
    height, width = image_size.long().tolist()
    torch._check(height >= 1)
    torch._check(width >= 1)
    return resample(masks, height, width, sides(masks) / image_size)


def sides(grid: torch.Tensor) -> torch.Tensor:
    """Height and width of `[..., h, w]`, as the tensor that computations with sizes of images need."""
    return torch.stack([torch.full((), n, dtype=torch.float32) for n in grid.shape[-2:]])


def best_first(masks: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates `[..., M, h, w]` and their scores `[..., M]` in the order of the scores."""
    order = scores.argsort(dim=-1, descending=True)
    # Not take_along_dim, whose export knows only the batch that was traced.
    return masks.gather(-3, order[..., None, None].expand_as(masks)), scores.gather(-1, order)
