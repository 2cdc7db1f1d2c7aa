"""Where checkpoints live and how they are loaded: the bundled one, directories, Hub repositories."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import cached_file

from hf_efficientsam.model.configuration_efficientsam import EfficientSamConfig
from hf_efficientsam.model.modeling_efficientsam import EfficientSamModel
from hf_efficientsam.model.modeling_saliency import EfficientSamSaliencyHead
from hf_efficientsam.model.processing_efficientsam import EfficientSamProcessor

logger = logging.getLogger(__name__)


def bundled_checkpoint(name: str = "s") -> str:
    """
    Directory of the checkpoint that is installed with the package: model and processor, for `from_pretrained`.

    EfficientSAM-S at 512 pixels, trained by this project; its README.md says on what and how well it does.

    Args:
        name: "s"; others do not come with the package.

    Raises:
        ValueError: another name.
    """
    if name != "s":
        raise ValueError(
            f"only EfficientSAM-S comes with the package, not {name!r}; for a Ti take the authors' weights, "
            "https://github.com/yformer/EfficientSAM/tree/main/weights, and convert them: efficientsam convert."
        )
    return str(Path(__file__).parents[1] / "checkpoints" / "efficientsam-s")


def is_bundled(name: str | None) -> bool:
    """Whether a name means the checkpoint that comes with the package: "bundled" or `None`."""
    return name is None or name == "bundled"


def resolve_name(name: str | None) -> str:
    """A checkpoint's name for `from_pretrained`: the directory for what `is_bundled`, other names as they are."""
    return bundled_checkpoint() if is_bundled(name) else str(name)


def find_checkpoint(name: str | None = None) -> str:
    """
    The directory or Hub name to load, after all checks that can be made without loading.

    Args:
        name: a directory, a Hub name, or "bundled" (as is `None`) for the checkpoint that comes with the package. A
            directory of that name is "./bundled".

    Raises:
        ValueError: one sentence that says what is wrong with the name or the directory.
    """
    if is_bundled(name):
        name = bundled_checkpoint()
        if not Path(name).is_dir():
            raise ValueError(f"the bundled checkpoint is missing at {name}; reinstall the package, or use --model.")
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{name} is a file; a checkpoint is a directory, as `efficientsam convert` makes it.")
    if path.is_dir():
        for pattern, what in (("config.json", "config.json"), ("*.safetensors", "weights (model.safetensors)")):
            if not any(path.glob(pattern)):
                raise ValueError(f"{name} is no checkpoint: the directory holds no {what}.")
    model_type = read_config(name).get("model_type")
    if model_type != EfficientSamConfig.model_type:
        raise ValueError(
            f"{name} holds a model of type {model_type!r}, but {EfficientSamConfig.model_type!r} is needed."
        )
    return name


def read_config(name: str) -> dict:
    """The config.json of any model's directory or Hub repository."""
    path = Path(name)
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2):
        raise ValueError(f"{name}: no such directory.")
    try:
        return dict(PreTrainedConfig.get_config_dict(name)[0])
    except Exception:  # other kinds of json than an object make transformers raise nearly anything
        raise ValueError(f"{name} is neither a directory with a valid config.json nor a Hub model in reach.") from None


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turns whatever goes wrong while `name` is loaded into a ValueError of one sentence."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, StrictDataclassError) as error:
        reason = str(error) or repr(error)
    except Exception as error:  # transformers raises nearly anything over damaged files, with few words
        reason = repr(error)
    else:
        return
    raise ValueError(f"{name} cannot be loaded: {' '.join(reason.split())}")


def check_complete(name: str, loaded: dict) -> None:
    """Raises a ValueError if weights were missing, by the `output_loading_info` of `from_pretrained`."""
    if missing := loaded["missing_keys"]:
        raise ValueError(f"{name} lacks {len(missing)} of the model's weights, such as {min(missing)}.")


