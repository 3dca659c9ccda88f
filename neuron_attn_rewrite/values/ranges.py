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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from neuron_attn_rewrite.graph.held import read_value
from neuron_attn_rewrite.graph.nodes import arguments, attribute, dtype, is_tensor, op_name, shape, tensor

MOST_STEPS = 100
"""A tensor behind more operators than these is taken to be unbounded."""
STEPS_OF_PRODUCT = 10
"""For how many operators a product counts: what lies behind a few of them says little about a mask."""
LARGE = 9984.0
"""A constant of this magnitude in a product is a mask: the product is unbounded."""


@dataclass(frozen=True)
class Range:
    """The smallest and the largest number, over all elements and all inputs."""

    lowest: float = -math.inf
    highest: float = math.inf
    is_learned: bool = False
    """Whether the bounds are those of a learned tensor, and not proven."""

    @property
    def magnitude(self) -> float:
        return max(abs(self.lowest), abs(self.highest))

    def __or__(self, other: Range) -> Range:
        """The bounds of a tensor whose elements come from either."""
        ends = (self.lowest, self.highest, other.lowest, other.highest)
        return _range(ends, self.is_learned or other.is_learned)

    def __add__(self, other: Range) -> Range:
        return Range(self.lowest + other.lowest, self.highest + other.highest, self.is_learned or other.is_learned)

    def __neg__(self) -> Range:
        return Range(-self.highest, -self.lowest, self.is_learned)

    def __mul__(self, other: Range) -> Range:
        ends = [_times(a, b) for a in (self.lowest, self.highest) for b in (other.lowest, other.highest)]
        return _range(ends, self.is_learned or other.is_learned)

    def through(self, function: Callable[[float], float]) -> Range:
        """The bounds behind a function that never decreases."""
        return Range(function(self.lowest), function(self.highest), self.is_learned)


UNBOUNDED = Range()
BITS = Range(0.0, 1.0)
LEARNED = Range(-1.0, 1.0, is_learned=True)


def _range(ends: Any, is_learned: bool = False) -> Range:
    ends = list(ends)
    return UNBOUNDED if any(math.isnan(end) for end in ends) else Range(min(ends), max(ends), is_learned)


