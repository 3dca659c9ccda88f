"""Inequalities of a mask as bounds of the key and as key padding: what a kernel can be given.

A `KeyBound` is `key >= end` or `key <= end`, where the kernel call can compute `end` for each batch element and query.
Three kinds of inequalities can be read this way:

    cache_position[query] - key >= 0             key <= cache_position[query]
    query // 4 - key // 4 >= 0                   key <= 4 * (query // 4) + 3          (`solve_for_key`)
    part[batch, key] - part[batch, query] >= 0   key >= first(part >= part[batch, query])

The last one needs a `part` that never decreases along the keys (`masks/growing.py`). An inequality that asks for one
element of a 0/1 tensor at the key, such as `attention_mask[batch, key] - 1 >= 0`, is key padding.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from neuron_attn_rewrite.graph.nodes import tensor
from neuron_attn_rewrite.masks.affine import Affine, Below, Element, Floor, Index, Truth, variable
from neuron_attn_rewrite.masks.cases import Elements, is_one
from neuron_attn_rewrite.masks.growing import never_decreases

BATCH, HEAD, QUERY, KEY = range(4)
"""The axes of the kernel, as numbers of an `Index`."""


@dataclass(frozen=True)
class KeyBound:
    """Query i of batch element b sees key j only if `j >= end` (`is_lower`) or `j <= end`."""

    is_lower: bool
    end: Affine
    """A sum of sizes, elements of integer tensors, and the index of the query."""

    shows_itself: bool = False
    """Whether each query satisfies the bound with the key of its own index."""

    @property
    def is_runtime(self) -> bool:
        """Whether it depends on an element of a tensor."""
        return any(isinstance(of, Element) for of in self.end.variables())

    def __str__(self) -> str:
        return f"key {'>=' if self.is_lower else '<='} {_text(self.end)}"


def solve_for_key(inequality: Affine) -> Affine:
    """An inequality with `sum // n`, where the sum contains the key, as an inequality of the sum itself.

    `key // 4 - m >= 0` is `key - 4 * m >= 0`, and `m - key // 4 >= 0` is `4 * m + 3 - key >= 0`. Other inequalities
    are returned as they are.
    """
    for of, slope in inequality.terms:
        if isinstance(of, Floor) and abs(slope) == 1 and any(_is_key(v) for v in of.of.variables()):
            rest = inequality.without(of) * of.by
            return of.of + rest if slope > 0 else rest - of.of + (of.by - 1)
    return inequality


def _is_key(of: object) -> bool:
    return isinstance(of, Index) and of.axis == KEY


def key_bound(inequality: Affine, key: Affine, evaluator: Elements) -> KeyBound | None:
    """The inequality as a bound of the key; None if it is none, or if its end can't be given to a kernel."""
    bound = _bound(inequality, key, evaluator)
    return bound if bound is not None and all(_is_computable(v, evaluator) for v, _ in bound.end.terms) else None


def _bound(inequality: Affine, key: Affine, evaluator: Elements) -> KeyBound | None:
    """It contains the key itself, or an element at the key of a tensor that never decreases along the keys."""
    ((key_index, _),) = key.terms
    slope = inequality.coefficient(key_index)
    if abs(slope) == 1:
        return KeyBound(slope > 0, inequality.without(key_index) * -slope)
    of_key = [
        (of, c) for of, c in inequality.terms if isinstance(of, Element) and key_index in of.index[-1].variables()
    ]
    if slope or len(of_key) != 1:
        return None
    ((element, slope),) = of_key
    *row, place = element.index
    if abs(slope) != 1 or not never_decreases(element.node, tuple(row), evaluator):
        return None
    number = inequality.without(element) * -slope + (slope < 0)
    end = variable(Below(element.node, tuple(row), number)) - (place - key) - (slope < 0)
    return KeyBound(slope > 0, end)


def _is_computable(of: object, e: Elements) -> bool:
    """Whether the kernel call can compute it: a size, the query, or an element for each batch element and query.

    The call reads the elements for all batch elements and queries. So all of them must be inside of their tensor.
    """
    if isinstance(of, Index):
        return of.axis == QUERY
    if isinstance(of, Floor):
        return all(_is_computable(v, e) for v in of.of.variables())
    if isinstance(of, Below):
        first = (*of.row, Affine())
        return (
            _runs_along(of.row, {BATCH})
            and e.inside(of.node, first)
            and all(_is_computable(v, e) for v in of.number.variables())
        )
    if not isinstance(of, Element):
        return not isinstance(of, Truth)
    return _runs_along(of.index, {BATCH, QUERY}) and e.inside(of.node, of.index)


def _runs_along(at: tuple[Affine, ...], axes: set[int]) -> bool:
    """Whether each index is a number or runs over one of the axes as a whole, in the order of the axes."""
    along = [_axis(i) for i in at if not i.is_constant]
    known = [axis for axis in along if axis in axes]
    return known == along == sorted(set(known))


def _axis(index: Affine) -> int | None:
    """The axis if the index is that of one axis, plus a number."""
    if len(index.terms) != 1:
        return None
    ((of, slope),) = index.terms
    return of.axis if isinstance(of, Index) and slope == 1 else None


def key_padding(
    inequality: Affine, of: Truth, key: Affine | None, evaluator: Elements
) -> tuple[fx.Node, int, bool] | None:
    """The 0/1 tensor, [kv_len] or [batch, kv_len], of which each key reads its own element.

    Returns the tensor, the column of the first key, and whether 1 hides a key; None if the inequality says anything
    else than `of == 1` or `of == 0`.
    """
    slope = inequality.coefficient(of)
    if len(inequality.terms) != 1 or inequality not in (variable(of) - 1, -variable(of)) or not of.index:
        return None
    *lead, last = of.index
    start = last - (key or Affine())
    value = tensor(of.node)
    assert value is not None
    wide = [(i, size) for i, size in zip(lead, value.shape, strict=False) if not is_one(size)]
    whole = [variable(Index(BATCH, evaluator.size(size))) for _, size in wide[:1]]
    if not start.is_constant or [i for i, _ in wide] != whole or not evaluator.inside(of.node, of.index):
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
