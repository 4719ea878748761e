"""What scores depend on, as a fingerprint that tells which part of it changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import torch
from torch import fx, nn

from fxprune._version import __version__
from fxprune.errors import OptionError
from fxprune.graph.weights import bytes_of, hash_weights
from fxprune.recovery.features import FeatureReader
from fxprune.recovery.original import Original

__all__ = ["Fingerprint", "fingerprint_of", "json_form"]

_FEW = 4
"""Images whose features are part of a fingerprint."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What scores depend on; two runs with equal fingerprints may share them.

    Attributes:
        graph: SHA-256 over the nodes, their targets and the settings of their modules.
        weights: SHA-256 over parameters and buffers.
        images: `CalibrationSet.fingerprint`.
        features: SHA-256 over the network's features of a few images: what hooks and functions that tracing took for
            leaves compute shows in nothing else.
        settings: The settings as canonical JSON.
        versions: Versions of fxprune and torch, as canonical JSON.
    """

    graph: str
    weights: str
    images: str
    features: str
    settings: str
    versions: str

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over all parts."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()

    def changes(self, old: Mapping[str, Any]) -> list[str]:
        """Names of the parts in which an older fingerprint (as `asdict` gives it) differs, with what is known."""
        found = []
        for name, new in asdict(self).items():
            if old.get(name) == new:
                continue
            if name in ("settings", "versions"):
                found.append(f"{name} ({_difference(str(old.get(name)), new)})")
            else:
                found.append(name)
        return found


def _difference(old: str, new: str) -> str:
    try:
        before, after = json.loads(old), json.loads(new)
        names = sorted(n for n in {*before, *after} if before.get(n) != after.get(n))
        return ", ".join(f"{n}: {before.get(n)!r}, now {after.get(n)!r}" for n in names)
    except (ValueError, TypeError, AttributeError):
        return "unreadable before"


def fingerprint_of(original: Original, settings: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint of one run's scores.

    Args:
        original: The network and its images.
        settings: Whatever else scores depend on (recipe, criterion, regions, ...): JSON values, enums, dataclasses.

    Raises:
        OptionError: A setting has no JSON form.
    """
    try:
        plain = json.dumps(dict(settings), default=json_form, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise OptionError(f"the settings cannot be part of a fingerprint: {error}") from error
    return Fingerprint(
        graph=_hash_graph(original.graph),
        weights=hash_weights(original.graph),
        images=original.images.fingerprint(),
        features=_hash_features(original),
        settings=plain,
        versions=json.dumps({"fxprune": __version__, "torch": torch.__version__}),
    )


@torch.no_grad()
def _hash_features(original: Original) -> str:
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        reader = FeatureReader(original.graph, original.tap)
        features = reader(original.images.example(_FEW).to(original.device))
    finally:
        cudnn.deterministic, cudnn.benchmark = before
    digest = hashlib.sha256()
    for one in features:
        digest.update(bytes_of(one))
    return digest.hexdigest()


def json_form(value: object) -> Any:
    """What `json.dumps` should write for the types that settings are made of; for its argument `default`.

    Raises:
        TypeError: There is no JSON form.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (os.PathLike, torch.device, torch.dtype)):
        return str(value)
    raise TypeError(f"{value!r} has no JSON form")


def _hash_graph(gm: fx.GraphModule) -> str:
    lines = [gm.code]
    for node in gm.graph.nodes:
        target = node.target
        if callable(target):
            target = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"
        lines.append(f"{node.name} {node.op} {target} {node.args} {node.kwargs}")
        if node.op == "call_module":
            lines += [_settings_of(m) for m in gm.get_submodule(str(node.target)).modules()]
    # the address that a default repr() holds differs from run to run
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", "\n".join(lines)).encode()).hexdigest()


def _settings_of(module: nn.Module) -> str:
    """Type, repr and plain attributes: strides and the like, which appear neither in the code nor in the weights."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple))}
    return f"{type(module).__module__}.{type(module).__qualname__} {module!r} {sorted(plain.items())}"
