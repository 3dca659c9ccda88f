"""Sums of variables against plain integers, and what they contradict against every point of a small box."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from neuron_attn_rewrite.masks.affine import (
    Affine,
    Below,
    Element,
    Floor,
    Index,
    Size,
    Truth,
    Variable,
    impossible,
    negated,
    variable,
)

ROW = fx.Graph().placeholder("row")
SIZES = tuple(map(Size, "xyz"))
X, Y, Z = map(variable, SIZES)
VALUES = dict(zip(SIZES, (7, -3, 2), strict=True))


def number(of: Affine) -> int:
    """The value of a sum. Element i of the row is 5 i + 3, and every other element is not zero."""

    def value(of: Variable) -> int:
        if isinstance(of, Floor):
            return number(of.of) // of.by
        if isinstance(of, Element):
            return sum(5 * number(i) + 3 for i in of.index)
        if isinstance(of, Truth):
            return int(sum(map(number, of.index)) % 2 != 0)
        if isinstance(of, Below):
            return sum(5 * i + 3 < number(of.number) for i in range(9)) + 100 * sum(map(number, of.row))
        assert isinstance(of, Size)
        return VALUES[of]

    return of.constant + sum(value(v) * c for v, c in of.terms)


def compound(inner: st.SearchStrategy[Affine]) -> st.SearchStrategy[Affine]:
    return st.one_of(
        st.builds(lambda a, b, c: a + b * c, inner, inner, st.integers(-3, 3)),
        st.builds(lambda a, by: variable(Floor(a, by)), inner, st.integers(1, 4)),
        st.builds(lambda a: variable(Element(ROW, (a,))), inner),
        st.builds(lambda a: variable(Truth(ROW, (a,))), inner),
        st.builds(lambda a, b: variable(Below(ROW, (a,), b)), inner, inner),
    )


SUMS = st.recursive(st.sampled_from([X, Y, Z]) | st.builds(Affine, st.integers(-4, 4)), compound, max_leaves=4)


@given(SUMS, SUMS, st.integers(-3, 3))
def test_arithmetic(a: Affine, b: Affine, k: int) -> None:
    assert number(a + b) == number(a) + number(b) and number(a - b) == number(a) - number(b)
    assert number(a * k) == k * number(a) and number(-a) == -number(a)
    assert number(a + k) == number(a) + k and number(a - k) == number(a) - k
    assert number(negated(a)) == -number(a) - 1
    assert a - a == Affine() and a * 0 == Affine() and (a + b) - b == a and a.is_constant == (not a.terms)
    assert all(c for _, c in (a + b).terms)
    for of, c in a.terms:
        assert a.coefficient(of) == c and a.without(of) == a - variable(of) * c
        assert of in a.variables() or isinstance(of, Floor)
    unused = Size("unused")
    assert a.coefficient(unused) == 0 and a.without(unused) == a


@given(SUMS, SUMS)
def test_substitution(a: Affine, b: Affine) -> None:
    old = VALUES[SIZES[0]]
    replaced = a.substitute(SIZES[0], b)
    try:
        VALUES[SIZES[0]] = number(b)
        expected = number(a)
    finally:
        VALUES[SIZES[0]] = old
    assert number(replaced) == expected


def test_what_a_sum_depends_on() -> None:
    floor, element = Floor(X + Y, 2), Element(ROW, (X,))
    below = Below(ROW, (X,), Z + 1)
    assert set((variable(floor) * 2 + variable(element)).variables()) == {*SIZES[:2], element}
    assert set(variable(below).variables()) == {below, SIZES[2]}


CONTRADICT: dict[str, tuple[Affine, ...]] = {
    "less than zero": (Affine(-1),),
    "one and its negation": (X - Y, Y - X - 1),
    "in a circle": (X - Y, Y - Z, Z - X - 1),
    "with factors": (X * 2 - Y, Y - Z * 3, Z * 3 - X * 2 - 1),
    "between two integers": (X * 2 - Y * 2 - 1, Y * 2 - X * 2 + 1),
    "divided": (X * 2 - 4, -X + 1),
    "rounded in a sum": (X * 3 - 4, -X * 3 + 5),
    "rounded behind a sum": (X + Y - 1, X - Y, -X - Z, Z),
    "out of the range": (-X - 1,),
}
CONTRADICT["out of a range that names another"] = (variable(Index(9, X)) - X,)
TOGETHER: dict[str, tuple[Affine, ...]] = {
    "nothing": (),
    "zero": (Affine(),),
    "a border": (X - Y, Y - X),
    "two borders": (X * 2 - Y, Y - X * 2),
    "rounded": (X * 3 - 3, -X * 3 + 5),
    "the end of the range": (-X,),
    "the end of a range that names another": (variable(Index(9, X)) - X + 1,),
}


def ranges(of: Variable) -> list[Affine]:
    return [variable(of), of.size - 1 - variable(of)] if isinstance(of, Index) else [variable(of)]


@pytest.mark.parametrize("name", CONTRADICT)
def test_a_contradiction_is_found(name: str) -> None:
    assert impossible(CONTRADICT[name], ranges)


@pytest.mark.parametrize("name", TOGETHER)
def test_what_can_hold_together(name: str) -> None:
    assert not impossible(TOGETHER[name], ranges)


def linear(most: int) -> Any:
    terms = st.tuples(*[st.integers(-most, most)] * 4)
    return st.lists(terms.map(lambda c: X * c[0] + Y * c[1] + Z * c[2] + c[3]), max_size=5)


@given(linear(3))
def test_what_holds_at_a_point_is_not_impossible(inequalities: list[Affine]) -> None:
    old = dict(VALUES)
    try:
        for point in itertools.product(range(4), repeat=3):
            VALUES.update(zip(SIZES, point, strict=True))
            if all(number(i) >= 0 for i in inequalities):
                assert not impossible(inequalities, ranges)
                return
    finally:
        VALUES.update(old)


@given(st.lists(st.tuples(st.sampled_from([X, Y, Z]), st.sampled_from([X, Y, Z]), st.integers(-2, 2)), max_size=5))
def test_differences_are_decided(given: list[tuple[Affine, Affine, int]]) -> None:
    """Inequalities between two variables: elimination is exact, and a box of the sum of all constants is enough."""
    inequalities = [a - b + c for a, b, c in given]
    found = impossible(inequalities, ranges)
    values = itertools.product(range(2 * len(given) + 1), repeat=3)
    old = dict(VALUES)
    try:
        possible = any(
            not VALUES.update(zip(SIZES, point, strict=True)) and all(number(i) >= 0 for i in inequalities)
            for point in values
        )
    finally:
        VALUES.update(old)
    assert found != possible


def test_elimination_gives_up_rather_than_grow() -> None:
    many = [variable(Size(f"a{i}")) - X for i in range(401)]
    assert not impossible([*many, Affine(-1) - X], lambda of: [])
    assert impossible([*many[:50], Affine(-1) - X, X], lambda of: [])
