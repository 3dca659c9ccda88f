"""Claims are fitted to the rows of constant masks, and one wrong element changes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neuron_attn_rewrite.masks import Band, Chunked, MaskSpec
from neuron_attn_rewrite.masks.fit import fit_rows, row_intervals

S = 12
ROW, KEY = torch.arange(S)[:, None], torch.arange(S)[None, :]


def fitted(visible: Tensor) -> tuple[Any, ...] | None:
    """The claims of a constant mask, None if some row sees two intervals."""
    rows = row_intervals(visible)
    return None if rows is None else fit_rows(rows, visible.shape[1])


ROWS: dict[str, tuple[Tensor, tuple[Any, ...] | None]] = {
    "all": (KEY >= 0, ()),
    "causal": (KEY <= ROW, (Band(upper=0),)),
    "causal with a prefix": (KEY <= ROW + 3, (Band(upper=3),)),
    "strictly causal": (KEY < ROW, (Band(upper=-1),)),
    "causal from the fourth row on": (KEY <= ROW - 3, (Band(upper=-3),)),
    "all but one": (KEY >= ROW - (S - 2), (Band(lower=-(S - 2)),)),
    "sliding window": ((KEY <= ROW) & (KEY > ROW - 4), (Band(-3, 0),)),
    "window both ways": ((KEY - ROW).abs() <= 2, (Band(-2, 2),)),
    "anti-causal": (KEY >= ROW, (Band(lower=0),)),
    "chunked": ((KEY <= ROW) & (KEY // 4 == ROW // 4), (Band(upper=0), Chunked(4))),
    "a window in chunks": ((KEY <= ROW) & (KEY > ROW - 3) & (KEY // 4 == ROW // 4), (Band(-2, 0), Chunked(4))),
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