def _times(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b


@dataclass
class Ranges:
    """The bounds of the tensors of one graph."""

    changed: frozenset[fx.Node]
    """Tensors that some node writes into: they have no bounds."""
    _known: dict[fx.Node, Range] = field(default_factory=dict)

    def of(self, value: Any, steps: int = 0) -> Range:
        """The bounds of an argument: a number, or a node's tensor."""
        if isinstance(value, (bool, int, float)):
            return _range([float(value)])
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
                found = RULES[name](lambda key: self.of(given.get(key), steps), node, given)
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
        found = _range(float(end) for end in held.detach().aminmax())
        return found | LEARNED if is_learned else found

    def _product(self, node: fx.Node, steps: int) -> Range:
        """A matrix product, a convolution or the like: learned, unless it only combines constants or 0/1 tensors."""
        steps += STEPS_OF_PRODUCT
        given = [n for n in node.all_input_nodes if is_tensor(n) and dtype(n).is_floating_point]
        if op_name(node) == "einsum" and len(given) == 1:
            return UNBOUNDED  # a movement or a sum of one tensor, which may be a mask
        if op_name(node) in ("addmm", "baddbmm"):
            values = arguments(node)
            if values["beta"] != 0 and self.of(values["self"], steps) == UNBOUNDED:
                return UNBOUNDED  # the addend may be a mask
        operands = [self.of(n, steps) for n in given]
        known = [r for r in operands if r != UNBOUNDED]
        if any(r.lowest <= -LARGE or LARGE <= r.highest < math.inf for r in known):
            return UNBOUNDED
        if not known or any(r.is_learned for r in known):
            return LEARNED
        if len(known) < len(operands) or op_name(node) not in MATMULS or len(operands) != 2:
            return UNBOUNDED
        first = tensor(node.all_input_nodes[0])
        assert first is not None
        most = operands[0].magnitude * operands[1].magnitude * max(first.shape, default=1)
        return Range(-most, most)


def _in_dtype(found: Range, kind: torch.dtype) -> Range:
    """The bounds after the result is rounded to a dtype: an integer may wrap, a float may become infinite."""
    if not kind.is_floating_point:
        info = torch.iinfo(kind)
        return found if info.min <= found.lowest and found.highest <= info.max else Range(info.min, info.max)
    largest = torch.finfo(kind).max
    lowest = found.lowest if found.lowest >= -largest else -math.inf
    highest = found.highest if found.highest <= largest else math.inf
    return UNBOUNDED if math.isinf(lowest) and math.isinf(highest) else Range(lowest, highest, found.is_learned)


MATMULS = frozenset("matmul bmm mm".split())
PRODUCTS = MATMULS | frozenset("addmm baddbmm linear einsum conv1d conv2d conv3d convolution layer_norm".split())
"""Operators whose results have the magnitude of scores if one operand is learned, or if nothing is known of them."""
PIECES = frozenset("cat stack".split())

Given = Mapping[str, Any]
Rule = Callable[[Callable[[str], Range], fx.Node, Given], Range]


def _alpha(given: Given) -> Range:
    alpha = given.get("alpha", 1)
    return _range([float(alpha)]) if isinstance(alpha, (int, float)) else UNBOUNDED


def _inverse(of: Range) -> Range:
    if of.is_learned:
        return LEARNED
    return UNBOUNDED if of.lowest <= 0 <= of.highest else _range([1 / of.lowest, 1 / of.highest])


def _power(r: Callable[[str], Range], node: fx.Node, given: Given) -> Range:
    of, exponent = r("self"), given.get("exponent")
    if isinstance(exponent, int) and 0 < exponent <= 8 and of != UNBOUNDED:
        most = of.magnitude**exponent
        return Range(0.0 if exponent % 2 == 0 else -most, most, of.is_learned)
    base, exponents = given["self"], r("exponent")
    if isinstance(base, (int, float)) and base >= 1 and not exponents.is_learned:
        return exponents.through(lambda x: base**x if x * math.log(base) < 700 else math.inf)
    return UNBOUNDED


def _clamped(r: Callable[[str], Range], node: fx.Node, given: Given) -> Range:
    found = r("self")
    if given.get("min") is not None:
        low = r("min")
        found = Range(max(found.lowest, low.lowest), max(found.highest, low.highest), found.is_learned)
    if given.get("max") is not None:
        high = r("max")
        found = Range(min(found.lowest, high.lowest), min(found.highest, high.highest), found.is_learned)
    return found


def _larger(r: Callable[[str], Range], node: fx.Node, given: Given) -> Range:
    a, b = r("self"), r("other") if "other" in given else r("self")
    return Range(max(a.lowest, b.lowest), max(a.highest, b.highest), a.is_learned or b.is_learned)


def _arange(r: Callable[[str], Range], node: fx.Node, given: Given) -> Range:
    found = _range([0.0]) if given.get("start") is None else r("start")
    return found | r("end")


def _summed(r: Callable[[str], Range], node: fx.Node, given: Given) -> Range:
    """A sum, of as many elements as there are along the dims, or of fewer."""
    dims = given.get("dim")
    source = given["self"]
    sizes = shape(source)
    along = range(len(sizes)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return (r("self") * Range(0.0, float(math.prod(sizes[d] for d in along)))) | r("self")


def _log(r: Callable[[str], Range], node: fx.Node, given: Given) -> Range:
    of = r("self")
    return of.through(math.log) if of.lowest > 0 and of.highest < math.inf and not of.is_learned else UNBOUNDED


def _exp(r: Callable[[str], Range], node: fx.Node, given: Given) -> Range:
    return r("self").through(lambda x: math.exp(x) if x < 700 else math.inf)


def _rounded(of: Range, given: Given) -> Range:
    """A number rounded to an integer, in either direction."""
    if of.is_learned or of == UNBOUNDED:
        return of
    return UNBOUNDED if given.get("decimals") else Range(_whole(of.lowest, math.floor), _whole(of.highest, math.ceil))


def _whole(end: float, rounding: Callable[[float], int]) -> float:
    return float(rounding(end)) if math.isfinite(end) else end


def _softplus(r: Callable[[str], Range], node: fx.Node, given: Given) -> Range:
    of, beta = r("self"), given["beta"]
    if beta <= 0:
        return UNBOUNDED  # a negative beta turns the sign
    return Range(0.0, of.magnitude + 1.0 if beta == 1 and of != UNBOUNDED else math.inf)


def _constant(lowest: float, highest: float) -> Rule:
    return lambda r, node, given: Range(lowest, highest)


def _from(*keys: str) -> Rule:
    """The bounds of all these arguments together."""

    def rule(r: Callable[[str], Range], node: fx.Node, given: Given) -> Range:
        found = r(keys[0])
        for key in keys[1:]:
            found = found | r(key)
        return found

    return rule


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        """
        view reshape _unsafe_view flatten unflatten unsqueeze squeeze expand expand_as broadcast_to permute transpose t
        mT numpy_T movedim swapaxes slice select narrow index index_select gather clone contiguous alias detach
        lift_fresh_copy lift_fresh flip roll repeat repeat_interleave diagonal tile to _to_copy type_as as_strided
        amax amin mean unfold _reshape_alias
        """.split(),
        _from("self"),
    ),
    **dict.fromkeys(("full", "full_like", "new_full"), _from("fill_value")),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _constant(1.0, 1.0)),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _constant(0.0, 0.0)),
    **dict.fromkeys(("tril", "triu"), lambda r, node, given: r("self") | _range([0.0])),
    **dict.fromkeys(("sigmoid", "softmax", "_softmax", "eye", "one_hot", "hardsigmoid"), _constant(0.0, 1.0)),
    **dict.fromkeys(("tanh", "sin", "cos", "sign", "erf"), _constant(-1.0, 1.0)),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "hardtanh"), _clamped),
    **dict.fromkeys(("sum", "cumsum"), _summed),
    **dict.fromkeys(("floor", "ceil", "round"), lambda r, node, given: _rounded(r("self"), given)),
    "log": _log,
    "relu": lambda r, node, given: Range(max(0.0, r("self").lowest), max(0.0, r("self").highest), r("self").is_learned),
    "gelu": lambda r, node, given: Range(-1.0, max(0.0, r("self").highest), r("self").is_learned),
    "silu": lambda r, node, given: Range(-1.0, max(0.0, r("self").highest), r("self").is_learned),
    "softplus": _softplus,
    "log1p": lambda r, node, given: r("self").through(math.log1p) if r("self").lowest >= 0 else UNBOUNDED,
    "log2": lambda r, node, given: _log(r, node, given) * Range(1.4, 1.5),
    "exp": _exp,
    "rsqrt": lambda r, node, given: _inverse(r("self")).through(math.sqrt) if r("self").lowest > 0 else UNBOUNDED,
    "sqrt": lambda r, node, given: r("self").through(math.sqrt) if r("self").lowest >= 0 else UNBOUNDED,
    "square": lambda r, node, given: Range(0.0, r("self").magnitude ** 2, r("self").is_learned),
    "abs": lambda r, node, given: Range(0.0, r("self").magnitude, r("self").is_learned),
    "neg": lambda r, node, given: -r("self"),
    "add": lambda r, node, given: r("self") + r("other") * _alpha(given),
    "sub": lambda r, node, given: r("self") + -(r("other") * _alpha(given)),
    "rsub": lambda r, node, given: r("other") + -(r("self") * _alpha(given)),
    "mul": lambda r, node, given: r("self") * r("other"),
    "div": lambda r, node, given: r("self") * _inverse(r("other")),
    "reciprocal": lambda r, node, given: _inverse(r("self")),
    "pow": _power,
    **dict.fromkeys(("maximum", "max"), _larger),
    **dict.fromkeys(("minimum", "min"), lambda r, node, given: -_larger(lambda key: -r(key), node, given)),
    "where": _from("self", "other"),
    "masked_fill": _from("self", "value"),
    "constant_pad_nd": lambda r, node, given: r("self") | _range([float(given.get("value") or 0.0)]),
    "dropout": lambda r, node, given: UNBOUNDED if given["train"] and given["p"] else r("input"),
    "copy": _from("src"),
    "arange": _arange,
    "scalar_tensor": _from("s"),
    "embedding": _from("weight"),
    "index_put": lambda r, node, given: UNBOUNDED if given.get("accumulate") else r("self") | r("values"),
    "scatter": lambda r, node, given: (
        UNBOUNDED if given.get("reduce") else r("self") | r("src" if "src" in given else "value")
    ),
    "slice_scatter": _from("self", "src"),
    "select_scatter": _from("self", "src"),
    "floor_divide": lambda r, node, given: r("self") if r("other").lowest >= 1 else UNBOUNDED,
}
"""The bounds of an operator's result, given those of its arguments by their names."""
