"""Elementwise operators at symbolic indices, against the tensors themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from neuron_attn_rewrite.masks.affine import Affine, Truth
from neuron_attn_rewrite.masks.cases import Case
from neuron_attn_rewrite.masks.symbolic import SymbolicEvaluator
from tests.masks.elements import assert_each_element, assert_unknown
from tests.masks.test_soundness import graph_of

ROWS, COLUMNS = 3, 5
Program = Callable[[Tensor, Tensor, Tensor], Tensor]


def draw() -> tuple[Tensor, ...]:
    """Positions, a mask of 0 and 1, and bools, [ROWS, COLUMNS]."""
    mask, flags = torch.rand(2, ROWS, COLUMNS) < 0.5
    return torch.randint(-6, 6, (ROWS, COLUMNS)), mask.long(), flags


def named(program: Program) -> Callable[..., Tensor]:
    return lambda positions, attention_mask, flags: program(positions, attention_mask, flags)


def pairs(compare: Callable[[Tensor, Tensor], Tensor]) -> Program:
    return lambda p, m, f: compare(p[:, :, None], p[:, None])


def narrow(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers from -2 to 2 in a dtype."""
    return torch.where(p > 2, 2, torch.where(p < -2, -2, 0)).to(dtype)


def flags(count: int) -> Program:
    return lambda p, m, f: functools.reduce(torch.add, [f[i // 5, i % 5].long() for i in range(count)])


KNOWN: dict[str, Program] = {
    "less": pairs(torch.lt),
    "not more": pairs(torch.le),
    "more": pairs(torch.gt),
    "not less": pairs(torch.ge),
    "equal": pairs(torch.eq),
    "not equal": pairs(torch.ne),
    "more than a number": lambda p, m, f: p > 2,
    "a number of another kind": lambda p, m, f: p <= 2.0,
    "compared with a half": lambda p, m, f: p < 0.5,
    "equal to a number": lambda p, m, f: p == 3,
    "not equal to a number": lambda p, m, f: p != -3,
    "zero": lambda p, m, f: p == 0,
    "not zero": lambda p, m, f: p != 0.0,
    "none": lambda p, m, f: p.logical_not(),
    "compared with False": lambda p, m, f: p == False,  # noqa: E712
    "compared with True": lambda p, m, f: m == True,  # noqa: E712
    "bools compared": lambda p, m, f: f == m.bool(),
    "bools in order": lambda p, m, f: f < (p > 0),
    "indices": lambda p, m, f: torch.arange(COLUMNS)[None] <= torch.arange(COLUMNS)[:, None],
    "indices and positions": lambda p, m, f: torch.arange(COLUMNS)[None, None] > p[..., None],
    "sum": lambda p, m, f: p + p.flip(1),
    "sum with a factor": lambda p, m, f: torch.add(p, p.flip(1), alpha=3),
    "sum with a number": lambda p, m, f: p + 4,
    "difference": lambda p, m, f: p - p.flip(0),
    "difference with a factor": lambda p, m, f: torch.sub(p, p.flip(0), alpha=2),
    "from a number": lambda p, m, f: torch.rsub(p, 5, alpha=3),
    "product": lambda p, m, f: p * 3,
    "product from the left": lambda p, m, f: (torch.arange(COLUMNS) * 0 + 2) * p,
    "product of what varies": lambda p, m, f: p * (torch.arange(COLUMNS) * 0 - 3),
    "quotient": lambda p, m, f: p // 3,
    "quotient by one": lambda p, m, f: p // 1,
    "remainder": lambda p, m, f: p % 3,
    "negative": lambda p, m, f: -p,
    "magnitude": lambda p, m, f: p.abs(),
    "at least": lambda p, m, f: p.clamp(min=-1),
    "at least 2": lambda p, m, f: p.clamp_min(2),
    "larger": lambda p, m, f: torch.maximum(p, p.flip(1)),
    "smaller": lambda p, m, f: torch.minimum(p, p.flip(1)),
    "chosen": lambda p, m, f: torch.where(f, p, p.flip(1)),
    "a number chosen": lambda p, m, f: torch.where(p > 0, p, -5),
    "filled": lambda p, m, f: p.masked_fill(f, 7),
    "filled floats": lambda p, m, f: torch.zeros(ROWS, COLUMNS).masked_fill(f, -1e9),
    "cast to bool": lambda p, m, f: p.bool(),
    "cast to the same": lambda p, m, f: p.to(torch.float32).to(torch.bool) if p.is_floating_point() else p.long(),
    "bools as integers": lambda p, m, f: f.long() * 3,
    "bools as floats": lambda p, m, f: (1.0 - f.float()) * -5,
    "a mask as floats": lambda p, m, f: (1.0 - m.float()) * -5,
    "a mask as int32": lambda p, m, f: m.int() + 1,
    "a mask as a mask": lambda p, m, f: m * m.flip(1),
    "a narrow sum": lambda p, m, f: narrow(p, torch.int8) + narrow(p, torch.int8),
    "bytes": lambda p, m, f: m.to(torch.uint8) * 255,
    "and": lambda p, m, f: f & (p > 0),
    "logical and": lambda p, m, f: torch.logical_and(f, m),
    "or": lambda p, m, f: f | (p > 0),
    "logical or": lambda p, m, f: torch.logical_or(f, p > 0),
    "exclusive or": lambda p, m, f: f ^ (p > 0),
    "not": lambda p, m, f: ~f,
    "product of bools": lambda p, m, f: f * (p > 0),
    "sum of bools": lambda p, m, f: f + (p > 0),
    "and of numbers": lambda p, m, f: m & m.flip(1),
    "or of integers": lambda p, m, f: f.long() | ((p > 0).long() * 2),
    "product of integers": lambda p, m, f: f.long() * ((p > 0).long() * 2),
    "or of the logical kind": lambda p, m, f: torch.logical_or(f.long() * 2, (p > 0).long()),
    "filled with a float": lambda p, m, f: p.masked_fill(f, 7.0),
    "positions as their kind": lambda p, m, f: p.type_as(m),
    "constants as their kind": lambda p, m, f: torch.ones(ROWS, COLUMNS).type_as(m),
    "or of three": lambda p, m, f: f | (p > 0) | (m == 0),
    "and with one bool for all": lambda p, m, f: f & f[:1, :1],
    "the same twice": lambda p, m, f: f & f,
    "constants": lambda p, m, f: torch.full((ROWS, COLUMNS), 2.5) * 2 - 1,
    "constants in 16 bits": lambda p, m, f: torch.full((2,), 257.0).to(torch.bfloat16) + 1,
    "as many cases as are followed": flags(6),
}
UNKNOWN: dict[str, tuple[Program, str]] = {
    "an upper end": (lambda p, m, f: p.clamp(max=3), "has an upper end"),
    "both ends": (lambda p, m, f: p.clamp(-1, 3), "has an upper end"),
    "two that vary": (lambda p, m, f: p * p.flip(1), "multiplies two numbers"),
    "by a negative number": (lambda p, m, f: p // -2, "divide by a positive"),
    "by what varies": (lambda p, m, f: p // p.flip(1), "divide by a positive"),
    "by nothing": (lambda p, m, f: p % 0, "divide by a positive"),
    "positions as floats": (lambda p, m, f: p.float(), "may leave the range"),
    "positions and a half": (lambda p, m, f: p + 0.5, "not an integer|may leave the range"),
    "int64 as int32": (lambda p, m, f: p.int(), "may overflow"),
    "positions or minus infinity": (lambda p, m, f: torch.where(f, p, -torch.inf), "not an integer"),
    "another operator": (lambda p, m, f: torch.bitwise_xor(p, 2), "no rule for"),
    "too large in int32": (lambda p, m, f: torch.arange(COLUMNS, dtype=torch.int32) * 2**30, "leave the range"),
    "too large in int8": (lambda p, m, f: torch.arange(200).to(torch.int8), "leave the range"),
    "more cases than are followed": (flags(7), "too many cases"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_each_element(name: str) -> None:
    assert_each_element(named(KNOWN[name]), draw)


@pytest.mark.parametrize("name", UNKNOWN)
def test_no_rule(name: str) -> None:
    program, words = UNKNOWN[name]
    assert_unknown(named(program), draw, words)


@pytest.mark.parametrize("name", ["zero", "not zero", "none", "cast to bool"])
def test_whether_a_number_is_zero_is_one_condition(name: str) -> None:
    """Not two inequalities: a padding is read of it."""
    module = graph_of(named(KNOWN[name]), draw())
    (node,) = module.graph.output_node().all_input_nodes
    cases = SymbolicEvaluator(module, changed=frozenset()).cases(node, (Affine(), Affine(1)))
    assert len(cases) == 2 and all(isinstance(v, Truth) for c in cases for g in c.guard for v in g.variables())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_narrow_integers_are_widened(dtype: torch.dtype) -> None:
    def numbers() -> tuple[Tensor]:
        return (torch.randint(0, 100, (ROWS,)).to(dtype),)

    assert_each_element(lambda small: small.to(torch.int64) * 300, numbers)
    assert_each_element(lambda small: small.to(torch.int32) + 300, numbers)
    if dtype != torch.int32:
        assert_unknown(lambda small: small + small, numbers, "may leave the range")


def test_a_device_and_a_size_that_are_read_from_a_tensor() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    device = graph.call_function(getattr, (x, "device"))
    ones = graph.call_function(torch.ops.aten.ones.default, ([2],))
    moved = graph.call_function(torch.ops.aten.to.device, (ones, device, torch.int64))
    size = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
    total = graph.call_function(torch.ops.aten.add.Tensor, (moved, size))
    graph.output(total)
    integers = torch.ones(2).long()
    values = (x, torch.ones(4)), (ones, torch.ones(2)), (moved, integers), (size, 4), (total, integers)
    for node, value in values:
        node.meta["val"] = value
    evaluator = SymbolicEvaluator(fx.GraphModule({}, graph), changed=frozenset())
    assert evaluator.cases(moved, (Affine(1),)) == (Case(frozenset(), Affine(1)),)
    assert evaluator.cases(total, (Affine(1),)) == (Case(frozenset(), Affine(5)),)
