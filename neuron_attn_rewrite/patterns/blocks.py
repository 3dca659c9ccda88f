"""Keys and values that a model gathers from the blocks of a cache: `cache[block_table]`, in any spelling.

The last dims of a block and the numbers of its blocks are dims of what is gathered. So the axis algebra says what the
cache and the table run over, once the dims of the gathered tensor are known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations

import torch
from torch import fx

from neuron_attn_rewrite.graph.nodes import PERMUTES, arguments, dtype, op_name, shape
from neuron_attn_rewrite.patterns import views
from neuron_attn_rewrite.patterns.axes import Dims, atoms, axis_dim, dim_size, layout_steps, split
from neuron_attn_rewrite.patterns.peel import made_alike
from neuron_attn_rewrite.patterns.site import AttentionSite, Operand
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.values.evaluator import Evaluator

BLOCK_AXIS = -1
"""The axis of the blocks of a cache. No axis of the scores has this number."""
ORDERS = tuple(f"{''.join(letters)}D" for letters in permutations("BHS"))
"""The orders of a cache that `flash_blocks` takes: blocks, heads, rows of a block in any order, then the features."""
SHARES = {"view", "unsqueeze", "squeeze", "alias"}
"""Operators that share the memory of their tensor."""


@dataclass(frozen=True)
class Gathered:
    """A tensor that was gathered, and what the dims of its sources run over."""

    node: fx.Node
    """The gathered tensor."""
    cache: fx.Node
    cache_dims: Dims
    """One of them runs over the blocks."""
    table: fx.Node
    """Int, the numbers of blocks."""
    table_dims: Dims
    blocks: int
    """How many the cache has."""
    wraps: bool
    """Whether negative numbers count from the end."""

    @property
    def form(self) -> tuple[Dims, int, bool]:
        """What says which block is where, besides the table."""
        return self.table_dims, self.blocks, self.wraps


@dataclass(frozen=True)
class InBlocks:
    """Key and value of an attention as blocks of caches."""

    gathered: tuple[Gathered, Gathered]
    table: Operand
    """To [batch, blocks of an element]."""
    key: Operand
    """To [blocks, num_kv_heads, block_size, head_dim], in the `order`."""
    value: Operand
    """To [blocks, num_kv_heads, block_size, v_head_dim], in the `order`."""
    order: str
    """One of `ORDERS`."""
    block_size: int


def gathered(node: fx.Node, dims: Dims) -> Gathered | None:
    """The sources of a tensor that is gathered by numbers of blocks, given what its dims run over; else None."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    name, given = op_name(node), arguments(node)
    if name == "index":
        used = [(i, index) for i, index in enumerate(given["indices"]) if index is not None]
        if len(used) != 1:
            return None
        ((at, table),) = used
    elif name in ("index_select", "gather"):
        at, table = given["dim"] % len(dims), given["index"]
    elif name == "embedding":
        at, table = 0, given["indices"]
    else:
        return None
    cache = given["weight" if name == "embedding" else "self"]
    if not isinstance(table, fx.Node) or not isinstance(cache, fx.Node) or dtype(table) not in views.INDICES:
        return None
    count = 1 if name == "gather" else len(shape(table))
    table_dims = dims[at : at + count]
    if name == "gather":
        # Each row of the cache is taken as a whole if the numbers are the same along all of its other dims.
        others = [i for i in range(len(dims)) if i != at]
        table_dims = dims
        if any(shape(table)[i] != shape(cache)[i] for i in others):
            return None
    table, table_dims = _numbers(table, table_dims)
    if name == "gather" and set(atoms(table_dims)) - set(dims[at]):
        return None
    blocks = shape(cache)[at]
    cache_dims = (*dims[:at], axis_dim(BLOCK_AXIS, blocks), *dims[at + count :])
    return Gathered(node, cache, cache_dims, table, table_dims, blocks, name == "index")


def _numbers(table: fx.Node, dims: Dims) -> tuple[fx.Node, Dims]:
    """The tensor that the numbers of blocks are read from, before views and casts to more bits."""
    while True:
        if op_name(table) in views.CASTS and {dtype(table), dtype(views.source(table))} <= set(views.INDICES):
            if dtype(table) != torch.int64:
                return table, dims
            table = views.source(table)
        elif (moved := views.before(table, dims)) is not None:
            table, dims = moved
        else:
            return table, dims


def in_blocks(site: AttentionSite, evaluator: Evaluator) -> InBlocks | Reason | None:
    """Key and value as blocks of caches; None if one is not gathered, or not by the table of the other.

    A reason if a kernel would need a transposed copy of a whole cache.
    """
    key, value = (_gathered_operand(operand, site.dtype, evaluator) for operand in (site.key, site.value))
    if key is None or value is None or key.form != value.form:
        return None
    if key.table is not value.table and not made_alike(evaluator, key.table, value.table):
        return None
    batch, heads, keys, _ = site.key.target
    axes = {atom.axis for atom in keys}
    size = dim_size(atom for atom in atoms(key.cache_dims) if atom.axis in axes)
    cut = split(keys, size) if dim_size(keys) % size == 0 else None
    if cut is None or layout_steps(key.table_dims, (batch, cut[0]), full=True) is None:
        return None
    named = {"B": axis_dim(BLOCK_AXIS, key.blocks), "H": heads, "S": cut[1]}
    for order in ORDERS:
        of_key, of_value = (
            Operand(one.cache, one.cache_dims, (*(named[letter] for letter in order[:3]), operand.target[3]))
            for one, operand in ((key, site.key), (value, site.value))
        )
        layouts = [layout_steps(operand.dims, operand.target, full=True) for operand in (of_key, of_value)]
        if all(layout is not None and all(step.op == "reshape" for step in layout) for layout in layouts):
            table = Operand(key.table, key.table_dims, (batch, cut[0]))
            return InBlocks((key, value), table, of_key, of_value, order, size)
    words = "a kernel reads a key of a head as one row, and they are no rows of both caches, in the same order"
    return Reason("cache-copied", words)


def _gathered_operand(operand: Operand, kind: torch.dtype, evaluator: Evaluator) -> Gathered | None:
    """The sources of an operand that is gathered, and that no cast follows."""
    node, dims = operand.origin or (operand.node, operand.dims)
    one = gathered(node, dims) if dtype(node) == dtype(operand.node) == kind else None
    while one is not None and (moved := _before(one.cache, one.cache_dims, evaluator)) is not None:
        one = replace(one, cache=moved[0], cache_dims=moved[1])
    return one


def _before(node: fx.Node, dims: Dims, evaluator: Evaluator) -> tuple[fx.Node, Dims] | None:
    """The tensor that a node has the elements of, in another order. If it changes, only one that shares its memory."""
    name = op_name(node)
    moved = views.before(node, dims) if name in views.RESHAPES | PERMUTES | views.IDENTITIES else None
    if moved is not None and moved[0] in evaluator.changed and name not in PERMUTES | SHARES:
        return None
    return moved
