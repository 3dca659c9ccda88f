"""Fits claims to the rows of a constant mask.

The keys that each query sees are given as one interval for each row. The ends of the intervals suggest a `Band` or
`Chunked`; it is accepted only if it gives exactly these rows. The rows `[0, 1), [0, 2), [0, 3)` of three keys give
`Band(upper=0)`, which is causal. Rows that follow no rule are listed as `Intervals`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_attn_rewrite.masks.spec import Band, Chunked, Claim, Intervals, MaskSpec


def row_intervals(visible: Tensor) -> Tensor | None:
    """Int64 [rows, 2]: the interval of keys that each row of a bool [rows, keys] sees; None if a row sees several."""
    bits = visible.view(torch.uint8)
    count = bits.sum(1, dtype=torch.int64)
    first = bits.argmax(1)
    end = torch.where(count > 0, visible.shape[1] - bits.flip(1).argmax(1), 0)
    return torch.stack([first, end], 1) if torch.equal(end - first, count) else None


def fit_rows(rows: Tensor, kv_len: int) -> tuple[Claim, ...]:
    """The claims that together give exactly these int64 [q_len, 2] intervals.

    Only ends that are not the first or the last key suggest a claim. Every row is compared.
    """
    q_len = len(rows)
    first, end = rows.unbind(1)
    i, seen = torch.arange(q_len), first < end
    uppers = set((end - 1 - i)[seen & (end < kv_len)].tolist())
    lowers = set((first - i)[seen & (first > 0)].tolist())
    band = Band(min(lowers) if len(lowers) == 1 else None, min(uppers) if len(uppers) == 1 else None)
    causal: tuple[Claim, ...] = () if band.upper is None else (Band(upper=band.upper),)
    candidates: list[tuple[Claim, ...]] = [(), (band,)] if band != Band() else [()]
    begins = i[seen & (first == i) & (i > 0)]
    if len(begins):
        size, reach = int(begins[0]), int((i - first)[seen].max())
        window = () if reach >= size - 1 else (Band(-reach, band.upper),)
        candidates += [(*(window or causal), Chunked(size)), (Chunked(size),)]
    for claims in candidates:
        if torch.equal(MaskSpec(claims).rows(q_len, kv_len), rows):
            return claims
    return (Intervals(tuple((lo, hi) for lo, hi in rows.tolist())),)
