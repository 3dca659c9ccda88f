"""Sums of exponentials over several tensors of scores, in any order of steps.

A softmax may be computed in pieces. Each piece has scores s, and all of them share one sum of exponentials. We read
each node near them as a number of each row in terms of the pieces, such as

    sum(exp(s - m))               is  exp(log sum {s} - m)
    sum of two of these           is  exp(log sum {s, t} - m)
    exp(s - m) / (that sum)       is  exp(s - log sum {s, t})
    the same times the values     is  exp(-log sum {s, t}) * (exp(s) v)

Two such products, added, are an attention with the keys of s and t if nothing but `-log sum {s, t}` is left. Whether m
is a maximum does not matter for the value. It does for the range, so an exponent must be bounded from above.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import fx

from neuron_attn_rewrite.patterns.axes import Dim, Dims, sizes
from neuron_attn_rewrite.patterns.products import Product


@dataclass(frozen=True, order=True)
class Piece:
    """The scores of some keys: `start` to `stop` along a dim.

    Two others are one key whose score is the same for many rows, a sink: a `number`, if there is no tensor, and a
    tensor that does not run over keys, whose dims run over `rows`.
    """

    node: fx.Node | None
    dim: int = 0
    start: int = 0
    stop: int = 0
    number: float = 0.0
    rows: Dims | None = None

    @property
    def is_sink(self) -> bool:
        return self.node is None or self.rows is not None

    def overlaps(self, other: Piece) -> bool:
        same = (self.node, self.dim) == (other.node, other.dim)
        return same and (self == other if self.node is None else self.start < other.stop and other.start < self.stop)


Pieces: TypeAlias = frozenset[Piece]
Bases: TypeAlias = frozenset[tuple[str, Pieces]]
"""The maxima and sums in all exponents so far. One that lacks a key of the whole softmax may be -inf."""
ZERO = Piece(None)
MAXIMUM, DETACHED, SUM = "maximum", "detached maximum", "log-sum-exp"


def union(one: Pieces, other: Pieces) -> Pieces | None:
    """The keys of both, with neighbouring columns joined. None if they have keys in common."""
    if any(a.overlaps(b) for a in one for b in other):
        return None
    return merged((*one, *other))


def merged(pieces: Iterable[Piece]) -> Pieces:
    found: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: (p.node.name if p.node else "", p.dim, p.start, p.number)):
        last = found[-1] if found else None
        joins = last is not None and not piece.is_sink and (last.node, last.dim) == (piece.node, piece.dim)
        if joins and found[-1].stop == piece.start:
            piece = replace(found.pop(), stop=piece.stop)
        found.append(piece)
    return frozenset(found)


def holds(of: Pieces, other: Pieces) -> bool:
    """Whether all keys of `other` are among those of `of`."""
    return all(
        any(replace(b, start=a.start, stop=a.stop) == a and b.start <= a.start and a.stop <= b.stop for b in of)
        for a in other
    )


@dataclass(frozen=True)
class Form:
    """A sum of maxima and logarithms of sums of exponentials, each with a factor."""

    terms: frozenset[tuple[str, Pieces, int]] = frozenset()

    @staticmethod
    def of(kind: str, pieces: Pieces, factor: int = 1) -> Form:
        return Form(frozenset({(kind, pieces, factor)}))

    def __add__(self, other: Form) -> Form:
        total: dict[tuple[str, Pieces], int] = {}
        for kind, pieces, factor in (*self.terms, *other.terms):
            total[kind, pieces] = total.get((kind, pieces), 0) + factor
        return Form(frozenset((kind, pieces, factor) for (kind, pieces), factor in total.items() if factor))

    def __neg__(self) -> Form:
        return Form(frozenset((kind, pieces, -factor) for kind, pieces, factor in self.terms))

    def __sub__(self, other: Form) -> Form:
        return self + -other

    def bounds(self, pieces: Pieces | None = None) -> bool:
        """Whether `exp(form)`, or `exp(s + form)` for scores s of `pieces`, is bounded.

        The form must be `x - y` with the keys of x among those of y. `exp(s)` alone counts as bounded, as it does for
        any softmax that subtracts no maximum.
        """
        if pieces is None:
            plus = [of for _, of, factor in self.terms if factor == 1]
            pieces = plus[0] if len(plus) == 1 else frozenset({ZERO}) if not plus else None
        minus = [of for _, of, factor in self.terms if factor == -1]
        if pieces is None or len(minus) > 1 or any(abs(factor) != 1 for *_, factor in self.terms):
            return False
        return not self.terms or (len(minus) == 1 and holds(minus[0], pieces))

    @property
    def bases(self) -> Bases:
        return frozenset((kind, of) for kind, of, _ in self.terms if not all(piece.is_sink for piece in of))

    def as_sum(self) -> tuple[Pieces, Form]:
        """`exp(form)` as the sum of exponentials of some scores, times the exponential of the rest."""
        sums = [(kind, of, factor) for kind, of, factor in self.terms if kind == SUM and factor == 1]
        if len(sums) != 1:
            return frozenset({ZERO}), self
        return sums[0][1], Form(self.terms - {sums[0]})

    def only(self, kind: str) -> Pieces | None:
        """The keys, if this is one maximum or sum alone."""
        terms = list(self.terms)
        return terms[0][1] if len(terms) == 1 and terms[0][0] == kind and terms[0][2] == 1 else None

    def added(self, other: Form) -> Form | None:
        """`log(exp(self) + exp(other))`; None if it is no such form."""
        (one, rest), (two, same) = self.as_sum(), other.as_sum()
        divisor, more = (-rest).as_sum()
        if not other.terms and not more.terms:
            two, same = divisor, rest  # 1 is a sum divided by itself
        both = union(one, two) if rest == same else None
        return None if both is None else Form.of(SUM, both) + rest


def larger_sum(one: Pieces, other: Pieces) -> Form:
    """The larger of two logarithms of sums. It is known by both, and bounds the scores of both."""
    which = sorted(",".join(sorted(f"{p.node}:{p.dim}:{p.start}:{p.stop}" for p in of)) for of in (one, other))
    return Form.of(f"larger of {which}", one | other)


@dataclass(frozen=True)
class Rows:
    """A number of each row: `form`, or its exponential."""

    dims: Dims
    form: Form
    is_exp: bool
    may_be_infinite: bool = False
    bases: Bases = frozenset()

    @property
    def sizes(self) -> tuple[int, ...]:
        return sizes(self.dims)

    @property
    def is_at_least_one(self) -> bool:
        """Whether this is a sum of exponentials of which the largest is 1."""
        keys, rest = self.form.as_sum()
        terms = list(rest.terms)
        is_maximum = len(terms) == 1 and terms[0][0] in (MAXIMUM, DETACHED) and terms[0][2] == -1
        return self.is_exp and is_maximum and holds(keys, terms[0][1])


@dataclass(frozen=True)
class Exponentials:
    """`exp(s + form)` for the scores of one piece."""

    dims: Dims
    piece: Piece
    keys: Dim
    """What the key dim runs over."""
    at: int
    """The position of the key dim."""
    form: Form
    start: fx.Node
    """The first node that held these exponentials."""
    bases: Bases = frozenset()


@dataclass(frozen=True)
class Summand:
    """The exponentials of one piece, times its values and summed over its keys."""

    exponentials: Exponentials
    weights: fx.Node
    product: Product
    value: tuple[fx.Node, Dims]


@dataclass(frozen=True)
class Output:
    """`exp(form)` times a sum of summands."""

    dims: Dims
    summands: tuple[Summand, ...]
    form: Form
    bases: Bases = frozenset()

    @property
    def pieces(self) -> Pieces | None:
        """All keys. None if a key is used twice."""
        given = [summand.exponentials.piece for summand in self.summands]
        twice = any(a.overlaps(b) for i, a in enumerate(given) for b in given[:i])
        return None if twice else merged(given)


@dataclass(frozen=True)
class Filled:
    """A tensor that holds one number, such as a running maximum, sum or output before the first block of keys."""

    number: float


Meaning: TypeAlias = Rows | Exponentials | Output | Filled
