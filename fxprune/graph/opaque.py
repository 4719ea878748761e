"""What a graph does not show: modules that it calls whole, with more inside than one operator that has a word here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx, nn

from fxprune.graph import operators as ops
from fxprune.graph import vocabulary
from fxprune.validation import shortened

__all__ = ["OpaquePart", "opaque_note", "opaque_parts"]


@dataclass(frozen=True, slots=True)
class OpaquePart:
    """A module whose inside a graph does not show.

    Attributes:
        path: Where it is.
        kind: Name of its class.
        parameters: Inside it.
        share: Of all parameters of the network.
    """

    path: str
    kind: str
    parameters: int
    share: float


def opaque_parts(gm: fx.GraphModule) -> tuple[OpaquePart, ...]:
    """The modules that may hide something to cut, an addition of two values or weights, in graph order."""
    found = {
        str(node.target): module
        for node in gm.graph.nodes
        if node.users and (module := ops.module_of(gm, node)) is not None and _hides(node, module)
    }
    whole = _count(gm)
    return tuple(
        OpaquePart(path, type(module).__name__, _count(module), _count(module) / (whole or 1))
        for path, module in found.items()
    )


def _hides(node: fx.Node, module: nn.Module) -> bool:
    kind = type(module)
    if vocabulary.has_word(module):
        return False
    if vocabulary.is_torchs_own(kind):  # nn.LSTM hides no part to cut, nn.TransformerEncoderLayer does
        return any(_count(child) for child in module.children())
    return _count(module) > 0 or len(node.all_input_nodes) > 1


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def opaque_note(parts: Sequence[OpaquePart]) -> str:
    """The parts in a sentence, the largest first."""
    largest = sorted(parts, key=lambda part: -part.parameters)
    names = shortened([f"{part.path} ({part.kind}, {100 * part.share:.1f} %)" for part in largest])
    share = 100 * sum(part.share for part in parts)
    what = f"{len(parts)} opaque module{'s' if len(parts) > 1 else ''}"
    return f"nothing can be cut inside {what} with {share:.1f} % of the parameters: {names}"
