"""Reads the nodes of a graph in the algebra of `exponentials.py`: a rule for each operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from neuron_attn_rewrite.graph.nodes import PERMUTES, arguments, dtype, is_tensor, op_name, permutation, shape, tensor
from neuron_attn_rewrite.patterns import views
from neuron_attn_rewrite.patterns.axes import Atom, Dim, Dims, atoms, axis_dim, permute
from neuron_attn_rewrite.patterns.exponentials import (
    MAXIMUM,
    SUM,
    Bases,
    Exponentials,
    Form,
    Meaning,
    Output,
    Piece,
    Rows,
    Summand,
    larger_sum,
)
from neuron_attn_rewrite.patterns.peel import Walk
from neuron_attn_rewrite.patterns.products import as_product

Rule = Callable[["Reader", fx.Node, Mapping[str, Any]], "Meaning | None"]
RULES: dict[str, Rule] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return add


@dataclass
class Reader:
    """Reads one graph. Score tensors of one shape, apart from the keys, share the axes of their rows."""

    walk: Walk
    known: dict[fx.Node, Meaning] = field(default_factory=dict)
    _rows: dict[tuple[Any, ...], Dims] = field(default_factory=dict)
    _keys: dict[Any, Dim] = field(default_factory=dict)

    def read(self, graph: fx.Graph) -> dict[fx.Node, Meaning]:
        for node in graph.nodes:
            meaning = self._meaning(node) if node.op == "call_function" and tensor(node) is not None else None
            if meaning is not None:
                self.known[node] = meaning
        return self.known

    def _meaning(self, node: fx.Node) -> Meaning | None:
        if not dtype(node).is_floating_point:
            return None
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and source in self.known:
            moved = _moved(node, self.known[source])
            if moved is not None:
                return moved
        name = op_name(node)
        if name in ("bmm", "matmul", "mm", "mv", "einsum", "sum", "baddbmm"):
            found = self._product(node)
            if found is not None:
                return found
        rule = RULES.get(name)
        return None if rule is None else rule(self, node, arguments(node) if name != "getitem" else {})

    def of(self, value: object) -> Meaning | None:
        return self.known.get(value) if isinstance(value, fx.Node) else None

    def frame(self, node: fx.Node, dim: int) -> Dims:
        """What the dims of a tensor of scores run over, the keys last named."""
        at = dim % len(shape(node))
        sizes = tuple(n for i, n in enumerate(shape(node)) if i != at)
        if (at, sizes) not in self._rows:
            self._rows[at, sizes] = tuple(axis_dim(next(self.walk.fresh_axes), n) for n in sizes)
        rows = self._rows[at, sizes]
        return (*rows[:at], self.keys(Piece(node, at, 0, shape(node)[at])), *rows[at:])

    def keys(self, piece: Piece) -> Dim:
        """What runs over the keys of a piece."""
        if piece not in self._keys:
            self._keys[piece] = axis_dim(next(self.walk.fresh_axes), piece.stop - piece.start)
        return self._keys[piece]

    def piece(self, scores: object, dim: object) -> tuple[Piece, Dims, int] | None:
        """A tensor as scores along a dim: the piece, what its dims run over, and the position of the keys."""
        if not is_tensor(scores):
            return None
        assert isinstance(scores, fx.Node)
        dims = [dim] if isinstance(dim, int) else dim
        node = views.value_source(scores, through_detach=True)
        if not isinstance(dims, (list, tuple)) or len(dims) != 1 or not isinstance(dims[0], int):
            return None
        if node in self.walk.evaluator.changed or not shape(node) or not dtype(node).is_floating_point:
            return None
        at = dims[0] % len(shape(node))
        return Piece(node, at, 0, shape(node)[at]), self.frame(node, at), at

    def reduced(self, node: fx.Node, kind: str) -> Rows | None:
        """A maximum or log-sum-exp of scores along one dim."""
        given = arguments(node)
        found = self.piece(node.args[0], given.get("dim"))
        if found is None:
            return None
        piece, dims, at = found
        kept: Dims = ((),) if given.get("keepdim") else ()
        rows = (*dims[:at], *kept, *dims[at + 1 :])
        return Rows(rows, Form.of(kind, frozenset({piece})), is_exp=False)

    def _product(self, node: fx.Node) -> Output | None:
        product = as_product(node)
        if product is None or product.addend is not None or product.left is product.right or product.alpha != 1:
            return None
        one, two = (product.left, product.left_labels), (product.right, product.right_labels)
        for (weights, labels), (value, v_labels) in ((one, two), (two, one)):
            given = self.of(weights)
            if not isinstance(given, Exponentials) or isinstance(self.of(value), Exponentials):
                continue
            by_label = dict(zip(labels, given.dims, strict=True))
            if labels[given.at] not in product.summed or any(by_label[x] for x in product.summed - {labels[given.at]}):
                return None
            by_label[labels[given.at]] = given.keys
            for size, label in zip(shape(value), v_labels, strict=True):
                if label == labels[given.at] and size != _size(given.piece):
                    return None
                if size > 1 and not by_label.get(label):
                    by_label[label] = axis_dim(next(self.walk.fresh_axes), size)
            v_dims = tuple(() if n == 1 else by_label[x] for n, x in zip(shape(value), v_labels, strict=True))
            summand = Summand(given, weights, product, (value, v_dims))
            out = tuple(by_label.get(label, ()) for label in product.out_labels)
            return Output(out, (summand,), given.form, given.bases)
        return None

    def number(self, value: object) -> float | None:
        return self.walk.constant(value)


def _size(piece: Piece) -> int:
    return piece.stop - piece.start


def _moved(node: fx.Node, given: Meaning) -> Meaning | None:
    """A view or a cast between floats: the same numbers."""
    if views.keeps_values(node) and op_name(node) not in views.EXPANDS:
        return given
    if op_name(node) in views.EXPANDS:
        added = len(shape(node)) - len(given.dims)
        return replace(given, dims=((),) * added + given.dims) if isinstance(given, Rows) else None
    if op_name(node) == "detach" and isinstance(given, Rows) and not given.is_exp:
        kinds = {kind for kind, *_ in given.form.terms}
        return given if kinds == {MAXIMUM} else None
    if isinstance(given, Exponentials):
        if op_name(node) in PERMUTES:
            order = permutation(node)
            return replace(given, dims=permute(given.dims, order), at=order.index(given.at))
        dims = views.after(views.source(node), node, given.dims)
        if dims is None or dims.count(given.keys) != 1 or not given.keys:
            return None
        return replace(given, dims=dims, at=dims.index(given.keys))
    dims = views.after(views.source(node), node, given.dims)
    return None if dims is None else replace(given, dims=dims)


def _spread(rows: Dims, over: Dims) -> bool:
    """Whether a number of each row, over `rows`, is broadcast over `over` as the row's own number."""
    tail = over[len(over) - len(rows) :]
    return len(rows) <= len(over) and all(dim in ((), of) for dim, of in zip(rows, tail, strict=True))


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
    return _part(r, pair, node.args[1])


