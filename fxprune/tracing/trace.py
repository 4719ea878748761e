"""From a network to an FX graph with shapes, through either of torch's two front ends."""

from __future__ import annotations

import copy
import inspect
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, get_args

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torchvision.ops import FrozenBatchNorm2d

from fxprune.errors import OptionError, TraceError
from fxprune.graph.opaque import OpaquePart, opaque_note, opaque_parts
from fxprune.graph.shapes import propagate_shapes, unfit
from fxprune.options import FrontEnd
from fxprune.tracing.evaluation import evaluation_copy, to_evaluation
from fxprune.tracing.modules import restore_modules
from fxprune.tracing.mutation import show_mutation
from fxprune.tracing.unwrap import inner, unwrapped
from fxprune.validation import listed

__all__ = ["Traced", "split_inputs", "trace", "traced"]

logger = logging.getLogger(__name__)

TORCH_ROOT = str(Path(torch.__file__).parent)


def _untraceable() -> tuple[tuple[Callable[..., Any], ...], tuple[type[nn.Module], ...]]:
    """The functions and the types of modules that timm registers as untraceable, where it is installed."""
    try:
        from timm.layers import get_notrace_functions, get_notrace_modules
    except ImportError:
        return (), ()
    return tuple(get_notrace_functions()), tuple(get_notrace_modules())


class _Tracer(fx.Tracer):
    """Keeps as leaves what torch does, and some of what timm registers as untraceable.

    Args:
        blocks: Whether to keep whole blocks too, with weighted parts inside, which trace well where the input's size is
            not asked for.
    """

    def __init__(
        self, *, blocks: bool = False
    ) -> None:  # unpickling a traced module makes one without arguments
        functions, self._kinds = _untraceable()
        super().__init__(autowrap_functions=functions)
        self._blocks = blocks

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether calls of a module stay calls."""
        if isinstance(m, (FrozenBatchNorm2d, *self._kinds)):
            composed = any(next(child.parameters(), None) is not None for child in m.children())
            if self._blocks or not composed:
                return True
        return super().is_leaf_module(m, module_qualified_name)


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Reads example inputs as call arguments: a tensor, a tuple of positional ones, or a dict of keyword ones."""
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def _user_statement(tb: TracebackType | None) -> str:
    """The innermost statement outside torch, as `file:line: source`."""
    for frame in reversed(traceback.extract_tb(tb)):
        if not frame.filename.startswith((TORCH_ROOT, __file__)) and "<" not in frame.filename:
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return "a statement that torch does not name"


def _symbolic(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, blocks: bool
) -> fx.GraphModule:
    graph = _Tracer(blocks=blocks).trace(model, _unused_defaults(model, args, kwargs))
    for node in graph.find_nodes(op="placeholder"):
        if str(node.target).startswith("*") and node.users:
            raise TraceError(
                f"forward reads {node.target}, and a graph needs one input for each tensor: name them"
            )
    return fx.GraphModule(model, graph, type(model).__name__)


