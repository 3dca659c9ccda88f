"""Every spelling of attention that must be found, and near misses that must stay: a test for each case of a family."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns import (
    blocks,
    features,
    guards,
    heads,
    layouts,
    masks,
    pieces,
    readers,
    scale,
    sdpa,
    sinks,
    softmaxes,
    traps,
)
from tests.patterns.cases import CAUSAL, LOW, D, Keep, Match, Right, S, numbers_agree, with_padding

FAMILIES = (blocks, features, guards, heads, layouts, masks, pieces, readers, scale, sdpa, sinks, softmaxes, traps)


def cases() -> Iterator[object]:
    for family in FAMILIES:
        for table in ("MATCH", "KEEP", "RIGHT"):
            for name, case in getattr(family, table, {}).items():
                kind = family.__name__.rpartition(".")[2]
                yield pytest.param(case, id=f"{kind}: {name}" if table == "MATCH" else f"{kind}, {table}: {name}")


NO_ATTENTION = {
    "a router": lambda x, w: torch.topk(torch.softmax(F.linear(x, w), -1), 2).values,
    "a router through a logarithm": lambda x, w: torch.softmax(F.logsigmoid(F.linear(x, w)), -1) @ w,
    "a pooling whose gate is written piece by piece": lambda x, w: (
        torch.softmax(torch.slice_scatter(F.linear(x, w) + w[:1, :1], F.linear(x, w)[:4] * 2, 0, 4, 8), 0) @ w
    ),
    "a softmax and a product": lambda x, w: torch.softmax(x, -1) + x @ w.mT @ w,
    "a router whose choice is used in a product": lambda x, w: (
        torch.topk(torch.softmax(F.linear(x, w), -1), 2).values @ w[:2]
    ),
}


@pytest.mark.parametrize("case", list(cases()))
def test_spelling(case: Match | Keep | Right) -> None:
    torch.manual_seed(0)
    case.check()


STEPS = tuple(product((-1e4, LOW, -torch.inf), (True, False)))
"""What a mask does to a score that it hides: a number, and whether it stands in place of the score or is added."""


def test_rows_without_a_key_under_two_masks() -> None:
    """Every pair of masks, one of them padding on the left: what is replaced is right in rows that see no key too."""

    def attentions(q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> list[Tensor]:
        shown = (CAUSAL, attention_mask[:, None, None].bool())
        out = []
        for pair, (a, b) in product((shown, shown[::-1]), product(STEPS, repeat=2)):
            x = q @ k.mT * 0.25
            for mask, (fill, replaces) in zip(pair, (a, b), strict=True):
                x = torch.where(mask, x, fill) if replaces else x + torch.where(mask, 0.0, fill)
            out.append(torch.softmax(x, -1) @ v)
        return out

    report = numbers_agree(attentions, with_padding).report
    assert len(report.sites) == 2 * len(STEPS) ** 2 and len(report.replaced) == 42


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_what_is_no_attention_is_not_reported(name: str) -> None:
    report = numbers_agree(NO_ATTENTION[name], lambda: (torch.randn(S, D), torch.randn(S, D))).report
    assert report.sites == ()
