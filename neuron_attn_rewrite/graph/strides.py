"""Copies of a tensor with other strides, by plain operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

aten = torch.ops.aten


def memory_order(value: torch.Tensor) -> list[int] | None:
    """The dims from the slowest to the fastest in memory; None if the elements are not dense, or a size is a symbol."""
    if not all(isinstance(n, int) for n in (*value.shape, *value.stride())):
        return list(range(value.dim())) if value.is_contiguous() else None
    order = sorted(range(value.dim()), key=lambda d: (-value.stride()[d], value.shape[d] == 1))
    return order if value.permute(order).is_contiguous() else None


def with_strides(node: fx.Node, like: torch.Tensor, call: Callable[..., fx.Node]) -> fx.Node | None:
    """The node's tensor in the memory order of `like`. None if that can't be said.

    Args:
        node: a tensor of the shape of `like`.
        like: the fake tensor whose strides are wanted.
        call: makes a node of the graph from an operator and its arguments.
    """
    order = memory_order(like)
    if order is None:
        return None
    if same_strides(node.meta["val"], like):
        return node
    back = sorted(range(len(order)), key=order.__getitem__)
    moved = call(aten.permute.default, node, order)
    return call(aten.permute.default, call(aten.contiguous.default, moved), back)


def same_strides(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether the elements certainly lie alike. The stride of a dim of one element does not matter."""
    pairs = zip(one.shape, one.stride(), two.stride(), strict=True)
    return all(_is_certain(n == 1) or _is_certain(mine == its) for n, mine, its in pairs)


def _is_certain(fact: bool | torch.SymBool) -> bool:
    """Sizes that are symbols are not asked for their values: those that depend on data have none."""
    if isinstance(fact, bool):
        return fact
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy, which takes 0.2 s

    return statically_known_true(fact)
