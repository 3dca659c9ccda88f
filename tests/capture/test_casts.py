"""The casts that stand for autocast: which tensors get one, and that the numbers are those under autocast."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

from neuron_attn_rewrite.capture.autocast import insert_casts

aten = torch.ops.aten
F32, BF16 = torch.float32, torch.bfloat16
REGION = {"cpu": BF16}
OURS = torch.library.Library("neuron_attn_test_casts", "DEF")
"""Operators with casts of their own, and one that gets a dtype under autocast, as some do on other devices."""


def _late(x: Tensor) -> Tensor:
    return x.cos() + x.to(BF16)


def _made(x: Tensor) -> Tensor:
    return torch.ones(x.shape[-1], dtype=F32) + x.to(BF16)


def _total(x: Tensor, y: Tensor) -> Tensor:
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
        return torch.sum(x, -1, dtype=F32) + y


OURS.define("late(Tensor x) -> Tensor")
OURS.define("made(Tensor x) -> Tensor")
OURS.define("total(Tensor x, Tensor y) -> Tensor")
OURS.define("write(Tensor(a!) x, Tensor y) -> Tensor(a!)")
OURS.impl("late", _late, "CompositeImplicitAutograd")
OURS.impl("made", _made, "CompositeImplicitAutograd")
OURS.impl("total", lambda x, y: x.sum(-1) + y.to(x.dtype), "CompositeImplicitAutograd")
OURS.impl("total", _total, "AutocastCPU")
OURS.impl("write", lambda x, y: x.copy_(y.to(BF16)), "CompositeImplicitAutograd")
ours = torch.ops.neuron_attn_test_casts


class Setting:
    """A graph of operators, with what it computes under autocast."""

    def __init__(self) -> None:
        self.module = fx.GraphModule(nn.Module(), fx.Graph())
        self.graph, self.mode = self.module.graph, FakeTensorMode()
        self.real: dict[fx.Node, Any] = {}
        self.outside: set[fx.Node] = set()

    def input(self, name: str, value: Any) -> fx.Node:
        node = self.graph.placeholder(name)
        self.real[node] = value
        node.meta["val"] = self.mode.from_tensor(value) if isinstance(value, Tensor) else value
        return node

    def held(self, name: str, value: Tensor) -> fx.Node:
        """A tensor of the module. The graph does not record its value."""
        self.module.register_buffer(name, value)
        node = self.graph.get_attr(name)
        self.real[node] = value
        return node

    def call(self, target: Any, *args: Any, inside: bool = True) -> fx.Node:
        node = self.graph.call_function(target, args)
        if not inside:
            self.outside.add(node)
        given = fx.node.map_arg(
            args, lambda read: self.real[read].clone() if isinstance(self.real[read], Tensor) else self.real[read]
        )
        with torch.autocast("cpu", BF16, enabled=inside), torch.no_grad():
            self.real[node] = target(*given)
        if isinstance(self.real[node], Tensor):
            node.meta["val"] = self.mode.from_tensor(self.real[node])
        return node

    def casts(self, *ends: fx.Node) -> list[tuple[str, torch.dtype]]:
        """Insert the casts, compare what the graph computes, and give each cast: its tensor and its dtype."""
        self.graph.output(ends)
        before = set(self.graph.nodes)
        inputs = [
            self.real[node].clone() if isinstance(self.real[node], Tensor) else self.real[node]
            for node in self.graph.find_nodes(op="placeholder")
        ]
        insert_casts(self.module, lambda node: {} if node in self.outside else REGION)
        with torch.no_grad():
            found = fx.Interpreter(self.module).run(*inputs)
        for new, end in zip(found, ends, strict=True):
            assert new.dtype == self.real[end].dtype and torch.equal(new, self.real[end])
        added = [node for node in self.graph.nodes if node not in before]
        for node in added:
            assert node.meta["val"].dtype == node.args[1] and node.target is aten.to.dtype
        return [(node.args[0].name, node.args[1]) for node in added]


def test_operators_in_and_around_a_region() -> None:
    s = Setting()
    x, w, none, ids = (
        s.input("x", torch.randn(6, 8)),
        s.held("w", torch.randn(8, 8)),
        s.input("none", None),
        s.input("ids", torch.arange(3)),
    )
    rows = s.input("rows", 2)
    first = s.call(aten.linear.default, x, w, none)
    cut = s.call(aten.split.Tensor, first, 3, 0)
    part = s.call(operator.getitem, cut, 1)
    shaped = s.call(aten.view.default, part, [rows, 12])
    outside = s.call(aten.to.dtype, x, torch.float64, inside=False)
    written = s.call(ours.write.default, s.input("y", torch.zeros(3, 8)), part)
    places = s.call(aten.add.Tensor, ids, 1)
    chosen = s.call(aten.embedding.default, w, places)
    again = s.call(aten.matmul.default, part, s.input("z", torch.randn(8, 2)))
    loss = s.call(aten.mse_loss.default, again, again)
    assert s.casts(first, shaped, outside, written, chosen, again, loss) == [
        ("x", BF16),
        ("w", BF16),
        ("z", BF16),
        (again.name, F32),
    ]


@pytest.mark.parametrize("target", [ours.late.default, ours.made.default])
def test_a_cast_that_an_operator_makes_itself(target: Any) -> None:
    s = Setting()
    assert s.casts(s.call(target, s.input("x", torch.randn(4, 8)))) == []


@pytest.mark.parametrize("around", [False, True])
def test_a_dtype_in_place_of_casts(around: bool) -> None:
    s = Setting()
    x, y = s.input("x", torch.randn(4, 8).to(BF16)), s.input("y", torch.randn(4))
    result = s.call(ours.total.default, x, y)
    assert result.meta["val"].dtype == F32
    with torch.autocast("cpu", BF16, enabled=around):
        insert_casts(s.module, lambda _: REGION)
    assert [(n.args[0], n.args[1]) for n in s.graph.find_nodes(op="call_function", target=aten.to.dtype)] == [(x, F32)]
