"""Draws the graph of a site before and after: as SVG with a layered layout, and as DOT for Graphviz.

All nodes that only compute a mask are drawn as one box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from itertools import pairwise

from neuron_attn_rewrite.report.data import NodeReport, ReportData, SiteReport
from neuron_attn_rewrite.report.groups import groups

WIDTH, HEIGHT, GAP, LAYER = 152, 36, 14, 62


@dataclass(frozen=True)
class Box:
    """One node of a drawing."""

    name: str
    title: str
    detail: str
    role: str
    inputs: tuple[str, ...] = field(default=())


def boxes(nodes: Sequence[NodeReport]) -> list[Box]:
    """The boxes for the nodes of one side (before or after)."""
    masks = [n for n in nodes if n.role == "mask"]
    folded = {n.name for n in masks}
    own = {i for n in nodes if n.role != "mask" and not n.is_operand for i in n.inputs}
    drawn = [_box(n) for n in nodes if n.name not in folded and (not n.is_operand or n.name in own)]
    if masks:
        known = {b.name for b in drawn}
        inputs = tuple(dict.fromkeys(i for n in masks for i in n.inputs if i not in folded and i in known))
        count = f"{len(masks)} node{'s' * (len(masks) > 1)}"
        drawn.insert(0, Box("mask arithmetic", "mask arithmetic", count, "mask", inputs))
        drawn = [replace(b, inputs=_renamed(b.inputs, folded)) for b in drawn]
    return drawn


def _renamed(inputs: tuple[str, ...], folded: set[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys("mask arithmetic" if i in folded else i for i in inputs))


def _box(node: NodeReport) -> Box:
    title = node.op.split(".")[1] if node.op.count(".") > 1 else node.op
    if node.is_operand:
        title = node.name if node.role == "operand" else node.role
    if len(title) > 20:
        title = f"{title[:8]}…{title[-11:]}"
    shape = "" if node.shape is None else "×".join(map(str, node.shape)) or "scalar"
    kind = "" if node.dtype is None else str(node.dtype).removeprefix("torch.")
    role = "operand" if node.is_operand else node.role
    return Box(node.name, title, f"{shape} {SHORT.get(kind, kind)}".strip(), role, node.inputs)


SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64", "int64": "i64", "int32": "i32"}


@dataclass(frozen=True)
class Layout:
    """The place of each box and edge, in columns and layers."""

    at: Mapping[str, tuple[float, int]]
    """Column and layer of each box."""
    routes: Mapping[tuple[str, str], Sequence[tuple[float, int]]]
    """The points that each edge passes between its two boxes, one for each layer."""


def layout(drawn: Sequence[Box]) -> Layout:
    """Place each box below its inputs and near the mean column of its neighbours. Edges pass between boxes."""
    known = {b.name for b in drawn}
    read = {b.name: [i for i in dict.fromkeys(b.inputs) if i in known] for b in drawn}
    layer = _layers(read)
    inputs: dict[str, list[str]] = {name: [] for name in read}
    routes: dict[tuple[str, str], list[str]] = {}
    for i, name in [(i, box.name) for box in drawn for i in read[box.name]]:
        routes[i, name] = bends = [f"{i} > {name} {k}" for k in range(layer[i] + 1, layer[name])]
        for k, (upper, lower) in enumerate(pairwise([i, *bends, name]), layer[i] + 1):
            layer.setdefault(lower, k)
            inputs.setdefault(lower, []).append(upper)
    users: dict[str, list[str]] = {name: [] for name in inputs}
    for name in inputs:
        for i in inputs[name]:
            users[i].append(name)
    rows: dict[int, list[str]] = {}
    for name in inputs:
        rows.setdefault(layer[name], []).append(name)
    column = {name: float(i) for row in rows.values() for i, name in enumerate(row)}
    for sweep in range(10):
        joined = inputs if sweep % 2 == 0 else users
        for number in sorted(rows, reverse=sweep % 2 == 1):
            wanted = {n: _mean([column[j] for j in joined[n]], column[n]) for n in rows[number]}
            _spread(sorted(rows[number], key=wanted.__getitem__), wanted, column, known)
    left = min((column[name] - (0 if name in known else 0.5) for name in column), default=0.0)
    place = {name: (column[name] - left, layer[name]) for name in column}
    return Layout({n: place[n] for n in known}, {edge: [place[b] for b in bends] for edge, bends in routes.items()})


def _layers(inputs: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The layer of each box: one below its lowest input. A box without inputs is just above its first reader."""
    order = _ordered(inputs)
    layer: dict[str, int] = {}
    for name in order:
        layer[name] = max((layer[i] + 1 for i in inputs[name]), default=0)
    for name in order:
        readers = [layer[u] for u, read in inputs.items() if name in read]
        if readers and not inputs[name]:
            layer[name] = min(readers) - 1
    return layer


