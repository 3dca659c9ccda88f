"""The inverse of each view: the new base is what the base is after a write into the view."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from neuron_attn_rewrite.capture.scatters import scatter
from neuron_attn_rewrite.graph.memory import Memory

aten = torch.ops.aten
Steps = tuple[tuple[Any, ...], ...]
SHAPE = (4, 1, 6, 4)


def looked_at(steps: Steps, base: Tensor) -> tuple[fx.Node, Memory]:
    """The node of the last step, and the values of all nodes."""
    graph, where = fx.Graph(), Memory()
    node, value = graph.placeholder("base"), base
    where.values[node] = value
    for target, *args in steps:
        node, value = graph.call_function(target, (node, *args)), target(value, *args)
        where.values[node] = value
    return node, where


def eagerly(target: Any, *args: Any) -> Any:
    return target(*args)


KNOWN: dict[str, Steps] = {
    "alias": ((aten.alias.default,),),
    "slice": ((aten.slice.Tensor, 2, 1, 3),),
    "slice with a step": ((aten.slice.Tensor, -2, -5, 9, 2),),
    "select": ((aten.select.int, 2, -2),),
    "diagonal": ((aten.diagonal.default, 1, 0, 2),),
    "narrow": ((aten.narrow.default, 2, 1, 3),),
    "narrow from the end": ((aten.narrow.default, 2, -2, 1),),
    "narrow of one": ((aten.narrow.default, 1, -1, 1),),
    "narrow to nothing": ((aten.narrow.default, 2, 6, 0),),
    "narrow of nothing": ((aten.slice.Tensor, 2, 0, 0), (aten.narrow.default, 2, 0, 0)),
    "view": ((aten.view.default, [24, 4]),),
    "unsqueeze": ((aten.unsqueeze.default, 1),),
    "squeeze": ((aten.squeeze.dim, 1),),
    "permute": ((aten.permute.default, [3, 0, 2, 1]),),
    "transpose": ((aten.transpose.int, 0, -1),),
    "mT": ((aten.mT.default,),),
    "other bits": ((aten.view.dtype, torch.int32),),
    "unbind": ((aten.unbind.int, -2), (operator.getitem, -2)),
    "split": ((aten.split.Tensor, 4, -2), (operator.getitem, 1)),
    "split, from the end": ((aten.split.Tensor, 4, 2), (operator.getitem, -2)),
    "split with sizes": ((aten.split_with_sizes.default, [1, 3, 2], 2), (operator.getitem, 2)),
    "chunk": ((aten.chunk.default, 3, 2), (operator.getitem, 1)),
    "tensor_split": ((aten.tensor_split.sections, 4, 2), (operator.getitem, 1)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_write_into_a_view(name: str) -> None:
    *before, last = KNOWN[name]
    base = torch.randn(SHAPE)
    if last[0] is not operator.getitem:
        for target, *args in before:
            base = target(base, *args)
        before = []
    steps = (*before, last)
    expected = base.clone()
    written: Any = expected
    for target, *args in steps:
        written = target(written, *args)
    value = torch.randn(written.shape).to(written.dtype)
    written.copy_(value)
    inverse = scatter(*looked_at(steps, base))
    assert inverse is not None
    found: Any = inverse(eagerly, base, value)  # type: ignore[arg-type]
    assert found.dtype == expected.dtype and torch.equal(found.view(torch.int32), expected.view(torch.int32))


UNKNOWN: dict[str, Steps] = {
    "expand": ((aten.expand.default, [4, 3, 6, 4]),),
    "as_strided": ((aten.as_strided.default, [2, 2], [2, 1]),),
    "fewer bits": ((aten.view.dtype, torch.int16),),
    "real numbers of complex ones": ((lambda x: torch.complex(x, x),), (aten.view_as_real.default,)),
    "a slice of complex numbers": ((lambda x: torch.complex(x, x),), (aten.slice.Tensor, 2, 1, 3)),
    "a slice of negated bits": ((torch._neg_view,), (aten.slice.Tensor, 2, 1, 3)),
    "several": ((aten.split.Tensor, 4, 2),),
    "no part of a tensor": ((aten.var_mean.default,), (operator.getitem, 1)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_inverse_that_is_not_known(name: str) -> None:
    assert scatter(*looked_at(UNKNOWN[name], torch.randn(SHAPE))) is None


@pytest.mark.parametrize("which", ["view", "base"])
def test_no_inverse_without_both_tensors(which: str) -> None:
    view, where = looked_at(KNOWN["slice"], torch.randn(SHAPE))
    where.values[view if which == "view" else view.all_input_nodes[0]] = None
    assert scatter(view, where) is None


def test_no_inverse_of_a_narrow_whose_start_is_computed() -> None:
    view, where = looked_at(KNOWN["narrow"], torch.randn(SHAPE))
    view.args = (view.args[0], 2, view.graph.placeholder("start"), 3)
    assert scatter(view, where) is None
