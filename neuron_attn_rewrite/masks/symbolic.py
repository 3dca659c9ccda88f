"""Evaluates one element of a tensor at symbolic indices: the proof that holds for every size and every input.

We ask for the element of a mask at (batch, head, query, key), where the four indices are symbols, and walk back from
the mask to its inputs. A view changes the indices, and an `arange` is its index (`masks/movement.py`). A comparison
splits the value into cases (`masks/elementwise.py`). A stored constant has a formula (`masks/stored.py`). For

    positions = torch.arange(n)
    mask = (positions[None, :] <= positions[:, None]) & attention_mask[:, None, None, :].bool()

the walk finds that element [b, h, i, j] is True where `i - j >= 0` and `attention_mask[b, j]` is not 0, and False
elsewhere. No tensor is computed, so the length costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from neuron_attn_rewrite.graph.nodes import draws, dtype, is_tensor, op_name
from neuron_attn_rewrite.masks.affine import Element, variable
from neuron_attn_rewrite.masks.cases import INDICES, INTEGERS, MOST_CASES, At, Case, Cases, Elements, Unknown, truth
from neuron_attn_rewrite.masks.elementwise import COMPARISONS, elementwise
from neuron_attn_rewrite.masks.movement import MOVEMENTS
from neuron_attn_rewrite.masks.stored import stored
from neuron_attn_rewrite.values.cells import ELEMENTWISE

RULES: dict[str, Callable[[Elements, fx.Node, At], Cases]] = {
    **dict.fromkeys((*ELEMENTWISE, *COMPARISONS), elementwise),
    **MOVEMENTS,
}
"""The rule of each operator: one element of its result."""


@dataclass
class SymbolicEvaluator(Elements):
    """Elements of the tensors of one graph at symbolic indices. Each is computed once."""

    changed: frozenset[fx.Node] = field(kw_only=True)
    """Tensors that some node writes into (`graph.writes.Writes.changed`): their elements are unknown."""
    names_numbers: bool = False
    """Whether an integer without a rule becomes an `Element`, which is known at run time. A bool becomes a `Truth`."""
    _known: dict[tuple[fx.Node, At], tuple[Cases | Unknown, frozenset[fx.Node]]] = field(default_factory=dict)

    def cases(self, node: fx.Node, at: At) -> Cases:
        key = node, at
        if key not in self._known:
            before, self.assumed = self.assumed, set()
            try:
                found: Cases | Unknown = self._element(node, at)
            except Unknown as unknown:
                found = unknown
            self._known[key], self.assumed = (found, frozenset(self.assumed)), before
        found, assumed = self._known[key]
        self.assumed |= assumed
        if isinstance(found, Unknown):
            raise found
        return found

    def _element(self, node: fx.Node, at: At) -> Cases:
        """By the rule of its operator. Without a rule, a bool (and an integer, if asked) is a variable of its own."""
        try:
            cases = self._by_rule(node, at)
        except Unknown:
            is_named = dtype(node) == torch.bool or (self.names_numbers and dtype(node) in INDICES)
            if not is_named or node in self.changed:
                raise
            self.assumed.clear()
            return truth(node, at) if dtype(node) == torch.bool else (Case(frozenset(), variable(Element(node, at))),)
        if len(cases) > MOST_CASES:
            raise Unknown(f"{node.name} has too many cases")
        return cases

    def _by_rule(self, node: fx.Node, at: At) -> Cases:
        name = op_name(node)
        if node in self.changed:
            raise Unknown(f"the model writes into {node.name}")
        if draws(node):
            raise Unknown(f"{node.name} is random")
        if node.op == "placeholder":
            if dtype(node) in INTEGERS and dtype(node) != torch.bool:
                return (Case(frozenset(), variable(Element(node, at))),)
            raise Unknown(f"{node.name} is an input")
        if node.op == "get_attr":
            return stored(self.module, node, at)
        if not is_tensor(node):
            raise Unknown(f"{node.name} is not a tensor")
        if name not in RULES:
            raise Unknown(f"there is no rule for {node.name}")
        return RULES[name](self, node, at)
