"""Bounds of added tensors, and that they hold as long as the result is used."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from neuron_attn_rewrite import RewriteError, rewrite
from neuron_attn_rewrite.capture.export import capture
from neuron_attn_rewrite.values.range_rules import UNBOUNDED, Range
from neuron_attn_rewrite.values.ranges import Ranges
from tests.helpers import ALWAYS, Function, relative_error

KEYS = 8


class Biased(nn.Module):
    """An attention with a bias made of a parameter and a buffer. It hides no key while they keep their values."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(KEYS, 1))
        self.register_buffer("bias", torch.randn(KEYS, KEYS))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT + self.slope * self.bias).softmax(-1) @ v


def test_a_buffer_that_was_bounded_is_checked_at_each_call() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(3, 2, 2, KEYS, 4).unbind(0)
    model = Biased()
    rewritten = rewrite(model, qkv, config=ALWAYS)
    assert len(rewritten.report.replaced) == 1
    assert relative_error(rewritten(*qkv), model(*qkv)) < 2e-5
    model.bias[3] = torch.finfo(torch.float32).min
    with pytest.raises(RewriteError, match="'bias' has changed"):
        rewritten(*qkv)


@pytest.mark.parametrize(("reduce", "bounds"), [(None, Range(-5000.0, -5000.0)), ("add", UNBOUNDED)])
def test_what_is_added_to_scattered_elements_has_no_bounds(reduce: str | None, bounds: Range) -> None:
    holder, graph = nn.Module(), fx.Graph()
    holder.register_buffer("held", torch.full((KEYS,), -5000.0))
    held, index = graph.get_attr("held"), graph.placeholder("index")
    held.meta["val"], index.meta["val"] = holder.held, torch.zeros(KEYS, dtype=torch.int64)
    scatter = torch.ops.aten.scatter
    if reduce is None:
        node = graph.call_function(scatter.src, (held, 0, index, held))
    else:
        node = graph.call_function(scatter.reduce, (held, 0, index, held), {"reduce": reduce})
    node.meta["val"] = torch.empty(KEYS)
    graph.output(node)
    fx.GraphModule(holder, graph)
    assert Ranges(frozenset()).of(node) == bounds


def slopes(base: float, lowest: int) -> Callable[..., Tensor]:
    """A bias that falls with the key by a slope of each head, as ALiBi's does: base ** -(head + lowest)."""

    def bias(scores: Tensor) -> Tensor:
        heads = torch.arange(lowest, lowest + scores.shape[1], device=scores.device)
        return torch.arange(-KEYS, 0)[None, None, None] * (1 / torch.pow(base, heads.float()))[None, :, None, None]

    return bias


class Padded(nn.Module):
    """Attention under padding, which replaces the scores and the bias that they hold."""

    def __init__(self, bias: Callable[..., Tensor]) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
        scores = q @ k.mT
        hidden = attention_mask[:, None, None] == 0
        return (scores + self.bias(scores)).masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1) @ v


@pytest.mark.parametrize(
    ("base", "lowest", "is_bounded"),
    [(2.0, 1, True), (2.0, -20, False), (0.5, 20, False), (-2.0, 1, False)],
    ids=["slopes below 1", "slopes of a million", "a base below 1", "a base below 0"],
)
def test_a_bias_of_powers_is_bounded(base: float, lowest: int, is_bounded: bool) -> None:
    torch.manual_seed(0)
    qkv, model = torch.randn(3, 2, 2, KEYS, 4).mul(3).unbind(0), Padded(slopes(base, lowest))
    mask = torch.ones(2, KEYS, dtype=torch.int64)
    rewritten = rewrite(model, (*qkv, mask), config=ALWAYS)
    assert len(rewritten.report.replaced) == is_bounded, str(rewritten.report)
    mask[0, :3], mask[1] = 0, 0
    assert relative_error(rewritten(*qkv, mask), model(*qkv, mask)) < 2e-5


