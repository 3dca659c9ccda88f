"""The pictures of the documentation, drawn by what draws reports."""

from __future__ import annotations

import re

import torch

from neuron_attn_rewrite.masks.spec import Band, Chunked, Intervals, KeyPadding, MaskSpec, Unproven
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.report.data import NodeReport, SiteReport
from neuron_attn_rewrite.report.drawing import graph_svg
from neuron_attn_rewrite.report.pictures import mask_svg

STYLE = """
svg {
  font: 12px system-ui, "DejaVu Sans", sans-serif;
  --ink: #1b2430; --soft: #5d6878; --field: #e9edf3; --accent: #3557c8; --warn: #a15c00
}
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6eaf0; --soft: #98a4b5; --field: #262f3d; --accent: #8ba6ff; --warn: #f0b45c }
}
text { fill: var(--ink); text-anchor: middle } .soft { fill: var(--soft) }
.field { fill: var(--field) } .seen { fill: var(--accent) } .dense { fill: url(#dots) } .padding { fill: url(#hatch) }
.unknown { fill: var(--soft); font-size: 34px }
"""

GALLERY = (
    ("none", MaskSpec(), None),
    ("causal(offset=0)", MaskSpec((Band(upper=0),)), None),
    ("sliding_window(24)", MaskSpec((Band(-23, 0),)), None),
    ("window(left=8, right=8)", MaskSpec((Band(-8, 8),)), None),
    ("chunked(16)", MaskSpec((Chunked(16),)), None),
    ("causal & chunked(16)", MaskSpec((Band(upper=0), Chunked(16))), None),
    ("prefix of 20 keys", MaskSpec((Intervals(tuple((0, max(20, i + 1)) for i in range(64))),)), None),
    ("causal & key padding", MaskSpec((Band(upper=0), KeyPadding("attention_mask"))), None),
    ("causal, and a dense bias", MaskSpec((Band(upper=0),)), (1, 1, 64, 64)),
    ("unproven", Unproven(Reason("mask-computed", "it depends on a weight")), None),
)


def gallery() -> str:
    """Every kind of mask as a report draws it."""
    pieces = []
    for i, (words, mask, bias) in enumerate(GALLERY):
        x, y = 28 + 150 * (i % 5), 12 + 122 * (i // 5)
        site = SiteReport("", "", batch=1, num_heads=1, q_len=64, kv_len=64, dtype=torch.float32, mask=mask, bias=bias)
        drawn = mask_svg(site).replace("<svg ", f'<svg x="{x}" y="{y}" width="82" height="89" ', 1)
        pieces.append(f'{drawn}<text x="{x + 40}" y="{y + 104}">{words.replace("&", "&amp;")}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 770 250" width="770" height="250"><style>{STYLE}</style>'
        '<defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="2.4" height="5" style="fill:var(--accent)"/></pattern>'
        '<pattern id="dots" width="6" height="6" patternUnits="userSpaceOnUse">'
        '<circle cx="3" cy="3" r="1.25" style="fill:var(--warn)"/></pattern></defs>' + "".join(pieces) + "</svg>\n"
    )


WAY = (
    ("capture", "one graph of", "ATen operators"),
    ("find", "AttentionSite", "or unknown"),
    ("prove", "MaskSpec", "or Unproven"),
    ("choose", "Decision", "and every rule"),
    ("replace", "kernel calls", "beside the old"),
    ("verify", "old and new", "on one run"),
    ("report", "what, why,", "and how exact"),
)
"""The steps of a rewrite, and what comes out of each."""


def way() -> str:
    """The steps in a row, and where the graph starts to change."""
    width, pitch = 104, 122
    pieces = []
    for i, (step, first, second) in enumerate(WAY):
        x, kind = 8 + i * pitch, "pure" if i < 4 else "acts"
        pieces.append(
            f'<rect class="{kind}" x="{x}" y="12" width="{width}" height="62" rx="9"/>'
            f'<text class="step" x="{x + width / 2:.0f}" y="33">{step}</text>'
            f'<text class="soft" x="{x + width / 2:.0f}" y="50">{first}</text>'
            f'<text class="soft" x="{x + width / 2:.0f}" y="65">{second}</text>'
        )
        if i:
            pieces.append(f'<path class="arrow" d="M{x - pitch + width + 2} 43h{pitch - width - 7}"/>')
    end = 8 + 3 * pitch + width
    pieces.append(
        f'<path class="brace" d="M10 84v7h{end - 12}v-7"/>'
        f'<text class="soft" x="{(end + 8) / 2:.0f}" y="110">the graph is only read</text>'
    )
    back = 8 + 4 * pitch + width / 2
    pieces.append(
        f'<path class="back" d="M{back + pitch:.0f} 76c0 26 -{pitch} 26 -{pitch} 2"/>'
        f'<text class="soft" x="{back + pitch / 2:.0f}" y="112">what differs is put back</text>'
    )
    style = """
    .step { font-size: 14px; font-weight: 600 } .soft { font-size: 11px }
    rect { stroke: var(--accent); fill: none; stroke-width: 1.4 } .acts { stroke: var(--warn) }
    path { fill: none; stroke: var(--soft); stroke-width: 1.3 }
    .arrow, .back { marker-end: url(#tip) }
    """
    total = 8 * 2 + 6 * pitch + width
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} 122" width="{total}" height="122">'
        f"<style>{STYLE}{style}</style>"
        '<defs><marker id="tip" markerWidth="7" markerHeight="7" refX="5" refY="3.5" orient="auto">'
        '<path d="M1 1l4 2.5l-4 2.5"/></marker></defs>' + "".join(pieces) + "</svg>\n"
    )


