"""A network's graph as an SVG: operators in a column, streams as lines, regions and sites of adaptors beside them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from torch import fx

from fxprune.discovery.dominance import flow_nodes
from fxprune.graph import operators as ops
from fxprune.graph.regions import Discovery, Region, Side, every_call
from fxprune.placement.placement import find_sites

__all__ = ["draw"]

_ROW, _LANE, _BAR, _LETTER = 18, 14, 12, 7.3
_HEAD = 64

_STYLE = """
svg { background: #fff; color: #1b1f23; font: 12px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
text { fill: currentColor; } .soft { opacity: 0.6; }
.flow { fill: none; stroke: #8a939c; stroke-width: 1.5; } .stream { stroke: #0b5cad; stroke-width: 5; opacity: 0.55; }
.dot { fill: #8a939c; } .bar { fill: #0b6e4f; } .site { fill: #b54708; } .inside { fill: #0b6e4f; }
@media (prefers-color-scheme: dark) {
  svg { background: #12151a; color: #e8eaed; } .bar, .inside { fill: #4cc38a; } .site { fill: #f0a35e; }
  .stream { stroke: #7fb8f5; }
}
"""


@dataclass(frozen=True, slots=True)
class _Spot:
    """Where a node stands: its row from above, and its lane from the left."""

    row: int
    lane: int


def draw(gm: fx.GraphModule, found: Discovery, *, title: str) -> str:
    """Draws a graph, one operator a row, in the order in which they run.

    A value keeps its lane until its last reader, which stands there: so a residual stream is a straight line, and
    branches leave to the right of it. A region's bar spans its operators, and the stream past them is thick. A triangle
    is a site for an adaptor: behind an operator (pointing down) or before it (up), for the cuts that its tooltip names.

    Args:
        gm: The network, with shapes.
        found: What discovery says of it.
        title: What is drawn, for the heading.

    Returns:
        A complete SVG document, light or dark as the viewer prefers; the same for the same graph.
    """
    flow = flow_nodes(gm)
    spots = _spots(flow)
    bars = _bars(found.regions, spots)
    left = 16 + _BAR * (1 + max((bar for bar, _, _ in bars.values()), default=-1))
    names = [_name(gm, node) for node in flow.values()]
    lanes = 1 + max(spot.lane for spot in spots.values())
    aside = left + _LANE * lanes + 22
    starting, sites = _starting(bars), _sites(gm, found.regions)
    letters = max(map(len, names)) + 4 + max(map(len, starting.values()), default=0)
    heading = max(len(title), len(_legend(found)))
    width = int(max(aside + _LETTER * letters, 16 + _LETTER * heading)) + 16
    height = _HEAD + _ROW * len(flow) + 16

    def at(name: str) -> tuple[float, float]:
        spot = spots[name]
        return left + _LANE * (spot.lane + 0.5), _HEAD + _ROW * (spot.row + 0.5)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img"><title>{escape(title)}</title><style>{_STYLE}</style>',
        f'<text x="16" y="24" font-weight="bold">{escape(title)}</text>',
        f'<text x="16" y="44" class="soft">{escape(_legend(found))}</text>',
    ]
    for region in every_call(found.regions):
        if region.bypass in spots and region.exit in spots:
            (x, top), (end, bottom) = at(region.bypass), at(region.exit)
            if x == end:
                parts.append(f'<path class="flow stream" d="M{x:g} {top:g}V{bottom:g}"/>')
    edges = [
        (s.name, n.name) for n in flow.values() for s in dict.fromkeys(n.all_input_nodes) if s.name in spots
    ]
    parts.extend(f'<path class="flow" d="{_edge(at(source), at(reader))}"/>' for source, reader in edges)
    parts.extend(
        f'<rect class="bar" x="{16 + _BAR * bar}" y="{_HEAD + _ROW * first + 2}" width="5" '
        f'height="{_ROW * (last + 1 - first) - 4}" rx="2"><title>{escape(label)}</title></rect>'
        for label, (bar, first, last) in bars.items()
    )
    inside = {name for region in every_call(found.regions) for name in region.body}
    for name, text in zip(flow, names, strict=True):
        x, y = at(name)
        dot = "inside" if name in inside else "dot"
        parts.append(f'<circle class="{dot}" cx="{x:g}" cy="{y:g}" r="3.5"/>')
        parts.extend(_triangle(x, y, side, cuts) for side, cuts in sites.get(name, {}).items())
        begun = starting.get(spots[name].row, "")
        mark = f'<tspan class="inside" font-weight="bold">  {escape(begun)}</tspan>' if begun else ""
        parts.append(f'<text x="{aside}" y="{y + 4:g}" xml:space="preserve">{escape(text)}{mark}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend(found: Discovery) -> str:
    return (
        f"{len(found.regions)} regions that can be cut (bars), their streams (thick), sites for adaptors (triangles); "
        f"{len(found.rejections)} candidates refused"
    )


def _spots(flow: Mapping[str, fx.Node]) -> dict[str, _Spot]:
    """A row for each node, and the leftmost lane that is free; the last reader of a value takes over its lane."""
    rows = {name: row for row, name in enumerate(flow)}
    last = {
        name: max((rows[u.name] for u in node.users if u.name in rows), default=rows[name])
        for name, node in flow.items()
    }
    taken: dict[int, int] = {}  # until which row a lane is held
    spots: dict[str, _Spot] = {}
    for name, node in flow.items():
        row = rows[name]
        ended = [spots[s.name].lane for s in node.all_input_nodes if s.name in spots and last[s.name] == row]
        free = (lane for lane in range(len(taken) + 1) if taken.get(lane, -1) < row)
        lane = min(ended) if ended else next(free)
        spots[name] = _Spot(row, lane)
        taken[lane] = last[name]
    return spots


def _edge(start: tuple[float, float], end: tuple[float, float]) -> str:
    """Down the lane that the value holds, then over to its reader."""
    (x, top), (to, bottom) = start, end
    if x == to:
        return f"M{x:g} {top:g}V{bottom:g}"
    turn = bottom - _ROW
    return f"M{x:g} {top:g}V{turn:g}C{x:g} {bottom - 4:g} {to:g} {turn + 4:g} {to:g} {bottom:g}"


def _bars(regions: Iterable[Region], spots: Mapping[str, _Spot]) -> dict[str, tuple[int, int, int]]:
    """By label: which column its bar stands in, its first row and its last; bars of one column do not meet."""
    spans = []
    for region in regions:
        for number, call in enumerate(region.calls):
            rows = [spots[name].row for name in call.body if name in spots]
            spans.append(
                (min(rows), max(rows), region.label if not number else f"{region.label} ({number + 1})")
            )
    bars: dict[str, tuple[int, int, int]] = {}
    ends: list[int] = []
    for first, last, label in sorted(spans, key=lambda span: (span[0], -span[1])):
        column = next((i for i, end in enumerate(ends) if end < first), len(ends))
        ends[column : column + 1] = [last]
        bars[label] = (column, first, last)
    return bars


def _starting(bars: Mapping[str, tuple[int, int, int]]) -> dict[int, str]:
    """The labels of the regions that begin at each row."""
    found: defaultdict[int, list[str]] = defaultdict(list)
    for label, (_, first, _) in bars.items():
        found[first].append(label)
    return {row: ", ".join(labels) for row, labels in found.items()}


def _sites(gm: fx.GraphModule, regions: Sequence[Region]) -> dict[str, dict[Side, list[str]]]:
    """Which cuts, each by itself, put an adaptor beside an operator, and on which side of it."""
    found: defaultdict[str, dict[Side, list[str]]] = defaultdict(dict)
    for region in regions:
        for site in find_sites(gm, [region]).sites:
            found[site.operator].setdefault(site.side, []).append(region.label)
    return found


def _triangle(x: float, y: float, side: Side, cuts: Sequence[str]) -> str:
    tip = 8 if side is Side.POST else -8
    where = "behind" if side is Side.POST else "before"
    return (
        f'<path class="site" d="M{x - 4:g} {y + tip / 4:g}h8l-4 {tip * 0.75:g}z">'
        f"<title>adaptor {where} it, without {escape(', '.join(cuts))}</title></path>"
    )


def _name(gm: fx.GraphModule, node: fx.Node) -> str:
    module = ops.module_of(gm, node)
    what = node.name if node.op in ("placeholder", "output") else ops.op_name(gm, node)
    if module is not None:
        what = f"{node.target}  {type(module).__name__}"
    shape = ops.shape_of(node)
    return f"{what}  {' x '.join(map(str, shape[1:]))}" if shape else what