ROUNDED: dict[str, tuple[Callable[[Tensor], Tensor], Range | None]] = {
    "floor": (lambda x: (x * -2.5).floor(), Range(-3.0, 0.0)),
    "ceil": (lambda x: (x * 2.5).ceil(), Range(0.0, 3.0)),
    "round": (lambda x: (x * 2.5).round(), Range(0.0, 3.0)),
    "round to decimals": (lambda x: (x * 2.5).round(decimals=-1), UNBOUNDED),
    "softplus": (lambda x: F.softplus(x * 2.5), Range(0.0, 3.5)),
    "a small beta": (lambda x: F.softplus(x, beta=1e-4), Range(0.0, math.inf)),
    "a negative beta": (lambda x: F.softplus(x, beta=-1.0), UNBOUNDED),
    "sorted": (lambda x: (x * 2.5).sort().values, Range(0.0, 2.5)),
    "places after a sort": (lambda x: (x * 2.5).sort().indices.float() * -1e4, None),
    "two low limits": (lambda x: F.hardtanh(x, -2e9, -1e9), Range(-1e9, -1e9)),
    "a small number in 16 bits": (lambda x: (x.half() + 1e-9).log(), UNBOUNDED),
    "one that 16 bits hold": (lambda x: (x.half() + 1.0).log(), Range(0.0, math.log(2.0))),
    "an integer of a float": (lambda x: x.sigmoid().to(torch.int64), None),
    "an integer of a bool": (lambda x: x.bool().to(torch.int64), Range(0.0, 1.0)),
    "a product of two bounded tensors": (lambda x: (x[:, None] * x) @ x[:, None], Range(-8.0, 8.0)),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_bounds_behind_an_operator(name: str) -> None:
    """Of a tensor that holds numbers from 0 to 1."""
    function, bounds = ROUNDED[name]
    graph = capture(Function(lambda bits: function(bits.float())), (torch.ones(KEYS, dtype=torch.bool),)).module.graph
    (result,) = graph.output_node().all_input_nodes
    found = Ranges(frozenset()).of(result)
    if bounds is None:  # places are as large as the integers of their dtype
        assert found.lowest < -1e9
    else:
        assert found == bounds


class Learned(nn.Module):
    """A function of two inputs and a parameter."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.ones(KEYS, KEYS))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.function(x, y, self.weight)


OF_INPUTS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "two inputs": (lambda x, y, w: x @ y, False),
    "two inputs by einsum": (lambda x, y, w: torch.einsum("ij,kj->ijk", x, y), False),
    "two inputs of integers": (lambda x, y, w: (x.long() @ y.long()).float(), False),
    "two inputs, and a learned tensor added": (lambda x, y, w: torch.addmm(w, x, y), False),
    "an input as a weight": (lambda x, y, w: F.linear(x, y, w[0]), False),
    "an input and a learned tensor": (lambda x, y, w: x @ w, True),
    "the same, and an input added": (lambda x, y, w: torch.addmm(y, x, w), False),
    "the same, with a low literal": (lambda x, y, w: x @ w * -1e5, False),
    "the same, and a normalised input added": (lambda x, y, w: torch.addmm(F.layer_norm(y, (KEYS,)), x, w), True),
    "divided by its root mean square": (lambda x, y, w: (x @ w) * ((x @ w).square().mean(-1, True) + 1).rsqrt(), True),
    "an input divided by a learned root": (lambda x, y, w: x * ((x @ w).square() + 1).rsqrt(), False),
    "a normalised input": (lambda x, y, w: F.layer_norm(x, (KEYS,), w[0]), True),
    "a normalised input times an input": (lambda x, y, w: F.layer_norm(x, (KEYS,), y[0]), False),
}


@pytest.mark.parametrize("name", OF_INPUTS)
def test_a_product_is_bounded_only_if_an_operand_is_learned(name: str) -> None:
    """Two inputs may be two masks."""
    function, is_bounded = OF_INPUTS[name]
    graph = capture(Learned(function), (torch.ones(KEYS, KEYS), torch.ones(KEYS, KEYS))).module.graph
    (result,) = graph.output_node().all_input_nodes
    assert (Ranges(frozenset()).of(result).lowest > -10.0) == is_bounded
