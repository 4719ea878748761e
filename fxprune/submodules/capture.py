"""Parts of a model: the inputs that submodules really get, and where they are mimicked.

A detector, or any model whose own forward has control flow, cannot be traced as a whole, but its backbone can:

1. `capture_inputs` runs the model on the loader and keeps what reaches the submodule;
2. the submodule is traced, compressed, and mimicked at what it returns (`parts.comparable`), several side by side in
   one graph (`parts.Parts`), and where torch is timed, `whole.Whole` is the model around them;
3. `replacement.replace_submodule` puts each back into a copy of the model.
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice, permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxprune.calibration.batches import CalibrationSet
from fxprune.calibration.drawing import draw
from fxprune.calibration.loading import iterate, narrow
from fxprune.calibration.reading import read_keywords
from fxprune.errors import CalibrationError, GraphError, OptionError
from fxprune.graph.call import Calls, Inputs, input_names
from fxprune.tracing.evaluation import evaluation_copy
from fxprune.tracing.unwrap import inner, unwrapped

__all__ = ["Captured", "capture_inputs", "device_of", "is_list_of_tensors", "named", "submodule_of"]

logger = logging.getLogger(__name__)

PATIENCE = 20
"""Batches in a row that may leave a submodule uncalled before capturing gives up."""

TENSOR_BATCH = 8
"""Images given to the model at once where the loader is a single tensor."""

_LIST_ADVICE = (
    "pass input_fn=, a function from a batch to a tensor, a list of images, a tuple (arguments) or a dict "
    "(keyword arguments)"
)


class _Reached(BaseException):
    """Ends the model's forward at its last submodule; no `Exception`, so that no model swallows it."""


class _Call(NamedTuple):
    """What a model is called with, and its submodules then, in their order."""

    model: Inputs
    parts: list[Inputs]


class Captured(NamedTuple):
    """What a model's part is called with, or its parts.

    Attributes:
        images: The part's inputs, on the CPU; of several parts `Calls`.
        batch: The first of the batches that the model was called with for them.
    """

    images: CalibrationSet
    batch: Inputs


