"""The model's own attention in float64, to distinguish a wrong kernel from rounding in the model.

A model with scores in half precision is further from its own formula than a kernel with scores in float32. Such a
difference is not an error of the kernel, so the kernel is compared with the formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from neuron_attn_rewrite.graph.nodes import op_name


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
