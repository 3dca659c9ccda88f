"""Nodes that are added to a graph while it is read: operands that a kernel call may read later.

Nothing reads a draft at first. Drafts that no kernel call reads are removed as unused nodes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from neuron_attn_rewrite.graph.nodes import fake_mode

DRAFT = "draft"
"""The key in `node.meta` of a draft."""


def draft(before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add a call of `target` right before a node, so that it reads what the graph holds at that time."""
    graph = before.graph
    with graph.inserting_before(before):
        node = graph.create_node("call_function", target, args, kwargs, name="joined")
    given, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    with fake_mode(graph):
        node.meta["val"] = target(*given, **named)
    node.meta[DRAFT] = True
    return node


def without_drafts(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes, and those that a draft among them is made of in place of that draft."""
    found: set[fx.Node] = set()
    for node in nodes:
        found |= without_drafts(node.all_input_nodes) if DRAFT in node.meta else {node}
    return found
