"""What can be claimed of a mask, without reference to a graph.

A `MaskSpec` is a list of claims. A query sees a key if every claim lets it. `MaskSpec((Band(upper=0),
KeyPadding("attention_mask")))`, for example, is a causal mask with key padding. A claim holds for *all* inputs that
the graph accepts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import torch
from torch import Tensor

from neuron_attn_rewrite.reasons import Reason


def _all_keys(q_len: int, kv_len: int) -> Tensor:
    return torch.tensor([[0, kv_len]]).expand(q_len, 2)


@dataclass(frozen=True)
class Band:
    """Query row i sees key j if `i + lower <= j <= i + upper`; None leaves that side open.

    Causal attention is `upper = offset`: 0 is top-left aligned (SDPA's `is_causal`), `kv_len - q_len` is
    bottom-right aligned (a cache of earlier keys). A sliding window of W keys, the token itself among them as
    in Hugging Face, is `lower = offset - W + 1, upper = offset`.
    """

    lower: int | None = None
    upper: int | None = None

    def rows(self, q_len: int, kv_len: int) -> Tensor:
        """Int64 [q_len, 2]: the interval [lo, hi) of keys that each query row sees."""
        i = torch.arange(q_len)
        first = torch.zeros_like(i) if self.lower is None else i + self.lower
        end = torch.full_like(i, kv_len) if self.upper is None else i + self.upper + 1
        return torch.stack([first, end], 1)

    def reaches_every_row(self, q_len: int, kv_len: int) -> bool:
        """Whether each query row sees some key. It is enough to look at the first and the last row."""
        lower = -q_len if self.lower is None else self.lower
        upper = kv_len if self.upper is None else self.upper
        return upper >= 0 and lower <= upper and q_len - 1 + lower < kv_len

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
    """Query row i sees key j if both lie in the same chunk of `size` positions (Llama 4)."""

    size: int

    def rows(self, q_len: int, kv_len: int) -> Tensor:
        """Int64 [q_len, 2]: the interval [lo, hi) of keys that each query row sees."""
        first = torch.arange(q_len) // self.size * self.size
        return torch.stack([first, first + self.size], 1)

    def __str__(self) -> str:
        return f"chunked({self.size})"


@dataclass(frozen=True)
class Intervals:
    """Query row i sees the keys of one interval `[lo, hi)`. The intervals are listed row by row (prefix-LM, spans)."""

    bounds: tuple[tuple[int, int], ...]

    def rows(self, q_len: int, kv_len: int) -> Tensor:
        """Int64 [q_len, 2]: the interval [lo, hi) of keys that each query row sees."""
        return torch.tensor(self.bounds)

    def __str__(self) -> str:
        return f"intervals({len(self.bounds)} rows)"


@dataclass(frozen=True)
class KeyPadding:
    """Key j of batch element b is seen if element [b, j] of the run-time tensor `source` says so."""

    source: str

    def rows(self, q_len: int, kv_len: int) -> Tensor:
        """Int64 [q_len, 2]: the interval [lo, hi) of keys that each query row can see."""
        return _all_keys(q_len, kv_len)

    def __str__(self) -> str:
        return f"key_padding({self.source})"


@dataclass(frozen=True)
class Limited:
    """Each query sees the keys up to a bound that is computed at run time, or from this bound on."""

    condition: str
    """The bound in words, such as `key <= cache_position[query]`."""

    def rows(self, q_len: int, kv_len: int) -> Tensor:
        """Int64 [q_len, 2]: the interval [lo, hi) of keys that each query row can see."""
        return _all_keys(q_len, kv_len)

    def __str__(self) -> str:
        return self.condition


Claim: TypeAlias = Band | Chunked | Intervals | KeyPadding | Limited


@dataclass(frozen=True)
class MaskSpec:
    """A list of claims: a key is seen if every claim lets it be seen. Without claims, all keys are seen."""

    claims: tuple[Claim, ...] = ()

    def __and__(self, other: MaskSpec) -> MaskSpec:
        return MaskSpec((*self.claims, *(c for c in other.claims if c not in self.claims)))

    def rows(self, q_len: int, kv_len: int) -> Tensor:
        """Int64 [q_len, 2]: the interval [lo, hi) of keys that each query row can see, [0, 0) for none."""
        bounds = _all_keys(q_len, kv_len)
        for claim in self.claims:
            first, end = claim.rows(q_len, kv_len).unbind(1)
            bounds = torch.stack([bounds[:, 0].maximum(first), bounds[:, 1].minimum(end)], 1)
        return bounds.where((bounds[:, 0] < bounds[:, 1])[:, None], 0)

    def visible(self, q_len: int, kv_len: int) -> Tensor:
        """Bool [q_len, kv_len], True where the key is seen if no key is padding and no run-time bound hides one."""
        first, end = self.rows(q_len, kv_len)[:, :, None].unbind(1)
        j = torch.arange(kv_len)
        return (first <= j) & (j < end)

    @property
    def band(self) -> Band:
        """The intersection of all `Band` claims."""
        bands = [c for c in self.claims if isinstance(c, Band)]
        lowers = [b.lower for b in bands if b.lower is not None]
        uppers = [b.upper for b in bands if b.upper is not None]
        return Band(max(lowers, default=None), min(uppers, default=None))

    @property
    def row_bounds(self) -> MaskSpec:
        """The claims that a kernel gets as an interval of keys for each row. A band can't express them."""
        return MaskSpec(tuple(c for c in self.claims if isinstance(c, (Chunked, Intervals, Limited))))

    def __str__(self) -> str:
        return " & ".join(map(str, self.claims)) or "none"


@dataclass(frozen=True)
class Unproven:
    """Nothing can be claimed about a mask, and this is the reason."""

    reason: Reason

    def __str__(self) -> str:
        return f"unproven: {self.reason}"


class EmptyRows(Enum):
    """What the model computes for a query row that sees no key."""

    NEVER = "never"
    """It is proven that no such row exists."""
    ZERO = "zero"
    """Zeros: a bool or -inf mask through scaled_dot_product_attention."""
    MEAN = "mean"
    """The mean of all values: every score is replaced by one finite number, such as finfo.min."""
    ANY = "any"
    """NaN, or the caller has said that such rows do not matter. Any result of a kernel is right."""
    OTHER = "other"
    """Something that no kernel computes, such as the softmax of scores to which -1e9 was added."""
