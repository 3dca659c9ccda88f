"""Attentions to the keys of a cache and to new keys: what becomes `flash_prior`, and what must not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given as drawn_from
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from neuron_attn_rewrite import RewriteConfig, RewrittenModule, rewrite
from neuron_attn_rewrite.config.options import TOLERANCES
from tests.helpers import ALWAYS, Function, relative_error

B, H, KV, D = 3, 4, 2, 16
P, S = 24, 4
"""Keys of the cache, and new ones."""
APART = replace(ALWAYS, kernels=("flash_prior",))
flash_prior = torch.ops.neuron_attn.flash_prior.default


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def large(*shape: int) -> Tensor:
    """So large that the softmax prefers some keys."""
    return 3 * torch.randn(*shape)


def operands(new: int = S, rows: int | None = None, heads: int = KV, prior: int = P) -> tuple[Tensor, ...]:
    """The query, the keys of a cache and new ones, and the values of both."""
    q = large(B, H, new if rows is None else rows, D)
    return (q, *(large(B, heads, n, D) for n in (prior, new, prior, new)))


def lengths() -> Tensor:
    """None, some and all keys of the cache."""
    return torch.tensor([0, int(torch.randint(1, P, ())), P])


def left_padding(keys: int) -> Tensor:
    """Of the last batch element everything is padding, so that its rows see no key."""
    seen = torch.arange(keys) >= torch.randint(1, keys // 2, (B, 1))
    seen[-1] = False
    return seen


def band(rows: int, keys: int, offset: int, window: int | None = None) -> Tensor:
    i, j = torch.arange(rows)[:, None] + offset, torch.arange(keys)
    return (j <= i) if window is None else (j <= i) & (j > i - window)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def joined(kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([kc, kn], 2), torch.cat([vc, vn], 2)


def joins(module: RewrittenModule) -> list[torch.fx.Node]:
    """The nodes that put keys or values together."""
    cats = module.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    return [node for node in cats if node.meta["val"].is_floating_point()]


def calls(module: RewrittenModule) -> list[torch.fx.Node]:
    return list(module.graph.find_nodes(op="call_function", target=flash_prior))


def doubled(values: Any) -> Any:
    return [v.double() if v.is_floating_point() else v for v in copy.deepcopy(values)]


def agrees(model: nn.Module, module: RewrittenModule, inputs: tuple[Tensor, ...]) -> None:
    """The result is that of the model in float64, and what it writes into its inputs is the same."""
    exact, given = doubled(inputs), copy.deepcopy(inputs)
    want, found = model.double()(*exact).float(), module(*given)
    assert relative_error(found.nan_to_num(), want.nan_to_num()) <= TOLERANCES[torch.float32], str(module.report)
    for a, b in zip(given, exact, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype))


@dataclass(frozen=True)
class Apart:
    """Becomes one call of `flash_prior`."""

    attention: Callable[..., Tensor]
    inputs: Callable[[], tuple[Tensor, ...]] = operands
    options: dict[str, Any] = field(default_factory=dict)
    """What the call must be given: None for nothing, ... for something."""
    config: RewriteConfig = APART

    def check(self, verify: bool) -> None:
        model = Function(self.attention)
        module = rewrite(model, self.inputs(), config=replace(self.config, verify=verify))
        assert [site.kernel for site in module.report.sites] == ["flash_prior"], str(module.report)
        (call,) = calls(module)
        assert joins(module) == []
        assert (module.report.sites[0].draws > 0) == verify
        for name, wanted in self.options.items():
            given = call.kwargs.get(name)
            assert given == wanted or (wanted is ... and given is not None), (name, given)
        for _ in range(2):
            agrees(model, module, self.inputs())


def cat(window: int | None = None, rows: int = S) -> Callable[..., Tensor]:
    def attention(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
        return attend(q, *joined(kc, kn, vc, vn), band(rows, P + rows, P, window))

    return attention


def cat_unmasked(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    return attend(q, *joined(kc, kn, vc, vn), None)


def cat_padded(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, attention_mask: Tensor) -> Tensor:
    return attend(q, *joined(kc, kn, vc, vn), band(S, P + S, P) & attention_mask[:, None, None])


def cat_padded_window(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, attention_mask: Tensor) -> Tensor:
    return attend(q, *joined(kc, kn, vc, vn), band(S, P + S, P, 7) & attention_mask[:, None, None])


def of_both(length: Tensor, new: Tensor, rows: int = S) -> Tensor:
    """The first keys of the cache, a number for each batch element, and what is seen of the new keys."""
    prior = (torch.arange(P) < length[:, None])[:, None, None].expand(-1, 1, rows, P)
    return torch.cat([prior, new.expand(len(length), 1, *new.shape)], -1)


def cat_lengths(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    return attend(q, *joined(kc, kn, vc, vn), of_both(length, band(S, S, 0)))


def cat_sequence_first(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    """Everything as [batch, length, heads, features]."""
    k, v = torch.cat([kc, kn], 1).transpose(1, 2), torch.cat([vc, vn], 1).transpose(1, 2)
    return attend(q.transpose(1, 2), k, v, band(S, P + S, P)).transpose(1, 2)


def sequence_first() -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2).contiguous() for t in operands())


def repeated(tensor: Tensor) -> Tensor:
    return tensor[:, :, None].expand(-1, -1, H // KV, -1, -1).flatten(1, 2)


def eager(change: Callable[[Tensor], Tensor] = lambda s: s, sink: bool = False) -> Callable[..., Tensor]:
    """Two products and a softmax, with repeated keys, the scores changed before the mask, and perhaps a sink."""

    def attention(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, *more: Tensor) -> Tensor:
        k, v = map(repeated, joined(kc, kn, vc, vn))
        s = change(q @ k.mT * 0.2).masked_fill(~band(S, P + S, P), -torch.inf)
        if sink:
            column = more[0][None, :, None, None].expand(B, H, S, 1)
            return torch.cat([s, column], -1).softmax(-1)[..., :-1] @ v
        return s.softmax(-1) @ v

    return attention


def two_scores(
    q: Tensor, kc: Tensor, kn: Tensor, length: Tensor, fill: float = -1e30, new: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The scores of both sources, hidden behind the length and above the diagonal."""
    seen = (torch.arange(P) < length[:, None])[:, None, None]
    causal = band(S, S, 0) if new is None else new
    return (q @ kc.mT * 0.2).masked_fill(~seen, fill), (q @ kn.mT * 0.2).masked_fill(~causal, fill)


