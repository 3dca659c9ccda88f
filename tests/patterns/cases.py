"""What the families of spellings are made of, and how a case is checked.

A family is a module with up to three tables: `MATCH` must be replaced, `KEEP` must stay native for the given reason,
and `RIGHT` may become either, but must give the right numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from neuron_attn_rewrite import RewriteConfig, RewrittenModule, rewrite
from neuron_attn_rewrite.config.options import TOLERANCES
from tests.helpers import ALWAYS, kernel_calls, relative_error

B, H, S, D = 2, 4, 24, 16
CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()
LOW = torch.finfo(torch.float32).min


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value [B, H, S, D], large enough that a wrong mask or scale shows."""
    return tuple(3 * torch.randn(B, H, S, D) for _ in range(3))  # type: ignore[return-value]


def grouped() -> tuple[Tensor, Tensor, Tensor]:
    """Four query heads on two kv heads."""
    return 3 * torch.randn(B, H, S, D), 3 * torch.randn(B, 2, S, D), 3 * torch.randn(B, 2, S, D)


def multi_query() -> tuple[Tensor, Tensor, Tensor]:
    """One kv head for all query heads."""
    return 3 * torch.randn(B, H, S, D), 3 * torch.randn(B, 1, S, D), 3 * torch.randn(B, 1, S, D)


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value as [B, S, H, D]."""
    return tuple(3 * torch.randn(B, S, H, D) for _ in range(3))  # type: ignore[return-value]


def folded() -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value as [B * H, S, D]."""
    return tuple(3 * torch.randn(B * H, S, D) for _ in range(3))  # type: ignore[return-value]


def cubes() -> tuple[Tensor, Tensor, Tensor]:
    """All sizes equal: nothing can be told from a shape."""
    return tuple(3 * torch.randn(4, 4, 4, 4) for _ in range(3))  # type: ignore[return-value]


def with_bias(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """Query, key, value and one more float tensor."""
    return lambda: (*qkv(), torch.randn(shape))


def with_padding(dtype: torch.dtype = torch.int64) -> tuple[Tensor, ...]:
    """Query, key, value and an attention_mask [B, S] that pads on the left, so that causal rows see no key."""
    mask = torch.ones(B, S, dtype=dtype)
    mask[0, :5] = 0
    return (*qkv(), mask)


def additive_causal(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((S, S), torch.finfo(dtype).min, dtype=dtype).triu(1)


def repeat_kv(x: Tensor, n: int = 2) -> Tensor:
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)


@dataclass(frozen=True)
class Match:
    """Must be found and replaced, with these facts in the report."""

    attention: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]] = qkv
    mask: str = "none"
    scale: float | None = None
    heads: tuple[int, int] | None = None
    """Query and kv heads."""
    bias: tuple[int, ...] | None = None
    replaced: int = 1
    config: RewriteConfig = field(default=ALWAYS)

    def check(self) -> None:
        rewritten = numbers_agree(self.attention, self.inputs, self.config)
        report = rewritten.report
        assert len(report.replaced) == len(report.sites) == self.replaced == len(kernel_calls(rewritten)), str(report)
        site = report.sites[0]
        assert str(site.mask) == self.mask, str(report)
        assert site.bias == self.bias, str(report)
        if self.scale is not None:
            assert site.scale is not None and abs(site.scale - self.scale) < 1e-6 * abs(self.scale)
        if self.heads is not None:
            assert (site.num_heads, site.num_kv_heads) == self.heads


@dataclass(frozen=True)
class Keep:
    """Looks like attention, and must stay for a reason that contains these words."""

    attention: Callable[..., Any]
    reason: str
    inputs: Callable[[], tuple[Any, ...]] = qkv

    def check(self) -> None:
        report = numbers_agree(self.attention, self.inputs).report
        assert not report.replaced, str(report)
        assert any(self.reason in reason for site in report.kept for reason in site.reasons), str(report)


@dataclass(frozen=True)
class Right:
    """May be replaced or not: the numbers must be right."""

    attention: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]] = qkv

    def check(self) -> None:
        numbers_agree(self.attention, self.inputs)


class Named(nn.Module):
    """A function as a module whose inputs keep their names: `attention_mask` is one by its name."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function


def as_module(attention: Callable[..., Any]) -> nn.Module:
    return attention if isinstance(attention, nn.Module) else Named(attention)


def numbers_agree(
    attention: Callable[..., Any], inputs: Callable[[], tuple[Any, ...]], config: RewriteConfig = ALWAYS
) -> RewrittenModule:
    """Rewrite with one set of inputs and compare on another, without the net that verification is."""
    model = as_module(attention).eval()
    rewritten = rewrite(model, inputs(), config=RewriteConfig(**{**vars(config), "verify": False}))
    fresh = inputs()
    results = []
    for module in (model, rewritten):
        torch.manual_seed(0)  # for dropout that stays
        with torch.no_grad():
            results.append(pytree.tree_leaves(module(*fresh)))
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert error_of(b, a) <= TOLERANCES[a.dtype], str(rewritten.report)
    return rewritten


def error_of(new: Tensor, old: Tensor) -> float:
    """The largest difference, relative to the largest magnitude in `old`, where `old` is a number."""
    if torch.allclose(old, new, rtol=0, atol=0, equal_nan=True):
        return 0.0
    nan = old.isnan()
    return relative_error(new.masked_fill(nan, 0), old.masked_fill(nan, 0))
