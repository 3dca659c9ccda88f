"""The rules for what happens to the weights between the softmax and the product with the value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import fx

from neuron_attn_rewrite.graph.nodes import arguments, is_tensor, op_name, shape
from neuron_attn_rewrite.patterns import views
from neuron_attn_rewrite.patterns.axes import Dims, dim_size
from neuron_attn_rewrite.patterns.peel import Scores, TensorScale, Walk, scaled_by_number
from neuron_attn_rewrite.patterns.rules import DETACHED, Blocked, Rules
from neuron_attn_rewrite.patterns.site import OVERFLOWS, hides
from neuron_attn_rewrite.patterns.softmaxes import as_zero_fill
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.values.cells import CellTable, equal


@dataclass(frozen=True)
class Weights:
    """A tensor on the way from the softmax to the product with the value."""

    node: fx.Node
    dims: Dims
    scores: Scores
    """What the walk back from the softmax found."""
    softmax_of: fx.Node
    """The softmax' own input."""
    includes_sink_column: bool = False
    """Whether the weights still have the column of the sink."""
    multiplier: float = 1.0
    tensor_scales: tuple[TensorScale, ...] = ()
    zero_filled_terms: frozenset[int] = frozenset()
    """Positions in `scores.terms` of the masks that the model applies again, by setting the hidden weights to zero."""

    def to(self, node: fx.Node, dims: Dims | None = None) -> Weights:
        return replace(self, node=node, dims=self.dims if dims is None else dims)


WeightsRule: TypeAlias = Callable[[Walk, Weights, fx.Node], "Weights | None"]
"""Reads the operator `user` on the weights as a step towards the product; None if it is another's."""

WEIGHTS: Rules[WeightsRule] = Rules()


def follow(walk: Walk, weights: Weights, user: fx.Node) -> Weights:
    """One step forward, to `user`.

    Raises:
        Blocked: no rule knows it.
    """
    dims = views.after(weights.node, user, weights.dims)
    if dims is not None:
        return weights.to(user, dims)
    step = WEIGHTS.ask(user, walk, weights, user)
    if step is None:
        raise Blocked(user)
    assert isinstance(step, Weights)
    return step


@WEIGHTS(*views.DROPOUTS, "native_dropout")
def _dropout(walk: Walk, weights: Weights, user: fx.Node) -> Weights:
    raise Blocked(user, Reason("dropout-active", "dropout is active"))


@WEIGHTS("detach")
def _detached(walk: Walk, weights: Weights, user: fx.Node) -> Weights:
    raise Blocked(user, DETACHED)


@WEIGHTS("slice")
def _without_sink(walk: Walk, weights: Weights, user: fx.Node) -> Weights | None:
    """The slice that drops a sink's column."""
    if not weights.includes_sink_column:
        return None
    values, scores = arguments(user), weights.scores
    on_keys = values["dim"] % len(weights.dims) == scores.key_dim
    whole = shape(user)[scores.key_dim] == dim_size(scores.axes[scores.key_dim])
    if not on_keys or values["start"] or values["step"] != 1 or not whole:
        return None
    return replace(weights.to(user, scores.axes), includes_sink_column=False)


@WEIGHTS("mul", "div")
def _scale(walk: Walk, weights: Weights, user: fx.Node) -> Weights | None:
    """A scale of the weights. One that is the same for all keys moves to the output, one that is the same for all rows
    to the value. `build` decides which, because there the axes have names."""
    scaled = scaled_by_number(walk.evaluator, user)
    if scaled is not None:
        return replace(weights.to(user), multiplier=weights.multiplier * scaled[1])
    left, right = user.args[:2]
    divides = op_name(user) == "div"
    other = right if left is weights.node else left
    if not is_tensor(other) or weights.includes_sink_column or left is right:
        return None
    assert isinstance(other, fx.Node)
    if shape(user) != shape(weights.node) or (divides and left is not weights.node):
        return None
    repeated = _zero_filled_again(walk, weights, user)
    if repeated is not None:
        return repeated
    scale = TensorScale(other, views.broadcast(other, weights.dims), divides)
    return replace(weights.to(user), tensor_scales=(*weights.tensor_scales, scale))


@WEIGHTS("add", "sub")
def _mixed(walk: Walk, weights: Weights, user: fx.Node) -> Weights:
    words = "the weights are mixed with another tensor, such as a hard choice in place of them"
    raise Blocked(user, Reason("unknown-node", words))


@WEIGHTS("nan_to_num")
def _nan_to_zero(walk: Walk, weights: Weights, user: fx.Node) -> Weights | None:
    """A row of -inf scores gives NaN, and this makes it zeros."""
    return _without_nan(weights, user) if arguments(user)["nan"] in (None, 0) else None


