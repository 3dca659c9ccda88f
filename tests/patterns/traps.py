"""Graphs that other matchers are known to get silently wrong, and look-alikes of attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.cases import (
    CAUSAL,
    LOW,
    B,
    H,
    Keep,
    Match,
    Right,
    S,
    additive_causal,
    cubes,
    qkv,
    with_bias,
    with_padding,
)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / 2


def left_padded(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
    """Rows at the start see no key."""
    return torch.softmax(scores(q, k) + additive_causal() + (1.0 - attention_mask[:, None, None].float()) * LOW, -1) @ v


def two_masks(padding: float, causal: float, padding_first: bool = False) -> Callable[..., Tensor]:
    """One mask adds a number, the other puts one in place of what is there: in rows that see no key it matters which
    comes last, and how the numbers compare."""

    def attention(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
        steps = [
            lambda s: s + (1.0 - attention_mask[:, None, None].float()) * padding,
            lambda s: torch.where(CAUSAL, s, torch.full([], causal)),
        ]
        s = scores(q, k)
        for step in steps if padding_first else steps[::-1]:
            s = step(s)
        return torch.softmax(s, -1) @ v

    return attention


def shifted(shift: Callable[[Tensor], Tensor], with_sink: bool) -> Callable[..., Tensor]:
    """What is added to a whole row vanishes in a softmax, but not through a softcap, and not beside a sink."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = shift(scores(q, k))
        if not with_sink:
            return torch.softmax(3 * torch.tanh(x / 3), -1) @ v
        sink = torch.arange(H).float()[:, None, None].expand(B, H, S, 1)
        return torch.softmax(torch.cat([x, sink], -1), -1)[..., :-1] @ v

    return attention


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a number": lambda x: x + 2.0,
    "the largest": lambda x: x - x.amax(-1, keepdim=True),
}


def distilbert(live: int) -> Match:
    """Keys whose mask equals 0 are hidden, whatever the others are."""

    def attention(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        hidden = (m == 0).view(B, 1, 1, S).expand_as(scores(q, k))
        return torch.softmax(scores(q, k).masked_fill(hidden, LOW), -1) @ v

    return Match(attention, lambda: (*qkv(), with_padding()[3].float() * live), "key_padding(eq)")


def slots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Slot attention: queries compete for keys."""
    p = torch.softmax(q @ k.mT, -2)
    return (p / (p.sum(-1, keepdim=True) + 1e-8)) @ v


def two_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Global and local keys under one softmax, each with its own product."""
    s = torch.cat([q @ k[:, :, :6].mT, q @ k[:, :, 6:].mT], -1)
    p = torch.softmax(s / 4, -1)
    return p[..., :6] @ v[:, :, :6] + p[..., 6:] @ v[:, :, 6:]


def guarded(dim: int | tuple[int, ...], alpha: int = 1, limit: float = 1.0) -> Callable[..., Tensor]:
    """A softmax by hand whose sum is guarded, with a maximum that need not be one of the row."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = scores(q, k)
        e = torch.exp(torch.sub(x, x.amax(dim, keepdim=True), alpha=alpha))
        return e / e.sum(-1, keepdim=True).clamp(min=limit) @ v

    return attention


def padded(change: Callable[[Tensor, Tensor], Tensor], number: float = -1e9) -> Callable[..., Tensor]:
    """A number is added to the scores of padding. If a row sees nothing else, it matters how each sum is rounded.

    `change` makes of scores and mask what the softmax gets.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.softmax(change(q @ k.mT / 4, (1.0 - attention_mask[:, None, None].float()) * number), -1) @ v

    return attention


def all_padding() -> tuple[Tensor, ...]:
    """One sequence is padded on the left, the other is padding alone."""
    q, k, v, mask = with_padding()
    return q, k, v, mask.index_fill(0, torch.tensor([1]), 0)


DISTANCE = torch.arange(S)[:, None] - torch.arange(S)[None] + 0.0
HOLE = torch.zeros(S).masked_fill(torch.arange(S) == 5, LOW)
ROUNDED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "alone": (lambda x, m: x + m, 1),
    "then all divided by 4": (lambda x, m: (x + m) / 4, 1),
    "then all divided by 3": (lambda x, m: (x + m) / 3, 0),
    "to scores that were shifted": (lambda x, m: x + 2.5 + m, 0),
    "to scores less their maximum": (lambda x, m: x - x.amax(-1, keepdim=True) + m, 0),
    "to scores less their mean": (lambda x, m: x - x.mean(-1, keepdim=True) + m, 0),
    "and the maximum subtracted": (lambda x, m: (lambda y: y - y.amax(-1, keepdim=True))(x + m), 1),
    "and a bias": (lambda x, m: x + DISTANCE + m, 0),
    "with a hole, and a bias": (lambda x, m: x + DISTANCE + m.minimum(HOLE.clamp(min=-1e9)), 0),
    "to a bias": (lambda x, m: x + (DISTANCE + m), S),
    "twice": (lambda x, m: x + m + m, 0),
    "and a low mask": (lambda x, m: x + m + additive_causal(), S),
}
"""What else happens to the scores, and the rows of the bias that a kernel gets. None where it would round otherwise."""


