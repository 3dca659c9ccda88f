"""Small random mutations of attention, all sizes equal so that no shape gives anything away: none may come out wrong.

A mutant may be another attention (query and key swapped), attention in other axes (two dims permuted), or none at all
(softmax over the heads). The finder may replace it or not; what it replaces must give the mutant's numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuron_attn_rewrite import RewriteConfig, rewrite
from neuron_attn_rewrite.config.options import TOLERANCES
from tests.patterns.cases import cubes, error_of

N = 4
ORDERS = list(permutations(range(4)))
CAUSAL = torch.ones(N, N, dtype=torch.bool).tril()
UNCHECKED = RewriteConfig(policy="always", verify=False)
PER_MODEL, MODELS = 40, 6


def by_hand(x: Tensor, dim: int) -> Tensor:
    e = torch.exp(x - x.amax(dim, keepdim=True))
    return e / e.sum(dim, keepdim=True)


SCALES: dict[str, Callable[..., Tensor]] = {
    "scores": lambda q, k: q @ k.mT * 0.5,
    "query": lambda q, k: (q * 0.5) @ k.mT,
    "both": lambda q, k: (q * 0.7) @ (k / 1.4).mT,
    "squared": lambda q, k: (q @ k.mT) ** 2 * 0.05,
    "squared by hand": lambda q, k: (q @ k.mT) * (q @ k.mT) * 0.05,
    "by another product": lambda q, k: (q @ k.mT) * (k @ q.mT) * 0.05,
    "by rows": lambda q, k: q @ k.mT * q[..., :1],
    "by keys": lambda q, k: q @ k.mT * k[..., 0][:, :, None],
    "not transposed": lambda q, k: q @ k * 0.5,
    "einsum": lambda q, k: torch.einsum("abcd,abed->abce", q, k) * 0.5,
    "einsum over heads": lambda q, k: torch.einsum("abcd,aecd->acbe", q, k) * 0.5,
    "einsum transposed": lambda q, k: torch.einsum("abcd,abed->abec", q, k) * 0.5,
}
SOFTMAXES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "operator": torch.softmax,
    "by hand": by_hand,
    "log": lambda x, dim: torch.log_softmax(x, dim).exp(),
    "float64": lambda x, dim: torch.softmax(x.double(), dim).float(),
    "two dims": lambda x, dim: by_hand(x, dim) / by_hand(x, dim).sum(-1, keepdim=True),
    "sums of another dim": lambda x, dim: torch.exp(x) / torch.exp(x).sum(dim - 1, keepdim=True),
    "maximum of another dim": lambda x, dim: torch.softmax(x - x.amax(dim - 1, keepdim=True), dim),
    "squared": lambda x, dim: torch.softmax(x, dim) ** 2,
    "one less": lambda x, dim: 1 - torch.softmax(x, dim),
}
ENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda p, v: p @ v,
    "transposed": lambda p, v: p.mT @ v,
    "value transposed": lambda p, v: p @ v.mT,
    "from the left": lambda p, v: v @ p,
    "from the left, transposed": lambda p, v: (v.mT @ p.mT).mT,
    "einsum": lambda p, v: torch.einsum("abce,abed->abcd", p, v),
    "einsum over heads": lambda p, v: torch.einsum("abce,aebd->abcd", p, v),
    "gate": lambda p, v: (p * torch.sigmoid(v)) @ v,
    "gate by head": lambda p, v: (p * torch.sigmoid(v[:, :, :1, :1])) @ v,
    "gate by key": lambda p, v: (p * torch.sigmoid(v[:, :, :1, 0][:, :, None])) @ v,
    "scaled": lambda p, v: (p * 1.5) @ v,
    "own weights": lambda p, v: p @ p,
}


@dataclass(frozen=True)
class Mutant:
    """One attention. Every field's default is the usual one."""

    orders: tuple[tuple[int, ...], ...] = (ORDERS[0],) * 3
    roles: tuple[int, ...] = (0, 1, 2)
    scale: str = "scores"
    mask: Tensor | None = field(default=None, compare=False)
    after: bool = True
    softmax: str = "operator"
    dim: int = -1
    end: str = "product"

    def __call__(self, *inputs: Tensor) -> Tensor:
        q, k, v = (inputs[i].permute(order) for i, order in zip(self.roles, self.orders, strict=True))
        scores = SCALES[self.scale](q, k)
        if self.mask is not None and self.mask.dtype == torch.bool:
            scores = scores.masked_fill(~self.mask, -1e9)
        elif self.mask is not None:
            scores = scores + self.mask if self.after else (scores + self.mask) * 0.5
        return ENDS[self.end](SOFTMAXES[self.softmax](scores, self.dim), v)


def masks(rng: random.Random) -> Tensor:
    """Causal, or causal with one element another one, as bools or as numbers to add."""
    mask = CAUSAL.clone()
    if rng.random() < 0.5:
        i, j = rng.randrange(N), rng.randrange(N)
        mask[i, j] = ~mask[i, j]
    if rng.random() < 0.5:
        return mask
    added = torch.where(mask, 0.0, -1e9)
    if rng.random() < 0.5:
        added[rng.randrange(N), rng.randrange(N)] = rng.choice([-1.0, -30.0, 2.0, -1e5])
    return added


def mutate(mutant: Mutant, rng: random.Random) -> Mutant:
    change: dict[str, Callable[[], Any]] = {
        "orders": lambda: tuple(rng.choice(ORDERS) if i == changed else order for i, order in enumerate(mutant.orders)),
        "roles": lambda: tuple(rng.sample(range(3), 3)),
        "scale": lambda: rng.choice(list(SCALES)),
        "mask": lambda: masks(rng),
        "after": lambda: not mutant.after,
        "softmax": lambda: rng.choice(list(SOFTMAXES)),
        "dim": lambda: rng.choice([0, 1, 2, -1]),
        "end": lambda: rng.choice(list(ENDS)),
    }
    changed = rng.randrange(3)
    name = rng.choice(list(change))
    return replace(mutant, **{name: change[name]()})


def mutants(seed: int) -> list[Mutant]:
    rng = random.Random(seed)
    made = []
    for _ in range(PER_MODEL):
        mutant = Mutant(mask=masks(rng) if rng.random() < 0.5 else None)
        for _ in range(rng.randint(1, 3)):
            mutant = mutate(mutant, rng)
        made.append(mutant)
    return made


class Many(nn.Module):
    """Many mutants in one graph."""

    def __init__(self, made: list[Mutant]) -> None:
        super().__init__()
        self.made = made

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [mutant(q, k, v) for mutant in self.made]


@pytest.mark.parametrize("seed", range(MODELS))
def test_no_mutant_comes_out_wrong(seed: int) -> None:
    torch.manual_seed(seed)
    model = Many(mutants(seed)).eval()
    rewritten = rewrite(model, cubes(), config=UNCHECKED)
    replaced = len(rewritten.report.replaced)
    assert PER_MODEL // 4 < replaced < PER_MODEL, "the mutants are all alike"
    for _ in range(3):
        inputs = cubes()
        with torch.no_grad():
            for mutant, old, new in zip(model.made, model(*inputs), rewritten(*inputs), strict=True):
                assert error_of(new, old) <= 5 * TOLERANCES[torch.float32], mutant
