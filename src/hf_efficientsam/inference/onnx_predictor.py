"""EfficientSAM without torch: numpy in, masks out, from the files that `efficientsam export-onnx` writes.

Needs onnxruntime, numpy, PIL and pycocotools; with runtime="openvino" also OpenVINO.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..model.image_reading_efficientsam import image_to_array, resized_size
from ..model.prompts_efficientsam import PAD_VALUE, prepare_prompts
from .predictor_base import PredictorBase
from .resampling import cubic_weights, linear_weights, resample

METADATA_KEY = "efficientsam"  # of the metadata_props of both files; the value is json
# What the descriptions of an encoder and its decoder have in common; older files lack the first.
OF_THE_CHECKPOINT = ("model_sha256", "background_points", "mask_prompts", "preprocessing")
PROMPTS_AT_ONCE = 8  # bounds the memory of many prompts; does not change the numbers

Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]  # inputs by name -> outputs in order


def file_name(part: str, variant: str) -> str:
    """Name of the file with a part ("encoder", "decoder") in a variant ("float32", "float16", "int8")."""
    return f"{part}.onnx" if variant == "float32" else f"{part}_{variant}.onnx"


class EfficientSamOnnxPredictor(PredictorBase):
    """
    [`EfficientSamPredictor`] for exported models: the same methods and results, but features are an array.

    Args:
        folder: with `encoder.onnx` and `decoder.onnx`.
        variant: `"float32"`, or another that was exported: `"float16"`, `"int8"`.
        runtime: `"onnxruntime"`, or `"openvino"`: often faster on Intel CPUs; a package of its own; not for int8.
        providers: execution providers of onnxruntime.
        num_threads: by default chosen by the runtime.

    Raises:
        ValueError: missing files, files that `efficientsam export-onnx` did not write, or files of two checkpoints.
        ImportError: the runtime is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        variant: str = "float32",
        runtime: str = "onnxruntime",
        providers: Sequence[str] = ("CPUExecutionProvider",),
        num_threads: int | None = None,
    ):
        encoder, decoder = (Path(folder, file_name(part, variant)) for part in ("encoder", "decoder"))
        for file in (encoder, decoder):
            if not file.is_file():
                raise ValueError(f"{file}: no such file; write it with `efficientsam export-onnx`.")
        if runtime not in ("onnxruntime", "openvino"):
            raise ValueError(f'runtime must be "onnxruntime" or "openvino", not {runtime!r}.')
        if runtime == "openvino" and variant == "int8":  # version 2026.4 gives wrong masks, or crashes
            raise ValueError("OpenVINO does not run the int8 variant correctly; use float32, or onnxruntime.")
        if runtime == "openvino":
            described = [read_description(load_to_read(file), file) for file in (encoder, decoder)]
            self._run_encoder, self._run_decoder = (open_with_openvino(x, num_threads) for x in (encoder, decoder))
        else:
            sessions = [load_session(file, providers, num_threads) for file in (encoder, decoder)]
            described = [read_description(*one) for one in zip(sessions, (encoder, decoder), strict=True)]
            self._run_encoder, self._run_decoder = map(run_of, sessions)
        if len({json.dumps([one.get(key) for key in OF_THE_CHECKPOINT], sort_keys=True) for one in described}) > 1:
            raise ValueError(f"{encoder} and {decoder.name} are of two checkpoints; export both again, together.")
        self.description = described[1]
        # Files of before this option was written there convert.
        self.options: dict = {"do_convert_rgb": True} | self.description["preprocessing"]
        self.reset_image()

    def _read_image(self, image: Any) -> np.ndarray:
        names = ("do_convert_rgb", "do_rescale", "max_image_pixels")
        return image_to_array(image, **{name: self.options[name] for name in names})

    def _encode(self, pixels: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        pixel_values, input_size = to_pixel_values(pixels, self.options)
        return self._run_encoder({"pixel_values": pixel_values[None]})[0], input_size

    def _decode(self, points, labels, boxes, masks, multimask_output: bool) -> tuple[np.ndarray, np.ndarray]:
        self._check_image()
        prompts = prepare_prompts(
            *(None if given is None else [given] for given in (points, labels, boxes, masks)),
            original_sizes=[self.original_size],
            input_sizes=[self.input_size],
        )
        num_prompts = max(len(given) for given in (points, boxes, masks) if given is not None)
        prompts = self._fill(prompts, num_prompts)
        logits, scores = [], []
        for start in range(0, num_prompts, PROMPTS_AT_ONCE):
            part = {name: array[:, start : start + PROMPTS_AT_ONCE] for name, array in prompts.items()}
            part_logits, part_scores = self._run_decoder({"image_embeddings": self.features, **part})
            chosen = slice(1, None) if multimask_output else slice(0, 1)  # the single mask comes first
            logits.append(part_logits[0, :, chosen])
            scores.append(part_scores[0, :, chosen])
        return np.concatenate(logits), np.concatenate(scores)

    def _fill(self, prompts: dict[str, np.ndarray], num_prompts: int) -> dict[str, np.ndarray]:
        """All inputs of the decoder but the features, with padding for prompts that are not given."""
        if not self.description["background_points"] and 0 in prompts.get("input_labels", ()):
            raise ValueError("This model takes no background points (label 0); leave them out.")
        if not self.description["mask_prompts"] and "input_masks" in prompts:
            raise ValueError("This model takes no mask prompts; leave mask_input or masks out.")
        padding = {
            "input_points": np.full((1, num_prompts, 1, 2), PAD_VALUE, np.float32),
            "input_labels": np.full((1, num_prompts, 1), PAD_VALUE, np.int64),
            "input_boxes": np.full((1, num_prompts, 4), PAD_VALUE, np.float32),
        }
        if self.description["mask_prompts"]:
            height, width = (4 * n for n in self.features.shape[-2:])
            padding["input_masks"] = np.zeros((1, num_prompts, height, width), np.float32)
            padding["has_input_masks"] = np.full((1, num_prompts), "input_masks" in prompts)
            if (given := prompts.get("input_masks", padding["input_masks"]).shape[-2:]) != (height, width):
                raise ValueError(f"A mask prompt must be {height} x {width}, as `predict` returns it, not {given}.")
        return padding | prompts

    def _enlarge(self, logits: np.ndarray, binarize: bool, size: tuple[int, int] | None = None) -> np.ndarray:
        size = size or self.original_size
        masks = np.empty((*logits.shape[:2], *size), dtype=bool if binarize else np.float32)
        for i in np.ndindex(logits.shape[:2]):  # one at a time, as floats take four times the memory of bool
            mask = enlarge_mask(logits[i], size, self.input_size)
            masks[i] = mask > 0 if binarize else mask
        return masks


# ------------------------------------------------------------------------------------------------ runtimes


def read_description(session: Any, file: Path) -> dict:
    """The metadata that the export wrote into the file of a session: the model's prompts and preprocessing."""
    try:
        description = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
    except (KeyError, ValueError):
        raise ValueError(f"{file} was not written by `efficientsam export-onnx`: its metadata are missing.") from None
    if missing := [key for key in ("background_points", "mask_prompts", "preprocessing") if key not in description]:
        raise ValueError(
            f"{file} was written by another version of the package and does not say its {', '.join(missing)}; export "
            "it again."
        )
    return description


def load_to_read(file: Path):
    """A session for `read_description` alone."""
    return load_session(file, ["CPUExecutionProvider"], num_threads=1, optimize=False)


def load_session(file: Path, providers: Sequence[str], num_threads: int | None, optimize: bool = True):
    try:
        import onnxruntime
    except ImportError:
        raise ImportError("EfficientSamOnnxPredictor needs onnxruntime; install it with pip.") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = num_threads or 0
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=list(providers))
    except Exception as error:  # onnxruntime has no common class for its errors
        raise ValueError(f"{file} cannot be loaded: {' '.join(str(error).split())}") from None


