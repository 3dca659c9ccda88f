"""What each claim of a mask means, and what several claims mean together."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuron_attn_rewrite.masks import Band, Chunked, Intervals, KeyPadding, Limited, MaskSpec


@pytest.mark.parametrize(
    ("claim", "text"),
    [
        (Band(upper=0), "causal(offset=0)"),
        (Band(upper=7), "causal(offset=7)"),
        (Band(-3, 0), "sliding_window(4)"),
        (Band(4, 7), "sliding_window(4, offset=7)"),
        (Band(0, 0), "sliding_window(1)"),
        (Band(-1, 1), "window(left=1, right=1)"),
        (Band(-2, 2), "window(left=2, right=2)"),
        (Band(lower=-2), "window(left=2)"),
        (Chunked(4), "chunked(4)"),
        (Intervals(((0, 1), (0, 2))), "intervals(2 rows)"),
        (KeyPadding("attention_mask"), "key_padding(attention_mask)"),
    ],
)
def test_claims_read_well(claim: Any, text: str) -> None:
    assert str(claim) == text


ROWS: dict[str, tuple[tuple[Any, ...], list[list[int]]]] = {
    "nothing": ((), [[0, 4], [0, 4], [0, 4]]),
    "key padding": ((KeyPadding("m"),), [[0, 4], [0, 4], [0, 4]]),
    "a bound at run time": ((Limited("key <= n"),), [[0, 4], [0, 4], [0, 4]]),
    "intervals": ((Intervals(((0, 1), (1, 4), (2, 3))),), [[0, 1], [1, 4], [2, 3]]),
    "a row that sees nothing": ((Band(upper=-1),), [[0, 0], [0, 1], [0, 2]]),
    "no row sees anything": ((Band(2, 1),), [[0, 0], [0, 0], [0, 0]]),
    "chunks of a band": ((Chunked(2), Band(upper=0), KeyPadding("m")), [[0, 1], [0, 2], [2, 3]]),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_keys_of_each_row(name: str) -> None:
    claims, rows = ROWS[name]
    assert MaskSpec(claims).rows(3, 4).tolist() == rows


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
    lowered = MaskSpec((spec.band, *spec.row_bounds.claims))
    assert torch.equal(lowered.visible(q_len, kv_len), expected)


def test_a_band_knows_whether_it_reaches_every_row() -> None:
    for lower, upper in itertools.product((None, *range(-4, 6)), repeat=2):
        for q_len, kv_len in itertools.product(range(1, 5), repeat=2):
            band = Band(lower, upper)
            first, end = MaskSpec((band,)).rows(q_len, kv_len).unbind(1)
            assert band.reaches_every_row(q_len, kv_len) == bool((first < end).all()), (band, q_len, kv_len)
