"""Scores that are a sum of several products, over different features of the same rows and keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.patterns.cases import CAUSAL, LOW, B, D, H, Keep, Match, Right, S, repeat_kv, with_padding

R = 8
"""Rotary features, beside D others."""
Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def parts(heads: int = 1, rotary_heads: int = 1, dtype: torch.dtype = torch.float32) -> Callable[[], Parts]:
    """Query and key over D features, and over R others. The value is the first key."""

    def inputs() -> Parts:
        q, r = (torch.randn(B, H, S, n, dtype=dtype) for n in (D, R))
        k, s = (torch.randn(B, h, S, n, dtype=dtype) for h, n in ((heads, D), (rotary_heads, R)))
        return 2 * q, k, 2 * r, s

    return inputs


def of(scores: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
        return scores(q, k, r, s).softmax(-1) @ k

    return attention


def latent(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """Latent attention with absorbed weights: one shared latent vector for each key, which is the value as well."""
    return (q @ k.mT + r @ s.mT) * 0.2


def by_einsum(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """Rows before heads, keys without heads, and the scale and the mask outside."""
    q, r, k, s = q.transpose(1, 2), r.transpose(1, 2), k[:, 0], s[:, 0]
    scores = torch.einsum("bshc,btc->bsht", q, k) + torch.einsum("bshr,btr->bsht", r, s)
    p = (scores * 0.2 + torch.where(CAUSAL, 0.0, -torch.inf)[:, None]).softmax(-1)
    return torch.einsum("bsht,btc->bshc", p, k)


def by_baddbmm(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    q, k, r, s = (x.expand(-1, H, -1, -1).flatten(0, 1) for x in (q, k, r, s))
    scores = torch.baddbmm(torch.bmm(r, s.mT), q, k.mT, beta=0.2, alpha=0.2)
    return (scores.softmax(-1) @ k).unflatten(0, (B, H))


def of_one_cache(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """Both keys are pieces of one tensor, the rotary one first."""
    s, k = torch.cat([s, k], -1).cos().split((R, D), -1)
    return latent(q, k, r, s).softmax(-1) @ k


def three(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    return q @ k.mT * 0.2 + (r @ s.mT * 0.3 - 0.1 * (r.flip(-1) @ s.mT))


def masked_between(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    return (q @ k.mT * 0.2).masked_fill(~CAUSAL, -torch.inf) + r @ s.mT * 0.2


def in_pieces(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """Each of two blocks of keys has a sum of two products."""
    old, new = (latent(q, a, r, b) for a, b in zip(k.split((20, 4), 2), s.split((20, 4), 2), strict=True))
    return torch.cat([old, new], -1).softmax(-1) @ k


def merged_pieces(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    (k0, k1), (s0, s1) = k.split((20, 4), 2), s.split((20, 4), 2)
    a, b = latent(q, k0, r, s0).exp(), latent(q, k1, r, s1).exp()
    return (a @ k0 + b @ k1) / (a.sum(-1, True) + b.sum(-1, True))


def grouped(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    k = repeat_kv(k)
    return latent(q, k, r, s).softmax(-1) @ k


def softcap_in_one(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    return 5 * torch.tanh(q @ k.mT * 0.04) + r @ s.mT * 0.2


def tensor_scale_in_one(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    return q @ k.mT * 0.2 * q.sum(-1, keepdim=True).sigmoid() + r @ s.mT * 0.2


def hidden_by_a_number(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """What the mask hides in the first part is still told apart by the second one in rows that see no key."""
    seen = torch.arange(S) > S // 2
    return (q @ k.mT * 0.2).masked_fill(~(CAUSAL & seen), -1e4) + r @ s.mT * 0.2


def shared_by_heads(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    return q @ k.mT * 0.2 + r[:, :1] @ s.mT * 0.2


def of_each_key(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """The same for all rows."""
    return q @ k.mT * 0.2 + r[:, :, :1] @ s.mT


def relative(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """A key for each pair of positions: it runs over the rows as well."""
    pairs = s[:1, 0, :, None] - s[:1, 0, None]
    return q @ k.mT * 0.2 + torch.einsum("bhld,xlrd->bhlr", r, pairs)


def gathered(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """The product with a key for each distance, as in DeBERTa."""
    at = torch.arange(S)[:, None] - torch.arange(S) + S - 1
    distances = torch.cat([s, s.flip(2)[:, :, 1:]], 2)
    return q @ k.mT * 0.2 + torch.gather(r @ distances.mT, -1, at.expand(B, H, S, S)) * 0.2


def one_feature(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    return q @ k.mT * 0.2 + r[..., :1] @ s[..., :1].mT


def alibi(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """Slopes of the heads times positions, as a product."""
    slopes = torch.stack([torch.arange(1.0, 1 + H), torch.zeros(H)], -1)[:, None].expand(B, H, S, 2)
    at = torch.stack([torch.arange(S).float(), torch.ones(S)], -1)
    return q @ k.mT * 0.2 + slopes @ at.mT * 0.1


def lowered(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """A number so low that it may hide keys."""
    return q @ k.mT * 0.2 + r @ s.mT * -1e5


def padded(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
    """Keys are seen by rows that are not padding either: a product of masks."""
    m = attention_mask.float()
    return (q @ k.mT * 0.2 - 1e9 * (1 - m[:, :, None] @ m[:, None])[:, None]).softmax(-1) @ v


def low_if_both_padded(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
    """A product of two features, which are 1 for padding."""
    m = torch.stack([1 - attention_mask] * 2, -1).float()[:, None].expand(B, H, S, 2)
    return (q @ k.mT * 0.2 - 5000 * m @ m.mT).softmax(-1) @ v


def masked_before(fill: float) -> Callable[..., Tensor]:
    """The mask is added to one part. In rows that see no key, a low number rounds the scores."""

    def attention(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = torch.where(CAUSAL & attention_mask[:, None, None].bool(), 0.0, fill)
        return ((q @ k.mT * 0.25 + hidden) + q[..., :R] @ k[..., -R:].mT * 0.25).softmax(-1) @ v

    return attention


def written_between(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    scores = r @ s.mT * 0.2
    s.add_(1)
    out = (q @ k.mT * 0.2 + scores).softmax(-1) @ k
    s.sub_(1)
    return out


def read(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    rotary = r @ s.mT
    return (q @ k.mT * 0.2 + rotary).softmax(-1) @ k, rotary


def detached(q: Tensor, k: Tensor, r: Tensor, s: Tensor) -> Tensor:
    return q @ k.mT * 0.2 + (r @ s.mT * 0.2).detach()


ONE, ALL = (H, 1), (H, H)
DENSE = (B, H, S, S)

MATCH = {
    "latent": Match(of(latent), parts(), scale=0.2, heads=ONE),
    "latent, with einsum": Match(by_einsum, parts(), "causal(offset=0)", heads=ONE),
    "latent, with baddbmm": Match(by_baddbmm, parts(), scale=0.2),
    "keys of one cache": Match(of_one_cache, parts(), scale=0.2, heads=ONE),
    "two scales": Match(of(lambda q, k, r, s: q @ k.mT * 0.2 + r @ s.mT / 3), parts(), scale=1 / 3, heads=ONE),
    "a scale of one query": Match(of(lambda q, k, r, s: (q * 0.2) @ k.mT + 0.3 * (r @ s.mT)), parts(), scale=0.3),
    "one part subtracted": Match(of(lambda q, k, r, s: q @ k.mT * 0.2 - r @ s.mT * 0.2), parts(), heads=ONE),
    "rotary part first": Match(of(lambda q, k, r, s: r @ s.mT + q @ k.mT), parts(), scale=1.0, heads=ONE),
    "three products": Match(of(three), parts(), scale=0.3, heads=ONE),
    "keys of heads beside shared ones": Match(of(latent), parts(heads=H), scale=0.2, heads=ALL),
    "shared keys beside those of heads": Match(of(latent), parts(rotary_heads=H), scale=0.2, heads=ALL),
    "grouped heads": Match(grouped, parts(heads=2), scale=0.2, heads=(H, 2)),
    "one row": Match(of(lambda q, k, r, s: latent(q[:, :, -1:], k, r[:, :, -1:], s)), parts(), scale=0.2, heads=ONE),
    "a mask of -inf in between": Match(of(masked_between), parts(), "causal(offset=0)", scale=0.2, heads=ONE),
    "in bfloat16": Match(of(latent), parts(dtype=torch.bfloat16), scale=0.2, heads=ONE),
    "two scales in bfloat16": Match(
        of(lambda q, k, r, s: q @ k.mT * 0.2 + r @ s.mT / 3), parts(dtype=torch.bfloat16), heads=ONE
    ),
    "two scales in float16": Match(
        of(lambda q, k, r, s: q @ k.mT * 0.2 + r @ s.mT / 3), parts(dtype=torch.float16), heads=ONE
    ),
    "in pieces": Match(in_pieces, parts(), scale=0.2, heads=ONE),
    "in pieces with one sum": Match(merged_pieces, parts(), scale=0.2, heads=ONE),
    # These stay dense operands.
    "one part in a softcap": Match(of(softcap_in_one), parts(), bias=DENSE),
    "one part under a tensor scale": Match(of(tensor_scale_in_one), parts(), bias=DENSE),
    "a part that is shared by heads": Match(of(shared_by_heads), parts(), bias=(B, 1, S, S)),
    "a part that is the same for all rows": Match(of(of_each_key), parts(), bias=(B, H, 1, S)),
    "relative keys": Match(of(relative), parts(), bias=DENSE),
    "gathered distances": Match(of(gathered), parts(), bias=DENSE),
    "a part of one feature": Match(of(one_feature), parts(), bias=DENSE),
    "slopes as a product": Match(of(alibi), parts(), bias=DENSE),
    "a part with a large factor": Match(of(lowered), parts(), bias=DENSE),
}

KEEP = {
    "a part that is written in between": Keep(written_between, "is written after", parts()),
    "a far smaller scale in float16": Keep(
        of(lambda q, k, r, s: q @ k.mT * 0.2 + r @ s.mT / 3000), "is a dense operand", parts(dtype=torch.float16)
    ),
    "a part that is read": Keep(read, "its scores are also read", parts()),
}

RIGHT = {
    "a part without gradients": Right(of(detached), parts()),
    "hidden by a number in one part": Right(of(hidden_by_a_number), parts()),
    "a product of masks": Right(padded, with_padding),
    **{f"a mask of {fill} before": Right(masked_before(fill), with_padding) for fill in (-1e9, -1e12, LOW, -torch.inf)},
    "a product of masks with two features": Right(low_if_both_padded, with_padding),
    "a mask of finfo.min in between": Right(
        of(lambda q, k, r, s: q @ k.mT * 0.2 + torch.full((S, S), LOW).triu(1) + r @ s.mT * 0.2), parts()
    ),
}
