"""Records of what discovery found, in node names, so that they survive copies of the graph and go into JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from fxprune.notebook import html_table
from fxprune.validation import shortened

__all__ = ["AdaptorSite", "Discovery", "Kind", "Reason", "Region", "Rejection", "Side", "every_call"]


class Kind(str, Enum):
    """How the value that stands in for a dropped region comes about.

    `IDENTITY`: entry and exit are joined by an identity path (a residual branch; the papers' blocks).
    `PROJECTION`: the branch lies beside a projection shortcut, which stays.
    `SEQUENTIAL`: a chain of operators of the same shape with no shortcut, as in VGG.
    """

    IDENTITY = "identity"
    PROJECTION = "projection"
    SEQUENTIAL = "sequential"


class Reason(str, Enum):
    """Why a candidate was refused."""

    SHAPE = "entry and exit differ in shape"
    DTYPE = "not one floating-point type throughout"
    BROADCAST = "the operands of the join are broadcast against each other"
    CONCATENATION = "joined by concatenation, so the entry is only a part of the exit"
    MULTIPLICATIVE = "joined by multiplication, so the branch is a gate and not an addend"
    SCALED = "the join scales its operands"
    NO_IDENTITY_PATH = "no identity path from entry to exit"
    USED_OUTSIDE = "a value inside is used outside"
    FED_FROM_OUTSIDE = "a value from outside enters beside the entry"
    NO_COMMON_ENTRY = "the operands share no entry inside the network"
    NO_OPERATOR = "no operator with weights inside, so nothing would be saved"
    MUTATED_ENTRY = "an in-place operator changes the entry, which is used elsewhere too"
    BEHIND_TAP = "behind the tap, where features are compared, so what it costs cannot be judged"
    KIND = "of a kind that was not asked for"
    IGNORED = "ignored at the user's request"


class Side(str, Enum):
    """Whether an adaptor stands before (`PRE`) or after (`POST`) its operator."""

    PRE = "pre"
    POST = "post"


@dataclass(frozen=True, slots=True)
class Region:
    """A single-entry single-exit subgraph whose exit may be replaced by another value.

    Attributes:
        entry: Node that feeds the region; not part of it.
        exit: Last node of the region; its value is replaced when the region is dropped.
        bypass: Node whose value takes the exit's place: the entry, or the end of a projection shortcut.
        body: Nodes from entry to exit in graph order, the exit included.
        kind: See `Kind`.
        label: Longest common module path of the dropped operators, made unique; what users see and type.
        modules: Module paths of the operators that disappear, in graph order.
        shape: Shape of the exit and of its bypass (batch included) in the traced example.
        dtype: Its type, such as `torch.float32`.
        twins: Other calls of the same weights, side by side with this one, as those of an encoder that images share;
            they are dropped with it.
    """

    entry: str
    exit: str
    bypass: str
    body: tuple[str, ...]
    kind: Kind
    label: str
    modules: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    twins: tuple[Region, ...] = ()

    @property
    def calls(self) -> tuple[Region, ...]:
        """The region and its twins."""
        return (self, *self.twins)

    @property
    def whole_body(self) -> frozenset[str]:
        """The body, with those of the twins."""
        return frozenset(name for call in self.calls for name in call.body)

    def overlaps(self, other: Region) -> bool:
        """Whether the two share a node, so that no plan may hold both."""
        return not self.whole_body.isdisjoint(other.whole_body)


def every_call(regions: Iterable[Region]) -> tuple[Region, ...]:
    """Some regions, each followed by its twins."""
    return tuple(call for region in regions for call in region.calls)


@dataclass(frozen=True, slots=True)
class Rejection:
    """A candidate that is not droppable, and why.

    Attributes:
        entry: Closest common dominator of the join's operands, or "" when there is none.
        exit: The join.
        reason: See `Reason`.
        nodes: The nodes that show it.
        detail: One sentence for the user.
        label: Module path of the join's surroundings.
    """

    entry: str
    exit: str
    reason: Reason
    nodes: tuple[str, ...]
    detail: str
    label: str


@dataclass(frozen=True, slots=True)
class Discovery:
    """All that discovery has to say about one graph.

    Attributes:
        regions: What can be dropped, in graph order; nested regions are all present.
        rejections: What cannot, each with its reason.
    """

    regions: tuple[Region, ...]
    rejections: tuple[Rejection, ...]

    def __repr__(self) -> str:
        labels = shortened([region.label for region in self.regions]) or "none"
        return (
            f"<Discovery: {len(self.regions)} regions ({labels}), {len(self.rejections)} candidates refused>"
        )

    def _repr_html_(self) -> str:
        regions = [(r.label, r.kind.value, " x ".join(map(str, r.shape[1:]))) for r in self.regions]
        counts = Counter(rejection.reason.value for rejection in self.rejections)
        refused = [(reason, str(count)) for reason, count in counts.most_common()]
        found = html_table(f"{len(regions)} regions can be dropped", ("region", "kind", "shape"), regions)
        title = f"{len(self.rejections)} candidates were refused"
        return found + (html_table(title, ("because", "candidates"), refused) if refused else "")


@dataclass(frozen=True, slots=True)
class AdaptorSite:
    """A place where a 1x1 adaptor can be inserted and folded away again.

    Attributes:
        operator: Name of the operator's node.
        side: Before or after it.
        channels: Width of the adaptor, a square map.
        channel_dim: Dimension of the operator's data tensor that holds the channels (1 or -1).
    """

    operator: str
    side: Side
    channels: int
    channel_dim: int
