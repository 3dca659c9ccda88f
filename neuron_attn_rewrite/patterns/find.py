"""Finds every attention of a graph, in the order of the graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from neuron_attn_rewrite.graph.nodes import module_path, op_name
from neuron_attn_rewrite.patterns.leftovers import leftover
from neuron_attn_rewrite.patterns.peel import Walk
from neuron_attn_rewrite.patterns.pieces import find_pieces
from neuron_attn_rewrite.patterns.rules import Blocked
from neuron_attn_rewrite.patterns.sdpa import find_sdpa, is_sdpa
from neuron_attn_rewrite.patterns.site import AttentionSite, UnknownAttention
from neuron_attn_rewrite.patterns.softmax_matmul import between, find_softmax_matmul, unknown_softmax
from neuron_attn_rewrite.patterns.softmaxes import as_softmax
from neuron_attn_rewrite.reasons import internal_error
from neuron_attn_rewrite.values.evaluator import Evaluator


def find(module: fx.GraphModule, evaluator: Evaluator, strict: bool = True) -> list[AttentionSite | UnknownAttention]:
    """The attentions of a graph. Nothing that the graph computes is changed: only unused nodes are added (drafts).

    Args:
        module: a normalised graph.
        evaluator: of the graph.
        strict: whether an internal error at one node is raised. Otherwise the node is an `UnknownAttention`.
    """
    found: list[AttentionSite | UnknownAttention] = []
    covered: set[fx.Node] = set()
    in_pieces: dict[fx.Node, list[AttentionSite | UnknownAttention]] = {}
    for site, inside in find_pieces(Walk(evaluator), module.graph):
        in_pieces.setdefault(site.anchor, []).append(site)
        covered |= inside
    for node in reversed(list(module.graph.nodes)):
        found += reversed(in_pieces.get(node, []))
        try:
            found += reversed(_found_at(node, evaluator, covered))
        except Exception as error:
            reason = internal_error(error, strict)
            found.append(UnknownAttention(module_path(node), op_name(node), node, reason))
        found += leftover(node, covered)
    return found[::-1]


def _found_at(node: fx.Node, evaluator: Evaluator, covered: set[fx.Node]) -> Sequence[AttentionSite | UnknownAttention]:
    """The attentions whose operator or softmax is this node. The nodes of that softmax are added to `covered`."""
    if is_sdpa(node):
        return [find_sdpa(node, evaluator)]
    walk = Walk(evaluator)
    try:
        scores = None if node in covered else as_softmax(walk, node)
    except Blocked as blocked:
        return list(unknown_softmax(node, blocked.reason))
    if scores is None:
        return []
    covered |= between([scores.node], [node])
    return find_softmax_matmul(node, scores, walk)
