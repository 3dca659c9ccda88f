"""The rules of `meanings.py`: what each operator makes of maxima, sums and exponentials."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from neuron_attn_rewrite.graph.nodes import arguments, dtype, is_tensor, op_name, shape
from neuron_attn_rewrite.patterns import views
from neuron_attn_rewrite.patterns.axes import Atom, Dims, atoms, dim_size
from neuron_attn_rewrite.patterns.exponentials import (
    DETACHED,
    MAXIMUM,
    SUM,
    Bases,
    Exponentials,
    Filled,
    Form,
    Meaning,
    Output,
    Piece,
    Pieces,
    Rows,
    holds,
    larger_sum,
)
from neuron_attn_rewrite.patterns.meanings import Reader, rule, spreads

# Maxima and sums


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
    one, two = _with_sink(r, left, right)
    if r.of(left) is None:
        one, two, right = two, one, left
    if given.get("max") is None and (limit := r.number(right)) is not None and limit <= 1 and _is_at_least_one(one):
        return one
    if not isinstance(one, Rows) or one.is_exp or given.get("max") is not None:
        return None
    kind = DETACHED if _only(one.form, DETACHED) else MAXIMUM
    pieces, number = _only(one.form, kind), r.number(right)
    if number == -math.inf:
        return one if _sizes(one) == shape(node) else None
    if pieces is not None and number is not None:
        return replace(one, form=Form.of(kind, pieces | {Piece(None, number=number)}))
    if not isinstance(two, Rows) or two.is_exp or two.dims != one.dims:
        return None
    bases = one.bases | two.bases
    left_sum, right_sum = _only(one.form, SUM), _only(two.form, SUM)
    if left_sum and right_sum:
        return replace(one, form=larger_sum(left_sum, right_sum), bases=bases)
    more = _only(two.form, kind) or (right_sum if kind == MAXIMUM and _is_sink(right_sum) else None)
    return replace(one, form=Form.of(kind, pieces | more), bases=bases) if pieces and more else None


def _is_sink(pieces: Pieces | None) -> bool:
    """Whether these are one key alone: the logarithm of its sum is its score, and so is its maximum."""
    return pieces is not None and len(pieces) == 1 and all(piece.is_sink for piece in pieces)


def _is_at_least_one(rows: Meaning | None) -> bool:
    """Whether this is a sum of exponentials of which the largest is 1."""
    if not isinstance(rows, Rows) or not rows.is_exp:
        return False
    keys, rest = rows.form.as_sum()
    terms = list(rest.terms)
    return len(terms) == 1 and terms[0][0] in (MAXIMUM, DETACHED) and terms[0][2] == -1 and holds(keys, terms[0][1])


def _only(form: Form, kind: str) -> frozenset[Piece] | None:
    terms = list(form.terms)
    return terms[0][1] if len(terms) == 1 and terms[0][0] == kind and terms[0][2] == 1 else None


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


# Arithmetic


@rule("log")
def _log(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    rows = r.of(node.args[0])
    return replace(rows, is_exp=False) if isinstance(rows, Rows) and rows.is_exp else None


@rule("logaddexp")
def _logaddexp(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    one, two = _with_sink(r, *node.args[:2])
    if not isinstance(one, Rows) or not isinstance(two, Rows) or one.is_exp or two.is_exp or one.dims != two.dims:
        return None
    form = one.form.added(two.form)
    return None if form is None else replace(one, form=form, bases=one.bases | two.bases)


@rule("neg")
def _neg(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    rows = r.of(node.args[0])
    return replace(rows, form=-rows.form) if isinstance(rows, Rows) and not rows.is_exp else None


@rule("reciprocal")
def _reciprocal(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    rows = r.of(node.args[0])
    if not isinstance(rows, Rows) or not rows.is_exp:
        return None
    return replace(rows, form=-rows.form, may_be_infinite=rows.may_be_infinite and not (-rows.form).bounds())


@rule("sigmoid")
def _sigmoid(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    """`exp(x) / (1 + exp(x))`."""
    rows = r.of(node.args[0])
    total = rows.form.added(Form()) if isinstance(rows, Rows) and not rows.is_exp else None
    if not isinstance(rows, Rows) or total is None or not (rows.form - total).bounds():
        return None
    return replace(rows, form=rows.form - total, is_exp=True, bases=rows.bases | total.bases)


@rule("add", "sub", "rsub")
def _add(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    left, right = node.args[:2]
    if given.get("alpha", 1) != 1:
        return None
    if op_name(node) == "rsub":
        left, right = right, left
    one, two = r.of(left), r.of(right)
    if op_name(node) == "add":
        if isinstance(one, Output) and isinstance(two, Output):
            return _added_outputs(r, one, two)
        for zero, other in ((left, right), (right, left)):
            if r.number(zero) == 0 and r.of(other) is not None and is_tensor(other) and shape(other) == shape(node):
                return r.of(other)
        number = r.number(left if one is None else right)
        rows = two if one is None else one
        if number is not None and 0 <= number <= torch.finfo(dtype(node)).eps / 4 and _is_at_least_one(rows):
            return rows  # the number is lost in rounding
        return _sum_of_rows(*_with_sink(r, left, right), number)
    one, two = _with_sink(r, left, right)
    if not isinstance(two, Rows) or two.is_exp:
        return None
    number = r.number(left)
    if number is not None and _sizes(two) == shape(node):
        return Filled(number) if number == -math.inf else replace(two, form=_of_number(number) - two.form)
    if not isinstance(one, Rows) or one.dims != two.dims or one.is_exp:
        return None
    return replace(one, form=one.form - two.form, bases=one.bases | two.bases)


def _sum_of_rows(one: Meaning | None, two: Meaning | None, number: float | None) -> Meaning | None:
    one, two = (two, one) if one is None else (one, two)
    if isinstance(one, Rows) and one.is_exp and two is None and number is not None and number > 0:
        form = one.form.added(_of_number(math.log(number)))
        return None if form is None else replace(one, form=form)
    if not isinstance(one, Rows) or not isinstance(two, Rows) or one.dims != two.dims or one.is_exp != two.is_exp:
        return None
    bases = one.bases | two.bases
    if not one.is_exp:
        return replace(one, form=one.form + two.form, bases=bases)
    added = one.form.added(two.form)
    return None if added is None else Rows(one.dims, added, is_exp=True, bases=bases)


def _sizes(rows: Rows) -> tuple[int, ...]:
    return tuple(map(dim_size, rows.dims))


def _of_number(number: float) -> Form:
    """A number as the score of one more key."""
    return Form() if number == 0 else Form.of(SUM, frozenset({Piece(None, number=number)}))


def _with_sink(r: Reader, left: object, right: object) -> tuple[Meaning | None, Meaning | None]:
    """The meanings of two operands. If one is a number of each row and the other a tensor, that is a sink."""
    one, two = r.of(left), r.of(right)
    if one is None and isinstance(two, Rows) and r.number(left) is None:
        return r.sink(left, two), two
    if two is None and isinstance(one, Rows) and r.number(right) is None:
        return one, r.sink(right, one)
    return one, two


def _added_outputs(r: Reader, one: Output, two: Output) -> Output | None:
    """The sum of two outputs that have the same factor. The features of the second get the names of the first's."""
    if one.form != two.form or len(one.dims) != len(two.dims):
        return None
    frame = r.axes()
    pairs = list(zip(atoms(two.dims), atoms(one.dims), strict=False))
    names = {b.axis: a.axis for b, a in pairs}
    if any(a != b and not {a, b}.isdisjoint(frame) for b, a in names.items()):
        return None

    def named(dims: Dims) -> Dims:
        return tuple(tuple(Atom(names.get(a.axis, a.axis), a.stride, a.size) for a in dim) for dim in dims)

    if named(two.dims) != one.dims:
        return None
    renamed = (replace(s, value=(s.value[0], named(s.value[1]))) for s in two.summands)
    return replace(one, summands=(*one.summands, *renamed), bases=one.bases | two.bases)


@rule("mul", "div")
def _scale(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    left, right = node.args[:2]
    divides = op_name(node) == "div"
    for inner, factor in ((left, right), (right, left))[: 1 if divides else 2]:
        one, two = r.of(inner), r.of(factor)
        is_finite = isinstance(two, Rows) and two.is_exp and not two.may_be_infinite
        if r.number(inner) == 0 and not divides and (is_finite or two == Filled(0.0)):
            return Filled(0.0)
        if one is None or isinstance(one, Filled) or not is_tensor(inner) or shape(inner) != shape(node):
            continue
        if r.number(factor) == 1:
            return one
        if not isinstance(two, Rows) or not two.is_exp or not spreads(two.dims, one.dims):
            continue
        if two.may_be_infinite or (isinstance(one, Rows) and (one.may_be_infinite or not one.is_exp)):
            return None
        form = one.form - two.form if divides else one.form + two.form
        return replace(one, form=form, bases=one.bases | two.bases)
    return None
