"""Every spelling of attention that must be found, and near misses that must stay: a test for each case of a family."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from tests.find import guards, heads, layouts, masks, readers, scale, sdpa, softmaxes, traps
from tests.find.cases import D, Keep, Match, Right, S, numbers_agree

FAMILIES = (guards, heads, layouts, masks, readers, scale, sdpa, softmaxes, traps)


def cases() -> Iterator[object]:
    for family in FAMILIES:
        for table in ("MATCH", "KEEP", "RIGHT"):
            for name, case in getattr(family, table, {}).items():
                kind = family.__name__.rpartition(".")[2]
                yield pytest.param(case, id=f"{kind}: {name}" if table == "MATCH" else f"{kind}, {table}: {name}")


NO_ATTENTION = {
    "a router": lambda x, w: torch.topk(torch.softmax(F.linear(x, w), -1), 2).values,
    "a softmax and a product": lambda x, w: torch.softmax(x, -1) + x @ w.mT @ w,
    "a router whose choice is used in a product": lambda x, w: (
        torch.topk(torch.softmax(F.linear(x, w), -1), 2).values @ w[:2]
    ),
}


@pytest.mark.parametrize("case", list(cases()))
def test_spelling(case: Match | Keep | Right) -> None:
    torch.manual_seed(0)
    case.check()


@pytest.mark.parametrize("name", NO_ATTENTION)
def test_what_is_no_attention_is_not_reported(name: str) -> None:
    report = numbers_agree(NO_ATTENTION[name], lambda: (torch.randn(S, D), torch.randn(S, D))).report
    assert report.sites == ()
