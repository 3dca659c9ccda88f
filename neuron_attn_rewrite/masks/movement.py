"""Operators that move or create elements, at symbolic indices.

Each rule says from which element of the input an element of the result comes. Element [b, 0, j] of `mask[:, None, 2:]`
is element [b, j + 2] of `mask`, and element [i] of `torch.arange(5, n)` is `5 + i`. `cat` and `tril` give a case for
each part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import fx

from neuron_attn_rewrite.graph.nodes import PERMUTES, arguments, dtype, op_name, permutation, tensor
from neuron_attn_rewrite.masks.affine import Affine, negated
from neuron_attn_rewrite.masks.cases import (
    INDICES,
    At,
    Case,
    Cases,
    Elements,
    Unknown,
    Value,
    aligned,
    exact,
    in_range,
    is_one,
)
from neuron_attn_rewrite.values.exact import number_in

VIEWS = frozenset("view reshape _unsafe_view flatten unflatten unsqueeze squeeze _reshape_alias".split())
SAME = frozenset("clone contiguous alias detach lift_fresh_copy lift_fresh".split())
FILLED = {"ones": 1, "zeros": 0, "ones_like": 1, "zeros_like": 0, "new_ones": 1, "new_zeros": 0}


def _view(e: Elements, node: fx.Node, at: At) -> Cases:
    """A reshape that only adds or drops dims of size 1."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    inner, outer = (tensor(n) for n in (source, node))
    assert inner is not None and outer is not None
    kept = [(e.size(size), i) for size, i in zip(outer.shape, at, strict=True) if not is_one(size)]
    wide = [e.size(size) for size in inner.shape if not is_one(size)]
    if [size for size, _ in kept] != wide:
        raise Unknown(f"{node.name} splits or joins dims")
    indices = iter(i for _, i in kept)
    return e.cases(source, tuple(Affine() if is_one(size) else next(indices) for size in inner.shape))


def _expand(e: Elements, node: fx.Node, at: At) -> Cases:
    assert isinstance(node.args[0], fx.Node)
    return e.cases(node.args[0], aligned(at, node.args[0]))


def _same(e: Elements, node: fx.Node, at: At) -> Cases:
    assert isinstance(node.args[0], fx.Node)
    return e.cases(node.args[0], at)


def _permute(e: Elements, node: fx.Node, at: At) -> Cases:
    assert isinstance(node.args[0], fx.Node)
    order = permutation(node)
    return e.cases(node.args[0], tuple(at[order.index(d)] for d in range(len(order))))


def _slice(e: Elements, node: fx.Node, at: At) -> Cases:
    values = arguments(node)
    source, dim = values["self"], values["dim"] % len(at)
    size = e.size(tensor(source).shape[dim])  # type: ignore[union-attr]
    start = Affine() if values["start"] is None else e.size(values["start"])
    if not e.always(start):
        if not e.always(negated(start)) or not e.always(start + size):
            raise Unknown(f"{node.name} may start before the first element")
        start = start + size
    if not e.always(size - start):
        raise Unknown(f"{node.name} may start after the last element")
    if not isinstance(values["step"], int):
        raise Unknown(f"{node.name} has a step that is not a number")
    return e.cases(source, _replace_index(at, dim, at[dim] * values["step"] + start))


def _select(e: Elements, node: fx.Node, at: At) -> Cases:
    values = arguments(node)
    source, dim = values["self"], values["dim"] % (len(at) + 1)
    place = e.size(values["index"])
    if not e.always(place):
        place = place + e.size(tensor(source).shape[dim])  # type: ignore[union-attr]
    if not e.inside(source, (*at[:dim], place, *at[dim:])):
        raise Unknown(f"the index of {node.name} may be out of range")
    return e.cases(source, (*at[:dim], place, *at[dim:]))


def _index(e: Elements, node: fx.Node, at: At) -> Cases:
    """`x[:, i, j, ...]` with integer index tensors for neighbouring dims."""
    source, indices = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(indices, (list, tuple))
    inner = tensor(source)
    assert inner is not None
    given = [i for i in indices if isinstance(i, fx.Node)]
    lead = next(d for d, i in enumerate(indices) if i is not None)
    if given != list(indices[lead : lead + len(given)]) or any(dtype(i) not in INDICES for i in given):
        raise Unknown(f"{node.name} does not have integer index tensors for neighbouring dims")
    end = lead + max(tensor(i).dim() for i in given)  # type: ignore[union-attr]
    places = [e.cases(i, aligned(at[lead:end], i)) for i in given]
    if any(len(cases) != 1 for cases in places):
        raise Unknown(f"an index of {node.name} has several cases")
    found = []
    for (case,), size in zip(places, inner.shape[lead:], strict=False):
        assert isinstance(case.value, Affine)
        if not e.always(case.value) or not e.always(e.size(size) - 1 - case.value):
            raise Unknown(f"an index of {node.name} may be out of range")
        found.append(case.value)
    return e.cases(source, (*at[:lead], *found, *at[end:]))


def _arange(e: Elements, node: fx.Node, at: At) -> Cases:
    if dtype(node) not in INDICES:
        raise Unknown(f"{node.name} does not hold integers")
    values = arguments(node)
    start, step = (e.size(values.get(name, default)) for name, default in (("start", 0), ("step", 1)))
    if not step.is_constant:
        raise Unknown(f"{node.name} has a step that is not a number")
    return (Case(frozenset(), in_range(e, node, start + at[0] * step.constant)),)


