"""Tensors that a model writes through views and copies: a rule asks about a value's memory before it steps on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from neuron_attn_rewrite import RewriteConfig, rewrite
from neuron_attn_rewrite.capture.export import capture
from neuron_attn_rewrite.graph.memory import memory
from neuron_attn_rewrite.graph.nodes import fake_mode, op_name
from neuron_attn_rewrite.graph.writes import Writes
from tests.helpers import Function, relative_error

KEYS, DIM = 8, 4


def attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    return (q @ k.mT * 0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def cloned_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask.diagonal(dim1=-2, dim2=-1).fill_(False)
    return attention(q, k, v, mask)


def mask_by_foreach(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    penalty = mask * -5.0
    torch._foreach_mul_([penalty[0]], 0.0)
    return (q @ k.mT + penalty).softmax(-1) @ v


def half_of_the_keys(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k = k.contiguous().clone()
    k.chunk(2, -1)[0].mul_(3.0)
    return attention(q, k, v, mask)


def strided_keys(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k = k * 0.5
    k.as_strided((2, 3), (3, 1)).zero_()
    return attention(q, k, v, mask)


def values_read_before_and_after(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    v = v * 2.0
    first = attention(q, k, v, mask)
    v.expand(2, *v.shape)[0].neg_()
    return first, attention(q, k, v, mask)


def filled_constant(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    other = torch.full((KEYS, KEYS), -torch.inf)
    other.diagonal().fill_(0.0)
    return torch.where(mask, other, q @ k.mT * 0.5).softmax(-1) @ v


def strided_constant(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    other = torch.full((KEYS, KEYS), -torch.inf)
    other.as_strided((KEYS,), (KEYS + 1,)).fill_(0.0)
    return torch.where(mask, other, q @ k.mT * 0.5).softmax(-1) @ v


def idle_dropout(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    y = q * 1.5
    h = F.dropout(y, 0.1, training=False)
    h += 1.0
    return attention(y, k, v, mask)


def unsqueezed_in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    x = q[:, 0] * 1.5
    first = x[0]
    x.unsqueeze_(0)
    x.mul_(2.0)
    return (x[0] @ k[:, 0].mT).softmax(-1) @ v[:, 0] + first


def bits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return attention(q, k.view(torch.int32).view(torch.float32), v, mask)


def written_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT * 0.5
    scores.as_strided((3,), (2,)).fill_(-1.0)
    return scores.softmax(-1) @ v


def written_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    weights.as_strided((3,), (2,)).fill_(0.0)
    return weights @ v


def written_output(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    out = F.scaled_dot_product_attention(q, k, v)
    part = out.reshape(2, -1)
    part.as_strided((2, 4), (4, 1)).fill_(0.0)
    return part, out


def written_copy_of_the_output(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    return written_output(q, k, v, mask)


CASES: dict[Callable[..., Any], int] = {
    cloned_mask: 1,
    half_of_the_keys: 1,
    idle_dropout: 1,
    unsqueezed_in_place: 1,
    bits: 1,
    strided_keys: 1,
    # The value of what is written is not known, or it is written between two reads.
    mask_by_foreach: 1,
    values_read_before_and_after: 2,
    filled_constant: 0,
    strided_constant: 0,
    written_scores: 0,
    written_weights: 0,
}
"""How many attentions are replaced."""


def inputs() -> tuple[Tensor, ...]:
    return *(2 * torch.randn(2, 2, KEYS, DIM) for _ in range(3)), torch.rand(KEYS, KEYS) > 0.6


@pytest.mark.parametrize("weights", ["native", "beside"])
@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_what_is_written_is_not_stepped_over(function: Callable[..., Any], weights: Any) -> None:
    rewritten = _same(function, weights=weights)
    report = rewritten.report
    found = len(report.replaced) + len(report.kept)
    assert len(report.replaced) == CASES[function] and found == max(1, CASES[function]), str(report)


@pytest.mark.parametrize("function", [written_output, written_copy_of_the_output], ids=lambda f: f.__name__)
def test_a_write_behind_a_kernel_reaches_what_it_reached(function: Callable[..., Any]) -> None:
    rewritten = _same(function)
    assert all(site.reasons[-1].code == "written" for site in rewritten.report.kept)
    assert len(rewritten.report.sites) == 1


def _same(function: Callable[..., Any], **options: Any) -> Any:
    torch.manual_seed(0)
    model = Function(function).eval()
    config = RewriteConfig(policy="always", verify=False, **options)
    rewritten = rewrite(model, inputs(), config=config)
    for _ in range(2):
        given = inputs()
        copied = [x.clone() for x in given]
        old, new = pytree.tree_leaves(model(*copied)), pytree.tree_leaves(rewritten(*given))
        for a, b in zip((*old, *copied[:3]), (*new, *given[:3]), strict=True):
            number = a.isfinite()
            assert relative_error(b[number], a[number]) < 1e-5, str(rewritten.report)
    return rewritten


def test_what_shares_memory_is_decided_by_storages() -> None:
    def program(x: Tensor) -> tuple[Tensor, ...]:
        y = x * 2.0
        copy, view = y.mT.reshape(-1), y.reshape(-1)
        diagonal = torch.einsum("ii->i", y)
        y.as_strided((2,), (5,)).fill_(0.0)
        return copy, view, diagonal

    writes = Writes(capture(Function(program), (torch.randn(4, 4),)).module.graph)
    names = {op_name(node): node in writes.changed for node in writes.graph.nodes}
    copy, view = (n for n in writes.graph.nodes if op_name(n) == "reshape")
    assert copy not in writes.changed and view in writes.changed
    assert names["einsum"] and names["mul"]
    writes.mark()
    assert "mul.written" in map(op_name, writes.graph.nodes)
    assert op_name(view) == "reshape"  # a view shows what its source holds


class Shared(nn.Module):
    """Two buffers, of which one is a part of the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("whole", torch.randn(2, 1, 2, 6, 4))
        self.register_buffer("keys", self.whole[0])

    def forward(self, q: Tensor) -> Tensor:
        weights = torch.softmax(q @ self.keys.mT, -1)
        self.whole.add_(1.0)
        return weights @ (self.keys + q)


