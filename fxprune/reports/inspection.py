"""What `fxprune inspect` shows: one description, printed as tables or as JSON."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict
from typing import Any

from torch.fx import GraphModule, Node
from torch.nn import Parameter

from fxprune.graph.opaque import opaque_parts
from fxprune.graph.regions import Discovery, Region
from fxprune.reports.tables import render

__all__ = ["describe", "tables"]


def describe(gm: GraphModule, found: Discovery) -> dict[str, Any]:
    """What was found, ready for JSON: `counts` by kind, `regions`, `rejections`, `opaque`, parameters in all."""
    nodes = {node.name: node for node in gm.graph.nodes}
    users = _parameter_users(gm)
    return {
        "parameters": sum(parameter.numel() for parameter in gm.parameters()),
        "counts": dict(Counter(region.kind.value for region in found.regions)),
        "regions": [
            {
                "label": region.label,
                "kind": region.kind.value,
                "shape": list(region.shape),
                "entry": region.entry,
                "exit": region.exit,
                "modules": list(region.modules),
                "parameters_saved": _saved(users, nodes, region),
            }
            for region in found.regions
        ],
        "rejections": [
            {"label": r.label, "reason": r.reason.value, "detail": r.detail, "nodes": list(r.nodes)}
            for r in found.rejections
        ],
        "opaque": [asdict(part) for part in opaque_parts(gm)],
    }


def _parameter_users(gm: GraphModule) -> dict[Parameter, set[str]]:
    """Each parameter with the names of all nodes that read it, whichever front end made the graph."""
    users: defaultdict[Parameter, set[str]] = defaultdict(set)
    for node in gm.graph.nodes:
        if node.op == "call_module":
            for parameter in gm.get_submodule(node.target).parameters():
                users[parameter].add(node.name)
        elif node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            value = getattr(gm.get_submodule(owner), name, None)
            if isinstance(value, Parameter):
                users[value].update(user.name for user in node.users)
    return users


def _saved(users: dict[Parameter, set[str]], nodes: dict[str, Node], region: Region) -> int:
    """The parameters that only the body reads, without what the bypass needs: a projection shortcut stays."""
    body = set(region.whole_body)
    pending = [call.bypass for call in region.calls]
    while pending:
        name = pending.pop()
        if name in body:
            body.discard(name)
            pending.extend(source.name for source in nodes[name].all_input_nodes)
    return sum(parameter.numel() for parameter, readers in users.items() if readers <= body)


def tables(data: dict[str, Any]) -> str:
    """The description as text: regions, totals by kind, rejections."""
    regions = [
        (r["label"], r["kind"], "x".join(map(str, r["shape"])), len(r["modules"]), r["parameters_saved"])
        for r in data["regions"]
    ]
    totals = ", ".join(f"{count} {kind}" for kind, count in data["counts"].items())
    parts = [
        f"{data['model']}: {len(regions)} droppable regions"
        + (f" ({totals})" if totals else "")
        + f", {data['parameters']:,} parameters in all"
    ]
    if regions:
        parts.append(render(("region", "kind", "shape", "modules", "parameters saved"), regions))
    if data["rejections"]:
        rows = [(item["label"] or "-", item["reason"], item["detail"]) for item in data["rejections"]]
        parts.append(f"{len(rows)} candidates refused\n" + render(("candidate", "reason", "detail"), rows))
    if data["opaque"]:
        hidden = [
            (p["path"], p["kind"], p["parameters"], f"{100 * p['share']:.1f} %") for p in data["opaque"]
        ]
        parts.append(
            f"nothing can be cut inside {len(hidden)} opaque modules\n"
            + render(("module", "type", "parameters", "share"), hidden)
        )
    return "\n\n".join(parts)
