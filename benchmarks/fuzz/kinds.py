"""The kinds of programs, and one attack in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.fuzz import graphs, programs
from benchmarks.fuzz.steps import Outcome

KINDS: dict[str, Callable[[int], Outcome]] = {
    "plain": programs.attack,
    "memory": partial(programs.attack, memory=True),
    "graphs": graphs.attack,
}


def attack(kind: str, seed: int) -> tuple[str, int, str, str | None, tuple[str, ...]]:
    """The outcome of one program, without its module: "replaced", "kept", "refused (why)", or "no program"."""
    torch.set_num_threads(1)
    found = KINDS[kind](seed)
    ended = "no program" if not found.words else f"refused ({found.cause})" if found.rewritten is None else "kept"
    if found.rewritten is not None and found.rewritten.report.replaced:
        ended = "replaced"
    return kind, seed, ended, found.wrong, found.words
