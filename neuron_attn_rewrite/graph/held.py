"""The tensors that a graph holds: parameters, buffers and constants, which its `get_attr` nodes read.

A claim that was made with the value of such a tensor is only right while the value stays. So each analysis reads values
with `read_value`, which marks the node, and `values_read` gives the names of all that were read.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from neuron_attn_rewrite.graph.nodes import attribute

IS_PARAMETER = "neuron_attn_rewrite.is_parameter"
"""The key in the metadata of an input that is a parameter of the model: torch.compile does not give its value."""
VALUE_READ = "neuron_attn_rewrite.value_read"
"""The key in the metadata of a `get_attr` node whose value an analysis has read."""


def read_value(node: fx.Node) -> Any:
    """What a `get_attr` node reads. The node is marked: results may depend on the value."""
    node.meta[VALUE_READ] = True
    return attribute(node)


def values_read(graph: fx.Graph) -> frozenset[str]:
    """The names of the parameters, buffers and constants whose values an analysis has read."""
    return frozenset(str(n.target) for n in graph.find_nodes(op="get_attr") if VALUE_READ in n.meta)
