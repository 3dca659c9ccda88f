"""Bounds of the numbers in a floating tensor, over all inputs.

They answer one question: can an added tensor hold a number that is low enough to hide a key? The rule for each operator
gives the bounds of its result from those of its operands. An operator without a rule, and every floating input, has no
bounds. So "bounded" is proven, and the absence of a low literal proves nothing.

Learned tensors are the exception. A parameter, and a product with one, has the magnitude of scores, whatever it reads:
their bounds are -1 and 1, in units of scores, so that the literals that multiply them count. A parameter that holds a
lower number than this now is bounded by what it holds: it is a mask that is kept as a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.graph.held import IS_PARAMETER, read_value
from neuron_attn_rewrite.graph.nodes import arguments, attribute, dtype, is_tensor, op_name, shape
from neuron_attn_rewrite.values.range_rules import BITS, LEARNED, RULES, UNBOUNDED, Range, range_of

MOST_STEPS = 100
"""A tensor behind more operators than these is taken to be unbounded."""
STEPS_OF_PRODUCT = 10
"""For how many operators a product counts: what lies behind a few of them says little about a mask."""
LARGE = 9984.0
"""A constant of this magnitude in a product is a mask: the product is unbounded."""
MATMULS = frozenset("matmul bmm mm addmm baddbmm linear".split())
PRODUCTS = MATMULS | frozenset("einsum conv1d conv2d conv3d convolution".split())
"""Operators whose results have the magnitude of scores if one operand is learned."""
ADDENDS = {
    **dict.fromkeys(("addmm", "baddbmm"), "self"),
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "convolution"), "bias"),
}
"""The argument that is added to a product."""
PIECES = frozenset("cat stack".split())


@dataclass
class Ranges:
    """The bounds of the tensors of one graph."""

    changed: frozenset[fx.Node]
    """Tensors that some node writes into: they have no bounds."""
    _known: dict[fx.Node, Range] = field(default_factory=dict)

    def of(self, value: Any, steps: int = 0) -> Range:
        """The bounds of an argument: a number, or a node's tensor."""
        if isinstance(value, (bool, int, float)):
            return range_of([float(value)])
        if not is_tensor(value) or steps > MOST_STEPS:
            return UNBOUNDED
        if value not in self._known:
            self._known[value] = self._of_node(value, steps + 1)
        return self._known[value]

    def _of_node(self, node: fx.Node, steps: int) -> Range:
        kind = dtype(node)
        if kind == torch.bool:
            return BITS
        if node in self.changed or kind.is_complex:
            return UNBOUNDED
        if node.op == "get_attr":
            return self._stored(node)
        found = UNBOUNDED
        if isinstance(node.target, torch._ops.OpOverload):
            name, given = op_name(node), arguments(node)
            if name in PRODUCTS:
                found = self._product(node, steps)
            elif name in RULES:
                get = self.factor if name == "layer_norm" else self.of
                found = RULES[name](lambda key: get(given.get(key), steps), node, given)
            elif name in PIECES:
                pieces = given[next(iter(given))]
                found = self.of(pieces[0], steps)
                for piece in pieces[1:]:
                    found = found | self.of(piece, steps)
        elif op_name(node) == "getitem" and isinstance(node.args[0], fx.Node):
            found = self._of_piece(node.args[0], node.args[1], steps)
        return _in_dtype(found, kind)

    def _of_piece(self, node: fx.Node, place: object, steps: int) -> Range:
        """One of the tensors that a split gives, or the values, not the indices, of a maximum or a sort."""
        is_split = op_name(node) in ("split", "split_with_sizes", "chunk", "unbind")
        is_value = op_name(node) in ("max", "min", "topk", "sort") and place == 0
        return self.of(node.args[0], steps) if is_split or is_value else UNBOUNDED

    def _stored(self, node: fx.Node) -> Range:
        held = attribute(node)
        if not isinstance(held, torch.nn.Parameter):
            held = read_value(node)  # a parameter may be trained, so no proof rests on its value
        if not isinstance(held, Tensor) or not held.numel():
            return UNBOUNDED
        is_learned = isinstance(held, torch.nn.Parameter)
        if held.is_meta:
            return LEARNED if is_learned else UNBOUNDED
        found = range_of(float(end) for end in held.detach().aminmax())
        return found | LEARNED if is_learned else found

    def factor(self, value: Any, steps: int = 0) -> Range:
        """As `of`, for a factor of a product, or a sink: a parameter is learned, even if its value is not known."""
        is_learned = is_tensor(value) and value.meta.get(IS_PARAMETER)
        return LEARNED if is_learned else self.of(value, steps)

    def _product(self, node: fx.Node, steps: int) -> Range:
        """A matrix product, a convolution or the like, and what is added to it."""
        steps += STEPS_OF_PRODUCT
        given = arguments(node)
        addend = ADDENDS.get(op_name(node), "")
        factors = pytree.tree_leaves([value for name, value in given.items() if name != addend])
        operands = [n for n in factors if is_tensor(n)]
        found = _sum_of_products(op_name(node) in MATMULS, operands, [self.factor(n, steps) for n in operands])
        found = found * self.of(given.get("alpha", 1))
        if given.get(addend) is None:
            return found
        return found + self.factor(given[addend], steps) * self.of(given.get("beta", 1))


def _sum_of_products(is_matmul: bool, operands: Sequence[fx.Node], ranges: Sequence[Range]) -> Range:
    """Learned if one of two operands is. Others may be two masks, or a mask that is moved: bounded if both are."""
    known = [r for r in ranges if r != UNBOUNDED]
    if len(ranges) < 2 or any(r.lowest <= -LARGE or LARGE <= r.highest < math.inf for r in known):
        return UNBOUNDED
    if any(r.is_learned for r in known):
        return LEARNED
    if not is_matmul or len(known) < len(ranges):
        return UNBOUNDED
    most = math.prod((r.magnitude for r in ranges), start=float(max(shape(operands[0]), default=1)))
    return range_of((-most, most))


def _in_dtype(found: Range, kind: torch.dtype) -> Range:
    """The bounds after the result is rounded to a dtype.

    An integer may wrap. A float may become infinite, or 0 if it is small: some machines have no subnormal numbers.
    """
    if not kind.is_floating_point:
        whole = torch.iinfo(kind)
        return found if whole.min <= found.lowest and found.highest <= whole.max else Range(whole.min, whole.max)
    info = torch.finfo(kind)
    lowest = found.lowest if found.lowest >= -info.max else -math.inf
    highest = found.highest if found.highest <= info.max else math.inf
    lowest, highest = (0.0 if abs(end) < info.tiny else end for end in (lowest, highest))
    return UNBOUNDED if math.isinf(lowest) and math.isinf(highest) else Range(lowest, highest, found.is_learned)