def capture_inputs(
    model: nn.Module,
    paths: str | Sequence[str],
    loader: object,
    *,
    limit: int = 500,
    input_fn: Callable[[Any], Any] | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Captured:
    """Runs a model on a loader and keeps what one of its submodules is called with, or several.

    The model runs as a private copy in evaluation mode, without gradients, and only as far as the submodule. When one
    forward calls it several times (a head shared by feature levels, say), the first call is recorded. Every row of its
    inputs is one image, so that a model that stacks two frames for its encoder, as RAFT does, yields two a pair.

    Several submodules are recorded in one forward, and have to be given as many rows as each other. All get what the
    original gives them, even where one feeds another.

    A batch is given to the model like this, unless there is an `input_fn`:

    1. a tensor: `model(tensor)`;
    2. a tuple or list whose first part is a tensor or a list of tensors: `model(first)`, or as many tensors as
       the model requires; labels are ignored;
    3. a mapping: `model(**mapping)`, without labels and what else the model does not take.

    Args:
        model: Any model; it is not changed.
        paths: The submodule, as in `model.get_submodule`, or several, none of which lies in another.
        loader: Batches; or all images as one tensor `[N, C, H, W]`; or a `Dataset`.
        limit: Most images to keep. A dataset, and a data loader over one, is drawn from at random; of other loaders
            the first are taken, as each costs a run of the model.
        input_fn: Turns a batch into a tensor or a list (the one argument), a tuple (the arguments) or a mapping (the
            keyword arguments).
        device: Where to run; by default where the model is.
        seed: Of the draw.

    Returns:
        The submodule's inputs, and a batch of the model's.

    Raises:
        OptionError: There is no such submodule, one lies in another or shares its weights, or `limit` is below 1.
        TraceError: The model cannot be copied.
        GraphError: The submodule is never called.
        CalibrationError: The loader or a batch cannot be used, the model fails on it, several submodules are given
            different numbers of rows, or the submodule's inputs differ in shape from one image to the next; the
            message names both shapes.
    """
    model = unwrapped(model)
    paths = (paths,) if isinstance(paths, str) else tuple(paths)
    _check_apart(model, paths)
    if limit < 1:
        raise OptionError(f"limit is {limit}: it counts images, so give 1 or more.")
    place = device_of(model) if device is None else torch.device(device)
    private = evaluation_copy(model).to(place)
    batches = _batches(loader, limit, seed)
    try:
        calls = _calls(private, paths, batches, limit, place, input_fn)
        first = list(islice(calls, 1))
        take = partial(draw, chain(first, calls), limit=limit, seed=seed)
        if len(paths) == 1:
            names = input_names(private.get_submodule(paths[0]))
            images = take(input_fn=lambda call: call.parts[0].given, names=names)
        else:
            drawn = take(input_fn=lambda call: Calls.of(call.parts).args)
            images = replace(drawn, inputs=Calls(drawn.inputs.args))
    except CalibrationError as error:
        raise CalibrationError(f"Capturing the inputs of {named(paths)}: {error}") from error
    return Captured(images, first[0].model)


def named(paths: Sequence[str]) -> str:
    """Submodules in words."""
    return f"submodule{'s' * (len(paths) > 1)} {' and '.join(map(repr, paths))}"


def _check_apart(model: nn.Module, paths: Sequence[str]) -> None:
    modules = {path: inner(submodule_of(model, path)) for path in paths}
    for path, other in permutations(paths, 2):
        if any(module is modules[path] for module in modules[other].modules()):
            raise OptionError(
                f"submodule names {path!r}, which lies in {other!r} or is the same: give one of them"
            )
        if not {*modules[path].parameters()}.isdisjoint(modules[other].parameters()):
            raise OptionError(
                f"submodule names {path!r} and {other!r}, which share weights, and each would get its own: name the "
                "part that holds both, or one of them"
            )


def _batches(loader: object, limit: int, seed: int) -> Iterator[tuple[int, Any]]:
    if isinstance(loader, Tensor):
        order = torch.randperm(len(loader), generator=torch.Generator().manual_seed(seed))
        chosen = order[:limit].sort().values.to(loader.device)
        return enumerate(loader[rows] for rows in torch.split(chosen, TENSOR_BATCH))
    return iterate(narrow(loader, limit, seed)[0])


def _calls(
    model: nn.Module,
    paths: Sequence[str],
    batches: Iterator[tuple[int, Any]],
    limit: int,
    device: torch.device,
    input_fn: Callable[[Any], Any] | None,
) -> Iterator[_Call]:
    """Batch by batch, until there are `limit` images."""
    submodules, names = {path: model.get_submodule(path) for path in paths}, input_names(model)
    images, missed, index, uncalled = 0, 0, -1, ""
    for index, batch in batches:
        given = _model_inputs(batch, index, input_fn, names).to(device)
        found = _run_until(model, submodules, given, index)
        uncalled = next((path for path in paths if path not in found), "")
        if uncalled:
            missed += 1
            if missed >= PATIENCE:
                break
            continue
        missed = 0
        bound = [_bind(submodules[path], found[path]) for path in paths]
        images += _rows_of(paths, bound, index)
        yield _Call(given, bound)
        if images >= limit:
            return
    if not images and index >= 0:
        raise GraphError(
            f"submodule {uncalled!r}, a {type(submodules[uncalled]).__name__}, is never called by the model's forward "
            f"({missed} batches): it is unused in evaluation mode, only its children are called, or one of its other "
            "methods; name a submodule that the model calls as model.part(x)"
        )


def _rows_of(paths: Sequence[str], calls: Sequence[Inputs], index: int) -> int:
    """Rows that submodules are given in one batch."""
    counts = [call.batch_size if call.tensors() else 1 for call in calls]
    if len(set(counts)) > 1:
        raise CalibrationError(
            f"in batch {index} they are given {' and '.join(map(str, counts))} rows: parts that are compressed "
            "together need one row each for an image; compress one, and the other in what that call returns"
        )
    return counts[0]


@torch.no_grad()
def _run_until(
    model: nn.Module, submodules: Mapping[str, nn.Module], given: Inputs, index: int
) -> dict[str, Inputs]:
    """What the submodules are first called with, by path; those that are not called are missing."""
    found: dict[str, Inputs] = {}

    def note(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if path not in found:
            # a copy: on its way to the others the model may change them in place
            found[path] = Inputs(args, kwargs).map(torch.clone)
        if len(found) == len(submodules):
            raise _Reached

    hooks = [
        submodule.register_forward_pre_hook(partial(note, path), with_kwargs=True)
        for path, submodule in submodules.items()
    ]
    try:
        model(*given.args, **given.kwargs)
    except _Reached:
        pass
    except Exception as error:
        raise CalibrationError(
            f"the model failed on batch {index} before it reached the submodule: {type(error).__name__}: {error}. It "
            f"was called as model({_describe(given)}); if that is not how it is to be called, {_LIST_ADVICE}."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _model_inputs(
    batch: object, index: int, input_fn: Callable[[Any], Any] | None, names: Mapping[str, bool]
) -> Inputs:
    """A batch as the whole model is given it, by the rules of `capture_inputs`."""
    value = batch
    if input_fn is not None:
        try:
            value = input_fn(batch)
        except Exception as error:
            raise CalibrationError(
                f"input_fn failed on batch {index}: {type(error).__name__}: {error}"
            ) from error
        if isinstance(value, tuple):
            return Inputs(value)
        if isinstance(value, list):
            return Inputs((value,))
    elif isinstance(value, Mapping):
        value = (read_keywords(value, index, names) or Inputs((), dict(value))).kwargs
    elif isinstance(value, (tuple, list)) and value:
        count = sum(names.values())
        if 1 < count <= len(value) and all(isinstance(part, Tensor) for part in value[:count]):
            return Inputs(tuple(value[:count]))
        value = list(value[0]) if isinstance(value[0], tuple) else value[0]
    if isinstance(value, Tensor) or is_list_of_tensors(value):
        return Inputs((value,))
    if isinstance(value, Mapping):
        return Inputs((), {str(key): item for key, item in value.items()})
    origin = "input_fn returned" if input_fn is not None else "the batch is"
    raise CalibrationError(f"batch {index}: {origin} a {type(value).__name__}: {_LIST_ADVICE}.")


def is_list_of_tensors(value: object) -> bool:
    """Whether a value is a list of images, as detectors take them."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, Tensor) for item in value)


def _describe(inputs: Inputs) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"<tensor {list(value.shape)}>"
        return f"<{type(value).__name__} of {len(value)}>" if isinstance(value, (list, dict)) else repr(value)

    keywords = [f"{name}={shown(value)}" for name, value in inputs.kwargs.items()]
    return ", ".join([*map(shown, inputs.args), *keywords])


def _bind(submodule: nn.Module, found: Inputs) -> Inputs:
    """The same call in one canonical form: all positional where that is possible, else all by name."""
    if not found.kwargs:
        return found
    bound = inspect.signature(submodule.forward).bind(*found.args, **found.kwargs)
    return Inputs(bound.args) if not bound.kwargs else Inputs((), dict(bound.arguments))


def submodule_of(model: nn.Module, path: str) -> nn.Module:
    """The submodule at a path; an `OptionError` names the nearest where there is none."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    if path in names:
        return model.get_submodule(path)
    if not path:
        raise OptionError("submodule is empty: name a part, or leave it out to compress the whole model")
    near = difflib.get_close_matches(path, names, n=5, cutoff=0.4)
    hint = f"nearest are {near}" if near else f"at the top there are {[n for n, _ in model.named_children()]}"
    raise OptionError(f"{type(model).__name__} has no submodule {path!r}; {hint}")


def device_of(*modules: nn.Module) -> torch.device:
    """The device of the first tensor that one of the modules holds."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return torch.device("cpu")
