"""What the shell's arguments name: networks, checkpoints, and the inputs of an ONNX file."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fxprune.artifacts.loading import load_network
from fxprune.artifacts.recipe import RECIPE
from fxprune.building.file import inputs_of, parse
from fxprune.errors import OptionError, SourceError
from fxprune.export import artifact
from fxprune.reading.read import from_onnx
from fxprune.sources.forms import FORMS, MOST_VALUES
from fxprune.validation import shortened

__all__ = ["absolute", "image_size", "load_model", "load_weights", "onnx_inputs"]

logger = logging.getLogger(__name__)

_CHECKPOINTS = (".bin", ".ckpt", ".pkl", ".pt", ".pth", ".safetensors")
_LIBRARIES = ("timm", "torchvision")
_PREFIXES = ("module.", "_orig_mod.")
_LISTED = 10


def load_model(spec: str, shapes: Sequence[Sequence[int]] = ()) -> nn.Module:
    """The network that `spec` names, in evaluation mode; nothing is downloaded, so weights may be random.

    Args:
        spec: `torchvision:NAME`, `timm:NAME`, `path/to/file.py:factory` (the file is run, and `factory()`
            called), a `.pt2` or `.onnx` file, or the folder that holds `model.pt2`; one that `fxprune.save` or
            `compress` wrote is checked whole.
        shapes: What an ONNX file is to be tried with, one for each input; needed where it leaves sizes free.

    Raises:
        SourceError: There is no such network, or it cannot be built; the message says what there is.
        ArtifactError: The `.pt2` file is damaged or unsafe.
    """
    origin, _, name = spec.partition(":")
    if origin in _LIBRARIES:
        return _library_model(origin, name).eval()
    path, colon, factory = spec.rpartition(":")
    if colon and path.endswith(".py"):
        return _factory_model(Path(path), factory).eval()
    suffix = Path(spec).suffix
    if suffix == ".onnx":
        return from_onnx(spec, input_shapes=shapes)
    if suffix == ".pt2" or (spec and Path(spec, "model.pt2").is_file()):
        if not Path(spec).exists():
            raise SourceError(f"The file {spec} does not exist.")
        kept = Path(spec, RECIPE).is_file()
        return load_network(spec) if kept else artifact.load(Path(spec))
    if suffix == ".py":
        raise SourceError(
            f"{spec} names a file but no function in it: give {spec}:FACTORY, which returns the network."
        )
    if suffix in _CHECKPOINTS:
        raise SourceError(
            f"{spec} is a checkpoint: it holds weights, or a pickled network, which would run code from the file "
            f"when it is read. Name the network, and give the file as --weights {spec}. Give {FORMS}."
        )
    hint = f" Did you mean torchvision:{spec}?" if spec.isidentifier() else ""
    raise SourceError(f"{spec!r} names no network.{hint} Give {FORMS}.")


def image_size(spec: str, size: int | None) -> tuple[int, int]:
    """Height and width of the images for a network: what an ONNX file fixes, else `size`, by default 224.

    Raises:
        OptionError: An ONNX file takes other images, or leaves sizes free and none is given.
        SourceError: It cannot be read.
    """
    if Path(spec).suffix != ".onnx":
        return size or 224, size or 224
    entry, *others = inputs_of(parse(spec), spec)
    if others or len(entry.shape) != 4 or entry.shape[1] not in (None, 3):
        raise OptionError(
            f"{spec} takes something else than images of three channels, channels first, as those of a folder are: use "
            "fxprune.from_onnx in Python"
        )
    height, width = (side or size or 0 for side in entry.shape[2:])
    if not (height and width):
        raise OptionError(f"{spec} leaves the size of its input {entry.name} free: give --size")
    if size is not None and (height, width) != (size, size):
        raise OptionError(f"{spec} takes images of {height} x {width} pixels only: leave out --size {size}")
    return height, width


def absolute(spec: str) -> str:
    """What names the same network from within any other folder."""
    return spec if spec.partition(":")[0] in _LIBRARIES else os.path.abspath(spec)


def _library_model(library: str, name: str) -> nn.Module:
    try:
        models = importlib.import_module("timm" if library == "timm" else "torchvision.models")
    except ImportError as error:
        raise SourceError(
            f"{library}:{name} needs {library}, which is not installed: pip install fxprune[timm]"
        ) from error
    known = models.list_models()
    plain = name.partition(".")[0] if library == "timm" else name  # timm's names may end in .WEIGHTS
    if plain not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
        what = f"The nearest names: {', '.join(near)}." if near else f"It has {len(known)} others."
        raise SourceError(f"{library} has no network {name!r}. {what}")
    network: nn.Module
    if library == "timm":
        network = models.create_model(name, pretrained=False)
    else:
        # detection and segmentation would download the weights of their backbone by default
        parameters = inspect.signature(models.get_model_builder(name)).parameters
        backbone = {"weights_backbone": None} if "weights_backbone" in parameters else {}
        network = models.get_model(name, weights=None, **backbone)
    return network


def _factory_model(path: Path, factory: str) -> nn.Module:
    if not path.is_file():
        raise SourceError(f"The file {path} does not exist.")
    with _foreign_code(path, f"{path} cannot be imported"):
        spec = importlib.util.spec_from_file_location(f"_fxprune_source_{path.stem}", path)
        assert spec is not None and spec.loader is not None  # its name ends in .py
        module = importlib.util.module_from_spec(spec)
        # registered, because dataclasses and torch.fx look a class's module up by name
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    build = getattr(module, factory, None)
    if not callable(build):
        names = sorted(name for name in vars(module) if callable(vars(module)[name]) and name[0] != "_")
        raise SourceError(f"{path} has no function {factory!r}. It has: {', '.join(names) or 'none'}.")
    with _foreign_code(path, f"{factory}() in {path} failed"):
        network = build()
    if not isinstance(network, nn.Module):
        raise SourceError(
            f"{factory}() in {path} returned a {type(network).__name__}: it must return a torch.nn.Module."
        )
    return network


@contextlib.contextmanager
def _foreign_code(path: Path, failure: str) -> Iterator[None]:
    """The file may import its neighbours, as it could when run as a script; what it prints is no result."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        raise SourceError(f"{failure}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Loads a checkpoint into `model`, every tensor of it, converted to the model's types.

    Weights may be nested under `state_dict` or `model`, and their names may all begin with `module.` or
    `_orig_mod.`, as data-parallel and compiled networks write them. Missing `num_batches_tracked` counters
    stay as they are: old checkpoints lack them and evaluation does not read them.

    Args:
        model: Changed in place, unless an error is raised.
        path: A `.safetensors` file, or a `.pt`, `.pth`, `.ckpt` or `.bin` checkpoint without code.

    Raises:
        SourceError: The file is missing, or names, shapes or kinds of tensor do not match; the message lists them.
        ArtifactError: The file is damaged, or would run code when read.
    """
    if not Path(path).is_file():
        raise SourceError(f"The checkpoint {path} does not exist.")
    state = artifact.load_state(path)
    if not all(isinstance(key, str) for key in state):
        raise SourceError(f"The checkpoint {path} numbers its tensors; write the network's state_dict().")
    state = _unwrapped(state)
    expected = model.state_dict()
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    both = [(key, state[key], value) for key, value in expected.items() if key in state]
    unfit = [f"{key} ({misfit})" for key, given, own in both if (misfit := _misfit(given, own))]
    lists = (("missing", missing), ("unexpected", unexpected), ("of another shape or kind", unfit))
    if missing or unexpected or unfit:
        raise SourceError(
            f"The checkpoint {path} does not fit the network: "
            + "; ".join(f"{len(keys)} {what}: {shortened(keys, _LISTED)}" for what, keys in lists if keys)
            + ". For a network with other classes or layers, give it as path/to/file.py:factory."
        )
    model.load_state_dict(state, strict=False)
    logger.info("Loaded %d tensors from %s.", len(state), path)


def _misfit(given: Tensor, own: Tensor) -> str | None:
    if given.layout is not torch.strided or given.is_meta:
        return "sparse or without values: write it as a dense tensor"
    if given.is_complex() and not own.is_complex():
        return "complex numbers, the network's are real"
    if given.shape != own.shape:
        return f"{tuple(given.shape)}, the network has {tuple(own.shape)}"
    return None


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            return _unwrapped({key.removeprefix(prefix): value for key, value in state.items()})
    return state


def onnx_inputs(
    path: str | Path, *, batch: int | None = None, shapes: Sequence[Sequence[int]] = ()
) -> tuple[Tensor, ...]:
    """Inputs of the shapes and types that an ONNX file asks for: always the same noise, or zeros for integers.

    Args:
        path: The file.
        batch: Size of dimension 0; by default that of the file, or 1 where it is free.
        shapes: One shape for each input, needed where other dimensions are free.

    Raises:
        SourceError: The file is missing or no ONNX model.
        OptionError: `shapes` does not match the inputs, or is needed and not given.
    """
    entries = inputs_of(parse(path), path)
    if shapes and len(shapes) != len(entries):
        names = ", ".join(entry.name for entry in entries)
        raise OptionError(f"{path} has {len(entries)} inputs ({names}) and {len(shapes)} shapes were given.")
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for place, entry in enumerate(entries):
        name, own = f"Input {entry.name} of {path}", entry.shape
        asked = shapes[place] if shapes else (batch or own[0] or 1, *own[1:]) if own else ()
        shape = [size for size in asked if size is not None]
        if len(shape) < len(asked):
            raise OptionError(f"{name} has free dimensions: give --input-shape.")
        if math.prod(shape) > MOST_VALUES:
            raise OptionError(f"{name} would be {shape}: over {MOST_VALUES} values.")
        values = torch.randn(shape, generator=generator)
        inputs.append(
            values.to(entry.dtype) if entry.dtype.is_floating_point else torch.zeros(shape, dtype=entry.dtype)
        )
    return tuple(inputs)