def _signed(one: Tensor, two: Tensor) -> Tensor:
    """-inf where the first mask is 0, whatever the second is: 1 / -0.0."""
    return (1 / ((one.float() - 1) * (two.float() * 0.0))).clamp(max=0)


def biased_where(seen: Tensor, bias: Callable[[Tensor], Tensor]) -> Match:
    """A bias that is no number, or infinite, where a mask overwrites it."""
    return Match(
        lambda q, k, v: torch.softmax(scores(q, k) + torch.where(seen, bias(DISTANCE), -torch.inf), -1) @ v,
        bias=(1, 1, S, S),
    )


MATCH = {
    **{
        f"-1e9 added {name}": Match(padded(change), all_padding, bias=(B, 1, rows, S))
        for name, (change, rows) in ROUNDED.items()
        if rows
    },
    "a number that absorbs all scores, with a hole, and a bias": Match(
        padded(lambda x, m: x + DISTANCE + m.minimum(HOLE), LOW), all_padding, bias=(B, 1, S, S)
    ),
    "scores written as an output": Match(
        lambda q, k, v: (lambda x: torch.softmax(torch.mul(x, 0.3, out=x), -1) @ v)(scores(q, k)), scale=0.15
    ),
    "zeros whose signs hide": Match(
        lambda q, k, v: torch.softmax(scores(q, k) + (1 / torch.where(CAUSAL, 0.0, -0.0)).clamp(max=0), -1) @ v,
        mask="causal(offset=0)",
    ),
    "zeros whose signs hide, in a table of two masks": Match(
        lambda q, k, v, attention_mask, other_mask: (
            torch.softmax(scores(q, k) + _signed(attention_mask.roll(1, -1), other_mask.roll(1, -1))[:, None, None], -1)
            @ v
        ),
        lambda: (*with_padding(), torch.randint(0, 2, (B, S))),
        bias=(B, 1, 1, S),
    ),
    "a bias that is infinite where it is hidden": biased_where(DISTANCE > 0, lambda x: 1 / x),
    "a bias that is no number where it is hidden": biased_where(DISTANCE >= 0, lambda x: (x + 1).log()),
    "one softmax over two blocks of keys": Match(two_blocks, scale=0.25),
    "a guarded sum": Match(guarded(-1)),
    "a mask whose live value is 2": distilbert(2),
    "a look-ahead of three": Match(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(S, S).tril(3).bool()),
        mask="causal(offset=3)",
    ),
    "a dropped window": Match(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=CAUSAL.triu(-5)),
        mask="sliding_window(6)",
    ),
    "GPT-2 with left padding": Match(two_masks(LOW, LOW), with_padding, bias=(B, 1, S, S)),
    "GPT-2 with left padding, the other way round": Match(
        two_masks(LOW, LOW, padding_first=True), with_padding, "key_padding(attention_mask) & causal(offset=0)"
    ),
    "GPT with left padding: -1e4 in place of a score, and a much lower number added": Match(
        two_masks(LOW, -1e4), with_padding, bias=(B, 1, S, S)
    ),
    "padding alone": Match(
        lambda q, k, v, attention_mask: F.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask[:, None, None].bool()
        ),
        with_padding,
        "key_padding(attention_mask)",
    ),
    "an output in float16": Match(lambda q, k, v: (torch.softmax(scores(q, k), -1) @ v).half()),
    "a scale that is not the usual one": Match(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.0625), scale=0.0625
    ),
}

