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


def merged_causal(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    """Each row sees a new key, so that not all keys of both parts can be hidden."""
    return merged(old_scores(q, kc, length), new_scores(q, kn).masked_fill(~CAUSAL[:NEW, :NEW], -1e30), vc, vn)


def with_sink(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    sink = torch.arange(H).float()[:, None, None].expand(B, H, q.shape[2], 1)
    s = torch.cat([old_scores(q, kc, length), new_scores(q, kn), sink], -1)
    return s.softmax(-1)[..., :-1] @ torch.cat([vc, vn], 2)


def grouped_pieces(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    kc, kn, vc, vn = map(repeat_kv, (kc, kn, vc, vn))
    return joined(q, kc, kn, vc, vn, length)


def grouped_split(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    kc, kn, vc, vn = map(repeat_kv, (kc, kn, vc, vn))
    return shared(old_scores(q, kc, length), new_scores(q, kn), vc, vn)


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


def merged_hidden(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    """The first row sees no new key."""
    new = new_scores(q, kn).masked_fill(~CAUSAL[:NEW, :NEW].roll(1, 0).tril(-1), -1e30)
    return merged(old_scores(q, kc, length), new, vc, vn)


Pieces = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Scores and values of the cache, and those of the new keys, to the output."""


def of(pieces: Pieces, fill: float = -1e30) -> Callable[..., Tensor]:
    def attention(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
        return pieces(old_scores(q, kc, length, fill), new_scores(q, kn), vc, vn)

    return attention


def split(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    a, b = torch.cat([old, new], -1).softmax(-1).split([old.shape[-1], new.shape[-1]], -1)
    return a @ vc + b @ vn


def sliced(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    p = torch.cat([old, new], -1).softmax(-1)
    return p[..., -NEW:] @ vn + p[..., :-NEW] @ vc


def shared(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    largest = torch.maximum(old.amax(-1, True), new.amax(-1, True))
    a, b = (old - largest).exp(), (new - largest).exp()
    total = a.sum(-1, True) + b.sum(-1, True)
    return (a / total) @ vc + (b / total) @ vn


def shared_at_the_end(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    """With max and getitem, without keepdim, divided at the end."""
    largest = torch.maximum(old.max(-1)[0], new.max(-1)[0]).unsqueeze(-1).detach()
    a, b = torch.exp(old - largest), torch.exp(new - largest)
    return (a @ vc + b @ vn) / (a.sum(-1) + b.sum(-1))[..., None]


def no_maximum(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    a, b = old.exp(), new.exp()
    return (a @ vc + b @ vn) * (a.sum(-1, True) + b.sum(-1, True)).reciprocal()


def merged(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    lo, ln = old.logsumexp(-1, True), new.logsumexp(-1, True)
    both = torch.logaddexp(lo, ln)
    return (lo - both).exp() * (old.softmax(-1) @ vc) + (ln - both).exp() * (new.softmax(-1) @ vn)


def merged_by_hand(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    """The log-sum-exps by hand, and merged as exponentials."""
    lo, ln = ((s - s.amax(-1, True)).exp().sum(-1, True).log() + s.amax(-1, True) for s in (old, new))
    top = torch.maximum(lo, ln)
    a, b = (lo - top).exp(), (ln - top).exp()
    return ((old.softmax(-1) @ vc) * a + (new.softmax(-1) @ vn) * b) / (a + b)


def online(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    """Block by block, with a running maximum, sum and output."""
    largest, total, out = None, None, None
    for s, v in ((new, vn), (old[..., :8], vc[:, :, :8]), (old[..., 8:], vc[:, :, 8:])):
        top = s.amax(-1, True) if largest is None else torch.maximum(largest, s.amax(-1, True))
        p = (s - top).exp()
        if largest is None:
            total, out = p.sum(-1, True), p @ v
        else:
            shrink = (largest - top).exp()
            total, out = total * shrink + p.sum(-1, True), out * shrink + p @ v
        largest = top
    return out / total


def one_more_key(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    """Softmax with one more key of score 0 and value 0."""
    s = torch.cat([old, new], -1)
    largest = s.amax(-1, True).clamp(min=0)
    w = (s - largest).exp()
    return (w / (w.sum(-1, True) + (-largest).exp())) @ torch.cat([vc, vn], 2)


def one_more(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    """The same, of one product, without a limit of the maximum, and divided at the end."""
    largest = old.amax(-1, True)
    w = (old - largest).exp()
    return (w @ vc) / (w.sum(-1, True) + torch.exp(0 - largest))


def limited(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    """If all scores are low, all exponentials are 0."""
    most = torch.maximum(old.amax(-1, True), new.amax(-1, True)).clamp(min=0.0)
    a, b = (old - most).exp(), (new - most).exp()
    return (a @ vc + b @ vn) / (a.sum(-1, True) + b.sum(-1, True))


def plus_one(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    w = old.exp()
    return w @ vc / (1 + w.sum(-1, True))


def detached(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    """No gradient flows through the second exponentials."""
    a, b = old.exp(), new.detach().exp()
    return (a @ vc + b @ vn) / (a.sum(-1, True) + b.sum(-1, True))


def detached_once(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    """A maximum that is detached in one place alone: in the gradients it does not cancel."""
    largest = torch.maximum(old.amax(-1, True), new.amax(-1, True))
    a, b = (old - largest).exp(), (new - largest.detach()).exp()
    return (a @ vc + b @ vn) / (a.sum(-1, True) + b.sum(-1, True))


def maximum_of_one(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    """The second exponentials may overflow."""
    largest = old.amax(-1, True)
    a, b = (old - largest).exp(), (new - largest).exp()
    return (a @ vc + b @ vn) / (a.sum(-1, True) + b.sum(-1, True))


def two_maxima(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    a, b = (old - old.amax(-1, True)).exp(), (new - new.amax(-1, True)).exp()
    return (a @ vc + b @ vn) / (a.sum(-1, True) + b.sum(-1, True))


def sum_of_one(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    largest = torch.maximum(old.amax(-1, True), new.amax(-1, True))
    a, b = (old - largest).exp(), (new - largest).exp()
    return (a @ vc + b @ vn) / a.sum(-1, True)


def sum_over_rows(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    """As many rows as new keys: a sum along the rows has the shape of one along the keys."""
    largest = torch.maximum(old.amax(-1, True), new.amax(-1, True))
    a, b = (old - largest).exp(), (new - largest).exp()
    return (a @ vc + b @ vn) / (a.sum(-1, True) + b.sum(-2)[..., None])


def sum_twice(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    a, b = old.exp(), new.exp()
    return (a @ vc + b @ vn) / (a.sum(-1, True) + b.sum(-1, True) + b.sum(-1, True))


def values_twice(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    a, b = old.exp(), new.exp()
    return (a @ vc + b @ vn + b @ vn) / (a.sum(-1, True) + b.sum(-1, True))


def subtracted(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    a, b = old.exp(), new.exp()
    return (a @ vc - b @ vn) / (a.sum(-1, True) + b.sum(-1, True))


def other_exponent(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    largest = torch.maximum(old.amax(-1, True), new.amax(-1, True))
    a, b = (old - largest).exp(), (2 * (new - largest)).exp()
    return (a @ vc + b @ vn) / (a.sum(-1, True) + b.sum(-1, True))


def weighed(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    """Two attentions, mixed by something else than their sums of exponentials."""
    gate = old.amax(-1, True).sigmoid()
    return gate * (old.softmax(-1) @ vc) + (1 - gate) * (new.softmax(-1) @ vn)


def two(key: float) -> Pieces:
    """A number of other keys, whose score is 0: one key whose score is the logarithm."""

    def attention(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
        w = (old / 4).exp()
        return w @ vc / (key + w.sum(-1, True))

    return attention


def guarded(guard: Callable[[Tensor], Tensor]) -> Pieces:
    """A guard of the shared sum against division by zero."""

    def attention(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
        largest = torch.maximum(old.amax(-1, True), new.amax(-1, True))
        a, b = (old - largest).exp(), (new - largest).exp()
        return (a @ vc + b @ vn) / guard(a.sum(-1, True) + b.sum(-1, True))

    return attention


def with_weights_read(old: Tensor, new: Tensor, vc: Tensor, vn: Tensor) -> tuple[Tensor, Tensor]:
    a, b = torch.cat([old, new], -1).softmax(-1).split([old.shape[-1], new.shape[-1]], -1)
    return a @ vc + b @ vn, a


SEEN = "key <= length[batch] - 1"
PRIOR = f"prior {SEEN} & causal(offset={S})"
"""Of two sources: the first keys of the cache, and the new ones up to a query's own."""
BIAS = (B, 1, 1, S + NEW)

MATCH = {
    "weights split": Match(of(split), cached(), scale=0.25, bias=BIAS),
    "weights sliced": Match(of(sliced), cached(), scale=0.25, bias=BIAS),
    "one maximum and one sum": Match(of(shared), cached(), scale=0.25, bias=BIAS),
    "one maximum and one sum, hidden by -inf": Match(of(shared, -torch.inf), cached(), scale=0.25, bias=BIAS),
    "one new key with one maximum and one sum": Match(of(shared), cached(1, rows=1), PRIOR),
    "one maximum and one sum, divided at the end": Match(of(shared_at_the_end), cached(), scale=0.25, bias=BIAS),
    "one maximum and one sum, grouped heads": Match(grouped_split, cached(heads=2), heads=(H, 2), bias=BIAS),
    "no maximum": Match(of(no_maximum), cached(), scale=0.25, bias=BIAS),
    "one maximum and one sum, then NaN to zero": Match(
        lambda *given: of(shared)(*given).nan_to_num(0.0), cached(), scale=0.25, bias=BIAS
    ),
    "merged by log-sum-exp": Match(of(merged), cached(), scale=0.25, bias=BIAS),
    "merged by log-sum-exp, by hand": Match(of(merged_by_hand), cached(), scale=0.25, bias=BIAS),
    "one more key of score 0": Match(of(one_more_key), cached(), scale=0.25, bias=BIAS),
    "one more key of score 0, one product": Match(of(one_more), cached(), SEEN, scale=0.25),
    "one more than the sum": Match(of(plus_one), cached(), SEEN, scale=0.25),
    "a sum with an epsilon": Match(of(guarded(lambda total: total + 1e-12)), cached(), scale=0.25, bias=BIAS),
    "a sum of at least an epsilon": Match(of(guarded(lambda total: total.clamp(min=1e-6))), cached(), bias=BIAS),
    "two more than the sum": Match(of(two(2.0)), cached(), SEEN, scale=0.0625),
    "a quarter more than the sum": Match(of(two(0.25)), cached(), SEEN, scale=0.0625),
    "keys and values joined": Match(joined, cached(), scale=0.25, bias=(B, 1, 1, S + NEW)),
    "one new key and one row": Match(joined, cached(1, rows=1), PRIOR, scale=0.25),
    "one new key": Match(joined, cached(1), scale=0.25, bias=(B, 1, 1, S + 1)),
    "a mask over both": Match(masked_outside, cached(), scale=0.25, bias=(B, 1, 1, S + NEW)),
    "a mask in each": Match(masks_in_both, cached(), PRIOR, scale=0.25),
    "a mask in each, merged by log-sum-exp": Match(merged_causal, cached(), PRIOR, scale=0.25),
    "causal together": Match(constant_masks, cached(), f"causal(offset={S})", scale=1.0),
    "beside a sink": Match(with_sink, cached(), scale=0.25, bias=(B, 1, 1, S + NEW)),
    "grouped heads": Match(grouped_pieces, cached(heads=2), heads=(H, 2), bias=(B, 1, 1, S + NEW)),
    "divided at the end": Match(divided_at_the_end, cached(), scale=0.25, bias=(B, 1, 1, S + NEW)),
    "keys of other layouts": Match(other_layout, cached(), scale=0.25, bias=(B, 1, 1, S + NEW)),
}

KEEP = {
    "no maximum, then NaN to zero": Keep(
        lambda *given: of(no_maximum)(*given).nan_to_num(0.0), "reads the NaN", cached()
    ),
    "a maximum that is never below 0, then NaN to zero": Keep(
        lambda *given: of(limited)(*given).nan_to_num(0.0), "reads the NaN", cached()
    ),
    "merged by log-sum-exp, hidden by -inf": Keep(of(merged, -torch.inf), "may be hidden by -inf", cached()),
    "merged by log-sum-exp, and all may be hidden": Keep(merged_hidden, "all may be hidden", cached()),
    "a part without gradients": Keep(of(detached), "no gradient flows", cached()),
    "a maximum that is detached once": Keep(of(detached_once), "no rule knows", cached()),
    "weights of a part read": Keep(of(with_weights_read), "weights are also read", cached()),
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

RIGHT = {
    "the maximum of one part": Right(of(maximum_of_one), cached()),
    "a maximum for each part": Right(of(two_maxima), cached()),
    "the sum of one part": Right(of(sum_of_one), cached()),
    "a sum over the rows": Right(of(sum_over_rows), cached()),
    "a sum added twice": Right(of(sum_twice), cached()),
    "values added twice": Right(of(values_twice), cached()),
    "values subtracted": Right(of(subtracted), cached()),
    "another exponent in one part": Right(of(other_exponent), cached()),
    "two attentions mixed by a gate": Right(of(weighed), cached()),
    "a sum with a larger epsilon": Right(of(guarded(lambda total: total + 0.01)), cached()),
    "a sum of at least 2": Right(of(guarded(lambda total: total.clamp(min=2.0))), cached()),
    "a sum of at most 2": Right(of(guarded(lambda total: total.clamp(1e-6, 2.0))), cached()),
    "less than the sum": Right(of(two(-0.25)), cached()),
    "block by block": Right(of(online), cached()),
}
