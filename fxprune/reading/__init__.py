"""Networks from ONNX files: each operator as a module or function of torch, a whole file as a graph."""
