"""Tensors whose elements each depend on one 0/1 input: what they are for all inputs at once.

A *cell* is one element of a 0/1 tensor. A `CellTable` holds three tensors of one shape: each element's value if its
cell is 0 (`lo`), its value if its cell is 1 (`hi`), and the number of the cell. For `(1.0 - attention_mask) * -1e9`
with an `attention_mask` of three elements:

    lo    -1e9  -1e9  -1e9
    hi     0.0   0.0   0.0
    cell     0     1     2

Data movement is applied to all three tensors. An elementwise operator is run for each combination of the low and high
values of its operands; comparing the results shows on which operands an element depends. If it depends on two
different cells, its cell becomes `UNKNOWN`. So a table holds for every input: it is not a sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from neuron_attn_rewrite.values.exact import same

CONSTANT, UNKNOWN = -1, -2
"""Values of `CellTable.cell` that are not the number of a cell: the element depends on no cell, or on several."""

ELEMENTWISE = frozenset(
    """
    add sub rsub mul div neg abs pow exp log sqrt rsqrt sign reciprocal clamp clamp_min clamp_max minimum maximum
    floor_divide remainder eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or
    bitwise_not bitwise_xor __and__ __or__ __xor__ where masked_fill to _to_copy type_as nan_to_num isinf isnan copy
    div.trunc
    """.split()
)
MOVEMENT = frozenset(
    """
    view reshape _unsafe_view flatten unflatten unsqueeze squeeze expand expand_as broadcast_to permute transpose
    t mT movedim slice select narrow index index_select gather cat stack clone contiguous alias detach
    lift_fresh_copy flip roll repeat repeat_interleave constant_pad_nd diagonal tile
    """.split()
)


@dataclass(frozen=True)
class CellTable:
    """A tensor whose elements are functions of one cell each."""

    lo: Tensor
    """Each element where its cell is 0."""
    hi: Tensor
    """Each element where its cell is 1; the shape and dtype of `lo`."""
    cell: Tensor
    """Int32, broadcasts to `lo`: the cell of each element, `CONSTANT` for none, `UNKNOWN` for several.

    A bool element with several cells is False in `lo` and True in `hi`. A number with several cells can have other
    values than those in `lo` and `hi`.
    """

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """`lo`, `hi` and `cell`, of one shape."""
        return self.lo, self.hi, self.cell.expand(self.lo.shape)

    def move(self, apply: Any) -> CellTable:
        """The same data movement on all three tensors."""
        return CellTable(*map(apply, self.parts))


def is_table(value: Any) -> bool:
    return isinstance(value, CellTable)


def as_table(value: Any) -> CellTable:
    """A table as it is; a constant as a table that depends on no cell."""
    if isinstance(value, CellTable):
        return value
    value = torch.as_tensor(value)
    return CellTable(value, value, torch.tensor(CONSTANT, dtype=torch.int32))


def equal(one: CellTable, two: CellTable) -> bool:
    """Whether two tables that broadcast to each other have equal elements for all inputs."""
    return all(bool((a == b).all()) for a, b in zip(one.parts, two.parts, strict=True))


def elementwise(node: fx.Node, tables: Sequence[CellTable], args: Any, kwargs: Any) -> CellTable:
    """An elementwise operator on tables, which are found anywhere in its arguments.

    The operator runs once for every combination of low and high operands. An element depends on an operand if
    switching only this operand from low to high changes the result of some combination.
    """
    outcomes: dict[tuple[bool, ...], Tensor] = {}
    for choice in itertools.product((False, True), repeat=len(tables)):
        picked = {id(t): t.hi if high else t.lo for t, high in zip(tables, choice, strict=True)}
        picked_args, picked_kwargs = pytree.tree_map(
            lambda v, picked=picked: picked[id(v)] if isinstance(v, CellTable) else v, (args, kwargs), is_leaf=is_table
        )
        outcomes[choice] = node.target(*picked_args, **picked_kwargs)  # type: ignore[operator]
    lo, hi = outcomes[(False,) * len(tables)], outcomes[(True,) * len(tables)]
    if len(tables) == 1 and not (tables[0].cell == UNKNOWN).any():
        return CellTable(lo, hi, tables[0].cell)
    cell = torch.full(lo.shape, CONSTANT, dtype=torch.int32)
    for i, table in enumerate(tables):
        depends = torch.zeros(lo.shape, dtype=torch.bool)
        for choice, outcome in outcomes.items():
            if not choice[i]:
                depends |= ~same(outcome, outcomes[(*choice[:i], True, *choice[i + 1 :])])
        if table.lo.dtype != torch.bool:
            depends |= table.cell == UNKNOWN  # such a number may be neither lo nor hi
        clash = depends & (cell != CONSTANT) & (cell != table.cell)
        cell = torch.where(depends, table.cell, cell).masked_fill_(clash, UNKNOWN)
    unknown = cell == UNKNOWN
    if lo.dtype == torch.bool and unknown.any():
        lo, hi = lo & ~unknown, hi | unknown
    return CellTable(lo, hi, cell)


def movement(node: fx.Node, name: str, args: Any, kwargs: Any) -> CellTable | None:
    """An operator that moves elements, on the low values, the high values and the cells.

    None if what moves is not the first argument, if another argument is a table as well, or if the bits of the elements
    are read as another dtype (`view(dtype)`), which moves nothing.
    """
    if name in ("cat", "stack"):
        pieces = zip(*(as_table(v).parts for v in args[0]), strict=True)
        return CellTable(*(node.target(list(p), *args[1:], **kwargs) for p in pieces))  # type: ignore[operator]
    moved = args[0]
    rest = pytree.tree_leaves((args[1:], kwargs), is_leaf=is_table)
    if not isinstance(moved, CellTable) or any(isinstance(v, CellTable) for v in rest):
        return None

    if any(isinstance(v, torch.dtype) for v in rest):
        return None

    def apply(t: Tensor, *given: Any) -> Tensor:
        return node.target(t, *given, **kwargs)  # type: ignore[operator, no-any-return]

    if name == "constant_pad_nd":
        lo, hi, cell = moved.parts
        return CellTable(apply(lo, *args[1:]), apply(hi, *args[1:]), apply(cell, args[1], CONSTANT))
    return moved.move(lambda t: apply(t, *args[1:]))
