"""From a checkpoint to other formats and places: official weights, ONNX, the Hub."""
