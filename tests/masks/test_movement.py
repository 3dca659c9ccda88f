"""Operators that move or create elements, at symbolic indices, against the tensors themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from neuron_attn_rewrite.masks.affine import Affine, Index, variable
from neuron_attn_rewrite.masks.cases import Unknown
from neuron_attn_rewrite.masks.symbolic import SymbolicEvaluator
from tests.helpers import Function
from tests.masks.elements import assert_each_element, assert_unknown

ROWS, COLUMNS = 3, 5


def draw() -> tuple[Tensor, ...]:
    """Positions, and bools, [ROWS, COLUMNS]."""
    return torch.randint(-9, 9, (ROWS, COLUMNS)), torch.rand(ROWS, COLUMNS) < 0.5


def at(*numbers: int) -> Tensor:
    """A tensor of numbers that the graph computes from its size."""
    found = torch.arange(len(numbers)) * 0
    for i, number in enumerate(numbers):
        found = torch.where(torch.arange(len(numbers)) == i, number, found)
    return found


def steps(step: int, start: int, count: int) -> Tensor:
    return torch.arange(count) * step + start


KNOWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a new dim": lambda p, f: p[:, None],
    "reshaped": lambda p, f: p.reshape(1, ROWS, 1, COLUMNS, 1),
    "squeezed": lambda p, f: p[None, :, None].squeeze(),
    "a dim of one element": lambda p, f: p[:1].reshape(COLUMNS),
    "flattened": lambda p, f: p[:, None].flatten(0, 1),
    "expanded": lambda p, f: p[:, None].expand(ROWS, 2, COLUMNS),
    "expanded with new dims": lambda p, f: p.expand(2, ROWS, COLUMNS),
    "expanded rows": lambda p, f: p[:1].expand(ROWS, COLUMNS),
    "expanded like": lambda p, f: p[:1].expand_as(f),
    "transposed": lambda p, f: p.mT,
    "permuted": lambda p, f: p[:, None].expand(ROWS, 2, COLUMNS).permute(2, 0, 1),
    "copied": lambda p, f: p.clone().contiguous(),
    "sliced": lambda p, f: p[1:, 2:4],
    "sliced from the end": lambda p, f: p[:, -3:-1],
    "sliced behind the end": lambda p, f: p[:, -5:],
    "sliced to nothing but one": lambda p, f: p[2:, 4:],
    "every second": lambda p, f: p[:, 1::2],
    "every third": lambda p, f: p[:, ::3],
    "selected": lambda p, f: p[1],
    "selected from the end": lambda p, f: p[:, -1],
    "selected, the first from the end": lambda p, f: p[-ROWS],
    "selected, the last": lambda p, f: p[:, COLUMNS - 1],
    "selected along the last but one": lambda p, f: p.select(-2, 1),
    "selected in the middle": lambda p, f: p[:, None].expand(ROWS, 2, COLUMNS)[:, 1],
    "indexed": lambda p, f: p[steps(1, 0, 2)],
    "indexed up to the last": lambda p, f: p[:, steps(2, 0, 3)],
    "indexed by two": lambda p, f: p[steps(1, 1, 2)[:, None], steps(1, 1, 4)[None]],
    "indexed by two of many dims": lambda p, f: p[None, :, :][:, steps(1, 0, 3), steps(1, 2, 3)],
    "indexed in the middle": lambda p, f: p[:, :, None].expand(ROWS, COLUMNS, 2)[:, steps(1, 3, 2)],
    "indexed by one row": lambda p, f: p[:1][steps(0, 0, 4)],
    "numbered": lambda p, f: torch.arange(4),
    "numbered from a start": lambda p, f: torch.arange(2, 6),
    "numbered in steps": lambda p, f: torch.arange(9, -4, -3),
    "numbered in int32": lambda p, f: torch.arange(4, dtype=torch.int32),
    "ones": lambda p, f: torch.ones(2, 3),
    "zeros": lambda p, f: torch.zeros(2, dtype=torch.int64),
    "ones of its kind": lambda p, f: torch.ones_like(f),
    "zeros of its kind": lambda p, f: torch.zeros_like(p),
    "new ones": lambda p, f: p.new_ones(2),
    "new zeros": lambda p, f: f.new_zeros(2),
    "full": lambda p, f: torch.full((2, 3), -1.5),
    "full of an integer": lambda p, f: torch.full((2, 3), 7),
    "full of False": lambda p, f: torch.full((2, 3), False),
    "full of its kind": lambda p, f: torch.full_like(p, 4),
    "full that wraps": lambda p, f: torch.full((2,), 300, dtype=torch.int16).to(torch.int16),
    "full in 16 bits": lambda p, f: torch.full((2,), 0.1, dtype=torch.bfloat16),
    "new full": lambda p, f: p.new_full((2,), 3),
    "filled": lambda p, f: torch.fill(p, 3),
    "a number": lambda p, f: torch.scalar_tensor(2.5)[None],
    "joined": lambda p, f: torch.cat([p, p.flip(0), p[1:2]]),
    "joined along the last": lambda p, f: torch.cat([p[:, :2], torch.zeros_like(p), p[:, 3:]], -1),
    "padded": lambda p, f: torch.constant_pad_nd(p, (2, 1), 7),
    "padded on one side": lambda p, f: torch.constant_pad_nd(torch.zeros(2, 3), (0, 3), -1.5),
    "padded, of one dim": lambda p, f: torch.constant_pad_nd(torch.arange(4), (1, 1), 7),
    "padded, of no other dim": lambda p, f: torch.constant_pad_nd(f, (1, 0, 0, 0)),
    "lower": lambda p, f: p.tril(),
    "lower, ahead": lambda p, f: p.tril(1),
    "lower, behind": lambda p, f: p.tril(-1),
    "upper": lambda p, f: p.triu(),
    "upper, ahead": lambda p, f: p.triu(2),
    "upper, of floats": lambda p, f: torch.full((3, 3), -1.5).triu(1),
    "lower, of many": lambda p, f: p.expand(2, ROWS, COLUMNS).tril(),
    "flipped": lambda p, f: p.flip(1),
    "flipped twice": lambda p, f: p.flip(0, -1),
    "differences": lambda p, f: p.diff(),
    "differences of rows": lambda p, f: p.diff(dim=0),
    "differences behind a column": lambda p, f: p.diff(dim=1, prepend=p[:, :1] + 1),
    "differences behind two columns": lambda p, f: p.diff(dim=-1, prepend=p[:, 2:4]),
    "a running sum of ones": lambda p, f: torch.ones_like(p).cumsum(1),
    "a running sum of threes": lambda p, f: torch.full((4, 2), 3).cumsum(0),
}
UNKNOWN: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "bits as another dtype": (lambda p, f: p.view(torch.float64), "no rule for view"),
    "sliced behind the last element": (lambda p, f: p[:, 7:], "after the last"),
    "sliced before the first element": (lambda p, f: p[:, -7:], "before the first"),
    "full of no integer": (lambda p, f: torch.full_like(p, float("inf")), "not an integer"),
    "joined dims": (lambda p, f: p.reshape(-1), "splits or joins"),
    "other dims": (lambda p, f: p.reshape(COLUMNS, ROWS), "splits or joins"),
    "an index that may be too large": (lambda p, f: p[:, steps(1, 1, COLUMNS)], "out of range"),
    "an index that may be negative": (lambda p, f: p[:, steps(1, -1, 3)], "out of range"),
    "an index of several cases": (lambda p, f: p[at(0, 1, 0)], "several cases"),
    "an index of bools": (lambda p, f: p[:, f[0]], "neighbouring"),
    "indices of dims that are apart": (
        lambda p, f: p[:, None].expand(ROWS, 2, COLUMNS)[steps(1, 0, 2), :, steps(1, 0, 2)],
        "neighbouring",
    ),
    "numbers of floats": (lambda p, f: torch.arange(4.0), "does not hold integers"),
    "numbers in 16 bits": (lambda p, f: torch.arange(4, dtype=torch.int16), "does not hold integers"),
    "padded rows": (lambda p, f: torch.constant_pad_nd(p, (1, 0, 0, 1)), "pads other dims"),
    "padded rows, in front": (lambda p, f: torch.constant_pad_nd(p, (1, 0, 1, 0)), "pads other dims"),
    "padded by less than nothing": (lambda p, f: torch.constant_pad_nd(p, (-1, 0)), "removes elements"),
    "cut at the end": (lambda p, f: torch.constant_pad_nd(p, (0, -1)), "removes elements"),
    "differences of differences": (lambda p, f: p.diff(n=2), "no rule for diff"),
    "differences with an end": (lambda p, f: p.diff(append=p[:, :1]), "no rule for diff"),
    "differences of floats": (lambda p, f: torch.ones(2, 3).diff(), "no rule for diff"),
    "a running sum of two numbers": (lambda p, f: torch.ones(3, 3, dtype=torch.int64).tril().cumsum(1), "vary"),
    "a running sum of what varies": (lambda p, f: p.cumsum(1), "vary"),
    "a running sum of floats": (lambda p, f: torch.ones(3).cumsum(0), "vary"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_each_element(name: str) -> None:
    assert_each_element(KNOWN[name], draw)


@pytest.mark.parametrize("name", UNKNOWN)
def test_no_rule(name: str) -> None:
    assert_unknown(UNKNOWN[name][0], draw, UNKNOWN[name][1])


def test_a_start_that_may_be_zero_or_negative() -> None:
    """`x[3 - n:]` of n elements begins at 3, but at 0 if n is 3."""
    sizes = (({0: torch.export.Dim("n", min=3, max=64)},),)
    plus = Function(lambda x: x + 1)
    module = torch.export.export(plus, (torch.zeros(9).long(),), dynamic_shapes=sizes, strict=False).graph_module
    x = next(iter(module.graph.nodes))
    n = x.meta["val"].shape[0]
    with module.graph.inserting_after(x):
        start = module.graph.placeholder("start")
        start.meta["val"] = 3 - n
        cut = module.graph.call_function(torch.ops.aten.slice.Tensor, (x, 0, start))
        cut.meta["val"] = x.meta["val"]
    evaluator = SymbolicEvaluator(module, changed=frozenset())
    with pytest.raises(Unknown, match="before the first"):
        evaluator.cases(cut, (variable(Index(3, Affine(2))),))
