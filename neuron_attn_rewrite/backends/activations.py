"""Activations that torch_neuronx replaces by its own kernels.

`import torch_neuronx` overrides functions of torch.nn.functional, such as silu. A captured graph calls ATen operators
instead, so the overrides would have no effect. The functions here call torch.nn.functional by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

aten = torch.ops.aten


def silu(x: Tensor) -> Tensor:
    return F.silu(x)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return F.softmax(x, dim, dtype=dtype)


def softmax_of_the_core_op(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return F.softmax(x, dim, dtype=torch.float32 if half_to_float else None)


RESTORED: Mapping[Any, Callable[..., Tensor]] = {
    aten.silu.default: silu,
    aten.gelu.default: gelu,
    aten.softmax.int: softmax,
    aten._softmax.default: softmax_of_the_core_op,
}


def restore_activations(module: fx.GraphModule) -> int:
    """Replace every such operator of a graph by the function that calls it by name. Returns their number."""
    nodes = [n for n in module.graph.nodes if n.op == "call_function" and n.target in RESTORED]
    for node in nodes:
        node.target = RESTORED[node.target]
    module.recompile()
    return len(nodes)
