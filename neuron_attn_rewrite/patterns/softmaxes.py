"""The rules for a softmax, in all its spellings: which node holds the weights, and which scores they come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import fx

from neuron_attn_rewrite.graph.nodes import (
    PERMUTES,
    WRITTEN,
    arguments,
    dtype,
    is_tensor,
    op_name,
    plain_name,
    shape,
    tensor,
)
from neuron_attn_rewrite.patterns import views
from neuron_attn_rewrite.patterns.peel import Scores, Walk
from neuron_attn_rewrite.patterns.products import as_product
from neuron_attn_rewrite.patterns.rules import CHANGED, Blocked, Rules
from neuron_attn_rewrite.reasons import Reason

SoftmaxRule: TypeAlias = Callable[[Walk, fx.Node], "Scores | None"]
"""Reads a node as the weights of a softmax and gives the scores behind it; None if it is something else."""

SOFTMAXES: Rules[SoftmaxRule] = Rules()


def as_softmax(walk: Walk, node: fx.Node) -> Scores | None:
    """The scores of which a node holds the softmax; None if it is none.

    Raises:
        Blocked: it is a softmax, but not one that a kernel computes.
    """
    if tensor(node) is None:
        return None
    if WRITTEN in node.meta and plain_name(node) in OPERATORS:
        raise Blocked(node, CHANGED)
    scores: Scores | None = SOFTMAXES.ask(node, walk, node)
    return scores


OPERATORS = ("softmax", "_softmax", "_safe_softmax", "special_softmax")


@SOFTMAXES(*OPERATORS)
def _operator(walk: Walk, node: fx.Node) -> Scores:
    scores = walk.begin(node, node.args[0], arguments(node)["dim"])
    return replace(scores, safe=op_name(node) == "_safe_softmax")


@SOFTMAXES("exp")
def _exp_of_log_softmax(walk: Walk, node: fx.Node) -> Scores | None:
    """exp(log_softmax(x)), or exp(x - logsumexp(x))."""
    inner = views.value_source(views.source(node))
    if op_name(inner) in ("log_softmax", "_log_softmax", "special_log_softmax"):
        return walk.begin(node, inner.args[0], arguments(inner)["dim"], "log_softmax")
    if op_name(inner) != "sub" or arguments(inner)["alpha"] != 1 or not isinstance(inner.args[1], fx.Node):
        return None
    reduced = _reduction(inner.args[1], LOGSUMEXPS, shape(node))
    if reduced is None or views.value_source(reduced[0]) is not views.value_source(views.source(inner)):
        return None
    return walk.begin(node, inner.args[0], reduced[1], "logsumexp")


@SOFTMAXES("exp", "exp2")
def _normalised_later(walk: Walk, node: fx.Node) -> Scores | None:
    """`exp(x) @ v / sum(exp(x))`: the model divides the product with the value, not the weights."""
    for total in node.users:
        dim = arguments(total).get("dim") if op_name(total) == "sum" else None
        if not isinstance(dim, (list, tuple)) or len(dim) != 1:
            continue
        for division in _divisions(total):
            product = as_product(_unmoved(views.source(division)))
            operands = () if product is None else (product.left, product.right)
            if node in map(views.rounded_source, operands):
                begun = walk.begin(node, node.args[0], int(dim[0]), "exp, sum behind the product")
                begun = replace(begun, division=division, overflows=True)
                return begun if op_name(node) == "exp" else begun.scaled(math.log(2))
    return None


def _divisions(total: fx.Node) -> Iterator[fx.Node]:
    """The nodes that divide by a tensor or by a view of it."""
    for user in total.users:
        if op_name(user) == "div" and user.args[1] is total and isinstance(user.args[0], fx.Node):
            yield user
        elif op_name(user) in views.MOVES or views.keeps_values(user):
            yield from _divisions(user)


def _unmoved(node: fx.Node) -> fx.Node:
    while op_name(node) in views.RESHAPES | PERMUTES or views.keeps_values(node):
        node = views.source(node)
    return node


@SOFTMAXES("div", "mul")
def _by_hand(walk: Walk, node: fx.Node) -> Scores | None:
    """w / sum(w) for weights w = exp(x), or w = exp(x) * mask, or w = softmax(x) * mask."""
    left, right = node.args[:2]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    if op_name(node) == "mul":
        if op_name(_unviewed(left)) == "reciprocal":
            left, right = right, left
        if op_name(_unviewed(right)) != "reciprocal":
            return None
        right = views.source(_unviewed(right))
    total = _reduction(_unguarded(walk, right, left), SUMS, shape(node))
    if total is None or views.rounded_source(total[0]) is not views.rounded_source(left):
        return None
    return _weights(walk, node, views.rounded_source(left), total[1])


def _weights(walk: Walk, node: fx.Node, weights: fx.Node, dim: int) -> Scores | None:
    """The scores behind `weights`, which `node` normalises: exponentials, or weights of which some are set to zero."""
    if op_name(weights) in ("exp", "exp2"):
        begun = replace(walk.begin(node, weights.args[0], dim, "exp / sum"), overflows=True)
        return begun if op_name(weights) == "exp" else begun.scaled(math.log(2))
    already = as_softmax(walk, weights)
    if already is not None:
        same_dim = already.key_dim == dim % len(already.dims)
        return replace(already, safe=False) if same_dim and not already.safe else None
    cut = as_zero_fill(weights)
    if cut is None:
        return None
    inner, mask, where = cut
    scores = _weights(walk, node, views.rounded_source(inner), dim)
    if scores is None or scores.terms or scores.safe:
        return None
    hidden = scores.hidden(mask, -torch.inf, where)
    return replace(hidden, trail=("mask", *hidden.trail), overflows=True)


def as_zero_fill(node: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """A node that sets some weights to zero, as (weights before, bool mask, the value of the mask that means zero)."""
    if op_name(node) == "masked_fill" and _is_zero(node.args[2]) and isinstance(node.args[1], fx.Node):
        return views.source(node), node.args[1], True
    if op_name(node) == "where" and len(node.args) == 3 and isinstance(node.args[0], fx.Node):
        for kept, other, where in ((node.args[1], node.args[2], False), (node.args[2], node.args[1], True)):
            if is_tensor(kept) and shape(kept) == shape(node) and _is_zero(other):
                return kept, node.args[0], where
    if op_name(node) == "mul":
        for kept, mask in (node.args[:2], node.args[1::-1]):
            if is_tensor(kept) and is_tensor(mask) and shape(kept) == shape(node):
                source = _bool_behind(mask)
                if source is not None:
                    return kept, source, False
    return None


def _bool_behind(node: fx.Node) -> fx.Node | None:
    """The bool tensor from which a tensor of zeros and ones was cast; None if there is none."""
    while dtype(node) != torch.bool:
        if op_name(node) not in views.CASTS | views.IDENTITIES:
            return None
        node = views.source(node)
    return node


def _is_zero(value: object) -> bool:
    if isinstance(value, fx.Node):
        if op_name(value) in ("zeros_like", "zeros", "new_zeros", "_efficientzerotensor"):
            return True
        return op_name(value) in ("full", "full_like", "new_full", "scalar_tensor") and 0 in value.args[:2]
    return value == 0 and not isinstance(value, bool)


SUMS = frozenset({"sum", "linalg_vector_norm"})
LOGSUMEXPS = frozenset({"logsumexp", "special_logsumexp"})
MAXIMA = frozenset({"amax", "max"})


def _reduction(node: fx.Node, names: frozenset[str], full: tuple[int, ...]) -> tuple[fx.Node, int] | None:
    """`node` as a reduction over one dim of a tensor of shape `full`, broadcast back over it: (tensor, dim)."""
    is_maximum = names is MAXIMA  # the one reduction whose gradient does not matter
    node = _unviewed(node, is_maximum)
    squeezed = False
    if op_name(node) == "unsqueeze":
        squeezed, unsqueezed, node = True, arguments(node)["dim"], _unviewed(views.source(node), is_maximum)
    if op_name(node) == "getitem" and node.args[1] == 0:  # max also gives the indices
        node = views.source(node)
    if op_name(node) not in names or (op_name(node) == "linalg_vector_norm" and arguments(node)["ord"] != 1):
        return None
    values = arguments(node)
    dims, keepdim = values.get("dim"), values.get("keepdim")
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(dims, (list, tuple)) or len(dims) != 1 or bool(keepdim) is squeezed:
        return None
    dim = int(dims[0]) % len(full)
    if shape(views.source(node)) != full or (squeezed and unsqueezed % len(full) != dim):
        return None
    return views.source(node), dim


def _unguarded(walk: Walk, total: fx.Node, weights: fx.Node) -> fx.Node:
    """`sum` of `sum + epsilon` or `max(sum, limit)`, where the guard against division by zero changes nothing.

    The weights must be exp(x - max(x)), with the maximum along the dim of the sum. Then the largest weight of a row is
    exp(0) = 1, and the sum is at least 1. So a limit of at most 1 is never reached, and an epsilon of at most a quarter
    of the dtype's eps is lost in rounding. Without such a guard, `total` itself.

    Raises:
        Blocked: the guard may change the sum.
    """
    guarded = _unviewed(total)
    exponent = views.rounded_source(weights)
    if op_name(guarded) not in ("add", "clamp", "clamp_min") or op_name(exponent) not in ("exp", "exp2"):
        return total
    reduced = _reduction(views.source(guarded), SUMS, shape(weights)) if is_tensor(guarded.args[0]) else None
    if reduced is None or views.rounded_source(reduced[0]) is not exponent:
        return total
    values, is_sum = arguments(guarded), op_name(guarded) == "add"
    limit = walk.constant(values["other" if is_sum else "min"])
    most = torch.finfo(dtype(guarded)).eps / 4 if is_sum else 1.0
    is_small = limit is not None and 0 <= limit * values.get("alpha", 1) <= most and values.get("max") is None
    if not is_small or _largest_along(views.value_source(views.source(exponent))) != reduced[1]:
        raise Blocked(guarded, Reason("limit", "it may change the sum by which the weights are divided"))
    return views.source(guarded)


def _largest_along(node: fx.Node) -> int | None:
    """The dim along which a tensor is `x - max(x)`; None if it is none."""
    if op_name(node) != "sub" or not is_tensor(node.args[1]) or arguments(node)["alpha"] != 1:
        return None
    assert isinstance(node.args[1], fx.Node)
    largest = _reduction(node.args[1], MAXIMA, shape(node))
    if largest is None or views.value_source(largest[0], through_detach=True) is not views.value_source(
        views.source(node)
    ):
        return None
    return largest[1]


def _unviewed(node: fx.Node, is_maximum: bool = False) -> fx.Node:
    """A tensor without the expand that broadcasts a number of each row over the row, and without views and casts.

    The sum of a row's weights may be rounded by a cast. Its maximum may have been detached.
    """
    while True:
        inner = views.value_source(node, through_detach=True) if is_maximum else views.rounded_source(node)
        if op_name(inner) not in views.EXPANDS:
            return inner
        node = views.source(inner)
