"""Frozen foundation models whose features a student learns to reconstruct."""

import hashlib
import inspect

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from hf_efficientsam.inference.loading import resolve_name
from hf_efficientsam.training.data.processor_files import read_processor_values


class Teacher(nn.Module):
    """
    A frozen vision encoder with its own input size and normalisation; `load_teacher` makes one.

    Its feature map is the neck's output for SAM and EfficientSAM, the coarsest image embedding that the mask decoder
    reads for SAM 2, and the last hidden state without class and register tokens for plain vision transformers (of an
    MAE: of the whole image, nothing masked).

    Args:
        encoder: takes `pixel_values` `[B, 3, size, size]`.
        name: where it was loaded from.
        size: side of its square input in pixels.
        mean, std: of each channel, for pixels in [0, 255].
        weights_hash: tells its weights from others.
        offset: vector of `width` that is added to every feature.

    Raises:
        ValueError: if the encoder does not turn such an input into a square grid of features.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        name: str,
        size: int,
        mean: list[float],
        std: list[float],
        weights_hash: str,
        offset: torch.Tensor | None = None,
    ):
        super().__init__()
        self.encoder, self.name, self.size, self.weights_hash = encoder, name, size, weights_hash
        device = encoder.device
        self.register_buffer("mean", torch.tensor(mean, device=device)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std, device=device)[:, None, None], persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self.requires_grad_(False).eval()
        resized = size != getattr(encoder.config, "image_size", size)
        takes_any = "interpolate_pos_encoding" in inspect.signature(encoder.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if resized and takes_any else {}
        try:  # What it cannot do is better said now than in the first step.
            self.width = self(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device), (1, 1)).shape[-1]
        except (ValueError, RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{name} cannot be the teacher at {size} x {size} pixels: {reason}") from None

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)  # frozen, also as a part of something that is trained

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """
        RGB `pixels` uint8 [B, 3, size, size] -> features float32 [B, h * w, width], row by row, on the student's
        `grid` of h x w cells. Where the teacher's own grid is another it is resized: bilinear with antialiasing, so
        that every feature of a finer grid counts. Both cover the same square.
        """
        pixel_values = (pixels.float() - self.mean) / self.std
        features = self._feature_map(pixel_values.to(self.encoder.dtype)).float()
        if features.shape[-2:] != tuple(grid):
            features = F.interpolate(features, grid, mode="bilinear", antialias=True)
        features = features.flatten(2).transpose(1, 2)
        return features if self.offset is None else features + self.offset

    def _feature_map(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, width, h, w] on the teacher's own grid."""
        output = self.encoder(pixel_values, **self.options, **self._unmasked(len(pixel_values)))
        if "fpn_hidden_states" in output:
            return output.fpn_hidden_states[-1]  # SAM 2: from fine to coarse
        features = output.last_hidden_state
        if features.ndim == 4 and features.shape[-1] == features.shape[-2]:
            return features
        side = self.size // (_patch_size(self.encoder) or self.size)
        # Class token, distillation token and registers, all of them before the patches.
        num_prefix = features.shape[1] - side**2
        registers = getattr(self.encoder.config, "num_register_tokens", 0)
        if features.ndim != 3 or num_prefix not in (0, 1, 2, 1 + registers):
            raise ValueError(
                f"its features of shape {tuple(features.shape)} are no grid of patches; choose a plain vision "
                "transformer such as SAM, SAM 2, CLIP, SigLIP, DINOv2 or ViT."
            )
        return features[:, num_prefix:].transpose(1, 2).unflatten(2, (side, side))

    def _unmasked(self, batch: int) -> dict:
        """What makes an MAE, which shuffles its patches by random numbers, leave them in order; none is masked."""
        if "noise" not in inspect.signature(self.encoder.forward).parameters:
            return {}
        number = (self.size // _patch_size(self.encoder)) ** 2
        return {"noise": torch.arange(number, device=self.encoder.device).expand(batch, -1)}

    def description(self) -> dict:
        """What decides about its features, in plain json: for the manifest of a cache."""
        return {
            "name": self.name,
            "weights_hash": self.weights_hash,
            "size": self.size,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "dtype": str(self.encoder.dtype).removeprefix("torch."),
        }


def load_teacher(
    name: str,
    size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Teacher:
    """
    A vision model of transformers as a `Teacher`.

    Args:
        name: directory or Hub name, such as facebook/sam-vit-huge; `bundled` is the checkpoint of this package.
        size: side of its input in pixels; by default that of its own image processor: 1024 for SAM, the crop's 224
            for CLIP and DINOv2. Models with a fixed position table, such as SAM, take no other.
        device: the CPU by default.
        dtype: of weights and activations; by default bfloat16 on a GPU and float32 on the CPU.

    Raises:
        ValueError: in one sentence, if there is no such model or it cannot be a teacher.
    """
    device, path = torch.device(device or "cpu"), resolve_name(name)
    model, encoder = _load_encoder(name, path)
    values = read_processor_values(name, path)
    size = values.side if size is None else size
    patch_size = _patch_size(encoder)
    if size < 1 or (patch_size and size % patch_size):
        fitting = max(patch_size or 1, size - size % (patch_size or 1))
        raise ValueError(
            f"{name} needs a size that is a multiple of its patch of {patch_size} pixels: got {size}; give "
            f"--teacher_size {fitting}."
        )
    # SAM 2's mask decoder reads its image embedding with this vector added, where there is no memory of a video.
    offset = getattr(model, "no_memory_embedding", None)
    offset = None if offset is None else offset.detach().flatten().to(device)
    weights_hash = _hash_weights(encoder)
    encoder = encoder.to(device, dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16))
    return Teacher(encoder, name, size, values.mean, values.std, weights_hash, offset)


def _load_encoder(name: str, path: str) -> tuple[nn.Module, nn.Module]:
    """A whole model, and the part of it that reads images."""
    try:
        AutoConfig.from_pretrained(path)
    except OSError:
        raise ValueError(
            f"The teacher {name} is neither a directory with a model nor a Hub model in reach; check the name."
        ) from None
    except ValueError as error:
        raise ValueError(f"The teacher {name} cannot be loaded: {' '.join(str(error).split())}") from None
    try:  # float32 first, whatever was stored: so the weights' hash is the same on every device
        model, loading = AutoModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"The teacher {name} cannot be loaded: {' '.join(str(error).split())}") from None
    part = next((part for part in ("vision_encoder", "vision_model") if hasattr(model, part)), "")
    encoder = model.get_submodule(part)
    if hasattr(encoder.config, "mask_ratio"):  # of an MAE: a teacher sees all of the image
        encoder.config.mask_ratio = 0.0
    if getattr(encoder, "main_input_name", None) != "pixel_values":
        raise ValueError(f"The teacher {name} is a {type(model).__name__}, which does not read images.")
    # Poolers are not used here, and often were never trained.
    if missing := [key for key in loading["missing_keys"] if key.startswith(part) and "pooler" not in key]:
        raise ValueError(f"The teacher {name} lacks {len(missing)} of its weights, such as {min(missing)}.")
    return model, encoder


def _patch_size(encoder: PreTrainedModel) -> int | None:
    patch_size = getattr(encoder.config, "patch_size", None)
    return patch_size if isinstance(patch_size, int) else None


def _hash_weights(encoder: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        if "pooler" not in name:
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
