"""Finds every attention of a graph, in the order of the graph."""

from __future__ import annotations

from torch import fx

from neuron_attn_rewrite.patterns.peel import Walk
from neuron_attn_rewrite.patterns.rules import Blocked
from neuron_attn_rewrite.patterns.sdpa import find_sdpa, is_sdpa
from neuron_attn_rewrite.patterns.site import AttentionSite, UnknownAttention
from neuron_attn_rewrite.patterns.softmax_matmul import between, find_softmax_matmul, unknown_softmax
from neuron_attn_rewrite.patterns.softmaxes import as_softmax
from neuron_attn_rewrite.values.evaluator import Evaluator


def find(module: fx.GraphModule, evaluator: Evaluator) -> list[AttentionSite | UnknownAttention]:
    """The attentions of a graph. The graph is not changed."""
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    found: list[AttentionSite | UnknownAttention] = []
    covered: set[fx.Node] = set()
    for node in reversed(order):
        if is_sdpa(node):
            found.append(find_sdpa(node, evaluator))
            continue
        walk = Walk(evaluator)
        try:
            scores = None if node in covered else as_softmax(walk, node)
        except Blocked as blocked:
            found += unknown_softmax(node, blocked.reason)
            continue
        if scores is not None:
            covered |= between(scores.node, [node], order)
            found += reversed(find_softmax_matmul(node, scores, walk, order))
    return found[::-1]
