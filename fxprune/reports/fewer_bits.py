"""Files in fewer bits: what the report holds of each, and the line that tells it."""

from __future__ import annotations

from dataclasses import dataclass

from fxprune.export.onnx_file import EightBits, ExportRecord
from fxprune.measurements import LatencyComparison

__all__ = ["FewerBits"]


@dataclass(frozen=True, slots=True)
class FewerBits:
    """An ONNX file of the compressed network in half precision or in eight bits.

    Attributes:
        export: How it was made, and how near it is to the network.
        latency: Against `model.onnx`; None of half precision where latency was not measured on CUDA.
    """

    export: ExportRecord
    latency: LatencyComparison | None

    @property
    def line(self) -> str:
        """All of it in words."""
        eight, latency = self.export.int8, self.latency
        parts: list[str | None]
        if eight is None:
            kept = f"; {len(self.export.kept)} operators stay in single precision" if self.export.kept else ""
            parts = [f"at most {self.export.max_abs_diff:.2g} away from the network{kept}"]
        else:
            on = f"{eight.held_back} held-back images"
            near = f"outputs changed by {eight.error:.2g} of their variance on {on}"
            if eight.agreement is not None:
                near = f"same top-1 class as model.onnx on {100 * eight.agreement:.1f} % of {on}"
            weights = "weights of seven bits, for any CPU" if eight.reduce_range else "for CPUs with VNNI"
            parts = [near, weights, _elsewhere(eight) or self.export.note]
        if latency is not None:
            interval = latency.interval
            parts.append(
                f"{latency.ratio:.3f} [{interval.low:.3f}, {interval.high:.3f}] of its time ({latency.before.backend}, "
                f"batch {latency.before.batch_shape[0]})"
            )
        return "; ".join(part for part in parts if part is not None)


def _elsewhere(eight: EightBits) -> str | None:
    """What OpenVINO makes of a file in eight bits, where it was asked."""
    if eight.openvino_error is None:
        return None
    if eight.openvino_agreement is None:
        return f"OpenVINO's outputs differ from onnxruntime's by {eight.openvino_error:.2g} of their variance"
    return f"OpenVINO names the same class as onnxruntime on {100 * eight.openvino_agreement:.1f} % of them"
