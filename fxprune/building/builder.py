"""An FX graph under construction: every node is tried at once on fake inputs of two sizes.

What is the same for both is a constant of the network; what differs follows the inputs, as the batch does.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fxprune.building.names import identifier

__all__ = ["Builder", "Operation", "Sizes", "UnreadableError", "Value"]

_MOST_VALUES = 2**28
"""In one constant that is computed: a GiB of float32."""


class UnreadableError(Exception):
    """An operator that has no reading, and why."""


@dataclass(frozen=True)
class Sizes:
    """Whole numbers that are computed from the sizes of tensors.

    Attributes:
        items: Each a number, or a node that yields one.
        scalar: Whether it is one number instead of a list.
    """

    items: tuple[Any, ...]
    scalar: bool = False


Value = fx.Node | Tensor | Sizes


@dataclass(frozen=True)
class Operation:
    """One operator of the file, as its reading sees it.

    Attributes:
        kind: Its type.
        attributes: Its attributes.
        inputs: Its inputs, None where one is left out.
        outputs: How many outputs it has.
        opset: Version of the operator set.
        path: Where its module is to stand, if it gets one.
        key: Tells operators with the same weights and attributes.
        alone: For each input, whether nothing else reads it.
    """

    kind: str
    attributes: Mapping[str, Any]
    inputs: tuple[Value | None, ...]
    outputs: int
    opset: int
    path: str
    key: tuple[str, ...]
    alone: tuple[bool, ...]

    def get(self, place: int) -> Value | None:
        """An input that may be left out."""
        return self.inputs[place] if place < len(self.inputs) else None

    def need(self, place: int) -> Value:
        """An input that must be there."""
        value = self.get(place)
        if value is None:
            raise UnreadableError(f"its input {place} is missing")
        return value

    def constant(self, place: int, what: str) -> Tensor:
        """An input that must not depend on those of the network."""
        value = self.need(place)
        if not isinstance(value, Tensor):
            raise UnreadableError(f"its {what} is computed from the network's input")
        return value

    def numbers(self, place: int, attribute: str) -> list[Any] | None:
        """What newer operator sets give as an input and older ones as an attribute; None if neither is there."""
        value = self.get(place)
        if value is None:
            given = self.attributes.get(attribute)
            return None if given is None else list(given) if isinstance(given, Sequence) else [given]
        if isinstance(value, fx.Node):
            raise UnreadableError(f"its {attribute} is computed from values")
        return list(value.items) if isinstance(value, Sizes) else value.reshape(-1).tolist()

    def known(self, place: int, attribute: str) -> list[Any] | None:
        """As `numbers`, and none of them may follow the sizes of the network's input."""
        found = self.numbers(place, attribute)
        if any(isinstance(item, fx.Node) for item in found or ()):
            raise UnreadableError(f"its {attribute} follows the size of the network's input")
        return found


