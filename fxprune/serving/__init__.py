"""Model repositories for inference servers, written from ONNX files."""