def _full(e: Elements, node: fx.Node, at: At) -> Cases:
    name = op_name(node)
    value = FILLED.get(name)
    if value is None:
        values = arguments(node)
        value = next((values[key] for key in ("fill_value", "value", "s") if key in values), None)
    if not isinstance(value, (int, float)):
        raise Unknown(f"the value of {node.name} is not a number")
    number = number_in(dtype(node), value)
    if not dtype(node).is_floating_point and number != number:
        raise Unknown(f"the value of {node.name} is not an integer")
    return (Case(frozenset(), number if dtype(node).is_floating_point else Affine(int(number))),)


def _pieces(e: Elements, pieces: Sequence[tuple[fx.Node | Value, Affine]], at: At, dim: int) -> Cases:
    """An element of tensors, or numbers, that lie one after the other along a dim. Each comes with its size."""
    out: list[Case] = []
    end = Affine()
    for piece, size in pieces:
        start, end = end, end + size
        guard = frozenset([at[dim] - start, end - 1 - at[dim]])
        if e.impossible(guard):
            continue
        if not isinstance(piece, fx.Node):
            out.append(Case(guard, piece))
            continue
        cases = e.cases(piece, _replace_index(at, dim, at[dim] - start))
        out += [Case(guard | c.guard, c.value) for c in cases if not e.impossible(guard | c.guard)]
    return tuple(out)


def _cat(e: Elements, node: fx.Node, at: At) -> Cases:
    parts, dim = node.args[0], arguments(node)["dim"] % len(at)
    assert isinstance(parts, (list, tuple))
    return _pieces(e, [(p, e.size(tensor(p).shape[dim])) for p in parts], at, dim)  # type: ignore


def _pad(e: Elements, node: fx.Node, at: At) -> Cases:
    source, pads = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(pads, (list, tuple))
    if any(pads[2:]) or any(not isinstance(p, int) or p < 0 for p in pads):
        raise Unknown(f"{node.name} pads other dims than the last, or removes elements")
    fill = exact(torch.tensor(arguments(node)["value"] or 0).to(dtype(node)))
    size = e.size(tensor(source).shape[-1])  # type: ignore[union-attr]
    pieces: list[tuple[fx.Node | Value, Affine]] = [(fill, Affine(pads[0])), (source, size), (fill, Affine(pads[1]))]  # type: ignore[arg-type]
    return _pieces(e, pieces, at, len(at) - 1)


def _triangle(e: Elements, node: fx.Node, at: At) -> Cases:
    """tril keeps `column - row <= diagonal`, triu `column - row >= diagonal`; the rest is 0."""
    assert isinstance(node.args[0], fx.Node)
    beyond = at[-1] - at[-2] - e.size(arguments(node)["diagonal"])
    keeps = -beyond if op_name(node) == "tril" else beyond
    zero: Value = 0.0 if dtype(node).is_floating_point else Affine()
    inside = [Case(c.guard | {keeps}, c.value) for c in e.cases(node.args[0], at)]
    return (*(c for c in inside if not e.impossible(c.guard)), Case(frozenset([negated(keeps)]), zero))


def _flip(e: Elements, node: fx.Node, at: At) -> Cases:
    values = arguments(node)
    for dim in values["dims"]:
        at = _replace_index(at, dim % len(at), e.size(tensor(values["self"]).shape[dim]) - 1 - at[dim % len(at)])  # type: ignore[union-attr]
    return e.cases(values["self"], at)


def _diff(e: Elements, node: fx.Node, at: At) -> Cases:
    """The difference between an element and the one before it."""
    values = arguments(node)
    source, dim = values["self"], values["dim"] % len(at)
    if values["n"] != 1 or values["append"] is not None or dtype(node).is_floating_point:
        raise Unknown(f"there is no rule for {node.name} with these arguments")
    parts = [p for p in (values["prepend"], source) if p is not None]
    pieces = [(p, e.size(tensor(p).shape[dim])) for p in parts]  # type: ignore[union-attr]
    here, there = (_pieces(e, pieces, _replace_index(at, dim, at[dim] + step), dim) for step in (1, 0))
    out = []
    for a, b in itertools.product(here, there):
        guard = a.guard | b.guard
        if not e.impossible(guard):
            assert isinstance(a.value, Affine) and isinstance(b.value, Affine)
            out.append(Case(guard, in_range(e, node, a.value - b.value)))
    return tuple(out)


def _cumsum(e: Elements, node: fx.Node, at: At) -> Cases:
    """The running sum of a tensor whose elements are all one number."""
    values = arguments(node)
    source, dim = values["self"], values["dim"] % len(at)
    anywhere = e.fresh_index(e.size(tensor(source).shape[dim]))  # type: ignore[union-attr]
    cases = e.cases(source, _replace_index(at, dim, anywhere))
    numbers = {case.value for case in cases}
    if len(numbers) != 1:
        raise Unknown(f"{node.name} sums up numbers that vary")
    (number,) = numbers
    if not isinstance(number, Affine) or not number.is_constant:
        raise Unknown(f"{node.name} sums up numbers that vary")
    return (Case(frozenset(), in_range(e, node, (at[dim] + 1) * number.constant)),)


def _replace_index(at: At, dim: int, index: Affine) -> At:
    return (*at[:dim], index, *at[dim + 1 :])


MOVEMENTS: dict[str, Callable[[Elements, fx.Node, At], Cases]] = {
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys(PERMUTES, _permute),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys((*FILLED, "full", "full_like", "fill", "new_full", "scalar_tensor"), _full),
    **dict.fromkeys(("tril", "triu"), _triangle),
    "slice": _slice,
    "select": _select,
    "index": _index,
    "arange": _arange,
    "cat": _cat,
    "constant_pad_nd": _pad,
    "flip": _flip,
    "diff": _diff,
    "cumsum": _cumsum,
}
"""The rule of each operator: one element of its result."""
