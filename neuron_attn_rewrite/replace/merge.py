"""Makes nodes that compute the same one node.

A model computes some things in each layer anew that are the same in all: masks, positions, indices into a cache. In a
step of generation such small operators take more time than their numbers are worth.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from neuron_attn_rewrite.graph.nodes import SWITCHES, draws, tensor
from neuron_attn_rewrite.graph.writes import changed_in_place, written

aten = torch.ops.aten
LARGEST = 2**20
"""Elements. To keep a larger result until its last reader may cost more memory than its operator costs time."""


def merge(graph: fx.Graph) -> None:
    """Remove each node that computes what an earlier one has computed, so that its readers read the earlier one.

    Tensors that are written, and what is made from them, stay as they are. What the graph gives stays a tensor of its
    own: the caller may write into it.
    """
    if any(node.target in SWITCHES for node in graph.nodes):
        return
    changed = changed_in_place(graph)
    given = {node for output in graph.find_nodes(op="output") for node in _given(output)}
    first: dict[tuple[Any, str], fx.Node] = {}
    for node in list(graph.nodes):
        is_apart = node in changed or node in given or not changed.isdisjoint(node.all_input_nodes)
        if is_apart or not _is_pure_and_small(node):
            continue
        same = first.setdefault((node.target, f"{node.args} {sorted(node.kwargs.items())}"), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _given(output: fx.Node) -> Iterator[fx.Node]:
    """Each tensor that the graph gives, and all with which it may share memory."""
    left, seen = list(output.all_input_nodes), set()
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            yield node
            left += [] if _makes_memory(node) else node.all_input_nodes


def _makes_memory(node: fx.Node) -> bool:
    """Whether the result surely is no view of an argument. The schema of an operator made of others does not say."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return False
    is_made_of_others = node.target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return not is_made_of_others and all(result.alias_info is None for result in node.target._schema.returns)


def _is_pure_and_small(node: fx.Node) -> bool:
    """Whether it is an operator whose result depends on its arguments alone, and is small."""
    if node.target in (getattr, aten.sym_size.int):
        return True
    value = tensor(node)
    if value is None or not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return False
    if draws(node) or next(written(node), None) is not None or not all(type(size) is int for size in value.shape):
        return False
    return value.numel() <= LARGEST
