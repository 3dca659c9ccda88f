"""The rules for what happens to the scores between the product of query and key and the softmax."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from neuron_attn_rewrite.graph.nodes import arguments, dtype, is_tensor, op_name, shape
from neuron_attn_rewrite.patterns import views
from neuron_attn_rewrite.patterns.axes import axis_dim
from neuron_attn_rewrite.patterns.features import peel_and_join
from neuron_attn_rewrite.patterns.join import Part, join
from neuron_attn_rewrite.patterns.peel import SCORES, Scores, Walk, scaled_by_number
from neuron_attn_rewrite.patterns.products import Product
from neuron_attn_rewrite.patterns.rules import DETACHED, Blocked
from neuron_attn_rewrite.patterns.site import Term
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.values.cells import CellTable, equal
from neuron_attn_rewrite.values.evaluator import Evaluator
from neuron_attn_rewrite.values.exact import largest, number_in, sums_are_fine

LARGEST_SHIFT = 1e3
"""The largest number that may be added to all scores of a row.

A shift does not change a softmax, but adding a larger number than this rounds the scores.
"""
LARGEST_COARSE_SHIFT = 1.0
"""The same in 16 bits."""


@SCORES("mul", "div", "neg")
def _scale(walk: Walk, scores: Scores) -> Scores:
    """A scale: a number is multiplied into the scale, a tensor is kept as a `TensorScale`."""
    node = scores.node
    scaled = scaled_by_number(walk.evaluator, node)
    if scaled is not None:
        return scores.to(scaled[0], trail="scale").scaled(scaled[1])
    left, right = node.args[:2]
    divides = op_name(node) == "div"
    if not is_tensor(left) or not is_tensor(right):
        raise Blocked(node, Reason("scale-unknown", "the scale is not a number"))
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    for inner, scale in ((left, right), (right, left))[: 1 if divides else 2]:
        if shape(inner) == shape(node) and shape(scale) != shape(node):
            return scores.scaled_by(scale, divides).to(inner, trail="tensor scale")
    raise Blocked(node, Reason("scale-unknown", "the scale differs from score to score"))


@SCORES("mul")
def _complement(walk: Walk, scores: Scores) -> Scores | None:
    """`x * b + c * (1 - b)` with a b of zeros and ones (GPT): c replaces the scores where b is 0."""
    node, term = scores.node, next(iter(scores.terms), None)
    for inner, kept in (node.args[:2], node.args[1::-1]):
        if not is_tensor(inner) or not is_tensor(kept) or shape(inner) != shape(node):
            continue
        if term and term.kind == "add" and term.dims == views.broadcast(kept, scores.dims):
            fill = _fill_where_zero(walk, kept, term.node)
            if fill is not None:
                shown = Term("show", kept, term.dims, fill=term.hiding(fill))
                return replace(scores.to(inner, trail="mask"), terms=(shown, *scores.terms[1:]))
    return None


def _fill_where_zero(walk: Walk, kept: fx.Node, filled: fx.Node) -> float | None:
    """The number that `filled` holds wherever `kept` is 0.

    None if it is not one number, if `filled` is not 0 wherever `kept` is 1, or if `kept` has other values.
    """
    tables = walk.tables(kept, filled)
    if tables is None:
        return None
    ones, fills = tables
    if any(bool(((t != 0) & (t != 1)).any()) for t in (ones.lo, ones.hi)):
        return None
    shown = CellTable(ones.lo.bool(), ones.hi.bool(), ones.cell)
    if not equal(shown, CellTable(fills.lo == 0, fills.hi == 0, fills.cell)):
        return None
    numbers = torch.cat([t[t != 0] for t in (fills.lo, fills.hi)])
    return float(numbers[0]) if numbers.numel() and bool((numbers == numbers[0]).all()) else None


@SCORES("add", "sub", "rsub")
def _add(walk: Walk, scores: Scores) -> Scores | tuple[Scores, Product]:
    """A sum. One side leads on to the product, and the other side is a term.

    A number, or a statistic of each row, changes no softmax and is dropped. Inside a softcap or with a sink it does
    change the result.
    """
    node = scores.node
    sign = 1.0 if op_name(node) == "add" else -1.0
    weight = arguments(node).get("alpha", 1)
    left, right = node.args[:2] if op_name(node) != "rsub" else node.args[1::-1]
    sides = [(left, right, 1.0, sign * weight), (right, left, sign * weight, 1.0)]
    blocked = Blocked(node, Reason("no-product", "neither side leads to a product"))
    for inner, other, inner_weight, other_weight in sides:
        if not is_tensor(inner) or shape(inner) != shape(node):
            continue
        shift = walk.constant(other)
        vanishes = scores.softcap is None and scores.sink is None and not scores.is_part
        if vanishes and shift is not None and _is_small(shift * other_weight, scores):
            return scores.shifted().to(inner, trail="shift").scaled(inner_weight)
        if not is_tensor(other):
            continue
        statistic = _row_statistic(other, inner, scores) if vanishes else ""
        if statistic and (inner_weight, other_weight) == (1.0, -1.0):
            found = scores.shifted().to(inner, trail="row maximum")
            found = replace(found, limit=largest(dtype(node)))
            if statistic != "mean" and not scores.terms and scores.multiplier > 0:
                found = replace(found, overflows=False)
            if statistic != "mean":
                return found
            peeled = walk.peel(found)
            if peeled[0].terms == found.terms:
                return peeled
            blocked = Blocked(node, Reason("order", "it subtracts the mean of scores that a mask may have lowered"))
            continue
        try:
            return walk.peel(scores.added(other, other_weight).to(inner, trail="add").scaled(inner_weight))
        except Blocked as error:
            blocked = error
    raise blocked


def _is_small(shift: float, scores: Scores) -> bool:
    """Whether adding a number to the scores rounds them little, also after what multiplies them later."""
    most = LARGEST_SHIFT if sums_are_fine(dtype(scores.node)) else LARGEST_COARSE_SHIFT
    return abs(shift) * scores.growth <= most


def _row_statistic(node: fx.Node, of: fx.Node, scores: Scores) -> str:
    """The operator if the node is a maximum, mean or log-sum-exp of each row of `of`; "" if it is none.

    Subtracting it changes no softmax. The mean of a row with a very low score is very low, and rounds the others.
    """
    dims = views.broadcast(node, scores.dims)
    while (moved := views.before(views.value_source(node, through_detach=True), dims)) is not None:
        node, dims = moved
    node = views.value_source(node, through_detach=True)
    if op_name(node) == "getitem" and node.args[1] == 0:
        node = views.source(node)
    if op_name(node) not in ("amax", "max", "logsumexp", "mean") or len(node.args) < 2:
        return ""
    given = node.args[1]
    reduced = [d for d in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(d, int)]
    rank = len(scores.dims)
    keys = [i for i, dim in enumerate(scores.dims) if dim == scores.axes[scores.key_dim]]
    if (
        views.value_source(views.source(node), through_detach=True) is not views.value_source(of, through_detach=True)
        or [i % rank for i in reduced] != keys
    ):
        return ""
    kept = len(dims) == rank
    wanted = tuple(() if i in keys else dim for i, dim in enumerate(scores.dims) if kept or i not in keys)
    return op_name(node) if dims == wanted else ""


@SCORES("masked_fill")
def _masked_fill(walk: Walk, scores: Scores) -> Scores:
    inner, mask, value = scores.node.args[:3]
    return _filled(scores, inner, mask, walk.constant(value), where=True)


@SCORES("where")
def _where(walk: Walk, scores: Scores) -> Scores:
    node = scores.node
    if len(node.args) != 3:
        raise Blocked(node, Reason("fill-unknown", "it has no replacement value"))
    mask, yes, no = node.args
    for inner, other, where in ((yes, no, False), (no, yes, True)):
        fill = uniform(walk.evaluator, other)
        if fill is not None:
            return _filled(scores, inner, mask, fill, where)
    raise Blocked(node, Reason("fill-unknown", "neither side is a number"))


def uniform(evaluator: Evaluator, value: object) -> float | None:
    """The number that fills a tensor, such as full_like(scores, finfo.min)."""
    number = evaluator.constant(value)
    if number is None and isinstance(value, fx.Node) and op_name(value) in ("full_like", "full", "new_full"):
        number = evaluator.constant(arguments(value)["fill_value"])
        number = None if number is None else number_in(dtype(value), number)
    if number is None and isinstance(value, fx.Node) and op_name(value) in ("zeros_like", "zeros", "new_zeros"):
        number = 0.0
    if number is None and isinstance(value, fx.Node) and op_name(value) in ("ones_like", "ones", "new_ones"):
        number = 1.0
    return number


def _filled(scores: Scores, inner: object, mask: object, fill: float | None, where: bool) -> Scores:
    node = scores.node
    if fill is None or not is_tensor(inner) or not is_tensor(mask) or shape(inner) != shape(node):
        raise Blocked(node, Reason("fill-unknown", "the filled value is not a number"))
    return scores.hidden(mask, fill, where).to(inner, trail="masked_fill" if where else "where")


@SCORES("clamp", "clamp_min", "maximum")
def _clamp(walk: Walk, scores: Scores) -> Scores:
    """A lower limit that changes nothing but -inf: `max(scores, finfo.min)`."""
    node = scores.node
    values = arguments(node)
    lower, upper = walk.constant(values.get("min", values.get("other"))), values.get("max")
    inner = node.args[0]
    if lower is None or upper is not None or not isinstance(inner, fx.Node) or shape(inner) != shape(node):
        raise Blocked(node, Reason("limit", "a limit that could change scores"))
    if not dtype(inner).is_floating_point:
        raise Blocked(node, Reason("limit", "a limit that could change scores"))
    if not lower <= max(0.9 * torch.finfo(dtype(inner)).min, -1e30) or scores.terms or scores.multiplier != 1.0:
        raise Blocked(node, Reason("limit", "a limit that could change scores"))
    return replace(scores.to(inner, trail="clamp"), floor=lower)


@SCORES("tanh")
def _tanh(walk: Walk, scores: Scores) -> Scores:
    """`c * tanh(x / c)`: the multiplier found so far is c, and what follows on the way back is the scale inside."""
    if scores.softcap is not None or scores.tensor_scales or scores.multiplier <= 0:
        raise Blocked(scores.node, Reason("order", "a second softcap, or one with a tensor scale"))
    inside = scores.to(views.source(scores.node), trail="softcap")
    return replace(inside, softcap=scores.multiplier, multiplier=1.0, growth=1.0)


@SCORES("cat")
def _concatenated(walk: Walk, scores: Scores) -> Scores | tuple[Scores, Product] | None:
    """Scores of several products beside each other, or one more column beside the keys: a learned sink."""
    node = scores.node
    given, dim = node.args[0], arguments(node)["dim"]
    if not isinstance(given, (list, tuple)) or len(given) < 2 or not isinstance(dim, int):
        return None
    parts = [part for part in given if is_tensor(part)]
    on_keys = scores.dims[dim % len(scores.dims)] == scores.axes[scores.key_dim]
    if not on_keys:
        raise Blocked(node, NO_SINK)
    *before, last = parts
    if not _ends_in_product(walk, scores, last):
        scores = _without_sink(walk, scores, last, dim, shape(node)[dim] - 1)
        if len(before) == 1:
            return scores.to(before[0])
        parts = before
    elif not all(_ends_in_product(walk, scores, part) for part in before):
        raise Blocked(node, NO_SINK)
    at, keys, axes = dim % len(scores.dims), scores.key_dim, scores.axes
    found = []
    for part in parts:
        own = axis_dim(next(walk.fresh_axes), shape(part)[dim])
        dims = (*scores.dims[:at], own, *scores.dims[at + 1 :])
        start = replace(scores, axes=(*axes[:keys], own, *axes[keys + 1 :]), terms=(), is_part=True)
        found.append(Part(*peel_and_join(walk, start.to(part, dims))))
    return join(walk, scores, found, node)


NO_SINK = Reason("sink-shape", "not one column of sinks beside the keys")


def _without_sink(walk: Walk, scores: Scores, sink: fx.Node, dim: int, keys: int) -> Scores:
    """The scores without the last column, which is a sink. They have `keys` keys."""
    first = scores.sink is None and not scores.terms and scores.multiplier == 1.0 and not scores.tensor_scales
    if not first or scores.is_part or shape(sink)[dim] != 1 or scores.softcap is not None:
        raise Blocked(scores.node, NO_SINK)
    dims = list(scores.dims)
    dims[dim % len(dims)] = axis_dim(next(walk.fresh_axes), keys)
    sink_dims = views.broadcast(sink, tuple(dims))
    axes = list(scores.axes)
    axes[scores.key_dim] = dims[dim % len(dims)]
    return replace(scores, dims=tuple(dims), axes=tuple(axes), sink=(sink, sink_dims), trail=("sink", *scores.trail))


@SCORES("detach")
def _detached(walk: Walk, scores: Scores) -> Scores:
    raise Blocked(scores.node, DETACHED)


@SCORES("slice_scatter", "select_scatter")
def _pieces(walk: Walk, scores: Scores) -> Scores:
    """Scores that are written into one tensor piece by piece, as Longformer does with the diagonals of a band."""
    raise Blocked(scores.node, Reason("key-blocks", "the scores are written together piece by piece, as a band is"))


def _ends_in_product(walk: Walk, scores: Scores, part: fx.Node) -> bool:
    """Whether one of the concatenated parts leads back to a product."""
    dims = tuple(axis_dim(next(walk.fresh_axes), size) for size in shape(part))
    try:
        walk.peel(replace(scores, node=part, dims=dims, axes=dims))
    except Blocked:
        return False
    return True