KEEP = {
    **{
        f"{name} in {kind} alone": Keep(attention(kind), f"is {str(kind).removeprefix('torch.')}, and no kernel rounds")
        for kind in (torch.float16, torch.bfloat16)
        for name, attention in {
            "scores": lambda kind: lambda q, k, v: torch.softmax(scores(q, k).to(kind).float(), -1) @ v,
            "a product": lambda kind: lambda q, k, v: torch.softmax(scores(q.to(kind), k.to(kind)).float(), -1) @ v,
            "weights": lambda kind: lambda q, k, v: torch.softmax(scores(q, k), -1).to(kind).float() @ v,
        }.items()
    },
    **{
        f"{name} of the value along the keys": Keep(
            lambda q, k, v, copied=copied: torch.softmax(scores(q, torch.cat([k, 2 * k], 2)), -1) @ copied(v),
            "the value has copies of its elements along the keys",
        )
        for name, copied in {
            "two copies": lambda v: torch.cat([v, v], 2),
            "interleaved copies": lambda v: v.repeat_interleave(2, 2),
        }.items()
    },
    **{
        f"an exponential less the logsumexp of {name}": Keep(
            lambda q, k, v, other=other: (lambda x: (x - other(x).logsumexp(-1, keepdim=True)).exp() @ v)(scores(q, k)),
            "its exponentials are normalised in a way that no rule knows",
        )
        for name, other in {"rounded scores": lambda x: x.half(), "other scores": lambda x: 2 * x}.items()
    },
    "an exponential less the logarithm of a rounded sum": Keep(
        lambda q, k, v: (lambda x: (x - x.half().exp().sum(-1, True).log()).exp() @ v)(scores(q, k) / 9),
        "its exponentials are normalised in a way that no rule knows",
    ),
    "two copies of the key": Keep(
        lambda q, k, v: torch.softmax(scores(q, torch.cat([k, k], 2)), -1) @ torch.cat([v, 2 * v], 2),
        "the key has copies of its elements along the keys",
    ),
    "scores that are infinite in float16": Keep(
        lambda q, k, v: torch.softmax(scores(200 * q, 200 * k).half(), -1) @ v.half(),
        "is float16, and no kernel rounds",
    ),
    **{
        f"-1e9 added {name}": Keep(padded(change), "sees no key", all_padding)
        for name, (change, rows) in ROUNDED.items()
        if not rows
    },
    "two inputs added, which may be two masks": Keep(
        lambda q, k, v, b: torch.softmax(scores(q, k) + b + b.square(), -1) @ v, "sees no key", with_bias(S, S)
    ),
    "a low number added, then -1e4 put in place": Keep(
        two_masks(LOW, -1e4, padding_first=True), "sees no key", with_padding
    ),
    "-1e4 in place of a score, and one not much lower added": Keep(two_masks(-1e9, -1e4), "sees no key", with_padding),
    "two numbers, each in place of a score": Keep(
        lambda q, k, v, attention_mask: (
            torch.softmax(
                scores(q, k).masked_fill(~CAUSAL, -1e9).masked_fill(attention_mask[:, None, None] == 0, -2e9), -1
            )
            @ v
        ),
        "sees no key",
        with_padding,
    ),
    "softmax over the queries": Keep(lambda q, k, v: torch.softmax(q @ k.mT, -2) @ v, "sum over the keys"),
    "softmax over the queries, then divided by the sum over the keys": Keep(slots, "sum over the keys"),
    "scores written together from two products": Keep(
        lambda q, k, v: torch.softmax(torch.slice_scatter(scores(q, k), scores(q, k[:, :, :6]) * 2, 3, 0, 6), -1) @ v,
        "piece by piece",
    ),
    "one key": Keep(lambda q, k, v: torch.softmax(q @ k[:, :, :1].mT, -1) @ v[:, :, :1], "only one key"),
    "one key and one query": Keep(
        lambda q, k, v: torch.softmax(q[:, :, :1] @ k[:, :, :1].mT, -1) @ v[:, :, :1], "only one key"
    ),
    **{
        f"{name} added to the scores, {'beside a sink' if sink else 'then a softcap'}": Keep(
            shifted(shift, sink), "side leads" if name == "a number" else "also read by" if sink else "softcap"
        )
        for name, shift in SHIFTS.items()
        for sink in (False, True)
    },
    "weights times themselves": Keep(
        lambda q, k, v: (lambda w: w @ w.mT)(torch.softmax(scores(q, k), -1)), "with a value alone"
    ),
    "no query": Keep(lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :0], k, v), "no elements"),
    "no batch": Keep(lambda q, k, v: torch.softmax(scores(q[:0], k[:0]), -1) @ v[:0], "no elements"),
    "scores of 8 bits": Keep(
        lambda q, k, v: torch.softmax(scores(q, k).to(torch.float8_e4m3fn).float(), -1) @ v, "no rule knows it"
    ),
    **{
        f"a guarded sum, less the maximum along {dim}": Keep(guarded(dim), "may change the sum")
        for dim in (-2, (-2, -1), (0, 1, 2, 3))
    },
    "a guarded sum, less twice the maximum": Keep(guarded(-1, 2), "may change the sum"),
    "a guard that is not small": Keep(guarded(-1, limit=2.0), "may change the sum"),
    "one feature of the query, times all of the key": Keep(
        lambda q, k, v: torch.softmax(torch.einsum("bhid,bhjd->bhij", q[..., :1], k), -1) @ v, "a single feature"
    ),
    "scores rounded by a division": Keep(
        lambda q, k, v: torch.softmax(torch.div(scores(q, k), 0.1, rounding_mode="trunc"), -1) @ v, "no rule knows it"
    ),
    "softmax over the heads": Keep(lambda q, k, v: torch.softmax(q @ k.mT, 1) @ v, "keys"),
    "softmax over the batch": Keep(lambda q, k, v: torch.softmax(q @ k.mT / 2, 0) @ v, "keys"),
    "softmax over the queries, sizes equal": Keep(lambda q, k, v: torch.softmax(q @ k.mT, -2) @ v, "keys", cubes),
    "softmax over the heads, sizes equal": Keep(lambda q, k, v: torch.softmax(q @ k.mT, 1) @ v, "keys", cubes),
    "softmax over the batch, sizes equal": Keep(lambda q, k, v: torch.softmax(q @ k.mT, 0) @ v, "keys", cubes),
    "weights transposed": Keep(lambda q, k, v: torch.softmax(q @ k.mT, -1).mT @ v, "sum over the keys"),
    "weights transposed, sizes equal": Keep(lambda q, k, v: torch.softmax(q @ k.mT, -1).mT @ v, "keys", cubes),
    "a gate after the softmax": Keep(
        lambda q, k, v, g: (torch.softmax(scores(q, k), -1) * torch.sigmoid(g)) @ v,
        "differs by query and key",
        with_bias(B, H, S, S),
    ),
}


