"""From the cases of a mask's element to claims: on which conditions a key is seen.

If a key is seen exactly where some inequalities hold, and each of them bounds the key or asks for one element of a
0/1 vector, the mask is proven: for every size, and every value of its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import fx

from neuron_attn_rewrite.graph.nodes import tensor
from neuron_attn_rewrite.masks.affine import Affine, Below, Element, Floor, Index, Truth, variable
from neuron_attn_rewrite.masks.cases import Case, Elements, Unknown, is_one
from neuron_attn_rewrite.masks.growing import grows, straightened, two_of_a_row
from neuron_attn_rewrite.masks.spec import Band, Unproven
from neuron_attn_rewrite.patterns.axes import Dims
from neuron_attn_rewrite.patterns.site import MASKED, Term
from neuron_attn_rewrite.reasons import Reason

BATCH, HEAD, QUERY, KEY = range(4)


@dataclass(frozen=True)
class Limit:
    """A bound at run time: query i of batch element b sees key j only if `j >= end` (lower) or `j <= end`."""

    is_lower: bool
    end: Affine
    """A sum of sizes, elements of integer inputs, and the index of the query."""

    shows_itself: bool = False
    """Whether it lets each query see the key of its own index."""

    @property
    def is_runtime(self) -> bool:
        """Whether it depends on an input."""
        return any(isinstance(of, Element) for of in self.end.variables())

    def __str__(self) -> str:
        return f"key {'>=' if self.is_lower else '<='} {_text(self.end)}"


@dataclass(frozen=True)
class Conditions:
    """A key is seen exactly where all of this holds."""

    band: Band = field(default_factory=Band)
    limits: tuple[Limit, ...] = ()
    paddings: tuple[tuple[fx.Node, int, bool], ...] = ()
    """A tensor of which key j of batch element b reads element [b, j + start], the start, and whether 1 hides."""
    fill: float | None = None
    """The number by which keys are hidden, None if there are several."""
    assumed: tuple[fx.Node, ...] = ()
    """Inputs that were taken to hold only 0 and 1."""


def conditions(term: Term, dims: Dims, sizes: tuple[Affine, ...], evaluator: Elements) -> Conditions | Unproven:
    """What a term says along `dims`, the (batch, heads, query, key) of the kernel with their sizes."""
    names = {dim: variable(Index(axis, size)) for axis, (dim, size) in enumerate(zip(dims, sizes, strict=True)) if dim}
    if any(dim and dim not in names for dim in term.dims):
        return Unproven(Reason("mask-axes", "it does not run along the axes of the scores"))
    evaluator.assumed.clear()
    try:
        cases = evaluator.cases(term.node, tuple(names[dim] if dim else Affine() for dim in term.dims))
    except Unknown as unknown:
        return Unproven(Reason("mask-symbolic", str(unknown)))
    seen: list[Case] = []
    hidden: list[Case] = []
    fills: set[float] = set()
    for case in cases:
        visible, fill = _visibility(term, case)
        if visible is None:
            return Unproven(Reason("mask-bias", "it adds numbers that are neither 0 nor low enough to hide a key"))
        (seen if visible else hidden).append(case)
        fills |= {fill} if fill is not None else set()
    shared = _shared([replace(c, guard=straightened(c.guard, evaluator)) for c in seen], hidden, evaluator)
    if shared is None:
        return Unproven(Reason("mask-symbolic", "the visible keys are not what bounds and paddings leave"))
    key, query = (names.get(dims[axis]) for axis in (KEY, QUERY))
    found = Conditions(fill=fills.pop() if len(fills) == 1 else None)
    for inequality in _without_implied(shared, evaluator):
        itself = sizes[QUERY] == sizes[KEY] and _shows_itself(inequality, key, query, evaluator)
        more = _with(found, inequality, key, itself, evaluator)
        if more is None:
            return Unproven(Reason("mask-symbolic", "it asks for more than bounds of keys and paddings"))
        found = more
    return replace(found, assumed=tuple(evaluator.assumed))


def _visibility(term: Term, case: Case) -> tuple[bool | None, float | None]:
    """Whether the key is seen (None: neither), and the number that hides it."""
    value = case.value
    if term.kind in ("show", "hide"):
        if term.fill > MASKED or (isinstance(value, Affine) and not value.is_constant):
            return None, None
        visible = (value not in (Affine(), 0.0)) == (term.kind == "show")
        return visible, None if visible else term.fill
    if isinstance(value, Affine):
        return (True, None) if value == Affine() else (None, None)
    if value == 0:
        return True, None
    fill = value * term.multiplier
    return (False, fill) if fill <= MASKED else (None, None)


def _shared(seen: list[Case], hidden: list[Case], evaluator: Elements) -> list[Affine] | None:
    """Inequalities that hold exactly where a key is seen; None if there are none of the cases' own."""
    if not seen:
        return None
    candidates = {_solved(g) for case in seen for g in case.guard}
    shared = [g for g in candidates if all(evaluator.always(g, case.guard) for case in seen)]
    if any(not evaluator.impossible(straightened([*case.guard, *shared], evaluator)) for case in hidden):
        return None
    for inequality in sorted(shared, key=lambda g: -len(g.terms)):
        others = [g for g in shared if g != inequality]
        if evaluator.always(inequality, others):
            shared = others
    return shared


