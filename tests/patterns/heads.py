"""Grouped and multi-query attention: how keys are shared between heads."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.patterns.cases import B, D, H, Keep, Match, Right, S, additive_causal, grouped, multi_query, qkv, repeat_kv

INDEX = torch.tensor([0, 0, 1, 1])


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * 0.25, -1) @ v


def five_dims(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Without any repeat: [B, kv heads, group, S, S]."""
    q = q.view(B, 2, 2, S, D)
    scores = q @ k[:, :, None].transpose(3, 4) * 0.25
    return (torch.softmax(scores + additive_causal(), -1) @ v[:, :, None]).reshape(B, H, S, D)


def group_in_the_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The query heads of a group are more query rows of one kv head."""
    return attend(q.reshape(B, 2, 2 * S, D), k, v).view(B, H, S, D)


def falcon(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys [B, 1, S, D] that broadcast, operands flattened to [B * H, S, D] with expand."""
    k, v = (x.expand(B, H, S, D).reshape(B * H, S, D) for x in (k, v))
    return attend(q.reshape(B * H, S, D), k, v).view(B, H, S, D)


def each(repeat: object) -> Match:
    return Match(lambda q, k, v: attend(q, repeat(k), repeat(v)), grouped, heads=(H, 2))  # type: ignore[operator]


MATCH = {
    "expand and reshape": each(repeat_kv),
    "expand and flatten": each(lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2)),
    "repeat_interleave": each(lambda x: x.repeat_interleave(2, 1)),
    "repeat_interleave, negative dim": each(lambda x: x.repeat_interleave(2, dim=-3)),
    "index_select": each(lambda x: x.index_select(1, INDEX)),
    "index": each(lambda x: x[:, INDEX]),
    "stack of copies": each(lambda x: torch.stack([x, x], 2).flatten(1, 2)),
    "repeat of a fifth dim": each(lambda x: x[:, :, None].repeat(1, 1, 2, 1, 1).view(B, H, S, D)),
    "cat along a fifth dim": each(lambda x: torch.cat([x[:, :, None]] * 2, 2).reshape(B, H, S, D)),
    "tiled: repeat": each(lambda x: x.repeat(1, 2, 1, 1)),
    "tiled: cat": each(lambda x: torch.cat([x, x], 1)),
    "tiled: tile": each(lambda x: x.tile(1, 2, 1, 1)),
    "tiled: index": each(lambda x: x[:, torch.tensor([0, 1, 0, 1])]),
    "in rows, before the transpose": Match(
        lambda q, k, v: attend(q, *(x.transpose(1, 2).repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))),
        grouped,
        heads=(H, 2),
    ),
    "five dims": Match(five_dims, grouped, "causal(offset=0)", heads=(H, 2)),
    "the group in the rows": Match(group_in_the_rows, grouped),
    "one head that broadcasts": Match(attend, multi_query, heads=(H, 1)),
    "one head, expanded": Match(lambda q, k, v: attend(q, *(x.expand(B, H, S, D) for x in (k, v))), multi_query),
    "one head, folded": Match(falcon, multi_query, heads=(H, 1)),
    "keys shared, values not": Match(lambda q, k, v: attend(q, k[:, :1], v), qkv),
    "latent keys with a shared part (MLA)": Match(
        lambda q, k, r, v: attend(q, torch.cat([k, r.expand(B, H, S, 8)], -1), v),
        lambda: (torch.randn(B, H, S, 24), torch.randn(B, H, S, 16), torch.randn(B, 1, S, 8), torch.randn(B, H, S, D)),
        heads=(H, H),
    ),
}

RIGHT = {
    "an index in another order": Right(lambda q, k, v: attend(q, *(x[:, [0, 1, 1, 0]] for x in (k, v))), grouped),
    "a key repeated, the value tiled": Right(
        lambda q, k, v: attend(q, k.repeat_interleave(2, 1), v.repeat(1, 2, 1, 1)), grouped
    ),
    "two different halves": Right(lambda q, k, v: attend(q, *(torch.cat([x, x + 1], 1) for x in (k, v))), grouped),
    "halves in turn": Right(lambda q, k, v: attend(q, *(torch.cat([x, x.flip(1)], 1) for x in (k, v))), grouped),
}
KEEP: dict[str, Keep] = {}
