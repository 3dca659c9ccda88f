"""From the cases of a mask's element to the conditions under which a key is seen.

The evaluator gives the element at symbolic indices as cases (`masks/cases.py`). For
`(attention_mask[b, j] != 0) & (j <= i)` these are

    value 0 (hidden)   where  attention_mask[b, j] == 0
    value 0 (hidden)   where  j >= i + 1
    value 1 (seen)     where  attention_mask[b, j] == 1  and  j <= i

We look for inequalities that hold in every case in which the key is seen, and that can't all hold in a case in which
it is hidden. Then the key is seen exactly where they hold. Each inequality must be one that a kernel knows: a bound of
the key, or key padding (`masks/bounds.py`). Here `j <= i` becomes a `Band`, and the other one key padding. This is a
proof for every size, and for every value of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import fx

from neuron_attn_rewrite.masks.affine import Affine, Index, Truth, variable
from neuron_attn_rewrite.masks.bounds import KEY, QUERY, KeyBound, key_bound, key_padding, solve_for_key
from neuron_attn_rewrite.masks.cases import Case, Elements, Unknown
from neuron_attn_rewrite.masks.growing import compare_indices, never_decreases, two_of_a_row
from neuron_attn_rewrite.masks.spec import Band, Unproven
from neuron_attn_rewrite.patterns.axes import Dims
from neuron_attn_rewrite.patterns.site import Term, hides
from neuron_attn_rewrite.reasons import Reason

NOTHING = Affine()


@dataclass(frozen=True)
class Conditions:
    """A key is seen exactly where all of this holds."""

    band: Band = field(default_factory=Band)
    key_bounds: tuple[KeyBound, ...] = ()
    paddings: tuple[tuple[fx.Node, int, bool], ...] = ()
    """A tensor of which key j of batch element b reads element [b, j + start], the start, and whether 1 hides."""
    fill: float | None = None
    """The number by which keys are hidden, None if there are several."""
    assumed: tuple[fx.Node, ...] = ()
    """Integer inputs that were assumed to hold only 0 and 1."""


def conditions(
    term: Term, dims: Dims, sizes: tuple[Affine, ...], evaluator: Elements, first_key: Affine = NOTHING
) -> Conditions | Unproven:
    """The conditions under which a term shows a key.

    `dims` are (batch, heads, query, key) of the kernel, in the axes of the scores; `sizes` are their sizes. For some of
    the keys, `first_key` is the first one and the last size is how many they are; key 0 of the result is that one.
    """
    names = {dim: variable(Index(axis, size)) for axis, (dim, size) in enumerate(zip(dims, sizes, strict=True)) if dim}
    key, query = (names.get(dims[axis]) for axis in (KEY, QUERY))
    if key is not None:
        names[dims[KEY]] = key + first_key
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
    seen = [replace(case, guard=compare_indices(case.guard, evaluator)) for case in seen]
    shared = _exact_inequalities(seen, hidden, evaluator)
    if shared is None:
        return Unproven(Reason("mask-symbolic", "its visible keys can't be written as key bounds and key padding"))
    found = Conditions(fill=fills.pop() if len(fills) == 1 else None)
    for inequality in _without_implied(shared, evaluator):
        shows_itself = sizes[QUERY] == sizes[KEY] and _holds_for_own_key(inequality, key, query, evaluator)
        more = _add_inequality(found, inequality, key, shows_itself, evaluator)
        if more is None:
            return Unproven(Reason("mask-symbolic", "it has a condition that is neither a key bound nor key padding"))
        found = more
    return replace(found, assumed=tuple(evaluator.assumed))


def _visibility(term: Term, case: Case) -> tuple[bool | None, float | None]:
    """Whether the key is seen in a case (None: it can't be said), and the number that hides keys."""
    value = case.value
    if term.kind in ("show", "hide"):
        if not hides(term.fill) or (isinstance(value, Affine) and not value.is_constant):
            return None, None
        return (value not in (Affine(), 0.0)) == (term.kind == "show"), term.fill
    if isinstance(value, Affine):
        return (True, None) if value == Affine() else (None, None)
    if value == 0:
        return True, None
    fill = term.hiding(value)
    return (False, fill) if hides(fill) else (None, None)


def _exact_inequalities(seen: list[Case], hidden: list[Case], evaluator: Elements) -> list[Affine] | None:
    """Inequalities that hold exactly where a key is seen; None if none are found.

    Candidates are the inequalities of the seen cases. We keep those that hold in all seen cases, require that they
    contradict each hidden case, and remove those that follow from the others.
    """
    if not seen:
        return None
    candidates = {solve_for_key(g) for case in seen for g in case.guard}
    shared = [g for g in candidates if all(evaluator.always(g, case.guard) for case in seen)]
    if any(not evaluator.impossible(compare_indices([*case.guard, *shared], evaluator)) for case in hidden):
        return None
    for inequality in sorted(shared, key=lambda g: -len(g.terms)):
        others = [g for g in shared if g != inequality]
        if evaluator.always(inequality, others):
            shared = others
    return shared


def _without_implied(shared: list[Affine], evaluator: Elements) -> list[Affine]:
    """Without `row[a] >= row[b]` of a row that never decreases, if `a >= b` follows from the other inequalities."""

    def is_implied(inequality: Affine) -> bool:
        pair = two_of_a_row(inequality)
        if pair is None or inequality.constant < 0:
            return False
        if not never_decreases(pair[0].node, pair[0].index[:-1], evaluator):
            return False
        return evaluator.always(pair[0].index[-1] - pair[1].index[-1], [g for g in shared if g != inequality])

    return [g for g in shared if not is_implied(g)]


def _holds_for_own_key(inequality: Affine, key: Affine | None, query: Affine | None, evaluator: Elements) -> bool:
    """Whether the inequality always holds for the key of the query's own index."""
    if key is None or query is None:
        return False  # there is no bound either
    ((of, _),) = key.terms
    return evaluator.always(inequality.substitute(of, query))


def _add_inequality(
    found: Conditions, inequality: Affine, key: Affine | None, shows_itself: bool, evaluator: Elements
) -> Conditions | None:
    """The conditions and one more inequality; None if it is neither a bound of the key nor key padding."""
    truths = [v for v, _ in inequality.terms if isinstance(v, Truth)]
    if truths:
        padding = key_padding(inequality, truths[0], key, evaluator)
        return None if padding is None else replace(found, paddings=(*found.paddings, padding))
    bound = None if key is None else key_bound(inequality, key, evaluator)
    if bound is None:
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
    return replace(found, key_bounds=(*found.key_bounds, replace(bound, shows_itself=shows_itself)))
