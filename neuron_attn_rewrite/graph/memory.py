"""Which nodes of an ATen graph share memory, decided by the storages of one run on fake tensors."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.graph.nodes import attribute, fake_mode, mutates, op_name

UNTRACED = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
"""Operators whose result has sizes that only a run on real values gives."""


@dataclass(frozen=True)
class Memory:
    """Where each node's result lies. A schema does not tell: `reshape`, `to` or `dropout` may return a view or not."""

    storages: dict[fx.Node, frozenset[int]] = field(default_factory=dict)
    """The storages of a node's tensors, several for a list of tensors. No entry for a node without tensors."""
    objects: dict[fx.Node, int] = field(default_factory=dict)
    """The tensor object of a node. Two nodes have the same one if an operator returned its very argument."""
    values: dict[fx.Node, Any] = field(default_factory=dict)
    """The fake tensors of the run. Other nodes may have changed their sizes since."""

    def of(self, node: fx.Node) -> frozenset[int]:
        return self.storages.get(node, frozenset())

    def is_view(self, node: fx.Node) -> bool:
        """Whether the node is its first argument, or a view of it, and writes nothing."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or mutates(node) or not self.of(node):
            return False
        return self.of(node) <= self.of(source)


def memory(graph: fx.Graph) -> Memory:
    """Run the graph on fresh fake tensors. Each input has a storage of its own, and attributes share those they share.

    A node that does not run on fake tensors has new memory, or that of its first argument if its schema says so.
    """
    found = Memory()
    shapes = fake_mode(graph).shape_env
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes)
    same: dict[int, int] = {}
    held: dict[int, int] = {}
    """For each storage of an attribute the first one of the run."""
    with mode, torch.no_grad(), contextlib.ExitStack() as without:
        if shapes:  # torch 2.9 makes a symbol a number where an operator of the run asks for its value
            without.enter_context(shapes.suppress_guards())
            without.enter_context(shapes.ignore_fresh_unbacked_symbols())
        for node in graph.nodes:
            if node.op == "output":
                continue
            value, ran = _unrun(node, mode), False
            if node.op == "call_function" and _runs(node):
                try:
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), found.values.__getitem__)
                    value, ran = node.target(*args, **kwargs), True
                except Exception:  # an operator without a fake form, or sizes that depend on data
                    pass
            found.values[node] = value
            tensors = list(_tensors(value))
            if not tensors:
                continue
            ids = [t.untyped_storage()._cdata for t in tensors]
            if node.op == "get_attr" and type(attribute(node)) in (torch.Tensor, torch.nn.Parameter):
                same[ids[0]] = held.setdefault(attribute(node).untyped_storage()._cdata, ids[0])
            source = node.args[0] if node.args else None
            if not ran and isinstance(source, fx.Node) and _may_alias(node):
                same |= dict.fromkeys(ids, min(found.of(source), default=ids[0]))
            found.storages[node] = frozenset(same.get(i, i) for i in ids)
            if isinstance(value, torch.Tensor):
                found.objects[node] = id(value)
    for node, moved in [(n, n.args[0]) for n in found.objects if op_name(n) == "set_"]:  # it shows other memory now
        both = found.of(node) | found.of(moved)  # type: ignore[arg-type]
        found.storages.update((n, both) for n, value in found.objects.items() if value == found.objects[node])
    return found


def _runs(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return not any(tag in node.target.tags for tag in UNTRACED)
    return node.target in (operator.getitem, getattr)


def _may_alias(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.arguments:
        return False
    return node.target._schema.arguments[0].alias_info is not None


def _unrun(node: fx.Node, mode: FakeTensorMode) -> Any:
    """The node's value in memory of its own, as the graph records it."""
    if node.op == "get_attr":
        held = attribute(node)
        return mode.from_tensor(held, static_shapes=True) if isinstance(held, torch.Tensor) else held
    recorded = node.meta.get("val")
    return pytree.tree_map(lambda v: _fresh(v) if isinstance(v, torch.Tensor) else v, recorded)


def _fresh(value: torch.Tensor) -> torch.Tensor:
    if value.layout != torch.strided:
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _tensors(value: Any) -> Iterator[FakeTensor]:
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))  # type: ignore[misc]
