"""Reads one term element by element: which keys each query sees, for all values of the 0/1 inputs.

The term is evaluated as a table over 0/1 inputs (`values/cells.py`). It can be claimed if it has the form

    visible(b, h, i, j) = rows[i][0] <= j < rows[i][1]  and  cell[b, j]

Here `rows` are constants, and `cell[b, j]` is one element of a 0/1 tensor for each key, the same for all queries. A
causal mask with padding has `rows[i] = (0, i + 1)` and `cell[b, j] = attention_mask[b, j]`. The table is computed for
some query rows at a time, so the mask of all rows is never held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neuron_attn_rewrite.graph.nodes import shape
from neuron_attn_rewrite.masks.fit import row_intervals
from neuron_attn_rewrite.masks.spec import Unproven
from neuron_attn_rewrite.patterns.axes import Dims, axis_dim, dim_size, layout_steps, run_layout
from neuron_attn_rewrite.patterns.site import Term, hides
from neuron_attn_rewrite.reasons import Reason
from neuron_attn_rewrite.values.cells import CONSTANT, UNKNOWN, CellTable
from neuron_attn_rewrite.values.evaluator import Evaluator, Opaque
from neuron_attn_rewrite.values.regions import Region

BLOCK = 2**20
"""How many elements of a mask are computed at a time."""

NO_CELL = torch.iinfo(torch.int32).max
"""Larger than the number of any cell."""

PART = -1
"""The axis of some of the rows: that of no other dim."""


@dataclass(frozen=True)
class Reading:
    """Which keys one term shows."""

    rows: Tensor
    """Int64 [q_len, 2]: the interval of keys that each query can see, [0, 0) for none."""
    cells: Tensor | None
    """Int64 [batch | 1, kv_len]: the cell on which each key depends, -1 for none. None if no key depends on one."""
    inverted: bool
    """Whether 1 means hidden."""
    fill: float | None
    """The number by which keys are hidden, None if there are several."""


@dataclass(frozen=True)
class OtherForm(Unproven):
    """The term is a mask, of a form that can't be claimed."""

    fill: float | None
    """The number by which keys are hidden, None if there are several."""


def read(term: Term, dims: Dims, evaluator: Evaluator) -> Reading | Unproven:
    """Which keys a term shows along `dims`, the (batch, heads, query, key) of the kernel."""
    if layout_steps(term.dims, dims) is None:
        return Unproven(Reason("mask-axes", "it does not run along the axes of the scores"))
    kv_len = dim_size(dims[3])
    rows: list[Tensor] = []
    first = torch.tensor(NO_CELL)
    last = torch.tensor([[CONSTANT]]).expand(1, kv_len)
    always = False
    senses: set[bool] = set()
    fills: set[float] = set()
    other_form: Reason | None = None
    for table, height in _blocks(term, dims, evaluator):
        if isinstance(table, Unproven):
            return table
        seen = _visibility(term, table, fills)
        if isinstance(seen, Unproven):
            return seen
        if other_form is not None:
            continue  # only the numbers that hide keys are wanted
        lo, hi = (t.expand(*t.shape[:2], height, kv_len) for t in (seen.lo, seen.hi))
        either = lo | hi
        if not torch.equal(either, either[:1, :1].expand_as(either)):
            other_form = Reason("mask-per-head", "its visible keys differ between batch elements or heads")
            continue
        intervals = row_intervals(either[0, 0])
        if intervals is None:
            other_form = Reason("mask-not-interval", "the visible keys of a query are not one interval")
            continue
        rows.append(intervals)
        always |= any_of(lo & hi)
        depends = seen.lo ^ seen.hi
        if any_of(depends):
            if any_of(depends & (seen.cell == UNKNOWN)):
                return Unproven(Reason("mask-two-inputs", "some element depends on more than one element of a mask"))
            first = torch.minimum(first, seen.cell.where(depends, NO_CELL).amin((1, 2)))
            last = torch.maximum(last, seen.cell.where(depends, CONSTANT).amax((1, 2)))
            senses |= {sense for sense, side in ((False, seen.hi), (True, seen.lo)) if any_of(depends & side)}
    evaluator.forget_regions()
    fill = next(iter(fills)) if len(fills) == 1 else None
    used = last >= 0
    if other_form is None and used.any():
        if always or (used & (first != last)).any():
            other_form = Reason("mask-padding", "its padding is not the same for every query")
        elif len(senses) > 1:
            other_form = Reason("mask-padding", "in its padding, 1 hides some keys and shows others")
    if other_form is not None:
        return OtherForm(other_form, fill)
    found = torch.cat(rows).expand(dim_size(dims[2]), 2)
    return Reading(found, last, senses.pop(), fill) if used.any() else Reading(found, None, False, fill)


