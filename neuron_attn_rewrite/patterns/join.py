"""One product of query and key in place of several: the keys, and the masks, are joined along the keys.

A softmax may run over scores that come from several products with the same query, such as one with the keys of a cache
and one with new keys. The joined operands are drafts: new nodes that only a kernel call reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from neuron_attn_rewrite.graph.drafts import draft
from neuron_attn_rewrite.graph.nodes import arguments, dtype, op_name, shape
from neuron_attn_rewrite.graph.sizes import is_number
from neuron_attn_rewrite.patterns.axes import (
    Atom,
    Dim,
    Dims,
    atoms,
    axis_dim,
    dim_size,
    layout_steps,
)
from neuron_attn_rewrite.patterns.moved import cast, moved, uncut
from neuron_attn_rewrite.patterns.operands import Stage, View, chain, query_and_key
from neuron_attn_rewrite.patterns.peel import Scores, Walk
from neuron_attn_rewrite.patterns.products import Product
from neuron_attn_rewrite.patterns.rules import Blocked
from neuron_attn_rewrite.patterns.site import Term
from neuron_attn_rewrite.reasons import Reason

aten = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """The scores of some of the keys, followed back to their product."""

    scores: Scores
    product: Product

    @property
    def keys(self) -> Dim:
        return self.scores.axes[self.scores.key_dim]


def join(walk: Walk, outer: Scores, parts: Sequence[Part], at: fx.Node) -> tuple[Scores, Product]:
    """The scores and the product of all parts.

    Args:
        walk: of the finder.
        outer: the scores that the parts are joined to. Their key dim is as long as those of all parts together.
        parts: in the order of the keys. Apart from the key dim, their axes are those of `outer`.
        at: the node before which drafts are added. The model has read all parts there, and gives its output later.

    Raises:
        Blocked: the parts are not parts of one attention.
    """
    first = parts[0].scores
    for part in parts:
        _must_agree(outer, first, part.scores, at)
    query, key = _operands(walk, outer, parts, at)
    terms = _terms(outer, [part.scores.terms for part in parts], parts, at)
    joined = replace(
        first,
        node=at,
        axes=outer.axes,
        dims=outer.axes,
        terms=(*terms, *outer.terms),
        growth=max(part.scores.growth for part in parts),
        limit=min(part.scores.limit for part in parts),
        trail=("keys joined", *first.trail),
        is_part=outer.is_part,
    )
    nodes = tuple(node for part in parts for node in part.product.nodes)
    operands = ((query.node, query.dims), (key.node, key.dims))
    return joined, replace(parts[0].product, operands=operands, joins=nodes)


def _must_agree(outer: Scores, one: Scores, other: Scores, at: fx.Node) -> None:
    """Check that nothing but masks and biases differs between two parts.

    Raises:
        Blocked: something does.
    """
    for name in ("multiplier", "softcap", "floor", "safe"):
        if getattr(one, name) != getattr(other, name):
            raise Blocked(at, Reason("key-blocks", f"the parts of the scores differ in their {name}"))
    if other.tensor_scales != outer.tensor_scales or other.sink != outer.sink:
        raise Blocked(at, Reason("key-blocks", "a part of the scores has a tensor scale or a sink of its own"))


def _operands(walk: Walk, outer: Scores, parts: Sequence[Part], at: fx.Node) -> tuple[View, View]:
    """The one query, and the keys of all parts."""
    key_axis = outer.axes[outer.key_dim]
    whole = [part for part in parts if part.keys]
    if not whole:
        raise Blocked(at, Reason("one-key", "each part of the scores has only one key"))
    query, key = query_and_key(walk, whole[0].scores, whole[0].product)
    queries = chain(query, walk.evaluator)
    stages = []
    for part in parts:
        one, other = (query, key) if part is whole[0] else query_and_key(walk, part.scores, part.product, query)
        frame = {atom.axis for atom in (*atoms(outer.axes), *part.keys)}
        features = _same_query(walk, queries, chain(one, walk.evaluator), frame)
        if features is None:
            raise Blocked(at, Reason("key-blocks", "the parts of the scores are products with several queries"))
        stages.append([_renamed(stage, features) for stage in chain(other, walk.evaluator) if stage.scale == 1.0])
    joined = joined_operand([(of, part.keys) for of, part in zip(stages, parts, strict=True)], key_axis, at)
    if joined is None:
        raise Blocked(at, Reason("key-blocks", "the keys of its parts have different layouts"))
    return query, joined


def joined_operand(parts: Sequence[tuple[list[Stage], Dim]], whole: Dim, at: fx.Node) -> View | None:
    """The keys or values of all parts, as one tensor.

    Args:
        parts: the tensors that the operand of each part is made of, the deepest last, and what its keys run over.
        whole: what the joined keys run over.
        at: the node before which drafts are added.

    Returns:
        The deepest tensors of the same layout and dtype, joined along the keys; None if there are none.
    """
    lead, lead_keys = next((stages, keys) for stages, keys in parts if keys)
    for stage in reversed(lead):
        dims = stage.view.dims
        if dims.count(lead_keys) != 1:
            continue
        at_dim = dims.index(lead_keys)
        found = []
        for stages, keys in parts:
            orders = ((s.view.node, _order(s.view.dims, dims, at_dim, keys)) for s in reversed(stages))
            found.append(next(((node, order) for node, order in orders if order is not None), None))
        kept = [pair for pair in found if pair is not None]
        if len(kept) < len(found) or len({dtype(node) for node, _ in kept}) > 1:
            continue
        pieces = [
            node if order == sorted(order) else draft(at, aten.permute.default, node, order) for node, order in kept
        ]
        node = uncut(at, pieces, at_dim) or draft(at, aten.cat.default, pieces, at_dim)
        return View(node, (*dims[:at_dim], whole, *dims[at_dim + 1 :]))
    return None


def joined_deeper(walk: Walk, value: View, keys: Dim) -> View:
    """A value that is joined along the keys, from deeper tensors: heads are repeated in each part, not once for all."""
    node = value.node
    if op_name(node) != "cat" or value.dims.count(keys) != 1:
        return value
    parts, dim = node.args[0], arguments(node)["dim"] % len(value.dims)
    if value.dims[dim] != keys or not isinstance(parts, (list, tuple)):
        return value
    stages = []
    for part in parts:
        assert isinstance(part, fx.Node)
        if len(shape(part)) != len(value.dims):  # cat takes an empty vector too, such as a cache before its first keys
            return value
        own = axis_dim(next(walk.fresh_axes), shape(part)[dim])
        view = View(part, (*value.dims[:dim], own, *value.dims[dim + 1 :]))
        stages.append(([s for s in chain(view, walk.evaluator) if s.scale == 1.0], own))
    if not any(own for _, own in stages):
        return value
    deeper = joined_operand(stages, keys, node)
    return value if deeper is None or dim_size(atoms(deeper.dims)) == dim_size(atoms(value.dims)) else deeper


def _same_query(walk: Walk, one: list[Stage], other: list[Stage], frame: set[int]) -> dict[int, int] | None:
    """If two queries are the same tensor times the same number: the axes of the second's features, and the first's.

    The axes in `frame` are those of the scores, which both share.
    """
    for a in one:
        for b in other:
            if a.scale == b.scale and walk.made_alike(a.view.node, b.view.node):
                pairs = list(zip(atoms(b.view.dims), atoms(a.view.dims), strict=False))
                names = {theirs.axis: ours.axis for theirs, ours in pairs}
                shared = all(a == b or {a, b}.isdisjoint(frame) for a, b in names.items())
                if shared and _as_named(b.view.dims, names) == a.view.dims:
                    return names
    return None


def _renamed(stage: Stage, names: dict[int, int]) -> Stage:
    return replace(stage, view=View(stage.view.node, _as_named(stage.view.dims, names)))


def _as_named(dims: Dims, names: dict[int, int]) -> Dims:
    return tuple(tuple(Atom(names.get(a.axis, a.axis), a.stride, a.size) for a in dim) for dim in dims)


def _order(dims: Dims, like: Dims, at_dim: int, keys: Dim) -> list[int] | None:
    """The permutation from `dims` to the dims of another part, whose dim `at_dim` is that of the keys; None without."""
    wanted = [keys if i == at_dim else dim for i, dim in enumerate(like)]
    left = list(enumerate(dims))
    order = []
    for dim in wanted:
        found = next((pair for pair in left if pair[1] == dim), None)
        if found is None:
            return None
        left.remove(found)
        order.append(found[0])
    return None if left else order


def _terms(outer: Scores, given: list[tuple[Term, ...]], parts: Sequence[Part], at: fx.Node) -> list[Term]:
    """One term in place of those that do the same to several parts. Each leaves alone the keys of the other parts."""
    slots: list[dict[int, Term]] = []
    for i, terms in enumerate(given):
        last = -1
        for term in terms:
            place = next((n for n, s in enumerate(slots) if n > last and _alike(term, next(iter(s.values())))), None)
            if place is None:
                slots.append({})
                place = len(slots) - 1
            slots[place][i] = term
            last = place
    return [_joined_term(outer, slot, parts, at) for slot in slots]


def _alike(one: Term, other: Term) -> bool:
    """Whether two terms do the same with their tensors."""
    names = ("kind", "fill", "multiplier", "limit", "rounds_alike")
    same = all(getattr(one, name) == getattr(other, name) for name in names)
    return same and (one.kind != "add" or dtype(one.node) == dtype(other.node))


def _joined_term(outer: Scores, slot: dict[int, Term], parts: Sequence[Part], at: fx.Node) -> Term:
    term = next(iter(slot.values()))
    kind = dtype(term.node) if term.kind == "add" else torch.bool
    cut = _uncut_term(outer, slot, parts, at)
    if cut is not None:
        return cut
    pieces: dict[int, fx.Node] = {}
    for i, given in slot.items():
        axes = tuple(parts[i].keys if d == outer.key_dim else dim for d, dim in enumerate(outer.axes))
        layout = layout_steps(given.dims, axes)
        if layout is None:
            raise Blocked(at, Reason("mask-axes", f"{given.node.name} does not run along the axes of the scores"))
        node = moved(at, given.node, layout)
        pieces[i] = cast(at, node, kind)
    sizes = [max(shape(node)[d] for node in pieces.values()) for d in range(len(outer.axes))]
    whole = []
    for i, part in enumerate(parts):
        wanted = [dim_size(part.keys) if d == outer.key_dim else size for d, size in enumerate(sizes)]
        if not all(map(is_number, wanted)):
            raise Blocked(at, Reason("key-blocks", "the masks of its parts have open sizes"))
        if i not in pieces:
            neutral = 1 if term.kind == "show" else 0
            whole.append(draft(at, aten.new_full.default, next(iter(pieces.values())), wanted, neutral, dtype=kind))
        elif list(shape(pieces[i])) != wanted:
            whole.append(draft(at, aten.expand.default, pieces[i], wanted))
        else:
            whole.append(pieces[i])
    dims = tuple(outer.axes[d] if d == outer.key_dim or size > 1 else () for d, size in enumerate(sizes))
    return replace(term, node=draft(at, aten.cat.default, whole, outer.key_dim), dims=dims)


def _uncut_term(outer: Scores, slot: dict[int, Term], parts: Sequence[Part], at: fx.Node) -> Term | None:
    """The term of which each part has a piece along its keys."""
    term = slot[0] if len(slot) == len(parts) else None
    if term is None or term.dims.count(parts[0].keys) != 1 or not parts[0].keys:
        return None
    dim = term.dims.index(parts[0].keys)
    if any(slot[i].dims != (*term.dims[:dim], part.keys, *term.dims[dim + 1 :]) for i, part in enumerate(parts)):
        return None
    node = uncut(at, [slot[i].node for i in range(len(parts))], dim)
    dims = (*term.dims[:dim], outer.axes[outer.key_dim], *term.dims[dim + 1 :])
    return None if node is None else replace(term, node=node, dims=dims)
