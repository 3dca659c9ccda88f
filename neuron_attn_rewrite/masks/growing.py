"""Rows of numbers that never decrease along the keys, as those that number packed sequences.

Several sequences can be packed into one row. `transformers` then counts the breaks in `position_ids`:

    position_ids                                  0  1  2  0  1  0  1  2
    breaks = position_ids.diff(prepend=-1) != 1   0  0  0  1  0  1  0  0
    part = breaks.cumsum()                        0  0  0  1  1  2  2  2

A query sees a key only if both have the same `part`. It is a running sum of zeros and ones, so two facts hold:

* It never decreases (`never_decreases`). So `part[key] >= number` holds from one key on: it is a bound of the key.
* If `part` is the same at two indices, there is no break between them, and `position_ids` rises by 1 at each step. So
  the difference of the two positions is the difference of the two indices (`compare_indices`), and a causal mask that
  compares positions is a causal mask of indices.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from neuron_attn_rewrite.graph.nodes import arguments, op_name, tensor
from neuron_attn_rewrite.masks.affine import Affine, Element, Index, variable
from neuron_attn_rewrite.masks.cases import INDICES, At, Case, Elements, Unknown


def never_decreases(node: fx.Node, row: At, e: Elements) -> bool:
    """Whether a row of a tensor is a running sum of 0 and 1. `row` holds the indices of all dims but the last."""
    return bool(_addends(node, row, e)[1])


def _addends(node: fx.Node, row: At, e: Elements) -> tuple[Affine, tuple[Case, ...]]:
    """A new index, and the cases of the number that a running sum adds at it. No cases unless it adds only 0 and 1."""
    value = tensor(node)
    if op_name(node) != "cumsum" or value is None or arguments(node)["dim"] % value.dim() != len(row):
        return Affine(), ()
    if value.dtype not in INDICES:
        return Affine(), ()  # a sum in int8 falls when it wraps
    place = e.fresh_index(e.size(value.shape[-1]))
    try:
        addends = e.cases(arguments(node)["self"], (*row, place))
    except Unknown:
        return place, ()
    return place, addends if all(case.value in (Affine(), Affine(1)) for case in addends) else ()


def compare_indices(inequalities: Iterable[Affine], e: Elements) -> frozenset[Affine]:
    """The same inequalities, with differences of positions in one sequence written as differences of indices.

    If `part[query] == part[key]` is among the inequalities, `position[key]` becomes `position[query] + (key - query)`.
    So `position[query] - position[key] >= 0` becomes `query - key >= 0`.
    """
    given = frozenset(inequalities)
    for one in given:
        pair = two_of_a_row(one)
        if pair is None or one.constant or -one not in given:
            continue
        query, key = sorted(pair, key=_axis)
        here, there = query.index[-1], key.index[-1]
        for far, place, step in _steps(query, e):
            ((old, _),) = far.substitute(place, there).terms
            new = far.substitute(place, here) + (there - here) * step
            given = frozenset(g.substitute(old, new) for g in given)
    return given


def _axis(number: Element) -> int:
    """The last axis along which the number is read: 2 for an element of the query, 3 for one of the key."""
    return max((of.axis for of in number.index[-1].variables() if isinstance(of, Index)), default=-1)


def two_of_a_row(inequality: Affine) -> tuple[Element, Element] | None:
    """`row[a]` and `row[b]`, if the inequality is `row[a] - row[b] + constant >= 0` with elements of one row."""
    signs = {c: of for of, c in inequality.terms}
    more, less = signs.get(1), signs.get(-1)
    if len(inequality.terms) != 2 or not isinstance(more, Element) or not isinstance(less, Element):
        return None
    return (more, less) if more.node is less.node and more.index[:-1] == less.index[:-1] else None


def _steps(number: Element, e: Elements) -> list[tuple[Affine, Index, int]]:
    """The rows that rise by a fixed step wherever the running sum of `number` stays the same.

    Each is given as its element at an index, this index, and the step.
    """
    place, addends = _addends(number.node, number.index[:-1], e)
    same = [c for c in addends if c.value == Affine() and not e.impossible([*c.guard, place - 1])]
    if not same:
        return []
    rises = ({rise for g in case.guard if -g in case.guard and (rise := _rise(g, place))} for case in same)
    return sorted(set.intersection(*rises), key=str)


def _rise(equality: Affine, place: Affine) -> tuple[Affine, Index, int] | None:
    """`row[place]`, the index `place` and `step`, if the equality is `row[place] - row[place - 1] - step == 0`."""
    pair = two_of_a_row(equality)
    ((at, _),) = place.terms
    assert isinstance(at, Index)
    if pair is None or pair[0].index[-1] - 1 != pair[1].index[-1]:
        return None
    others = (*pair[0].index[:-1], pair[0].index[-1] - place)
    return None if any(at in i.variables() for i in others) else (variable(pair[0]), at, -equality.constant)
