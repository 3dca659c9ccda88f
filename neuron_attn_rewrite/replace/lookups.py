"""Indices of the example inputs that no row of a table has: what the model's own error does not say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from neuron_attn_rewrite.replace.running import needed

aten = torch.ops.aten


def out_of_range(node: fx.Node, values: Mapping[fx.Node, Any], inputs: Mapping[fx.Node, Any]) -> str | None:
    """Which argument holds an index out of range, and what range is allowed. None if that is not why a node fails.

    Args:
        node: the node that raises an error.
        values: the values of its operands.
        inputs: the values of the placeholders.
    """
    for index, size, lowest in _lookups(node, values):
        value = values.get(index)
        if not isinstance(value, Tensor) or not value.numel() or value.dtype == torch.bool:
            continue
        wrong = value[(value < lowest) | (value >= size)]
        if not wrong.numel():
            continue
        sources = [n for n in inputs if n in needed([index], ())]
        words = " and ".join(f"{str(n.target)!r}" for n in sources) or "no argument"
        is_itself = len(sources) == 1 and bool(torch.as_tensor(inputs[sources[0]] == wrong[0]).any())
        what = f"argument {words} holds" if is_itself else f"an index that is computed from {words} is"
        return (
            f"{what} {int(wrong[0])}, and is looked up in {_table(node)}, which has {size} entries: only {lowest} to "
            f"{size - 1} are allowed there. Pass other example inputs."
        )
    return None


def _lookups(node: fx.Node, values: Mapping[fx.Node, Any]) -> Iterator[tuple[fx.Node, int, int]]:
    """Each index of a lookup, the number of entries, and the smallest index that is allowed."""
    args: Sequence[Any] = node.args
    table = values.get(args[0]) if args and isinstance(args[0], fx.Node) else None
    if not isinstance(table, Tensor):
        return
    if node.target is aten.embedding.default:
        yield args[1], table.shape[0], 0
    elif node.target in (aten.gather.default, aten.index_select.default):
        yield args[2], table.shape[args[1]], 0
    elif node.target is aten.index.Tensor:
        for dim, index in enumerate(args[1]):
            if isinstance(index, fx.Node):
                yield index, table.shape[dim], -table.shape[dim]


def _table(node: fx.Node) -> str:
    table = node.args[0]
    is_weight = isinstance(table, fx.Node) and table.op == "get_attr"
    return f"the table {str(table.target)!r}" if is_weight else f"{table}"  # type: ignore[union-attr]
