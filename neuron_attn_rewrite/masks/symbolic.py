"""The value of one element of a tensor, for symbolic indices: a proof for every length and every input.

Asked for the element of a mask at (batch, head, query, key), the evaluator walks back: a view changes the index, an
arange is its index (`masks/movement.py`), a comparison splits the value into cases (`masks/elementwise.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from neuron_attn_rewrite.graph.nodes import draws, dtype, is_tensor, op_name
from neuron_attn_rewrite.masks.affine import Affine, Element, negated, variable
from neuron_attn_rewrite.masks.cases import (
    INDICES,
    INTEGERS,
    MOST_CASES,
    At,
    Case,
    Cases,
    Elements,
    Unknown,
    exact,
    truth,
)
from neuron_attn_rewrite.masks.elementwise import COMPARISONS, elementwise
from neuron_attn_rewrite.masks.fit import fit_rows, row_intervals
from neuron_attn_rewrite.masks.movement import MOVEMENTS
from neuron_attn_rewrite.masks.spec import Band
from neuron_attn_rewrite.values.tables import ELEMENTWISE

RULES: dict[str, Callable[[Elements, fx.Node, At], Cases]] = {
    **dict.fromkeys((*ELEMENTWISE, *COMPARISONS), elementwise),
    **MOVEMENTS,
}
"""What knows the element of an operator's result at an index."""


@dataclass
class SymbolicEvaluator(Elements):
    """Elements of the tensors of one graph at symbolic indices."""

    changed: frozenset[fx.Node] = field(kw_only=True)
    """What some node writes into: `graph.Writes.changed`."""
    names_numbers: bool = False
    """Whether an integer of which no rule says what it is stands for itself: a number that is known at run time."""
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
        try:
            cases = self._computed(node, at)
        except Unknown:
            named = dtype(node) == torch.bool or (self.names_numbers and dtype(node) in INDICES)
            if not named or node in self.changed:
                raise
            self.assumed.clear()
            return truth(node, at) if dtype(node) == torch.bool else (Case(frozenset(), variable(Element(node, at))),)
        if len(cases) > MOST_CASES:
            raise Unknown(f"{node.name} has too many cases")
        return cases

    def _computed(self, node: fx.Node, at: At) -> Cases:
        name = op_name(node)
        if node in self.changed or draws(node):
            raise Unknown(f"{node.name} changes")
        if node.op == "placeholder":
            if dtype(node) in INTEGERS and dtype(node) != torch.bool:
                return (Case(frozenset(), variable(Element(node, at))),)
            raise Unknown(f"{node.name} is an input")
        if node.op == "get_attr":
            return self._stored(node, at)
        if node.op != "call_function" or not is_tensor(node):
            raise Unknown(f"{node.name} is not a tensor of operators")
        if name not in RULES:
            raise Unknown(f"no rule knows {node.name}")
        return RULES[name](self, node, at)

    def _stored(self, node: fx.Node, at: At) -> Cases:
        """An element of a constant: one value, an arithmetic progression, or two values with a band between them."""
        path, _, name = str(node.target).rpartition(".")
        stored = getattr(self.module.get_submodule(path), name)
        if isinstance(stored, torch.nn.Parameter) or not isinstance(stored, Tensor):
            raise Unknown(f"{node.name} is a parameter")
        if stored.is_meta:
            raise Unknown(f"{node.name} has no values")
        if all(i.is_constant for i in at):
            return (Case(frozenset(), exact(stored[tuple(i.constant for i in at)])),)
        first = stored.reshape(-1)[:1]
        if stored.numel() and bool((stored == first).all()):
            return (Case(frozenset(), exact(first)),)
        wide = [d for d, size in enumerate(stored.shape) if size > 1]
        if len(wide) == 1 and stored.dtype in INTEGERS:
            line = stored.reshape(-1).to(torch.int64)
            step = int(line[1] - line[0])
            if bool((line.diff() == step).all()):
                return (Case(frozenset(), at[wide[0]] * step + int(line[0])),)
        if len(wide) == 2 and bool(((stored == first) | (stored == stored.max()) | (stored == stored.min())).all()):
            return self._banded(stored.reshape([stored.shape[d] for d in wide]), at[wide[0]], at[wide[1]])
        raise Unknown(f"{node.name} is a constant without a form")

    def _banded(self, stored: Tensor, i: Affine, j: Affine) -> Cases:
        for inside in (stored[0, 0], stored[-1, 0], stored[0, -1]):
            inner = stored == inside
            rows = row_intervals(inner)
            claims = () if rows is None else fit_rows(rows, stored.shape[1])
            if len(claims) == 1 and isinstance(claims[0], Band):
                outside = stored[~inner][0]
                if not bool((stored[~inner] == outside).all()):
                    continue
                within = _within(claims[0], i, j)
                out = [Case(frozenset([negated(g), *within[:n]]), exact(outside)) for n, g in enumerate(within)]
                return (Case(frozenset(within), exact(inside)), *out)
        raise Unknown("a constant that is not a band")


def _within(band: Band, i: Affine, j: Affine) -> list[Affine]:
    lower = [] if band.lower is None else [j - i - band.lower]
    upper = [] if band.upper is None else [i - j + band.upper]
    return lower + upper
