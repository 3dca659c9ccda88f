"""Draws the operands of attentions, so large that the softmax prefers some keys. Then a wrong mask shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, fx

from neuron_attn_rewrite.graph.drafts import without_drafts
from neuron_attn_rewrite.graph.held import VALUE_READ
from neuron_attn_rewrite.graph.nodes import op_name, shape, tensor
from neuron_attn_rewrite.graph.sizes import at, number_of
from neuron_attn_rewrite.patterns import views
from neuron_attn_rewrite.replace.graft import Graft
from neuron_attn_rewrite.replace.running import needed

if TYPE_CHECKING:
    import sympy  # type: ignore[import-untyped]

SPREAD = 3.0
"""The standard deviation of the scores before the masks."""

Maker = Callable[[Generator], Tensor]


def drawn_operands(
    grafts: Sequence[Graft], changed: frozenset[fx.Node], sizes: Mapping[sympy.Symbol, int]
) -> tuple[list[Graft], dict[fx.Node, Maker]]:
    """The attentions that can be compared on drawn operands, and how each operand is drawn.

    An attention is left out if something between its operands and its output is written in place. An operand is
    computed and not drawn if a mask depends on it, unless it is an input, if it lies inside another attention, or if it
    is a piece of another operand: a value may be the first features of the keys.

    Args:
        grafts: the kernel calls.
        changed: the tensors that are written in place.
        sizes: the sizes of the example inputs.
    """
    makers: dict[fx.Node, Maker] = {}
    behind_masks = needed([term.node for g in grafts for term in g.verdict.site.terms], ())
    computed = {node for node in behind_masks if node.op != "placeholder"}
    fit = []
    for g in grafts:
        own = _operands(g, sizes)
        between = needed((g.verdict.site.output, g.result), own) - own.keys()
        computed |= between | {node for node in own if _is_piece(node, own)}
        if not between & changed:
            fit.append(g)
            makers = own | makers
    return fit, {node: make for node, make in makers.items() if node not in computed}


def _is_piece(node: fx.Node, of: Mapping[fx.Node, Maker]) -> bool:
    """Whether a tensor has elements of one of these tensors, and no others."""
    while (cut := views.cut(node)) is not None or views.keeps_values(node) or op_name(node) in views.MOVES:
        node = cut[0] if cut else views.source(node)
        if node in of:
            return True
    return False


def _operands(graft: Graft, sizes: Mapping[sympy.Symbol, int]) -> dict[fx.Node, Maker]:
    """The tensors from which both the attention and its kernel call start."""
    assert graft.verdict.form
    site, example = graft.verdict.form.site, graft.verdict.example
    gain = (SPREAD / (abs(example.scale) * example.head_dim**0.5 or 1.0)) ** 0.5
    normal, positive = (lambda s, g: torch.randn(s, generator=g)), (lambda s, g: torch.rand(s, generator=g) + 0.5)
    found = [(node, normal, gain) for node in graft.verdict.form.starts]
    found += [(scale.operand.node, positive, 1.0) for scale in site.operand_scales]
    found += [(site.sink.node, normal, 1.0)] if site.sink else []
    makers: dict[fx.Node, Maker] = {}
    for node, draw, factor in ((n, *how) for operand, *how in found for n in without_drafts([operand])):
        value = tensor(node)
        if VALUE_READ not in node.meta and value is not None and value.is_floating_point():
            makers.setdefault(node, _maker(node, draw, factor, sizes))
    return makers


def _maker(
    node: fx.Node, draw: Callable[[list[int], Generator], Tensor], factor: float, sizes: Mapping[sympy.Symbol, int]
) -> Maker:
    """Draws a tensor with the shape, the dtype and the order of dims in memory that the node has."""
    value = tensor(node)
    assert value is not None
    lengths = [at(size, sizes) for size in shape(node)]
    strides = [at(number_of(stride), sizes) for stride in value.stride()]
    order = sorted(range(len(lengths)), key=lambda dim: -strides[dim])
    back = [order.index(dim) for dim in range(len(lengths))]
    kind, device = value.dtype, value.device

    def make(g: Generator) -> Tensor:
        return (draw([lengths[dim] for dim in order], g) * factor).to(device, kind).permute(back)

    return make
