"""Replaces the attentions whose kernel calls were accepted, and removes the nodes that are not needed afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from neuron_attn_rewrite.graph.held import values_read
from neuron_attn_rewrite.graph.nodes import PERMUTES, eliminate_dead_code, op_name
from neuron_attn_rewrite.patterns.views import RESHAPES
from neuron_attn_rewrite.replace.graft import Graft
from neuron_attn_rewrite.replace.merge import merge

aten = torch.ops.aten


def commit(module: fx.GraphModule, accepted: Sequence[Graft]) -> frozenset[str]:
    """Replace the output of each accepted attention by its kernel call, and remove unused nodes.

    If any was accepted, nodes that compute the same become one. The module is not recompiled.

    Returns:
        The names of the buffers and parameters whose values the proofs depend on, such as masks and scales.
    """
    proven = values_read(module.graph) if accepted else frozenset()
    for g in accepted:
        for user in list(g.verdict.site.output.users):
            if user not in g.added:
                user.replace_input_with(g.verdict.site.output, g.result)
        _allow_any_strides(g.result)
    eliminate_dead_code(module.graph)
    if accepted:
        merge(module.graph)
    module.graph.lint()
    return proven


def _allow_any_strides(node: fx.Node) -> None:
    """Turn views of a replaced output into reshapes: a view relies on strides that the kernel call may not have."""
    for user in node.users:
        if user.target is aten.view.default:
            user.target = aten.reshape.default
        if op_name(user) in RESHAPES | PERMUTES:
            _allow_any_strides(user)