def before_and_after() -> str:
    """The drawn graphs of one hand-written attention, before and after its rewrite."""
    shape = {"q": (1, 8, 512, 64), "k": (1, 2, 512, 64), "v": (1, 2, 512, 64), "s": (1, 8, 512, 512)}

    def node(name: str, op: str, inputs: str, size: str, role: str) -> NodeReport:
        call = f"torch.ops.aten.{op}.default()" if op else ""
        return NodeReport(name, call, tuple(inputs.split()), shape[size], torch.bfloat16, role)

    before = [
        node("query", "", "", "q", "query"),
        node("key", "", "", "k", "key"),
        node("value", "", "", "v", "value"),
        node("mask_1", "arange", "", "s", "mask"),
        node("mask_2", "le", "mask_1", "s", "mask"),
        node("mask_3", "logical_and", "mask_2", "s", "mask"),
        node("rk", "repeat_interleave", "key", "q", "removed"),
        node("rv", "repeat_interleave", "value", "q", "removed"),
        node("mm", "matmul", "query rk", "s", "removed"),
        node("mul", "mul", "mm", "s", "removed"),
        node("fill", "masked_fill", "mul mask_3", "s", "removed"),
        node("softmax", "softmax", "fill", "s", "removed"),
        node("out", "matmul", "softmax rv", "q", "removed"),
    ]
    after = [*before[:3], node("flash", "flash_fwd", "query key value", "q", "added")]
    left, right = graph_svg(before, "before"), graph_svg(after, "after")
    style = """
    .node rect { fill: none; stroke: var(--soft) } .node text { font-weight: 600 } .node .detail { font-weight: 400;
      font-size: 10.5px; fill: var(--soft) }
    .operand rect { stroke: none; fill: var(--field) } .operand text { font-weight: 400 }
    .removed rect, .mask rect { stroke: #c2413a; stroke-dasharray: 4 3 }
    .added rect { stroke: #14804a; stroke-width: 2 }
    .edge { fill: none; stroke: var(--soft); opacity: .6 }
    """
    sizes = [tuple(map(int, re.findall(r'viewBox="0 0 (\d+) (\d+)"', side)[0])) for side in (left, right)]
    (width, height), (more, _) = sizes
    placed = [
        re.sub(r'style="[^"]*"', f'x="{x}" y="30" width="{w}" height="{h}"', side, count=1)
        for side, x, (w, h) in ((left, 10, sizes[0]), (right, width + 70, sizes[1]))
    ]
    total = width + more + 80
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height + 40}" width="{total}" '
        f'height="{height + 40}"><style>{STYLE}{style}</style>'
        f'<text class="soft" x="{10 + width / 2:.0f}" y="18">before</text>'
        f'<text class="soft" x="{70 + width + more / 2:.0f}" y="18">after</text>{"".join(placed)}</svg>\n'
    )
