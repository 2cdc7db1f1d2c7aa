"""EfficientSAM in ONNX, with numpy and onnxruntime alone: the predictor of hf_efficientsam for exported models."""

from .inference.onnx_predictor import EfficientSamOnnxPredictor
from .inference.results import SegmentationResult

__all__ = ["EfficientSamOnnxPredictor", "SegmentationResult"]
