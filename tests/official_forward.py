"""
The official EfficientSAM's forward in float64, from an official state dict, to hold the model against.

Written from the paper (arXiv 2312.00863, and 2304.02643 for the decoder) and the golden data's README; it uses nothing
of the package, does one prompt at a time and computes everything in the plainest way. tests/export/test_convert.py
compares it with the stored outputs too.
"""

import torch
import torch.nn.functional as F

SLOTS = 6  # prompts are padded to so many tokens
ENCODER_EPS, DECODER_EPS = 1e-6, 1e-5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class OfficialForward:
    """
    Args:
        state_dict: official names.
        image_size: side of the model's input in pixels.
        encoder_heads, decoder_heads: numbers of attention heads.
    """

    def __init__(self, state_dict: dict[str, torch.Tensor], image_size: int, encoder_heads: int, decoder_heads: int):
        self.weights = {name: value.double() for name, value in state_dict.items()}
        self.image_size, self.encoder_heads, self.decoder_heads = image_size, encoder_heads, decoder_heads

    def __call__(self, images: torch.Tensor, points: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            images: bytes `[B, H, W, 3]`.
            points, labels: `[B, Q, P, 2]`, (x, y) in pixels of the images, and `[B, Q, P]`: 1 point, 2 and 3 corners
                of a box, -1 padding.

        Returns:
            by the names in the golden data: `pixel_values`, `image_embeddings`, `low_res_masks`, `iou`,
            `masks_at_image_size`, `single_low_res_mask`, `single_iou`.
        """
        height, width = images.shape[1:3]
        pixel_values = self.preprocess(images)
        embeddings = self.encode(pixel_values)
        points = points.double() * torch.tensor(
            [self.image_size / width, self.image_size / height], dtype=torch.float64
        )
        masks, scores = [], []
        for embedding, image_points, image_labels in zip(embeddings, points, labels, strict=True):
            answers = [self.decode(embedding, *prompt) for prompt in zip(image_points, image_labels, strict=True)]
            masks.append(torch.stack([answer[0] for answer in answers]))
            scores.append(torch.stack([answer[1] for answer in answers]))
        masks, scores = torch.stack(masks), torch.stack(scores)  # [B, Q, 4, h, w], [B, Q, 4]
        large = F.interpolate(masks[:, :, 1:].flatten(0, 1), (height, width), mode="bicubic", align_corners=False)
        return {
            "pixel_values": pixel_values,
            "image_embeddings": embeddings,
            "low_res_masks": masks[:, :, 1:],
            "iou": scores[:, :, 1:],
            "masks_at_image_size": large.unflatten(0, masks.shape[:2]),
            "single_low_res_mask": masks[:, :, :1],
            "single_iou": scores[:, :, :1],
        }

    def of(self, name: str) -> torch.Tensor:
        return self.weights[name]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.of(f"{name}.weight").T + self.of(f"{name}.bias")

    def normalize(self, x: torch.Tensor, name: str, eps: float) -> torch.Tensor:
        """Over the last axis."""
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * self.of(f"{name}.weight") + self.of(f"{name}.bias")

    # ------------------------------------------------------------------------------------------------- image

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        size = (self.image_size, self.image_size)
        pixels = F.interpolate(images.permute(0, 3, 1, 2).double() / 255, size, mode="bilinear", align_corners=False)
        mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (MEAN, STD))
        return (pixels - mean) / std

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        kernel = self.of("image_encoder.patch_embed.proj.weight")
        bias = self.of("image_encoder.patch_embed.proj.bias")
        x = F.conv2d(pixel_values, kernel, bias, stride=kernel.shape[-1])
        side = x.shape[-1]
        table = self.of("image_encoder.pos_embed")[:, 1:]  # without the class token
        pretrain_side = round(table.shape[1] ** 0.5)
        table = table.transpose(1, 2).unflatten(2, (pretrain_side, pretrain_side))
        x = x + F.interpolate(table, (side, side), mode="bicubic", align_corners=False)
        x = x.flatten(2).transpose(1, 2)
        depth = 1 + max(int(name.split(".")[2]) for name in self.weights if name.startswith("image_encoder.blocks."))
        for block in (f"image_encoder.blocks.{i}" for i in range(depth)):
            q, k, v = self.linear(self.normalize(x, f"{block}.norm1", ENCODER_EPS), f"{block}.attn.qkv").chunk(3, -1)
            x = x + self.linear(attention(q, k, v, self.encoder_heads), f"{block}.attn.proj")
            hidden = F.gelu(self.linear(self.normalize(x, f"{block}.norm2", ENCODER_EPS), f"{block}.mlp.fc1"))
            x = x + self.linear(hidden, f"{block}.mlp.fc2")
        x = x @ self.of("image_encoder.neck.0.weight")[:, :, 0, 0].T
        x = self.normalize(x, "image_encoder.neck.1", ENCODER_EPS).transpose(1, 2).unflatten(2, (side, side))
        x = F.conv2d(x, self.of("image_encoder.neck.2.weight"), padding=1).permute(0, 2, 3, 1)
        return self.normalize(x, "image_encoder.neck.3", ENCODER_EPS).permute(0, 3, 1, 2)

    # ------------------------------------------------------------------------------------------------- prompt

    def positions(self, places: torch.Tensor) -> torch.Tensor:
        """Places `[..., 2]`, x and y from 0 to 1 -> `[..., C]`."""
        frequencies = self.of("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix")
        phases = 2 * torch.pi * ((2 * places - 1) @ frequencies)
        return torch.cat([phases.sin(), phases.cos()], -1)

    def prompt_tokens(self, points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Points `[P, 2]` in pixels of the model's input -> `[6, C]`."""
        missing = SLOTS - len(points)
        points = F.pad(points, (0, 0, 0, missing), value=-1.0)
        labels = F.pad(labels, (0, missing), value=-1)
        points = torch.where(labels[:, None] == -1, -1.0, points)
        names = {-1: "invalid_points", 1: "point_embeddings"}
        names |= {2: "bbox_top_left_embeddings", 3: "bbox_bottom_right_embeddings"}
        kinds = torch.cat([self.of(f"prompt_encoder.{names[label]}.weight") for label in labels.tolist()])
        return self.positions((points + 0.5) / self.image_size) + kinds

    # ------------------------------------------------------------------------------------------------- masks

    def decode(
        self, embedding: torch.Tensor, points: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All four masks `[4, h, w]` and their scores `[4]` of one prompt; the single mask comes first."""
        side = embedding.shape[-1]
        centres = (torch.arange(side, dtype=torch.float64) + 0.5) / side
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        image_pe = self.positions(torch.stack([x, y], -1)).flatten(0, 1)
        own = [self.of("mask_decoder.iou_token.weight"), self.of("mask_decoder.mask_tokens.weight")]
        token_pe = torch.cat([*own, self.prompt_tokens(points, labels)])
        tokens, image = self.two_way(token_pe, token_pe, embedding.flatten(1).T, image_pe)

        grid = image.T.unflatten(1, (side, side))[None]
        layers = "mask_decoder.final_output_upscaling_layers"
        grid = self.double(grid, f"{layers}.0.0")
        mean, variance = grid.mean(), grid.var(unbiased=False)
        weight, bias = (self.of(f"{layers}.0.1.{name}")[:, None, None] for name in ("weight", "bias"))
        grid = F.gelu((grid - mean) / (variance + DECODER_EPS).sqrt() * weight + bias)
        grid = F.gelu(self.double(grid, f"{layers}.1.0"))[0]
        filters = [self.mlp(tokens[1 + i], f"mask_decoder.output_hypernetworks_mlps.{i}") for i in range(len(own[1]))]
        masks = torch.einsum("mc,chw->mhw", torch.stack(filters), grid)
        return masks, self.mlp(tokens[0], "mask_decoder.iou_prediction_head")

    def two_way(self, tokens, token_pe, image, image_pe) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[T, C]` and image `[N, C]` look at each other."""
        transformer = "mask_decoder.transformer"
        for i in range(2):
            layer = f"{transformer}.layers.{i}"
            if i > 0:
                tokens = tokens + token_pe
            tokens = tokens + self.attend(tokens, tokens, tokens, f"{layer}.self_attn")
            tokens = self.normalize(tokens, f"{layer}.norm1", DECODER_EPS)
            update = self.attend(tokens + token_pe, image + image_pe, image, f"{layer}.cross_attn_token_to_image")
            tokens = self.normalize(tokens + update, f"{layer}.norm2", DECODER_EPS)
            tokens = self.normalize(tokens + self.mlp(tokens, f"{layer}.mlp"), f"{layer}.norm3", DECODER_EPS)
            update = self.attend(image + image_pe, tokens + token_pe, tokens, f"{layer}.cross_attn_image_to_token")
            image = self.normalize(image + update, f"{layer}.norm4", DECODER_EPS)
        update = self.attend(tokens + token_pe, image + image_pe, image, f"{transformer}.final_attn_token_to_image")
        return self.normalize(tokens + update, f"{transformer}.norm_final_attn", DECODER_EPS), image

    def attend(self, query, key, value, name: str) -> torch.Tensor:
        projected = (self.linear(x, f"{name}.{part}_proj") for x, part in zip((query, key, value), "qkv", strict=True))
        return self.linear(attention(*projected, self.decoder_heads), f"{name}.out_proj")

    def mlp(self, x: torch.Tensor, name: str) -> torch.Tensor:
        depth = sum(other.startswith(f"{name}.layers.") and other.endswith("weight") for other in self.weights)
        for i in range(depth):
            x = F.gelu(self.linear(x, f"{name}.layers.{i}.0"))
        return self.linear(x, f"{name}.fc")

    def double(self, grid: torch.Tensor, name: str) -> torch.Tensor:
        return F.conv_transpose2d(grid, self.of(f"{name}.weight"), self.of(f"{name}.bias"), stride=2)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """`[..., L, C]` -> `[..., L, C]`."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(-2, -3) for x in (query, key, value))
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    return (weights @ value).transpose(-2, -3).flatten(-2)