def _unused_defaults(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Optional arguments that the examples leave out keep their defaults instead of becoming inputs."""
    rest = list(inspect.signature(model.forward).parameters.values())[len(args) :]
    left = {p.name: p.default for p in rest if p.name not in kwargs and p.default is not p.empty}
    return (left or None) if args or kwargs else None


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    if not args and not kwargs:
        raise TraceError("torch.export needs example inputs; give `example_inputs`")
    doubled_args, doubled_kwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t, (args, kwargs)
    )
    spec = pytree.tree_map_only(
        torch.Tensor, lambda t: {0: torch.export.Dim.AUTO} if t.dim() else {}, (doubled_args, doubled_kwargs)
    )
    shapes = dict(inspect.signature(model.forward).bind(*spec[0], **spec[1]).arguments)
    try:
        program = torch.export.export(
            evaluation_copy(model), doubled_args, doubled_kwargs, dynamic_shapes=shapes
        )
    except Exception:  # a network that fixes its batch size still traces, with that size
        program = torch.export.export(evaluation_copy(model), args, kwargs)
    gm = program.module(check_guards=False)
    # where the code branches on the batch size, the constraint tells up to where; infinity is no such bound
    most = max((int(r.upper) for r in program.range_constraints.values() if r.upper < 1024), default=0)
    _check_free_batch(model, gm, most, doubled_args, doubled_kwargs)
    return gm


def _run(network: nn.Module, inputs: Any) -> list[Any]:
    """The values that a network yields on copies of its inputs, which it may change."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, inputs)
    values = pytree.tree_leaves(network(*args, **kwargs))
    for value in values:
        parts = [getattr(value, f.name) for f in fields(value)] if is_dataclass(value) else []
        if any(isinstance(part, torch.Tensor) for part in parts):
            name = type(value).__name__
            raise TraceError(
                f"the network returns a {name}, a dataclass that torch does not look into: call "
                f"torch.export.register_dataclass({name}) first, or return a dict"
            )
    return values


def _agree(wanted: Sequence[Any], found: Sequence[Any]) -> bool:
    tensors = [(w, f) for w, f in zip(wanted, found, strict=False) if isinstance(w, torch.Tensor)]
    return all(
        w.shape == f.shape and torch.allclose(w, f, rtol=1e-3, atol=1e-5, equal_nan=True) for w, f in tensors
    )


@torch.no_grad()
def _check_free_batch(model: nn.Module, gm: fx.GraphModule, most: int, *inputs: Any) -> None:
    """Refuses a graph that holds for few batch sizes where the module, which may fix its own, takes more."""
    longer = pytree.tree_map_only(
        torch.Tensor,
        lambda t: t[torch.arange(max(2 * len(t), most) + 1) % len(t)] if t.dim() and len(t) else t,
        inputs,
    )
    try:
        wanted = _run(model, longer)
    except Exception:  # the module fixes its batch size itself
        return
    with suppress(Exception):
        if _agree(wanted, _run(gm, longer)):
            return
    raise TraceError(
        "the graph is right for some batch sizes only: a forward that branches on the batch size, or makes a number of "
        "it, cannot be compressed; let it work on any"
    )


@torch.no_grad()
def _check_same_function(
    model: nn.Module, gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> fx.GraphModule:
    """Runs both on the examples: symbolic tracing reads `x += y` as `x = x + y`, and may freeze a choice."""
    if not (args or kwargs) or any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return gm
    wanted, found = _run(model, (args, kwargs)), _run(gm, (args, kwargs))
    if len(wanted) != len(found):
        raise TraceError(f"the graph yields {len(found)} values where the module yields {len(wanted)}")
    if not _agree(wanted, found):
        raise TraceError(
            "the graph computes something else than the module on the example inputs; an in-place operator such as "
            "`x += y`, whose x is read again, is the usual cause: write `x = x + y`"
        )
    return gm


@torch.no_grad()
def _check_runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tells inputs that the network does not take, and random networks, from those that cannot be traced."""
    if not (args or kwargs):
        return
    try:
        same = _agree(_run(model, (args, kwargs)), _run(model, (args, kwargs)))
    except TraceError:
        raise
    except Exception as error:  # whatever the network raises, the examples are what it raised it on
        raise unfit((args, kwargs), error) from error
    if not same:
        raise TraceError(
            f"two runs of {type(model).__name__} itself differ on the same inputs: it is random in evaluation mode "
            "(F.dropout without training=self.training, torch.randn, ...), so no graph can be checked against it"
        )


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _refuse(model: nn.Module, failures: dict[str, BaseException]) -> TraceError:
    lines = [f"{type(model).__name__} cannot be traced:"]
    for front_end, error in failures.items():
        lines.append(f"  torch.{front_end}: {_reason(error)}\n    at {_user_statement(error.__traceback__)}")
    lines.append(
        "Rewrite that statement without control flow on tensor values, mark the function with torch.fx.wrap, or "
        "compress a part of the model with submodule='path.of.a.traceable.part'."
    )
    return TraceError("\n".join(lines))


class Traced(NamedTuple):
    """A graph, and why it is not that of the front end that comes first, None where it is."""

    graph: fx.GraphModule
    note: str | None = None


def trace(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Any = None,
    *,
    front_end: FrontEnd = "auto",
) -> fx.GraphModule:
    """Captures a network as an FX graph of its evaluation mode, with shapes on every node.

    The result shares no parameter with the model, which stays as it was.

    Args:
        model: A module, which may be wrapped by `torch.compile` or `DataParallel`; a graph module; or an exported
            program.
        example_inputs: A tensor, a tuple (positional arguments) or a dict (keyword arguments); dimension 0 is the
            batch. Without them an FX trace has no shapes, and discovery will ask for them.
        front_end: `fx` traces symbolically, and takes graph modules as they are; `export` uses `torch.export`; `auto`
            tries them in this order, and if modules stay opaque takes the one that hides fewer parameters.

    Returns:
        A graph module in evaluation mode.

    Raises:
        OptionError: `front_end` is unknown.
        TraceError: The network cannot be captured; the message names the statement in its code, and the way out. It
            is random, TorchScript, or not initialised, or `torch.autocast` is on.
        GraphError: The network does not run on the example inputs.
    """
    return traced(model, example_inputs, front_end).graph


@torch.inference_mode(False)
def traced(model: Any, example_inputs: Any, front_end: FrontEnd) -> Traced:
    """As `trace`, which documents it, with a note for the user."""
    if front_end not in get_args(FrontEnd):
        raise OptionError(f"front_end is {front_end!r}; {listed(FrontEnd)}")
    made: list[tuple[str, fx.GraphModule, tuple[OpaquePart, ...]]] = []
    for name, graph in _graphs(unwrapped(model), *split_inputs(example_inputs), front_end):
        made.append((name, graph, opaque_parts(graph)))
        if not made[-1][2]:
            break
    first, _, hidden = made[0]
    taken, graph, _ = min(made, key=lambda one: (sum(part.parameters for part in one[2]), len(one[2])))
    if taken == first:
        return Traced(graph)
    note = f"the graph is that of {taken}, for in that of {first} {opaque_note(hidden)}"
    logger.info("%s", note)
    return Traced(graph, note)


def _finish(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    to_evaluation(gm)
    if args or kwargs:
        propagate_shapes(gm, args, kwargs)
    restore_modules(gm)
    show_mutation(gm)
    return gm


def _graphs(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], front_end: FrontEnd
) -> Iterator[tuple[str, fx.GraphModule]]:
    """A model's graphs, each with where it comes from, in the order in which they are to be preferred; at least one."""
    if isinstance(model, torch.export.ExportedProgram):
        yield "the program", _finish(copy.deepcopy(model.module(check_guards=False)), args, kwargs)
        return
    if not isinstance(model, nn.Module):
        raise TraceError(
            f"expected an nn.Module, a GraphModule or an ExportedProgram, got {type(model).__name__}"
        )
    done = set[str]()
    if isinstance(model, fx.GraphModule) and front_end != "export":
        yield "the module itself", _finish(copy.deepcopy(model), args, kwargs)
        done.add("given")
        if front_end == "fx":
            return
    # each front end has a copy of it, for what a forward keeps while it is traced holds fake tensors afterwards
    private = evaluation_copy(model)
    for part in list(private.modules()):
        part._modules.update({name: inner(child) for name, child in part._modules.items()})
    failures: dict[str, BaseException] = {}
    routes: list[tuple[str, Callable[[], fx.GraphModule]]] = [
        ("fx", lambda: _symbolic(evaluation_copy(private), args, kwargs, blocks=False)),
        ("fx", lambda: _symbolic(evaluation_copy(private), args, kwargs, blocks=True)),
        ("export", lambda: _exported(private, args, kwargs)),
    ]
    for name, route in routes:
        if front_end not in ("auto", name) or name in done:
            continue
        try:
            graph = _check_same_function(private, _finish(route(), args, kwargs), args, kwargs)
        except Exception as error:  # any failure of a front end is a refusal to report
            failures[name] = error
            continue
        done.add(name)
        yield f"torch.{name}", graph
    if not done:
        _check_runs(private, args, kwargs)
        raise _refuse(model, failures) from next(iter(failures.values()))
    for name, failure in failures.items():
        if name not in done:
            logger.info("torch.%s was tried too, and failed: %s", name, _reason(failure))
