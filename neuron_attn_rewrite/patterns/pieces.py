"""Attention in pieces: products of several exponentials with their values, normalised by the sum of them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from neuron_attn_rewrite.graph.drafts import draft
from neuron_attn_rewrite.graph.nodes import dtype, module_path, shape
from neuron_attn_rewrite.graph.sizes import number_of
from neuron_attn_rewrite.patterns import meaning_rules, row_rules  # noqa: F401  fill a table
from neuron_attn_rewrite.patterns.axes import Dim, Dims, axis_dim
from neuron_attn_rewrite.patterns.build import Found, build
from neuron_attn_rewrite.patterns.exponentials import DETACHED, MAXIMUM, SUM, Meaning, Output, Piece, holds
from neuron_attn_rewrite.patterns.features import peel_and_join
from neuron_attn_rewrite.patterns.join import Part, join, joined_deeper, joined_operand
from neuron_attn_rewrite.patterns.meanings import Reader
from neuron_attn_rewrite.patterns.operands import Stage, View, chain, query_and_key
from neuron_attn_rewrite.patterns.peel import Scores, Walk
from neuron_attn_rewrite.patterns.rules import Blocked
from neuron_attn_rewrite.patterns.site import MASKED, AttentionSite, Term, UnknownAttention
from neuron_attn_rewrite.patterns.softmax_matmul import (
    between,
    is_router,
    made_of,
    operands_made,
    operands_of,
    readers_of,
)
from neuron_attn_rewrite.patterns.softmaxes import as_softmax
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.values.exact import largest
from neuron_attn_rewrite.values.ranges import Ranges

aten = torch.ops.aten


@dataclass(frozen=True)
class Candidate:
    """A node that holds the output of an attention in pieces."""

    node: fx.Node
    output: Output
    keys: tuple[Piece, ...]
    """The pieces that the sum of exponentials runs over."""

    @property
    def has_pieces(self) -> bool:
        """Whether it has several products, or a sink."""
        return len(self.output.summands) > 1 or any(piece.is_sink for piece in self.keys)

    @property
    def anchor(self) -> fx.Node:
        """The first exponential or softmax."""
        return min(summand.exponentials.start for summand in self.output.summands)


def find_pieces(walk: Walk, graph: fx.Graph) -> Iterator[tuple[AttentionSite | UnknownAttention, set[fx.Node]]]:
    """Each attention in pieces, and the nodes that compute it from the scores on."""
    reader = Reader(walk)
    for found in _candidates(reader, graph):
        scores = [piece.node for piece in found.keys if piece.node is not None and not piece.is_sink]
        inside = between(scores, [found.node])
        if not found.has_pieces and any(_is_softmax(walk, node) for node in inside):
            continue  # the rules of softmaxes.py read it
        try:
            site = _site(walk, reader, found)
        except Blocked as blocked:
            if is_router(blocked.node):
                continue
            site = UnknownAttention(module_path(found.anchor), PATTERN, found.anchor, blocked.reason)
        if isinstance(site, UnknownAttention):
            starts = (summand.exponentials.start for summand in found.output.summands)
            site = replace(site, others=tuple(start for start in starts if start is not found.anchor))
        yield site, inside


PATTERN = "matmul > softmax in pieces > matmul"


def _is_softmax(walk: Walk, node: fx.Node) -> bool:
    try:
        return as_softmax(walk, node) is not None
    except Blocked:
        return True


def _candidates(reader: Reader, graph: fx.Graph) -> Iterator[Candidate]:
    """Each output that is normalised over its keys. Of several that are made of each other, the one with most keys."""
    found: dict[fx.Node, Candidate] = {}
    inner: dict[fx.Node, set[fx.Node]] = {}
    """The candidates of which a node is a sum or a multiple."""
    for node, meaning in reader.read(graph).items():
        if not isinstance(meaning, Output):
            continue
        is_product = any(summand.product.node is node for summand in meaning.summands)
        under = set() if is_product else set().union(*(inner.get(n, ()) for n in node.all_input_nodes))
        given = _normalised(meaning)
        if given and not any(found[n].keys == given for n in under):
            for part in under:
                del found[part]
            found[node], under = Candidate(node, meaning, given), {node}
        inner[node] = under
    yield from found.values()


def _normalised(meaning: Meaning) -> tuple[Piece, ...] | None:
    """The pieces over which an output is normalised: all of its own, and constant scores. None if it is not."""
    if not isinstance(meaning, Output) or meaning.pieces is None:
        return None
    ((kind, over, factor), *more) = list(meaning.form.terms) or [("", frozenset(), 0)]
    own = {piece for piece in over if not piece.is_sink}
    if more or kind != SUM or factor != -1 or own != set(meaning.pieces):
        return None
    return tuple(sorted(over, key=lambda piece: (piece.is_sink, piece.node is None, piece.node, piece.start)))


def _site(walk: Walk, reader: Reader, found: Candidate) -> AttentionSite | UnknownAttention:
    """Follow the pieces to their products, and join them.

    Raises:
        Blocked: they are not parts of one attention.
    """
    at = found.node
    tensors = [piece for piece in found.keys if not piece.is_sink]
    sinks = [piece for piece in found.keys if piece.is_sink]
    dim = tensors[0].dim
    whole = [reader.frame(piece.node, piece.dim) for piece in tensors if piece.node is not None]
    for piece, dims in zip(tensors, whole, strict=True):
        assert piece.node is not None
        is_whole = piece.start == 0 and piece.stop == shape(piece.node)[piece.dim]
        if not is_whole or piece.dim != dim or _rows(dims, dim) != _rows(whole[0], dim):
            raise Blocked(at, Reason("key-blocks", "its parts do not run along the same rows"))
    if len(sinks) > 1:
        raise Blocked(at, Reason("sink-shape", "more than one sink beside the keys"))
    count = sum(n.meta["val"].shape[dim] for piece in tensors if (n := piece.node) is not None)
    all_keys = whole[0][dim] if len(tensors) == 1 else axis_dim(next(walk.fresh_axes), number_of(count))
    axes = (*whole[0][:dim], all_keys, *whole[0][dim + 1 :])
    first = tensors[0].node
    assert first is not None
    bases = [base for _, base in found.output.bases]
    subtracts_maximum = bool(bases) and all(base == frozenset(found.keys) for base in bases)
    outer = Scores(first, axes, dim, axes, limit=largest(dtype(at)), overflows=not subtracts_maximum)
    if sinks:
        outer = replace(outer, sink=_sink(found, sinks[0], axes), trail=("sink",))
    if len(tensors) == 1:
        scores, product = peel_and_join(walk, outer)
        parts = [Part(scores, product)]
    else:
        parts = []
        for piece, dims in zip(tensors, whole, strict=True):
            assert piece.node is not None
            start = replace(outer, node=piece.node, dims=dims, axes=dims, is_part=True)
            parts.append(Part(*peel_and_join(walk, start)))
        scores, product = join(walk, outer, parts, at)
    _must_be_finite(walk, found, tensors, parts)
    value = _value(walk, reader, found, tensors, all_keys, at)
    query, key = query_and_key(walk, scores, product)
    given = [*operands_of(scores), *(summand.value[0] for summand in found.output.summands)]
    inside = between(product.nodes, [at])
    made = made_of(product.nodes, inside) - {at}
    return build(
        Found(
            pattern=" > ".join(("matmul", *scores.trail, "softmax in pieces", "matmul")),
            anchor=found.anchor,
            output=View(at, found.output.dims),
            scores=scores.axes,
            key_dim=dim,
            query=query,
            key=key,
            value=value,
            scale=scores.multiplier * (scores.softcap or 1.0),
            tensor_scales=scores.tensor_scales,
            sink=View(*scores.sink) if scores.sink else None,
            readers=(*readers_of(inside, {at}, found.anchor), *operands_made(made, given, found.anchor)),
            **scores.facts(),
        ),
        walk.evaluator,
    )


def _sink(found: Candidate, sink: Piece, axes: Dims) -> tuple[fx.Node, Dims]:
    """The tensor of a sink, and what its dims run over."""
    if sink.node is not None and sink.rows is not None:
        return sink.node, sink.rows
    like, sizes = found.output.summands[0].value[0], [1] * len(axes)
    number = draft(found.node, aten.new_full.default, like, sizes, sink.number, dtype=torch.float32)
    return number, ((),) * len(axes)


def _rows(dims: Dims, dim: int) -> Dims:
    return (*dims[:dim], *dims[dim + 1 :])


def _value(walk: Walk, reader: Reader, found: Candidate, tensors: Sequence[Piece], all_keys: Dim, at: fx.Node) -> View:
    """The values of all pieces, in the order of the keys."""
    place = {piece.node: i for i, piece in enumerate(tensors)}
    summands = sorted(
        found.output.summands, key=lambda s: (place[s.exponentials.piece.node], s.exponentials.piece.start)
    )
    stages: list[tuple[list[Stage], Dim]] = [
        (chain(View(*summand.value), walk.evaluator), summand.exponentials.keys) for summand in summands
    ]
    if len(stages) == 1:
        return joined_deeper(walk, View(*summands[0].value), summands[0].exponentials.keys)
    view = joined_operand([([s for s in of if s.scale == 1.0], keys) for of, keys in stages], all_keys, at)
    if view is None:
        raise Blocked(at, Reason("key-blocks", "the values of its parts have different layouts"))
    return view


def _must_be_finite(walk: Walk, found: Candidate, tensors: Sequence[Piece], parts: Sequence[Part]) -> None:
    """Check that no maximum or sum of some of the keys can be -inf, which gives NaN.

    If all keys are hidden by a finite number, a maximum of some of them is that number, as the maximum of all is. A
    logarithm of a sum is not exact there, and the model weighs its parts in its own way. With one maximum and one sum
    for all keys, the model does what a softmax does.

    Raises:
        Blocked: it may be so.
    """
    total = frozenset(tensors)
    partial = [(kind, base) for kind, base in found.output.bases if not holds(base, total)]
    ranges = Ranges(walk.evaluator.changed)
    has_sums = any(kind not in (MAXIMUM, DETACHED) for kind, _ in partial)
    if has_sums and not any(_is_seen(walk, *pair, pair[0].scores.terms) for pair in zip(parts, tensors, strict=True)):
        raise Blocked(found.node, Reason("key-blocks", "each part has a sum of its own, and all may be hidden"))
    part_of = {piece.node: part for piece, part in zip(tensors, parts, strict=True)}
    for _, base in partial:
        known = [(part_of[piece.node], piece) for piece in base if piece.node in part_of]
        infinite = [[term for term in part.scores.terms if _may_be_infinite(term, ranges)] for part, _ in known]
        if not any(_is_seen(walk, *pair, terms) for pair, terms in zip(known, infinite, strict=True)):
            raise Blocked(found.node, Reason("key-blocks", "a part with a maximum of its own may be hidden by -inf"))


def _is_seen(walk: Walk, part: Part, piece: Piece, terms: Sequence[Term]) -> bool:
    """Whether each row has a score in the piece that none of these terms hides."""
    tables = walk.tables(terms[0].node) if len(terms) == 1 else None
    if tables is None:
        return not terms
    (term,), seen = terms, torch.tensor(True)
    for value in (tables[0].lo, tables[0].hi):
        if term.kind == "add":
            seen = seen & (value * term.multiplier > MASKED)
        else:
            seen = seen & (value.bool() == (term.kind == "show"))
    if term.dims.count(part.keys) == 1:
        along = term.dims.index(part.keys)
        seen = seen.narrow(along, piece.start, piece.stop - piece.start).any(along)
    return bool(seen.all())


def _may_be_infinite(term: Term, ranges: Ranges) -> bool:
    if term.kind != "add":
        return term.fill == -torch.inf
    return (ranges.of(term.node) * ranges.of(term.multiplier)).lowest == -torch.inf