def masked(q: Tensor, k: Tensor, m: Tensor) -> Tensor:
    return scores(q, k).masked_fill(m[:, None, None] == 0, -1e9)


def low_bias() -> tuple[Tensor, ...]:
    """Query, key, value and a float mask [B, S, S] that hides some keys by a very low number."""
    seen = torch.rand(B, 1, S) < 0.6
    seen[0] = False
    return (*qkv(), torch.where(seen, 0.0, -1e10).expand(B, S, S))


def formed_like(form: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Another tensor takes a form from the weights, and is what meets the value."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = torch.softmax(scores(q, k), -1)
        return form(p + 0.5, p) @ v

    return attention


RIGHT = {
    **{
        f"{name} of masked scores": Right(
            lambda q, k, v, m, change=change: torch.softmax(change(masked(q, k, m)), -1) @ v, with_padding
        )
        for name, change in {
            "less the mean": lambda x: x - x.mean(-1, keepdim=True),
            "less a multiple of the maximum": lambda x: torch.sub(x, x.amax(-1, keepdim=True), alpha=1e6),
        }.items()
    },
    "a shift that rounds bfloat16": Right(
        lambda q, k, v: torch.softmax(scores(q, k) + 100, -1) @ v, lambda: tuple(x.bfloat16() for x in qkv())
    ),
    "a shift that is multiplied later": Right(lambda q, k, v: torch.softmax((scores(q, k) / 100 + 1000) * 100, -1) @ v),
    "weights divided by zero, without NaN": Right(
        lambda q, k, v, g: (torch.softmax(scores(q, k), -1) / (g > 0).float()).nan_to_num(0.0, 0.0, 0.0) @ v,
        with_bias(B, 1, S, 1),
    ),
    "a mask as the addend of a product, then a causal one": Right(
        lambda q, k, v, m: (
            torch.softmax(
                (scores(q, k) + torch.baddbmm(m, q[:, 0], k[:, 0].mT)[:, None]).masked_fill(~CAUSAL, -1e9), -1
            )
            @ v
        ),
        low_bias,
    ),
    "a mask in an einsum alone, then a causal one": Right(
        lambda q, k, v, m: (
            torch.softmax((scores(q, k) + torch.einsum("bqk->bqk", m)[:, None]).masked_fill(~CAUSAL, -1e9), -1) @ v
        ),
        low_bias,
    ),
    **{
        f"another tensor that is formed like the weights, by {name}": Right(formed_like(form))
        for name, form in {
            "type_as": lambda x, p: x.type_as(p),
            "expand_as": lambda x, p: x.expand_as(p),
            "view_as": lambda x, p: x.view_as(p),
            "reshape_as": lambda x, p: x.reshape_as(p),
            "to": lambda x, p: x.to(p),
            "copy": lambda x, p: torch.ops.aten.copy(p, x),
            "broadcast_tensors": lambda x, p: torch.broadcast_tensors(p, x)[1],
        }.items()
    },
    "a tensor that is formed like the output": Right(
        lambda q, k, v: (q * 2.0).expand_as(F.scaled_dot_product_attention(q, k, v)) + 1.0
    ),
    "a padding mask of more than the batch": Right(
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m[:B, None, None]),
        lambda: (*qkv(), torch.rand(B + 1, S) < 0.7),
    ),
    "a mean over a length, an integer tensor": Right(
        lambda q, k, v, n: torch.softmax(scores(q, k), -1) @ v / (n + 1), lambda: (*qkv(), torch.tensor([3]))
    ),
    "a constant in a torch.vmap": Right(
        lambda q, k, v: torch.vmap(lambda q, k, v: torch.softmax(q @ k.mT * torch.tensor(0.3), -1) @ v)(q, k, v)
    ),
    "constants in the branches of torch.cond": Right(
        lambda q, k, v: F.scaled_dot_product_attention(
            torch.cond(q.sum() > 0, lambda q: q + torch.tensor(2.0), lambda q: q * torch.tensor(3.0), (q,)), k, v
        )
    ),
    "keys of 8 bits": Right(
        lambda q, k, v: torch.softmax(scores(q, k.to(torch.float8_e4m3fn).float()), -1) @ v,
    ),
    "linear attention": Right(lambda q, k, v: torch.softmax(q, -1) @ (torch.softmax(k, -2).mT @ v)),
    "key with heads and rows swapped, sizes equal": Right(
        lambda q, k, v: torch.softmax(q @ k.permute(0, 2, 1, 3).mT / 2, -1) @ v, cubes
    ),
    "key with batch and features swapped, sizes equal": Right(
        lambda q, k, v: torch.softmax(q @ k.permute(3, 1, 2, 0).mT / 2, -1) @ v, cubes
    ),
    "key with batch and rows swapped, sizes equal": Right(
        lambda q, k, v: torch.bmm(torch.softmax(torch.bmm(q, k.permute(1, 2, 0)), -1), v),
        lambda: tuple(x[0] for x in cubes()),
    ),
    "value transposed, sizes equal": Right(lambda q, k, v: torch.softmax(scores(q, k), -1) @ v.mT, cubes),
    "key not transposed, sizes equal": Right(lambda q, k, v: torch.softmax(q @ k / 2, -1) @ v, cubes),
    "query and key swapped, sizes equal": Right(lambda q, k, v: torch.softmax(scores(k, q), -1) @ v, cubes),
    "left padding with finfo.min": Right(left_padded, with_padding),
    "rows without a key, -inf": Right(
        lambda q, k, v: torch.softmax(scores(q, k) + CAUSAL.float().tril(-1).log(), -1) @ v
    ),
    "rows without a key, finfo.min": Right(
        lambda q, k, v: torch.softmax(scores(q, k) + (1 - CAUSAL.float().tril(-1)) * LOW, -1) @ v
    ),
    "rows without a key, scaled_dot_product_attention": Right(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=CAUSAL.tril(-1))
    ),
    "whole rows pushed down (DeBERTa)": Right(
        lambda q, k, v, attention_mask: (
            torch.softmax(scores(q, k) + (1 - attention_mask[:, None, :, None].float()) * LOW, -1) @ v
        ),
        with_padding,
    ),
    "a prefix that sees itself": Right(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=CAUSAL | (torch.arange(S) < 6))
    ),
    "the value is the weights' own": Right(lambda q, k, v: _squared(torch.softmax(scores(q, k), -1))),
    "a pooling": Right(lambda q, k, v: torch.softmax(v @ k[:1, :1, 0, :, None], -2).mT @ v),
}


def _squared(p: Tensor) -> Tensor:
    return p @ p
