"""Writing ONNX, proving it equal, and measuring it on the runtime that will serve it."""
