"""Kernel calls beside attentions: which are added, and what reads them once they are accepted."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn

from neuron_attn_rewrite.graph.held import read_value
from neuron_attn_rewrite.masks.proof import Proof
from neuron_attn_rewrite.replace import graft as grafts
from neuron_attn_rewrite.replace.commit import commit
from neuron_attn_rewrite.replace.graft import Graft, graft

aten = torch.ops.aten


def grafted(output: fx.Node, result: fx.Node, *added: fx.Node) -> Graft:
    verdict: Any = SimpleNamespace(site=SimpleNamespace(output=output))
    return Graft(verdict, Proof(), result, (*added, result))


def readers(graph: fx.Graph, of: fx.Node) -> dict[str, fx.Node]:
    """Views of a tensor, and views behind a permutation, behind a view, and behind a sum."""
    permuted = graph.call_function(aten.permute.default, (of, [1, 0]))
    view = graph.call_function(aten.view.default, (of, [6]))
    total = graph.call_function(aten.neg.default, (of,))
    found = {
        "a permutation": permuted,
        "behind a permutation": graph.call_function(aten.view.default, (permuted, [6])),
        "a view": view,
        "behind a view": graph.call_function(aten.view.default, (view, [6, 1])),
        "a sum": total,
        "behind a sum": graph.call_function(aten.view.default, (total, [6])),
    }
    graph.output(tuple(found.values()))
    return found


@pytest.mark.parametrize("is_accepted", [True, False])
def test_the_readers_of_a_call(is_accepted: bool) -> None:
    module = fx.GraphModule(nn.Module(), fx.Graph())
    module.register_buffer("mask", torch.ones(2, 3))
    graph = module.graph
    x, mask = graph.placeholder("x"), graph.get_attr("mask")
    read_value(mask)
    output = graph.call_function(aten.mul.Tensor, (x, mask))
    sizes = graph.call_function(aten.relu.default, (output,))
    result = graph.call_function(aten.cos.default, (sizes,))
    found = readers(graph, output)
    if not is_accepted:
        assert commit(module, []) == frozenset()
        assert result not in module.graph.nodes and found["a view"].args[0] is output
        assert found["behind a view"].target is aten.view.default
        return
    assert commit(module, [grafted(output, result, sizes)]) == {"mask"}
    assert sizes.args == (output,)
    assert {name for name, node in found.items() if node.args[0] is result} == {"a permutation", "a view", "a sum"}
    views = {name: node.target for name, node in found.items() if not name.startswith(("a perm", "a sum"))}
    assert views == {
        "behind a permutation": aten.reshape.default,
        "a view": aten.reshape.default,
        "behind a view": aten.reshape.default,
        "behind a sum": aten.view.default,
    }
    assert found["a permutation"].target is aten.permute.default and found["a sum"].target is aten.neg.default


def test_a_call_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls are added in the order of the graph, each with the nodes that were added for it."""
    module = fx.GraphModule(nn.Module(), fx.Graph())
    first, second, third = (module.graph.placeholder(name) for name in "abc")

    class Emitter:
        def __init__(self, *_: Any) -> None:
            self.added: list[fx.Node] = []

        def kernel_call(self, form: fx.Node, _: None) -> fx.Node:
            self.added.append(form)
            if form is first:
                raise ValueError("no such call")
            return form

    monkeypatch.setattr(grafts, "Emitter", Emitter)
    verdicts: list[Any] = [
        SimpleNamespace(
            proof=Proof(),
            form=node,
            decision=None,
            site=SimpleNamespace(output=node, name="attn", pattern="softmax", anchor=node),
        )
        for node in (third, first, second)
    ]
    writes: Any = None
    found, failed = graft(module, verdicts, writes, strict=False)
    assert [g.result for g in found] == [second, third] and [g.added for g in found] == [(second,), (third,)]
    assert found[0] != replace(found[0]), "two calls are never equal"
    assert list(failed) == [id(verdicts[1])] and "no such call" in str(failed[id(verdicts[1])].reason)
    with pytest.raises(ValueError, match="no such call"):
        graft(module, verdicts, writes, strict=True)
