"""Integer linear arithmetic: sums of variables, and whether inequalities between them can hold together.

An `Affine` is a sum such as `query - key + 3`. An inequality is written as one sum that is at least 0: `key <= query`
is `query - key`, and its negation `key >= query + 1` is `key - query - 1`.

`impossible` decides whether some inequalities contradict each other. It eliminates one variable after the other
(Fourier-Motzkin elimination): from `query - key >= 0` and `key - query - 1 >= 0` it adds up to `-1 >= 0`, which is
false, so the two can't hold together. To show that an inequality follows from others, add its negation to them and
show that this is impossible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import reduce
from math import gcd
from typing import TypeAlias

from torch import fx

MOST_INEQUALITIES = 400
"""With more inequalities than these, elimination stops and the answer is that they may be possible."""


@dataclass(frozen=True)
class Index:
    """The index along one axis of the kernel: 0 batch, 1 head, 2 query, 3 key. Larger numbers are made by
    `Facts.fresh_index`."""

    axis: int
    size: Affine


@dataclass(frozen=True)
class Size:
    """A symbolic size: an expression of torch's symbols."""

    name: str


@dataclass(frozen=True)
class Element:
    """An element of an integer tensor, whose value is known only at run time."""

    node: fx.Node
    index: tuple[Affine, ...]


@dataclass(frozen=True)
class Truth:
    """1 if an element of a tensor is not zero, otherwise 0."""

    node: fx.Node
    index: tuple[Affine, ...]


@dataclass(frozen=True)
class Floor:
    """A sum divided by a positive number, rounded down."""

    of: Affine
    by: int


@dataclass(frozen=True)
class Below:
    """How many elements of a row of an integer tensor are less than a number.

    The row never decreases, so this is the index of the first element that is at least the number.
    """

    node: fx.Node
    row: tuple[Affine, ...]
    number: Affine


Variable: TypeAlias = Index | Size | Element | Truth | Floor | Below


@dataclass(frozen=True)
class Affine:
    """`sum(coefficient * variable) + constant`."""

    constant: int = 0
    terms: frozenset[tuple[Variable, int]] = field(default_factory=frozenset)

    @property
    def is_constant(self) -> bool:
        return not self.terms

    def variables(self) -> Iterator[Variable]:
        """Everything on which it depends, also inside of a `Floor` or of the number of a `Below`."""
        for of, _ in self.terms:
            if isinstance(of, Floor):
                yield from of.of.variables()
                continue
            yield of
            if isinstance(of, Below):
                yield from of.number.variables()

    def coefficient(self, variable: Variable) -> int:
        return next((c for v, c in self.terms if v == variable), 0)

    def without(self, variable: Variable) -> Affine:
        return Affine(self.constant, frozenset(t for t in self.terms if t[0] != variable))

    def substitute(self, old: Variable, new: Affine) -> Affine:
        """The same sum with a variable replaced by a sum, also in the indices of elements."""
        total = Affine(self.constant)
        for of, coefficient in self.terms:
            total += (new if of == old else _substitute(of, old, new)) * coefficient
        return total

    def __add__(self, other: Affine | int) -> Affine:
        if isinstance(other, int):
            return Affine(self.constant + other, self.terms)
        if not other.terms:
            return Affine(self.constant + other.constant, self.terms)
        total = dict(self.terms)
        for variable, coefficient in other.terms:
            total[variable] = total.get(variable, 0) + coefficient
        return Affine(self.constant + other.constant, frozenset((v, c) for v, c in total.items() if c))

    def __mul__(self, factor: int) -> Affine:
        terms = frozenset((v, c * factor) for v, c in self.terms if factor)
        return Affine(self.constant * factor, terms)

    def __neg__(self) -> Affine:
        return self * -1

    def __sub__(self, other: Affine | int) -> Affine:
        return self + (-other)


def variable(of: Variable) -> Affine:
    """The sum that is only this variable."""
    return Affine(0, frozenset([(of, 1)]))


def _substitute(of: Variable, old: Variable, new: Affine) -> Affine:
    if isinstance(of, (Element, Truth)):
        return variable(replace(of, index=tuple(i.substitute(old, new) for i in of.index)))
    if isinstance(of, Floor):
        return variable(replace(of, of=of.of.substitute(old, new)))
    if isinstance(of, Below):
        return variable(
            replace(of, row=tuple(i.substitute(old, new) for i in of.row), number=of.number.substitute(old, new))
        )
    return variable(of)


Guard: TypeAlias = frozenset[Affine]
"""Inequalities that hold together: each of the sums is at least 0."""


def negated(inequality: Affine) -> Affine:
    """The sum that is at least 0 exactly where the given one is not."""
    return -inequality - 1


def impossible(inequalities: Iterable[Affine], ranges: Callable[[Variable], Iterable[Affine]]) -> bool:
    """Whether no integers satisfy all inequalities and the ranges of their variables. False if this can't be shown.

    `ranges` gives the inequalities that always hold of a variable. Each inequality is rounded to integers.
    """
    known: set[Affine] = set()
    waiting = list(inequalities)
    bounded: set[Variable] = set()
    while waiting:
        inequality = waiting.pop()
        known.add(_rounded(inequality))
        for of, _ in inequality.terms:
            if of not in bounded:
                bounded.add(of)
                waiting += ranges(of)
    while True:
        if any(not k.terms and k.constant < 0 for k in known):
            return True
        known = {k for k in known if k.terms}
        if not known or len(known) > MOST_INEQUALITIES:
            return False
        variables = {v for k in known for v, _ in k.terms}
        of = min(variables, key=lambda v: _cost(known, v))
        above = [k for k in known if k.coefficient(of) > 0]
        below = [k for k in known if k.coefficient(of) < 0]
        known = {k for k in known if not k.coefficient(of)}
        known |= {_rounded(a * -b.coefficient(of) + b * a.coefficient(of)) for a in above for b in below}


def _cost(known: Iterable[Affine], of: Variable) -> int:
    """How many inequalities the elimination of a variable adds."""
    signs = [k.coefficient(of) for k in known]
    return sum(c > 0 for c in signs) * sum(c < 0 for c in signs)


def _rounded(inequality: Affine) -> Affine:
    """Divided by the common divisor of its coefficients, rounded down: `2 * key - 3 >= 0` is `key - 2 >= 0`."""
    shared = reduce(gcd, (abs(c) for _, c in inequality.terms), 0)
    if shared <= 1:
        return inequality
    return Affine(inequality.constant // shared, frozenset((v, c // shared) for v, c in inequality.terms))
