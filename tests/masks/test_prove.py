"""Key padding is claimed where it is proven, and not in near misses."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_attn_rewrite import RewriteConfig, RewriteWarning, rewrite
from neuron_attn_rewrite.masks import KeyPadding, prove
from neuron_attn_rewrite.masks.affine import Affine
from neuron_attn_rewrite.masks.bounds import KeyBound
from neuron_attn_rewrite.masks.proof import Proof
from neuron_attn_rewrite.masks.spec import Band, Chunked, Claim, Limited, MaskSpec
from tests.helpers import ALWAYS, check, relative_error

LOW = torch.finfo(torch.float32).min
S = 12
ROW, KEY = torch.arange(S)[:, None], torch.arange(S)[None, :]
B, H, D = 2, 2, 8


def attention_under(build: Callable[..., Tensor], additive: bool = False) -> Any:
    """Attention under a mask that `build` makes from the model's mask input."""

    def attention(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
        mask = build(attention_mask)
        if additive:
            return torch.softmax(q @ k.mT * 0.3 + mask, -1) @ v
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
            return attention(q, k, v, attention_mask)

    return Model()


def inputs(mask: Tensor | None = None) -> tuple[Tensor, ...]:
    q, k, v = (3 * torch.randn(B, H, S, D) for _ in range(3))
    return q, k, v, torch.ones(B, S, dtype=torch.int64) if mask is None else mask


PADDINGS: dict[str, tuple[Any, str]] = {
    "bool": (attention_under(lambda m: m[:, None, None].bool()), "key_padding(attention_mask)"),
    "compared": (attention_under(lambda m: m[:, None, None] != 0), "key_padding(attention_mask)"),
    "compared with one": (attention_under(lambda m: m[:, None, None].eq(1)), "key_padding(attention_mask)"),
    "and causal": (
        attention_under(lambda m: m[:, None, None].bool() & (KEY <= ROW)),
        "causal(offset=0) & key_padding(attention_mask)",
    ),
    "and window": (
        attention_under(lambda m: torch.logical_and((KEY <= ROW) & (KEY > ROW - 4), m.bool()[:, None, None])),
        "sliding_window(4) & key_padding(attention_mask)",
    ),
    "expanded over queries": (
        attention_under(lambda m: m[:, None, None].expand(B, 1, S, S).bool()),
        "key_padding(attention_mask)",
    ),
    "additive": (
        attention_under(lambda m: (1.0 - m[:, None, None].float()) * LOW, additive=True),
        "key_padding(attention_mask)",
    ),
    "additive and causal in one": (
        attention_under(
            lambda m: torch.zeros(B, 1, S, S).masked_fill(~(m[:, None, None].bool() & (KEY <= ROW)), LOW), additive=True
        ),
        "causal(offset=0) & key_padding(attention_mask)",
    ),
    "indexed": (
        attention_under(lambda m: m.bool()[torch.arange(B)[:, None, None, None], KEY[None, None]]),
        "key_padding(attention_mask)",
    ),
    "built in place": (
        attention_under(lambda m: torch.zeros(B, 1, 1, S).masked_fill_(m[:, None, None] == 0, LOW), additive=True),
        "key_padding(attention_mask)",
    ),
    "written into a slice": (
        attention_under(lambda m: _write_slice(m), additive=True),
        "causal(offset=0) & key_padding(attention_mask)",
    ),
    "padding is True": (
        attention_under(lambda m: (m == 0).logical_not()[:, None, None]),
        "key_padding(attention_mask)",
    ),
}


def _write_slice(mask: Tensor) -> Tensor:
    """The way of transformers' older causal models: clone, then overwrite a slice."""
    causal = torch.full((S, S), LOW).triu(1)[None, None].expand(B, 1, S, S).clone()
    padded = causal[:, :, :, :S] + mask[:, None, None].float()
    causal[:, :, :, :S] = causal[:, :, :, :S].masked_fill(padded == 0, LOW)
    return causal


def left(n: int) -> Tensor:
    mask = torch.ones(B, S, dtype=torch.int64)
    mask[0, :n] = 0
    return mask


@pytest.mark.parametrize("name", PADDINGS)
def test_padding_is_proven_for_all_masks(name: str) -> None:
    """Captured with all ones, right with every other mask: also with holes, and with rows that see nothing."""
    model, expected = PADDINGS[name]
    rewritten = check(model, inputs, replaced=1)
    assert str(rewritten.report.sites[0].mask) == expected
    for mask in (left(5), left(5).flip(1), torch.randint(0, 2, (B, S)), left(S)):
        call = inputs(mask)
        assert relative_error(rewritten(*call), model(*call)) < 2e-5, mask


NOT_PADDING: dict[str, Any] = {
    "depends on the query": attention_under(lambda m: (m[:, None, :, None] * m[:, None, None]).bool() | (KEY == ROW)),
    "shifted by a run-time length": attention_under(lambda m: KEY[None, None] < m.sum(-1)[:, None, None, None] - ROW),
    "either padding or causal": attention_under(lambda m: m[:, None, None].bool() | (KEY <= ROW)),
    "reversed keys": attention_under(lambda m: m.flip(1)[:, None, None].bool() | (KEY == ROW)),
    "another row of the batch": attention_under(lambda m: m.flip(0)[:, None, None].bool() | (KEY == ROW)),
    "the last key always": attention_under(lambda m: m[:, None, None].bool() | (KEY == S - 1)),
    "a key more than the mask has": attention_under(lambda m: F.pad(m[:, None, None, 1:].bool(), (1, 0), value=True)),
    "cumulated": attention_under(lambda m: m.cumsum(1)[:, None, None] > KEY),
}


@pytest.mark.parametrize("name", NOT_PADDING)
def test_what_only_looks_like_padding_is_not_claimed(name: str) -> None:
    model = NOT_PADDING[name]
    rewritten = check(model, inputs, replaced=1)
    claims = rewritten.report.sites[0].mask.claims  # type: ignore[union-attr]
    assert not any(isinstance(c, KeyPadding) and c.source == "attention_mask" for c in claims)
    for mask in (left(5), left(5).flip(1), torch.randint(0, 2, (B, S))):
        call = inputs(mask)
        assert relative_error(rewritten(*call), model(*call)) < 2e-5, mask


def test_lengths_become_a_padding_of_their_own() -> None:
    """A comparison of run-time lengths is a bool tensor of which nothing is assumed."""
    model = attention_under(lambda m: (torch.arange(S) < m.sum(-1, keepdim=True))[:, None, None])
    rewritten = check(model, inputs, replaced=1)
    assert "key_padding(lt" in str(rewritten.report.sites[0].mask)
    call = inputs(left(4).flip(1))
    assert relative_error(rewritten(*call), model(*call)) < 2e-5


def test_right_padding_promised() -> None:
    model, _ = PADDINGS["and causal"]
    promised = RewriteConfig(policy="always", padding="right")
    exact = rewrite(model, inputs(), config=ALWAYS).report.sites[0]
    assert 'padding="right" would drop the key padding' in exact.reasons
    with warnings.catch_warnings():
        warnings.simplefilter("error", RewriteWarning)
        rewritten = rewrite(model, inputs(left(5).flip(1)), config=promised)
    assert str(rewritten.report.replaced[0].mask) == "causal(offset=0)"
    call = inputs(left(5).flip(1))
    real = call[3][0].bool()
    assert relative_error(rewritten(*call)[0][:, real], model(*call)[0][:, real]) < 2e-5
    only_padding, _ = PADDINGS["bool"]
    kept = rewrite(only_padding, inputs(), config=promised)
    assert str(kept.report.sites[0].mask) == "key_padding(attention_mask)"


PROMISES: dict[str, tuple[Any, str]] = {
    "window": (PADDINGS["and window"][0], "sliding_window(4)"),
    "encoder": (PADDINGS["bool"][0], "key_padding(attention_mask)"),
    "looks ahead": (
        attention_under(lambda m: m[:, None, None].bool() & (KEY <= ROW + 1)),
        "causal(offset=1) & key_padding(attention_mask)",
    ),
    "of lengths": (
        attention_under(lambda m: (torch.arange(S) < m.sum(-1, keepdim=True))[:, None, None] & (KEY <= ROW)),
        "causal(offset=0) & key_padding(lt)",
    ),
}


@pytest.mark.parametrize("name", PROMISES)
def test_what_the_promise_of_right_padding_removes(name: str) -> None:
    """Only where a real query can see real keys alone, and only the padding that the promise is about."""
    model, expected = PROMISES[name]
    call = inputs(left(5).flip(1))
    rewritten = rewrite(model, call, config=RewriteConfig(policy="always", padding="right"))
    assert re.sub(r"lt_\d+", "lt", str(rewritten.report.replaced[0].mask)) == expected
    real = call[3][0].bool()
    assert relative_error(rewritten(*call)[0][:, real], model(*call)[0][:, real]) < 2e-5
    exact = rewrite(model, call, config=ALWAYS).report.sites[0]
    would = any("would drop the key padding" in reason for reason in exact.reasons)
    assert would == ("key_padding" not in expected)


def test_cross_attention_keeps_its_padding_under_a_promise() -> None:
    model, _ = PADDINGS["bool"]
    q, k, v, mask = inputs(left(5).flip(1))
    rewritten = rewrite(model, (q[:, :, :5], k, v, mask), config=RewriteConfig(policy="always", padding="right"))
    assert str(rewritten.report.replaced[0].mask) == "key_padding(attention_mask)"


def test_a_soft_minus_infinity_keeps_its_empty_rows() -> None:
    """-1e9 hides a key, but a row of nothing else is the softmax of its scores: no kernel may give zeros there."""
    model = attention_under(lambda m: (1.0 - m[:, None, None].float()) * -1e9, additive=True)
    rewritten = check(model, inputs, replaced=1)
    assert rewritten.report.sites[0].bias == (B, 1, 1, S)
    relaxed = rewrite(model, inputs(), config=RewriteConfig(policy="always", empty_rows="any"))
    assert str(relaxed.report.sites[0].mask) == "key_padding(attention_mask)"


def test_the_assumption_is_reported() -> None:
    model, _ = PADDINGS["additive"]
    assert "attention_mask holds only 0 and 1" in rewrite(model, inputs(), config=ALWAYS).report.sites[0].reasons


SYMBOL = 1009
"""Stands for a size that is not known."""
BOUND = KeyBound(True, Affine(), shows_itself=True)
SEES_A_KEY: dict[str, tuple[tuple[Claim, ...], tuple[int, int], bool, bool]] = {
    "all keys": ((), (3, 3), True, True),
    "causal": ((Band(upper=0),), (3, 3), True, True),
    "only keys before": ((Band(upper=-1),), (3, 3), False, False),
    "only keys behind": ((Band(lower=1),), (3, 3), False, False),
    "keys behind, of more keys": ((Band(lower=1),), (3, 4), True, False),
    "keys before, but the first": ((Band(upper=-1), Band(lower=-2)), (3, 3), False, False),
    "one key, the own": ((Band(0, 0),), (3, 3), True, True),
    "chunks": ((Chunked(2),), (3, 3), True, True),
    "more queries than keys": ((Band(0, 0),), (4, 3), False, False),
    "more queries than keys, causal": ((Band(upper=0),), (4, 3), True, False),
    "all keys, size unknown": ((), (SYMBOL, SYMBOL), True, True),
    "causal, size unknown": ((Band(upper=0),), (SYMBOL, SYMBOL), True, True),
    "the own key, size unknown": ((Band(0, 0),), (SYMBOL, SYMBOL), True, True),
    "only keys before, size unknown": ((Band(upper=-1),), (SYMBOL, SYMBOL), False, False),
    "only keys behind, size unknown": ((Band(lower=1),), (SYMBOL, SYMBOL), False, False),
    "causal, for queries of unknown number": ((Band(upper=0),), (SYMBOL, 3), False, False),
    "causal, of unknown number": ((Band(upper=0),), (3, SYMBOL), False, False),
    "chunks, size unknown": ((Chunked(2),), (SYMBOL, SYMBOL), False, False),
    "limited, size unknown": ((Limited("key >= 0"),), (SYMBOL, SYMBOL), True, True),
}


@pytest.mark.parametrize("name", SEES_A_KEY)
def test_a_row_that_sees_a_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without key bounds any key will do. With key bounds, it must be the query's own."""
    claims, (q_len, kv_len), any_key, own_key = SEES_A_KEY[name]
    monkeypatch.setattr(prove, "is_number", lambda size: size != SYMBOL)
    site: Any = SimpleNamespace(q_len=q_len, kv_len=kv_len)
    for bounds, expected in (((), any_key), ((BOUND,), own_key)):
        assert prove._sees_a_key(Proof(MaskSpec(claims), key_bounds=bounds), site) == expected, bounds
