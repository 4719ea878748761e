"""The exception tree: every error that fxprune raises on purpose descends from `FxpruneError`."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "AgreementError",
    "ArtifactError",
    "CalibrationError",
    "DeviceError",
    "DistributedError",
    "ExportError",
    "FoldError",
    "FxpruneError",
    "GraphError",
    "MeasurementError",
    "NoRegionError",
    "OptionError",
    "OutOfMemoryError",
    "ParityError",
    "PassError",
    "PostconditionError",
    "PreconditionError",
    "SourceError",
    "TargetError",
    "TraceError",
]


class FxpruneError(Exception):
    """The root of the tree.

    Args:
        message: What failed, where, why, and what to do.
        nodes: Names of the graph nodes concerned, in graph order.
    """

    def __init__(self, message: str, *, nodes: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.nodes: tuple[str, ...] = tuple(nodes)

    def within(self, where: str) -> FxpruneError:
        """The same error, its message led by where it happened; raise it `from` this one."""
        return self.saying(f"{where}: {self}")

    def saying(self, message: str) -> FxpruneError:
        """The same error in other words."""
        other = type(self).__new__(type(self), message)
        other.__dict__.update(self.__dict__)
        return other


class OptionError(FxpruneError, ValueError):
    """A setting is out of range, unknown, or contradicts another."""


class TargetError(OptionError):
    """A latency target cannot be met by cutting."""


class AgreementError(OptionError):
    """A network agrees with what it was made from less often than was asked for."""


class SourceError(FxpruneError):
    """A model, a checkpoint or a file named by the user cannot be found or read."""


class TraceError(FxpruneError):
    """A network cannot be captured as an FX graph."""


class GraphError(FxpruneError):
    """A graph is malformed, or a record does not belong to it."""


class NoRegionError(GraphError):
    """A network holds no region that could be dropped; the message lists why."""


class PassError(FxpruneError):
    """A pass failed; `__cause__` holds the original exception."""


class PreconditionError(PassError, GraphError):
    """The graph given to a pass does not meet what the pass requires."""


class PostconditionError(PassError):
    """A pass broke its own promise about its result: a defect of the pass."""


class FoldError(PreconditionError):
    """An adaptor cannot be folded into its operator."""


class CalibrationError(FxpruneError):
    """The calibration images are missing, malformed or not finite."""


class DeviceError(FxpruneError):
    """A device was asked for and is not available."""


class DistributedError(FxpruneError):
    """The processes of one run lost each other, or one of them failed."""


class MeasurementError(FxpruneError):
    """A latency could not be measured on the backend that was asked for."""


class OutOfMemoryError(FxpruneError, MemoryError):
    """Memory ran out, of the process or of the GPU."""


class ArtifactError(FxpruneError):
    """A result could not be written or read back."""


class ExportError(FxpruneError):
    """A network could not be written as ONNX."""


class ParityError(ExportError):
    """An exported network computes something else than the original.

    Args:
        message: What disagreed, and where.
        max_abs_diff: The largest absolute difference that was seen.
        tolerance: The largest that would have been accepted.
    """

    def __init__(self, message: str, *, max_abs_diff: float, tolerance: float) -> None:
        super().__init__(message)
        self.max_abs_diff = max_abs_diff
        self.tolerance = tolerance
