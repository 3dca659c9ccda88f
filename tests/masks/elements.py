"""The cases of a tensor's elements at symbolic indices, against the tensor itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from neuron_attn_rewrite.masks.affine import Affine, Below, Element, Floor, Index, Truth, Variable, variable
from neuron_attn_rewrite.masks.cases import Case, Unknown
from neuron_attn_rewrite.masks.symbolic import SymbolicEvaluator
from tests.masks.test_soundness import graph_of


class Values(fx.Interpreter):
    """A graph with the value of each node, and of each symbolic index."""

    def __init__(self, module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}
        self.places: dict[Index, int] = {}
        with torch.no_grad():
            self.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]

    def sum(self, of: Affine) -> int:
        return of.constant + sum(self._variable(v) * c for v, c in of.terms)

    def _variable(self, of: Variable) -> int:
        if isinstance(of, Index):
            return self.places[of]
        if isinstance(of, Floor):
            return self.sum(of.of) // of.by
        assert isinstance(of, (Element, Truth, Below)), of
        at = of.row if isinstance(of, Below) else of.index
        found: Tensor = self.values[of.node][tuple(map(self.sum, at))]
        if isinstance(of, Below):
            return int((found < self.sum(of.number)).sum())
        return int(found != 0) if isinstance(of, Truth) else int(found)

    def of(self, cases: tuple[Case, ...]) -> list[float]:
        """The values of the cases that hold."""
        held = [case.value for case in cases if all(self.sum(g) >= 0 for g in case.guard)]
        return [self.sum(value) if isinstance(value, Affine) else value for value in held]


def assert_each_element(program: Callable[..., Tensor], draw: Callable[[], tuple[Tensor, ...]]) -> None:
    """Exactly one case holds at each index, for several inputs, and its value is the element."""
    module = graph_of(program, draw())
    (node,) = module.graph.output_node().all_input_nodes
    evaluator = SymbolicEvaluator(module, changed=frozenset())
    indices = [Index(axis, Affine(size)) for axis, size in enumerate(node.meta["val"].shape)]
    cases = evaluator.cases(node, tuple(map(variable, indices)))
    for _ in range(4):
        known = Values(module, draw())
        held = known.values[node]
        assert held.numel() and all(isinstance(c.value, float) == held.is_floating_point() for c in cases)
        for place in itertools.product(*map(range, held.shape)):
            known.places = dict(zip(indices, place, strict=True))
            assert known.of(cases) == [held[place].item()], (place, cases)


def assert_unknown(program: Callable[..., Tensor], draw: Callable[[], tuple[Tensor, ...]], words: str) -> None:
    module = graph_of(program, draw())
    (node,) = module.graph.output_node().all_input_nodes
    evaluator = SymbolicEvaluator(module, changed=frozenset())
    sizes = [size if isinstance(size, int) else 1 for size in node.meta["val"].shape]
    at = tuple(variable(Index(axis, Affine(size))) for axis, size in enumerate(sizes))
    with pytest.raises(Unknown, match=words):
        evaluator.cases(node, at)
