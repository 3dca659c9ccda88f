"""Nodes that compute the same become one, unless someone could see it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from neuron_attn_rewrite import RewriteConfig, rewrite
from neuron_attn_rewrite.capture.export import capture
from neuron_attn_rewrite.replace.merge import LARGEST, merge

aten = torch.ops.aten
X = torch.arange(12.0).reshape(3, 4)


class Twice(nn.Module):
    """What `run` computes of `x` and a buffer."""

    def __init__(self, run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.run = run
        self.register_buffer("seen", torch.arange(12.0).reshape(3, 4) - 5)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def merged(run: Callable[[Any, Tensor], Any], x: Tensor) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The captured graph before and after."""
    module = capture(Twice(run), (x,), None, None).module
    before = copy.deepcopy(module)
    merge(module.graph)
    module.graph.lint()
    module.recompile()
    return before, module


def count(module: fx.GraphModule) -> int:
    return sum(node.op == "call_function" for node in module.graph.nodes)


def written_between(model: Any, x: Tensor) -> Tensor:
    first = model.seen * 2
    model.seen.add_(x)
    return first - model.seen * 2


def view_written(model: Any, x: Tensor) -> Tensor:
    first = model.seen[0].exp()
    model.seen[:, 1:].add_(x[:, 1:])
    return first - model.seen[0].exp()


SAME: dict[str, Callable[[Any, Tensor], Any]] = {
    "a result": lambda m, x: (x + 1) * 2 - (x + 1).exp(),
    "a chain": lambda m, x: (x + 1).cos() * 2 - (x + 1).cos().exp(),
    "positions": lambda m, x: (x + torch.arange(4)) * (x - torch.arange(4)),
    "of a buffer": lambda m, x: m.seen.exp() * x - m.seen.exp(),
    "a view": lambda m, x: x[0] * 2 + x[0].exp(),
    "with an argument by name": lambda m, x: x.sum(1, keepdim=True) * 2 - x.sum(1, keepdim=True).exp(),
    "dropout that is off": lambda m, x: nn.functional.dropout(x, 0.5, False) * 2 - nn.functional.dropout(x, 0.5, False),
}


@pytest.mark.parametrize("name", SAME)
def test_equal_nodes_become_one(name: str) -> None:
    before, after = merged(SAME[name], X)
    assert count(after) < count(before)
    other = torch.randn(3, 4)
    assert torch.equal(after(other), before(other))
    calls = [f"{node.target}{node.args}{node.kwargs}" for node in after.graph.nodes if node.op == "call_function"]
    assert len(calls) == len(set(calls))


APART: dict[str, Callable[[Any, Tensor], Any]] = {
    "another number": lambda m, x: (x + 1) * (x + 2),
    "a number of another type": lambda m, x: (x + 1) * (x + 1.0),
    "zeros of another sign": lambda m, x: torch.atan2(x * 0.0, x) - torch.atan2(x * -0.0, x),
    "another dtype": lambda m, x: torch.arange(4) + torch.arange(4, dtype=torch.float32) + x,
    "another operator": lambda m, x: x.floor() - x.ceil(),
    "another tensor": lambda m, x: x.exp() - m.seen.exp(),
    "two outputs": lambda m, x: (x + 1, x + 1),
    "views of two outputs": lambda m, x: ((x + 1).view(12), (x + 1).view(4, 3)),
    "an output in a list": lambda m, x: (*torch.broadcast_tensors(x + 1, x[:1]), (x + 1) * 1),
    "the input is written between": written_between,
    "a view of the input is written between": view_written,
}


@pytest.mark.parametrize("name", APART)
def test_nodes_that_differ_stay(name: str) -> None:
    before, after = merged(APART[name], X)
    assert [node.target for node in after.graph.nodes] == [node.target for node in before.graph.nodes]
    other = torch.randn(3, 4)
    new, old = after(other), before(other)
    pairs = zip(new, old, strict=True) if isinstance(new, (tuple, list)) else [(new, old)]
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_caller_may_write_into_an_output() -> None:
    _, after = merged(lambda m, x: (x + 1, x + 1), X)
    first, second = after(X)
    first.zero_()
    assert torch.equal(second, X + 1)


def test_random_numbers_are_drawn_twice() -> None:
    _, after = merged(lambda m, x: torch.rand_like(x) - torch.rand_like(x), X)
    assert (after(X) != 0).any()


@pytest.mark.parametrize(("size", "fewer"), [(LARGEST, 1), (LARGEST + 1, 0)])
def test_a_large_result_is_not_kept_for_later(size: int, fewer: int) -> None:
    before, after = merged(lambda m, x: x.exp() * 2 - x.exp(), torch.zeros(size))
    assert count(before) - count(after) == fewer


def between(*middle: Any) -> tuple[fx.Graph, fx.Node]:
    """A graph that computes the same twice, with a call between, and subtracts the results."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    one = graph.call_function(aten.exp.default, (x,))
    graph.call_function(middle[0], (one if middle[1] is None else middle[1], *middle[2:]))
    two = graph.call_function(aten.exp.default, (x,))
    total = graph.call_function(aten.sub.Tensor, (one, two))
    graph.output(total)
    with FakeTensorMode() as mode:
        for node in graph.nodes:
            node.meta["val"] = mode.from_tensor(X)
    return graph, total


@pytest.mark.parametrize(
    ("middle", "becomes_one"),
    [
        ((aten.neg.default, None), True),
        ((aten.neg_.default, None), False),
        ((torch._C._set_grad_enabled, False), False),
    ],
)
def test_what_comes_between(middle: tuple[Any, ...], becomes_one: bool) -> None:
    graph, total = between(*middle)
    merge(graph)
    assert (total.args[0] is total.args[1]) == becomes_one


class Layers(nn.Module):
    """Each of two layers makes the mask anew."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
        for _ in range(2):
            seen = (torch.arange(k.shape[2]) < length[:, None])[:, None, None]
            q = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen) + torch.arange(8).float().cos()
        return q


@pytest.mark.parametrize("policy", ["always", "profitable"])
def test_only_a_graph_with_a_kernel_call_is_changed(policy: str) -> None:
    inputs = (*(torch.randn(2, 2, 16, 8) for _ in range(3)), torch.tensor([16, 3]))
    found = rewrite(Layers().eval(), inputs, config=RewriteConfig(policy=policy, strict=True))
    cosines = found.graph.find_nodes(op="call_function", target=torch.ops.aten.cos.default)
    assert (len(found.report.replaced), len(cosines)) == ((2, 1) if policy == "always" else (0, 2))
    assert found.report.nodes_after == len(found.graph.nodes)
    again = (*(3 * torch.randn(2, 2, 16, 8) for _ in range(3)), torch.tensor([1, 9]))
    torch.testing.assert_close(found(*again), Layers()(*again), rtol=0, atol=1e-4)
