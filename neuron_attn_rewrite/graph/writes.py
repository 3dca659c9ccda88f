"""Which tensors of an ATen graph change in place, and when."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.graph.nodes import arguments, mutates, op_name

HIDDEN_WRITES = {"batch_norm": ("running_mean", "running_var"), "instance_norm": ("running_mean", "running_var")}
"""Operators that write into arguments, in training, although their schema does not say so."""
MAY_COPY = {"reshape", "contiguous", "flatten", "to"}
"""Operators that return a view if they can and a copy otherwise. Their schemas do not tell which."""


@dataclass
class Writes:
    """Which tensors of a graph are written into, and when."""

    graph: fx.Graph
    _order: dict[fx.Node, int] = field(default_factory=dict)
    _owner: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """For a view, or the result of a write: the tensor whose memory it shares."""
    _times: dict[fx.Node, list[int]] = field(default_factory=dict)
    """When each owner is written."""

    def __post_init__(self) -> None:
        for time, node in enumerate(self.graph.nodes):
            self._order[node] = time
            if node.target is operator.getitem and node.args[0] in self._owner:
                self._owner[node] = self._owner[node.args[0]]
            if not isinstance(node.target, torch._ops.OpOverload):
                continue
            if op_name(node) in HIDDEN_WRITES:
                values = arguments(node)
                for name in HIDDEN_WRITES[op_name(node)]:
                    self._write(values[name], time)
            values = arguments(node)
            for argument in node.target._schema.arguments:
                if argument.alias_info is None:
                    continue
                for given in pytree.tree_leaves(values[argument.name]):
                    if isinstance(given, fx.Node):
                        self._owner[node] = self._owner.get(given, given)
                    if argument.alias_info.is_write:
                        self._write(given, time)

    def _write(self, given: Any, time: int) -> None:
        if isinstance(given, fx.Node):
            self._times.setdefault(self._owner.get(given, given), []).append(time)

    @cached_property
    def changed(self) -> frozenset[fx.Node]:
        """Every tensor whose memory is written, before or after the tensor is computed."""
        return frozenset(n for n in self.graph.nodes if self._times and self._owner.get(n, n) in self._times)

    def between(self, node: fx.Node, reader: fx.Node, end: fx.Node) -> bool:
        """Whether the memory of `node` is written after the reader has read it, and before `end`."""
        if reader in self._owner and op_name(reader) not in MAY_COPY and not mutates(reader):
            return False  # a view reads nothing
        times = self._times.get(self._owner.get(node, node), ())
        return any(self._order[reader] < time < self._order[end] for time in times)


def changed_in_place(graph: fx.Graph) -> frozenset[fx.Node]:
    """Tensors that some call writes into, with everything that may share memory with them."""
    return Writes(graph).changed
