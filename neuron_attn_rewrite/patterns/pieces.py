"""Attention in pieces: products of several exponentials with their values, normalised by the sum of them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from neuron_attn_rewrite.graph.drafts import draft
from neuron_attn_rewrite.graph.nodes import dtype, module_path, shape
from neuron_attn_rewrite.patterns import meaning_rules as _rules  # noqa: F401  fills a table
from neuron_attn_rewrite.patterns.axes import Dim, Dims, axis_dim
from neuron_attn_rewrite.patterns.build import Found, build
from neuron_attn_rewrite.patterns.exponentials import SUM, Meaning, Output, Piece, holds
from neuron_attn_rewrite.patterns.features import peel_and_join
from neuron_attn_rewrite.patterns.join import Part, join, joined_deeper, joined_operand
from neuron_attn_rewrite.patterns.meanings import Reader
from neuron_attn_rewrite.patterns.operands import Stage, View, chain, query_and_key
from neuron_attn_rewrite.patterns.peel import Scores, Walk
from neuron_attn_rewrite.patterns.rules import Blocked
from neuron_attn_rewrite.patterns.site import AttentionSite, Term, UnknownAttention
from neuron_attn_rewrite.patterns.softmax_matmul import between, made_of, operands_made, operands_of, readers_of
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
    def anchor(self) -> fx.Node:
        """The first exponential or softmax."""
        return min(summand.exponentials.start for summand in self.output.summands)


def find_pieces(walk: Walk, graph: fx.Graph) -> Iterator[tuple[AttentionSite | UnknownAttention, set[fx.Node]]]:
    """Each attention in pieces, and the nodes that compute it from the scores on."""
    reader = Reader(walk)
    for found in _candidates(reader, graph):
        scores = [piece.node for piece in found.keys if piece.node is not None and not piece.is_sink]
        inside = between(scores, [found.node])
        try:
            site = _site(walk, reader, found)
        except Blocked as blocked:
            site = UnknownAttention(module_path(found.anchor), PATTERN, found.anchor, blocked.reason)
        if isinstance(site, UnknownAttention):
            starts = (summand.exponentials.start for summand in found.output.summands)
            site = replace(site, others=tuple(start for start in starts if start is not found.anchor))
        yield site, inside


PATTERN = "matmul > softmax in pieces > matmul"


def _candidates(reader: Reader, graph: fx.Graph) -> Iterator[Candidate]:
    """The attentions in pieces, without those of a single product: the rules of `softmaxes.py` read these."""
    known = reader.read(graph)
    found: dict[fx.Node, Candidate] = {}
    first: dict[fx.Node, fx.Node] = {}
    """For each normalised output, the first node with the same keys."""
    for node, meaning in known.items():
        given = _normalised(meaning)
        if given is None:
            continue
        assert isinstance(meaning, Output)
        made_of = [first[n] for n in node.all_input_nodes if n in first]
        same = next((n for n in made_of if _normalised(known[n]) == given), None)
        first[node] = same or node
        if same is None and (len(meaning.summands) > 1 or any(piece.is_sink for piece in given)):
            found[node] = Candidate(node, meaning, given)
            for part in made_of:
                found.pop(part, None)
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
    count = sum(piece.stop for piece in tensors)
    all_keys = whole[0][dim] if len(tensors) == 1 else axis_dim(next(walk.fresh_axes), count)
    axes = (*whole[0][:dim], all_keys, *whole[0][dim + 1 :])
    first = tensors[0].node
    assert first is not None
    bases = found.output.bases
    subtracts_maximum = bool(bases) and all(base == frozenset(found.keys) for base in bases)
    outer = Scores(first, axes, dim, axes, limit=largest(dtype(at)), overflows=not subtracts_maximum)
    if sinks:
        without = not all(holds(base, frozenset(sinks)) for base in found.output.bases)
        outer = replace(outer, sink=_sink(found, sinks[0], axes), nan_beside_sink=without, trail=("sink",))
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
    _must_be_finite(walk, found, parts)
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


def _must_be_finite(walk: Walk, found: Candidate, parts: Sequence[Part]) -> None:
    """Check that a piece with a maximum or sum of its own can't be hidden as a whole.

    Such a piece gives NaN if all of its scores are -inf. If all pieces are hidden by a finite number, the model weighs
    them in its own way. With one maximum and one sum for all pieces, the model does what a softmax does.

    Raises:
        Blocked: it may be hidden.
    """
    total = frozenset(piece for piece in found.keys if not piece.is_sink)
    if all(holds(base, total) for base in found.output.bases):
        return
    if all(part.scores.terms for part in parts):
        raise Blocked(found.node, Reason("key-blocks", "each part has a maximum of its own, and all may be hidden"))
    ranges = Ranges(walk.evaluator.changed)
    for part in parts:
        if any(_may_be_infinite(term, ranges) for term in part.scores.terms):
            raise Blocked(found.node, Reason("key-blocks", "a part with a maximum of its own may be hidden by -inf"))


def _may_be_infinite(term: Term, ranges: Ranges) -> bool:
    if term.kind != "add":
        return term.fill == -torch.inf
    return (ranges.of(term.node) * ranges.of(term.multiplier)).lowest == -torch.inf
