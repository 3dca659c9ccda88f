"""An attention in float64: each real number is widened, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from neuron_attn_rewrite.replace.exact import in_float64

aten = torch.ops.aten


def no_constant(node: fx.Node) -> None:
    raise AssertionError(node)


def test_real_numbers_are_widened_and_integers_are_not() -> None:
    graph = fx.Graph()
    x, places, table = graph.placeholder("x"), graph.placeholder("places"), graph.get_attr("table")
    rows = graph.call_function(aten.index_select.default, (table, 0, places))
    small = graph.call_function(aten.to.dtype, (x, torch.float16))
    counted = graph.call_function(aten.to.dtype, (small, torch.int64))
    apart = graph.call_function(aten.sub.Tensor, (small, counted))
    weights = graph.call_function(aten._softmax.default, (apart, -1, True))
    logs = graph.call_function(aten._log_softmax.default, (weights, -1, True))
    result = graph.call_function(aten.mul.Tensor, (logs, rows))
    inside = [rows, small, counted, apart, weights, logs, result]
    tensors = {x: torch.randn(3, 4) * 5, places: torch.tensor([2, 0, 1])}
    held = torch.randn(3, 4).bfloat16()
    found = in_float64(inside, tensors, {table: held}.__getitem__)
    exact = tensors[x].double()
    expected = (exact - exact.trunc()).softmax(-1).log_softmax(-1) * held.double()[tensors[places]]
    assert found is not None and found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    counts = in_float64(inside[:3], tensors, {table: held}.__getitem__)
    assert counts is not None and counts.dtype == torch.int64


def test_what_was_computed_inside_is_not_taken_from_the_model() -> None:
    """The model's own value of a node inside is rounded."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(aten.cos.default, (x,))
    second = graph.call_function(aten.neg.default, (first,))
    x_value = torch.tensor([0.3])
    found = in_float64([first, second], {x: x_value, first: torch.tensor([9.0])}, no_constant)
    assert found is not None and torch.equal(found, -x_value.double().cos())


def test_none_if_an_operator_has_no_float64_or_gives_no_tensor() -> None:
    def in_float32(x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return x

    graph = fx.Graph()
    x = graph.placeholder("x")
    rejects, parts = graph.call_function(in_float32, (x,)), graph.call_function(aten.split.Tensor, (x, 1))
    value = {x: torch.ones(2)}
    assert in_float64([rejects], value, no_constant) is None
    assert in_float64([parts], value, no_constant) is None
