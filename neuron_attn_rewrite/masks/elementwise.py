"""Elementwise operators at symbolic indices.

The result has one case, or a few, for each combination of the cases of the operands. Combinations whose guards
contradict each other are dropped. `torch.arange(n)[None] <= torch.arange(n)[:, None]`, for example, compares the value
`j` with the value `i`, and has two cases: 1 where `i - j >= 0`, and 0 where `j - i - 1 >= 0`.

Where all operands are numbers, the operator itself is run on tensors of one element. Where an operand varies, only
integer arithmetic is followed, and only where no number can leave the range of its dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.graph.nodes import arguments, dtype, is_tensor, op_name, tensor
from neuron_attn_rewrite.masks.affine import Affine, Element, Floor, Guard, variable
from neuron_attn_rewrite.masks.cases import (
    MOST_CASES,
    At,
    Case,
    Cases,
    Elements,
    Unknown,
    Value,
    aligned,
    exact,
    in_range,
    truth,
)
from neuron_attn_rewrite.values.evaluator import is_mask_input
from neuron_attn_rewrite.values.exact import number_in

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
    operands = [v for v in pytree.tree_leaves((node.args, dict(node.kwargs))) if is_tensor(v)]
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
    is_mask = is_mask_input(element.node)
    if is_mask:
        e.assumed.add(element.node)
    return is_mask


def _outcomes(e: Elements, node: fx.Node, name: str, guard: Guard, values: dict[fx.Node, Value]) -> list[Case]:
    """The cases of the result for one combination of operand values."""
    if not any(_varies(v) for v in values.values()):
        return [Case(guard, _run(node, values))]
    given = {key: values[v] if isinstance(v, fx.Node) and v in values else v for key, v in arguments(node).items()}
    kind = _common_dtype(node) if name in COMPARISONS else dtype(node)

    def integer(key: str) -> Affine:
        """An argument in the dtype in which the operator computes. It must not wrap there."""
        return in_range(e, node, _integer(e, given[key], kind), kind)

    if name in COMPARISONS:
        split = COMPARISONS[name](integer("self") - integer("other"))
        found = [Case(guard.union(more), Affine(value)) for more, value in split]
        return [case for case in found if not e.impossible(case.guard)]
    if name in CASTS:
        value = integer("self")
        wide = [v for v, _ in value.terms if isinstance(v, Element) and dtype(v.node) == torch.int64]
        if wide and kind != torch.int64:
            raise Unknown(f"{node.name} may overflow")
        return [Case(guard, value)]
    if name == "where":
        return [Case(guard, integer("other" if given["condition"] == Affine() else "self"))]
    if name == "masked_fill":
        return [Case(guard, integer("self" if given["mask"] == Affine() else "value"))]
    left = integer("self")
    if name == "neg":
        results: list[tuple[list[Affine], Affine]] = [([], -left)]
    elif name == "abs":
        results = _larger(left, -left)
    elif name in ("clamp", "clamp_min"):
        if given.get("min") is None or given.get("max") is not None:
            raise Unknown(f"{node.name} has an upper end")
        results = _larger(left, integer("min"))
    elif name in TWO_INTEGERS:
        results = TWO_INTEGERS[name](node, left, integer("other"))
    else:
        raise Unknown(f"there is no rule for {node.name} of a number that varies")
    return [Case(guard.union(more), in_range(e, node, value)) for more, value in results]


Results: TypeAlias = "list[tuple[list[Affine], Affine]]"
"""Inequalities, and the result where they hold."""


def _larger(left: Affine, right: Affine) -> Results:
    return [([left - right], left), ([right - left - 1], right)]


def _smaller(left: Affine, right: Affine) -> Results:
    return [([left - right], right), ([right - left - 1], left)]


def _sum(node: fx.Node, left: Affine, right: Affine) -> Results:
    """add, sub and rsub, with their `alpha`, which multiplies the operand that is added or taken away."""
    alpha = arguments(node)["alpha"]
    if not isinstance(alpha, int):
        raise Unknown(f"{node.name} has an alpha that is not a number")
    if op_name(node) == "rsub":
        return [([], right - left * alpha)]
    return [([], left + right * (alpha if op_name(node) == "add" else -alpha))]


def _product(node: fx.Node, left: Affine, right: Affine) -> Results:
    if right.is_constant:
        return [([], left * right.constant)]
    if left.is_constant:
        return [([], right * left.constant)]
    raise Unknown(f"{node.name} multiplies two numbers that vary")


def _quotient(node: fx.Node, left: Affine, right: Affine) -> Results:
    """Division by a positive number, rounded down, and its remainder."""
    if not right.is_constant or right.constant <= 0:
        raise Unknown(f"{node.name} does not divide by a positive number")
    floor = variable(Floor(left, right.constant))
    return [([], left - floor * right.constant if op_name(node) == "remainder" else floor)]


TWO_INTEGERS: dict[str, Callable[[fx.Node, Affine, Affine], Results]] = {
    **dict.fromkeys(("add", "sub", "rsub"), _sum),
    **dict.fromkeys(("floor_divide", "remainder"), _quotient),
    "mul": _product,
    "maximum": lambda node, left, right: _larger(left, right),
    "minimum": lambda node, left, right: _smaller(left, right),
}
"""The result of an operator on two integers of which one varies."""


def _common_dtype(node: fx.Node) -> torch.dtype:
    """The dtype in which a comparison compares its operands."""

    def example(value: Any) -> Any:
        found = tensor(value) if isinstance(value, fx.Node) else None
        if found is not None:
            return torch.empty([1] * min(1, found.dim()), dtype=found.dtype)
        return value if isinstance(value, (int, float)) else 1

    return torch.result_type(example(node.args[0]), example(node.args[1]))


def _integer(e: Elements, value: Any, kind: torch.dtype) -> Affine:
    if isinstance(value, Affine):
        return value
    if isinstance(value, (fx.Node, torch.SymInt, int)) and not isinstance(value, bool):
        return e.size(value)
    number = number_in(kind, value) if isinstance(value, (bool, float)) else float("nan")
    if not math.isfinite(number):
        raise Unknown("a number that varies is not an integer")
    return Affine(int(number))


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
    return decisive if decisive in values.values() else None


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
