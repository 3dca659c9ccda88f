"""Where batch, heads, queries, keys and features lie."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.patterns.cases import CAUSAL, LOW, B, D, H, Match, Right, S, additive_causal, cubes, folded, qkv, rows

E = H * D


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * 0.25, -1) @ v


def einsum(first: str, second: str, mask: Tensor | None = None) -> Match:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum(first, q, k) * 0.25
        return torch.einsum(second, (scores if mask is None else scores.masked_fill(~mask, LOW)).softmax(-1), v)

    inputs = qkv if first.startswith("bh") else rows
    return Match(attention, inputs, "none" if mask is None else "causal(offset=0)", heads=(H, H))


class Projected(nn.Module):
    """One projection for query, key and value, cut in one of many ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.qkv = how, nn.Linear(32, 3 * E)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        if self.how == "unbind":
            q, k, v = y.view(B, S, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.how == "index":
            y = y.view(B, S, 3, H, D).permute(2, 0, 3, 1, 4)
            q, k, v = y[0], y[1], y[2]
        elif self.how == "each head's own":
            q, k, v = y.view(B, S, H, 3 * D).transpose(1, 2).chunk(3, -1)
        elif self.how == "neox":
            y = y.view(B, S, H, 3, D)
            q, k, v = (y[..., i, :].transpose(1, 2) for i in range(3))
        else:
            cut = {"chunk": lambda: y.chunk(3, -1), "split": lambda: y.split(E, -1)}
            parts = cut[self.how]() if self.how in cut else (y[..., :E], y[..., E : 2 * E], y[..., 2 * E :])
            q, k, v = (part.view(B, S, H, D).transpose(1, 2) for part in parts)
        return (attend(3 * q, 3 * k, v)).transpose(1, 2).reshape(B, S, E)


class Learned(nn.Module):
    """Learned queries, the same for the whole batch (a resampler)."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, H, 8, D))

    def forward(self, k: Tensor, v: Tensor) -> Tensor:
        return attend(self.queries.expand(B, -1, -1, -1), k, v)


class LearnedOnce(Learned):
    """The batch is never written down."""

    def forward(self, k: Tensor, v: Tensor) -> Tensor:
        return attend(self.queries, k, v)


def transposed_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys by queries: the softmax runs over dim -2."""
    return torch.softmax(k @ q.transpose(2, 3) * 0.25, -2).transpose(2, 3) @ v


def features_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Key and value as [B, H, D, S], the output too (the layout of Neuron's own kernels)."""
    k, v = k.transpose(2, 3), v.transpose(2, 3)
    return v @ torch.softmax(q @ k * 0.25, -1).transpose(2, 3)


def permuted_form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax over dim 1 of K Q^T on folded heads, with the value transposed."""
    p = torch.softmax(torch.bmm(k, q.transpose(1, 2)) * 0.25, dim=1)
    return torch.bmm(v.transpose(1, 2), p).transpose(1, 2)


def windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Swin: windows folded into the batch, with a mask for each window."""
    w = 3
    q, k, v = (x.view(B, H, w, S // w, D).transpose(1, 2).reshape(B * w, H, S // w, D) for x in (q, k, v))
    mask = torch.where(torch.arange(w)[:, None, None] == 1, additive_causal()[: S // w, : S // w], 0.0)
    scores = (q @ k.mT * 0.25).view(B, w, H, S // w, S // w) + mask[:, None]
    return torch.softmax(scores.view(B * w, H, S // w, S // w), -1) @ v


def by_elements(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Products spelled as multiplication and sum."""
    p = torch.softmax((q[:, :, :, None] * k[:, :, None]).sum(-1) * 0.25, -1)
    return (p[..., None] * v[:, :, None]).sum(-2)


def one_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query without a dim of its own."""
    p = torch.softmax(torch.einsum("bhd,bhkd->bhk", q[:, :, 0], k) * 0.25, -1)
    return torch.einsum("bhk,bhkd->bhd", p, v)


def keys_in_two_dims(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys on a grid of 4 by 6, flattened for the softmax alone."""
    scores = torch.einsum("bhqd,bhxyd->bhqxy", q, k.view(B, H, 4, 6, D)) * 0.25
    p = scores.flatten(-2).softmax(-1).view(B, H, S, 4, 6)
    return torch.einsum("bhqxy,bhxyd->bhqd", p, v.view(B, H, 4, 6, D))


MATCH = {
    "key transposed by permute": Match(lambda q, k, v: torch.softmax(q @ k.permute(0, 1, 3, 2) / 4, -1) @ v),
    "key transposed twice": Match(
        lambda q, k, v: torch.softmax(q @ k.permute(0, 3, 1, 2).transpose(1, 2) * 0.25, -1) @ v
    ),
    "key given transposed": Match(
        lambda q, k, v: torch.softmax(q @ k * 0.25, -1) @ v,
        lambda: (torch.randn(B, H, S, D), 3 * torch.randn(B, H, D, S), torch.randn(B, H, S, D)),
    ),
    "rows, transposed": Match(
        lambda q, k, v: attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), rows, heads=(H, H)
    ),
    "rows, key by one permute": Match(
        lambda q, k, v: torch.softmax(q.transpose(1, 2) @ k.permute(0, 2, 3, 1), -1) @ v.transpose(1, 2), rows
    ),
    "rows and key by one permute, sizes equal": Match(
        lambda q, k, v: torch.softmax(q.transpose(1, 2) @ k.permute(0, 2, 3, 1), -1) @ v.transpose(1, 2), cubes
    ),
    "folded heads": Match(
        lambda q, k, v: torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.25, -1), v), folded
    ),
    "folded for the products alone": Match(
        lambda q, k, v: _folded_products(q, k, v), mask="causal(offset=0)", heads=(H, H)
    ),
    "one head, three dims": Match(attend, lambda: tuple(3 * torch.randn(B, S, D) for _ in "qkv")),
    "two dims": Match(attend, lambda: tuple(3 * torch.randn(S, D) for _ in "qkv")),
    "cross attention": Match(attend, lambda: (qkv()[0], *(3 * torch.randn(B, H, S + 7, D) for _ in "kv"))),
    "one query row": Match(attend, lambda: (3 * torch.randn(B, H, 1, D), *qkv()[1:])),
    "one query, no dim": Match(one_query),
    "one batch": Match(attend, lambda: tuple(x[:1] for x in qkv())),
    "one feature": Match(attend, lambda: tuple(x[..., :1] for x in qkv())),
    "other value width": Match(attend, lambda: (*qkv()[:2], 3 * torch.randn(B, H, S, 24))),
    "einsum bhqd": einsum("bhqd,bhkd->bhqk", "bhqk,bhkd->bhqd"),
    "einsum over rows": einsum("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", CAUSAL),
    "einsum that permutes a mask": Match(
        lambda q, k, v, mask: (
            torch.softmax(q @ k.mT - 1e30 * torch.einsum("kb->bk", 1 - mask.mT.float())[:, None, None], -1) @ v
        ),
        lambda: (*qkv(), torch.ones(B, S, dtype=torch.bool)),
        "key_padding(mask)",
    ),
    "einsum in other letters": einsum("blhe,bshe->bhls", "bhls,bshd->blhd"),
    "einsum with dots": einsum("...qhd,...khd->...hqk", "...hqk,...khd->...qhd"),
    "einsum, heads last in the scores": Match(
        lambda q, k, v: torch.einsum(
            "bqkh,bkhd->bqhd", torch.softmax(torch.einsum("bqhd,bkhd->bqkh", q, k) * 0.25, 2), v
        ),
        rows,
    ),
    "keys by queries": Match(transposed_scores),
    "features first": Match(features_first),
    "softmax over dim 1 of K Q^T": Match(permuted_form, folded),
    "windows folded into the batch": Match(windows, bias=(6, 1, 8, 8)),
    "multiplied and summed": Match(by_elements),
    "a grid of keys": Match(keys_in_two_dims),
    "linear as a product": Match(
        lambda q, k, v: torch.softmax(torch.nn.functional.linear(q, k * 0.25), -1) @ v,
        lambda: tuple(3 * torch.randn(S, D) for _ in "qkv"),
    ),
    "learned queries": Match(Learned(), lambda: qkv()[1:]),
    "learned queries that broadcast": Match(LearnedOnce(), lambda: qkv()[1:]),
    **{
        f"one projection, {how}": Match(Projected(how), lambda: (torch.randn(B, S, 32),), heads=(H, H))
        for how in ("chunk", "split", "slice", "unbind", "index", "each head's own", "neox")
    },
}


def _folded_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """BART of old: bmm on [B * H, S, D], the mask added on [B, H, S, S]."""
    q, k, v = (x.reshape(B * H, S, D) for x in (q, k, v))
    scores = torch.bmm(q * 0.25, k.transpose(1, 2)).view(B, H, S, S) + additive_causal()
    return torch.bmm(torch.softmax(scores.view(B * H, S, S), -1), v).view(B, H, S, D)


RIGHT = {
    "heads and rows mixed up by a view": Right(lambda q, k, v: attend(*(x.view(B, H, S, D) for x in (q, k, v))), rows),
    "query rows in another order": Right(lambda q, k, v: attend(q.flip(2), k, v)),
}
