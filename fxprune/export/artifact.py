"""How results are kept: whole files or none, and nothing that has to be unpickled to be read back."""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.fx import GraphModule

from fxprune.errors import ArtifactError
from fxprune.export.archive import require_harmless
from fxprune.files import check_writable, write_bytes_atomic
from fxprune.graph.evaluation import evaluation_copy, to_evaluation

__all__ = ["load", "load_state", "save"]

# Where training scripts put the weights inside a larger checkpoint.
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "net")
_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def save(gm: GraphModule, folder: str | os.PathLike[str], *, example_inputs: Sequence[Tensor]) -> None:
    """Keep a network: `model.pt2` (graph and weights) and `model.safetensors` (weights alone).

    The batch size stays free in `model.pt2` wherever the network allows it.

    Args:
        gm: The network; it is not changed.
        folder: Created if need be.
        example_inputs: One tensor per input, batch first.

    Raises:
        ArtifactError: The network cannot be captured by `torch.export`, or the folder cannot be written.
    """
    target = check_writable(folder)
    network = evaluation_copy(gm).requires_grad_(False).cpu()
    # Two rows at least: torch.export takes a dimension of size 1 for a constant.
    rows = tuple(x.detach().cpu().repeat(2, *[1] * (x.dim() - 1)) for x in example_inputs)
    shapes = tuple({0: torch.export.Dim.AUTO} for _ in rows)
    buffer = io.BytesIO()
    try:
        program = torch.export.export(network, rows, dynamic_shapes=shapes)
        program.example_inputs = None  # the calibration images are the user's own, and no part of the network
        torch.export.save(program, buffer)
    except Exception as error:
        raise ArtifactError(
            f"the network cannot be kept as {target / 'model.pt2'}: torch.export failed with {error}. "
            "Write it with export_onnx instead, or keep its state_dict"
        ) from error
    write_bytes_atomic(target / "model.pt2", buffer.getvalue())
    write_bytes_atomic(target / "model.safetensors", safetensors.torch.save(_unshared(network.state_dict())))


def load(path: str | os.PathLike[str]) -> GraphModule:
    """Read a network that `save` or `torch.export.save` wrote; archives that could run code are refused.

    Args:
        path: A `.pt2` file, or a folder that `save` wrote.

    Raises:
        ArtifactError: It is missing, damaged or not provably harmless.
    """
    source = Path(path)
    if source.is_dir():
        source = source / "model.pt2"
    archive = _read_bytes(source)
    require_harmless(archive, str(source))
    try:
        with warnings.catch_warnings():  # torch 2.9 reads weights from a buffer that it then never writes to
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            module = torch.export.load(io.BytesIO(archive)).module()
    except Exception as error:
        raise ArtifactError(f"{source} cannot be read as an exported network: {error}") from error
    if not isinstance(module, GraphModule):
        raise ArtifactError(f"{source} holds a {type(module).__name__}, not a graph: export it again")
    return to_evaluation(module)


def load_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read weights from `.safetensors`, or from a checkpoint that holds tensors and nothing to run.

    Args:
        path: A state dict, alone or under a customary key (`state_dict`, `model`, ...) of a checkpoint.

    Raises:
        ArtifactError: It is missing, damaged, holds no weights, or would have to run code to be read.
    """
    source = Path(path)
    if source.suffix == ".safetensors":
        try:
            return dict(safetensors.torch.load(_read_bytes(source)))
        except (SafetensorError, ValueError, KeyError) as error:
            raise ArtifactError(f"{source} is damaged or no safetensors file: {error}") from error
    if source.suffix not in _PICKLE_SUFFIXES:
        raise ArtifactError(
            f"{source}: weights are read from .safetensors, {', '.join(_PICKLE_SUFFIXES)} only"
        )
    state = _load_pickle(source)
    if isinstance(state, dict):
        state = next((state[key] for key in _STATE_KEYS if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise ArtifactError(
            f"{source} holds no state dict (names to tensors), alone or under {', '.join(_STATE_KEYS)}: "
            "write it with torch.save(model.state_dict(), PATH)"
        )
    return dict(state)


def _load_pickle(source: Path) -> Any:
    data = _read_bytes(source)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "Unsupported" in str(error):
            raise ArtifactError(
                f"{source} was refused: reading it would run code from the file ({_gist(error)}). If you "
                "trust where it came from, convert it once: safetensors.torch.save_file("
                "torch.load(PATH, weights_only=False).state_dict(), 'weights.safetensors')"
            ) from error
        raise ArtifactError(f"{source} is damaged or no torch checkpoint: {_gist(error)}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{source} is damaged or no torch checkpoint: {_gist(error)}") from error


def _gist(error: Exception) -> str:
    """The line of torch's long message that names the cause."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if "GLOBAL" in line), lines[0])


def _unshared(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, each with memory of its own, as safetensors requires."""
    return {name: x.detach().contiguous().clone() for name, x in state.items() if isinstance(x, Tensor)}


def _read_bytes(source: Path) -> bytes:
    try:
        return source.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{source} cannot be read: {error.strerror or error}") from error