def _ordered(inputs: Mapping[str, Sequence[str]]) -> list[str]:
    """The names in topological order."""
    done: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in done:
            for i in inputs[name]:
                visit(i)
            done[name] = None

    for name in inputs:
        visit(name)
    return list(done)


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _spread(row: Sequence[str], wanted: Mapping[str, float], column: dict[str, float], known: set[str]) -> None:
    """Move the boxes of a row near their wanted columns without overlap, and keep the centre of the row.

    A bend of an edge needs less room than a box.
    """
    place: list[float] = []
    for i, name in enumerate(row):
        room = (0.5 if name in known else 0.12) + (0.5 if i and row[i - 1] in known else 0.12)
        place.append(max(wanted[name], place[-1] + room) if place else wanted[name])
    shift = _mean([wanted[n] - p for n, p in zip(row, place, strict=True)], 0.0)
    for name, p in zip(row, place, strict=True):
        column[name] = p + shift


def graph_svg(nodes: Sequence[NodeReport], label: str) -> str:
    """One side of a site as an SVG. The role of a node is the CSS class of its box."""
    drawn = boxes(nodes)
    if not drawn:
        return ""
    placed = layout(drawn)
    pitch = WIDTH + GAP
    corner = {name: (column * pitch + 1, row * LAYER + 1) for name, (column, row) in placed.at.items()}
    bends = [c * pitch + WIDTH / 2 for points in placed.routes.values() for c, _ in points]
    width = max([x + WIDTH for x, _ in corner.values()] + bends) + 1
    height = max(y for _, y in corner.values()) + HEIGHT + 1
    roles = {box.name: box.role for box in drawn}
    edges = [
        _edge(
            corner[start],
            [(c * pitch + 1 + WIDTH / 2, row * LAYER + 1) for c, row in points],
            corner[end],
            roles[end],
        )
        for (start, end), points in placed.routes.items()
    ]
    shapes = [_shape(box, *corner[box.name]) for box in drawn]
    size = f"width:{width:.0f}px;min-width:{0.7 * width:.0f}px"
    return (
        f'<svg class="graph" viewBox="0 0 {width:.0f} {height:.0f}" style="{size}" role="img" '
        f'aria-label="{escape(label)}">{"".join(edges)}{"".join(shapes)}</svg>'
    )


def _edge(start: tuple[float, float], bends: Sequence[tuple[float, float]], end: tuple[float, float], role: str) -> str:
    """A curve that is vertical where it enters and leaves a layer, and straight beside the boxes of a layer."""
    x, y = start[0] + WIDTH / 2, start[1] + HEIGHT
    path = f"M{x:.0f} {y:.0f}"
    for u, v, straight in [*((u, v, HEIGHT) for u, v in bends), (end[0] + WIDTH / 2, end[1], 0)]:
        middle = (y + v) / 2
        path += f"C{x:.0f} {middle:.0f} {u:.0f} {middle:.0f} {u:.0f} {v:.0f}" + (f"v{straight}" if straight else "")
        x, y = u, v + straight
    return f'<path class="edge {role}" d="{path}"/>'


def _shape(box: Box, x: float, y: float) -> str:
    middle = x + WIDTH / 2
    title = f"{box.name}: {box.title} {box.detail}"
    return (
        f'<g class="node {box.role}"><title>{escape(title)}</title>'
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="7"/>'
        f'<text x="{middle:.0f}" y="{y + 15:.0f}">{escape(box.title)}</text>'
        f'<text class="detail" x="{middle:.0f}" y="{y + 28:.0f}">{escape(box.detail)}</text></g>'
    )


# DOT

DOT_STYLE = {
    "operand": "shape=box, style=rounded",
    "kept": "shape=box",
    "removed": 'shape=box, style="filled,dashed", fillcolor="#fde2e1"',
    "mask": 'shape=box, style="filled,dashed", fillcolor="#fde2e1"',
    "added": 'shape=box, style=filled, fillcolor="#d8f3dc"',
}


def to_dot(report: ReportData) -> str:
    lines = ["digraph rewrite {", "  rankdir=TB; node [fontname=Helvetica, fontsize=10];"]
    for number, group in enumerate(groups(report)):
        lines.append(f"  subgraph cluster_{number} {{ label={_quoted(group.name)};")
        for side, nodes in sides(group.first):
            lines.append(f"    subgraph cluster_{number}_{side} {{ label={side};")
            drawn = boxes(nodes)
            names = {b.name for b in drawn}
            for box in drawn:
                here = f"{number} {side} {box.name}"
                style = DOT_STYLE[box.role]
                lines.append(f"      {_quoted(here)} [label={_quoted(f'{box.title}<br>{box.detail}')}, {style}];")
                lines += [
                    f"      {_quoted(f'{number} {side} {i}')} -> {_quoted(here)};" for i in box.inputs if i in names
                ]
            lines.append("    }")
        lines.append("  }")
    return "\n".join([*lines, "}"]) + "\n"


def sides(site: SiteReport) -> list[tuple[str, tuple[NodeReport, ...]]]:
    """The sides of a site that have nodes, with their names."""
    return [(side, nodes) for side, nodes in (("before", site.before), ("after", site.after)) if nodes]


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("<br>", "\\n") + '"'
