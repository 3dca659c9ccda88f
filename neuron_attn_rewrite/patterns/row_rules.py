"""The rules of `meanings.py` for arithmetic with numbers of each row, exponentials and outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from neuron_attn_rewrite.graph.nodes import dtype, is_tensor, op_name, shape
from neuron_attn_rewrite.patterns.axes import Atom, Dims, atoms
from neuron_attn_rewrite.patterns.exponentials import SUM, Filled, Form, Meaning, Output, Piece, Rows
from neuron_attn_rewrite.patterns.meanings import Reader, rule, spreads


@rule("log")
def _log(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    rows = r.of(node.args[0])
    return replace(rows, is_exp=False) if isinstance(rows, Rows) and rows.is_exp else None


@rule("logaddexp")
def _logaddexp(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    one, two = r.both(*node.args[:2])
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
        is_lost = number is not None and 0 <= number <= torch.finfo(dtype(node)).eps / 4
        if is_lost and isinstance(rows, Rows) and rows.is_at_least_one and rows.sizes == shape(node):
            return rows
        return _sum_of_rows(*r.both(left, right), number)
    one, two = r.both(left, right)
    if not isinstance(two, Rows) or two.is_exp:
        return None
    number = r.number(left)
    if number is not None and two.sizes == shape(node):
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


def _of_number(number: float) -> Form:
    """A number as the score of one more key."""
    return Form() if number == 0 else Form.of(SUM, frozenset({Piece(None, number=number)}))


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
