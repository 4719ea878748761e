"""ONNX files in fewer bits, made from verified ones."""
