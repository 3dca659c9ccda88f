"""One product of query and key in place of a sum of several: their features are joined.

The scores of latent attention (DeepSeek) are a product over the latent features plus one over the rotary features:

    (q k^T + r s^T) * scale  =  scale * [q, r] [k, s]^T

The joined operands are drafts: new nodes that only a kernel call reads. A product that is not joined stays a term of
the scores, so nothing is lost where joining is not possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import inf, prod

import torch
from torch import fx

from neuron_attn_rewrite.graph.drafts import draft
from neuron_attn_rewrite.graph.nodes import arguments, dtype, is_tensor, op_name, shape
from neuron_attn_rewrite.patterns import views
from neuron_attn_rewrite.patterns.axes import Atom, Dim, Dims, atoms, axis_dim, dim_size, layout_steps, merged, refine
from neuron_attn_rewrite.patterns.join import Part
from neuron_attn_rewrite.patterns.moved import cast, moved, uncut
from neuron_attn_rewrite.patterns.operands import View, chain, features, query_and_key
from neuron_attn_rewrite.patterns.peel import Scores, Walk, scaled_by_number
from neuron_attn_rewrite.patterns.products import Product, as_product
from neuron_attn_rewrite.patterns.rules import Blocked
from neuron_attn_rewrite.patterns.site import Term
from neuron_attn_rewrite.values.exact import product as product_of
from neuron_attn_rewrite.values.exact import sums_are_fine
from neuron_attn_rewrite.values.ranges import LARGE, Ranges

aten = torch.ops.aten
MOST_PRODUCTS = 8
SMALLEST_FACTOR = 2.0**-4
"""The smallest factor of a query in 16 bits: with a smaller one it may lose digits at the end of its range."""


@dataclass(frozen=True)
class Summand:
    """One of the products: the deepest tensors that its query and key are made of."""

    query: View
    key: View
    features: Dim
    factor: float
    """What multiplies the product of these two in the scores."""
    nodes: tuple[fx.Node, ...]
    """The products of the graph."""
    kind: torch.dtype
    """The dtype of the model's product."""


def peel_and_join(walk: Walk, start: Scores) -> tuple[Scores, Product]:
    """Walk back to the product of query and key, and join to it the products that are added to the scores.

    Raises:
        Blocked: at a node that no rule knows.
    """
    scores, product = walk.peel(start)
    first = _summand(walk, Part(scores, product))
    # The normal form adds terms outside of a softcap and of tensor scales.
    if first is None or scores.softcap is not None or scores.tensor_scales:
        return scores, product
    summands: list[Summand] = [first]
    terms: list[Term] = []
    for i, term in enumerate(scores.terms):
        found = _products(walk, scores, term) if _is_added_last(scores.terms[: i + 1]) else []
        if found and all(_agrees(walk, one, first, scores) for one in found):
            summands += found
            # The model has rounded the sum of the others before it adds this product.
            terms = [replace(before, rounds_alike=False) for before in terms]
        else:
            terms.append(term)
    try:
        joined = _joined(walk, scores, summands) if len(summands) > 1 else None
    except Blocked:
        joined = None
    if joined is None:
        return scores, product
    at, factor, operands = joined
    nodes = tuple(node for one in summands for node in one.nodes)
    trail = ("features joined", *scores.trail)
    scores = replace(scores, node=at, dims=scores.axes, multiplier=factor, terms=tuple(terms), trail=trail)
    return scores, replace(product, operands=operands, joins=nodes)


def _is_added_last(terms: Sequence[Term]) -> bool:
    """Whether the last of some terms could be the first: no mask comes before it, or one that leaves only -inf."""
    *before, last = terms
    return last.kind == "add" and all(term.kind == "add" or term.fill == -inf for term in before)


def _products(walk: Walk, scores: Scores, term: Term) -> list[Summand]:
    """The products of which a term is the sum. Empty if it is anything else."""
    if _digits(term.dims, scores.axes) != _digits(scores.axes, term.dims):
        return []  # as a dense operand it is smaller than the scores
    waiting = [replace(scores, node=term.node, dims=term.dims, multiplier=term.multiplier)]
    found: list[Summand | None] = []
    while waiting:
        at = waiting.pop()
        product, scaled = as_product(at.node), scaled_by_number(walk.evaluator, at.node)
        back = views.before(at.node, at.dims, walk.evaluator)
        try:
            if product is not None and product.addend is None:
                found.append(_summand(walk, Part(at.scaled(product.alpha), product)))
            elif product is None and back is not None:
                waiting.append(at.to(*back))
            elif product is None and scaled is not None:
                waiting.append(at.to(scaled[0]).scaled(scaled[1]))
            elif (sides := _sides(at.node)) is not None:
                waiting += [at.to(side).scaled(weight) for side, weight in sides]
            else:
                return []
        except Blocked:
            return []
        if len(waiting) + len(found) > MOST_PRODUCTS or None in found:
            return []
    return [one for one in found if one]


def _sides(node: fx.Node) -> list[tuple[fx.Node, float]] | None:
    """The two sides of a sum, if both have its shape, and their factors."""
    if op_name(node) not in ("add", "sub") or not dtype(node).is_floating_point:
        return None
    left, right = node.args[:2]
    weight = arguments(node)["alpha"]
    if not is_tensor(left) or not is_tensor(right) or shape(left) != shape(right):
        return None
    return [(left, 1.0), (right, float(weight if op_name(node) == "add" else -weight))]


