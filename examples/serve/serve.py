"""Serves an ONNX file over HTTP and gRPC by KServe's SDK; README.md beside it says how."""

from __future__ import annotations

import argparse

import onnxruntime as ort
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer, model_server


class OnnxModel(Model):
    """One file, whose inputs and outputs keep their names."""

    def __init__(self, name: str, file: str) -> None:
        super().__init__(name)
        self.session = ort.InferenceSession(file, providers=ort.get_available_providers())
        self.ready = True

    def predict(
        self, payload: InferRequest, headers: object = None, response_headers: object = None
    ) -> InferResponse:
        """Answers one request, a batch of any size."""
        answers = self.session.run(None, {one.name: one.as_numpy() for one in payload.inputs})
        outputs = []
        for port, answer in zip(self.session.get_outputs(), answers, strict=True):
            kind = {"float32": "FP32", "float16": "FP16"}[str(answer.dtype)]
            outputs.append(InferOutput(port.name, list(answer.shape), kind))
            outputs[-1].set_data_from_numpy(answer, binary_data=True)
        return InferResponse(payload.id or "", self.name, outputs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(parents=[model_server.parser])
    parser.add_argument("--file", required=True)
    given, _ = parser.parse_known_args()
    ModelServer().start([OnnxModel(given.model_name, given.file)])
