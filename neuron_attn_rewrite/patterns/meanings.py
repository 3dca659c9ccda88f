"""Reads the nodes of a graph in the algebra of `exponentials.py`: a rule for each operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from neuron_attn_rewrite.graph.nodes import PERMUTES, arguments, dtype, is_tensor, op_name, permutation, shape, tensor
from neuron_attn_rewrite.patterns import views
from neuron_attn_rewrite.patterns.axes import Dim, Dims, atoms, axis_dim, permute
from neuron_attn_rewrite.patterns.exponentials import (
    DETACHED,
    MAXIMUM,
    SUM,
    Exponentials,
    Filled,
    Form,
    Meaning,
    Output,
    Piece,
    Rows,
    Summand,
)
from neuron_attn_rewrite.patterns.operands import View, chain
from neuron_attn_rewrite.patterns.peel import Walk
from neuron_attn_rewrite.patterns.products import as_product
from neuron_attn_rewrite.patterns.scores import uniform

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
        return self._along(Piece(node, at, 0, shape(node)[at]))

    def _along(self, piece: Piece) -> Dims:
        assert piece.node is not None
        at, sizes = piece.dim, tuple(n for i, n in enumerate(shape(piece.node)) if i != piece.dim)
        if (at, sizes) not in self._rows:
            self._rows[at, sizes] = tuple(axis_dim(next(self.walk.fresh_axes), n) for n in sizes)
        rows = self._rows[at, sizes]
        return (*rows[:at], self.keys(piece), *rows[at:])

    def keys(self, piece: Piece) -> Dim:
        """What runs over the keys of a piece."""
        if piece not in self._keys:
            self._keys[piece] = axis_dim(next(self.walk.fresh_axes), piece.stop - piece.start)
        return self._keys[piece]

    def piece(self, scores: object, dim: object, through_detach: bool = False) -> tuple[Piece, Dims, int] | None:
        """A tensor as scores along a dim: the piece, what its dims run over, and the position of the keys."""
        if not is_tensor(scores):
            return None
        assert isinstance(scores, fx.Node)
        dims = [dim] if isinstance(dim, int) else dim
        node = views.value_source(scores, through_detach)
        if not isinstance(dims, (list, tuple)) or len(dims) != 1 or not isinstance(dims[0], int):
            return None
        if node in self.walk.evaluator.changed or not shape(node) or not dtype(node).is_floating_point:
            return None
        at = dims[0] % len(shape(node))
        start, stop = 0, shape(node)[at]
        while (cut := views.cut(node)) is not None and cut[1] == at and cut[0] not in self.walk.evaluator.changed:
            node, start, stop = views.value_source(cut[0], through_detach), cut[2] + start, cut[2] + stop
        piece = Piece(node, at, start, stop)
        return piece, self._along(piece), at

    def reduced(self, node: fx.Node, kind: str) -> Rows | None:
        """A maximum or log-sum-exp of scores along one dim."""
        given = arguments(node)
        found = self.piece(node.args[0], given.get("dim"), through_detach=kind == MAXIMUM)
        if found is None:
            return None
        piece, dims, at = found
        kept: Dims = ((),) if given.get("keepdim") else ()
        rows = (*dims[:at], *kept, *dims[at + 1 :])
        return Rows(rows, Form.of(kind, frozenset({piece})), is_exp=False)

    def sink(self, value: object, beside: Rows) -> Rows | None:
        """A tensor that does not run over keys, or its exponential, as one more key beside the scores in `beside`."""
        if beside.is_exp:
            value = value.args[0] if isinstance(value, fx.Node) and op_name(value) == "exp" else None
        if not is_tensor(value) or value in self.known or not dtype(value).is_floating_point:
            return None
        rank = len(beside.dims)
        sizes = beside.sizes[rank - len(shape(value)) :]
        if len(shape(value)) > rank or any(n not in (1, size) for n, size in zip(shape(value), sizes, strict=True)):
            return None
        scores = {piece.node for _, pieces, _ in beside.form.terms for piece in pieces if not piece.is_sink}
        stages = chain(View(value, views.broadcast(value, beside.dims)), self.walk.evaluator)
        last = [stage.view for stage in stages if stage.scale == 1.0][-1]
        if scores & {value, views.value_source(value)} or last.node in self.walk.evaluator.changed:
            return None
        piece = Piece(last.node, stop=1, rows=last.dims)
        return Rows(beside.dims, Form.of(SUM, frozenset({piece})), beside.is_exp)

    def both(self, left: object, right: object) -> tuple[Meaning | None, Meaning | None]:
        """The meanings of two operands. If one is a number of each row and the other a tensor, that is a sink."""
        one, two = self.of(left), self.of(right)
        if one is None and isinstance(two, Rows) and self.number(left) is None:
            return self.sink(left, two), two
        if two is None and isinstance(one, Rows) and self.number(right) is None:
            return one, self.sink(right, one)
        return one, two

    def axes(self) -> set[int]:
        """The axes of the rows and keys of all scores."""
        return {atom.axis for dims in self._rows.values() for atom in atoms(dims)} | {
            atom.axis for dim in self._keys.values() for atom in dim
        }

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
                if label == labels[given.at] and size != size_of(given.piece):
                    return None
                if size > 1 and not by_label.get(label):
                    by_label[label] = axis_dim(next(self.walk.fresh_axes), size)
            v_dims = tuple(() if n == 1 else by_label[x] for n, x in zip(shape(value), v_labels, strict=True))
            summand = Summand(given, weights, product, (value, v_dims))
            out = tuple(by_label.get(label, ()) for label in product.out_labels)
            return Output(out, (summand,), given.form, given.bases)
        return None

    def number(self, value: object) -> float | None:
        """A number, or the one that fills a tensor."""
        known = self.of(value)
        if isinstance(known, Filled):
            return known.number
        while isinstance(value, fx.Node) and (views.keeps_values(value) or op_name(value) in views.MOVES):
            value = views.source(value)
        return uniform(self.walk.evaluator, value)


def size_of(piece: Piece) -> int:
    return piece.stop - piece.start


def _moved(node: fx.Node, given: Meaning) -> Meaning | None:
    """A view or a cast between floats: the same numbers."""
    if isinstance(given, Filled):
        return given if views.keeps_values(node) or op_name(node) in views.MOVES else None
    if views.keeps_values(node) and op_name(node) not in views.EXPANDS:
        is_wide = views.value_source(node) is not node or not isinstance(given, Rows) or given.is_exp
        return given if is_wide else None  # a maximum of -1e9 is -inf in float16
    if op_name(node) in views.EXPANDS:
        added = len(shape(node)) - len(given.dims)
        return replace(given, dims=((),) * added + given.dims) if isinstance(given, Rows) else None
    if op_name(node) == "detach" and isinstance(given, Rows) and not given.is_exp:
        # Detached in one place and not in another, a maximum does not cancel in the gradients: it has another name.
        terms = [(DETACHED, pieces, factor) for kind, pieces, factor in given.form.terms if kind in (MAXIMUM, DETACHED)]
        return replace(given, form=Form(frozenset(terms))) if len(terms) == len(given.form.terms) else None
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


def spreads(rows: Dims, over: Dims) -> bool:
    """Whether a number of each row, over `rows`, is broadcast over `over` as the row's own number."""
    tail = over[len(over) - len(rows) :]
    return len(rows) <= len(over) and all(dim in ((), of) for dim, of in zip(rows, tail, strict=True))