@WEIGHTS("where", "masked_fill")
def _guard(walk: Walk, weights: Weights, user: fx.Node) -> Weights | None:
    """Sets weights to zero: all of a row that sees no key, or those of the keys that a mask has hidden already."""
    cut = as_zero_fill(user)
    if cut is None or cut[0] is not weights.node:
        return None
    _, condition, where = cut
    if where and _is_nan(condition, weights.node):
        return _without_nan(weights, user)
    if where and _all_hidden(condition, weights):
        return _safe(weights, user)
    if not where and _some_seen(condition, weights):
        return _safe(weights, user)
    again = _zero_filled_again(walk, weights, user)
    if again is None:
        raise Blocked(user, Reason("order", "weights are set to zero after the softmax, without normalising again"))
    return again


def _without_nan(weights: Weights, user: fx.Node) -> Weights | None:
    if weights.scores.overflows:
        raise Blocked(user, OVERFLOWS)
    return _safe(weights, user)


def _safe(weights: Weights, user: fx.Node) -> Weights | None:
    """Rows without a key become zeros. A tensor scale could make other NaN, which would be set to zero as well."""
    if weights.tensor_scales:
        return None
    return replace(weights.to(user), scores=replace(weights.scores, safe=True))


def _is_nan(condition: fx.Node, weights: fx.Node) -> bool:
    name, given = op_name(condition), condition.args
    return (name == "isnan" and given[0] is weights) or (name == "ne" and given[0] is weights is given[1])


def _all_hidden(node: fx.Node, weights: Weights) -> bool:
    """Whether a bool is True for exactly the rows whose scores are all -inf."""
    node = views.value_source(node)
    if op_name(node) in ("logical_not", "bitwise_not"):
        return _some_seen(views.source(node), weights)
    if op_name(node) == "eq" and node.args[1] == float("-inf"):
        largest = views.value_source(views.source(node))
        return op_name(largest) == "amax" and _over_keys(largest, weights) and _is_scores(largest, weights)
    return op_name(node) == "all" and _over_keys(node, weights) and _hidden(views.source(node), weights)


def _some_seen(node: fx.Node, weights: Weights) -> bool:
    node = views.value_source(node)
    if op_name(node) in ("logical_not", "bitwise_not"):
        return _all_hidden(views.source(node), weights)
    return op_name(node) == "any" and _over_keys(node, weights) and _hidden(views.source(node), weights, seen=True)


def _hidden(node: fx.Node, weights: Weights, seen: bool = False) -> bool:
    """Whether a bool is True for exactly the scores that are -inf (with `seen`: that are not)."""
    name = op_name(node)
    if name in ("logical_not", "bitwise_not"):
        return _hidden(views.source(node), weights, not seen)
    if name == "isneginf":
        return not seen and _is_scores(node, weights)
    limit = node.args[1] if len(node.args) > 1 else None
    return name == ("ne" if seen else "eq") and bool(limit == float("-inf")) and _is_scores(node, weights)


def _is_scores(node: fx.Node, weights: Weights) -> bool:
    return views.value_source(views.source(node)) is views.value_source(weights.softmax_of)


def _over_keys(node: fx.Node, weights: Weights) -> bool:
    values = arguments(node)
    dims = values["dim"] if isinstance(values.get("dim"), (list, tuple)) else [values.get("dim")]
    rank = len(weights.dims)
    return bool(values.get("keepdim")) and [d % rank for d in dims if d is not None] == [weights.scores.key_dim]


def _zero_filled_again(walk: Walk, weights: Weights, user: fx.Node) -> Weights | None:
    """A mask that hid scores is applied again to the weights. These are 0 already, except in rows without a key."""
    cut = as_zero_fill(user)
    if cut is None or cut[0] is not weights.node:
        return None
    _, mask, where = cut
    dims = views.broadcast(mask, weights.dims)
    for i, term in enumerate(weights.scores.terms):
        if term.kind == "add" or not hides(term.fill) or term.dims != dims:
            continue
        if _same_mask(walk, term.node, mask, negated=where != (term.kind == "hide")):
            if op_name(user) == "mul" and term.fill == -torch.inf:
                return weights.to(user)  # 0 times the NaN of a row without a key is NaN
            return replace(weights.to(user), zero_filled_terms=weights.zero_filled_terms | {i})
    return None


def _same_mask(walk: Walk, a: fx.Node, b: fx.Node, negated: bool) -> bool:
    """Whether two bool tensors are equal for all inputs: made alike, or by evaluation."""
    if walk.made_alike(a, b):
        return not negated
    tables = walk.tables(a, b)
    if tables is None or {table.lo.dtype for table in tables} != {torch.bool}:
        return False
    one, two = tables
    return equal(one, CellTable(~two.lo, ~two.hi, two.cell) if negated else two)
