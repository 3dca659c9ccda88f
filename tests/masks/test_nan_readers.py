"""Which models tell NaN from other numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_attn_rewrite.masks.nan_readers import READERS, nan_is_read
from tests.masks.test_soundness import graph_of

READ: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "replaced": lambda x, n: x.nan_to_num(),
    "replaced in place": lambda x, n: x.clone().nan_to_num_(),
    "asked for": lambda x, n: x.isnan(),
    "compared": lambda x, n: torch.where(x == x, x, 2.0),
    "the other of two": lambda x, n: torch.fmax(n.float(), x),
    "as integers": lambda x, n: x.long(),
    "as bools": lambda x, n: x.bool(),
    "as its kind": lambda x, n: x.type_as(n),
    "behind other operators": lambda x, n: (x.relu() * 2).mT.exp().isfinite(),
    "behind a tuple": lambda x, n: x.max(1)[0].isnan(),
    "behind one of two": lambda x, n: (x.relu(), (x * 2).argmax()),
    "as places": lambda x, n: x.topk(2)[1] == 3,
    "behind the second of two": lambda x, n: (x.argsort(), x.relu()),
}
KEPT: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "returned": lambda x, n: x,
    "computed with": lambda x, n: (x.relu() * 2 + x).softmax(-1) @ x.mT,
    "as another floating dtype": lambda x, n: x.double().to(torch.bfloat16),
    "only its kind": lambda x, n: n.type_as(x).isnan(),
    "only its size": lambda x, n: torch.zeros_like(x).isnan(),
    "another tensor": lambda x, n: (x.relu(), n.bool()),
    "a tuple": lambda x, n: x.max(1)[0] + x.split(2)[0],
}


def is_read(program: Callable[[Tensor, Tensor], Any]) -> bool:
    graph = graph_of(program, (torch.randn(4, 4), torch.ones(4, 4, dtype=torch.int64))).graph
    return nan_is_read(next(iter(graph.nodes)))


@pytest.mark.parametrize("name", READ)
def test_nan_is_read(name: str) -> None:
    assert is_read(READ[name])


@pytest.mark.parametrize("name", KEPT)
def test_nan_only_spreads(name: str) -> None:
    assert not is_read(KEPT[name])


def test_the_readers_are_operators() -> None:
    assert all(hasattr(torch.ops.aten, name) for name in READERS)
