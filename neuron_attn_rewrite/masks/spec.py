"""The algebra of masks: what a mask says, free of any graph.

A `MaskSpec` is a conjunction of claims about which key each query row sees. Every claim is about *all* inputs
that the graph accepts, and has one plain meaning, given by its `visible` method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


def _grid(q_len: int, kv_len: int) -> tuple[Tensor, Tensor]:
    return torch.arange(q_len)[:, None], torch.arange(kv_len)[None, :]


@dataclass(frozen=True)
class Band:
    """Query row i sees key j iff `i + lower <= j <= i + upper`; None leaves that side open.

    Causal attention is `upper = offset`: 0 is top-left aligned (SDPA's `is_causal`), `kv_len - q_len` is
    bottom-right aligned (a cache of earlier keys). A sliding window of W keys, the token itself among them as
    in Hugging Face, is `lower = offset - W + 1, upper = offset`.
    """

    lower: int | None = None
    upper: int | None = None

    def visible(self, q_len: int, kv_len: int) -> Tensor:
        """Bool [q_len, kv_len], True where the key is seen."""
        i, j = _grid(q_len, kv_len)
        seen = torch.ones(q_len, kv_len, dtype=torch.bool)
        if self.lower is not None:
            seen &= j >= i + self.lower
        if self.upper is not None:
            seen &= j <= i + self.upper
        return seen

    def __str__(self) -> str:
        if self.lower is None:
            return f"causal(offset={self.upper})"
        if self.upper is None:
            return f"window(left={-self.lower})"
        if self.lower + self.upper == 0 and self.upper > 0:
            return f"window(left={-self.lower}, right={self.upper})"
        offset = f", offset={self.upper}" if self.upper else ""
        return f"sliding_window({self.upper - self.lower + 1}{offset})"


@dataclass(frozen=True)
class Chunked:
    """Query row i sees key j iff both lie in the same chunk of `size` positions (Llama 4)."""

    size: int

    def visible(self, q_len: int, kv_len: int) -> Tensor:
        """Bool [q_len, kv_len], True where the key is seen."""
        i, j = _grid(q_len, kv_len)
        return i // self.size == j // self.size

    def __str__(self) -> str:
        return f"chunked({self.size})"


@dataclass(frozen=True)
class Intervals:
    """Query row i sees the keys of one interval `[lo, hi)`, given row by row (block diagonal, prefix-LM, spans)."""

    bounds: tuple[tuple[int, int], ...]

    def visible(self, q_len: int, kv_len: int) -> Tensor:
        """Bool [q_len, kv_len], True where the key is seen."""
        lo, hi = torch.tensor(self.bounds, dtype=torch.int64).reshape(q_len, 2, 1).unbind(1)
        j = torch.arange(kv_len)[None, :]
        return (lo <= j) & (j < hi)

    def __str__(self) -> str:
        return f"intervals({len(self.bounds)} rows)"


@dataclass(frozen=True)
class KeyPadding:
    """Key j of batch element b is seen iff the run-time vector `source`[b, j] says so."""

    source: str

    def visible(self, q_len: int, kv_len: int) -> Tensor:
        """Bool [q_len, kv_len], True where the key can be seen for some value of the vector."""
        return torch.ones(q_len, kv_len, dtype=torch.bool)

    def __str__(self) -> str:
        return f"key_padding({self.source})"


Claim: TypeAlias = Band | Chunked | Intervals | KeyPadding


@dataclass(frozen=True)
class MaskSpec:
    """A conjunction of claims: a key is seen iff every claim lets it be seen. No claim means that all are seen."""

    claims: tuple[Claim, ...] = ()

    def __and__(self, other: MaskSpec) -> MaskSpec:
        return MaskSpec((*self.claims, *(c for c in other.claims if c not in self.claims)))

    def visible(self, q_len: int, kv_len: int) -> Tensor:
        """Bool [q_len, kv_len], True where the key is seen, with every run-time vector all true."""
        seen = torch.ones(q_len, kv_len, dtype=torch.bool)
        for claim in self.claims:
            seen &= claim.visible(q_len, kv_len)
        return seen

    def __str__(self) -> str:
        return " & ".join(map(str, self.claims)) or "none"


@dataclass(frozen=True)
class Unproven:
    """Why nothing can be claimed about a mask."""

    reason: str

    def __str__(self) -> str:
        return f"unproven: {self.reason}"
