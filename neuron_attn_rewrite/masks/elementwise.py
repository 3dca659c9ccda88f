"""Elementwise operators at symbolic indices.

The result has one case, or a few, for each combination of the cases of the operands. Combinations whose guards
contradict each other are dropped. `torch.arange(n)[None] <= torch.arange(n)[:, None]`, for example, compares the value
`j` with the value `i`, and has two cases: 1 where `i - j >= 0`, and 0 where `j - i - 1 >= 0`.

Where all operands are numbers, the operator itself is run on tensors of one element. Where an operand varies, only
integer arithmetic is followed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from neuron_attn_rewrite.graph.nodes import dtype, is_tensor, op_name, tensor
from neuron_attn_rewrite.masks.affine import Affine, Element, Floor, Guard, variable
from neuron_attn_rewrite.masks.cases import MOST_CASES, At, Case, Cases, Elements, Unknown, Value, aligned, exact, truth

CASTS = ("to", "_to_copy", "type_as")
COMPARISONS: dict[str, Callable[[Affine], list[tuple[list[Affine], int]]]] = {
    "ge": lambda d: [([d], 1), ([-d - 1], 0)],
    "gt": lambda d: [([d - 1], 1), ([-d], 0)],
    "le": lambda d: [([-d], 1), ([d - 1], 0)],
    "lt": lambda d: [([-d - 1], 1), ([d], 0)],
    "eq": lambda d: [([d, -d], 1), ([d - 1], 0), ([-d - 1], 0)],
    "ne": lambda d: [([d, -d], 0), ([d - 1], 1), ([-d - 1], 1)],
}
"""The cases of `left op right`, given `left - right`: inequalities, and the result where they hold."""
DECIDES = {
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__", "mul"), 0),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__"), 1),
}
"""The value of one bool operand that decides the result, whatever the other is."""


def elementwise(e: Elements, node: fx.Node, at: At) -> Cases:
    """One element of the result of an elementwise operator."""
    name = op_name(node)
    operands = [v for v in _flat(node.args) if is_tensor(v)]
    if name in CASTS:
        operands = operands[:1]
    found = {n: e.cases(n, aligned(at, n)) for n in dict.fromkeys(operands)}
    if _tests_for_zero(node, name):
        found = {n: _as_bits(cases, lambda element: True) for n, cases in found.items()}
    elif name not in CASTS or dtype(node) != torch.int64:
        found = {n: _as_bits(cases, lambda element: _is_zero_or_one(e, element)) for n, cases in found.items()}
    out: list[Case] = []
    stack: list[tuple[Guard, dict[fx.Node, Value], list[fx.Node]]] = [(frozenset(), {}, list(found))]
    while stack:
        guard, values, rest = stack.pop()
        decided = _decided(node, name, values)
        if decided is not None:
            out.append(Case(guard, decided))
        elif not rest:
            out += _outcomes(e, node, name, guard, values)
        else:
            for case in found[rest[0]]:
                both = guard | case.guard
                if not guard or not case.guard or not e.impossible(both):
                    stack.append((both, {**values, rest[0]: case.value}, rest[1:]))
        if len(out) + len(stack) > MOST_CASES:
            raise Unknown(f"{node.name} has too many cases")
    return tuple(out)


def _is_zero_or_one(e: Elements, element: Element) -> bool:
    """Whether it is an element of an integer input with `mask` in its name: these are assumed to hold only 0 and 1."""
    is_mask = element.node.op == "placeholder" and "mask" in element.node.name
    if is_mask:
        e.assumed.add(element.node)
    return is_mask


def _outcomes(e: Elements, node: fx.Node, name: str, guard: Guard, values: dict[fx.Node, Value]) -> list[Case]:
    """The cases of the result for one combination of operand values."""
    if not any(_varies(v) for v in values.values()):
        return [Case(guard, _run(node, values))]
    args = [values[a] if isinstance(a, fx.Node) and a in values else a for a in node.args]
    if name in COMPARISONS:
        left, right = (_integer(e, a) for a in args[:2])
        split = COMPARISONS[name](left - right)
        found = [Case(guard.union(more), Affine(value)) for more, value in split]
        return [case for case in found if not e.impossible(case.guard)]
    if dtype(node) not in (torch.int64, torch.int32):
        raise Unknown(f"{node.name} computes a number that varies, and is not an integer")
    if name in CASTS:
        (value,) = values.values()
        assert isinstance(value, Affine)
        wide = [v for v, _ in value.terms if isinstance(v, Element) and dtype(v.node) == torch.int64]
        if wide and dtype(node) != torch.int64:
            raise Unknown(f"{node.name} may overflow")
        return [Case(guard, value)]
    if name in ("add", "sub", "rsub") and node.kwargs.get("alpha", 1) == 1:
        left, right = (_integer(e, a) for a in args[:2])
        return [Case(guard, left + right if name == "add" else left - right if name == "sub" else right - left)]
    if name in ("where", "masked_fill"):
        flag, yes, no = (args[0], args[1], args[2]) if name == "where" else (args[1], args[2], args[0])
        picked = no if flag == Affine() else yes
        return [Case(guard, picked if isinstance(picked, Affine) else exact(torch.as_tensor(picked).to(dtype(node))))]
    if name in ("floor_divide", "remainder") or (name == "div" and node.kwargs.get("rounding_mode") == "floor"):
        left, right = (_integer(e, a) for a in args[:2])
        if right.is_constant and right.constant > 0:
            floor = variable(Floor(left, right.constant))
            return [Case(guard, left - floor * right.constant if name == "remainder" else floor)]
    if name == "neg":
        return [Case(guard, -_integer(e, args[0]))]
    if name == "mul":
        left, right = (_integer(e, a) for a in args[:2])
        if left.is_constant or right.is_constant:
            return [Case(guard, left * right.constant if right.is_constant else right * left.constant)]
    if name in ("minimum", "maximum", "clamp", "clamp_min", "abs"):
        return _larger_or_smaller(e, node, name, guard, args)
    raise Unknown(f"there is no rule for {node.name} of a number that varies")


def _larger_or_smaller(e: Elements, node: fx.Node, name: str, guard: Guard, args: list[Any]) -> list[Case]:
    """`minimum`, `maximum`, `abs`, and `clamp` with a lower end: a case for each of the two numbers."""
    left = _integer(e, args[0])
    if name == "abs":
        right, pick_larger = -left, True
    elif name == "clamp":
        low, high = ([*args[1:], None, None])[:2]
        if low is None or high is not None:
            raise Unknown(f"{node.name} has an upper end")
        right, pick_larger = _integer(e, low), True
    else:
        right, pick_larger = _integer(e, args[1]), name != "minimum"
    larger = frozenset([left - right])
    smaller = frozenset([right - left - 1])
    first, second = (left, right) if pick_larger else (right, left)
    return [Case(guard | larger, first), Case(guard | smaller, second)]


def _integer(e: Elements, value: Any) -> Affine:
    if isinstance(value, Affine):
        return value
    if isinstance(value, fx.Node) and not is_tensor(value):
        return e.size(value)
    if isinstance(value, (int, torch.SymInt)):
        return e.size(value)
    raise Unknown("a number that varies is not an integer")


def _flat(args: Any) -> list[Any]:
    return [v for a in args for v in (a if isinstance(a, (list, tuple)) else (a,))]


def _varies(value: Value) -> bool:
    return isinstance(value, Affine) and not value.is_constant


def _tests_for_zero(node: fx.Node, name: str) -> bool:
    """Whether the result depends only on whether the operand is zero."""
    if name in CASTS:
        return dtype(node) == torch.bool
    if name in ("eq", "ne"):
        return type(node.args[1]) in (int, float) and not node.args[1]
    return name == "logical_not"


def _as_bits(cases: Cases, is_bit: Callable[[Element], bool]) -> Cases:
    """The cases, with each element for which `is_bit` holds split into a case of 1 and a case of 0."""
    out: list[Case] = []
    for case in cases:
        value = case.value
        elements = [v for v, _ in value.terms if isinstance(v, Element)] if isinstance(value, Affine) else []
        if len(elements) == 1 and value == variable(elements[0]) and is_bit(elements[0]):
            out += [Case(case.guard | c.guard, c.value) for c in truth(elements[0].node, elements[0].index)]
        else:
            out.append(case)
    return tuple(out)


def _decided(node: fx.Node, name: str, values: dict[fx.Node, Value]) -> Value | None:
    """The result if one bool operand decides it, such as False in a conjunction."""
    if dtype(node) != torch.bool or name not in DECIDES:
        return None
    decisive = Affine(DECIDES[name])
    return decisive if any(v == decisive and dtype(n) == torch.bool for n, v in values.items()) else None


def _run(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    """The result of the operator itself, on tensors of one element."""

    def one(n: fx.Node) -> Any:
        value = tensor(n)
        if n in values:
            found = values[n]
            assert value is not None
            number = found.constant if isinstance(found, Affine) else found
            return torch.full([1] * min(1, value.dim()), number, dtype=value.dtype)
        if value is not None:
            return torch.empty([1] * min(1, value.dim()), dtype=value.dtype)
        if isinstance(n.meta.get("val"), (int, float)):
            return n.meta["val"]
        if op_name(n) == "getattr":
            return torch.device("cpu")
        raise Unknown(f"{n.name} is not a number")

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), one)
    with torch.no_grad():
        return exact(node.target(*args, **kwargs))  # type: ignore[operator]
