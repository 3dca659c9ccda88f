"""What is known of sizes and of the variables of a sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from neuron_attn_rewrite.graph.sizes import number_of
from neuron_attn_rewrite.masks.affine import Affine, Below, Element, Floor, Index, Size, Truth, Variable, variable
from neuron_attn_rewrite.masks.cases import Facts, Unknown, aligned, exact, in_range, is_one, truth

LARGE = 2**29


class Shaped(torch.nn.Module):
    def forward(self, wide: Tensor, tall: Tensor, small: Tensor) -> tuple[Tensor, ...]:
        return wide.new_zeros(wide.shape[0] * 2 + 3), tall.new_zeros(tall.shape[1] // 2), small + 1


@pytest.fixture(scope="module")
def module() -> fx.GraphModule:
    """wide [n, 4] of int64, tall [1, m, 3] of int32 with m = 8 or more, small [5] of int8."""
    inputs = (
        torch.zeros(9, 4, dtype=torch.int64),
        torch.zeros(1, 12, 3, dtype=torch.int32),
        torch.zeros(5).to(torch.int8),
    )
    sizes = {
        "wide": {0: torch.export.Dim("n", min=3, max=64)},
        "tall": {1: torch.export.Dim("m", min=8)},
        "small": None,
    }
    exported = torch.export.export(Shaped(), inputs, dynamic_shapes=sizes, strict=False)
    return exported.graph_module


@pytest.fixture
def facts(module: fx.GraphModule) -> Facts:
    return Facts(module)


def node(module: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in module.graph.nodes if n.name == name)


def example(module: fx.GraphModule, name: str) -> Any:
    return node(module, name).meta["val"]


def test_a_size_as_a_sum(module: fx.GraphModule, facts: Facts) -> None:
    n, m = example(module, "wide").shape[0], example(module, "tall").shape[1]
    of_n, of_m = variable(Size(str(n))), variable(Size(str(m)))
    assert facts.size(7) == Affine(7) and facts.size(0) == Affine() and facts.size(-2) == Affine(-2)
    assert facts.size(2**31) == Affine(2**31)
    assert facts.size(n) == of_n and facts.size(n * 2 + m - 3) == of_n * 2 + of_m - 3
    assert facts.size(number_of(n)) == of_n and facts.size(number_of(n) * 6) == of_n * 6
    sizes = [x for x in module.graph.nodes if isinstance(x.meta.get("val"), torch.SymInt)]
    assert {facts.size(x) for x in sizes} >= {of_n, of_n * 2, of_n * 2 + 3}
    half = facts.size(m // 2)
    assert len(half.terms) == 1 and not half.constant and half != of_m
    for wrong in ("n", None, 1.5, node(module, "small")):
        with pytest.raises(Unknown, match="is not a size"):
            facts.size(wrong)


def test_the_range_of_a_size(module: fx.GraphModule, facts: Facts) -> None:
    n, m = facts.size(example(module, "wide").shape[0]), facts.size(example(module, "tall").shape[1])
    ((of_n, _),), ((of_m, _),) = n.terms, m.terms
    assert facts.ranges(of_n) == (n - 3, -n + 64)
    assert facts.ranges(of_m) == (m - 8,)
    assert facts.ranges(Size("another")) == ()
    half = facts.size(example(module, "tall").shape[1] // 2)
    ((of_half, _),) = half.terms
    assert facts.ranges(of_half) == ()


def test_the_range_of_a_variable(module: fx.GraphModule, facts: Facts) -> None:
    wide = node(module, "wide")
    bit, index = variable(Truth(wide, ())), variable(Index(3, Affine(5)))
    third = variable(Floor(index - 1, 3))
    for of, lowest, highest in ((bit, 0, 1), (index, 0, 4), (third, -1, 1)):
        assert facts.always(of - lowest) and not facts.always(of - lowest - 1)
        assert facts.always(-of + highest) and not facts.always(-of + highest - 1)
    assert facts.always(index - third * 3 - 1) and facts.always(third * 3 + 3 - index)
    assert facts.impossible([index - 2, -index + 1]) and not facts.impossible([index - 2, -index + 2])
    assert facts.always(index - 1, [index - 1]) and not facts.always(index - 1, [index])


def test_limits(module: fx.GraphModule, facts: Facts) -> None:
    wide, small = node(module, "wide"), node(module, "small")
    n = facts.size(example(module, "wide").shape[0])
    ((of_n, _),) = n.terms
    limits: dict[Variable, tuple[int, int]] = {
        Truth(wide, ()): (0, 1),
        Index(3, Affine(5)): (0, 4),
        Index(2, Affine(0)): (0, 0),
        Index(2, n): (0, LARGE - 1),
        Floor(variable(Index(3, Affine(8))) * 3 - 4, 5): (-1, 3),
        Element(small, (Affine(),)): (-128, 127),
        Element(wide, (Affine(), Affine())): (-LARGE, LARGE),
        Element(node(module, "tall"), (Affine(),) * 3): (-LARGE, LARGE),
        Below(wide, (Affine(),), Affine(3)): (0, LARGE),
        of_n: (0, LARGE),
    }
    for of, (lowest, highest) in limits.items():
        assert facts.limits(variable(of)) == (lowest, highest), of
        assert facts.limits(variable(of) * -2 + 7) == (-2 * highest + 7, -2 * lowest + 7)
    both = variable(Index(3, Affine(5))) * 3 - variable(Truth(wide, ())) * 4
    assert facts.limits(both + 1) == (-3, 13) and facts.limits(Affine(6)) == (6, 6)


def test_what_is_inside_of_a_tensor(module: fx.GraphModule, facts: Facts) -> None:
    n = facts.size(example(module, "wide").shape[0])
    wide, i, j = node(module, "wide"), variable(Index(0, n)), variable(Index(3, Affine(4)))
    assert facts.inside(wide, (i, j)) and facts.inside(wide, (n - 1, Affine())) and facts.inside(wide, (n - 3, j))
    assert facts.inside(wide, (Affine(2), Affine(3)))
    for outside in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1), (n, j), (Affine(3), j), (n - 4, j), (i, Affine(4))):
        assert not facts.inside(wide, outside)


def test_a_sum_must_not_wrap(module: fx.GraphModule, facts: Facts) -> None:
    small, tall = node(module, "small"), node(module, "tall")
    byte, number = variable(Element(small, (Affine(),))), variable(Element(tall, (Affine(),) * 3))
    assert in_range(facts, small, byte) == byte and in_range(facts, small, byte * 2, torch.int16) == byte * 2
    assert in_range(facts, tall, number * 3) == number * 3
    for of, value, kind in ((small, byte + 1, None), (small, byte, torch.uint8), (tall, number * 4, None)):
        with pytest.raises(Unknown, match="may leave the range"):
            in_range(facts, of, value, kind)


def test_new_indices_are_no_axes_of_the_kernel(facts: Facts) -> None:
    first, second = facts.fresh_index(Affine(3)), facts.fresh_index(Affine(3))
    ((of, _),) = first.terms
    assert first != second and isinstance(of, Index) and of.axis > 3 and of.size == Affine(3)


def test_the_element_that_broadcasts(module: fx.GraphModule) -> None:
    i, j, k = (variable(Index(axis, Affine(9))) for axis in range(3))
    assert aligned((i, j, k), node(module, "tall")) == (Affine(), j, k)
    assert aligned((i, j, k), node(module, "wide")) == (j, k)
    n = example(module, "wide").shape[0]
    assert is_one(1) and not is_one(2) and not is_one(0) and not is_one(n)


def test_numbers_and_bits(module: fx.GraphModule, facts: Facts) -> None:
    assert exact(torch.tensor(3)) == Affine(3) and exact(torch.tensor(True)) == Affine(1)
    assert exact(torch.tensor(3.0)) == 3.0 and isinstance(exact(torch.tensor(3.0)), float)
    one, zero = truth(node(module, "small"), (Affine(),))
    bit = variable(Truth(node(module, "small"), (Affine(),)))
    assert (one.value, zero.value) == (Affine(1), Affine())
    assert facts.always(bit - 1, one.guard) and facts.always(-bit, zero.guard)
    assert not facts.impossible(one.guard) and not facts.impossible(zero.guard)
