"""Every attention of a graph, in the order of the graph."""

from __future__ import annotations

from torch import fx

from neuron_attn_rewrite.graph import op_name, tensor
from neuron_attn_rewrite.masks.tables import Evaluator
from neuron_attn_rewrite.patterns.sdpa import find_sdpa, is_sdpa
from neuron_attn_rewrite.patterns.site import AttentionSite, UnknownAttention
from neuron_attn_rewrite.patterns.softmax_matmul import SOFTMAXES, find_softmax_matmul


def find(module: fx.GraphModule, evaluator: Evaluator) -> list[AttentionSite | UnknownAttention]:
    """Read the graph, and change nothing."""
    found = []
    for node in module.graph.nodes:
        if is_sdpa(node):
            found.append(find_sdpa(node, evaluator))
        elif op_name(node) in SOFTMAXES and tensor(node) is not None:
            found.append(find_softmax_matmul(node, evaluator))
    return [site for site in found if site is not None]
