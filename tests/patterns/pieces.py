"""One attention in pieces: several products of one query under one softmax."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.patterns.cases import CAUSAL, B, D, H, Keep, Match, Right, S, repeat_kv

NEW = 4
"""Keys beside those of the cache."""


def cached(new: int = NEW, heads: int = H, rows: int = NEW) -> Callable[[], tuple[Tensor, ...]]:
    """Query, keys of a cache and new ones, values of both, and how many keys of the cache are seen: none to all."""

    def inputs() -> tuple[Tensor, ...]:
        q = 3 * torch.randn(B, H, rows, D)
        kc, kn, vc, vn = (3 * torch.randn(B, heads, n, D) for n in (S, new, S, new))
        return q, kc, kn, vc, vn, torch.randint(0, S + 1, (B,))

    return inputs


def old_scores(q: Tensor, kc: Tensor, length: Tensor, fill: float = -1e30, scale: float = 0.25) -> Tensor:
    seen = torch.arange(kc.shape[2])[None, None, None] < length[:, None, None, None]
    return (q @ kc.mT * scale).masked_fill(~seen, fill)


def new_scores(q: Tensor, kn: Tensor, scale: float = 0.25) -> Tensor:
    return q @ kn.mT * scale


def joined(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    s = torch.cat([old_scores(q, kc, length), new_scores(q, kn)], -1)
    return s.softmax(-1) @ torch.cat([vc, vn], 2)


def joined_unless(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """The scores of both parts are changed before they are joined."""

    def attention(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
        old, new = change(old_scores(q, kc, length), new_scores(q, kn))
        return torch.cat([old, new], -1).softmax(-1) @ torch.cat([vc, vn], 2)

    return attention


def masked_outside(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    s = torch.cat([q @ kc.mT, q @ kn.mT], -1) * 0.25
    seen = torch.cat([torch.arange(S) < length[:, None], torch.ones(B, NEW, dtype=torch.bool)], -1)
    return s.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1) @ torch.cat([vc, vn], 2)


def masks_in_both(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    """The new keys under a causal mask."""
    new = new_scores(q, kn).masked_fill(~CAUSAL[:NEW, :NEW], -1e30)
    s = torch.cat([old_scores(q, kc, length), new], -1)
    return s.softmax(-1) @ torch.cat([vc, vn], 2)


def constant_masks(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    """All keys of the cache, and the new ones under a causal mask: together a causal mask."""
    s = torch.cat([q @ kc.mT, (q @ kn.mT).masked_fill(~CAUSAL[:NEW, :NEW], -torch.inf)], -1)
    return s.softmax(-1) @ torch.cat([vc, vn], 2)


def with_sink(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    sink = torch.arange(H).float()[:, None, None].expand(B, H, q.shape[2], 1)
    s = torch.cat([old_scores(q, kc, length), new_scores(q, kn), sink], -1)
    return s.softmax(-1)[..., :-1] @ torch.cat([vc, vn], 2)


def grouped_pieces(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    kc, kn, vc, vn = map(repeat_kv, (kc, kn, vc, vn))
    return joined(q, kc, kn, vc, vn, length)


def divided_at_the_end(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    s = torch.cat([old_scores(q, kc, length), new_scores(q, kn)], -1)
    w = (s - s.amax(-1, keepdim=True)).exp()
    return (w @ torch.cat([vc, vn], 2)) / w.sum(-1, keepdim=True)


def other_layout(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    """New keys as [batch, length, heads, features]."""
    s = torch.cat([old_scores(q, kc, length), torch.einsum("bhqd,bkhd->bhqk", q, kn.transpose(1, 2)) / 4], -1)
    return s.softmax(-1) @ torch.cat([vc, vn], 2)


def written_between(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    old = old_scores(q, kc, length)
    kc.add_(1)
    s = torch.cat([old, new_scores(q, kn)], -1)
    out = s.softmax(-1) @ torch.cat([vc, vn], 2)
    kc.sub_(1)
    return out


def of_another_query(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    s = torch.cat([old_scores(q, kc, length), new_scores(q.flip(1), kn)], -1)
    return s.softmax(-1) @ torch.cat([vc, vn], 2)


def of_turned_query(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    """As many heads as rows: the query of the second part has them exchanged."""
    s = torch.cat([old_scores(q, kc, length), new_scores(q.transpose(1, 2), kn)], -1)
    return s.softmax(-1) @ torch.cat([vc, vn], 2)


def scores_read(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    old = old_scores(q, kc, length)
    return torch.cat([old, new_scores(q, kn)], -1).softmax(-1) @ torch.cat([vc, vn], 2), old


MATCH = {
    "keys and values joined": Match(joined, cached(), scale=0.25, bias=(B, 1, 1, S + NEW)),
    "one new key and one row": Match(joined, cached(1, rows=1), scale=0.25, bias=(B, 1, 1, S + 1)),
    "one new key": Match(joined, cached(1), scale=0.25, bias=(B, 1, 1, S + 1)),
    "a mask over both": Match(masked_outside, cached(), scale=0.25, bias=(B, 1, 1, S + NEW)),
    "a mask in each": Match(masks_in_both, cached(), scale=0.25, bias=(B, 1, NEW, S + NEW)),
    "causal together": Match(constant_masks, cached(), f"causal(offset={S})", scale=1.0),
    "beside a sink": Match(with_sink, cached(), scale=0.25, bias=(B, 1, 1, S + NEW)),
    "grouped heads": Match(grouped_pieces, cached(heads=2), bias=(B, 1, 1, S + NEW)),
    "divided at the end": Match(divided_at_the_end, cached(), scale=0.25, bias=(B, 1, 1, S + NEW)),
    "keys of other layouts": Match(other_layout, cached(), scale=0.25, bias=(B, 1, 1, S + NEW)),
}

KEEP = {
    "another scale in one part": Keep(
        joined_unless(lambda old, new: (old, new * 2)), "differ in their multiplier", cached()
    ),
    "a number added to one part": Keep(joined_unless(lambda old, new: (old, new + 2)), "neither side", cached()),
    "the maximum of one part subtracted from it": Keep(
        joined_unless(lambda old, new: (old, new - new.amax(-1, keepdim=True))), "scores are also read", cached()
    ),
    "a softcap in one part": Keep(
        joined_unless(lambda old, new: (old, 2 * torch.tanh(new / 2))), "differ in their", cached()
    ),
    "a cache that is written in between": Keep(written_between, "is written after", cached()),
    "two queries": Keep(of_another_query, "several queries", cached()),
    "heads and rows exchanged": Keep(of_turned_query, "several queries", cached()),
    "scores of one part read": Keep(scores_read, "its scores are also read", cached()),
}

RIGHT: dict[str, Right] = {}
