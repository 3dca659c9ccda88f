"""From rows of a constant mask to the claims that give exactly these rows."""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_attn_rewrite.masks.spec import Band, Chunked, Claim, Intervals, MaskSpec


def row_intervals(visible: Tensor) -> Tensor | None:
    """Int64 [rows, 2] of the one interval that each row of a bool [rows, keys] sees; None if some row sees two."""
    bits = visible.view(torch.uint8)
    count = bits.sum(1, dtype=torch.int64)
    first = bits.argmax(1)
    end = torch.where(count > 0, visible.shape[1] - bits.flip(1).argmax(1), 0)
    return torch.stack([first, end], 1) if torch.equal(end - first, count) else None


def fit_rows(rows: Tensor, kv_len: int) -> tuple[Claim, ...]:
    """The claims whose conjunction gives exactly these int [q_len, 2] intervals.

    Candidates are read off the ends that are not those of the keys, and accepted only if every row agrees.
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
