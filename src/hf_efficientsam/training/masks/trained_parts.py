"""Which parts of a promptable model are trained."""

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from hf_efficientsam.training.engine.config import NotNegativeInt
from hf_efficientsam.training.engine.optimization import count_layers, layer_depth

from .lora import insert_lora

# Beginnings of parameters' names. SAM 2 adds a vector of its own to the image embedding.
PARTS = {
    "vision_encoder": ("vision_encoder.", "no_memory_embedding"),
    "prompt_encoder": ("prompt_encoder.",),
    "mask_decoder": ("mask_decoder.",),
}


@dataclass(frozen=True)
class TrainedPartsConfig:
    """Which parts are trained, and how."""

    freeze: list[str] = field(
        default_factory=list, metadata={"help": "parts that are not trained", "choices": list(PARTS)}
    )
    unfreeze: list[str] = field(
        default_factory=list, metadata={"help": "modules of frozen parts that are trained, as mask_decoder.iou_head"}
    )
    train_last_layers: NotNegativeInt | None = field(
        default=None, metadata={"help": "of the encoder train only so many last layers and the neck; by default all"}
    )
    lora: NotNegativeInt = field(
        default=0, metadata={"help": "rank of LoRA updates of the encoder's queries and values, its weights frozen"}
    )
    save_lora: bool = field(
        default=False, metadata={"help": "also save what --lora trains by itself, in model/lora, in peft's format"}
    )

    def check_trained_parts(self) -> None:
        """Raises ValueError for options that exclude each other."""
        if self.lora and "vision_encoder" in self.freeze:
            raise ValueError(
                "--lora updates the encoder and --freeze vision_encoder forbids it; leave one of them out."
            )
        if self.train_last_layers is not None and (self.lora or "vision_encoder" in self.freeze):
            raise ValueError("--train_last_layers, --lora and --freeze vision_encoder exclude each other; choose one.")
        if encoders := [name for name in self.unfreeze if name.split(".")[0] == "vision_encoder"]:
            raise ValueError(
                f"--unfreeze {encoders[0]}: of the encoder choose what is trained by --train_last_layers."
            )
        if self.save_lora and not self.lora:
            raise ValueError("--save_lora saves what --lora trains; give its rank.")


def choose_trained(model: PreTrainedModel, config: TrainedPartsConfig) -> None:
    """
    Freezes what is not to be trained, and inserts low-rank updates of the encoder if they are asked for.

    Raises:
        ValueError: if the model lacks what is named, or nothing is left to train.
    """
    if config.lora:
        insert_lora(model, config.lora)
    if config.train_last_layers is not None:
        freeze_first_layers(model, config.train_last_layers)
    frozen = tuple(beginning for part in config.freeze for beginning in PARTS[part])
    for name, parameter in model.named_parameters():
        if name.startswith(frozen):
            parameter.requires_grad = False
    for name in config.unfreeze:
        try:
            model.get_submodule(name).requires_grad_(True)
        except AttributeError:
            raise ValueError(
                f"--unfreeze {name}: the model has no such module; mask_decoder.iou_head is one of EfficientSAM's."
            ) from None
    for name, parameter in model.named_parameters():
        # Fourier frequencies, constants in Segment Anything; transformers' SAM has them as a parameter.
        if name.endswith(".positional_embedding"):
            parameter.requires_grad = False
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("--freeze leaves nothing to train; name fewer parts.")


def freeze_first_layers(model: PreTrainedModel, last_layers: int) -> None:
    """Embeddings and layers of the encoder, but for the last so many layers."""
    layers = count_layers(model)
    if last_layers > layers or not layers:
        advice = f"{layers} layers; give at most so many" if layers else "no numbered layers; leave it out"
        raise ValueError(f"--train_last_layers {last_layers}: the encoder has {advice}.")
    for name, parameter in model.named_parameters():
        # A backbone's last normalisations come after its layers, and before the neck.
        after = last_layers == 0 and name.startswith("vision_encoder.backbone.")
        if after or layer_depth(name, layers) > last_layers:
            parameter.requires_grad = False
