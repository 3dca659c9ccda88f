"""Flash attention written by hand: a loop over blocks of keys, with a running maximum, sum and output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.patterns.cases import CAUSAL, LOW, B, H, Keep, Match, Right, S, multi_query, with_padding

BLOCK = 8
Scores = Callable[[Tensor, Tensor, int], Tensor]
"""The scores of a query with a block of keys, and the first key of the block."""


def scores(q: Tensor, k: Tensor, start: int) -> Tensor:
    return q @ k.mT * 0.25


def masked(fill: float, seen: Tensor = CAUSAL) -> Scores:
    return lambda q, k, start: scores(q, k, start).masked_fill(~seen[:, start : start + k.shape[2]], fill)


def added(fill: float) -> Scores:
    lowered = torch.where(CAUSAL, 0.0, fill)
    return lambda q, k, start: scores(q, k, start) + lowered[:, start : start + k.shape[2]]


def running(of: Scores = scores, first: int = 0) -> Callable[..., Tensor]:
    """Starts with -inf and zeros."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        largest = torch.full((*q.shape[:3], 1), -torch.inf, dtype=q.dtype)
        total, out = torch.zeros_like(largest), torch.zeros_like(q)
        for start in range(first, S, BLOCK):
            s = of(q, k[:, :, start : start + BLOCK], start)
            top = torch.maximum(largest, s.max(-1, keepdim=True).values)
            p, shrink = torch.exp(s - top), torch.exp(largest - top)
            total = total * shrink + p.sum(-1, keepdim=True)
            out = out * shrink + p @ v[:, :, start : start + BLOCK]
            largest = top
        return out / total

    return attention


