"""Drafts that bring a tensor into another layout or dtype, or back to the tensor that it was cut from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from neuron_attn_rewrite.graph.drafts import draft
from neuron_attn_rewrite.graph.nodes import dtype, shape
from neuron_attn_rewrite.graph.sizes import is_number
from neuron_attn_rewrite.patterns import views
from neuron_attn_rewrite.patterns.axes import Layout, run_layout
from neuron_attn_rewrite.patterns.rules import Blocked
from neuron_attn_rewrite.reasons import Reason

aten = torch.ops.aten
LAYOUT_OPS = {"reshape": aten.reshape.default, "permute": aten.permute.default, "expand": aten.expand.default}


def moved(at: fx.Node, node: fx.Node, layout: Layout) -> fx.Node:
    """The tensor after the steps of a layout.

    Raises:
        Blocked: a step needs a size that is a symbol.
    """
    result = run_layout(layout, node, lambda op, value, arg: draft(at, LAYOUT_OPS[op], value, _given(at, op, arg)))
    assert isinstance(result, fx.Node)
    return result


def _given(at: fx.Node, op: str, arg: tuple[int, ...]) -> list[int]:
    """The order of a permute, or sizes: a single symbol is left to reshape."""
    open_sizes = [] if op == "permute" else [size for size in arg if not is_number(size)]
    if len(open_sizes) > (op == "reshape"):
        raise Blocked(at, Reason("key-blocks", "its parts have open sizes"))
    return [-1 if size in open_sizes else size for size in arg]


def uncut(at: fx.Node, pieces: Sequence[fx.Node], dim: int) -> fx.Node | None:
    """The tensor, or the part of it, that was cut into these pieces along a dim, such as a cache."""
    first = views.cut(pieces[0])
    if first is None:
        return None
    source, _, start = first
    stop = start
    for piece in pieces:
        if views.cut(piece) != (source, dim, stop):
            return None
        stop += shape(piece)[dim]
    is_whole = start == 0 and stop == shape(source)[dim]
    return source if is_whole else draft(at, aten.slice.Tensor, source, dim, start, stop)


def cast(at: fx.Node, node: fx.Node, kind: torch.dtype) -> fx.Node:
    return node if dtype(node) == kind else draft(at, aten.to.dtype, node, kind)
