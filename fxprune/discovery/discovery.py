"""Finds what can be cut out of a graph, and says why the rest cannot.

Candidates are the joins of a network: nodes where two or more computed tensors meet. Let `n` be the immediate
dominator of a join `j`. The nodes that `n` dominates and `j` post-dominates form a single-entry single-exit
subgraph when no edge crosses its border. It is droppable

1. as `identity` when a path from `n` to `j` consists of additions and identities alone: `j` becomes `n`;
2. as `projection` when one operand of `j` is linear in `n`: `j` becomes that operand.

`sequential` regions need no join: one operator with weights, and what works element by element behind it, whose
output has the shape of its input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from torch import fx

from fxprune.discovery.border import Border, Refusal
from fxprune.discovery.dominance import Dominance, flow_nodes
from fxprune.discovery.labels import Ignore, ignore_rule, label_of, with_unique_labels
from fxprune.discovery.twins import tied
from fxprune.errors import GraphError, OptionError
from fxprune.graph import operators as ops
from fxprune.graph import vocabulary
from fxprune.graph.extract import kept, reached
from fxprune.graph.regions import Discovery, Kind, Reason, Region, Rejection

__all__ = ["discover"]


def discover(
    gm: fx.GraphModule,
    *,
    kinds: Iterable[str | Kind] = (Kind.IDENTITY,),
    ignore: Ignore | Sequence[Ignore] = (),
) -> Discovery:
    """Finds every region that can be dropped from a graph.

    Args:
        gm: A graph module with shapes, as `fxprune.trace` returns it; it is only read.
        kinds: Which kinds to accept: `identity`, `projection`, `sequential`.
        ignore: What must stay: labels, glob patterns over labels and module paths, module types, or predicates over
            a `Region`; one, or a sequence of them.

    Returns:
        Regions and rejections, both in graph order.

    Raises:
        GraphError: The graph has no shapes, or does not lint.
        OptionError: A kind is unknown, or an entry of `ignore` matches nothing.
    """
    wanted = _kinds(kinds)
    _check(gm)
    search = _Search(gm)
    found: list[Region] = []
    refused: list[Rejection] = []
    for candidate in search.candidates(chains=Kind.SEQUENTIAL in wanted):
        if isinstance(candidate, Rejection):
            refused.append(candidate)
        elif candidate.kind not in wanted:
            refused.append(
                _refuse(
                    candidate, Reason.KIND, f"it is a {candidate.kind.value} region, which kinds= can ask for"
                )
            )
        else:
            found.append(candidate)
    if Kind.IDENTITY in wanted:
        found.extend(search.composites(found))
    position = {node.name: i for i, node in enumerate(gm.graph.nodes)}
    found.sort(key=lambda r: (position[r.exit], position[r.entry], r.kind.value))
    norms = {ops.module_path(node) for node in gm.graph.nodes if ops.op_name(gm, node) in vocabulary.NORMS}
    labelled = with_unique_labels(tied(gm, found), norms)
    left = dict.fromkeys(ignore_rule(gm, ignore, labelled))
    refused.extend(_refuse(r, Reason.IGNORED, "named by ignore") for r in labelled if r not in left)
    refused.sort(key=lambda r: position[r.exit])
    return Discovery(tuple(left), tuple(refused))


def _kinds(kinds: Iterable[str | Kind]) -> frozenset[Kind]:
    names = [str(getattr(kind, "value", kind)) for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    known = {kind.value for kind in Kind}
    if not names or not known.issuperset(names):
        raise OptionError(f"kinds is {names}; choose from {sorted(known)}")
    return frozenset(map(Kind, names))


def _check(gm: fx.GraphModule) -> None:
    try:
        gm.graph.lint()
    except Exception as error:
        raise GraphError(f"the graph does not lint: {error}; mend it, or trace the network again") from error
    if any("tensor_meta" not in node.meta for node in gm.graph.nodes):
        raise GraphError(
            "the graph has no shapes: give example inputs to fxprune.trace, or run fxprune.passes.PropagateShapes on it"
        )


def _refuse(region: Region, reason: Reason, detail: str) -> Rejection:
    return Rejection(region.entry, region.exit, reason, (region.exit,), detail, region.label)


class _Search:
    """The walk over one graph; holds what its steps share."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.flow = flow_nodes(gm)
        self.dominance = Dominance(self.flow)
        self.border = Border(gm, self.flow, self.dominance)
        self.join_of: dict[str, fx.Node] = {}

    def candidates(self, *, chains: bool) -> Iterator[Region | Rejection]:
        """Every join, as a region or as a rejection, and every chain that is a region, if chains are asked for."""
        for name, node in self.flow.items():
            if node.op in ("placeholder", "output"):
                continue
            sources = self.dominance.sources[name]
            itself = len(node.args) > 1 and node.args[0] is node.args[1]
            joins = len(sources) > 1 or (itself and ops.op_name(self.gm, node) == "add")
            begins = chains and len(sources) == 1 and ops.owns_weights(self.gm, node)
            if not (joins or begins) or not self.dominance.is_live(name):
                continue
            operands = [self.flow[source] for source in sources]
            found = self._join(node, operands) if joins else self._chain(node, operands[0])
            if isinstance(found, Refusal):
                entry, label = self.dominance.immediate(name) or "", ops.module_path(node) or name
                yield Rejection(entry, name, found.reason, found.nodes or (name,), found.detail, label)
            elif found is not None:
                yield found

    def _join(self, join: fx.Node, operands: list[fx.Node]) -> Region | Refusal | None:
        name = ops.op_name(self.gm, join)
        if name not in ("add", "sub", "cat", "mul"):
            return None
        entry = self.flow.get(self.dominance.immediate(join.name) or "")
        if name == "mul":
            if entry is None or not any(self._identity_path(operand, entry) for operand in operands):
                return None
            return Refusal(Reason.MULTIPLICATIVE, f"{join.name} multiplies its entry by a gate")
        if entry is None:
            return Refusal(Reason.NO_COMMON_ENTRY, "its operands come from different inputs")
        if name == "cat":
            return Refusal(Reason.CONCATENATION, f"{join.name} concatenates {len(operands)} tensors")
        if not (ops.is_floating(join) and all(ops.is_floating(operand) for operand in operands)):
            return Refusal(Reason.DTYPE, f"{join.name} does not add floating-point tensors")
        shapes = [ops.shape_of(operand) for operand in operands]
        if any(shape != ops.shape_of(join) for shape in shapes):
            return Refusal(Reason.BROADCAST, f"operands of shape {shapes}")
        if len(operands) == 1:
            return Refusal(Reason.NO_OPERATOR, f"{join.name} adds a tensor to itself")
        through = [operand for operand in operands if self._identity_path(operand, entry)]
        if through and self._scale(join, through[0]) == 1.0:
            return self._identity(join, entry)
        if through:
            return Refusal(Reason.SCALED, f"{join.name} scales its shortcut")
        return self._projection(join, entry, operands)

    def _identity_path(self, node: fx.Node, entry: fx.Node) -> bool:
        """Whether additions and identities alone lead from `entry` to `node`."""

        def back(current: fx.Node) -> Iterable[fx.Node]:
            inside = current is not entry and current.name in self.flow
            if not inside or not self.dominance.dominates(entry.name, current.name):
                return ()
            if ops.is_identity(self.gm, current):
                return current.all_input_nodes[:1]
            operands = current.all_input_nodes if ops.op_name(self.gm, current) in ("add", "sub") else ()
            shape = ops.shape_of(current)
            return [o for o in operands if ops.shape_of(o) == shape and self._scale(current, o) == 1.0]

        return entry in reached([node], back)

    def _identity(self, join: fx.Node, entry: fx.Node) -> Region | Refusal:
        problem = _unlike(entry, join)
        if problem is not None:
            return problem
        exit_ = self._absorb_activation(join, entry)
        self.join_of[exit_.name] = join
        return self._bounded(entry, exit_, entry, Kind.IDENTITY)

    def _absorb_activation(self, join: fx.Node, entry: fx.Node) -> fx.Node:
        """The activation behind a join, where it leaves the entry's values alone and would stand there twice."""
        node = join
        while len(node.users) == 1:
            user = next(iter(node.users))
            clamp = ops.fixed_interval(self.gm, user) if user.name in self.flow else None
            if clamp is not None:
                low, high = ops.output_interval(self.gm, entry)
                return user if clamp[0] <= low and high <= clamp[1] else join
            if user.name not in self.flow or not ops.is_identity(self.gm, user):
                return join
            node = user
        return join

    def _projection(self, join: fx.Node, entry: fx.Node, operands: list[fx.Node]) -> Region | Refusal:
        linear = [
            (sum(ops.owns_weights(self.gm, n) for n in path), position, operand)
            for position, operand in enumerate(operands)
            if (path := self._linear_path(operand, entry)) is not None and self._scale(join, operand) == 1.0
        ]
        if not linear:
            return Refusal(
                Reason.NO_IDENTITY_PATH,
                f"neither operand of {join.name} is an identity or a projection of {entry.name}",
            )
        shortcut = min(linear)[2]
        return self._bounded(entry, join, shortcut, Kind.PROJECTION)

    def _linear_path(self, node: fx.Node, entry: fx.Node) -> list[fx.Node] | None:
        path = []
        while node is not entry:
            sources = [source for source in node.all_input_nodes if source.name in self.flow]
            if len(sources) != 1 or not ops.is_linear(self.gm, node):
                return None
            path.append(node)
            node = sources[0]
        return path

    def _bounded(self, entry: fx.Node, exit_: fx.Node, bypass: fx.Node, kind: Kind) -> Region | Refusal:
        body = self.border.body(entry, exit_)
        crossing = self.border.crossing(entry, exit_, body)
        if crossing is not None:
            return crossing
        stays = kept(body, bypass)
        weighted = [node for node in body if node not in stays and ops.owns_weights(self.gm, node)]
        if not weighted:
            return Refusal(Reason.NO_OPERATOR, "nothing with weights would disappear")
        return Region(
            entry=entry.name,
            exit=exit_.name,
            bypass=bypass.name,
            body=tuple(node.name for node in body),
            kind=kind,
            label=label_of(weighted, self.join_of.get(exit_.name, exit_)),
            modules=tuple(dict.fromkeys(ops.module_path(node) or node.name for node in weighted)),
            shape=ops.shape_of(exit_) or (),
            dtype=str(ops.tensor_meta(exit_).dtype),
        )

    def _chain(self, operator: fx.Node, source: fx.Node) -> Region | None:
        """A sequential region that begins with `operator`; what has another shape is no candidate."""
        last = operator
        while len(last.users) == 1:
            user = next(iter(last.users))
            flows = [n for n in user.all_input_nodes if n.name in self.flow]
            if user.name not in self.flow or len(flows) != 1 or not ops.is_elementwise(self.gm, user):
                break
            last = user
        if self._shared(source) or _unlike(source, last) is not None or not ops.is_dense(self.gm, operator):
            return None
        found = self._bounded(source, last, source, Kind.SEQUENTIAL)
        return found if isinstance(found, Region) else None

    def _shared(self, node: fx.Node) -> bool:
        """Whether something else reads a value, be it in front of identities."""
        while len(node.users) == 1 and ops.is_identity(self.gm, node):
            node = node.all_input_nodes[0]
        return len(node.users) != 1

    def _scale(self, join: fx.Node, operand: fx.Node) -> float:
        """The factor by which an addition or subtraction scales an operand; 0 when it is not a plain number."""
        alpha = ops.argument(join, 2, "alpha", 1)
        if not isinstance(alpha, (int, float)):
            return 0.0
        if join.args[1:2] != (operand,):
            return 1.0
        return float(alpha) * (-1.0 if ops.op_name(self.gm, join) == "sub" else 1.0)

    def composites(self, regions: list[Region]) -> list[Region]:
        """Runs of two or more consecutive identity regions whose joins one module call executed."""
        runs: dict[str, list[list[Region]]] = {}  # by the call that executed their joins
        for region in regions:
            call = ops.scope_key(self.join_of[region.exit]) if region.kind is Kind.IDENTITY else ""
            if not call:
                continue
            before = runs.setdefault(call, [])
            if before and self._follows(before[-1][-1], region):
                before[-1].append(region)
            else:
                before.append([region])
        found = []
        for run in chain.from_iterable(runs.values()):
            if len(run) > 1:
                entry = self.flow[run[0].entry]
                found.append(self._bounded(entry, self.flow[run[-1].exit], entry, Kind.IDENTITY))
        return [whole for whole in found if isinstance(whole, Region)]

    def _follows(self, first: Region, second: Region) -> bool:
        node = self.flow[second.entry]
        while node.name != first.exit and ops.is_identity(self.gm, node):
            node = node.all_input_nodes[0]
        return node.name == first.exit


def _unlike(a: fx.Node, b: fx.Node) -> Refusal | None:
    floating = ops.is_floating(a) and ops.is_floating(b)
    if not floating or ops.tensor_meta(a).dtype != ops.tensor_meta(b).dtype:
        return Refusal(Reason.DTYPE, f"{a.name} and {b.name} do not hold one floating-point type")
    if ops.shape_of(a) != ops.shape_of(b):
        detail = f"{a.name} has shape {ops.shape_of(a)}, {b.name} has {ops.shape_of(b)}"
        return Refusal(Reason.SHAPE, detail)
    return None
