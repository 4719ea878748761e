"""The original network with one region skipped, by forward hooks alone: what cutting is judged by.

Nothing here rewrites a graph. The traced graph is only run, to learn the values at the region's ends; the
network's own calls are then compared with those values, and a hook is chosen whose effect follows from the
comparison:

1. *splice*: some module call reads or returns the bypass's value, and another computes the exit's value.
   The second call's result is replaced by what the first one saw.
2. *zero*: some module call returns f with exit = bypass + f, or ReLU of it. Its result is replaced by zeros.
3. *zero, scaled*: the last module of the branch is followed by functional operators that keep zero. Its node
   is run as zeros in the unchanged graph; if the exit then equals the bypass, zeros replace its result.

Values are compared bit by bit where they are copies, and to `TOLERANCE` where a sum is recomputed.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fxprune.graph.regions import Region

__all__ = ["Bypass", "Inputs", "NoBypass", "call", "find_bypass", "run_bypassed"]

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module: its path and how many calls of it came before."""

    path: str
    index: int


@dataclass(frozen=True, slots=True)
class Bypass:
    """A way to skip a region by hooks.

    Attributes:
        target: The call whose result is replaced.
        source: The call that sees the value to put there; None for zeros.
        reads: Whether that value is the source's first input (else its result).
    """

    target: Call
    source: Call | None = None
    reads: bool = True

    def __str__(self) -> str:
        if self.source is None:
            return f"zero result of {self.target.path}"
        side = "input" if self.reads else "result"
        return f"result of {self.target.path} := {side} of {self.source.path}"


@dataclass(frozen=True, slots=True)
class NoBypass:
    """No hook can skip the region, and why."""

    reason: str


def call(module: nn.Module, inputs: Inputs) -> Any:
    """Calls a module on a tensor, a tuple of positional or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def find_bypass(model: nn.Module, gm: fx.GraphModule, region: Region, inputs: Inputs) -> Bypass | NoBypass:
    """Finds hooks on the original network that do what dropping the region should do.

    Args:
        model: The original network, in evaluation mode and float64.
        gm: Its unchanged traced graph, to which `region` belongs.
        region: The region.
        inputs: Example input of both, float64.

    Returns:
        The hooks, or why there are none.
    """
    wanted = {region.bypass, region.exit}
    values = _graph_values(gm, inputs, wanted)
    if not all(isinstance(values.get(name), Tensor) for name in wanted):
        return NoBypass("an end of the region is not a tensor in the traced graph")
    bypass, exit_ = values[region.bypass], values[region.exit]
    search = _Search(bypass, exit_)
    with _watched(model, _candidates(model, region), search.before, search.after), torch.no_grad():
        call(model, copy.deepcopy(inputs))
    found = search.best()
    if found is not None:
        return found
    return _scaled_tail(model, gm, region, inputs, bypass)


def run_bypassed(model: nn.Module, bypass: Bypass, inputs: Inputs) -> Any:
    """Runs the original network with the hooks in place; they are removed again.

    Raises:
        RuntimeError: The calls named by `bypass` did not happen.
    """
    kept: list[Tensor] = []
    done: list[bool] = []

    def before(at: Call, value: Tensor | None) -> None:
        if bypass.reads and at == bypass.source and value is not None:
            kept.append(value.clone())

    def after(at: Call, value: Tensor | None) -> Tensor | None:
        if not bypass.reads and at == bypass.source and value is not None:
            kept.append(value.clone())
        if at != bypass.target or value is None:
            return None
        done.append(True)
        return kept[-1].clone() if bypass.source is not None else torch.zeros_like(value)

    paths = {bypass.target.path} | ({bypass.source.path} if bypass.source else set())
    with _watched(model, paths, before, after), torch.no_grad():
        result = call(model, copy.deepcopy(inputs))
    if not done:
        raise RuntimeError(f"{bypass.target} was not called, so the bypass had no effect")
    return result


class _Search:
    """Compares every watched call with the values at the region's ends."""

    def __init__(self, bypass: Tensor, exit_: Tensor) -> None:
        self.bypass, self.exit = bypass, exit_
        self.source: tuple[Call, bool] | None = None
        # calls that are given the exit's value, which others may read beside them
        self.passing: set[Call] = set()
        self.splice: Bypass | None = None
        self.zero: Bypass | None = None

    def before(self, at: Call, value: Tensor | None) -> None:
        if self.source is None and value is not None and _same(value, self.bypass):
            self.source = (at, True)
        if value is not None and _same(value, self.exit):
            self.passing.add(at)

    def after(self, at: Call, value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        if self.source is not None and at not in self.passing and _same(value, self.exit):
            self.splice = Bypass(at, *self.source)
        elif self.source is None and _same(value, self.bypass):
            self.source = (at, False)
        if value.shape == self.exit.shape and self.zero is None and _completes(self.bypass, value, self.exit):
            self.zero = Bypass(at)
        return None

    def best(self) -> Bypass | None:
        return self.splice or self.zero


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other))


