"""Which models tell NaN from other numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from neuron_attn_rewrite.graph.writes import Writes
from neuron_attn_rewrite.masks.nan_readers import READERS, nan_is_read
from tests.masks.test_soundness import graph_of


def written_by(held: Tensor, x: Tensor) -> Tensor:
    """Another view of a tensor into which `x` is written."""
    other = held.mT
    held.mT.copy_(x)
    return other


READ: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "replaced": lambda x, n: x.nan_to_num(),
    "replaced in place": lambda x, n: x.clone().nan_to_num_(),
    "asked for": lambda x, n: x.isnan(),
    "compared": lambda x, n: torch.where(x == x, x, 2.0),
    "the other of two": lambda x, n: torch.fmax(n.float(), x),
    "as integers": lambda x, n: x.long(),
    "as bools": lambda x, n: x.bool(),
    "as its kind": lambda x, n: x.type_as(n),
    "behind other operators": lambda x, n: (x.relu() * 2).mT.exp().isfinite(),
    "behind a tuple": lambda x, n: x.max(1)[0].isnan(),
    "behind one of two": lambda x, n: (x.relu(), (x * 2).argmax()),
    "as places": lambda x, n: x.topk(2)[1] == 3,
    "behind the second of two": lambda x, n: (x.argsort(), x.relu()),
    "through another view of what is written": lambda x, n: written_by(torch.zeros_like(x), x).isnan(),
    "in the integers that are written": lambda x, n: written_by(n.view(torch.float64), x.double()),
}
KEPT: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "returned": lambda x, n: x,
    "computed with": lambda x, n: (x.relu() * 2 + x).softmax(-1) @ x.mT,
    "as another floating dtype": lambda x, n: x.double().to(torch.bfloat16),
    "only its kind": lambda x, n: n.type_as(x).isnan(),
    "only its size": lambda x, n: torch.zeros_like(x).isnan(),
    "another tensor": lambda x, n: (x.relu(), n.bool()),
    "a tuple": lambda x, n: x.max(1)[0] + x.split(2)[0],
    "through another view, computed with": lambda x, n: written_by(torch.zeros_like(x), x) * 2,
}


def is_read(program: Callable[[Tensor, Tensor], Any]) -> bool:
    graph = graph_of(program, (torch.randn(4, 4), torch.ones(4, 4, dtype=torch.int64))).graph
    return nan_is_read(next(iter(graph.nodes)))


@pytest.mark.parametrize("name", READ)
def test_nan_is_read(name: str) -> None:
    assert is_read(READ[name])


@pytest.mark.parametrize("name", KEPT)
def test_nan_only_spreads(name: str) -> None:
    assert not is_read(KEPT[name])


@pytest.mark.parametrize("reads", [torch.ops.aten.isnan.default, torch.ops.aten.relu.default])
def test_nan_in_a_buffer(reads: torch._ops.OpOverload) -> None:
    """Row 1 of a buffer is written. The buffer is read where it is named again, also before that: in the next call."""
    module, graph = nn.Module(), fx.Graph()
    module.register_buffer("held", torch.zeros(4, 4))
    module.register_buffer("flags", torch.zeros(4, 4))
    before = graph.get_attr("held")
    x = graph.placeholder("x")
    nodes = [x, before, graph.get_attr("held"), graph.get_attr("flags")]
    nodes.append(graph.call_function(torch.ops.aten.select.int, (nodes[2], 0, 1)))
    nodes.append(graph.call_function(torch.ops.aten.alias.default, (nodes[-1],)))
    nodes.append(graph.call_function(torch.ops.aten.copy_.default, (nodes[-1], x)))
    outputs = [
        graph.call_function(op, (node,)) for op, node in ((reads, before), (torch.ops.aten.isnan.default, nodes[3]))
    ]
    graph.output(outputs)
    for node in (*nodes, *outputs):
        node.meta["val"] = torch.zeros(4, 4, dtype=torch.bool if "isnan" in node.name else torch.float32)
    fx.GraphModule(module, graph)
    assert nan_is_read(x) == (reads is torch.ops.aten.isnan.default)


def test_a_reader_whose_result_is_written() -> None:
    graph = graph_of(lambda x: written_by(x.nan_to_num(1.0), x[:, :1]), (torch.randn(4, 4),)).graph
    assert nan_is_read(next(iter(graph.nodes)))
    Writes(graph).mark()
    assert nan_is_read(next(iter(graph.nodes)))


def test_the_readers_are_operators() -> None:
    assert all(hasattr(torch.ops.aten, name) for name in READERS)