def _without_implied(shared: list[Affine], evaluator: Elements) -> list[Affine]:
    """Without comparisons in rows that never decrease, where the indices say it already."""

    def is_implied(inequality: Affine) -> bool:
        pair = two_of_a_row(inequality)
        if pair is None or inequality.constant < 0 or not grows(pair[0].node, pair[0].index[:-1], evaluator):
            return False
        return evaluator.always(pair[0].index[-1] - pair[1].index[-1], [g for g in shared if g != inequality])

    return [g for g in shared if not is_implied(g)]


def _shows_itself(inequality: Affine, key: Affine | None, query: Affine | None, evaluator: Elements) -> bool:
    """Whether it holds for the key of the query's own index."""
    if key is None or query is None:
        return False
    ((of, _),) = key.terms
    return evaluator.always(inequality.put(of, query))


def _solved(inequality: Affine) -> Affine:
    """The same, where it compares the floor of a sum with the key with something: as one of the sum itself."""
    for of, slope in inequality.terms:
        if isinstance(of, Floor) and abs(slope) == 1 and any(_is_key(v) for v in of.of.variables()):
            rest = inequality.without(of) * of.by
            return of.of + rest if slope > 0 else rest - of.of + (of.by - 1)
    return inequality


def _is_key(of: object) -> bool:
    return isinstance(of, Index) and of.axis == KEY


def _with(
    found: Conditions, inequality: Affine, key: Affine | None, itself: bool, evaluator: Elements
) -> Conditions | None:
    """The conditions and one more; None if it is not one that a kernel knows."""
    truths = [v for v, _ in inequality.terms if isinstance(v, Truth)]
    if truths:
        padding = _padding(inequality, truths[0], key, evaluator)
        return None if padding is None else replace(found, paddings=(*found.paddings, padding))
    bound = _bound(inequality, key, evaluator) if key is not None else None
    if bound is None or any(not _is_known(v) for v, _ in bound.end.terms):
        return None
    end = bound.end
    queries = [(v, c) for v, c in end.terms if isinstance(v, Index)]
    if len(end.terms) == 1 and queries and queries[0][1] == 1:
        band = found.band
        if bound.is_lower:
            band = Band(end.constant if band.lower is None else max(band.lower, end.constant), band.upper)
        else:
            band = Band(band.lower, end.constant if band.upper is None else min(band.upper, end.constant))
        return replace(found, band=band)
    return replace(found, limits=(*found.limits, replace(bound, shows_itself=itself)))