def _part(r: Reader, several: fx.Node, index: object) -> Meaning | None:
    """One of the tensors that a split gives."""
    weights = r.of(several.args[0]) if several.args else None
    if op_name(several) not in ("split", "split_with_sizes", "chunk") or not isinstance(weights, Exponentials):
        return None
    values = several.meta.get("val")
    dim = arguments(several)["dim"]
    if not isinstance(index, int) or not isinstance(values, (list, tuple)) or dim % len(weights.dims) != weights.at:
        return None
    lengths = [int(v.shape[dim]) if isinstance(v.shape[dim], int) else -1 for v in values]
    return None if -1 in lengths else _cut(r, weights, sum(lengths[:index]), lengths[index])


@rule("slice", "narrow")
def _slice(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    weights = r.of(node.args[0])
    if not isinstance(weights, Exponentials) or given["dim"] % len(weights.dims) != weights.at:
        return None
    start, step = given.get("start") or 0, given.get("step", 1)
    if not isinstance(start, int) or step != 1:
        return None
    start = start + _size(weights.piece) if start < 0 else start
    return _cut(r, weights, start, shape(node)[weights.at])


def _cut(r: Reader, weights: Exponentials, start: int, length: int) -> Exponentials:
    first = weights.piece.start + start
    piece = replace(weights.piece, start=first, stop=first + length)
    keys = r.keys(piece)
    dims = (*weights.dims[: weights.at], keys, *weights.dims[weights.at + 1 :])
    return replace(weights, dims=dims, piece=piece, keys=keys)


@rule("logsumexp", "special_logsumexp")
def _logsumexp(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    return r.reduced(node, SUM)


@rule("maximum", "clamp", "clamp_min")
def _maximum(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    one, two = r.of(node.args[0]), given.get("other", given.get("min"))
    other, number = r.of(two), r.number(two)
    if not isinstance(one, Rows) or one.is_exp or given.get("max") is not None:
        return None
    sums = [_only(m.form, SUM) for m in (one, other) if isinstance(m, Rows) and not m.is_exp and m.dims == one.dims]
    if len(sums) == 2 and sums[0] and sums[1]:
        return replace(one, form=larger_sum(sums[0], sums[1]), bases=one.bases | other.bases)  # type: ignore[union-attr]
    pieces = _only(one.form, MAXIMUM)
    if pieces is None:
        return None
    if number is not None:
        return replace(one, form=Form.of(MAXIMUM, pieces | {Piece(None, number=number)}))
    if not isinstance(other, Rows) or other.is_exp or other.dims != one.dims:
        return None
    more = _only(other.form, MAXIMUM)
    if more is None:
        return None
    return replace(one, form=Form.of(MAXIMUM, pieces | more), bases=one.bases | other.bases)


def _only(form: Form, kind: str) -> frozenset[Piece] | None:
    terms = list(form.terms)
    return terms[0][1] if len(terms) == 1 and terms[0][0] == kind and terms[0][2] == 1 else None


# Exponentials


@rule("exp")
def _exp(r: Reader, node: fx.Node, given: Mapping[str, Any]) -> Meaning | None:
    inner = node.args[0]
    known = r.of(inner)
    if isinstance(known, Rows):
        fine = known.form.bounds()
        alone = [kind for kind, *_ in known.form.terms] == [MAXIMUM]
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
        if found is None or len(rows.dims) != rank or shape(found[0].node) != shape(node):  # type: ignore[arg-type]
            return None
        without = (*found[1][:at], (), *found[1][at + 1 :])
        if rows.dims == without and _is_along(rows.form, at):
            return _begun(node, found, -rows.form, rows.bases)
    return None


def _is_along(form: Form, at: int) -> bool:
    """Whether the keys of all tensors of the form are in dim `at`."""
    return all(piece.node is None or piece.dim == at for _, pieces, _ in form.terms for piece in pieces)


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
    one, two = r.of(node.args[0]), r.of(node.args[1])
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
    return replace(rows, form=-rows.form) if isinstance(rows, Rows) and rows.is_exp else None


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
        one, two = (two, one) if one is None else (one, two)
        other = right if r.of(left) is one else left
        if isinstance(one, Rows) and one.is_exp and two is None and r.number(other) == 1:
            form = one.form.added(Form())
            return None if form is None else replace(one, form=form)
    if not isinstance(one, Rows) or not isinstance(two, Rows) or one.dims != two.dims or one.is_exp != two.is_exp:
        return _number_minus(r, node, left, two)
    bases = one.bases | two.bases
    if not one.is_exp:
        form = one.form + two.form if op_name(node) == "add" else one.form - two.form
        return replace(one, form=form, bases=bases)
    added = one.form.added(two.form) if op_name(node) == "add" else None
    return None if added is None else Rows(one.dims, added, is_exp=True, bases=bases)


def _number_minus(r: Reader, node: fx.Node, left: object, rows: Meaning | None) -> Meaning | None:
    """A number minus a maximum: the exponent of one more key, whose score is that number. Only 0 is read."""
    is_log = op_name(node) != "add" and isinstance(rows, Rows) and not rows.is_exp
    return replace(rows, form=-rows.form) if is_log and isinstance(rows, Rows) and r.number(left) == 0 else None


def _added_outputs(r: Reader, one: Output, two: Output) -> Output | None:
    """The sum of two outputs that have the same factor. The features of the second get the names of the first's."""
    if one.form != two.form or len(one.dims) != len(two.dims):
        return None
    frame = {a.axis for rows in r._rows.values() for a in atoms(rows)} | {a.axis for k in r._keys.values() for a in k}
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
    one, two = r.of(left), r.of(right)
    divides = op_name(node) == "div"
    if not divides and isinstance(one, Rows) and not isinstance(two, Rows):
        one, two = two, one
    if one is None or not isinstance(two, Rows) or not two.is_exp or not _spread(two.dims, one.dims):
        return None
    if shape(node) != shape(left if r.of(left) is one else right):  # type: ignore[arg-type]
        return None
    if two.may_be_infinite or (isinstance(one, Rows) and (one.may_be_infinite or not one.is_exp)):
        return None
    form = one.form - two.form if divides else one.form + two.form
    return replace(one, form=form, bases=one.bases | two.bases)