def open_session(file: Path, providers: Sequence[str], num_threads: int | None) -> Run:
    return run_of(load_session(file, providers, num_threads))


def run_of(session: Any) -> Run:
    return lambda inputs: session.run(None, inputs)


def open_with_openvino(file: Path, num_threads: int | None) -> Run:
    try:
        import openvino
    except ImportError:
        raise ImportError('runtime="openvino" needs openvino; install it with pip.') from None
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    if num_threads:
        config["INFERENCE_NUM_THREADS"] = num_threads
    model = openvino.Core().compile_model(str(file), "CPU", config)
    return lambda inputs: list(model(inputs).to_tuple())


# ------------------------------------------------------------------------------------------------ pixels and masks


def to_pixel_values(pixels: np.ndarray, options: dict) -> tuple[np.ndarray, tuple[int, int]]:
    """
    An image `[3, h, w]` -> `pixel_values` `[3, H, W]`, float32, as [`EfficientSamImageProcessor`] makes them; the
    height and width of the image in it before padding.
    """
    size = pixels.shape[-2:]
    if options["do_resize"]:
        size = resized_size(size, tuple(options["size"]), options["keep_aspect_ratio"])
    values = resample(
        pixels, size, [n_in / n for n_in, n in zip(pixels.shape[-2:], size, strict=True)], linear_weights
    )
    if options["do_rescale"]:
        values *= options["rescale_factor"] * (1 if pixels.dtype == np.uint8 else 255)
    if options["do_normalize"]:
        mean, std = (np.float32(options[name]).reshape(-1, 1, 1) for name in ("image_mean", "image_std"))
        values = (values - mean) / std
    padding = [(0, math.ceil(n / options["size_divisor"]) * options["size_divisor"] - n) for n in size]
    return np.pad(values, [(0, 0), *padding]), size


def enlarge_mask(logits: np.ndarray, size: tuple[int, int], input_size: tuple[int, int]) -> np.ndarray:
    """
    Logits `[h, w]` of the padded model input -> `[*size]`, float32, in one bicubic interpolation: a pixel of the image
    is `input_size` / `size` pixels of the input, and a quarter of that in the logits.
    """
    return resample(logits, size, [n_in / (4 * n) for n_in, n in zip(input_size, size, strict=True)], cubic_weights)


__all__ = ["EfficientSamOnnxPredictor"]
