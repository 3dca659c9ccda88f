"""Which tensors of an ATen graph change in place, and when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.graph.memory import Memory, memory
from neuron_attn_rewrite.graph.nodes import WRITTEN, arguments, attribute, mutates, op_name

HIDDEN_WRITES = {
    "batch_norm": ("training", "running_mean", "running_var"),
    "instance_norm": ("use_input_stats", "running_mean", "running_var"),
}
"""Operators that write into arguments if their first-named option is on, although their schema does not say so."""


@dataclass
class Writes:
    """Which tensors of a graph are written into, and when."""

    graph: fx.Graph
    memory: Memory = field(init=False)
    """Empty if the graph has no write."""
    _order: dict[fx.Node, int] = field(default_factory=dict)
    _times: dict[int, list[int]] = field(default_factory=dict)
    """When each storage is written."""
    _writers: dict[int, fx.Node] = field(default_factory=dict)
    """The node that writes at a time."""

    def __post_init__(self) -> None:
        writes = {node: targets for node in self.graph.nodes if (targets := list(written(node)))}
        self.memory = memory(self.graph) if writes else Memory()
        for time, node in enumerate(self.graph.nodes):
            self._order[node] = time
            for target in writes.get(node, ()):
                self._writers[time] = node
                for storage in self.memory.of(target):
                    self._times.setdefault(storage, []).append(time)

    @cached_property
    def changed(self) -> frozenset[fx.Node]:
        """Every tensor whose memory is written, before or after the tensor is computed."""
        return frozenset(n for n, storages in self.memory.storages.items() if not storages.isdisjoint(self._times))

    def mark(self) -> None:
        """Give each changed tensor an `op_name` of its own, so that no rule steps from it to what it was made of.

        A view keeps its name: what it shows changes together with what it is a view of, and that one is marked.
        """
        for node in self.graph.nodes:
            node.meta.pop(WRITTEN, None)
            if node in self.changed and node.op == "call_function" and not self.memory.is_view(node):
                node.meta[WRITTEN] = True

    @property
    def into_intermediates(self) -> bool:
        """Whether a tensor that the graph itself makes is written, so that its strides decide what a write reaches."""
        given = (n for n in self.graph.nodes if n.op in ("placeholder", "get_attr"))
        return not set(self._times) <= {storage for node in given for storage in self.memory.of(node)}

    def between(self, node: fx.Node, reader: fx.Node, end: fx.Node) -> bool:
        """Whether the memory of `node` is written after the reader has read it, and before `end`."""
        if self.memory.is_view(reader):
            return False  # a view reads nothing
        times = [time for storage in self.memory.of(node) for time in self._times.get(storage, ())]
        return any(self._order[reader] < time < self._order[end] for time in times)

    def last(self, node: fx.Node, end: fx.Node) -> fx.Node | None:
        """The last write into the memory of `node` before `end`. None if there is none."""
        times = [time for storage in self.memory.of(node) for time in self._times.get(storage, ())]
        before = [time for time in times if time < self._order[end]]
        return self._writers[max(before)] if before else None


def written(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments that a call writes into."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    hidden = HIDDEN_WRITES.get(op_name(node))
    if hidden is None and not mutates(node):
        return
    values = arguments(node)
    names = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    names += hidden[1:] if hidden and values[hidden[0]] is not False else ()
    yield from (n for name in names for n in pytree.tree_leaves(values[name]) if isinstance(n, fx.Node))


def changed_in_place(graph: fx.Graph) -> frozenset[fx.Node]:
    """Tensors that some call writes into, with everything that may share memory with them."""
    return Writes(graph).changed


@contextmanager
def buffers_restored(module: fx.GraphModule, changed: frozenset[fx.Node]) -> Iterator[None]:
    """Within the block the graph may run. Afterwards each of its buffers and parameters that is among `changed` has its
    old value."""
    tensors = {id(t): t.detach() for n in changed if n.op == "get_attr" and isinstance(t := attribute(n), torch.Tensor)}
    saved = [(tensor, tensor.clone()) for tensor in tensors.values()]
    try:
        yield
    finally:
        for tensor, value in saved:
            tensor.copy_(value)