def checkpoint_fingerprint(model: PreTrainedModel, image_processor: Any) -> str:
    """SHA-256 of what results depend on, wherever it lies: weights, configuration and preprocessing."""
    ignored = {"_name_or_path", "transformers_version", "dtype", "auto_map", "architectures"}
    ignored |= {"max_image_pixels"}  # decides which images are refused, not what the others become

    def stripped(options: Any) -> Any:  # of parts' configurations, too
        if not isinstance(options, dict):
            return options
        return {key: stripped(value) for key, value in options.items() if key not in ignored}

    options = [stripped(one.to_dict()) for one in (model.config, image_processor)]
    digest = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def stored_dtype(directory: Path) -> torch.dtype:
    """The precision of most weights in a checkpoint's directory. Its config may name another, to compute in."""
    count = Counter()
    for file in directory.glob("*.safetensors"):
        with loading(str(file)), safe_open(file, "pt") as weights:
            count.update(weights.get_tensor(name).dtype for name in weights.keys())  # noqa: SIM118 (no mapping)
    return count.most_common(1)[0][0]


def load_head(name: str, dtype: torch.dtype | str = torch.float32, subfolder: str = "") -> EfficientSamSaliencyHead:
    """A saliency head on the CPU; `dtype` as of `load_model`."""
    with loading(name):
        head, loaded = EfficientSamSaliencyHead.from_pretrained(
            name, subfolder=subfolder, dtype=dtype, output_loading_info=True
        )
    check_complete(name, loaded)
    return head


def load_processor(model: EfficientSamModel) -> EfficientSamProcessor:
    """The processor of the directory or repository that a model was loaded from. ValueError: it came from neither."""
    if not model.name_or_path:
        raise ValueError("The model was not loaded from a checkpoint; pass its processor, too.")
    with loading(model.name_or_path):
        return EfficientSamProcessor.from_pretrained(model.name_or_path)


def load_own_head(name: str) -> EfficientSamSaliencyHead | None:
    """The head in the folder `saliency` of a checkpoint's directory or Hub repository; `None` if there is none."""
    try:
        has_head = cached_file(name, "config.json", subfolder="saliency") is not None
    except OSError:
        has_head = False
    return load_head(name, subfolder="saliency") if has_head else None


def find_device(device: torch.device | str = "auto") -> torch.device:
    """
    The device of a name; "auto" is CUDA, else Apple's MPS, else the CPU, whichever is there.

    Raises:
        ValueError: a device that torch does not know, or that is not there.
    """
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(kind for kind, there in is_there.items() if there))
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f'device must be "auto", "cpu", "cuda" or "mps", not {device!r}.') from None
    if not is_there.get(device.type, True):
        raise ValueError(f"torch finds no {device.type} device here; use the device cpu, or auto.")
    return device


def load_model(
    name: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "auto",
    max_pixels: int | None = None,
) -> tuple[EfficientSamModel, EfficientSamProcessor]:
    """
    Model and processor of a checkpoint.

    Args:
        name: as `find_checkpoint` takes it.
        dtype: float32 by default; "auto" is what the checkpoint's config says, but float32 instead of half precision
            on a CPU, where that is ten times slower.
        device: see `find_device`.
        max_pixels: larger images are refused, in place of the processor's own `max_image_pixels`.

    Raises:
        ValueError: what `find_checkpoint` refuses; a device that is not there; a checkpoint that cannot be loaded,
            lacks weights, or has weights that are no finite numbers.
    """
    name, device = find_checkpoint(name), find_device(device)
    with loading(name):
        processor = EfficientSamProcessor.from_pretrained(name)
        model, loaded = EfficientSamModel.from_pretrained(name, dtype=dtype, output_loading_info=True)
    check_complete(name, loaded)
    for part, weights in model.state_dict().items():
        if not weights.isfinite().all():
            raise ValueError(f"{name} has weights that are no finite numbers, in {part}; use an earlier checkpoint.")
    if dtype == "auto" and device.type == "cpu" and model.dtype in (torch.float16, torch.bfloat16):
        stored = str(model.dtype).removeprefix("torch.")
        logger.warning(f"{name} is in {stored}, which is slow on a CPU; it is computed in float32.")
        model = model.float()
    if max_pixels is not None:
        processor.image_processor.max_image_pixels = max_pixels
    return model.to(device).eval(), processor