def _blocks(term: Term, dims: Dims, evaluator: Evaluator) -> Iterator[tuple[CellTable | Unproven, int]]:
    """The term's table in the kernel's layout, some query rows at a time."""
    q_len = dim_size(dims[2])
    along = [i for i, dim in enumerate(term.dims) if dim and dim == dims[2]]
    height = q_len
    if len(along) == 1:
        height = min(q_len, max(1, BLOCK * q_len // torch.Size(shape(term.node)).numel()))
    for start in range(0, q_len, height):
        length = min(height, q_len - start)
        region = None if length == q_len else Region(along[0], start, length)
        evaluator.forget_regions()
        table = evaluator.table(term.node, region)
        if isinstance(table, Opaque):
            cause = evaluator.cause(table.cause).name
            yield Unproven(Reason("mask-computed", f"it depends on {cause}, which is not a mask")), length
            return
        part = axis_dim(PART, length) if region else dims[2]
        cut, wanted = (tuple(part if dim == dims[2] else dim for dim in of) for of in (term.dims, dims))
        layout = layout_steps(cut, wanted)
        assert layout is not None
        yield table.move(lambda t, layout=layout: run_layout(layout, t, _apply)), length


def _apply(op: str, value: Tensor, arg: tuple[int, ...]) -> Tensor:
    moved = getattr(value, op)(arg)
    assert isinstance(moved, Tensor)
    return moved


def _visibility(term: Term, table: CellTable, fills: set[float]) -> CellTable | Unproven:
    """The term as a table of bools, True where the key is seen. The numbers that hide keys are added to `fills`."""
    if table.lo.dtype != torch.bool and (table.cell == UNKNOWN).any():
        return Unproven(Reason("mask-two-inputs", "some element depends on more than one element of a mask"))
    if term.kind in ("show", "hide"):
        if not hides(term.fill):
            words = f"it fills hidden scores with {term.fill:g}, which does not hide them"
            return Unproven(Reason("mask-weak-fill", words))
        fills.add(term.fill)
        lo, hi = table.lo.bool(), table.hi.bool()
        return CellTable(lo, hi, table.cell) if term.kind == "show" else CellTable(~lo, ~hi, table.cell)
    seen = CellTable(table.lo == 0, table.hi == 0, table.cell)
    for values, visible in ((table.lo, seen.lo), (table.hi, seen.hi)):
        found = hiding(values, visible, term)
        if found is None:
            return Unproven(Reason("mask-bias", "it adds numbers that are neither 0 nor low enough to hide a key"))
        fills |= found
    return seen


def hiding(values: Tensor, visible: Tensor, term: Term) -> set[float] | None:
    """The lowest and the highest number by which a term hides a key. None if some number does not hide it."""
    ends = (values.min(), values.max())
    uniform = next((end for end in ends if bool((visible | (values == end)).all())), None)
    hidden = values[~visible] if uniform is None else uniform[uniform != 0]
    found = {term.hiding(float(f(hidden))) for f in (torch.min, torch.max) if hidden.numel()}
    return found if all(map(hides, found)) else None


def any_of(flags: Tensor) -> bool:
    """`flags.any()`, but many times faster on the CPU."""
    return bool(flags.view(torch.uint8).amax())
