"""The text of a Triton model's `config.pbtxt`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fxprune.validation import is_whole, one_of, require

if TYPE_CHECKING:
    from fxprune.serving.network import Network, Port

__all__ = ["FILE", "Accelerator", "TritonSettings", "config_text"]

Accelerator = Literal["cuda", "tensorrt", "openvino"]

FILE = "model.onnx"
"""What the network of each version is called."""


@dataclass(frozen=True, slots=True)
class TritonSettings:
    """How a server runs a model.

    Attributes:
        max_batch_size: The most images that it runs at once; requests are put together up to that.
        max_queue_delay_us: How long a request may wait for others, in microseconds.
        threads: Threads that one batch runs on, on the CPU; `None` leaves the choice to onnxruntime.
        accelerator: `cuda` and `tensorrt` where the server finds a GPU, `openvino` on the CPU; a server that was built
            without it refuses the model.

    Raises:
        OptionError: One is out of range.
    """

    max_batch_size: int = 32
    max_queue_delay_us: int = 100
    threads: int | None = None
    accelerator: Accelerator | None = None

    def __post_init__(self) -> None:
        most = 2**31 - 1
        require(
            self,
            (
                ("max_batch_size", is_whole(self.max_batch_size, 1, most), "give 1 or more"),
                ("max_queue_delay_us", is_whole(self.max_queue_delay_us, 0, most), "give 0 or more"),
                (
                    "threads",
                    self.threads is None or is_whole(self.threads, 1, most),
                    "give 1 or more, or None",
                ),
                *([one_of("accelerator", self.accelerator, Accelerator)] if self.accelerator else ()),
            ),
        )


class _Word(str):
    """A name that the schema knows: it stands without quotes."""


def config_text(name: str, network: Network, versions: int, settings: TritonSettings) -> str:
    """The configuration of a model.

    Args:
        name: Of the model, and of its folder.
        network: What each version takes and returns.
        versions: How many there are; all are served.
        settings: How they are run.
    """
    config: dict[str, Any] = {
        "name": name,
        "backend": "onnxruntime",
        "default_model_filename": FILE,
        "max_batch_size": settings.max_batch_size,
        "input": [_described(port) for port in network.inputs],
        "output": [_described(port) for port in network.outputs],
        # by default Triton serves the highest version alone
        "version_policy": {"specific": {"versions": tuple(range(1, versions + 1))}},
        "instance_group": {"count": 1, "kind": _Word("KIND_AUTO")},
    }
    if settings.max_batch_size > 1:
        config["dynamic_batching"] = {"max_queue_delay_microseconds": settings.max_queue_delay_us}
    if settings.threads is not None:
        threads = {"string_value": str(settings.threads)}
        config["parameters"] = {"key": "intra_op_thread_count", "value": threads}
    fixed = not any(-1 in port.shape for port in network.inputs)
    if settings.accelerator is not None:
        config["optimization"] = {"execution_accelerators": _accelerated(network, settings, fixed)}
    if fixed:
        config["model_warmup"] = [_warmup(network, batch) for batch in _batches(settings)]
    return "".join(f"{line}\n" for line in _lines(config))


def _batches(settings: TritonSettings) -> list[int]:
    return sorted({1, settings.max_batch_size})


def _described(port: Port) -> dict[str, Any]:
    # Triton knows no tensor without dimensions behind the batch: clients see one of size 1
    sizes = {"dims": port.shape} if port.shape else {"dims": (1,), "reshape": {}}
    return {"name": port.name, "data_type": _Word(f"TYPE_{port.datatype}"), **sizes}


def _warmup(network: Network, batch: int) -> dict[str, Any]:
    inputs = []
    for port in network.inputs:
        # random integers may lie outside of what they count
        data = "random_data" if port.datatype.startswith("FP") else "zero_data"
        kind = {"data_type": _Word(f"TYPE_{port.datatype}"), "dims": port.shape or (1,), data: True}
        inputs.append({"key": port.name, "value": kind})
    return {"name": f"batch of {batch}", "batch_size": batch, "inputs": inputs}


def _accelerated(network: Network, settings: TritonSettings, fixed: bool) -> dict[str, Any]:
    accelerator: dict[str, Any] = {"name": settings.accelerator}
    if settings.accelerator == "tensorrt" and fixed:
        # without a profile, an engine is built anew whenever a batch is larger or smaller than any before
        low, high = (_shapes(network, batch) for batch in (1, settings.max_batch_size))
        shapes = {
            "trt_profile_min_shapes": low,
            "trt_profile_opt_shapes": high,
            "trt_profile_max_shapes": high,
        }
        accelerator["parameters"] = [{"key": key, "value": value} for key, value in shapes.items()]
    where = "cpu" if settings.accelerator == "openvino" else "gpu"
    return {f"{where}_execution_accelerator": accelerator}


def _shapes(network: Network, batch: int) -> str:
    return ",".join(f"{port.name}:{'x'.join(map(str, (batch, *port.shape)))}" for port in network.inputs)


def _lines(message: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A message in protobuf's text format: lists are repeated fields, tuples lists of numbers."""
    for key, value in message.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Mapping):
                yield f"{indent}{key} {{"
                yield from _lines(one, f"{indent}  ")
                yield f"{indent}}}"
            else:
                yield f"{indent}{key}: {_scalar(one)}"


def _scalar(value: Any) -> str:
    if isinstance(value, _Word):
        return value
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return json.dumps(
        value, ensure_ascii=False
    )  # its strings, numbers and truth values are those of the format
