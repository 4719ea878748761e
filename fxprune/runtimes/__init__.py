"""What runs ONNX files: onnxruntime, and OpenVINO where it is installed."""
