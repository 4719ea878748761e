"""What an ONNX file holds, the graph that is built of it node by node, and whether the two agree."""