def test_buffers_that_share_memory_are_written_together() -> None:
    inputs = (torch.randn(1, 2, 6, 4),)
    captured = capture(Shared(), inputs).module
    read = {n for n in captured.graph.find_nodes(op="get_attr") if n.target == "keys"}
    assert read and read <= Writes(captured.graph).changed
    model, rewritten = Shared(), rewrite(Shared(), inputs, config=RewriteConfig(policy="always", verify=False))
    for _ in range(2):
        assert relative_error(rewritten(*inputs), model(*inputs)) < 1e-5, str(rewritten.report)


def test_a_tensor_that_shows_other_memory() -> None:
    def program(q: Tensor, k: Tensor) -> Tensor:
        keys, others = k * 1.0, k * 2.0
        weights = torch.softmax(q @ keys.mT, -1)
        keys.set_(others)
        others.mul_(2.0)
        return weights @ keys + torch.softmax(q @ keys.mT, -1) @ k

    inputs = (torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4))
    rewritten = rewrite(Function(program), inputs, config=RewriteConfig(policy="always", verify=False))
    assert relative_error(rewritten(*inputs), program(*inputs)) < 1e-5, str(rewritten.report)


def test_a_graph_without_writes_is_not_run() -> None:
    graph = capture(Function(lambda x: F.dropout(x, 0.1, training=False)), (torch.randn(4),)).module.graph
    assert not Writes(graph).memory.storages


def test_a_run_leaves_the_symbols_open() -> None:
    """The run on fake tensors asks for sizes, and torch would take an answer for a condition of the graph."""

    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=64)}
    inputs = (torch.ones(4, 5, 2, 3), torch.ones(4, 5, 3, 6))
    model = Function(torch.matmul)
    program = torch.export.export(model, inputs, dynamic_shapes={"args": (sizes, sizes)}, strict=False)
    graph = program.module().graph
    shapes = fake_mode(graph).shape_env
    assert shapes is not None
    before = dict(shapes.replacements), len(shapes.guards)
    memory(graph)
    assert (dict(shapes.replacements), len(shapes.guards)) == before