def _bound(inequality: Affine, key: Affine, evaluator: Elements) -> Limit | None:
    """An inequality as a bound on the key: it compares the key, or the key's element of a row that never decreases."""
    ((key_index, _),) = key.terms
    slope = inequality.coefficient(key_index)
    if abs(slope) == 1:
        return Limit(slope > 0, inequality.without(key_index) * -slope)
    of_key = [
        (of, c) for of, c in inequality.terms if isinstance(of, Element) and key_index in of.index[-1].variables()
    ]
    if slope or len(of_key) != 1:
        return None
    ((element, slope),) = of_key
    *row, place = element.index
    if abs(slope) != 1 or not grows(element.node, tuple(row), evaluator):
        return None
    number = inequality.without(element) * -slope + (slope < 0)
    end = variable(Below(element.node, tuple(row), number)) - (place - key) - (slope < 0)
    return Limit(slope > 0, end)


def _is_known(of: object) -> bool:
    """Whether a kernel's bounds can be computed from it: a size, the query, or an element for each row or batch."""
    if isinstance(of, Index):
        return of.axis == QUERY
    if isinstance(of, Floor):
        return all(map(_is_known, of.of.variables()))
    if isinstance(of, Below):
        return _runs_along(of.row, {BATCH}) and all(map(_is_known, of.number.variables()))
    if not isinstance(of, Element):
        return not isinstance(of, Truth)
    return _runs_along(of.index, {BATCH, QUERY})


def _runs_along(at: tuple[Affine, ...], axes: set[int]) -> bool:
    """Whether each index is a number, or runs over the whole of one of the axes, in their order."""
    along = [_axis(i) for i in at if not i.is_constant]
    known = [axis for axis in along if axis in axes]
    return known == along == sorted(set(known))


def _axis(index: Affine) -> int | None:
    """The axis over whose whole index it runs, plus a number."""
    if len(index.terms) != 1:
        return None
    ((of, slope),) = index.terms
    return of.axis if isinstance(of, Index) and slope == 1 else None


def _padding(
    inequality: Affine, of: Truth, key: Affine | None, evaluator: Elements
) -> tuple[fx.Node, int, bool] | None:
    """The vector of which each key reads its own element: the same for all of the batch, or one for each of it."""
    slope = inequality.coefficient(of)
    if len(inequality.terms) != 1 or inequality not in (variable(of) - 1, -variable(of)) or not of.index:
        return None
    *lead, last = of.index
    start = last - (key or Affine())
    value = tensor(of.node)
    assert value is not None
    wide = [(i, size) for i, size in zip(lead, value.shape, strict=False) if not is_one(size)]
    whole = [variable(Index(BATCH, evaluator.size(size))) for _, size in wide[:1]]
    if not start.is_constant or [i for i, _ in wide] != whole:
        return None
    return of.node, start.constant, slope < 0


def _text(end: Affine) -> str:
    def name(of: object) -> str:
        if isinstance(of, Index):
            return ("batch", "head", "query", "key")[of.axis]
        if isinstance(of, Element):
            return f"{of.node.name}[{', '.join(_text(i) for i in of.index)}]"
        if isinstance(of, Below):
            return f"first({of.node.name} >= {_text(of.number)})"
        if isinstance(of, Floor):
            text = _text(of.of)
            return f"({text if ' ' not in text else f'({text})'} // {of.by})"
        return str(getattr(of, "name", of))

    parts = [f"{'-' if c < 0 else '+'} {'' if abs(c) == 1 else f'{abs(c)} * '}{name(v)}" for v, c in _ordered(end)]
    if end.constant or not parts:
        parts.append(f"{'-' if end.constant < 0 else '+'} {abs(end.constant)}")
    return " ".join(parts).removeprefix("+ ")


def _ordered(end: Affine) -> list[tuple[object, int]]:
    return sorted(end.terms, key=lambda term: (isinstance(term[0], Index), term[1] < 0, str(term[0])))
