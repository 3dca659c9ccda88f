"""One check for a rewritten module: graph, numbers on fresh inputs, and capture again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from neuron_attn_rewrite import RewriteConfig, RewrittenModule, rewrite
from neuron_attn_rewrite.config.options import TOLERANCES

ALWAYS = RewriteConfig(policy="always", strict=True)


class Function(nn.Module):
    """A plain function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def kernel_calls(module: RewrittenModule) -> list[torch.fx.Node]:
    ops = (torch.ops.neuron_attn.flash_fwd.default, torch.ops.neuron_attn.flash_prior.default)
    return [node for op in ops for node in module.graph.find_nodes(op="call_function", target=op)]


def relative_error(new: Tensor, old: Tensor) -> float:
    """The largest difference, relative to the largest magnitude in `old`."""
    largest = old.detach().double().abs().max().clamp_min(1e-30)
    return float((new.detach().double() - old.detach().double()).abs().max() / largest)


def check(
    model: nn.Module,
    inputs: Callable[[], tuple[Any, ...]],
    *,
    replaced: int,
    kept: int = 0,
    config: RewriteConfig = ALWAYS,
) -> RewrittenModule:
    """Rewrite with one set of inputs, compare with the model on fresh ones, and export the result again."""
    rewritten = rewrite(model, inputs(), config=config)
    report = rewritten.report
    assert (len(report.replaced), len(report.kept)) == (replaced, kept), str(report)
    assert len(kernel_calls(rewritten)) == replaced
    fresh = inputs()
    with torch.no_grad():
        old, new = model(*fresh), rewritten(*fresh)
    again = torch.export.export(rewritten, fresh, strict=False).module()
    with torch.no_grad():
        exported = again(*fresh)
    for a, b, c in zip(*map(pytree.tree_leaves, (old, new, exported)), strict=True):
        tolerance = TOLERANCES[a.dtype]
        assert a.shape == b.shape and a.dtype == b.dtype
        assert relative_error(b, a) <= tolerance, str(report)
        assert relative_error(c, b) <= tolerance
    return rewritten
