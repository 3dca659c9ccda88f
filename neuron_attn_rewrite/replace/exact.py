"""The model's own attention in float64, to tell a wrong kernel from a model that rounds.

A model that keeps its scores in half precision is further from its own formula than a kernel that keeps them in
float32. Such a difference is no error of the kernel: what counts is the distance to the formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from neuron_attn_rewrite.graph.nodes import op_name
from neuron_attn_rewrite.patterns.site import AttentionSite


def borders(site: AttentionSite) -> set[fx.Node]:
    """The tensors at which the attention begins: its value is a function of them and of constants."""
    return {o.node for o in site.operands} | {term.node for term in site.terms}


def inside(site: AttentionSite) -> tuple[list[fx.Node], set[fx.Node]]:
    """The nodes between the borders and the output, in order, and what they read from outside."""
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


def in_float64(nodes: Sequence[fx.Node], values: Mapping[fx.Node, Any], get: Callable[[fx.Node], Any]) -> Tensor | None:
    """Compute the last of the nodes with every real number in float64; None if some operator can't."""
    known: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        if node in known:
            return known[node]
        found = values[node] if node in values else get(node)
        return found.double() if isinstance(found, Tensor) and found.is_floating_point() else found

    for node in nodes:
        args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), lambda a: _widened(a, value))
        if op_name(node) in ("_softmax", "_log_softmax"):
            args = (*args[:2], False)
        try:
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # an operator without float64, or one that wants the dtypes it had
            return None
    result = known[nodes[-1]]
    return result if isinstance(result, Tensor) else None


def _widened(argument: Any, value: Callable[[fx.Node], Any]) -> Any:
    if isinstance(argument, fx.Node):
        return value(argument)
    wide = isinstance(argument, torch.dtype) and argument.is_floating_point
    return torch.float64 if wide else argument
