"""Operands that are drawn: which ones, how large, and how they lie in memory."""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, fx

from neuron_attn_rewrite.graph.drafts import DRAFT
from neuron_attn_rewrite.graph.held import VALUE_READ
from neuron_attn_rewrite.masks.proof import Proof
from neuron_attn_rewrite.replace.graft import Graft
from neuron_attn_rewrite.replace.operands import drawn_operands

aten = torch.ops.aten
SHAPE = (2, 3, 40, 64)


class Setting:
    """A graph of inputs, and of attentions that are the sum of all that they read."""

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def input(self, name: str, value: Tensor | None = None) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = torch.zeros(SHAPE) if value is None else value
        return node

    def call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        given = fx.node.map_arg(args, lambda read: read.meta["val"])
        node.meta["val"] = target(*given)
        return node

    def attention(
        self,
        query: fx.Node,
        key: fx.Node,
        value: fx.Node,
        terms: tuple[fx.Node, ...] = (),
        scales: tuple[fx.Node, ...] = (),
        sink: fx.Node | None = None,
        scale: float = 0.5,
    ) -> Graft:
        of = [SimpleNamespace(node=node) for node in (query, key, value)]
        output = self.call(lambda *read: read[0], query, key, value, *terms, *scales, *([sink] if sink else []))
        form = SimpleNamespace(
            query=of[0],
            key=of[1],
            value=of[2],
            operand_scales=[SimpleNamespace(operand=SimpleNamespace(node=node)) for node in scales],
            sink=SimpleNamespace(node=sink) if sink else None,
        )
        site = SimpleNamespace(output=output, terms=[SimpleNamespace(node=node) for node in terms])
        verdict: Any = SimpleNamespace(
            site=site,
            form=SimpleNamespace(site=form, starts=(query, key, value)),
            example=SimpleNamespace(scale=scale, head_dim=64),
        )
        result = self.call(lambda *read: read[0], query, key, value)
        return Graft(verdict, Proof(), result, (result,))


def generator() -> Generator:
    return Generator().manual_seed(0)


def drawn(*grafts: Graft, changed: frozenset[fx.Node] = frozenset()) -> dict[fx.Node, Tensor]:
    fit, makers = drawn_operands(grafts, changed, {})
    assert fit == [g for g in grafts if g.verdict.site.output not in changed]
    return {node: make(generator()) for node, make in makers.items()}


@pytest.mark.parametrize(("scale", "size"), [(0.5, 0.866), (-0.5, 0.866), (0.1, 1.936), (0.0, 1.732)])
def test_scores_have_a_known_spread(scale: float, size: float) -> None:
    """The standard deviation of `scale * query * key` is 3, and that of the value is that of the query."""
    setting = Setting()
    nodes = [setting.input(name) for name in ("query", "key", "value")]
    factor, sink = setting.input("factor"), setting.input("sink")
    found = drawn(setting.attention(nodes[0], nodes[1], nodes[2], (), (factor,), sink, scale))
    assert set(found) == {*nodes, factor, sink}
    for node in nodes:
        assert found[node].std() == pytest.approx(size, rel=0.05) and found[node].mean().abs() < 0.1
    assert found[sink].std() == pytest.approx(1, rel=0.05)
    least, largest = found[factor].aminmax()
    assert least == pytest.approx(0.5, abs=0.01) and largest == pytest.approx(1.5, abs=0.01)


def test_memory_and_dtype_are_those_of_the_node() -> None:
    setting = Setting()
    moved = torch.zeros(3, 5, 7, dtype=torch.float64).permute(2, 0, 1)
    query, key = setting.input("query", moved), setting.input("key", torch.zeros(4, 2, dtype=torch.bfloat16))
    found = drawn(setting.attention(query, key, setting.input("value")))
    for node, value in ((query, moved), (key, key.meta["val"])):
        assert found[node].stride() == value.stride() and found[node].shape == value.shape
        assert found[node].dtype == value.dtype


def test_what_is_no_real_number_or_was_read_is_not_drawn() -> None:
    setting = Setting()
    query, value = setting.input("query"), setting.input("value")
    places, held = setting.input("places", torch.zeros(3, dtype=torch.int64)), setting.input("held")
    other = setting.input("other")
    held.meta[VALUE_READ], other.meta["val"] = True, 3.0
    assert set(drawn(setting.attention(query, places, value, (), (held, other)))) == {query, value}


def test_a_draft_is_drawn_by_its_pieces() -> None:
    setting = Setting()
    first, second = setting.input("first"), setting.input("second")
    joined = setting.call(aten.cat.default, [first, second], -1)
    joined.meta[DRAFT] = True
    value = setting.input("value")
    assert set(drawn(setting.attention(first, joined, value))) == {first, second, value}


def test_an_operand_of_a_mask_is_drawn_if_it_is_an_input() -> None:
    setting = Setting()
    query, key, value = (setting.input(name) for name in ("query", "key", "value"))
    computed = setting.call(aten.cos.default, key)
    mask = setting.call(aten.add.Tensor, computed, query)
    assert set(drawn(setting.attention(query, computed, value, (mask,)))) == {query, value}


def test_an_operand_inside_of_another_attention_is_computed() -> None:
    setting = Setting()
    query, key, value = (setting.input(name) for name in ("query", "key", "value"))
    first = setting.attention(query, key, value)
    middle = setting.call(aten.cos.default, first.verdict.site.output)
    second = setting.attention(middle, key, value)
    assert set(drawn(first, second)) == {query, key, value, middle}
    inner = setting.call(aten.cos.default, query)
    third = setting.attention(query, key, value, (), ())
    third.verdict.site.output.args = (inner, *third.verdict.site.output.args)
    assert set(drawn(third, setting.attention(inner, key, value))) == {query, key, value}


def test_an_attention_that_writes_is_left_out() -> None:
    setting = Setting()
    query, key, value, other = (setting.input(name) for name in ("query", "key", "value", "other"))
    fits, writes = setting.attention(query, key, value), setting.attention(other, key, value)
    assert set(drawn(fits, writes, changed=frozenset([writes.verdict.site.output, query]))) == {query, key, value}


PIECES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "a slice": ((aten.slice.Tensor, 3, 0, 4),),
    "a part": ((aten.split.Tensor, 32, -1), (operator.getitem, 1)),
    "a permutation": ((aten.permute.default, [0, 2, 1, 3]),),
    "a copy": ((aten.clone.default,),),
    "a copy of a slice of a permutation": (
        (aten.permute.default, [0, 2, 1, 3]),
        (aten.slice.Tensor, 3, 4, 8),
        (aten.clone.default,),
    ),
    "computed": ((aten.cos.default,),),
    "a slice of something computed": ((aten.cos.default,), (aten.slice.Tensor, 3, 0, 4)),
}


@pytest.mark.parametrize("name", PIECES)
def test_a_piece_of_another_operand_is_computed(name: str) -> None:
    setting = Setting()
    query, key = setting.input("query"), setting.input("key")
    piece = key
    for target, *args in PIECES[name]:
        piece = setting.call(target, piece, *args)
    expected = {query, key, piece} if "computed" in name else {query, key}
    assert set(drawn(setting.attention(query, key, piece))) == expected