def _summand(walk: Walk, part: Part) -> Summand | None:
    try:
        query, key = query_and_key(walk, part.scores, part.product)
    except Blocked:
        return None
    along = features(query.dims, key.dims, part.scores.axes)
    q, k = (chain(view, walk.evaluator)[-1] for view in (query, key))
    scale = product_of(q.scale, k.scale)
    factor = None if scale is None else product_of(part.scores.multiplier, scale)
    nodes = part.product.nodes
    return Summand(q.view, k.view, along, factor, nodes, dtype(part.product.node)) if factor else None


def _agrees(walk: Walk, one: Summand, first: Summand, scores: Scores) -> bool:
    """Whether a product has several features, all keys, and the dtype and the rows of the first one.

    A product of masks, or one that may be large enough to hide keys, is better left to the proof of masks.
    """
    everything = [*atoms(scores.axes), *atoms(one.key.dims), *atoms(first.key.dims)]
    keys = set(refine(scores.axes[scores.key_dim], everything))
    of_one, of_first = (set(refine(atoms(summand.key.dims), everything)) for summand in (one, first))

    def rows(of: set[Atom]) -> int:
        """The dim of the rows, as `roles.py` finds it: the last one that keys do not run over."""
        dims = enumerate(scores.axes)
        return max((i for i, d in dims if i != scores.key_dim and not set(refine(d, everything)) & of), default=-1)

    ranges = Ranges(walk.evaluator.changed)
    known = [range_.magnitude for view in (one.query, one.key) if (range_ := ranges.of(view.node)).magnitude < inf]
    return (
        one.kind == first.kind
        and dim_size(one.features) > 1
        and dim_size(first.features) > 1
        and keys <= of_one
        and keys <= of_first
        and rows(of_one) == rows(of_first) >= 0
        and any(walk.evaluator.is_opaque(view.node) for view in (one.query, one.key))
        and abs(one.factor) * dim_size(one.features) * prod(known) < LARGE
    )


Operands = tuple[tuple[fx.Node, Dims], tuple[fx.Node, Dims]]


def _joined(walk: Walk, scores: Scores, given: Sequence[Summand]) -> tuple[fx.Node, float, Operands] | None:
    """The query and the key of all products, what multiplies their product, and the node before which they are made."""
    given = sorted(given, key=lambda one: (views.cut(one.key.node) or (None, 0, 0))[2])
    factor = max((one.factor for one in given), key=abs)
    at = max(scores.node, *(node for one in given for node in one.nodes))
    queries = [_scaled(at, one, product_of(one.factor, 1 / factor)) for one in given]
    along = [one.features for one in given]
    whole = axis_dim(next(walk.fresh_axes), sum(map(dim_size, along)))
    if None in queries:
        return None
    query = _beside([view for view in queries if view], along, whole, scores.axes, at)
    key = _beside([one.key for one in given], along, whole, scores.axes, at)
    if query is None or key is None:
        return None
    return at, factor, ((query.node, query.dims), (key.node, key.dims))


def _scaled(at: fx.Node, one: Summand, factor: float | None) -> View | None:
    """The query of a product times a number; None if its dtype would lose it."""
    node = one.query.node
    if factor == 1.0:
        return one.query
    if not sums_are_fine(dtype(node)):
        node = cast(at, node, torch.promote_types(dtype(node), one.kind))
    if factor is None or (not sums_are_fine(dtype(node)) and abs(factor) < SMALLEST_FACTOR):
        return None
    return View(draft(at, aten.mul.Tensor, node, factor), one.query.dims)


def _beside(parts: Sequence[View], along: Sequence[Dim], whole: Dim, axes: Dims, at: fx.Node) -> View | None:
    """Queries or keys beside each other, along their features. Each runs over everything that one of them runs over."""
    dims = parts[0].dims
    if dims.count(along[0]) == 1:
        dim = dims.index(along[0])
        is_cut = all(v.dims == (*dims[:dim], own, *dims[dim + 1 :]) for v, own in zip(parts, along, strict=True))
        if is_cut and (known := uncut(at, [view.node for view in parts], dim)) is not None:
            return View(known, (*dims[:dim], whole, *dims[dim + 1 :]))
    given = [atom for view in parts for atom in atoms(view.dims)]
    everything = [*atoms(axes), *given]
    have = set(refine(given, everything))
    lead = tuple(merged(atom for atom in refine(dim, everything) if atom in have) for dim in axes)
    lead = tuple(dim for dim in lead if dim)
    kind = reduce(torch.promote_types, (dtype(view.node) for view in parts))
    pieces = []
    for view, own in zip(parts, along, strict=True):
        layout = layout_steps(view.dims, (*lead, own), full=True)
        if layout is None:
            return None
        pieces.append(cast(at, moved(at, view.node, layout), kind))
    return View(draft(at, aten.cat.default, pieces, -1), (*lead, whole))


def _digits(dims: Dims, others: Dims) -> list[Atom]:
    return sorted(refine(atoms(dims), atoms(others)))
