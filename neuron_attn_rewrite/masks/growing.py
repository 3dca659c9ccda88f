"""Running sums of what is never negative: rows that never decrease, as those that number packed sequences.

Which keys have at least a number is then one bound on the key. And where a sequence is numbered by counting the breaks
in a row of positions, two elements with the same number have no break between them: their positions lie as far apart
as they do.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from neuron_attn_rewrite.graph.nodes import arguments, op_name, tensor
from neuron_attn_rewrite.masks.affine import Affine, Element, Index, variable
from neuron_attn_rewrite.masks.cases import At, Case, Elements, Unknown


def grows(node: fx.Node, row: At, e: Elements) -> bool:
    """Whether a row of a tensor never decreases: it is the running sum of zeros and ones."""
    return bool(_addends(node, row, e)[1])


def _addends(node: fx.Node, row: At, e: Elements) -> tuple[Affine, tuple[Case, ...]]:
    """What a running sum of zeros and ones adds at an index of its own; nothing if the tensor is none."""
    value = tensor(node)
    if op_name(node) != "cumsum" or value is None or arguments(node)["dim"] % value.dim() != len(row):
        return Affine(), ()
    place = e.bind(e.size(value.shape[-1]))
    try:
        addends = e.cases(arguments(node)["self"], (*row, place))
    except Unknown:
        return place, ()
    return place, addends if all(case.value in (Affine(), Affine(1)) for case in addends) else ()


def straightened(inequalities: Iterable[Affine], e: Elements) -> frozenset[Affine]:
    """The same inequalities, where positions of one sequence are compared: as ones between their indices."""
    given = frozenset(inequalities)
    for one in given:
        pair = two_of_a_row(one)
        if pair is None or one.constant or -one not in given or _axis(pair[0]) > _axis(pair[1]):
            continue
        here, there = (number.index[-1] for number in pair)
        for far, place, step in _steps(pair[0], e):
            ((old, _),) = far.put(place, there).terms
            new = far.put(place, here) + (there - here) * step
            given = frozenset(g.put(old, new) for g in given)
    return given


def _axis(number: Element) -> int:
    """The last axis along which it is read: the position of a key is told by that of the query."""
    return max((of.axis for of in number.index[-1].variables() if isinstance(of, Index)), default=-1)


def two_of_a_row(inequality: Affine) -> tuple[Element, Element] | None:
    """The elements of one row that are compared: the larger, then the smaller."""
    signs = {c: of for of, c in inequality.terms}
    more, less = signs.get(1), signs.get(-1)
    if len(inequality.terms) != 2 or not isinstance(more, Element) or not isinstance(less, Element):
        return None
    return (more, less) if more.node is less.node and more.index[:-1] == less.index[:-1] else None


def _steps(number: Element, e: Elements) -> list[tuple[Affine, Index, int]]:
    """Rows that rise by a fixed step wherever a running sum stays the same: an element, the sum's index, the step."""
    place, addends = _addends(number.node, number.index[:-1], e)
    same = [c for c in addends if c.value == Affine() and not e.impossible([*c.guard, place - 1])]
    if not same:
        return []
    rises = ({rise for g in case.guard if -g in case.guard and (rise := _rise(g, place))} for case in same)
    return sorted(set.intersection(*rises), key=str)


def _rise(equality: Affine, place: Affine) -> tuple[Affine, Index, int] | None:
    """Of `row[place] - row[place - 1] - step == 0` the first element, the index and the step."""
    pair = two_of_a_row(equality)
    ((at, _),) = place.terms
    assert isinstance(at, Index)
    if pair is None or pair[0].index[-1] - 1 != pair[1].index[-1]:
        return None
    others = (*pair[0].index[:-1], pair[0].index[-1] - place)
    return None if any(at in i.variables() for i in others) else (variable(pair[0]), at, -equality.constant)
