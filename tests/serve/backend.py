"""Stands in for Triton's onnxruntime backend, which no package index has: the server copies it and runs it.

Only tests use it. In production the server brings its own, and the repository stays the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb


class TritonPythonModel:
    """One version of a model."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Completes nothing: the configuration has to be whole."""
        return config

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the file, and holds the configuration against it."""
        config = json.loads(args["model_config"])
        path = Path(args["model_repository"], args["model_version"], config["default_model_filename"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(
            config["parameters"].get("intra_op_thread_count", {"string_value": "0"})["string_value"]
        )
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.outputs = [one.name for one in self.session.get_outputs()]
        for said, found in (
            (config["input"], self.session.get_inputs()),
            (config["output"], self.session.get_outputs()),
        ):
            ours = [(one["name"], [int(size) for size in sizes(one)]) for one in said]
            true = [(one.name, [s if isinstance(s, int) else -1 for s in one.shape[1:]]) for one in found]
            if ours != true:
                raise pb.TritonModelException(f"the configuration says {ours}, the file {true}")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Runs what Triton has put together as one batch, and takes the answers apart."""
        names = [one.name for one in self.session.get_inputs()]
        parts = [[pb.get_input_tensor_by_name(r, name).as_numpy() for name in names] for r in requests]
        feeds = {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(names)}
        answers = self.session.run(None, feeds)
        ends = np.cumsum([len(part[0]) for part in parts])[:-1]
        split = zip(*(np.split(answer, ends) for answer in answers), strict=True)
        return [
            pb.InferenceResponse([pb.Tensor(n, y) for n, y in zip(self.outputs, rows, strict=True)])
            for rows in split
        ]


def sizes(port: dict[str, Any]) -> list[Any]:
    """The dimensions that the network sees, where clients see others."""
    return port["reshape"].get("shape", []) if "reshape" in port else port["dims"]
