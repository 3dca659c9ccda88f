"""Which keys each query tile looks at, and which of them need no mask: decided on the host, before the launch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

ROWS = 128
"""Rows of a query tile."""
ALIGN = 128
"""A run begins at a multiple of it: values lie in SBUF in blocks of so many keys."""
EVEN = 32
"""The mask is left out on so many columns at a time: cutting finer saves nothing, a masked column costs the same."""
WORTH_A_PIECE = 64
"""Columns below which a piece of its own costs more, in the start of one more instruction, than it saves."""

Run = tuple[int, int, int, int]
"""(first, full_start, full_stop, stop): keys [first, stop) are looked at, every row sees [full_start, full_stop)."""
NO_KEYS: Run = (0, 0, 0, 0)


class Intervals(NamedTuple):
    """Query row i of batch element b sees the keys of [lo[b, i], hi[b, i]), int32 [1 | batch, q_len] each."""

    lo: Tensor
    hi: Tensor

    def within(self, kv_len: int) -> Intervals:
        return Intervals(self.lo.clamp(0, kv_len), self.hi.clamp(0, kv_len))


def real_numbers() -> AbstractContextManager[object]:
    """Within it the plan is made of numbers, also where a graph is traced and every new tensor would be a fake."""
    return _disable_current_modes()


def band(
    q_len: int, kv_len: int, lower: int | None, upper: int | None, device: torch.device | str = "cpu"
) -> Intervals:
    """Row i sees the keys of [i + lower, i + upper]; None is an open side."""
    i = torch.arange(q_len, dtype=torch.int32, device=device)[None]
    lo = torch.zeros_like(i) if lower is None else i + lower
    hi = torch.full_like(i, kv_len) if upper is None else i + (upper + 1)
    return Intervals(lo, hi).within(kv_len)


def meet(a: Intervals, b: Intervals) -> Intervals:
    """What both show."""
    return Intervals(torch.maximum(a.lo, b.lo), torch.minimum(a.hi, b.hi))


def tile_starts(q_len: int) -> tuple[int, ...]:
    """The first row of each query tile. The last tile ends with the rows, and may repeat some: all are of one size."""
    if q_len <= ROWS:
        return (0,)
    return (*range(0, q_len - ROWS, ROWS), q_len - ROWS)


def tile_rows(q_len: int, device: torch.device) -> Tensor:
    """The rows of each tile, int64 [tiles, rows]."""
    starts = torch.tensor(tile_starts(q_len), device=device)
    return starts[:, None] + torch.arange(min(ROWS, q_len), device=device)


def runs(intervals: Intervals, exact: bool) -> tuple[Run, ...]:
    """What each tile looks at. Unless the intervals, on the CPU, are `exact`, rows may see less than they say."""
    index = tile_rows(intervals.lo.shape[1], intervals.lo.device)
    lo, hi = intervals.lo[:, index], intervals.hi[:, index]
    empty = lo >= hi
    first = torch.where(empty, torch.iinfo(lo.dtype).max, lo).amin((0, 2))
    stop = torch.where(empty, 0, hi).amax((0, 2))
    full = torch.stack([lo.amax((0, 2)), hi.amin((0, 2))]) if exact else torch.stack([stop, stop])
    return tuple(_run(*numbers) for numbers in torch.stack([first, *full, stop], 1).tolist())


def _run(first: int, full_start: int, full_stop: int, stop: int) -> Run:
    if first >= stop:
        return NO_KEYS
    first = first // ALIGN * ALIGN
    full_start = -(-full_start // EVEN) * EVEN
    full_stop = full_stop if full_stop == stop else full_stop // EVEN * EVEN
    if full_stop - full_start < WORTH_A_PIECE and (full_start, full_stop) != (first, stop):
        full_start = full_stop = stop
    return first, full_start, full_stop, stop


def is_full(run: Run) -> bool:
    """Every row sees every key that is looked at."""
    return run[:2] == (run[0], run[0]) and run[2] == run[3]


def paired(starts: tuple[int, ...], tiles: tuple[Run, ...]) -> tuple[tuple[tuple[int, int], Run], ...]:
    """Two tiles at a time for two cores, that look at what either must: both cores issue the same instructions."""
    pairs = []
    for t in range(0, len(starts), 2):
        u = min(t + 1, len(starts) - 1)
        pairs.append(((starts[t], starts[u]), _union(tiles[t], tiles[u])))
    return tuple(pairs)


def _union(a: Run, b: Run) -> Run:
    if NO_KEYS in (a, b):
        first, _, _, stop = b if a == NO_KEYS else a
        return first, stop, stop, stop
    return _run(min(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), max(a[3], b[3]))


def bounds_tensor(intervals: Intervals) -> Tensor:
    """float32 [1 | batch, rows, 2 * tiles]: lo and hi of each row of each tile, a tile on two columns."""
    index = tile_rows(intervals.lo.shape[1], intervals.lo.device)
    both = torch.stack([intervals.lo[:, index], intervals.hi[:, index]], -1)
    return both.permute(0, 2, 1, 3).flatten(2).float().contiguous()
