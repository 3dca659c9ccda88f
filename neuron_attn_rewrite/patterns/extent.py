"""Which nodes of the graph compute an attention: those between its operands and its output."""

from __future__ import annotations

from torch import fx

from neuron_attn_rewrite.graph.drafts import without_drafts
from neuron_attn_rewrite.patterns.site import AttentionSite


def borders(site: AttentionSite) -> set[fx.Node]:
    """The tensors that the attention starts from. Its output is a function of them and of constants."""
    return without_drafts({o.node for o in site.operands} | {term.node for term in site.terms})


def inside(site: AttentionSite) -> tuple[list[fx.Node], set[fx.Node]]:
    """The nodes between the borders and the output, in the order of the graph, and the nodes outside that they read."""
    edge = borders(site)
    reached, stack, read = {site.output}, [site.output], set()
    while stack:
        for node in stack.pop().all_input_nodes:
            if node in edge or node.op != "call_function":
                read.add(node)
            elif node not in reached:
                reached.add(node)
                stack.append(node)
    return [node for node in site.output.graph.nodes if node in reached], read