def scores_joined(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    return torch.cat(two_scores(q, kc, kn, length), -1).softmax(-1) @ torch.cat([vc, vn], 2)


def weights_split(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    a, b = torch.cat(two_scores(q, kc, kn, length), -1).softmax(-1).split([P, S], -1)
    return a @ vc + b @ vn


def maximum_and_sum(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    old, new = two_scores(q, kc, kn, length)
    top = torch.maximum(old.amax(-1, True), new.amax(-1, True))
    a, b = (old - top).exp(), (new - top).exp()
    return (a @ vc + b @ vn) / (a.sum(-1, True) + b.sum(-1, True))


def log_sum_exp(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    old, new = two_scores(q, kc, kn, length)
    lo, ln = old.logsumexp(-1, True), new.logsumexp(-1, True)
    both = torch.logaddexp(lo, ln)
    return (lo - both).exp() * (old.softmax(-1) @ vc) + (ln - both).exp() * (new.softmax(-1) @ vn)


def with_lengths(heads: int = KV) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (*operands(heads=heads), lengths())


def placed(new: int = S, keys: int = P) -> Callable[[], tuple[Tensor, ...]]:
    """With the position of the first new key, int [1]."""
    return lambda: (*operands(new), torch.randint(0, keys - new + 1, (1,)))


Write = Callable[[Tensor, Tensor, Tensor], Tensor]
WRITES: dict[str, Write] = {
    "index_copy": lambda cache, at, new: cache.index_copy(2, at, new),
    "index_copy in place": lambda cache, at, new: cache.index_copy_(2, at, new),
    "index_put": lambda cache, at, new: torch.index_put(
        cache, (torch.arange(B)[:, None, None], torch.arange(KV)[None, :, None], at[None, None]), new
    ),
    "index_put in place": lambda cache, at, new: _put(cache, at, new),
}


def _put(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    cache[:, :, at] = new
    return cache


def updated(write: Write, window: int | None = None, rows: int = S) -> Callable[..., Tensor]:
    """New keys at consecutive positions of a cache, and attention to all of it."""

    def attention(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, start: Tensor, *more: Tensor) -> Tensor:
        at = start + torch.arange(rows)
        k, v = write(kc, at, kn), write(vc, at, vn)
        seen = torch.arange(P) <= at[:, None]
        if window is not None:
            seen = seen & (torch.arange(P) > at[:, None] - window)
        return attend(q, k, v, seen[None, None] & more[0][:, None, None] if more else seen[None, None])

    return attention


def one_at_input(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, cache_position: Tensor) -> Tensor:
    """One token at a position that is an input."""
    k, v = kc.index_copy_(2, cache_position, kn), vc.index_copy_(2, cache_position, vn)
    return attend(q, k, v, (torch.arange(P) <= cache_position[:, None])[None, None])


def one_for_each_row(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, position: Tensor) -> Tensor:
    """Each batch element has a position of its own."""
    b = torch.arange(B)
    kc[b, :, position], vc[b, :, position] = kn[:, :, 0], vn[:, :, 0]
    return attend(q, kc, vc, (torch.arange(P) <= position[:, None])[:, None, None])


def several_for_each_row(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, position: Tensor) -> Tensor:
    b, at = torch.arange(B)[:, None], position[:, None] + torch.arange(S)
    kc[b, :, at], vc[b, :, at] = kn.transpose(1, 2), vn.transpose(1, 2)
    return attend(q, kc, vc, (torch.arange(P) <= at[..., None])[:, None])


def slices(end: int | None, clone: bool) -> Callable[..., Tensor]:
    """New keys from position 5 on, in a cache of which the first keys are read."""

    def attention(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
        kc, vc = (kc.clone(), vc.clone()) if clone else (kc, vc)
        kc[:, :, 5 : 5 + S], vc[:, :, 5 : 5 + S] = kn, vn
        k, v = kc[:, :, :end], vc[:, :, :end]
        return attend(q, k, v, band(S, k.shape[2], 5))

    return attention


def any_position(new: int = 1) -> Callable[[], tuple[Tensor, ...]]:
    """Of each batch element another one, the first and the last among them."""
    last = P - new
    return lambda: (*operands(new), torch.tensor([0, int(torch.randint(1, last, ())), last]))


def with_padding(inputs: Callable[[], tuple[Tensor, ...]], keys: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (*inputs(), left_padding(keys))


def softcapped(s: Tensor) -> Tensor:
    return 5 * torch.tanh(s / 5)


SEEN_ALL = {"prior_mask": None, "new_mask": None, "window": None}
MATCH = {
    "cat": Apart(cat(), options=SEEN_ALL),
    "cat, chosen by the cost model": Apart(cat(), config=ALWAYS),
    "cat of one new key": Apart(cat_unmasked, lambda: operands(1), SEEN_ALL),
    "cat with a window": Apart(cat(7), options={"window": 7}),
    "cat with a window of fewer keys than new ones": Apart(cat(2), options={"window": 2}),
    "cat with a window that hides nothing": Apart(cat(P + S), options={"window": None}),
    "cat with a window of one new key": Apart(cat(7, 1), lambda: operands(1), {"window": 7}),
    "cat with padding on the left": Apart(
        cat_padded, with_padding(operands, P + S), {"prior_mask": ..., "new_mask": ...}
    ),
    "cat with padding and a window": Apart(cat_padded_window, with_padding(operands, P + S), {"window": 7}),
    "cat with a length for each row": Apart(cat_lengths, with_lengths(), SEEN_ALL),
    "cat along dim 1": Apart(cat_sequence_first, sequence_first),
    "cat by hand": Apart(eager()),
    "cat with a softcap": Apart(eager(softcapped), options={"softcap": 5.0}),
    "cat with a sink": Apart(eager(sink=True), lambda: (*operands(), torch.randn(H)), {"sink": ...}),
    "scores joined": Apart(scores_joined, with_lengths(H), SEEN_ALL),
    "weights split": Apart(weights_split, with_lengths(H)),
    "one maximum and one sum": Apart(maximum_and_sum, with_lengths(H)),
    "merged by log-sum-exp": Apart(log_sum_exp, with_lengths(H)),
    "index_copy": Apart(updated(WRITES["index_copy"]), placed(), SEEN_ALL),
    "index_copy in place": Apart(updated(WRITES["index_copy in place"]), placed(), SEEN_ALL),
    "index_copy of one key": Apart(updated(WRITES["index_copy"], rows=1), placed(1)),
    "index_copy with a window": Apart(updated(WRITES["index_copy"], window=5), placed(), {"window": 5}),
    "index_copy with padding": Apart(
        updated(WRITES["index_copy"]), with_padding(placed(), P), {"prior_mask": ..., "new_mask": ...}
    ),
    "index_copy at an input": Apart(one_at_input, placed(1)),
    "index_put in place": Apart(updated(WRITES["index_put in place"]), placed(), {"new_mask": ...}),
    "index_put with padding": Apart(updated(WRITES["index_put in place"]), with_padding(placed(), P)),
    "index_put for each row": Apart(one_for_each_row, any_position()),
    "index_put of several for each row": Apart(several_for_each_row, any_position(S)),
    "a slice": Apart(slices(None, clone=True), options=SEEN_ALL),
    "a slice in place": Apart(slices(None, clone=False), options=SEEN_ALL),
    "a slice, and the first keys": Apart(slices(5 + S, clone=False)),
    "a slice, and some more keys": Apart(slices(5 + S + 2, clone=False)),
}


@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@pytest.mark.parametrize("name", MATCH)
def test_becomes_flash_prior(name: str, verify: bool) -> None:
    MATCH[name].check(verify)


@dataclass(frozen=True)
class Together:
    """Must not become `flash_prior`, for a reason with these words. It is right with the other kernels."""

    attention: Callable[..., Tensor]
    words: str
    inputs: Callable[[], tuple[Tensor, ...]] = operands

    def check(self) -> None:
        model = Function(self.attention)
        module = rewrite(model, self.inputs(), config=replace(APART, verify=False))
        assert not calls(module)
        (site,) = module.report.sites
        assert any(
            reason.code in ("two-sources", "written", "empty-rows") and self.words in reason for reason in site.reasons
        ), str(module.report)
        module = rewrite(model, self.inputs(), config=replace(ALWAYS, verify=False))
        assert not calls(module)
        agrees(model, module, self.inputs())


def masked(mask: Callable[[], Tensor]) -> Callable[..., Tensor]:
    def attention(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
        return attend(q, *joined(kc, kn, vc, vn), mask())

    return attention


def swapped_values(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    return attend(q, torch.cat([kc, kn], 2), torch.cat([vn, vc], 2), band(S, P + S, P))


def biased_half(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, bias: Tensor) -> Tensor:
    """A bias for the keys of the cache, and a causal mask of the new ones."""
    new = torch.zeros(S, S).masked_fill(~band(S, S, 0), -torch.inf)
    return attend(q, *joined(kc, kn, vc, vn), torch.cat([bias, new], -1))


def written_after(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    """The cache changes between its copy and the attention."""
    k, v = joined(kc, kn, vc, vn)
    kc.add_(1)
    return attend(q, k, v, band(S, P + S, P))


def new_written_after(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, start: Tensor) -> Tensor:
    """The new keys change after they were written into the cache."""
    at = start + torch.arange(S)
    k, v = kc.index_copy_(2, at, kn), vc.index_copy_(2, at, vn)
    vn.add_(1)
    return attend(q, k, v, (torch.arange(P) <= at[:, None])[None, None])


def written_again(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, start: Tensor) -> Tensor:
    """The cache changes after the new keys were written, and before it is read."""
    at = start + torch.arange(S)
    kc.index_copy_(2, at, kn)
    vc.index_copy_(2, at, vn)
    kc.mul_(2)
    return attend(q, kc, vc, (torch.arange(P) <= at[:, None])[None, None])


def at_positions(of: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """With the positions of the keys, and those of the queries in the mask."""

    def attention(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, start: Tensor) -> Tensor:
        at, own = of(start)
        k, v = kc.index_copy(2, at, kn), vc.index_copy(2, at, vn)
        return attend(q, k, v, (torch.arange(P) <= own[:, None])[None, None])

    return attention


def accumulated(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, start: Tensor) -> Tensor:
    at = start + torch.arange(S)
    k, v = (torch.ops.aten.index_put(c, [None, None, at], n, True) for c, n in ((kc, kn), (vc, vn)))
    return attend(q, k, v, (torch.arange(P) <= at[:, None])[None, None])


def other_rows(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, position: Tensor) -> Tensor:
    """The new keys of one batch element go to another one."""
    b = torch.arange(B).flip(0)
    kc[b, :, position], vc[b, :, position] = kn[:, :, 0], vn[:, :, 0]
    return attend(q, kc, vc, (torch.arange(P) <= position[:, None])[:, None, None])


def three(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
    k, v = torch.cat([kc[:, :, :2], kc, kn], 2), torch.cat([vc[:, :, :2], vc, vn], 2)
    return attend(q, k, v, band(S, P + S + 2, P + 2))


def mean_of_hidden(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, attention_mask: Tensor) -> Tensor:
    """A row that sees no key gives the mean of all values."""
    k, v = map(repeated, joined(kc, kn, vc, vn))
    hidden = ~(band(S, P + S, P) & attention_mask[:, None, None])
    return (q @ k.mT * 0.2).masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1) @ v


def window_of_lengths(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor) -> Tensor:
    """A window from a length that may be larger than the cache."""
    i, j = torch.arange(S)[:, None], torch.arange(P)
    ends = length[:, None, None]
    prior = ((j < ends) & (j > ends + i - 6))[:, None]
    mask = torch.cat([prior, band(S, S, 0, 6).expand(B, 1, S, S)], -1)
    return attend(q, *joined(kc, kn, vc, vn), mask)


def step_of(step: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda start: (at := start + step * torch.arange(S), at)


def off_by(shift: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda start: (at := start + torch.arange(S), at + shift)


def in_two(prior: int, new: int) -> Callable[[], Tensor]:
    """A window of the cache, and another one of the new keys."""
    return lambda: torch.cat([band(S, P + S, P, prior)[:, :P], band(S, S, 0, new)], -1)


MISS = {
    "new keys that are not causal": Together(cat_unmasked, "not causal"),
    "new keys that a query sees one more of": Together(masked(lambda: band(S, P + S, P + 1)), "not causal"),
    "new keys that a query sees one less of": Together(masked(lambda: band(S, P + S, P - 1)), "not causal"),
    "a window that is one wider for new keys": Together(masked(in_two(3, 4)), "same window"),
    "a window that is one narrower for new keys": Together(masked(in_two(3, 2)), "same window"),
    "a window of the new keys alone": Together(masked(in_two(P + S, 2)), "same window"),
    "a window of the cache alone": Together(masked(in_two(2, P + S)), "same window"),
    "values in the other order": Together(swapped_values, "as many earlier keys"),
    "a bias in one half": Together(biased_half, "", lambda: (*operands(), torch.randn(S, P))),
    "a cache that is written after it was copied": Together(written_after, "is written between"),
    "new values that are written after they were copied": Together(new_written_after, "is written between", placed()),
    "positions with a gap": Together(
        at_positions(step_of(2)), "consecutive", lambda: (*operands(), torch.randint(0, P - 2 * S, (1,)))
    ),
    "positions backwards": Together(at_positions(step_of(-1)), "consecutive", lambda: (*operands(), torch.tensor([9]))),
    "positions that are inputs": Together(
        at_positions(lambda at: (at, at)), "consecutive", lambda: (*operands(), torch.arange(5, 5 + S))
    ),
    "queries one behind their positions": Together(at_positions(off_by(1)), "own position", placed()),
    "queries one before their positions": Together(at_positions(off_by(-1)), "own position", placed()),
    "a cache that is written again": Together(written_again, "", placed()),
    "new keys that are added to those of the cache": Together(accumulated, "in another way", placed()),
    "new keys of another batch element": Together(other_rows, "batch elements", any_position()),
    "three sources": Together(three, "puts 3 tensors together"),
    "rows that see no key and give the mean": Together(mean_of_hidden, "mean", with_padding(operands, P + S)),
    "a window from any length": Together(window_of_lengths, "outside of the cache", with_lengths()),
    "fewer queries than new keys": Together(cat_unmasked, "new keys and", lambda: operands(S, rows=2)),
}


@pytest.mark.parametrize("name", MISS)
def test_does_not_become_flash_prior(name: str) -> None:
    MISS[name].check()


# Inputs at the border, and what is beside the attention


def rewritten(attention: Callable[..., Any], inputs: tuple[Tensor, ...], config: RewriteConfig = APART) -> Any:
    module = rewrite(Function(attention), copy.deepcopy(inputs), config=replace(config, verify=False))
    assert calls(module), str(module.report)
    return module


@pytest.mark.parametrize("length", [[-5, 0, 3], [P, P + 1, 2 * P]])
def test_lengths_outside_of_the_cache(length: list[int]) -> None:
    """The model computes something for them, so the call does too."""
    module = rewritten(cat_lengths, with_lengths()())
    agrees(Function(cat_lengths), module, (*operands(), torch.tensor(length)))


@pytest.mark.parametrize("position", [-1, -2, -S, 0, P - S])
@pytest.mark.parametrize("padded", [False, True])
def test_positions_before_the_cache(position: int, padded: bool) -> None:
    """`index_put` takes them from the end. Then some queries see no key, and some see fewer new ones."""
    attention, inputs = updated(WRITES["index_put in place"]), placed()
    inputs = with_padding(inputs, P) if padded else inputs
    module = rewritten(attention, inputs())
    q, kc, kn, vc, vn, _, *more = inputs()
    agrees(Function(attention), module, (q, kc, kn, vc, vn, torch.tensor([position]), *more))


def test_a_position_outside_of_the_cache_is_the_error_of_the_model() -> None:
    module = rewritten(one_at_input, placed(1)())
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        module(*operands(1), torch.tensor([P]))


class Cached(nn.Module):
    """Two layers, each with its cache in buffers, of which the second reads what the first gives."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("k0", "v0", "k1", "v1"):
            self.register_buffer(name, torch.zeros(B, KV, P, D))

    def forward(self, x: Tensor, cache_position: Tensor) -> Tensor:
        seen = (torch.arange(P) <= cache_position[:, None])[None, None]
        for k, v in ((self.k0, self.v0), (self.k1, self.v1)):
            q = x
            k.index_copy_(2, cache_position, 2 * x[:, :KV])
            v.index_copy_(2, cache_position, x[:, :KV] + 1)
            x = attend(q, k, v, seen) + x
        return x


def test_steps_with_a_cache_in_buffers() -> None:
    """Each layer writes and reads its own cache, in the order of the model, step after step."""
    model = Cached()
    module = rewrite(copy.deepcopy(model), (large(B, H, 1, D), torch.tensor([3])), config=APART)
    assert len(calls(module)) == 2, str(module.report)
    for step in range(5):
        x = large(B, H, 1, D)
        want, found = model(x, torch.tensor([step])), module(x, torch.tensor([step]))
        assert relative_error(found, want) <= TOLERANCES[torch.float32]
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(dict(module.named_buffers())[name], buffer)


def cat_given_back(*args: Tensor) -> tuple[Tensor, ...]:
    q, kc, kn, vc, vn = args
    k, v = joined(kc, kn, vc, vn)
    return attend(q, k, v, band(S, P + S, P)), k, v


def test_joined_keys_that_are_an_output_stay() -> None:
    """The copy is made anyway, so that the call saves none, and one tensor of keys is as good."""
    module = rewritten(cat_given_back, operands())
    assert len(joins(module)) == 2 and not {*joins(module)} & {*calls(module)[0].all_input_nodes}
    inputs = operands()
    for a, b in zip(module(*inputs), cat_given_back(*inputs), strict=True):
        assert relative_error(a, b) <= TOLERANCES[torch.float32]
    (site,) = rewrite(Function(cat_given_back), operands(), config=ALWAYS).report.sites
    assert site.kernel == "flash_fwd"
    assert any("times the speed of flash_fwd with joined keys" in reason for reason in site.reasons)


def test_two_attentions_to_the_same_keys() -> None:
    def attention(q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
        k, v = joined(kc, kn, vc, vn)
        return attend(q, k, v, band(S, P + S, P)) + attend(2 * q, k, v, band(S, P + S, P, 7))

    module = rewrite(Function(attention), operands(), config=APART)
    assert len(calls(module)) == 2 and joins(module) == []
    agrees(Function(attention), module, operands())


class Open(nn.Module):
    """New keys behind a cache of any length."""

    def forward(self, q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor) -> Tensor:
        k, v = joined(kc, kn, vc, vn)
        mask = torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + kc.shape[2]
        return attend(q, k, v, mask)


def test_open_sizes() -> None:
    batch, past = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("past", min=2, max=512)
    cache, new = {0: batch, 2: past}, {0: batch}
    shapes = {"q": new, "kc": cache, "kn": new, "vc": cache, "vn": new}
    module = rewrite(Open(), operands(), config=APART, dynamic_shapes=shapes)
    assert len(calls(module)) == 1 and joins(module) == [], str(module.report)
    for prior in (2, 9, 2 * P):
        agrees(Open(), module, operands(prior=prior))


def test_gradients() -> None:
    """Of a call that is not chosen for training: they are those of the model."""
    attention, inputs = eager(softcapped, sink=True), (*operands(), torch.randn(H))
    module = rewritten(attention, inputs)
    grad = large(B, H, S, D)
    found = []
    for f in (attention, module):
        given = [t.clone().requires_grad_() for t in inputs]
        f(*given).backward(grad)
        found.append([t.grad for t in given])
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None and relative_error(b, a) <= 10 * TOLERANCES[torch.float32]
    (site,) = rewrite(Function(attention), inputs, config=replace(APART, gradients=True)).report.sites
    assert site.kernel == "native" and "no kernel for gradients" in site.reasons[0]


@pytest.mark.parametrize(("kernel", "wanted"), [("flash_prior", "flash_prior"), ("flash_fwd", "flash_fwd")])
def test_a_kernel_for_a_site(kernel: Any, wanted: str) -> None:
    config = replace(ALWAYS, sites={"*": kernel})
    for attention, inputs in ((cat(), operands), (updated(WRITES["index_copy"]), placed())):
        (site,) = rewrite(Function(attention), inputs(), config=config).report.sites
        assert site.kernel == wanted, str(site.reasons)


def test_a_cache_in_place_needs_no_copy_so_one_tensor_of_keys_is_as_fast() -> None:
    (site,) = rewrite(Function(updated(WRITES["index_copy in place"])), placed()(), config=ALWAYS).report.sites
    assert site.kernel == "flash_fwd"


def test_the_sources_are_drawn_and_not_what_they_make() -> None:
    """Else the attention and the call would read other keys."""
    report = rewrite(Function(cat()), operands(), config=replace(ALWAYS, verify=True)).report
    assert report.replaced[0].draws == 1 and report.replaced[0].max_error <= TOLERANCES[torch.float32]


SMALL = st.sampled_from([-1, 0, 1, 2, 5, P + S])


@pytest.mark.filterwarnings("ignore:the captured graph does not read")
@settings(max_examples=30, deadline=None, derandomize=True)
@drawn_from(st.data())
def test_any_masks_of_both_sources(data: st.DataObject) -> None:
    """Masks that are nearly those of `flash_prior`: whatever is chosen computes what the model does."""
    shift, prior_window, new_window, of_length = (data.draw(SMALL) for _ in range(4))
    has_length, has_prior_window, has_new_window, is_padded, per_row = (data.draw(st.booleans()) for _ in range(5))
    rows = data.draw(st.sampled_from([1, S]))
    fill = data.draw(st.sampled_from([-torch.inf, -1e30]))
    i, j, n = torch.arange(rows)[:, None], torch.arange(P), torch.arange(rows)

    def attention(
        q: Tensor, kc: Tensor, kn: Tensor, vc: Tensor, vn: Tensor, length: Tensor, attention_mask: Tensor
    ) -> Tensor:
        ends = length[:, None, None, None] if has_length else torch.full((1, 1, 1, 1), P)
        prior = (j < ends + of_length - 1 if of_length != 1 else j < ends).expand(-1, 1, rows, P)
        new = (n <= i + shift).expand(len(prior), 1, rows, rows)
        prior = prior & (j > (ends if has_length and per_row else P) + i - prior_window) if has_prior_window else prior
        new = new & (n > i - new_window) if has_new_window else new
        seen = torch.cat([prior, new], -1)
        seen = seen & attention_mask[:, None, None] if is_padded else seen
        k, v = map(repeated, joined(kc, kn, vc, vn))
        return (q @ k.mT * 0.2).masked_fill(~seen, fill).softmax(-1) @ v

    def inputs() -> tuple[Tensor, ...]:
        length = torch.randint(-2, P + 3, (B,))
        return (*operands(rows), length, torch.rand(B, P + rows) < 0.8)

    config = replace(ALWAYS, kernels=("flash_prior", "flash_fwd"), verify=False)
    module = rewrite(Function(attention), inputs(), config=config)
    for _ in range(2):
        given = inputs()
        want, found = attention(*doubled(given)), module(*given)
        known = ~want.isnan()
        error = relative_error(found.where(known, 0), want.where(known, 0))
        assert error <= TOLERANCES[torch.float32], str(module.report)
