"""The names that users see and type: labels of regions, and what `ignore=` matches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import count, takewhile

from torch import fx, nn

from fxprune.errors import OptionError
from fxprune.graph import operators as ops
from fxprune.graph.regions import Kind, Region

__all__ = ["Ignore", "ignore_rule", "label_of", "with_unique_labels"]

Ignore = str | type[nn.Module] | Callable[[Region], bool]


def label_of(nodes: Iterable[fx.Node], join: fx.Node) -> str:
    """Longest common module path of some operators and of the forward that joins them; `first..last` without one."""
    paths = list(dict.fromkeys(ops.module_path(node) or node.name for node in nodes))
    around = [ops.module_path(join)] if join.op != "call_module" and ops.module_path(join) else []
    return _common_path(paths + around) or _common_path(paths) or f"{paths[0]}..{paths[-1]}"


def _common_path(paths: Sequence[str]) -> str:
    columns = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns))


def with_unique_labels(regions: Sequence[Region], norms: Collection[str] = ()) -> list[Region]:
    """Tells regions of one label apart; one that contains all the others stays plain.

    The branches of a transformer's layer are named after what is in them, `blocks.0.attn` and `blocks.0.mlp`: the
    longest common path of their operators, normalisations apart. Where that says no more they are numbered, `#1`, `#2`.

    Args:
        regions: In graph order.
        norms: Module paths of the normalisations.
    """
    # an identity region is called the same whatever other kinds were asked for
    identities = {region.label for region in regions if region.kind is Kind.IDENTITY}
    plain = {True: identities, False: {region.label for region in regions}}
    taken: set[str] = set()
    renamed: dict[int, str] = {}
    identity_first = sorted(range(len(regions)), key=lambda i: regions[i].kind is not Kind.IDENTITY)
    groups: dict[tuple[str, bool], list[int]] = {}
    for i in identity_first:
        groups.setdefault((regions[i].label, regions[i].kind is Kind.IDENTITY), []).append(i)
    for (label, identity), members in groups.items():
        largest = max(members, key=lambda i: len(regions[i].body))
        inside = set(regions[largest].body)
        if label not in taken and all(inside.issuperset(regions[i].body) for i in members):
            renamed[largest] = label
            taken.add(label)
        free = (name for number in count(1) if (name := f"{label}#{number}") not in taken)
        others = [i for i in members if i not in renamed]
        inner = {i: _common_path([path for path in regions[i].modules if path not in norms]) for i in others}
        shared = (taken, plain[identity], _repeated(inner.values()))
        for i in others:
            telling = inner[i].startswith(f"{label}.") and not any(inner[i] in names for names in shared)
            renamed[i] = inner[i] if telling else next(free)
            taken.add(renamed[i])
    return [replace(region, label=renamed[i]) for i, region in enumerate(regions)]


def _repeated(names: Iterable[str]) -> set[str]:
    return {name for name, times in Counter(names).items() if times > 1}


def ignore_rule(
    gm: fx.GraphModule, ignore: Ignore | Sequence[Ignore], regions: Sequence[Region]
) -> list[Region]:
    """The regions that no entry of `ignore` protects.

    Args:
        gm: The graph the regions belong to.
        ignore: See `fxprune.discover`.
        regions: Candidates with unique labels.

    Raises:
        OptionError: An entry matches none of them; the message lists the labels.
    """
    entries: Sequence[Ignore] = (
        [ignore] if isinstance(ignore, str) or not isinstance(ignore, Sequence) else ignore
    )
    protected: set[str] = set()
    for entry in entries:
        matched = {region.label for region in regions if _matches(gm, entry, region)}
        if not matched:
            labels = ", ".join(region.label for region in regions) or "none"
            raise OptionError(f"ignore entry {entry!r} matches no region; the regions are: {labels}")
        protected |= matched
    return [region for region in regions if region.label not in protected]


def _matches(gm: fx.GraphModule, entry: Ignore, region: Region) -> bool:
    if isinstance(entry, str):
        names = (region.label, *region.modules)
        return any(fnmatchcase(name, entry) or name.startswith(f"{entry}.") for name in names)
    if isinstance(entry, type):
        return _holds_type(gm, entry, region)
    if isinstance(entry, nn.Module):
        raise OptionError(
            f"ignore holds a module, a {type(entry).__name__}: give its path, as in ignore='layer1.0', or its class"
        )
    if callable(entry):
        try:
            return bool(entry(region))
        except Exception as error:
            raise OptionError(
                f"ignore entry {entry!r} failed on region {region.label}: {type(error).__name__}: {error}"
            ) from error
    raise OptionError(f"ignore entry {entry!r} is neither a string, a module type nor a predicate")


def _holds_type(gm: fx.GraphModule, kind: type[nn.Module], region: Region) -> bool:
    """Whether the region calls a module of the type, or lies at or below one in the original module tree."""
    full_name = f"{kind.__module__}.{kind.__qualname__}"
    names = set(region.body)
    body = [node for node in gm.graph.nodes if node.name in names]
    base = label_of([node for node in body if ops.module_path(node) in region.modules] or body, body[-1])
    for node in body:
        if isinstance(ops.module_of(gm, node), kind):
            return True
        for path, owner in (node.meta.get("nn_module_stack") or {}).values():
            below = str(path) == base or str(path).startswith(f"{base}.")
            if below and (owner == full_name or (isinstance(owner, type) and issubclass(owner, kind))):
                return True
    return False