class Builder:
    """Builds a graph node by node.

    Args:
        free: The batch size for which the file was written, if its operators are to be read for any other.

    Attributes:
        without_bias: Calls of modules that take what is added to their result as their bias.
    """

    def __init__(self, free: int | None = None) -> None:
        self.root, self.graph, self.free = nn.Module(), fx.Graph(), free
        self.scope = ""
        self.without_bias: set[fx.Node] = set()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._probes: dict[fx.Node, tuple[Any, Any]] = {}
        self._stored: dict[int, tuple[Tensor, str]] = {}
        self._placed: dict[str, Tensor] = {}
        self._called: dict[tuple[str, ...], str] = {}

    def placeholder(self, name: str, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> fx.Node:
        """An input, tried in two shapes."""
        taken = {str(node.target) for node in self._probes}
        name = next(n for i in count() if (n := identifier(f"{name}_{i}" if i else name)) not in taken)
        node = self.graph.placeholder(name)
        with self._mode:
            first, second = (torch.empty(list(shape), dtype=dtype) for shape in shapes)
        self._probes[node] = first, second
        return node

    def name(self, tensor: Tensor, path: str) -> Tensor:
        """Says where a weight is to stand if the graph reads it."""
        self._stored[id(tensor)] = tensor, path
        return tensor

    def call(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Any:
        """A function or, by name, a method; of constants alone it is computed at once."""
        if not _nodes_in((args, kwargs)):
            with self._trying():
                _require_small(_run(target, args, kwargs))
            with torch.no_grad():
                return _run(target, args, kwargs)
        args, kwargs = pytree.tree_map_only(Tensor, self.stored, (args, kwargs))
        kind = "call_method" if isinstance(target, str) else "call_function"
        return self._add(kind, target, args, kwargs, lambda a, k: _run(target, a, k))

    def module(self, operation: Operation, build: Callable[[], nn.Module], x: Value) -> fx.Node:
        """A call of a module; operators with the same weights share one."""
        path = self._called.get(operation.key)
        if path is None:
            path = self._called[operation.key] = self._free(operation.path)
            owner, _, last = path.rpartition(".")
            self._container(owner).add_module(last, build().eval())
        module = self.root.get_submodule(path)
        return self._add("call_module", path, (self.stored(x),), {}, lambda a, k: module(*a, **k))

    def stored(self, value: Any) -> fx.Node:
        """A node for any value; that of a constant reads a parameter or a buffer."""
        if isinstance(value, fx.Node):
            return value
        if isinstance(value, Sizes):
            items = list(value.items)
            made: fx.Node = self.call(torch.tensor, items[0] if value.scalar else items)
            return made
        _, path = self._stored.get(id(value), (value, ""))
        weight = path != "" and value.is_floating_point() and value.dim() > 0
        path = path or f"constants.value{len(self._stored)}"
        called = set(self._called.values())
        while path in called or self._placed.setdefault(path, value) is not value:
            path += "_"
        owner, _, last = path.rpartition(".")
        holder = self._container(owner)
        if not hasattr(holder, last) and weight:
            holder.register_parameter(last, nn.Parameter(value))
        elif not hasattr(holder, last):
            holder.register_buffer(last, value)
        self._stored[id(value)] = value, path
        return self._add("get_attr", path, (), {}, lambda a, k: value)

    def shape(self, x: Value, place: int = 0) -> tuple[int, ...]:
        """The shape of a value in the first or second trial."""
        if isinstance(x, Sizes):
            return () if x.scalar else (len(x.items),)
        return tuple(x.shape) if isinstance(x, Tensor) else tuple(self.tried(x)[place].shape)

    def tried(self, x: Any) -> tuple[Any, Any]:
        """What a value is in both trials."""
        return self._probes[x] if isinstance(x, fx.Node) else (x, x)

    def size(self, x: Value, dim: int) -> Any:
        """One size of a tensor: a number, or a node where it follows the network's input."""
        first, second = self.shape(x)[dim], self.shape(x, 1)[dim]
        return first if first == second else self.call("size", x, dim)

    def fixed(self, x: Value, dim: int) -> int:
        """One size of a tensor that may not follow the network's input."""
        first, second = self.shape(x)[dim], self.shape(x, 1)[dim]
        if first != second:
            raise UnreadableError(f"size {dim} of its input has to be fixed, and follows the network's input")
        return first

    def device(self) -> Any:
        """Where the network's input is, for tensors that are made of sizes."""
        return self.call(getattr, next(iter(self.graph.nodes)), "device")

    def dtype(self, x: Value) -> torch.dtype:
        """The type of a tensor's values."""
        found: torch.dtype = torch.int64 if isinstance(x, Sizes) else self.tried(x)[0].dtype
        return found

    def finish(self, outputs: Sequence[Value], name: str) -> fx.GraphModule:
        """The graph module, in evaluation mode, without what nothing reads."""
        nodes = [self.stored(value) for value in outputs]
        self.graph.output(nodes[0] if len(nodes) == 1 else tuple(nodes))
        gm = fx.GraphModule(self.root, self.graph, name).eval()
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()
        gm.recompile()
        return gm

    def _add(self, kind: str, target: Any, args: Any, kwargs: Any, run: Callable[[Any, Any], Any]) -> fx.Node:
        tried = []
        for place in (0, 1):
            given = fx.node.map_arg((args, kwargs), self._trial(place))
            with self._trying():
                tried.append(run(*given))
        node = self.graph.create_node(kind, target, args, kwargs)
        self._probes[node] = tried[0], tried[1]
        if self.scope:
            node.meta["nn_module_stack"] = {self.scope: (self.scope, nn.Module)}
        return node

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        """On fake tensors, and without the traceback that torch logs of what fails: it is refused in words."""
        log = logging.getLogger(FakeTensorMode.__module__)
        log.addFilter(_no_traceback)
        try:
            with self._mode, torch.no_grad():
                yield
        finally:
            log.removeFilter(_no_traceback)

    def _trial(self, place: int) -> Callable[[fx.Node], Any]:
        return lambda node: self._probes[node][place]

    def _container(self, path: str) -> nn.Module:
        module = self.root
        for step in filter(None, path.split(".")):
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        return module

    def _free(self, path: str) -> str:
        """The path, or one like it, at which no constant stands, and at and above which no module that is called."""
        called = set(self._called.values())
        for above in sorted(called, key=len):  # what is called holds no other modules: they move beside it
            if path.startswith(f"{above}."):
                path = f"{above}_{path.removeprefix(above)[1:].replace('.', '_')}"
                break
        names = (path, *(f"{path}_{i}" for i in range(1, len(called) + len(self._placed) + 2)))
        free = (p for p in names if p not in self._placed)
        return next(p for p in free if not any(_within(p, c) or _within(c, p) for c in called))


def _no_traceback(record: logging.LogRecord) -> bool:
    return record.exc_info is None


def _within(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.")


def _nodes_in(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []

    def see(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.node.map_arg(value, see)
    return found


def _run(target: Callable[..., Any] | str, args: Any, kwargs: Any) -> Any:
    if isinstance(target, str):
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def _require_small(value: Any) -> None:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor) and math.prod(leaf.shape) > _MOST_VALUES:
            raise UnreadableError(
                f"it yields a constant of shape {tuple(leaf.shape)}, over {_MOST_VALUES} values"
            )
