"""Low-rank updates of an encoder (arXiv 2106.09685), by peft: inserted, merged into the weights, saved alone."""

import copy
import re
from pathlib import Path

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from transformers import PreTrainedModel

UPDATED = r"vision_encoder\..*\.(q_proj|v_proj|qkv)"  # queries and values, where they are one layer keys too
BESIDE = ("vision_encoder.neck", "prompt_encoder", "mask_decoder")  # are trained as they are


def insert_lora(model: PreTrainedModel, rank: int) -> None:
    """
    Adds low-rank updates to the encoder, whose other weights but the neck's are frozen.

    Raises:
        ValueError: if the encoder has no attention.
    """
    if not any(re.fullmatch(UPDATED, name) for name, _ in model.named_modules()):
        raise ValueError(
            f"--lora updates queries and values, which the encoder of {type(model).__name__} lacks; leave it out."
        )
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=UPDATED), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name or name.startswith(tuple(f"{part}." for part in BESIDE))


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose low-rank updates, if there are any, have become part of the weights."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    return model


def save_lora(model: PreTrainedModel, base: str, folder: Path) -> None:
    """
    The low-rank updates, and the whole of each part beside them that is trained, in peft's format.

    Args:
        model: with updates that `insert_lora` has added.
        base: directory or Hub name of the model without them, of which
            `PeftModel.from_pretrained(model, folder).merge_and_unload()` makes the trained one.
        folder: to write to.
    """
    trained = [part for part in BESIDE if any(one.requires_grad for one in model.get_submodule(part).parameters())]
    saved = {name.replace(".default.", "."): one for name, one in model.state_dict().items() if "lora_" in name}
    for part in trained:
        saved |= {f"{part}.{name}": one for name, one in model.get_submodule(part).state_dict().items()}
    folder.mkdir(parents=True)
    weights = {f"base_model.model.{name}": one.detach().cpu().clone() for name, one in saved.items()}
    save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    config = copy.deepcopy(model.peft_config["default"])
    config.base_model_name_or_path, config.modules_to_save, config.inference_mode = base, trained or None, True
    config.save_pretrained(folder)
