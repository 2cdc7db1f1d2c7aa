"""Smaller variants of exported ONNX files: 16-bit floats, or weights as 8-bit integers; and what they lose."""

from collections.abc import Iterator

import numpy as np
import onnx
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from PIL import Image

from hf_efficientsam.inference.onnx_predictor import EfficientSamOnnxPredictor


def to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights and values in half precision, except for inputs, outputs and positions."""
    producers = {output: node for node in model.graph.node for output in node.output}
    exact = {}  # half precision has no digits left for a phase of many cycles
    queue = [node for node in model.graph.node if node.op_type in ("Sin", "Cos")]
    while queue:
        node = queue.pop()
        if node.name not in exact:
            exact[node.name] = node
            queue += [producers[name] for name in node.input if name in producers]
    return convert_float_to_float16(
        model, keep_io_types=True, node_block_list=list(exact), op_block_list=DEFAULT_OP_BLOCK_LIST
    )


def to_int8(model: onnx.ModelProto) -> onnx.ModelProto:
    """
    Weights as 8-bit integers with a scale a channel, values in float32. onnxruntime's own tools quantise only
    matrices, or values too, which loses more and is no faster on a CPU.
    """
    smaller = onnx.ModelProto()
    smaller.CopyFrom(model)
    graph = smaller.graph
    weights = [x for x in graph.initializer if x.data_type == onnx.TensorProto.FLOAT and len(x.dims) > 1]
    for tensor in weights:
        values = onnx.numpy_helper.to_array(tensor)
        if values.size < 1024:  # too small to matter
            continue
        axis, integers, scales = min(
            (quantize(values, axis) for axis in {0, values.ndim - 1}),
            key=lambda one: np.square(restore(*one) - values).sum(),
        )
        stored, scale = tensor.name + "_int8", tensor.name + "_scale"
        graph.initializer.append(onnx.numpy_helper.from_array(integers, stored))
        graph.initializer.append(onnx.numpy_helper.from_array(scales, scale))
        graph.node.insert(
            0, onnx.helper.make_node("DequantizeLinear", [stored, scale], [tensor.name], stored, axis=axis)
        )
        graph.initializer.remove(tensor)
    return smaller


def quantize(values: np.ndarray, axis: int) -> tuple[int, np.ndarray, np.ndarray]:
    """`axis`, integers from -127 to 127, and the scale of each channel along `axis`."""
    others = tuple(i for i in range(values.ndim) if i != axis)
    scales = np.abs(values).max(axis=others) / 127
    scales = np.where(scales == 0, 1, scales).astype(np.float32)
    return axis, np.rint(values / np.expand_dims(scales, others)).astype(np.int8), scales


def restore(axis: int, integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return integers * np.expand_dims(scales, tuple(i for i in range(integers.ndim) if i != axis))


def store_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """
    Weights in half precision that runtimes turn into float32 when they load the file: half of the size, the same
    arithmetic. It changes nothing for a checkpoint in half precision. What half precision cannot hold stays.
    """
    smaller = onnx.ModelProto()
    smaller.CopyFrom(model)
    graph = smaller.graph
    for tensor in [x for x in graph.initializer if x.data_type == onnx.TensorProto.FLOAT]:
        values = onnx.numpy_helper.to_array(tensor)
        if values.size < 1024 or np.abs(values).max() > np.finfo(np.float16).max:
            continue
        stored = tensor.name + "_float16"
        graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float16), stored))
        graph.node.insert(0, onnx.helper.make_node("Cast", [stored], [tensor.name], stored, to=onnx.TensorProto.FLOAT))
        graph.initializer.remove(tensor)
    return smaller


VARIANTS = {"float16": to_float16, "int8": to_int8}


def grid_boxes(width: int, height: int) -> Iterator[np.ndarray]:
    """Nine overlapping boxes of half the image's width and height, and the nine of a 3 x 3 grid."""
    for side, step in ((1 / 2, 1 / 4), (1 / 3, 1 / 3)):
        for y in range(3):
            for x in range(3):
                box = np.array([x * step, y * step, x * step + side, y * step + side])
                yield box * (width, height, width, height)


def mask_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of masks `[..., H, W]`; 1 where both are empty."""
    union = (a | b).sum(axis=(-2, -1))
    return np.where(union, (a & b).sum(axis=(-2, -1)) / np.maximum(union, 1), 1)


def measure_variant(
    exact: EfficientSamOnnxPredictor, variant: EfficientSamOnnxPredictor, images: list[Image.Image]
) -> float:
    """Mean IoU of a variant's masks, all candidates, with those of float32, for the `grid_boxes` of each image."""
    ious = []
    for image in images:
        for predictor in (exact, variant):
            predictor.set_image(image)
        for box in grid_boxes(*image.size):
            a, b = (predictor.predict(box=box)[0] for predictor in (exact, variant))
            ious.append(mask_iou(a, b))
    return float(np.mean(ious))


__all__ = [
    "VARIANTS",
    "grid_boxes",
    "mask_iou",
    "measure_variant",
    "quantize",
    "restore",
    "store_float16",
    "to_float16",
    "to_int8",
]
