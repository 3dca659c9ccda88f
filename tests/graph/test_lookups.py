"""The code of a graph looks up each operator and each module once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

from neuron_attn_rewrite import RewriteConfig, RewrittenModule, rewrite
from neuron_attn_rewrite.graph.lookups import share_lookups, shared


class Model(nn.Module):
    """Weights at the top, in a numbered layer, and twice in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4))
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) * self.gain
        return x


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def rewritten(model: Model) -> RewrittenModule:
    return rewrite(model, (torch.randn(2, 4),), config=RewriteConfig(strict=True))


def test_each_is_looked_up_once(rewritten: RewrittenModule, model: Model) -> None:
    code = rewritten.code
    assert code.count(".layers") == 1 and code.count('"1"') == 2 and code.count("self.gain") == 1
    assert code.count("torch.ops.aten.linear.default") == 1 and code.count("found_aten_linear_default(") == 2
    x = torch.randn(2, 4)
    assert torch.equal(rewritten(x), model(x))


def test_a_line_that_reads_something_else_stays() -> None:
    lines = [
        "size = x.shape\n",
        'device = getattr(x, "device")',
        "itself = selfish.weight",
        'total = torch.add(self, "a")',
        "called = self.layer(x)",
        "\n",
    ]
    assert shared(lines) == lines


def test_a_module_of_a_number_and_a_weight_of_a_number() -> None:
    lines = ['a = getattr(self.layers, "0").weight', 'b = getattr(getattr(self.layers, "0").parts, "1")']
    namespace: dict[str, object] = {}
    exec(
        "def read(self):\n    " + "\n    ".join(line.rstrip("\n") for line in [*shared(lines), "return a, b"]),
        namespace,
    )
    read: object = namespace["read"]
    owner = nn.Module()
    owner.layers = nn.ModuleList([nn.Module()])
    owner.layers[0].weight = torch.randn(2)
    owner.layers[0].parts = nn.ParameterList([torch.randn(1), torch.randn(1)])
    first, second = read(owner)  # type: ignore[operator]
    assert first is owner.layers[0].weight and second is owner.layers[0].parts[1]


def test_a_new_module_or_weight_is_read(rewritten: RewrittenModule, model: Model) -> None:
    """Nothing is remembered from one call to the next."""
    x = torch.randn(2, 4)
    rewritten(x)
    other = copy.deepcopy(model.layers[0])
    with torch.no_grad():
        other.weight.mul_(-3)
    model.layers[0] = other
    setattr(rewritten.layers, "0", copy.deepcopy(other))
    assert torch.equal(rewritten(x), model(x))


def test_a_copy_has_it_too(rewritten: RewrittenModule) -> None:
    copied = copy.deepcopy(rewritten)
    copied.recompile()
    assert copied.code == rewritten.code
    x = torch.randn(2, 4)
    assert torch.equal(copied(x), rewritten(x))


def test_a_graph_of_another_code_keeps_it(rewritten: RewrittenModule) -> None:
    graph = fx.symbolic_trace(nn.Linear(2, 2)).graph
    graph.on_generate_code(lambda _: lambda body: ["# mine\n", *body])
    share_lookups(graph)
    assert "# mine" in graph.python_code("self").src
