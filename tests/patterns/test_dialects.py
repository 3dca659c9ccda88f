"""One attention, in the graphs of every tracer: what is found and proven must not depend on who traced it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils import _pytree as pytree

from neuron_attn_rewrite import InputError, RewrittenModule, rewrite
from tests.helpers import ALWAYS, relative_error

PROVEN = "causal(offset=0) & key_padding("


class Block(nn.Module):
    """An attention with parameters, a buffer, and a mask of the caller's."""

    def __init__(self, eager: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.eager = nn.Linear(32, 96), nn.Linear(32, 32), eager
        self.register_buffer("causal", torch.ones(12, 12, dtype=torch.bool).tril())

    def forward(self, x: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        y = self.qkv(x)
        q, k, v = (y[..., i : i + 32].reshape(2, 12, 4, 8).transpose(1, 2) for i in (0, 32, 64))
        mask = self.causal & attention_mask[:, None, None].bool()
        if self.eager:
            scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~mask, torch.finfo(torch.float32).min)
            z = torch.softmax(scores, -1) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return (self.out(z.transpose(1, 2).reshape(2, 12, 32)),)


def example() -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    return torch.randn(2, 12, 32), mask


def compiled(model: nn.Module, inputs: tuple[Tensor, ...], wrap: Callable[[Any], Any]) -> tuple[fx.GraphModule, Any]:
    """The graph that a torch.compile backend gets, and its inputs: parameters are among them."""
    seen: list[tuple[fx.GraphModule, Any]] = []

    def take(graph: fx.GraphModule, given: Any) -> Any:
        seen.append((graph, given))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(model, backend=wrap(take))(*inputs)
    return seen[0]


def exported(model: nn.Module, inputs: Any, how: Callable[[Any], Any] = lambda program: program) -> Any:
    return how(torch.export.export(model, inputs, strict=False))


def made(model: nn.Module, inputs: Any, **options: Any) -> fx.GraphModule:
    with torch.no_grad():
        return make_fx(model, _allow_non_fake_inputs=True, **options)(*inputs)


def shaped(model: nn.Module, inputs: Any) -> fx.GraphModule:
    graph = fx.symbolic_trace(model)
    ShapeProp(graph).propagate(*inputs)
    return graph


DIALECTS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "export": exported,
    "strict export": lambda m, x: torch.export.export(m, x, strict=True),
    "core ATen": lambda m, x: exported(m, x, lambda p: p.run_decompositions()),
    "decomposed training IR": lambda m, x: exported(m, x, lambda p: p.run_decompositions({})),
    "make_fx": made,
    "make_fx on fakes": lambda m, x: made(m, x, tracing_mode="fake"),
    "make_fx with symbols": lambda m, x: made(m, x, tracing_mode="symbolic"),
    "make_fx, pre-dispatch": lambda m, x: made(m, x, pre_dispatch=True),
    "torch.fx.symbolic_trace with shapes": shaped,
}


def agrees(rewritten: RewrittenModule, inputs: Any, expected: Tensor) -> bool:
    with torch.no_grad():
        return relative_error(pytree.tree_leaves(rewritten(*inputs))[0], expected) < 2e-5


@pytest.mark.parametrize("eager", [False, True], ids=["sdpa", "eager"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_same_attention(dialect: str, eager: bool) -> None:
    model = Block(eager).eval()
    graph = DIALECTS[dialect](model, example())
    inputs = example()
    rewritten = rewrite(graph, config=ALWAYS)
    (site,) = rewritten.report.replaced
    assert str(site.mask).startswith(PROVEN), str(site.mask)
    assert agrees(rewritten, inputs, model(*inputs)[0])
    assert rewritten.state_dict().keys() <= model.state_dict().keys() or "make_fx" in dialect


@pytest.mark.parametrize("given", [True, False], ids=["inputs", "shapes alone"])
@pytest.mark.parametrize("eager", [False, True], ids=["sdpa", "eager"])
def test_a_graph_of_dynamo(eager: bool, given: bool) -> None:
    """Parameters and buffers are inputs, so the causal mask is data: a dense operand."""
    model, inputs = Block(eager).eval(), example()
    with torch.no_grad():
        graph, lifted = compiled(model, inputs, lambda backend: backend)
    rewritten = rewrite(graph, tuple(lifted) if given else (), config=ALWAYS)
    assert len(rewritten.report.replaced) == 1 and rewritten.report.sites[0].bias is not None
    assert agrees(rewritten, lifted, model(*inputs)[0])


@pytest.mark.parametrize("eager", [False, True], ids=["sdpa", "eager"])
def test_a_graph_of_aot_autograd(eager: bool) -> None:
    model, inputs = Block(eager).eval(), example()
    with torch.no_grad():
        _, lifted = compiled(model, inputs, lambda backend: backend)
        graph, _ = compiled(model, inputs, lambda backend: aot_autograd(fw_compiler=backend))
    rewritten = rewrite(graph, config=ALWAYS)
    assert len(rewritten.report.replaced) == 1
    assert agrees(rewritten, lifted, model(*inputs)[0])
    forward, _ = compiled(model, inputs, lambda backend: aot_autograd(fw_compiler=backend, bw_compiler=backend))
    (site,) = rewrite(forward, config=ALWAYS).report.kept
    assert any("also read by" in reason or "log-sum-exp" in reason for reason in site.reasons)


def test_a_graph_with_lifted_parameters() -> None:
    model, inputs = Block(eager=True).eval(), example()
    program = torch.export.export(model, inputs, strict=False)
    rewritten = rewrite(program.graph_module, config=ALWAYS)
    assert len(rewritten.report.replaced) == 1
    assert agrees(rewritten, (*program.state_dict.values(), *inputs), model(*inputs)[0])


def test_a_traced_graph_needs_shapes_or_inputs() -> None:
    model, inputs = Block(eager=True).eval(), example()
    graph = fx.symbolic_trace(model)
    with pytest.raises(InputError, match="carries no shape"):
        rewrite(graph, config=ALWAYS)
    rewritten = rewrite(graph, inputs, config=ALWAYS)
    assert str(rewritten.report.sites[0].mask) == "causal(offset=0) & key_padding(attention_mask)"
    assert agrees(rewritten, inputs, model(*inputs)[0])


def test_a_graph_of_transformers_own_tracer() -> None:
    tracer = pytest.importorskip("transformers.utils.fx", reason="transformers 5 has no tracer of its own")
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    for implementation in ("eager", "sdpa"):
        config._attn_implementation = implementation
        model = BertModel(config).eval()
        ids, mask = torch.randint(0, 64, (2, 12)), example()[1]
        graph = tracer.symbolic_trace(model, input_names=["input_ids", "attention_mask"])
        rewritten = rewrite(graph, (ids, mask), config=ALWAYS)
        assert len(rewritten.report.replaced) == 2
        with torch.no_grad():
            expected = model(ids, attention_mask=mask)[0]
        assert agrees(rewritten, (ids, mask), expected)
