"""The model that mask training starts from: a trained one, or a new one with weights that are geometric or random."""

import copy
from dataclasses import dataclass, field
from typing import Literal

from accelerate import PartialState
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from hf_efficientsam.inference.loading import find_checkpoint, load_model, load_own_head
from hf_efficientsam.model.configuration_efficientsam import EfficientSamConfig
from hf_efficientsam.model.configuration_vision_efficientsam import EfficientSamAutoVisionConfig
from hf_efficientsam.model.image_processing_efficientsam import EfficientSamImageProcessor
from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel
from hf_efficientsam.model.modeling_saliency import EfficientSamSaliencyHead
from hf_efficientsam.model.processing_efficientsam import EfficientSamProcessor
from hf_efficientsam.training.engine.config import PositiveInt
from hf_efficientsam.training.engine.encoder_weights import (
    load_auto_encoder,
    load_encoder,
    load_vit,
    read_vision_config,
    select_weights,
)

from .adapters import is_peer, load_peer
from .initial_weights import set_geometric_weights
from .input_formats import OUR_FORMAT, InputFormat, PlainImageProcessor


@dataclass(frozen=True)
class MaskModelConfig:
    """Which model is trained."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "start from this model: path or Hub name of an EfficientSAM or of another promptable model of "
            "transformers, or: bundled; else from a new Ti"
        },
    )
    encoder: str | None = field(
        default=None,
        metadata={
            "help": "with this encoder: a model directory of sami.py or an EfficientSAM; or a trained backbone of "
            "transformers (directory or Hub name, as facebook/convnext-tiny-224) or timm (timm/repvit_m1), which gets "
            "a new neck"
        },
    )
    select_weights: str | None = field(
        default=None,
        metadata={"help": "start a new encoder from this trained ViT (path or Hub name of a Dinov2Model)"},
    )
    hidden_size: PositiveInt = field(
        default=192, metadata={"help": "width of a new encoder: 192 (Ti), 384 (S), 768 (B)"}
    )
    num_attention_heads: PositiveInt = field(default=3, metadata={"help": "its heads: 3, 6, 12"})
    background_points: bool | None = field(
        default=None, metadata={"help": "takes background points (label 0); by default as --model, and a new one does"}
    )
    mask_prompts: bool | None = field(default=None, metadata={"help": "takes mask prompts; by default likewise"})
    initial_weights: Literal["geometric", "random"] = field(
        default="geometric",
        metadata={"help": "a new decoder's; with geometric ones it answers a box with that box, untrained"},
    )
    position_init: Literal["axes", "gaussian"] = field(
        default="axes", metadata={"help": "a new random decoder's Fourier frequencies"}
    )

    def check_model(self) -> None:
        """Raises ValueError for options that exclude each other."""
        if self.select_weights is not None and (self.model is not None or self.encoder is not None):
            raise ValueError("--select_weights starts a new encoder; leave out --model and --encoder.")


def build_model(config: MaskModelConfig, image_size: int | None = None, seed: int = 0) -> PreTrainedModel:
    """
    The model that a training starts from, on the CPU: an `EfficientSamModel`, or a peer of transformers'.

    Args:
        config: what it is.
        image_size: side of the input in pixels that geometric initial weights are made for; None: the encoder's.
        seed: of random weights.

    Raises:
        ValueError: if something cannot be loaded, or does not fit together.
    """
    set_seed(seed)  # the same start on every process, whatever was loaded before
    if is_peer(config.model):
        return load_peer(config.model).train()
    kinds = {name: getattr(config, name) for name in ("background_points", "mask_prompts")}
    if config.model is not None:
        model, _ = load_model(config.model)
        model = model.cpu().train()
        model_config = copy.deepcopy(model.config)
        asked = {name: wanted for name, wanted in kinds.items() if wanted is not None}
        if any(getattr(model_config.prompt_encoder_config, name) != wanted for name, wanted in asked.items()):
            for name, wanted in asked.items():
                setattr(model_config.prompt_encoder_config, name, wanted)
            weights, model = model.state_dict(), EfficientSamModel(model_config)
            model.load_state_dict(weights, strict=False)  # all but the kinds of prompts that come or go
    else:
        model = new_model(config, image_size, kinds)
    if config.encoder is not None:
        replace_encoder(model, config.encoder, image_size)
    if config.model is None and config.initial_weights == "geometric":
        model.config.vision_config.image_size = image_size or model.config.vision_config.image_size
        set_geometric_weights(model)
    return model


def build_processor(
    name: str | None, image_size: int, size_divisor: int
) -> tuple[EfficientSamProcessor | PlainImageProcessor, InputFormat]:
    """
    What is saved with the model, and what training makes of crops.

    Args:
        name: of the model that training starts from, if it is not a new one.
        image_size: side of the model's input in pixels.
        size_divisor: what an EfficientSAM's sides must be multiples of.

    Raises:
        ValueError: if the processor of a model of transformers is missing, or is for another size.
    """
    if not is_peer(name):
        size = {"height": image_size, "width": image_size}
        return EfficientSamProcessor(EfficientSamImageProcessor(size=size, size_divisor=size_divisor)), OUR_FORMAT
    processor = PlainImageProcessor.from_pretrained(name)
    if processor.size != image_size:
        raise ValueError(
            f"The processor of {name} makes {processor.size} pixels and the model takes {image_size}; correct its "
            "preprocessor_config.json."
        )
    return processor, processor.format


def new_model(config: MaskModelConfig, image_size: int | None, kinds: dict[str, bool | None]) -> EfficientSamModel:
    """With a decoder of random weights; the encoder's are random or selected from a trained ViT's."""
    vision = {"hidden_size": config.hidden_size, "num_attention_heads": config.num_attention_heads}
    if config.encoder is not None:
        options = {} if image_size is None else {"image_size": image_size}
        vision = read_vision_config(config.encoder, **options).to_dict()
    if image_size is not None:
        vision["image_size"] = image_size
        if config.select_weights is not None:
            vision["pretrain_image_size"] = image_size  # the ViT's positions are resized once, here
    prompt_encoder = {name: wanted is not False for name, wanted in kinds.items()}
    prompt_encoder["position_init"] = config.position_init
    try:
        model = EfficientSamModel(EfficientSamConfig(vision_config=vision, prompt_encoder_config=prompt_encoder))
    except ImportError as error:  # of timm
        raise ValueError(f"The encoder {config.encoder} cannot be loaded: {error}") from None
    if config.select_weights is not None:
        select_weights(load_vit(config.select_weights), model.vision_encoder)
    return model


def replace_encoder(model: EfficientSamModel, name: str, image_size: int | None = None) -> None:
    """The model's decoder goes on with another encoder; of another width, such as S and Ti, its neck is that one's."""
    own = model.config.vision_config
    options = {"output_channels": own.output_channels} | ({} if image_size is None else {"image_size": image_size})
    if isinstance(read_vision_config(name, **options), EfficientSamAutoVisionConfig):
        encoder, has_neck = load_auto_encoder(name, **options)
    else:
        loaded, has_neck = load_encoder(name)
        encoder = loaded.vision_encoder
    necks = [one.neck for one in (encoder, model.vision_encoder)]
    if not has_neck and len({neck.projection.in_features for neck in necks}) == 1:
        encoder.neck = model.vision_encoder.neck  # pretraining (sami.py) leaves it out
        encoder.config.output_channels = own.output_channels
    theirs, ours = encoder.config.output_channels, own.output_channels
    if theirs != ours:
        raise ValueError(f"--encoder {name} gives {theirs} channels and --model takes {ours}; choose another.")
    model.vision_encoder, model.config.vision_config = encoder, encoder.config


def kept_saliency_head(
    config: MaskModelConfig, model: PreTrainedModel, output_dir: str
) -> EfficientSamSaliencyHead | None:
    """The saliency head of --model, which belongs to its encoder, if that stays as it is; else says what to do."""
    has_none = config.model is None or is_peer(config.model)
    head = None if has_none else load_own_head(find_checkpoint(config.model))
    changed = config.encoder is not None or any(one.requires_grad for one in model.vision_encoder.parameters())
    if head is not None and changed:
        PartialState().print(
            f"The saliency head of {config.model} does not fit an encoder that is trained or replaced, and is left "
            f"out; afterwards train one with training/train_saliency.py --model {output_dir}/model."
        )
    return None if changed else head
