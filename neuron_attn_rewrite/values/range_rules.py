"""Bounds of numbers, and the rule of each operator: the bounds of its result from those of its operands."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from neuron_attn_rewrite.graph.nodes import dtype, shape


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
        return range_of(ends, self.is_learned or other.is_learned)

    def __add__(self, other: Range) -> Range:
        ends = (self.lowest + other.lowest, self.highest + other.highest)
        return range_of(ends, self.is_learned or other.is_learned)

    def __neg__(self) -> Range:
        return Range(-self.highest, -self.lowest, self.is_learned)

    def __mul__(self, other: Range) -> Range:
        ends = [_times(a, b) for a in (self.lowest, self.highest) for b in (other.lowest, other.highest)]
        return range_of(ends, self.is_learned or other.is_learned)

    def through(self, function: Callable[[float], float]) -> Range:
        """The bounds behind a function that never decreases."""
        return Range(function(self.lowest), function(self.highest), self.is_learned)


UNBOUNDED = Range()
BITS = Range(0.0, 1.0)
LEARNED = Range(-1.0, 1.0, is_learned=True)


def range_of(ends: Any, is_learned: bool = False) -> Range:
    ends = list(ends)
    return UNBOUNDED if any(math.isnan(end) for end in ends) else Range(min(ends), max(ends), is_learned)


def _times(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b


Given = Mapping[str, Any]
Rule = Callable[[Callable[[str], Range], fx.Node, Given], Range]


def _alpha(given: Given) -> Range:
    alpha = given.get("alpha", 1)
    return range_of([float(alpha)]) if isinstance(alpha, (int, float)) else UNBOUNDED


def _inverse(of: Range) -> Range:
    if of.is_learned:
        return LEARNED
    return UNBOUNDED if of.lowest <= 0 <= of.highest else range_of([1 / of.lowest, 1 / of.highest])


def _power(r: Callable[[str], Range], node: fx.Node, given: Given) -> Range:
    of, exponent = r("self"), given.get("exponent")
    if isinstance(exponent, int) and 0 < exponent <= 8 and of != UNBOUNDED:
        most = math.prod([of.magnitude] * exponent)
        return Range(0.0 if exponent % 2 == 0 else -most, most, of.is_learned)
    base, exponents = given["self"], r("exponent")
    if isinstance(base, (int, float)) and base >= 1 and not exponents.is_learned:
        return exponents.through(lambda x: base**x if x * math.log(base) < 700 else math.inf)
    return UNBOUNDED


def _clamped(r: Callable[[str], Range], node: fx.Node, given: Given) -> Range:
    found = r("self")
    for name in ("min", "min_val"):
        if given.get(name) is not None:
            low = r(name)
            found = Range(max(found.lowest, low.lowest), max(found.highest, low.highest), found.is_learned)
    for name in ("max", "max_val"):
        if given.get(name) is not None:
            high = r(name)
            found = Range(min(found.lowest, high.lowest), min(found.highest, high.highest), found.is_learned)
    return found


def _cast(r: Callable[[str], Range], node: fx.Node, given: Given) -> Range:
    """A cast. A float that is no number becomes any integer."""
    to_integer = dtype(given["self"]).is_floating_point and not dtype(node).is_floating_point
    return UNBOUNDED if to_integer else r("self")


def _layer_norm(r: Callable[[str], Range], node: fx.Node, given: Given) -> Range:
    """Numbers of the size of scores, whatever is normalised, times a weight, plus a bias."""
    found = LEARNED if given["weight"] is None else LEARNED * r("weight")
    return found if given["bias"] is None else found + r("bias")


def _larger(r: Callable[[str], Range], node: fx.Node, given: Given) -> Range:
    a, b = r("self"), r("other") if "other" in given else r("self")
    return Range(max(a.lowest, b.lowest), max(a.highest, b.highest), a.is_learned or b.is_learned)


def _arange(r: Callable[[str], Range], node: fx.Node, given: Given) -> Range:
    found = range_of([0.0]) if given.get("start") is None else r("start")
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


def _rsqrt(r: Callable[[str], Range], node: fx.Node, given: Given) -> Range:
    of = r("self")
    if of.lowest <= 0:
        return UNBOUNDED
    inverse = _inverse(of)
    return inverse if of.is_learned else inverse.through(math.sqrt)


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
        lift_fresh_copy lift_fresh flip roll repeat repeat_interleave diagonal tile as_strided
        amax amin mean unfold _reshape_alias
        """.split(),
        _from("self"),
    ),
    **dict.fromkeys(("to", "_to_copy", "type_as"), _cast),
    **dict.fromkeys(("full", "full_like", "new_full"), _from("fill_value")),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _constant(1.0, 1.0)),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _constant(0.0, 0.0)),
    **dict.fromkeys(("tril", "triu"), lambda r, node, given: r("self") | range_of([0.0])),
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
    "layer_norm": _layer_norm,
    "log1p": lambda r, node, given: r("self").through(math.log1p) if r("self").lowest >= 0 else UNBOUNDED,
    "log2": lambda r, node, given: _log(r, node, given) * Range(1.4, 1.5),
    "exp": _exp,
    "rsqrt": _rsqrt,
    "sqrt": lambda r, node, given: r("self").through(math.sqrt) if r("self").lowest >= 0 else UNBOUNDED,
    "square": lambda r, node, given: Range(0.0, math.prod([r("self").magnitude] * 2), r("self").is_learned),
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
    "constant_pad_nd": lambda r, node, given: r("self") | range_of([float(given.get("value") or 0.0)]),
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
