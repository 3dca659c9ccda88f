"""The algebra of masks, and the proof of each claim: what must be claimed, and near misses that must not."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neuron_attn_rewrite import RewriteConfig, RewriteWarning, rewrite
from neuron_attn_rewrite.capture.export import capture
from neuron_attn_rewrite.masks.fit import fit_rows, row_intervals
from neuron_attn_rewrite.masks.prove import Proof, Prover
from neuron_attn_rewrite.masks.spec import Band, Chunked, Intervals, KeyPadding, MaskSpec
from neuron_attn_rewrite.patterns.find import find
from neuron_attn_rewrite.patterns.site import AttentionSite
from tests.helpers import ALWAYS, check, relative_error
from tests.models import FAMILIES

LOW = torch.finfo(torch.float32).min
S = 12
ROW, KEY = torch.arange(S)[:, None], torch.arange(S)[None, :]


# The algebra


@pytest.mark.parametrize(
    ("claim", "text"),
    [
        (Band(upper=0), "causal(offset=0)"),
        (Band(upper=7), "causal(offset=7)"),
        (Band(-3, 0), "sliding_window(4)"),
        (Band(4, 7), "sliding_window(4, offset=7)"),
        (Band(-2, 2), "window(left=2, right=2)"),
        (Band(lower=-2), "window(left=2)"),
        (Chunked(4), "chunked(4)"),
        (Intervals(((0, 1), (0, 2))), "intervals(2 rows)"),
        (KeyPadding("attention_mask"), "key_padding(attention_mask)"),
    ],
)
def test_claims_read_well(claim: Any, text: str) -> None:
    assert str(claim) == text


def test_a_conjunction_says_each_claim_once() -> None:
    spec = MaskSpec((Band(upper=0),)) & MaskSpec((Band(upper=0), KeyPadding("m")))
    assert str(spec) == "causal(offset=0) & key_padding(m)"
    assert str(MaskSpec()) == "none"


@given(
    st.lists(st.builds(Band, st.none() | st.integers(-6, 6), st.none() | st.integers(-6, 6)), max_size=3),
    st.lists(st.builds(Chunked, st.integers(1, 9)), max_size=2),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_band_and_bounds_lower_the_whole_conjunction(
    bands: list[Band], chunks: list[Chunked], q_len: int, kv_len: int
) -> None:
    spec = MaskSpec((*bands, *chunks))
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
    expected = torch.ones(q_len, kv_len, dtype=torch.bool)
    for band in bands:
        expected &= (j >= i + (-99 if band.lower is None else band.lower)) & (
            j <= i + (99 if band.upper is None else band.upper)
        )
    for chunk in chunks:
        expected &= i // chunk.size == j // chunk.size
    assert torch.equal(spec.visible(q_len, kv_len), expected)
    lowered = MaskSpec((spec.band, *spec.runs.claims))
    assert torch.equal(lowered.visible(q_len, kv_len), expected)


# Constant rows


def fitted(visible: Tensor) -> tuple[Any, ...] | None:
    """The claims of a constant mask, None if some row sees two intervals."""
    rows = row_intervals(visible)
    return None if rows is None else fit_rows(rows, visible.shape[1])


ROWS: dict[str, tuple[Tensor, tuple[Any, ...] | None]] = {
    "all": (KEY >= 0, ()),
    "causal": (KEY <= ROW, (Band(upper=0),)),
    "causal with a prefix": (KEY <= ROW + 3, (Band(upper=3),)),
    "strictly causal": (KEY < ROW, (Band(upper=-1),)),
    "sliding window": ((KEY <= ROW) & (KEY > ROW - 4), (Band(-3, 0),)),
    "window both ways": ((KEY - ROW).abs() <= 2, (Band(-2, 2),)),
    "anti-causal": (KEY >= ROW, (Band(lower=0),)),
    "chunked": ((KEY <= ROW) & (KEY // 4 == ROW // 4), (Band(upper=0), Chunked(4))),
    "block diagonal": (KEY // 4 == ROW // 4, (Chunked(4),)),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_fitted(name: str) -> None:
    rows, claims = ROWS[name]
    assert fitted(rows.expand(S, S)) == claims


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("element", [(0, 0), (5, 4), (7, 9), (11, 11)])
def test_one_wrong_element_breaks_the_claim(name: str, element: tuple[int, int]) -> None:
    rows, claims = ROWS[name]
    broken = rows.expand(S, S).clone()
    broken[element] = ~broken[element]
    found = fitted(broken)
    assert found != claims
    assert found is None or torch.equal(MaskSpec(found).visible(S, S), broken)


@given(st.lists(st.integers(0, 2**6 - 1), min_size=1, max_size=6))
def test_a_fit_is_exact_or_none(bits: list[int]) -> None:
    rows = torch.tensor([[bool(b >> j & 1) for j in range(6)] for b in bits])
    found = fitted(rows)
    if found is None:
        diffs = rows.int().diff(dim=1, prepend=torch.zeros(len(bits), 1)).eq(1).sum(1)
        assert (diffs > 1).any()  # some row is not one interval
    else:
        assert torch.equal(MaskSpec(found).visible(*rows.shape), rows)


# Run-time padding

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


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().nbytes() >= result.numel():
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_no_table_of_the_whole_mask_is_held(monkeypatch: pytest.MonkeyPatch, name: str, implementation: str) -> None:
    """Read in blocks of rows: the same verdict, and nothing near the size of the mask."""
    length, block = 512, 2**13
    monkeypatch.setattr("neuron_attn_rewrite.masks.read.BLOCK", block)
    family = next(f for f in FAMILIES if f.name == name)
    ids = torch.zeros(1, length, dtype=torch.int64)
    module = capture(
        family.build(implementation), (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ).module
    prover = Prover(module, ALWAYS)
    for site in find(module, prover.evaluator):
        assert isinstance(site, AttentionSite)
        with Largest() as largest:
            proof = prover.prove(site)
        claim = "sliding_window(16)" if name == "mistral" else "causal(offset=0)"
        assert isinstance(proof, Proof)
        assert str(proof.mask) == f"{claim} & key_padding(attention_mask)"
        assert largest.elements <= 2 * block


def test_a_band_knows_whether_it_reaches_every_row() -> None:
    for lower, upper in itertools.product((None, *range(-4, 6)), repeat=2):
        for q_len, kv_len in itertools.product(range(1, 5), repeat=2):
            band = Band(lower, upper)
            first, end = MaskSpec((band,)).rows(q_len, kv_len).unbind(1)
            assert band.reaches_every_row(q_len, kv_len) == bool((first < end).all()), (band, q_len, kv_len)
