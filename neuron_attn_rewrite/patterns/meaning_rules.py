"""The rules of `meanings.py` for maxima, sums and exponentials of scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from neuron_attn_rewrite.graph.nodes import arguments, op_name, shape
from neuron_attn_rewrite.patterns import views
from neuron_attn_rewrite.patterns.axes import Dims, dim_size
from neuron_attn_rewrite.patterns.exponentials import (
    DETACHED,
    MAXIMUM,
    SUM,
    Bases,
    Exponentials,
    Filled,
    Form,
    Meaning,
    Piece,
    Pieces,
    Rows,
    larger_sum,
)
from neuron_attn_rewrite.patterns.meanings import Reader, rule


@rule("amax")
def _amax(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    return r.reduced(node, MAXIMUM)


@rule("getitem")
def _max_of_pair(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    pair = node.args[0]
    if not isinstance(pair, fx.Node):
        return None
    if op_name(pair) == "max" and node.args[1] == 0:
        return r.reduced(pair, MAXIMUM)
    return _piece(r, node, given)


@rule("slice", "narrow")
def _piece(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    """A part of the keys."""
    cut = views.cut(node)
    weights = r.of(cut[0]) if cut else None
    if cut is None or not isinstance(weights, Exponentials) or cut[1] != weights.at:
        return None
    start = weights.piece.start + cut[2]
    piece = replace(weights.piece, start=start, stop=start + shape(node)[weights.at])
    keys = r.keys(piece)
    dims = (*weights.dims[: weights.at], keys, *weights.dims[weights.at + 1 :])
    return replace(weights, dims=dims, piece=piece, keys=keys)


@rule("logsumexp", "special_logsumexp")
def _logsumexp(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    return r.reduced(node, SUM)


@rule("maximum", "clamp", "clamp_min")
def _maximum(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    left, right = node.args[0], given.get("other", given.get("min"))
    one, two = r.both(left, right)
    if r.of(left) is None:
        one, two, right = two, one, left
    if not isinstance(one, Rows) or given.get("max") is not None or one.sizes != shape(node):
        return None
    limit = r.number(right)
    if limit is not None and limit <= 1 and one.is_at_least_one:
        return one
    if one.is_exp:
        return None
    kind = DETACHED if one.form.only(DETACHED) else MAXIMUM
    pieces = one.form.only(kind)
    if limit == -math.inf:
        return one
    if pieces is not None and limit is not None:
        return replace(one, form=Form.of(kind, pieces | {Piece(None, number=limit)}))
    if not isinstance(two, Rows) or two.is_exp or two.dims != one.dims:
        return None
    bases = one.bases | two.bases
    left_sum, right_sum = one.form.only(SUM), two.form.only(SUM)
    if left_sum and right_sum:
        return replace(one, form=larger_sum(left_sum, right_sum), bases=bases)
    more = two.form.only(kind) or (right_sum if kind == MAXIMUM and _is_sink(right_sum) else None)
    return replace(one, form=Form.of(kind, pieces | more), bases=bases) if pieces and more else None


def _is_sink(pieces: Pieces | None) -> bool:
    """Whether these are one key alone: the logarithm of its sum is its score, and so is its maximum."""
    return pieces is not None and len(pieces) == 1 and all(piece.is_sink for piece in pieces)


# Exponentials


@rule("exp")
def _exp(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    inner = node.args[0]
    known = r.of(inner)
    if isinstance(known, Filled):
        return Filled(math.exp(known.number)) if known.number <= 0 else None
    if isinstance(known, Rows):
        fine = known.form.bounds()
        keys, rest = known.form.as_sum()
        alone = _is_sink(keys) and [factor for *_, factor in rest.terms] == [-1]
        if known.is_exp or not (fine or alone):
            return None
        return replace(known, is_exp=True, may_be_infinite=not fine, bases=known.bases | known.form.bases)
    if known is not None or not isinstance(inner, fx.Node):
        return None
    exponent = views.value_source(inner)
    if op_name(exponent) == "sub" and arguments(exponent)["alpha"] == 1:
        scores, rows = exponent.args[0], r.of(exponent.args[1])
        if isinstance(rows, Rows) and not rows.is_exp and r.of(scores) is None:
            return _over_scores(r, node, scores, rows)
    for user in node.users:
        if op_name(user) == "sum":
            found = r.piece(inner, arguments(user).get("dim"))
            return None if found is None else _begun(node, found, Form())
    return None


def _over_scores(r: Reader, node: fx.Node, scores: object, rows: Rows) -> Meaning | None:
    """`exp(scores - rows)`. The key dim is the one that the numbers of the rows do not run over."""
    rank = len(shape(node))
    for at in range(rank):
        found = r.piece(scores, at)
        if found is None or len(rows.dims) != rank or tuple(map(dim_size, found[1])) != shape(node):
            return None
        without = (*found[1][:at], (), *found[1][at + 1 :])
        if rows.dims == without and _is_along(rows.form, at):
            return _begun(node, found, -rows.form, rows.bases)
    return None


def _is_along(form: Form, at: int) -> bool:
    """Whether the keys of all tensors of the form are in dim `at`."""
    return all(piece.is_sink or piece.dim == at for _, pieces, _ in form.terms for piece in pieces)


def _begun(node: fx.Node, found: tuple[Piece, Dims, int], form: Form, bases: Bases = frozenset()) -> Meaning | None:
    piece, dims, at = found
    if not form.bounds(frozenset({piece})):
        return None
    return Exponentials(dims, piece, dims[at], at, form, node, bases | form.bases)


@rule("softmax", "_softmax", "special_softmax")
def _softmax(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    found = r.piece(node.args[0], given["dim"])
    return None if found is None else _begun(node, found, -Form.of(SUM, frozenset({found[0]})))


@rule("sum")
def _sum(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    weights, dims = r.of(node.args[0]), given.get("dim")
    if not isinstance(weights, Exponentials) or not isinstance(dims, (list, tuple)) or len(dims) != 1:
        return None
    at = dims[0] % len(weights.dims)
    if at != weights.at:
        return None
    kept: Dims = ((),) if given.get("keepdim") else ()
    rows = (*weights.dims[:at], *kept, *weights.dims[at + 1 :])
    form = Form.of(SUM, frozenset({weights.piece})) + weights.form
    return Rows(rows, form, is_exp=True, bases=weights.bases)