def _completes(bypass: Tensor, value: Tensor, exit_: Tensor) -> bool:
    total = bypass + value
    scale = max(1.0, float(exit_.abs().max()))
    return any(
        float((outcome - exit_).abs().max()) <= TOLERANCE * scale
        for outcome in (total, F.relu(total), F.relu6(total))
    )


def _candidates(model: nn.Module, region: Region) -> set[str]:
    """Modules of the region, those around and beside them, and those below the region's label."""
    base = region.label.partition("#")[0]
    near = {".".join(p.split(".")[:i]) for p in region.modules for i in range(1, p.count(".") + 2)}
    parents = {path.rpartition(".")[0] for path in region.modules}
    names = {name for name, _ in model.named_modules() if name}
    below = {n for n in names if n == base or n.startswith(f"{base}.") or base.startswith(f"{n}.")}
    return below | {n for n in names if n in near or n.rpartition(".")[0] in parents}


@contextmanager
def _watched(
    model: nn.Module,
    paths: set[str],
    before: Callable[[Call, Tensor | None], None],
    after: Callable[[Call, Tensor | None], Tensor | None],
) -> Iterator[None]:
    """Reports each call's first tensor input and result; what `after` returns takes the result's place."""
    started: Counter[str] = Counter()
    running: dict[str, list[Call]] = {}

    def enter(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            at = Call(path, started[path])
            started[path] += 1
            running.setdefault(path, []).append(at)
            before(at, _first_tensor((args, kwargs)))

        return hook

    def leave(path: str) -> Callable[..., Any]:
        def hook(_: nn.Module, __: tuple[Any, ...], result: Any) -> Any:
            new = after(running[path].pop(), _first_tensor(result))
            return None if new is None else _with_first_tensor(result, new)

        return hook

    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for path in sorted(paths):
            stack.callback(modules[path].register_forward_pre_hook(enter(path), with_kwargs=True).remove)
            stack.callback(modules[path].register_forward_hook(leave(path)).remove)
        yield


def _first_tensor(value: Any) -> Tensor | None:
    return next((leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)), None)


def _with_first_tensor(value: Any, new: Tensor) -> Any:
    leaves, spec = pytree.tree_flatten(value)
    index = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    leaves[index] = new
    return pytree.tree_unflatten(leaves, spec)


class _Recorder(fx.Interpreter):
    """Runs an unchanged graph, keeps copies of some values, and can force some nodes to zero."""

    def __init__(self, gm: fx.GraphModule, wanted: set[str], zeros: frozenset[str] = frozenset()) -> None:
        super().__init__(gm)
        self.wanted, self.zeros = wanted, zeros
        self.kept: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.zeros:
            tensor = _first_tensor(value)
            value = value if tensor is None else _with_first_tensor(value, torch.zeros_like(tensor))
        if n.name in self.wanted:
            self.kept[n.name] = value.clone() if isinstance(value, Tensor) else value
        return value


def _graph_values(
    gm: fx.GraphModule, inputs: Inputs, wanted: set[str], zeros: frozenset[str] = frozenset()
) -> dict[str, Any]:
    recorder = _Recorder(gm, wanted, zeros)
    with torch.no_grad():
        recorder.run(*_positional(gm, copy.deepcopy(inputs)))
    return recorder.kept


def _positional(gm: fx.GraphModule, inputs: Inputs) -> list[Any]:
    if not isinstance(inputs, Mapping):
        return list(inputs) if isinstance(inputs, tuple) else [inputs]
    names = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    known = [inputs[name] for name in names if name in inputs]
    return known if len(known) == len(inputs) else list(inputs.values())


def _scaled_tail(
    model: nn.Module, gm: fx.GraphModule, region: Region, inputs: Inputs, bypass: Tensor
) -> Bypass | NoBypass:
    """Case 3: tries the region's module calls from the last one backwards."""
    calls: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    known = dict(model.named_modules())
    body = set(region.body)
    for path in reversed(region.modules):
        nodes = calls.get(path, [])
        if path not in known or len(nodes) != 1 or nodes[0].name not in body:
            continue
        values = _graph_values(gm, inputs, {region.exit}, frozenset({nodes[0].name}))
        if _same(values[region.exit], bypass):
            return Bypass(Call(path, 0))
    return NoBypass("no module call returns the region's exit or its branch, and no module ends the branch")
