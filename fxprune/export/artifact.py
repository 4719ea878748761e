"""How results are kept: whole files or none, and nothing that has to be unpickled to be read back."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxprune.errors import ArtifactError
from fxprune.export.archive import require_compact, require_harmless
from fxprune.export.messages import innermost, quiet
from fxprune.files import check_writable, write_bytes_atomic
from fxprune.graph.call import Inputs, is_batched
from fxprune.tracing.evaluation import evaluation_copy, to_evaluation

__all__ = ["load", "load_state", "program_bytes", "program_of", "save", "state_bytes", "state_of"]

# Where training scripts put the weights inside a larger checkpoint.
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "net")
_SEAL, _BLANK = "fxprune_sha256", b"0" * 64
# What torch calls a class or function that it refuses to look up; not the noise that random bytes make of a name.
_GLOBAL = re.compile(r"GLOBAL ([A-Za-z_]\w*(?:\.\w+)+)")
_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def save(gm: nn.Module, folder: str | os.PathLike[str], *, example_inputs: Sequence[Tensor] | Inputs) -> None:
    """Keeps a network: `model.pt2` (graph and weights) and `model.safetensors` (weights alone).

    The batch size stays free in `model.pt2` wherever the network allows it.

    Args:
        gm: The network; it is not changed.
        folder: Created if need be.
        example_inputs: One batch: its tensors where the network takes nothing else, batch first.

    Raises:
        ArtifactError: The network cannot be captured by `torch.export`, or the folder cannot be written.
    """
    target = check_writable(folder)
    write_bytes_atomic(target / "model.safetensors", state_bytes(gm))
    try:
        archive = program_bytes(gm, example_inputs)
    except ArtifactError as error:
        raise ArtifactError(
            f"the network cannot be kept as {target / 'model.pt2'}: {error}. Its weights are in model.safetensors; "
            "write it with export_onnx instead"
        ) from error
    write_bytes_atomic(target / "model.pt2", archive)


def state_bytes(network: nn.Module) -> bytes:
    """A network's weights as a safetensors file whose header holds the SHA-256 of the file without it."""
    state = network.state_dict()
    own = {name: x.detach().cpu().contiguous().clone() for name, x in state.items() if isinstance(x, Tensor)}
    data: bytes = safetensors.torch.save(own, {_SEAL: _BLANK.decode()})
    return data.replace(_BLANK, hashlib.sha256(data).hexdigest().encode(), 1)


def program_bytes(gm: nn.Module, example_inputs: Sequence[Tensor] | Inputs) -> bytes:
    """A network as a `.pt2` archive; the arguments are those of `save`.

    Raises:
        ArtifactError: The network cannot be captured by `torch.export`.
    """
    network = evaluation_copy(gm).requires_grad_(False).cpu()
    given = example_inputs if isinstance(example_inputs, Inputs) else Inputs(tuple(example_inputs))
    # Two rows at least: torch.export takes a dimension of size 1 for a constant.
    rows = given.to("cpu").map(lambda x: x.detach().repeat(2, *[1] * (x.dim() - 1)))
    buffer = io.BytesIO()
    try:
        program = torch.export.export(
            network, rows.args, rows.kwargs, dynamic_shapes=_free_batch(network, rows)
        )
        program.example_inputs = None  # the calibration images are the user's own, and no part of the network
        _forget_sources(program)
        torch.export.save(program, buffer)
    except Exception as error:
        raise ArtifactError(f"torch.export failed with {innermost(error)}") from error
    return buffer.getvalue()


def _free_batch(network: nn.Module, rows: Inputs) -> dict[str, Any]:
    """What torch.export takes to leave dimension 0 free, by the names of the network's arguments."""
    free = pytree.tree_map(
        lambda leaf: {0: torch.export.Dim.AUTO} if is_batched(leaf) else None, (rows.args, rows.kwargs)
    )
    return dict(inspect.signature(network.forward).bind(*free[0], **free[1]).arguments)


