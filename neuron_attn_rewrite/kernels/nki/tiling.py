"""Which keys each query tile reads, and which of them need no mask. The host decides this before the launch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

ROWS = 128
"""Rows of a query tile."""
ALIGN = 128
"""A key range begins at a multiple of this: the values lie in SBUF in blocks of so many keys."""
EVEN = 32
"""The part of a key range without a mask begins and ends at multiples of this. A finer cut would save nothing."""
LEAST_UNMASKED = 64
"""With fewer columns without a mask, all are masked: one more instruction costs more than the mask."""

KeyRange = tuple[int, int, int, int]
"""(first, full_start, full_stop, stop): a tile reads keys [first, stop), all its rows see [full_start, full_stop)."""
NO_KEYS: KeyRange = (0, 0, 0, 0)


class Intervals(NamedTuple):
    """Query row i of batch element b sees the keys [lo[b, i], hi[b, i]). Both are int32 [1 | batch, q_len]."""

    lo: Tensor
    hi: Tensor

    def within(self, kv_len: int) -> Intervals:
        return Intervals(self.lo.clamp(0, kv_len), self.hi.clamp(0, kv_len))


def real_numbers() -> AbstractContextManager[object]:
    """Within this context new tensors have data, even while a graph is traced and every new tensor would be a fake."""
    return _disable_current_modes()


def band(
    q_len: int, kv_len: int, lower: int | None, upper: int | None, device: torch.device | str = "cpu"
) -> Intervals:
    """Row i sees the keys from i + lower to i + upper, both included. None: no limit on that side."""
    i = torch.arange(q_len, dtype=torch.int32, device=device)[None]
    lo = torch.zeros_like(i) if lower is None else i + lower
    hi = torch.full_like(i, kv_len) if upper is None else i + (upper + 1)
    return Intervals(lo, hi).within(kv_len)


def intersection(a: Intervals, b: Intervals) -> Intervals:
    """The intersection of both, row by row."""
    return Intervals(torch.maximum(a.lo, b.lo), torch.minimum(a.hi, b.hi))


def tile_starts(q_len: int) -> tuple[int, ...]:
    """The first row of each query tile. All tiles have one size, so the last one may repeat rows of the one before."""
    if q_len <= ROWS:
        return (0,)
    return (*range(0, q_len - ROWS, ROWS), q_len - ROWS)


def tile_rows(q_len: int, device: torch.device) -> Tensor:
    """The rows of each query tile, int64 [tiles, rows]."""
    starts = torch.tensor(tile_starts(q_len), device=device)
    return starts[:, None] + torch.arange(min(ROWS, q_len), device=device)


def key_ranges(intervals: Intervals, exact: bool) -> tuple[KeyRange, ...]:
    """The keys that each query tile reads. `exact`: the rows see all keys of the intervals, which are on the CPU."""
    index = tile_rows(intervals.lo.shape[1], intervals.lo.device)
    lo, hi = intervals.lo[:, index], intervals.hi[:, index]
    empty = lo >= hi
    first = torch.where(empty, torch.iinfo(lo.dtype).max, lo).amin((0, 2))
    stop = torch.where(empty, 0, hi).amax((0, 2))
    full = torch.stack([lo.amax((0, 2)), hi.amin((0, 2))]) if exact else torch.stack([stop, stop])
    return tuple(_key_range(*numbers) for numbers in torch.stack([first, *full, stop], 1).tolist())


def _key_range(first: int, full_start: int, full_stop: int, stop: int) -> KeyRange:
    if first >= stop:
        return NO_KEYS
    first = first // ALIGN * ALIGN
    full_start = -(-full_start // EVEN) * EVEN
    full_stop = full_stop if full_stop == stop else full_stop // EVEN * EVEN
    if full_stop - full_start < LEAST_UNMASKED and (full_start, full_stop) != (first, stop):
        full_start = full_stop = stop
    return first, full_start, full_stop, stop


def is_full(key_range: KeyRange) -> bool:
    """Whether every row sees every key of the range."""
    return key_range[:2] == (key_range[0], key_range[0]) and key_range[2] == key_range[3]


def paired(starts: tuple[int, ...], tiles: tuple[KeyRange, ...]) -> tuple[tuple[tuple[int, int], KeyRange], ...]:
    """Two tiles at a time, one for each core. Both read the union of their keys, to issue the same instructions."""
    pairs = []
    for t in range(0, len(starts), 2):
        u = min(t + 1, len(starts) - 1)
        pairs.append(((starts[t], starts[u]), _union(tiles[t], tiles[u])))
    return tuple(pairs)


def _union(a: KeyRange, b: KeyRange) -> KeyRange:
    if NO_KEYS in (a, b):
        first, _, _, stop = b if a == NO_KEYS else a
        return first, stop, stop, stop
    return _key_range(min(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), max(a[3], b[3]))


def bounds_tensor(intervals: Intervals) -> Tensor:
    """The bounds as the kernels take them, float32 [1 | batch, rows, 2 * tiles]: lo of tile t in column 2t, hi next."""
    index = tile_rows(intervals.lo.shape[1], intervals.lo.device)
    both = torch.stack([intervals.lo[:, index], intervals.hi[:, index]], -1)
    return both.permute(0, 2, 1, 3).flatten(2).float().contiguous()