def without_start(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first block starts, without keepdim, and blocks are cut by split."""
    largest, total, out = None, None, None
    for keys, values in zip(k.split(10, 2), v.split(10, 2), strict=True):
        s = torch.einsum("bhqd,bhkd->bhqk", q, keys) * 0.25
        top = s.amax(-1) if largest is None else torch.maximum(largest, s.amax(-1))
        p = torch.exp(s - top[..., None])
        if largest is None or total is None or out is None:
            total, out = p.sum(-1), torch.einsum("bhqk,bhkd->bhqd", p, values)
        else:
            shrink = torch.exp(largest - top)
            total = total * shrink + p.sum(-1)
            out = out * shrink[..., None] + torch.einsum("bhqk,bhkd->bhqd", p, values)
        largest = top
    assert out is not None and total is not None
    return out / total[..., None]


def normalised_each_time(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output is divided by the running sum in each step."""
    largest = q.new_full((*q.shape[:3], 1), -torch.inf)
    total, out = q.new_zeros((*q.shape[:3], 1)), torch.zeros(q.shape)
    for keys, values in zip(k.split(BLOCK, 2), v.split(BLOCK, 2), strict=True):
        s = q @ keys.mT * 0.25
        top = torch.maximum(largest, s.amax(-1, keepdim=True))
        p = torch.exp(s - top)
        before = total * torch.exp(largest - top)
        total = before + p.sum(-1, keepdim=True)
        out, largest = (out * before + p @ values) / total, top
    return out


def blocks_of_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Also over blocks of queries. Blocks of keys that are hidden as a whole are skipped."""
    out = []
    for row in range(0, S, BLOCK):
        block = q[:, :, row : row + BLOCK]
        largest, total, found = (
            torch.full((B, H, BLOCK, 1), -torch.inf),
            torch.zeros(B, H, BLOCK, 1),
            torch.zeros_like(block),
        )
        for start in range(0, row + BLOCK, BLOCK):
            s = block @ k[:, :, start : start + BLOCK].mT * 0.25
            s = s.masked_fill(~CAUSAL[row : row + BLOCK, start : start + BLOCK], -torch.inf)
            top = torch.maximum(largest, s.amax(-1, keepdim=True))
            p, shrink = torch.exp(s - top), torch.exp(largest - top)
            total = total * shrink + p.sum(-1, keepdim=True)
            found, largest = found * shrink + p @ v[:, :, start : start + BLOCK], top
        out.append(found / total)
    return torch.cat(out, 2)


def padded(fill: float, adds: bool = False) -> Callable[..., Tensor]:
    """Under a causal mask and padding on the left. Some rows see no key."""

    def attention(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
        seen = CAUSAL & attention_mask[:, None, None].bool()
        if adds:
            bias = torch.where(seen, 0.0, fill)
            return running(lambda q, k, i: scores(q, k, i) + bias[..., i : i + BLOCK])(q, k, v)
        return running(lambda q, k, i: scores(q, k, i).masked_fill(~seen[..., i : i + BLOCK], fill))(q, k, v)

    return attention


def of_a_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The blocks are cut from all scores."""
    whole = scores(q, k, 0)
    return running(lambda q, k, start: whole[..., start : start + BLOCK])(q, k, v)


def changed(*, total: float = 1.0, out: float = 1.0, last: bool = False) -> Callable[..., Tensor]:
    """A mistake: the running sum or output is not shrunk by the same number, or a maximum is not the running one."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        largest, sums, found = torch.full((B, H, S, 1), -torch.inf), torch.zeros(B, H, S, 1), torch.zeros_like(q)
        for keys, values in zip(k.split(BLOCK, 2), v.split(BLOCK, 2), strict=True):
            s = q @ keys.mT * 0.25
            top = s.amax(-1, keepdim=True) if last else torch.maximum(largest, s.amax(-1, keepdim=True))
            p, shrink = torch.exp(s - top), torch.exp(largest - top)
            sums = sums * shrink * total + p.sum(-1, keepdim=True)
            found, largest = found * shrink * out + p @ values, top
        return found / sums

    return attention


def values_of_another_block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return running()(q, k, v.roll(BLOCK, 2)[:, :, :S])


def starts_with(number: float) -> Callable[..., Tensor]:
    """The running sum starts with a number: as if there were one more key."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        largest, total, out = torch.zeros(B, H, S, 1), torch.full((B, H, S, 1), number), torch.zeros_like(q)
        for keys, values in zip(k.split(BLOCK, 2), v.split(BLOCK, 2), strict=True):
            s = q @ keys.mT * 0.25
            top = torch.maximum(largest, s.amax(-1, keepdim=True))
            p, shrink = torch.exp(s - top), torch.exp(largest - top)
            total, out = total * shrink + p.sum(-1, keepdim=True), out * shrink + p @ values
            largest = top
        return out / total

    return attention


def with_output_between(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the first blocks is read."""
    a, b = scores(q, k[:, :, :BLOCK], 0), scores(q, k[:, :, BLOCK:], BLOCK)
    one = a.amax(-1, keepdim=True)
    top = torch.maximum(one, b.amax(-1, keepdim=True))
    first = torch.exp(a - one).sum(-1, keepdim=True)
    p, r, shrink = torch.exp(a - one), torch.exp(b - top), torch.exp(one - top)
    out = (p @ v[:, :, :BLOCK]) * shrink + r @ v[:, :, BLOCK:]
    return out / (first * shrink + r.sum(-1, keepdim=True)), first


LATE = CAUSAL.flip(0, 1)
"""The first rows see all keys, and the last row sees the last key alone."""

MATCH = {
    "running maximum": Match(running(), scale=0.25),
    "one key head": Match(running(), multi_query, scale=0.25, heads=(H, 1)),
    "without a start": Match(without_start, scale=0.25),
    "normalised each time": Match(normalised_each_time, scale=0.25),
    "causal by -inf": Match(running(masked(-torch.inf)), mask="causal(offset=0)", scale=0.25),
    "causal by finfo.min": Match(running(masked(LOW)), mask="causal(offset=0)", scale=0.25),
    "causal by a sum": Match(running(added(-torch.inf)), mask="causal(offset=0)", scale=0.25),
    "blocks of rows": Match(blocks_of_rows, mask="causal(offset=0)", scale=0.25, replaced=3),
    "padding by finfo.min": Match(padded(LOW), with_padding, "causal(offset=0) & key_padding(attention_mask)"),
    "blocks of one product": Match(of_a_product, scale=0.25),
    "a key of score 0": Match(starts_with(1.0), scale=0.25),
}

KEEP = {
    "padding by -inf": Keep(padded(-torch.inf), "may be hidden by -inf", with_padding),
    "late keys by -inf": Keep(running(masked(-torch.inf, LATE)), "may be hidden by -inf"),
    "a sum that is read": Keep(with_output_between, "log-sum-exp is read"),
}

RIGHT = {
    **{
        f"padding by {fill}, {'added' if adds else 'filled'}": Right(padded(fill, adds), with_padding)
        for fill in (-1e4, -1e9, LOW)
        for adds in (False, True)
    },
    "a sum that shrinks twice": Right(changed(total=0.5)),
    "an output that shrinks twice": Right(changed(out=0.5)),
    "a maximum of the last block": Right(changed(last=True)),
    "values of another block": Right(values_of_another_block),
    "a start of 2": Right(starts_with(2.0)),
    "without the first block": Right(running(first=BLOCK)),
}
