"""Masks drawn from a grammar: trees over indices, buffers and inputs, some in a dtype that wraps or rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

import torch
from torch import Tensor, nn

from benchmarks.fuzz.steps import DTYPES

Mask = Callable[[Mapping[str, Tensor]], Tensor]
"""Gives bools that broadcast against [batch, heads, q_len, kv_len], True where a key is seen."""
Say = Callable[[object], None]

JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a, b: ~a,
    "where": lambda a, b: torch.where(a, b, False),
}
SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": lambda a, b: a + b,
    "*": lambda a, b: a * b,
    "-": lambda a, b: a - b,
    "1 -": lambda a, b: (1 - a) * b,
    "+ of 128": lambda a, b: a * 128 + b * 128,
    "* 256": lambda a, b: a * 64 * 4 + b,
    "+ 256": lambda a, b: (a + 256) * b,
    "up and down": lambda a, b: (a + 3000 + b) - 3000,
    "double": lambda a, b: a + a + b,
}
"""Arithmetic of two masks in a dtype. Bools have no `-`."""
TESTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda x: x.bool(),
    "!= 0": lambda x: x != 0,
    "> 0": lambda x: x > 0,
    "== 1": lambda x: x == 1,
    "< 2": lambda x: x < 2,
}
"""From a number back to a bool."""


def draw_mask(
    owner: nn.Module, draw: Random, sizes: tuple[int, int], depth: int, say: Callable[[object], None]
) -> Mask:
    """A mask of `sizes`, the query and key lengths. `owner` has the buffers `tril` and `steps`."""
    if not depth or draw.random() >= 0.75:
        return _leaf(owner, draw, sizes, say)
    a, b = (draw_mask(owner, draw, sizes, depth - 1, say) for _ in range(2))
    if draw.random() < 0.3:
        kind, how, test = draw.choice(DTYPES), draw.choice(list(SUMS)), draw.choice(list(TESTS))
        say(f"({how} in {str(kind).removeprefix('torch.')}) {test}")
        return lambda x: TESTS[test](SUMS[how](a(x).to(kind), b(x).to(kind)))
    how = draw.choice(["and", "and", *JOINS])
    say(how)
    return lambda x: JOINS[how](a(x), b(x))


def _leaf(owner: nn.Module, draw: Random, sizes: tuple[int, int], say: Say) -> Mask:
    (s, t), c = sizes, draw.randint(-2, 3)
    rows, keys = (lambda: torch.arange(s)[:, None]), (lambda: torch.arange(t))
    at, dim, kind = max(0, t - s), draw.choice([0, 1]), draw.choice(DTYPES)
    leaves: dict[str, Mask] = {
        "all": lambda x: torch.ones(s, t, dtype=torch.bool),
        "<=": lambda x: (keys() <= rows() + c)[None, None],
        "<": lambda x: (keys() < rows() + c)[None, None],
        ">": lambda x: (keys() > rows() - c)[None, None],
        "tril": lambda x: torch.ones(s, t, dtype=torch.bool).tril(c)[None, None],
        "triu": lambda x: torch.ones(s, t).triu(c)[None, None].bool(),
        "buffer": lambda x: owner.get_buffer("tril")[:s, :t],
        "buffer end": lambda x: owner.get_buffer("tril")[at : at + s, :t][None, None],
        "steps": lambda x: owner.get_buffer("steps")[:t][None, :] <= owner.get_buffer("steps")[:s][:, None],
        "near": lambda x: (rows() - keys()).abs() <= abs(c),
        "wrapping": lambda x: keys().to(kind) * 40 <= rows().to(kind) * 40,
        "difference": lambda x: rows().to(kind) - keys().to(kind) >= 0,
        "full": lambda x: keys() <= torch.full((s, 1), c, dtype=kind).long(),
        "chunk": lambda x: rows() // (abs(c) + 1) == keys() // (abs(c) + 1),
        "padding": lambda x: x["attention_mask"][:, None, None, :].bool(),
        "padding > 0": lambda x: (x["attention_mask"] > 0)[:, None, None, :],
        "1 - padding": lambda x: (1.0 - x["attention_mask"][:, None, None, :].float()) == 0,
        "keep": lambda x: x["keep"][:, None, None, :],
        "keep first": lambda x: x["keep"][:1, None, None, :],
        "keep flipped": lambda x: x["keep"].flip(dim)[:, None, None, :],
        "order": lambda x: keys()[None, None, None] <= x["order"][:, None, :, None] + c,
        "order >": lambda x: keys()[None, None, None] > x["order"][:, None, :, None] - c,
        "order //": lambda x: keys()[None, None, None] <= (x["order"] // 2)[:, None, :, None],
        "order clamp": lambda x: keys()[None, None, None] >= x["order"].clamp(min=c)[:, None, :, None],
        "length": lambda x: keys() < x["length"][:, None, None, None],
        "length from the left": lambda x: keys() >= t - x["length"][:, None, None, None],
        "ids": lambda x: (x["ids"] != c)[:, None, None, :],
        "ids bool": lambda x: x["ids"].bool()[:, None, None, :],
        "ids sum": lambda x: x["ids"].cumsum(-1)[:, None, None, :] > c,
        "segments": lambda x: x["ids"][:, None, None, :] == x["ids"][:, None, :1, None],
        "last": lambda x: keys() <= x["order"].amax(-1)[:, None, None, None],
    }
    name = draw.choice([*leaves, *["buffer", "steps"] * 3])
    say(f"{name}({c}{f' in {kind}' if name in ('wrapping', 'difference', 'full') else ''})")
    return leaves[name]
