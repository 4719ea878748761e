"""Networks as files: ONNX, exported programs, weights."""