def _forget_sources(program: torch.export.ExportedProgram) -> None:
    """Takes the lines of the user's source code, and where they stood on this machine, off every node."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            for key in ("stack_trace", "source_fn_stack", "from_node"):
                node.meta.pop(key, None)


def load(path: str | os.PathLike[str]) -> GraphModule:
    """Reads a network that `save` or `torch.export.save` wrote; archives that could run code are refused.

    Args:
        path: A `.pt2` file, or a folder that `save` wrote.

    Raises:
        ArtifactError: It is missing, damaged or not provably harmless.
    """
    source = Path(path)
    if source.is_dir():
        source = source / "model.pt2"
    return to_evaluation(program_of(_read_bytes(source), str(source)).module())


def program_of(archive: bytes, where: str) -> torch.export.ExportedProgram:
    """The exported network in a `.pt2` archive, which could run no code.

    Args:
        archive: The whole file.
        where: Where it came from, for messages.

    Raises:
        ArtifactError: It is damaged or not provably harmless.
    """
    require_harmless(archive, where)
    try:
        with quiet():
            from torch.export.pt2_archive._package import load_pt2  # takes a second to import

            # torch.export.load would log what this raises, and go on to read the file in an older format
            return load_pt2(io.BytesIO(archive)).exported_programs["model"]
    except Exception as error:
        cause, *_ = innermost(error).partition(". ")
        raise ArtifactError(f"{where} cannot be read as an exported network: {cause}") from error


def load_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads weights from `.safetensors`, or from a checkpoint that holds tensors and nothing to run.

    Args:
        path: A state dict, alone or under a customary key (`state_dict`, `model`, ...) of a checkpoint.

    Raises:
        ArtifactError: It is missing, damaged, holds no weights, or would have to run code to be read.
    """
    source = Path(path)
    if source.suffix not in (".safetensors", *_PICKLE_SUFFIXES):
        raise ArtifactError(
            f"{source}: weights are read from .safetensors, {', '.join(_PICKLE_SUFFIXES)} only"
        )
    data = _read_bytes(source)
    if source.suffix == ".safetensors":
        return state_of(data, str(source))
    state = _load_pickle(source, data)
    if isinstance(state, dict):
        state = next((state[key] for key in _STATE_KEYS if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise ArtifactError(
            f"{source} holds no state dict (names to tensors), alone or under {', '.join(_STATE_KEYS)}: "
            "write it with torch.save(model.state_dict(), PATH)"
        )
    return dict(state)


def state_of(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Args:
        data: The whole file.
        where: Where it came from, for messages.

    Raises:
        ArtifactError: It is damaged.
    """
    try:
        return _unsealed(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"{where} is damaged or no safetensors file: {error}") from error


def _load_pickle(source: Path, data: bytes) -> Any:
    try:
        require_compact(data)
        with quiet():
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # random bytes, read as a pickle, raise anything
        if isinstance(error, pickle.UnpicklingError) and (found := _GLOBAL.search(str(error))):
            raise ArtifactError(
                f"{source} was refused: reading it would run code from the file ({found[1]}). Only if you trust "
                "whoever wrote it with everything on this machine, convert it once, which runs that code: "
                "safetensors.torch.save_file(torch.load(PATH, weights_only=False).state_dict(), 'weights.safetensors')"
            ) from error
        cause = innermost(error.__context__ or error)  # torch hides it behind its advice
        raise ArtifactError(f"{source} is damaged or no torch checkpoint: {cause}") from error


def _unsealed(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a `ValueError` where it has a checksum, and another one."""
    state = dict(safetensors.torch.load(data))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    seal = (header.get("__metadata__") or {}).get(_SEAL)
    if seal is not None and hashlib.sha256(data.replace(seal.encode(), _BLANK, 1)).hexdigest() != seal:
        raise ValueError("its checksum is another one")
    return state


def _read_bytes(source: Path) -> bytes:
    try:
        return source.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{source} cannot be read: {error.strerror or error}") from error
